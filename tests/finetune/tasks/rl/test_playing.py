"""Episodes that the policy plays."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from evatune.finetune.run import run
from evatune.finetune.tasks.rl.playing import play
from evatune.finetune.tasks.rl.policy import Imitator
from tests.finetune.helpers import small_rl as small

torch.set_num_threads(1)
# Where MuJoCo cannot draw, its half-made objects complain when they are collected.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <function"
    " (GLContext|Renderer).__del__:pytest.PytestUnraisableExceptionWarning"
)


class Expert(torch.nn.Module):
    """The scripted expert in the place of a model."""

    def __init__(self, task: str, sign: float = 1.0) -> None:
        super().__init__()
        import metaworld.policies

        self.policy, self.sign = metaworld.policies.ENV_POLICY_MAP[f"{task}-v3"](), sign
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, states: torch.Tensor, **_: Any) -> Any:
        chosen = [
            self.policy.get_action(state.numpy().astype(np.float64)) for state in states[:, -1]
        ]
        return SimpleNamespace(
            action_preds=self.sign * torch.tensor(np.stack(chosen), dtype=torch.float32)[:, None]
        )


# the experts ask for more than the simulator takes
@pytest.mark.filterwarnings("ignore:Constant:UserWarning")
@pytest.mark.parametrize(("sign", "success"), [(1, 1.0), (-1, 0.0)])
def test_the_judge_lets_an_expert_succeed_and_its_opposite_fail(sign: int, success: float) -> None:
    found = play(
        Expert("faucet-close", sign),
        "test",
        None,
        tasks=["faucet-close"],
        episodes=3,
        length=4,
    )
    assert found["success"] == success
    assert (found["steps"] < 100) == (success == 1)
    assert found["score"] == pytest.approx(success * (1 - found["steps"] / 200))
    assert (found["score_error"] > 0) == (success == 1)


@pytest.mark.filterwarnings("ignore:Constant:UserWarning")
def test_an_episode_may_score_by_its_success_however_late() -> None:
    found = play(
        Expert("faucet-close"),
        "test",
        None,
        tasks=["faucet-close"],
        episodes=1,
        length=4,
        by_success=True,
    )
    assert found["steps"] > 1
    assert (found["score"], found["score_error"]) == (1, 0)


@pytest.mark.usefixtures("no_drawing")
def test_where_mujoco_cannot_draw_the_judge_says_so_and_goes_on(
    small_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        found = play(
            Imitator.from_pretrained(small_folder).eval(),
            "test",
            tmp_path,
            tasks=["push"],
            episodes=1,
            length=4,
        )
    assert found["steps"] == 200
    assert "MuJoCo cannot draw here (no driver)" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_judged_in_the_simulator_and_filmed(small_folder: Path, tmp_path: Path) -> None:
    result = run(small(small_folder, "method=eva"), tmp_path / "run", quiet=True)
    assert 0 <= result["score"] <= 1
    assert result["measures"].keys() == {"score_error", "success", "steps"}
    assert (tmp_path / "run" / "calibration.safetensors").exists()
    film = tmp_path / "run" / "episode.gif"
    if not film.exists():
        pytest.skip("MuJoCo cannot draw here, so there is no episode.gif")
    with Image.open(film) as image:
        assert image.n_frames > 5
        low, high = image.convert("L").getextrema()
    assert high > low + 50
