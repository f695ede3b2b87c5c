"""How much of what an adapter has learned lies in the rows that its A started with.

    python benchmarks/moved.py understanding-movie adapter.rank=8 adapter.alpha=8 \
        training.steps=60 training.batch_size=16 --rates 2e-4 1e-3 3e-3

Of the change of the weights, B·A, the share of ‖BA‖² that is left after projection onto the rows of
A at the start, over all layers. It is 1 where A has stayed where it was, and r/d by chance where
training has rewritten it. The start is that of a run of one step at a rate of nearly 0.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from evatune.finetune.recipe import Recipe
from evatune.finetune.recipe_files import load
from evatune.finetune.run import run

NO_RATE = 1e-12  # at which a step moves nothing


def share_in_start(start: Mapping[str, Tensor], end: Mapping[str, Tensor]) -> tuple[float, float]:
    """Return the share of ‖BA‖² in the rows of A at the start, and what it is by chance.

    Args:
        start, end: an adapter's matrices by their names in its file.
    """
    inside, whole, by_chance = 0.0, 0.0, 0.0
    for name in (name for name in end if name.endswith("lora_A.weight")):
        a, b = end[name].double(), end[name.replace("lora_A", "lora_B")].double()
        basis = torch.linalg.qr(start[name].double().T).Q  # (d, r)
        product = b @ a
        inside += float((product @ basis).square().sum())
        whole += float(product.square().sum())
        by_chance += float(product.square().sum()) * basis.shape[1] / basis.shape[0]
    return inside / whole, by_chance / whole


def measured(recipe: Recipe) -> dict[str, float | str]:
    """Return the figures of a recipe's run."""
    with tempfile.TemporaryDirectory() as folder:
        trained, started = Path(folder, "trained"), Path(folder, "started")
        result = run(recipe, trained, quiet=True)
        training = replace(recipe.training, steps=1, learning_rate=NO_RATE)
        run(replace(recipe, training=training), started, quiet=True)
        end, start = (
            load_file(path / "adapter" / "adapter_model.safetensors") for path in (trained, started)
        )
    share, by_chance = share_in_start(start, end)
    validation = result["validation"] or {"loss": result["eval_loss"]}
    return {
        "method": recipe.method,
        "rate": recipe.training.learning_rate,
        "share": round(share, 3),
        "by_chance": round(by_chance, 3),
        "loss": round(validation["loss"], 3),
        "score": round(result["score"], 3),
    }


def lines_of(
    name: str, settings: Sequence[str], methods: Sequence[str], rates: Sequence[float]
) -> list[dict[str, float | str]]:
    """Return a line per method and rate, and print it."""
    lines = []
    for method in methods:
        for rate in rates:
            more = [f"method={method}", f"training.learning_rate={rate}"]
            lines.append(measured(load(name, [*settings, *more])))
            print(json.dumps(lines[-1]), flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe")
    parser.add_argument("settings", nargs="*", help="of the recipe, such as seed=1")
    parser.add_argument("--methods", nargs="+", default=["lora", "eva-paper-centered"])
    parser.add_argument("--rates", nargs="+", type=float, required=True)
    parser.add_argument("--output", type=Path, help="a JSON file")
    arguments = parser.parse_args()
    lines = lines_of(arguments.recipe, arguments.settings, arguments.methods, arguments.rates)
    if arguments.output:
        record = {"recipe": arguments.recipe, "settings": arguments.settings, "lines": lines}
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
