"""The one line for Trainer users."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

import evatune
from evatune.errors import AdapterError, DataError
from tests.helpers import scalars, tiny_bert, tokens

torch.set_num_threads(1)


def adapted() -> PeftModel:
    return get_peft_model(
        tiny_bert("classification"),
        LoraConfig(r=4, task_type="SEQ_CLS", target_modules="all-linear"),
    )


def trainer(
    folder: Path,
    *,
    report_to: Sequence[str] = (),
    logs: bool = False,
    callbacks: Any = None,
    model_init: Any = None,
    **settings: Any,
) -> Trainer:
    rows = [
        {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor(number % 2)}
        for batch in tokens(8, padded=True)
        for number, (ids, mask) in enumerate(
            zip(batch["input_ids"], batch["attention_mask"], strict=True)
        )
    ]
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        report_to=list(report_to),
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="steps" if logs else "no",
        logging_steps=1,
        dataloader_pin_memory=False,
        learning_rate=1e-2,
        **({"max_steps": 4, "save_strategy": "no"} | settings),
    )
    return Trainer(
        model=adapted() if model_init is None else None,
        model_init=model_init,
        args=arguments,
        train_dataset=rows,
        eval_dataset=rows[:4] if "eval_strategy" in settings else None,
        callbacks=callbacks,
    )


def test_one_line_between_the_trainer_and_its_training(tmp_path: Path) -> None:
    run = trainer(tmp_path / "a")
    calibration = evatune.initialize(run)
    assert calibration.batches > 1
    run.train()
    held = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in run.model.parameters() if p.requires_grad} <= held
    b = [p for n, p in run.model.named_parameters() if "lora_B" in n]
    assert all(p.any() for p in b)
    run.save_model(str(tmp_path / "b"))
    loaded = PeftModel.from_pretrained(tiny_bert("classification"), str(tmp_path / "b"))
    with torch.no_grad():
        batch = tokens()[0]
        assert torch.allclose(
            loaded.eval()(**batch).logits, run.model.eval()(**batch).logits, atol=1e-6
        )


def test_the_training_data_come_in_the_order_they_would_have_come(tmp_path: Path) -> None:
    plain, ours = trainer(tmp_path / "a"), trainer(tmp_path / "b")
    evatune.initialize(ours)
    torch.manual_seed(0)
    expected = [batch["input_ids"] for batch in plain.get_train_dataloader()]
    torch.manual_seed(0)
    found = [batch["input_ids"] for batch in ours.get_train_dataloader()]
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert len(ours.accelerator._dataloaders) == len(plain.accelerator._dataloaders)


def test_too_late_is_a_clear_error(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.create_optimizer()
    before, config = (
        {name: value.clone() for name, value in run.model.state_dict().items()},
        str(run.model.peft_config),
    )
    with pytest.raises(AdapterError, match=r"already has an optimizer.*before trainer\.train"):
        evatune.initialize(run)
    assert str(run.model.peft_config) == config
    assert before.keys() == run.model.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items())
    run.train()
    assert not any("evatune/batches" in line for line in run.state.log_history)


def test_batches_beside_a_trainer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="takes its batches from the trainer"):
        evatune.initialize(trainer(tmp_path), tokens())


def test_random_states_are_as_they_were(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    evatune.initialize(run)
    assert torch.equal(torch.rand(1), expected)


def test_a_finished_calibration_starts_a_trainers_model_without_a_batch(tmp_path: Path) -> None:
    run, direct = trainer(tmp_path / "a"), trainer(tmp_path / "b")
    calibration = evatune.initialize(direct)
    run.get_train_dataloader = None  # type: ignore[assignment, method-assign]
    evatune.initialize(run, calibration)
    ours, theirs = run.model.state_dict(), direct.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    run.create_optimizer()
    with pytest.raises(AdapterError, match="already has an optimizer"):
        evatune.initialize(run, calibration)


# -- a start that would be thrown away -------------------------------------------------------------


def starts_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_A" in name}


def test_a_trainer_that_builds_its_model_at_train_is_refused_with_the_way_to_do_it(
    tmp_path: Path,
) -> None:
    run = trainer(tmp_path, model_init=adapted)
    for given in ((), (evatune.calibrate(adapted(), tokens(8)),)):
        with pytest.raises(
            AdapterError,
            match=r"model_init.*evatune\.initialize\(model, batches\) inside model_init",
        ):
            evatune.initialize(run, *given)


def test_a_start_inside_model_init_is_the_one_that_is_trained(tmp_path: Path) -> None:
    calibration = evatune.calibrate(adapted(), tokens(8), evatune.CalibrationConfig(rank=4))

    def build() -> PeftModel:
        model = adapted()
        evatune.initialize(model, calibration)
        return model

    run = trainer(tmp_path, model_init=build)
    expected = starts_of(build())
    run.args.learning_rate = 0.0
    run.train()
    found = starts_of(run.model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(a, expected[name]) for name, a in found.items())


def test_a_model_that_was_replaced_after_its_start_is_not_trained(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    evatune.initialize(run)
    run.model = run.model_wrapped = adapted()
    with pytest.raises(AdapterError, match=r"not the one that evatune\.initialize"):
        run.train()


def test_a_restart_with_smaller_batches_goes_on_with_the_start(tmp_path: Path) -> None:
    run = trainer(tmp_path, auto_find_batch_size=True)
    evatune.initialize(run)
    run.args.learning_rate = 0.0
    expected, plain, sizes = starts_of(run.model), run.compute_loss, []

    def scarce(model: nn.Module, inputs: Any, **options: Any) -> Any:
        sizes.append(len(inputs["input_ids"]))
        if len(sizes) == 2:
            raise RuntimeError("CUDA out of memory.")
        return plain(model, inputs, **options)

    run.compute_loss = scarce  # type: ignore[method-assign]
    run.train()
    assert sizes[-1] < sizes[0]
    assert all(torch.equal(a, expected[name]) for name, a in starts_of(run.model).items())


def test_the_best_model_and_a_run_that_goes_on_have_the_ranks_of_the_start(tmp_path: Path) -> None:
    steps = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    run = trainer(tmp_path, load_best_model_at_end=True, **steps)
    calibration = evatune.initialize(run)
    run.train()
    best = load_file(Path(str(run.state.best_model_checkpoint)) / "adapter_model.safetensors")
    found = get_peft_model_state_dict(run.model)
    assert found.keys() == best.keys()
    assert all(torch.equal(value, best[name]) for name, value in found.items())
    for again in (evatune.initialize, lambda run: evatune.initialize(run, calibration)):
        run = trainer(tmp_path, max_steps=5, **steps)
        again(run)
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
        assert run.state.global_step == 5


# -- trackers --------------------------------------------------------------------------------------


class Tracker(TrainerCallback):
    """What a tracker of `report_to` is to the trainer: it opens a run as training begins, and then
    takes what is logged."""

    def __init__(self) -> None:
        self.open, self.lines = False, []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.open = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        assert self.open
        self.lines.append((state.global_step, dict(logs)))


def test_trackers_get_what_the_calibration_found_before_the_first_loss(tmp_path: Path) -> None:
    tracker = Tracker()
    run = trainer(tmp_path, logs=True, callbacks=[tracker])
    run.remove_callback(PrinterCallback)
    calibration = evatune.initialize(run)
    assert not tracker.lines
    run.train()
    step, figures = tracker.lines[0]
    plan = calibration.allocate()
    ranks = {name: rank for name, rank in plan.ranks.items() if rank}
    shares = [calibration.spectra[name].certificate.captured(rank) for name, rank in ranks.items()]  # type: ignore[union-attr]
    assert step == 0
    assert figures.pop("epoch") == 0
    assert figures.pop("evatune/energy") == pytest.approx(sum(shares) / len(shares))
    statuses = {key: figures.pop(key) for key in list(figures) if key.startswith("evatune/status/")}
    assert set(statuses) <= {f"evatune/status/{status}" for status in evatune.Status}
    assert sum(statuses.values()) == len(calibration.layers) == 13
    ratios = calibration.step_ratios().values()
    spread = [calibration.spectra[name].participation_ratio for name in ranks]
    assert figures == {
        "evatune/batches": calibration.batches,
        "evatune/ranks": 4 * 13,
        "evatune/parameters": plan.parameters,
        "evatune/layers": len(ranks),
        "evatune/estimated_missed": calibration.estimated_missed,
        "evatune/participation_ratio": median(spread),
        "evatune/step_ratio": median(ratios),
        "evatune/step_ratio/least": min(ratios),
        "evatune/step_ratio/largest": max(ratios),
        "evatune/lora_rate": median(ratios) * run.args.learning_rate,
    }
    assert [logs.get("loss") is not None for _, logs in tracker.lines[1:5]] == [True] * 4
    assert [line for line in run.state.log_history if "evatune/batches" in line] == [
        run.state.log_history[0]
    ]


def test_only_the_last_of_several_initializations_is_logged(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.remove_callback(PrinterCallback)
    evatune.initialize(run)
    evatune.initialize(run, rank=2)
    run.train()
    assert [line["evatune/ranks"] for line in run.state.log_history if "evatune/ranks" in line] == [
        2 * 13
    ]


def test_tensorboard_shows_it(tmp_path: Path) -> None:
    run = trainer(tmp_path, report_to=["tensorboard"], logs=True)
    run.remove_callback(PrinterCallback)
    calibration = evatune.initialize(run)
    run.train()
    found = scalars(tmp_path)
    assert found["train/evatune/batches"] == calibration.batches
    assert 0 < found["train/evatune/energy"] <= 1
    assert "train/loss" in found
