"""Cost of an objective that sees gradients, over bare forward and backward passes.

    python benchmarks/gradients.py [--output benchmarks/results/gradients.json]

The models, layers and batches of benchmarks/scale.py. The bare passes go backward to the
activations only, as the objective does: no weight has a gradient. Correctness is asserted first, by
the gradients of weights that torch computes here for each example. All times are of one run; only
their ratios mean anything. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from init import machine
from scale import MODELS, TARGETS, all_of, load, timed
from torch import Tensor, nn

import evatune

REPEATS = {"llm": 5, "minilm": 7}
BATCHES = {"llm": 1, "minilm": 4}
CHECKED = 16  # leading directions that must be near the best


def mean_square(model: nn.Module, batch: Any) -> Tensor:
    """A loss that depends on every layer, the mean over examples."""
    loss: Tensor = model(**batch).last_hidden_state.square().mean()
    return loss


def bare(model: nn.Module, batches: list[Any]) -> None:
    """Forward passes, and backward passes from the loss to the output of the embedding."""
    for batch in batches:
        mean_square(model, batch).backward()  # type: ignore[no-untyped-call]


def ready(model: nn.Module) -> None:
    """Let no weight require a gradient, and the output of the embedding require one."""
    model.requires_grad_(False)
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    embedding.register_forward_hook(lambda module, args, output: output.requires_grad_())


def check(name: str, model: nn.Module, batches: list[Any]) -> float:
    """Return the least share of the best directions' gradient that the calibration's have."""
    config = all_of(len(batches), objective="gradients")
    found = evatune.calibrate(model, batches, config, targets=TARGETS[name], loss=mean_square)
    names = list(found.spectra)
    shares = []
    for layer_name in (names[0], names[len(names) // 2]):
        moment = _moment(model, layer_name, batches)
        v = found.spectra[layer_name].directions[:CHECKED].double()
        best = torch.linalg.eigvalsh(moment)[-CHECKED:].sum()
        shares.append(float((v @ moment * v).sum() / best))
        assert shares[-1] > 0.97, (layer_name, shares[-1])
    return min(shares)


def _moment(model: nn.Module, name: str, batches: list[Any]) -> Tensor:
    """(d, d) Σ GᵀG over examples."""
    weight: Any = model.get_submodule(name).weight
    weight.requires_grad_(True)
    moment = torch.zeros(weight.shape[1], weight.shape[1], dtype=torch.float64)
    for batch in batches:
        for place in range(len(batch["input_ids"])):
            example = {key: value[place : place + 1] for key, value in batch.items()}
            (gradient,) = torch.autograd.grad(mean_square(model, example), weight)
            moment += gradient.double().T @ gradient.double()
    weight.requires_grad_(False)
    return moment


def over_passes(name: str, model: nn.Module, batches: list[Any], objective: str) -> dict[str, Any]:
    """Time of a calibration over that of the bare passes, the two taking turns."""
    config = all_of(len(batches), objective=objective)

    def ours() -> None:
        evatune.calibrate(model, batches, config, targets=TARGETS[name], loss=mean_square)

    bare(model, batches[:1])
    ours()
    pairs = [(timed(lambda: bare(model, batches))[0], timed(ours)[0]) for _ in range(REPEATS[name])]
    ratios = sorted(mine / passes for passes, mine in pairs)
    return {
        "ratio": statistics.median(ratios),
        "least": ratios[0],
        "most": ratios[-1],
        "bare_seconds": statistics.median(passes for passes, _ in pairs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    found: dict[str, Any] = {"machine": machine()}
    for name in MODELS:
        model, batches = load(name, BATCHES[name])
        ready(model)
        found[f"{name}_least_captured"] = check(name, model, batches[:1])
        for objective in ("gradients", "regression"):
            found[f"{name}_{objective}"] = over_passes(name, model, batches, objective)
            print(name, objective, json.dumps(found[f"{name}_{objective}"]), flush=True)
    if options.output:
        options.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
