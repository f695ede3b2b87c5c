"""Files of text for the tests of loading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from evatune.loading.texts import load_texts


def texts_of(source: Path, *arguments: Any, **options: Any) -> list[str]:
    return list(load_texts(source, *arguments, **options)["text"])


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path
