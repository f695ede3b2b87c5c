"""The policy, and the windows that it sees."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from evatune.finetune.tasks.rl.policy import Imitator, Windows, rows_without_padding
from tests.finetune.helpers import batch_of
from tests.finetune.helpers import planted_episodes as planted

torch.set_num_threads(1)
# Where MuJoCo cannot draw, its half-made objects complain when they are collected.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <function"
    " (GLContext|Renderer).__del__:pytest.PytestUnraisableExceptionWarning"
)


def with_rubbish(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    padding = batch["attention_mask"] == 0
    changed = {key: batch[key].clone() for key in ("states", "actions", "labels", "returns_to_go")}
    for value in changed.values():
        value[padding] = 5.0
    return batch | changed


def test_a_window_ends_at_its_step_and_stays_within_its_episode() -> None:
    episodes = planted(3, 6)
    windows = Windows(episodes, 4)
    assert len(windows) == 9
    for first, length in ((0, 3), (3, 6)):
        for step in range(first, first + length):
            real = min(step - first + 1, 4)
            window = windows[step]
            assert window["attention_mask"].tolist() == [0] * (4 - real) + [1] * real
            for key in ("states", "actions", "labels"):
                assert torch.equal(
                    window[key][4 - real :], episodes[key][step + 1 - real : step + 1]
                )
                assert not window[key][: 4 - real].any()


def test_windows_apart_end_where_the_next_begins() -> None:
    episodes = planted(3, 6)
    apart, dense = Windows(episodes, 4, every=4), Windows(episodes, 4)
    assert len(apart) == 2
    for number, step in enumerate((3, 7)):
        assert torch.equal(apart[number]["states"], dense[step]["states"])


def test_rows_are_the_three_tokens_of_every_step_that_is_no_padding() -> None:
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]])
    for tokens in (3, 1):
        x = torch.randn(3, 4 * tokens, 5)
        kept = [
            x[b, tokens * t + i]
            for b in range(3)
            for t in range(4)
            for i in range(tokens)
            if mask[b, t]
        ]
        assert torch.equal(
            rows_without_padding(x, {"attention_mask": mask}, "layer"), torch.stack(kept)
        )


def test_what_padding_holds_reaches_no_row_no_prediction_and_no_loss(small_folder: Path) -> None:
    model = Imitator.from_pretrained(small_folder).eval()
    inputs: dict[str, torch.Tensor] = {}
    layers = {
        name: module for name, module in model.named_modules() if type(module).__name__ == "Conv1D"
    }
    for name, module in layers.items():
        module.register_forward_pre_hook(
            lambda _, args, name=name: inputs.update({name: args[0].detach()})
        )
    episodes = planted(6)
    batch = batch_of(
        Windows(episodes | {k: v / v.max() for k, v in episodes.items() if k != "lengths"}, 4),
        0,
        1,
        5,
    )
    found = []
    with torch.no_grad():
        for one in (batch, with_rubbish(batch)):
            output = model(**one)
            chosen = {name: rows_without_padding(x, one, name) for name, x in inputs.items()}
            found.append(
                (
                    output.loss,
                    output.action_preds[one["attention_mask"].bool()],
                    chosen,
                    dict(inputs),
                )
            )
    (loss, actions, chosen, everything), (loss_2, actions_2, chosen_2, everything_2) = found
    torch.testing.assert_close(loss, loss_2)
    torch.testing.assert_close(actions, actions_2)
    assert len(layers) == 8
    for name in layers:
        assert len(chosen[name]) == 3 * int(batch["attention_mask"].sum())
        torch.testing.assert_close(chosen[name], chosen_2[name])
    assert not torch.allclose(
        everything["encoder.h.0.attn.c_attn"], everything_2["encoder.h.0.attn.c_attn"]
    )


def test_the_loss_is_the_squared_error_over_real_steps(small_folder: Path) -> None:
    model = Imitator.from_pretrained(small_folder).eval()
    batch = batch_of(Windows(planted(6), 4), 0, 2, 5)
    output = model(**batch)
    squares = [
        (output.action_preds[b, t] - batch["labels"][b, t]).square()
        for b in range(3)
        for t in range(4)
        if batch["attention_mask"][b, t]
    ]
    torch.testing.assert_close(output.loss, torch.stack(squares).mean())
    assert model(**{key: value for key, value in batch.items() if key != "labels"}).loss is None
