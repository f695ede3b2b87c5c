"""What is true of an adapter's start, whatever method made it: κ, participation ratio, ranks."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from evatune.adapters.lora_layers import lora_layers
from evatune.finetune.recipe import Recipe
from evatune.finetune.tasks import Task

_EXAMPLES = 24


@dataclass(frozen=True)
class StartFacts:
    """What is true of an adapter's start.

    Attributes:
        kappa: by which the first step is larger than that of PEFT's default start, the median over
            layers. None without an adapter.
        participation: (tr C)² / tr C², C the second moments of a layer's input, the median over
            layers. None without an adapter.
        ranks: layer → rank, where they are not the same everywhere.
    """

    kappa: float | None
    participation: float | None
    ranks: dict[str, int] | None


NO_FACTS = StartFacts(None, None, None)


def start_facts(model: nn.Module, task: Task, recipe: Recipe) -> StartFacts:
    """Return what is true of the adapter's start, by a pass over some training examples.

    r and α of κ are the recipe's; see `kappas_and_participation`.
    """
    rank = recipe.adapter.rank
    kappas, ratios = kappas_and_participation(model, task, rank, recipe.adapter.alpha)
    layers = lora_layers(model)
    return StartFacts(_median(kappas), _median(ratios), _redistributed(layers, rank))


@torch.no_grad()
def kappas_and_participation(
    model: nn.Module, task: Task, rank: int, alpha: float
) -> tuple[list[float], list[float]]:
    """Return κ and the input's participation ratio of each linear layer of the adapter.

    κ² = (s·r/α)² · E‖Ax‖² / (r·E‖x‖² / 3d) per layer, over the rows of its input, s the adapter's
    scale; the denominator is what PEFT's default A gives at s = α/r. Nothing without an adapter.
    """
    layers = lora_layers(model)
    if not layers:
        return [], []
    with _recorded_inputs(layers) as rows:
        _forward_some(model, task)
    kappas, ratios = [], []
    for name, parts in rows.items():
        layer = layers[name]
        x = torch.cat(parts)  # (n, d)
        a = _matrix_a(layer)
        assert a is not None  # others are not recorded
        relative = (x @ a.T).square().sum() * 3 * x.shape[1] / (rank * x.square().sum())
        kappas.append(layer.scaling["default"] * rank / alpha * math.sqrt(relative))
        second = x.T @ x
        ratios.append(float(second.trace() ** 2 / second.square().sum()))
    return kappas, ratios


def _forward_some(model: nn.Module, task: Task) -> None:
    """Run some training examples, one by one: nothing of a batch is padding."""
    was_training = model.training
    device = next(model.parameters()).device
    model.eval()
    for index in range(min(_EXAMPLES, len(task.train))):
        batch = task.collator([task.train[index]])
        model(**{key: value.to(device) for key, value in batch.items()})
    model.train(was_training)


@contextmanager
def _recorded_inputs(layers: Mapping[str, Any]) -> Iterator[dict[str, list[Tensor]]]:
    """Collect the inputs of linear layers inside, as rows of float32 by layer."""
    rows: dict[str, list[Tensor]] = defaultdict(list)

    def recorder(name: str) -> Callable[..., None]:
        return lambda _, inputs: rows[name].append(inputs[0].flatten(0, -2).float())

    linear = {name: layer for name, layer in layers.items() if _matrix_a(layer) is not None}
    hooks = [layer.register_forward_pre_hook(recorder(name)) for name, layer in linear.items()]
    try:
        yield rows
    finally:
        for hook in hooks:
            hook.remove()


def _matrix_a(layer: Any) -> Tensor | None:
    """Return A (r, d) in float32; None where the layer is no linear one, or has rank 0."""
    if "default" not in layer.lora_A:
        return None
    weight: Tensor = layer.lora_A["default"].weight
    return weight.float() if weight.ndim == 2 else None


def _redistributed(layers: Mapping[str, Any], rank: int) -> dict[str, int] | None:
    """Return the ranks; None where all are the recipe's, or there are none."""
    ranks = {name: int(layer.r.get("default", 0)) for name, layer in layers.items()}
    return None if set(ranks.values()) <= {rank} else ranks


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None
