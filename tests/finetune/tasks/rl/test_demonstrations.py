"""Episodes of the experts."""

from __future__ import annotations

from contextlib import closing

import numpy as np
import pytest
import torch

from evatune.finetune.tasks.rl.demonstrations import demonstrations
from evatune.finetune.tasks.rl.simulator import TRAIN, Simulator, seed_for

torch.set_num_threads(1)
# Where MuJoCo cannot draw, its half-made objects complain when they are collected.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <function"
    " (GLContext|Renderer).__del__:pytest.PytestUnraisableExceptionWarning"
)


def test_demonstrations_are_successes_with_the_experts_own_actions_as_labels() -> None:
    found = demonstrations("faucet-close", TRAIN, 2)
    assert (
        found["lengths"].sum()
        == len(found["states"])
        == len(found["actions"])
        == len(found["labels"])
    )
    assert len(found["lengths"]) == 2
    assert (found["lengths"] < 200).all()
    noise = found["actions"] - found["labels"]
    assert 0 < noise.std() < 0.3
    assert found["labels"].abs().max() <= 1
    with closing(Simulator("faucet-close")) as simulator:
        episode = simulator.episode(seed_for(TRAIN, 0))
        infos = []
        for expected, action in zip(
            found["states"], found["actions"][: found["lengths"][0]], strict=False
        ):
            np.testing.assert_allclose(episode.state, expected, atol=1e-5)
            episode.step(action.numpy())
            infos.append(episode.success)
    assert infos[-1]
    assert not any(infos[:-1])
