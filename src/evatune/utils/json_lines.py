"""Files of one JSON object per line, which a killed process may leave with half a line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def whole_lines(text: str) -> list[str]:
    """Return the lines of a file without what follows the last line break."""
    return text.rpartition("\n")[0].splitlines()


def append_json_line(path: Path, value: dict[str, Any]) -> None:
    """Append an object in one write, in place of half a line that a killed process has left.

    Raises ValueError for numbers that are not finite.
    """
    text = json.dumps(value, allow_nan=False) + "\n"
    with path.open("a+b") as file:
        file.seek(0)
        head, line_break, _ = file.read().rpartition(b"\n")
        file.truncate(len(head + line_break))
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())
