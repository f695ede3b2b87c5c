"""A model of words with a loss, and the gradients that torch computes for each example."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import evatune
from evatune import CalibrationConfig

GRADIENTS = CalibrationConfig(rank=4, rho=1, objective="gradients", tolerance=0)
NAMES = ["embedding", "up", "down"]


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
