"""The file of a tuned comparison's runs: one JSON object per finished run, read and appended to."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from evatune.errors import ConfigError
from evatune.finetune.recipe import Recipe
from evatune.finetune.recipe_tree import as_tree
from evatune.schemas import raise_with_path
from evatune.schemas.format_error import FormatError
from evatune.schemas.text import read_text, validate_json
from evatune.schemas.tuned import RunLine
from evatune.utils.json_lines import append_json_line, whole_lines


def settings_digest(recipe: Recipe) -> str:
    """Return what stands for a run's settings in names: equal settings have equal ones."""
    settings = json.dumps(as_tree(recipe), sort_keys=True)
    return hashlib.sha256(settings.encode()).hexdigest()[:10]


def read_lines(paths: Iterable[Path]) -> list[RunLine]:
    """Return the runs of several files; of two with the same settings, a tested one.

    What follows the last line break was being written when its process was killed: it is left out.

    Raises ConfigError for a line that is not one of a tuned comparison.
    """
    lines: dict[str, RunLine] = {}
    for path in paths:
        with raise_with_path(
            path, "is it the runs.jsonl of `evatune compare --tune`?", ConfigError
        ):
            for number, text in enumerate(whole_lines(read_text(path)), 1):
                try:
                    line = validate_json(RunLine, text)
                except FormatError as fault:
                    raise FormatError(f"has a line {number} that {fault}") from fault
                known = lines.get(line.id)
                if known is None or line.tested > known.tested:
                    lines[line.id] = line
    return list(lines.values())


def append_line(path: Path, fields: dict[str, Any]) -> RunLine:
    """Append a run in one write, in place of one that a killed process left half written.

    Numbers that are not finite are written as null.

    Returns:
        The run as it is read again.
    """
    known = finite(fields)
    line = RunLine.model_validate(known)
    append_json_line(path, known)
    return line


def finite(value: Any) -> Any:
    """Return a value for JSON, with None for numbers that are not finite."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
