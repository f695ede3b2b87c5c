"""Objectives that see gradients, against the gradients that torch computes for each example."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import evatune
from evatune import CalibrationConfig, Status
from evatune.calibration.checkpoint import Checkpoint
from evatune.calibration.loss_observer import count_examples
from evatune.errors import AdapterError, ConfigError, LayerError
from tests.helpers import lora_layers, state_of, tiny_llama, tokens
from tests.losses import (
    GRADIENTS,
    NAMES,
    Words,
    assert_leading,
    singles,
    summed,
    truth,
    words,
)


@pytest.mark.parametrize("twice", [False, True], ids=["called once", "called twice"])
def test_directions_are_those_of_the_examples_own_gradients(twice: bool) -> None:
    model, batches = Words(twice=twice).train(), words()
    found = evatune.calibrate(model, batches, GRADIENTS, targets=NAMES)
    assert_leading(found, truth(model, singles(batches), NAMES, summed(model)))
    assert {found.spectra[name].rows for name in NAMES[:1]} == {165}


def test_neither_the_size_nor_the_order_of_batches_matters() -> None:
    batches = words()
    together = evatune.calibrate(Words(), batches, GRADIENTS, targets=NAMES)
    apart = evatune.calibrate(Words(), singles(batches)[::-1], GRADIENTS, targets=NAMES)
    for name in NAMES:
        one, other = together.spectra[name], apart.spectra[name]
        assert one.energies == pytest.approx(other.energies, rel=1e-2)
        assert one.total_second_moment == pytest.approx(other.total_second_moment, rel=1e-5)


def test_language_models_are_asked_how_many_labels_their_loss_is_the_mean_over() -> None:
    model, batches = tiny_llama(), tokens(padded=True)
    for batch in batches:
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    found = evatune.calibrate(model, batches, GRADIENTS, targets=["q_proj"])
    examples = []
    for batch in batches:
        for i in range(len(batch["input_ids"])):
            real = batch["attention_mask"][i].bool()
            examples.append({key: value[i : i + 1, real] for key, value in batch.items()})
    moments = truth(
        model,
        examples,
        list(found.spectra),
        lambda e: model(**e).loss * (e["labels"].shape[1] - 1),
    )
    assert_leading(found, moments)
    assert found.spectra[next(iter(found.spectra))].rows == sum(
        int(batch["attention_mask"].sum()) for batch in batches
    )


def test_regression_gives_rows_that_whiten_the_inputs_and_initialize_an_adapter() -> None:
    model = get_peft_model(Words(), LoraConfig(r=2, target_modules=["up", "down"]))
    config = CalibrationConfig(objective="regression", rho=1, tolerance=0)
    found = evatune.initialize(model, words(), config=config, scale="whiten")
    plain, seen = Words().eval(), dict[str, list[Tensor]]()
    for name in found.spectra:
        plain.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: seen.setdefault(name, []).append(args[0].flatten(0, 1))
        )
    with torch.no_grad():
        for batch in words():
            plain(**batch)
    for name, layer in lora_layers(model).items():
        a = layer.lora_A["default"].weight.detach().double()
        rows = torch.cat(seen[name]).double()
        covariance = a @ (rows.T @ rows / len(rows)) @ a.T
        assert covariance == pytest.approx(torch.eye(len(a)).double(), abs=1e-3)


# -- the model and the caller's things stay as they were -----------------------------------------


def test_the_model_is_as_it_was_found_also_after_an_error() -> None:
    model = Words().train()
    model.up.weight.requires_grad_(False)
    before = state_of(model)
    evatune.calibrate(model, words(), GRADIENTS, targets=NAMES)
    assert state_of(model) == before

    def loss(model: nn.Module, batch: Any) -> Tensor:
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        evatune.calibrate(model, words(), GRADIENTS, targets=NAMES, loss=loss)
    assert state_of(model) == before
    assert torch.is_grad_enabled()


def test_a_base_without_any_gradient_and_no_grad_around_the_call_work() -> None:
    model = Words().requires_grad_(False)
    plain = evatune.calibrate(Words(), words(), GRADIENTS, targets=NAMES)
    with torch.no_grad():
        frozen = evatune.calibrate(model, words(), GRADIENTS, targets=NAMES)
    with torch.inference_mode():
        inference = evatune.calibrate(model, words(), GRADIENTS, targets=NAMES)
    for name in NAMES:
        for other in (frozen, inference):
            assert torch.equal(other.spectra[name].energies, plain.spectra[name].energies)


@pytest.mark.parametrize("objective", ["activations", "gradients"])
def test_data_that_leaves_inference_mode_on_changes_nothing(objective: str) -> None:
    def made_on_the_way() -> Generator[dict[str, Tensor]]:
        with torch.inference_mode():
            for batch in words((6, 9, 7, 8, 5, 4)):
                yield {key: value.clone() for key, value in batch.items()}

    config = CalibrationConfig(objective=objective, max_batches=4, tolerance=0)
    model = get_peft_model(Words(), LoraConfig(r=2, lora_alpha=1, target_modules=["up"]))
    batches = made_on_the_way()  # kept, so that it is not closed
    found = evatune.initialize(model, batches, config=config)
    assert not torch.is_inference_mode_enabled()
    plain = evatune.calibrate(Words(), words((6, 9, 7, 8)), found.config, targets=["up"])
    assert torch.equal(found.spectra["up"].energies, plain.spectra["up"].energies)
    assert not any(parameter.is_inference() for parameter in model.parameters())
    batches.close()


def test_a_model_made_in_inference_mode_gets_one_sentence() -> None:
    with torch.inference_mode():
        model = Words()
    with pytest.raises(AdapterError, match=r"embedding\.weight was made under"):
        evatune.calibrate(model, words(), GRADIENTS, targets=["up"])
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["up"]))
    with pytest.raises(AdapterError, match="inference_mode"):
        evatune.initialize(adapted, words(), config=GRADIENTS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("inside", [False, True], ids=["around the call", "in the forward pass"])
def test_gradients_in_16_bits_neither_vanish_nor_overflow(dtype: torch.dtype, inside: bool) -> None:
    # float16 loses what is below 6e-8, which is most of these
    def loss(model: nn.Module, batch: Any) -> Tensor:
        with torch.autocast("cpu", dtype) if inside else nullcontext():
            return 1e-6 * model(**batch)["loss"]

    full = evatune.calibrate(
        Words(), words(), GRADIENTS, targets=["up", "down"], loss=lambda m, b: 1e-6 * m(**b)["loss"]
    )
    with nullcontext() if inside else torch.autocast("cpu", dtype):
        half = evatune.calibrate(Words(), words(), GRADIENTS, targets=["up", "down"], loss=loss)
    for name, spectrum in full.spectra.items():
        assert half.spectra[name].total_energy == pytest.approx(spectrum.total_energy, rel=0.05)
        assert half.spectra[name].energies[:2] == pytest.approx(spectrum.energies[:2], rel=0.05)


# -- what cannot be done gets one sentence -------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"objective": "loss"}, "choose one of activations, gradients, regression"),
        ({"objective": "gradients", "sketch": "exact"}, "leave out sketch='exact'"),
        ({"objective": "regression", "center": True}, "leave out center=True"),
    ],
)
def test_settings_that_contradict_the_objective_are_refused(options: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        CalibrationConfig(**options)


def test_a_loss_for_an_objective_without_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="objective='gradients'"):
        evatune.calibrate(Words(), words(), targets=NAMES, loss=lambda m, b: m(**b)["loss"])


def test_a_gradient_that_is_nan_is_named_as_an_input_that_is() -> None:
    def loss(model: Any, batch: Any) -> Tensor:
        value = model(**batch)["loss"]
        return value * torch.nan if batch["ids"].shape[1] == 9 else value

    found = evatune.calibrate(Words(), words(), GRADIENTS, targets=NAMES, loss=loss)
    assert set(found.status.values()) == {Status.NON_FINITE}
    with pytest.raises(LayerError, match=r"embedding \(first in batch 2\).*as a gradient"):
        found.require_usable()


@pytest.mark.parametrize(
    ("batch", "count"),
    [
        (torch.zeros(3, 2), 3),
        (torch.tensor(1.0), 1),
        ((torch.zeros(5, 2), torch.zeros(5)), 5),
        ({"name": "x", "x": torch.zeros(4, 1)}, 4),
        ([{"name": "x", "x": torch.zeros(6, 1)}, {"x": torch.zeros(2, 1)}], 6),
        ("text", 1),
    ],
)
def test_examples_are_counted_by_the_first_tensor(batch: Any, count: int) -> None:
    assert count_examples(batch) == count


# -- what is kept --------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["gradients", "regression"])
def test_a_record_a_checkpoint_and_a_merge_keep_what_was_found(
    objective: str, tmp_path: Path
) -> None:
    config = replace(GRADIENTS, objective=objective)
    whole = evatune.calibrate(Words(), words(), config, targets=NAMES)
    whole.save(tmp_path / "whole.safetensors")
    assert_same(evatune.Calibration.load(tmp_path / "whole.safetensors"), whole)

    class Interrupted(Exception):
        pass

    def stop(progress: evatune.Progress) -> None:
        if progress.batch == 2:
            raise Interrupted

    file = tmp_path / "checkpoint.safetensors"
    options: dict[str, Any] = {"config": config, "targets": NAMES}
    with pytest.raises(Interrupted):
        evatune.calibrate(
            Words(), words(), **options, progress=stop, checkpoint=Checkpoint(file, every=1)
        )
    resumed = Checkpoint(file, every=1, resume=True)
    assert_same(evatune.calibrate(Words(), words(), **options, checkpoint=resumed), whole)


def assert_same(one: evatune.Calibration, other: evatune.Calibration) -> None:
    for name, spectrum in one.spectra.items():
        state, expected = spectrum.state(), other.spectra[name].state()
        assert state.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[key]) for key, tensor in state.items()), name


def test_calibrations_of_gradients_are_joined_and_of_regressions_refused() -> None:
    batches = words((6, 9, 40, 7, 11, 30))
    whole = evatune.calibrate(Words(), batches, GRADIENTS, targets=["up", "down"])
    halves = [
        evatune.calibrate(Words(), half, GRADIENTS, targets=["up", "down"])
        for half in (batches[:3], batches[3:])
    ]
    merged = evatune.Calibration.merge(halves)
    for name, spectrum in whole.spectra.items():
        joined = merged.spectra[name]
        assert joined.rows == spectrum.rows
        assert joined.energies[:2] == pytest.approx(spectrum.energies[:2], rel=0.1)
        assert joined.total_second_moment == pytest.approx(spectrum.total_second_moment, rel=1e-5)
        assert joined.second_moments[:2] == pytest.approx(spectrum.second_moments[:2], rel=0.3)
    regression = replace(whole, config=replace(GRADIENTS, objective="regression"))
    with pytest.raises(ConfigError, match="calibrate on all the data at once"):
        evatune.Calibration.merge([regression, regression])
