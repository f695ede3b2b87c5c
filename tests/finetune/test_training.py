"""The Trainer of a run."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from evatune.errors import ConfigError
from evatune.finetune.methods.base import Lora
from evatune.finetune.tasks import Task, find_domain
from evatune.finetune.training import build_trainer, training_shown
from evatune.utils import progress
from tests.finetune.helpers import MethodCase, small

torch.set_num_threads(1)


@dataclass(frozen=True)
class _Watching(Lora):
    """LoRA that notes, at every call of its hook, the step, the head and the head's gradient."""

    seen: list[tuple[int, Tensor, Tensor | None]] = field(default_factory=list)

    def after_step(self, model: nn.Module, step: int) -> None:
        (head,) = (
            p
            for name, p in model.named_parameters()
            if name.endswith("default.weight") and "classifier" in name
        )
        self.seen.append((step, head.detach().clone(), head.grad))


def _trainer(method: Lora, folder: Path, *overrides: str) -> Any:
    case = MethodCase("bert")
    rows = [{key: value[0] for key, value in batch.items()} for batch in case.of(1)]
    task = Task(
        models=find_domain("understanding").models,
        model=case.model(),
        train=rows,
        validation=None,
        test=rows,
        collator=transformers.default_data_collator,
        head=["classifier"],
    )
    model = case.adapted("lora")
    recipe = small("demo", *overrides)
    return build_trainer(recipe, task, method, model, folder, resumed=True)


def test_the_methods_hook_comes_after_each_step_with_the_gradients_still_there(
    tmp_path: Path,
) -> None:
    method = _Watching("watching")
    settings = ["training.steps=3", "training.accumulate=2", "training.schedule=constant"]
    trainer = _trainer(method, tmp_path, *settings, "training.save_every=9", "training.warmup=0")
    before = trainer.model.base_model.model.classifier.modules_to_save["default"].weight
    heads = [before.detach().clone()]
    trainer.train()
    assert [step for step, _, _ in method.seen] == [0, 1, 2]
    assert all(gradient is not None for _, _, gradient in method.seen)
    heads += [head for _, head, _ in method.seen]
    assert not any(torch.equal(one, other) for one, other in pairwise(heads))
    assert torch.equal(heads[-1], before)


def _rates(folder: Path, *settings: str) -> list[float]:
    """The learning rate, of at most 0.01, at each of ten steps, the first four of warm-up."""
    sizes = ["training.steps=10", "training.warmup=0.4", "training.learning_rate=0.01"]
    trainer = _trainer(Lora("lora"), folder, *sizes, *settings)
    trainer.create_optimizer_and_scheduler(10)
    rates = []
    for _ in range(11):
        rates.append(trainer.lr_scheduler.get_last_lr()[0])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    return rates


def test_the_learning_rate_rises_over_the_share_of_warmup_and_falls_to_zero(
    tmp_path: Path,
) -> None:
    rates = _rates(tmp_path, "training.schedule=linear")
    shares = [0, 1 / 4, 2 / 4, 3 / 4, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0]
    assert rates == pytest.approx([0.01 * share for share in shares])


def test_a_cosine_falls_to_the_floor(tmp_path: Path) -> None:
    rates = _rates(tmp_path, "training.schedule=cosine_with_min_lr", "training.floor=0.1")
    assert rates[4] == pytest.approx(0.01)
    assert rates[7] == pytest.approx((0.01 + 0.001) / 2)
    assert rates[10] == pytest.approx(0.001)


def test_a_floor_of_another_schedule_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"for training\.schedule=cosine_with_min_lr"):
        _trainer(Lora("lora"), tmp_path, "training.floor=0.1")


def test_gradients_are_cut_to_the_largest_norm(tmp_path: Path) -> None:
    one = ["training.steps=1", "training.save_every=9", "training.warmup=0"]
    norms = []
    for most in ("1e-4", "0"):
        method = _Watching("watching")
        trainer = _trainer(method, tmp_path, *one, f"training.max_grad_norm={most}")
        trainer.train()
        norms.append(sum(gradient.norm() for _, _, gradient in method.seen if gradient is not None))
    assert norms[0] <= 1.1e-4 < norms[1]


def test_a_tracker_that_is_not_known_is_told_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^Trainer refuses these settings: [^\n]*nobody[^\n]*$"):
        _trainer(Lora("lora"), tmp_path, "training.report_to=[nobody]")


@pytest.mark.parametrize("quiet", [False, True])
def test_training_tells_of_its_steps_loss_and_score(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, quiet: bool
) -> None:
    now = 0.0
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now))
    state = SimpleNamespace(global_step=0, max_steps=20)
    callbacks: list[Any] = []
    trainer = SimpleNamespace(
        state=state, add_callback=callbacks.append, remove_callback=callbacks.remove
    )
    with caplog.at_level(logging.INFO, "evatune"), training_shown(trainer, quiet):
        (callback,) = callbacks
        callback.on_log(None, state, None, {"loss": 1.234, "grad_norm": 3})
        callback.on_log(None, state, None, {"eval_loss": 1.1, "eval_score": 0.5})
        for state.global_step in (1, 2, 3, 4):
            now += 2
            callback.on_step_end(None, state, None)
    assert callbacks == []
    said = [record.message for record in caplog.records]
    assert said == ([] if quiet else SAID)


SAID = [
    "20 steps, about 40 s",
    "training: 3 of 20 steps, 6 s, training loss 1.23, validation score 0.5",
    "trained for 4 steps in 8 s, training loss 1.23, validation score 0.5",
]


def test_a_model_that_cannot_compute_activations_again_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers.BertPreTrainedModel, "supports_gradient_checkpointing", False)
    with pytest.raises(ConfigError, match=r"gradient_checkpointing is true, and the model 'demo'"):
        _trainer(Lora("lora"), tmp_path, "training.gradient_checkpointing=true")
