"""Facts about an adapter's start, whatever method made it: κ, participation ratio, ranks."""

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
from evatune.modeling.forward import call_model, model_device, to_device
from evatune.modeling.state import preserve_model_state

_EXAMPLES = 24
_MOST_ROWS = 128  # of an example, evenly over it


@dataclass(frozen=True)
class StartFacts:
    """Facts about an adapter's start.

    Attributes:
        kappa: the factor by which the first step is larger than that of PEFT's default start, the
            median over layers, by A's rows and the adapter's scale: that B has a larger rate in
            LoRA+ is not in it. None without an adapter, and of AdaLoRA's.
        participation: (tr C)² / tr C², C the second moments of a layer's input, the median over
            layers. None where kappa is.
        ranks: layer → rank, where they are not the same everywhere.
    """

    kappa: float | None
    participation: float | None
    ranks: dict[str, int] | None


def start_facts(model: nn.Module, task: Task, recipe: Recipe) -> StartFacts:
    """Return facts about the adapter's start, by a pass over some training examples.

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
    with preserve_model_state(model), _recorded_inputs(layers) as rows:
        _run_training_examples(model.eval(), task)
    kappas, ratios = [], []
    for name, parts in rows.items():
        layer = layers[name]
        x = torch.cat(parts).float()  # (n, d)
        a = _matrix_a(layer)
        assert a is not None  # others are not recorded
        relative = (x @ a.T).square().sum() * 3 * x.shape[1] / (rank * x.square().sum())
        kappas.append(layer.scaling["default"] * rank / alpha * math.sqrt(relative))
        second = x.T @ x
        ratios.append(float(second.trace() ** 2 / second.square().sum()))
    return kappas, ratios


def _run_training_examples(model: nn.Module, task: Task) -> None:
    """Run the model on some training examples, one by one: nothing of a batch is padding."""
    device = model_device(model)
    for index in range(min(_EXAMPLES, len(task.train))):
        call_model(model, to_device(task.collator([task.train[index]]), device))


@contextmanager
def _recorded_inputs(layers: Mapping[str, Any]) -> Iterator[dict[str, list[Tensor]]]:
    """Collect rows of the inputs of linear layers, by layer, in the precision that they have."""
    rows: dict[str, list[Tensor]] = defaultdict(list)

    def recorder(name: str) -> Callable[..., None]:
        def record(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].flatten(0, -2)
            every = math.ceil(len(x) / _MOST_ROWS)
            rows[name].append(x[::every].clone() if every > 1 else x)

        return record

    linear = {name: layer for name, layer in layers.items() if _matrix_a(layer) is not None}
    hooks = [layer.register_forward_pre_hook(recorder(name)) for name, layer in linear.items()]
    try:
        yield rows
    finally:
        for hook in hooks:
            hook.remove()


def _matrix_a(layer: Any) -> Tensor | None:
    """Return A (r, d) in float32; None where the layer is no linear one, or has rank 0.

    AdaLoRA's A is a parameter, beside singular values of 0 from which its first step is another.
    """
    a = layer.lora_A["default"] if layer.r.get("default") else None
    return a.weight.float() if isinstance(a, nn.Linear) else None


def _redistributed(layers: Mapping[str, Any], rank: int) -> dict[str, int] | None:
    """Return the ranks; None where all are the recipe's, or there are none."""
    ranks = {name: int(layer.r.get("default", 0)) for name, layer in layers.items()}
    return None if set(ranks.values()) <= {rank} else ranks


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None
