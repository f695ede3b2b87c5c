"""Objectives that see gradients, against the gradients that torch computes for each example."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import evatune
from evatune import CalibrationConfig, Status
from evatune.calibration.checkpoint import Checkpoint
from evatune.calibration.loss_observer import count_examples
from evatune.errors import AdapterError, ConfigError, DataError, LayerError, TargetError
from tests.helpers import Toy, inputs, lora_layers, state_of, tiny_bert, tiny_llama, tokens

GRADIENTS = CalibrationConfig(rank=4, rho=1, objective="gradients", tolerance=0)


class Words(nn.Module):
    """Token ids and a label each, through an embedding, linear layers and a loss."""

    def __init__(self, call: Callable[..., Any] | None = None, twice: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(30, 12)
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 12)
        self.head = nn.Linear(12, 5)
        self.dropout = nn.Dropout(0.5)
        self.call, self.twice = call, twice

    def block(self, h: Tensor) -> Tensor:
        h = h + self.down(torch.tanh(self.up(self.dropout(h))))
        return h + self.down(torch.tanh(self.up(h.roll(1, 1)))) if self.twice else h

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        h = self.embedding(ids)
        h = self.block(h) if self.call is None else self.call(self.block, h)
        logits = self.head(h)
        if labels is None:
            return {"logits": logits}
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return {"loss": loss, "logits": logits}


def words(lengths: tuple[int, ...] = (6, 9, 40), size: int = 3) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "ids": torch.randint(0, 30, (size, length), generator=generator),
            "labels": torch.randint(0, 5, (size, length), generator=generator),
        }
        for length in lengths
    ]


def truth(
    model: nn.Module, examples: list[Any], names: list[str], loss: Callable[[Any], Tensor]
) -> dict[str, Tensor]:
    """Σ GᵀG over examples (d, d) float64 by layer; `loss` is an example's own."""
    layers = {name: model.get_submodule(name) for name in names}
    weights: dict[str, Any] = {name: layer.weight for name, layer in layers.items()}
    moments: dict[str, Tensor] = {}
    model.eval()
    for example in examples:
        gradients = torch.autograd.grad(loss(example), list(weights.values()))
        for (name, layer), gradient in zip(layers.items(), gradients, strict=True):
            g = gradient.T if isinstance(layer, nn.Embedding) else gradient.flatten(1)
            g = g.double()
            moments[name] = moments.get(name, 0) + g.T @ g
    return moments


def assert_leading(calibration: evatune.Calibration, moments: dict[str, Tensor]) -> None:
    """The calibration has the leading eigenpairs of these sums."""
    for name, moment in moments.items():
        spectrum = calibration.spectra[name]
        values = torch.linalg.eigvalsh(moment).flip(0)[: len(spectrum.energies)]
        v = spectrum.directions.double()
        assert float((v @ moment * v).sum()) >= 0.99 * float(values.sum()), name
        assert float(spectrum.energies.sum()) * spectrum.rows == pytest.approx(
            float(values.sum()), rel=0.02
        ), name
        assert spectrum.total_energy * spectrum.rows == pytest.approx(
            float(moment.trace()), rel=0.05
        ), name


def singles(batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    return [
        {key: value[i : i + 1] for key, value in batch.items()}
        for batch in batches
        for i in range(len(batch["ids"]))
    ]


def summed(model: nn.Module) -> Callable[[Any], Tensor]:
    return lambda example: model(**example)["loss"] * example["labels"].numel()


NAMES = ["embedding", "up", "down"]


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


@pytest.mark.parametrize("reentrant", [False, True])
def test_activations_that_are_computed_twice_count_once(reentrant: bool) -> None:
    def call(block: Callable[[Tensor], Tensor], h: Tensor) -> Any:
        return checkpoint(block, h, use_reentrant=reentrant)

    plain = evatune.calibrate(Words(), words(), GRADIENTS, targets=["up", "down"])
    saved = evatune.calibrate(Words(call), words(), GRADIENTS, targets=["up", "down"])
    for name, spectrum in plain.spectra.items():
        assert saved.spectra[name].rows == spectrum.rows
        assert torch.allclose(saved.spectra[name].energies, spectrum.energies, rtol=1e-4)


class Pictures(nn.Module):
    """Convolutions with activations that are computed in place, and one label per image."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.second = nn.Conv2d(6, 8, 3, stride=2)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = nn.functional.relu_(self.first(x))
        h = nn.functional.relu_(self.second(h))
        return self.head(h.mean((2, 3)))


def test_patches_of_images_are_the_tokens_of_an_example() -> None:
    generator = torch.Generator().manual_seed(0)
    pairs = [
        (torch.randn(4, 3, 9, 9, generator=generator), torch.randint(0, 4, (4,))) for _ in range(6)
    ]

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    model = Pictures()
    names = ["first", "second", "head"]
    found = evatune.calibrate(model, pairs, GRADIENTS, targets=names, loss=loss)
    examples = [(x[i : i + 1], y[i : i + 1]) for x, y in pairs for i in range(4)]
    assert_leading(found, truth(model, examples, names, lambda example: loss(model, example)))


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
    found = evatune.initialize(model, words(), config=config, scale="whiten-matched")
    plain, seen = Words().eval(), dict[str, list[Tensor]]()
    for name in found.spectra:
        plain.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: seen.setdefault(name, []).append(args[0].flatten(0, 1))
        )
    with torch.no_grad():
        for batch in words():
            plain(**batch)
    for name, layer in lora_layers(model).items():
        spectrum = found.spectra[name]
        a = layer.lora_A["default"].weight.detach().double()
        rows = torch.cat(seen[name]).double()
        covariance = a @ (rows.T @ rows / len(rows)) @ a.T
        usual = spectrum.total_second_moment / (3 * a.shape[1])
        assert covariance / usual == pytest.approx(torch.eye(len(a)).double(), abs=1e-3)


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


def test_a_model_made_in_inference_mode_gets_one_sentence() -> None:
    with torch.inference_mode():
        model = Words()
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["up"]))
    with pytest.raises(AdapterError, match="inference_mode"):
        evatune.initialize(adapted, words(), config=GRADIENTS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_in_16_bits_neither_vanish_nor_overflow(dtype: torch.dtype) -> None:
    # float16 loses what is below 6e-8, which is much of these
    def loss(model: nn.Module, batch: Any) -> Tensor:
        return 1e-4 * model(**batch)["loss"]

    full = evatune.calibrate(Words(), words(), GRADIENTS, targets=["up", "down"], loss=loss)
    with torch.autocast("cpu", dtype):
        half = evatune.calibrate(Words(), words(), GRADIENTS, targets=["up", "down"], loss=loss)
    for name, spectrum in full.spectra.items():
        assert half.spectra[name].total_energy == pytest.approx(spectrum.total_energy, rel=0.05)


# -- what cannot be done gets one sentence -------------------------------------------------------


def without_labels() -> list[dict[str, Tensor]]:
    return [{"ids": batch["ids"]} for batch in words()]


@pytest.mark.parametrize(
    ("batches", "loss", "says"),
    [
        (without_labels(), None, "needs a loss, and the model returned no loss; give batches with"),
        (words(), lambda m, b: m(**b)["logits"], r"one number, and .* of shape \(3, 6, 5\)"),
        (words(), lambda m, b: 1.0, "loss.model, batch. returned a float"),
        (words(), lambda m, b: m(**b)["loss"].detach(), "depends on no target layer"),
        (words(), lambda m, b: b["labels"].sum(), "one number, and .*int64"),
    ],
)
def test_a_loss_that_is_none_is_refused(batches: Any, loss: Any, says: str) -> None:
    with pytest.raises(DataError, match=says):
        evatune.calibrate(Words(), batches, GRADIENTS, targets=NAMES, loss=loss)


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


def test_weights_that_no_layer_is_called_for_are_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    with pytest.raises(TargetError, match=r"multiplied inside other modules: 1\.self_attn"):
        evatune.calibrate(
            model,
            [torch.randn(2, 4, 8)],
            GRADIENTS,
            targets=["self_attn"],
            loss=lambda m, b: m(b).sum(),
        )


def test_a_gradient_that_is_nan_is_named_as_an_input_that_is() -> None:
    def loss(model: Any, batch: Any) -> Tensor:
        value = model(**batch)["loss"]
        return value * torch.nan if batch["ids"].shape[1] == 9 else value

    found = evatune.calibrate(Words(), words(), GRADIENTS, targets=NAMES, loss=loss)
    assert set(found.status.values()) == {Status.NON_FINITE}
    with pytest.raises(LayerError, match=r"embedding \(first in batch 2\).*as a gradient"):
        found.require_usable()


def test_layers_without_a_gradient_have_no_signal() -> None:
    class Half(Words):
        def block(self, h: Tensor) -> Tensor:
            with torch.no_grad():
                self.up(h)
            self.down(h.new_ones(len(h), 20))  # whose result nobody uses
            return h

    found = evatune.calibrate(Half(), words(), GRADIENTS, targets=NAMES)
    assert found.status["up"] is found.status["down"] is Status.NO_SIGNAL
    assert found.status["embedding"].usable


# -- rows= and masks -----------------------------------------------------------------------------


def test_rows_choose_tokens_of_inputs_and_gradients_alike() -> None:
    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).square().mean((1, 2)).mean()

    def first_half(activation: Tensor, batch: Tensor, name: str) -> Tensor:
        return activation[:, :8].flatten(0, 1)

    model, batches = Toy().eval(), inputs()
    found = evatune.calibrate(
        model, batches, GRADIENTS, targets=["down"], loss=loss, rows=first_half
    )
    assert {spectrum.rows for spectrum in found.spectra.values()} == {6 * 4 * 8}
    with pytest.raises(DataError, match=r"return activation\[mask\]"):
        evatune.calibrate(
            model,
            batches,
            GRADIENTS,
            targets=["down"],
            loss=loss,
            rows=lambda activation, batch, name: activation.mean(1),
        )


def test_padding_counts_neither_as_input_nor_as_gradient() -> None:
    model, batches = tiny_bert(), tokens(padded=True)
    found = evatune.calibrate(
        model,
        batches,
        GRADIENTS,
        targets=["query"],
        loss=lambda m, b: m(**b).last_hidden_state[:, 0].square().mean(),
    )
    rows = sum(int(batch["attention_mask"].sum()) for batch in batches)
    assert {spectrum.rows for spectrum in found.spectra.values()} == {rows}


@pytest.mark.parametrize(
    ("batch", "count"),
    [
        (torch.zeros(3, 2), 3),
        (torch.tensor(1.0), 1),
        ((torch.zeros(5, 2), torch.zeros(5)), 5),
        ({"name": "x", "x": torch.zeros(4, 1)}, 4),
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
