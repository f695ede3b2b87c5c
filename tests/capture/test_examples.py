"""Inputs and output gradients of layers in pairs: each call once, examples and tokens apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import evatune
from evatune import Status
from evatune.errors import DataError, TargetError
from tests.helpers import Toy, inputs, tiny_bert, tokens
from tests.losses import GRADIENTS, NAMES, Words, assert_leading, truth, words


@pytest.mark.parametrize("twice", [False, True], ids=["called once", "called twice"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_activations_that_are_computed_twice_count_once(reentrant: bool, twice: bool) -> None:
    def call(block: Callable[[Tensor], Tensor], h: Tensor) -> Any:
        return checkpoint(block, h, use_reentrant=reentrant)

    plain = evatune.calibrate(Words(twice=twice), words(), GRADIENTS, targets=["up", "down"])
    saved = evatune.calibrate(Words(call, twice), words(), GRADIENTS, targets=["up", "down"])
    for name, spectrum in plain.spectra.items():
        assert saved.spectra[name].rows == spectrum.rows
        assert torch.allclose(saved.spectra[name].energies, spectrum.energies, rtol=1e-4)


def test_a_gradient_that_the_loss_itself_takes_does_not_count() -> None:
    def with_penalty(model: nn.Module, batch: Any) -> Tensor:
        inputs: list[Tensor] = []
        hook = model.up.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
        loss = model(**batch)["loss"]
        hook.remove()
        (gradient,) = torch.autograd.grad(loss, inputs, create_graph=True)
        return loss + 0 * gradient.square().sum()

    def loss(model: nn.Module, batch: Any) -> Tensor:
        value: Tensor = model(**batch)["loss"]
        return value

    plain = evatune.calibrate(Words(), words(), GRADIENTS, targets=["down"], loss=loss)
    penalized = evatune.calibrate(Words(), words(), GRADIENTS, targets=["down"], loss=with_penalty)
    assert torch.equal(penalized.spectra["down"].energies, plain.spectra["down"].energies)
    assert penalized.spectra["down"].rows == plain.spectra["down"].rows


def test_a_vector_that_is_of_no_example_is_one_row() -> None:
    class WithQuery(Words):
        def block(self, h: Tensor) -> Tensor:
            return h + self.down(torch.tanh(self.up(h[0, 0].detach())))

    found = evatune.calibrate(WithQuery(), words(), GRADIENTS, targets=["up", "embedding"])
    assert found.spectra["up"].rows == 3
    assert found.spectra["up"].total_energy > 0


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
    for count in (16, 15):  # of odd numbers of places the mean is the place in the middle
        with pytest.raises(DataError, match=r"return activation\[mask\]"):
            evatune.calibrate(
                model,
                [batch[:, :count] for batch in batches],
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


class Halved(nn.Module):
    """Every second token goes on, with a mask of its own, through a block that is checkpointed."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.input, self.inner, self.reentrant = nn.Linear(8, 8), Inner(reentrant), reentrant

    def forward(self, x: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        h, mask = self.input(x)[:, ::2], attention_mask[:, ::2]
        out = self.inner(h, attention_mask=mask).square().mean(-1)
        return {"loss": (out * mask).sum(1).mean()}


class Inner(nn.Module):
    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.layer, self.reentrant = nn.Linear(8, 8), reentrant

    def forward(self, h: Tensor, attention_mask: Tensor) -> Tensor:
        def block(h: Tensor) -> Tensor:
            return torch.tanh(self.layer(h))

        if self.reentrant is None:
            return block(h)
        out: Tensor = checkpoint(block, h, use_reentrant=self.reentrant)
        return out


def test_a_mask_that_a_model_makes_on_the_way_counts_where_activations_are_computed_again() -> None:
    mask = torch.ones(4, 12, dtype=torch.long)
    mask[1:, 4:] = 0
    x = torch.randn(4, 12, 8) * (1 + 9 * (1 - mask[..., None]))
    batches = [{"x": x, "attention_mask": mask}] * 3
    plain, *saved = (
        evatune.calibrate(Halved(mode), batches, GRADIENTS, targets=["input", "layer"])
        for mode in (None, False, True)
    )
    name = "inner.layer"
    for calibration in saved:
        assert calibration.spectra[name].rows == plain.spectra[name].rows == 36
        energies = calibration.spectra[name].energies
        assert torch.allclose(energies, plain.spectra[name].energies, rtol=1e-4)


def test_rows_that_a_whole_batch_shares_are_of_one_example() -> None:
    class WithPositions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.content, self.positions = nn.Linear(8, 4), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            place = self.positions(torch.eye(8)[None])  # (1, tokens, 4), for all examples
            return {"loss": (self.content(x) + place).square().sum((1, 2)).mean()}

    config = evatune.CalibrationConfig(rank=8, rho=1, objective="gradients")
    batches = [torch.randn(4, 8, 8)] * 3
    found = evatune.calibrate(WithPositions(), batches, config, targets=["positions"])
    energies = found.spectra["positions"].energies
    # one gradient (4, 8) per batch has four directions; that of each pair of tokens would add up
    assert energies[:4].min() > 100 * energies[4:].sum()
