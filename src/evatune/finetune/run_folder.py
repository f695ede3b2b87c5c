"""The folder of a run: what is in it, whose it is, and what it says once the run is finished."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from evatune.calibration import Calibration
from evatune.errors import ConfigError, EvatuneError
from evatune.finetune.methods import find_method
from evatune.finetune.metrics import METRICS
from evatune.finetune.recipe import REFERENCE, Recipe
from evatune.finetune.recipe_tree import as_tree, flat, parse
from evatune.schemas import FormatError, raise_with_path, short_repr
from evatune.schemas.run import Evaluation, Result
from evatune.schemas.text import parse_json, read_text, validate_json
from evatune.utils.atomic import write_text
from evatune.utils.names import CALIBRATION_FILE
from evatune.utils.text import ABSENT, shortened

RESULT, RECIPE, EVALUATION = "result.json", "recipe.json", "evaluation.json"
INITIAL_ADAPTER, CHECKPOINTS = "start", "checkpoints"
RESUME_ADVICE = "make room, then run the same command again to go on"


def read_result(folder: Path) -> dict[str, Any] | None:
    """Return what a finished run has written, or None for one that is not finished.

    Raises RecordError for a damaged one.
    """
    path = folder / RESULT
    if not path.exists():
        return None
    with raise_with_path(path, "remove it, and the run is done again"):
        return validate_json(Result, read_text(path)).model_dump()


def read_evaluation(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the scores that `evatune evaluate` added to a finished run, by task; {} without any.

    Raises RecordError for a damaged file.
    """
    path = folder / EVALUATION
    if not path.exists():
        return {}
    with raise_with_path(path, "remove it, and evaluate the run again"):
        evaluation = validate_json(Evaluation, read_text(path))
    return {name: task.model_dump() for name, task in evaluation.tasks.items()}


def add_evaluation(folder: Path, measured: Mapping[str, Mapping[str, Any]]) -> None:
    """Write what a run was measured on, beside its other tasks and in place of the same ones."""
    evaluation = Evaluation.model_validate({"tasks": {**read_evaluation(folder), **measured}})
    write_text(folder / EVALUATION, json.dumps(evaluation.model_dump(), indent=2) + "\n")


def finished_result(recipe: Recipe, folder: Path) -> dict[str, Any] | None:
    """Return what the recipe's run has written; None where it is not finished.

    Raises ConfigError for a folder of another run, or of something else.
    """
    require_own_run(folder, as_tree(recipe))
    return read_result(folder)


def finished_run(folder: Path) -> tuple[Recipe, dict[str, Any]]:
    """Return the recipe and the result of the finished run in a folder.

    Raises:
        ConfigError: a folder without a run, with one that is not finished, or a damaged recipe.
        RecordError: a damaged result.
    """
    if not (folder / RECIPE).is_file():
        raise ConfigError(
            f"{str(folder)!r} holds no run of evatune; give the folder that `evatune train` wrote,"
            " such as runs/RECIPE-METHOD-seed0"
        )
    recipe = _read_recipe(folder / RECIPE, "the run cannot be measured; train it anew")
    result = read_result(folder)
    if result is None:
        raise ConfigError(
            f"the run in {str(folder)!r} is not finished; give its `evatune train` command again,"
            " which goes on with it"
        )
    return recipe, result


def read_start(recipe: Recipe, folder: Path) -> Calibration | None:
    """Return the calibration that a run's adapter started from; None without, as in controls."""
    path = folder / CALIBRATION_FILE
    if not find_method(recipe.method).starts_as_calibrated or not path.is_file():
        return None
    return Calibration.load(path)


def reference_run(recipe: Recipe, folder: Path) -> Path | None:
    """Return the folder of a finished run of LoRA beside this one; None where there is none.

    It differs in method and learning rate alone. Of several rates, the one of the smallest loss: a
    choice in LoRA's favor.
    """
    if recipe.method == REFERENCE:
        return None
    settings = _without_method(as_tree(recipe))
    losses: dict[Path, float] = {}
    for path in sorted(folder.absolute().parent.glob(f"*/{RESULT}")):
        try:
            tree, result = as_tree(_read_recipe(path.parent / RECIPE)), read_result(path.parent)
        except EvatuneError:  # what lies beside this run is no part of it
            continue
        if tree["method"] == REFERENCE and _without_method(tree) == settings and result is not None:
            loss = result["eval_loss"]
            losses[path.parent] = math.inf if math.isnan(loss) else loss
    return min(losses, key=lambda path: losses[path], default=None)


def _without_method(tree: dict[str, Any]) -> dict[str, Any]:
    training = {key: value for key, value in tree["training"].items() if key != "learning_rate"}
    return {**tree, "method": None, "training": training}


def require_own_run(folder: Path, tree: dict[str, Any]) -> None:
    """Raise a ConfigError unless the folder holds this recipe's run, or is free."""
    if (folder / RECIPE).is_file():
        changed = _changes(as_tree(_read_recipe(folder / RECIPE)), tree)
        if changed:
            raise ConfigError(
                f"{str(folder)!r} holds a run with other settings: {shortened(changed)}; name"
                " another --out, or give the settings that it has"
            )
    elif not _is_free(folder):
        raise ConfigError(f"{str(folder)!r} exists and holds no run of evatune; name another --out")


def _read_recipe(path: Path, advice: str = "its run cannot go on; name another --out") -> Recipe:
    with raise_with_path(path, advice, ConfigError):
        fields = parse_json(read_text(path))
        if not isinstance(fields, dict):
            raise FormatError("is damaged: it does not hold keys with values")
    return parse(fields, f"{str(path)!r}, whose run cannot go on,")


def _changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return the keys whose values differ, each with both: "training.steps is 60 there, not 20"."""
    there, here = flat(before), flat(after)
    names = sorted({*there, *here})
    return [
        f"{name} is {_value(there, name)} there, not {_value(here, name)}"
        for name in names
        if there.get(name, ABSENT) != here.get(name, ABSENT)
    ]


def _value(values: dict[str, Any], name: str) -> str:
    return short_repr(values[name]) if name in values else "missing"


def _is_free(folder: Path) -> bool:
    """Return whether the folder does not exist, or holds hidden files at most."""
    if not folder.exists():
        return True
    return folder.is_dir() and all(path.name.startswith(".") for path in folder.iterdir())


@contextmanager
def claimed_run(recipe: Recipe, folder: Path) -> Iterator[None]:
    """Mark the folder as this run's, and clear it again if the run fails before it trains.

    Some mistakes in a recipe show only then, such as a rank budget that the layers cannot take up.
    """
    try:
        if not (folder / RECIPE).exists():
            write_text(folder / RECIPE, json.dumps(as_tree(recipe), indent=2) + "\n")
        yield
    except BaseException:
        if not (folder / METRICS).exists():
            _remove_traces(folder)
        raise


def _remove_traces(folder: Path) -> None:
    for name in (CALIBRATION_FILE, INITIAL_ADAPTER, CHECKPOINTS, RECIPE):
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
