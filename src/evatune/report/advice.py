"""What a tuned comparison advises: by validation, a method and a rate for each task."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from evatune.finetune.comparison.tuned_cells import Cell, Group, base_name
from evatune.finetune.methods import METHODS
from evatune.finetune.recipe import REFERENCE


@dataclass(frozen=True)
class Advice:
    """The method with the lowest validation loss on a task, in a sentence."""

    task: str
    method: str
    learning_rate: float
    text: str
    command: str | None  # that trains with it; None where the recipe is not known


def advice(group: Group) -> list[Advice]:
    """Return what to train with, for each task with at least two methods to choose from.

    Tests have no say in it: who chose by them would need other tests.
    """
    chosen = []
    for task in group.tasks:
        cells = [cell for cell in group.cells_on(task) if _can_be_chosen(cell)]
        if len(cells) > 1:
            best, second, *_ = sorted(cells, key=lambda cell: cell.validation_loss)
            assert best.rate is not None  # its loss is finite
            text = f"train with {best.method} at {best.rate:.3g}: {_reason(best, second)}"
            command = train_command(best)
            chosen.append(Advice(task, best.method, best.rate, text, command))
    return chosen


def _can_be_chosen(cell: Cell) -> bool:
    """Return whether a user would train with the method: it is no control, and did not diverge."""
    known = METHODS.get(base_name(cell.method))
    is_choice = cell.method == REFERENCE or (known and known.role in ("eva", "competitor"))
    return bool(is_choice) and math.isfinite(cell.validation_loss)


def _reason(best: Cell, second: Cell) -> str:
    losses, others = best.tuning_losses, second.tuning_losses
    shared = sorted(losses.keys() & others.keys())
    lower = sum(losses[seed] < others[seed] for seed in shared)
    return (
        f"its validation loss is the lowest, {best.validation_loss:.4g}; next is {second.method}'s,"
        f" {second.validation_loss:.4g}, higher with {lower} of {len(shared)} tuning seeds"
    )


def train_command(cell: Cell, seed: int | None = None) -> str | None:
    """Return the command that trains at the cell's rate; None without a known recipe or a rate.

    Args:
        seed: of the run; None for the recipe's.
    """
    if cell.overrides is None or cell.rate is None:
        return None
    settings = dict(cell.overrides)
    settings.pop("seed", None)
    changed = {"method": settings.pop("method", base_name(cell.method))}
    changed |= {} if seed is None else {"seed": seed}
    changed |= {"training.learning_rate": cell.rate}
    words = [f"{key}={value}" for key, value in (changed | settings).items()]
    return shlex.join(["evatune", "train", cell.recipe, *words])


def repeat_command(cell: Cell) -> str | None:
    """Return the command that repeats the cell's first test run; None without recipe or test."""
    return train_command(cell, min(cell.scores)) if cell.scores else None


def advice_lines(groups: Sequence[Group]) -> list[str]:
    """Return the advice on every task as lines for the terminal."""
    lines = []
    for group in groups:
        for each in advice(group):
            name = " ".join(filter(None, (group.domain, each.task, group.condition)))
            lines.append(f"{name}: {each.text}.")
            if each.command is not None:
                lines.append(f"  {each.command}")
    return lines
