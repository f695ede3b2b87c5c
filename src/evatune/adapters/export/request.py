"""The request for an export, and its result."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ExportRequest:
    """A saved adapter, and where and how to export it.

    Attributes:
        model: base model, hub id or folder; None for the one that the adapter names.
    """

    adapter: Path
    out: Path
    overwrite: bool = False
    model: str | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Exported:
    """The result of an export: a line for people, and facts that JSON can hold."""

    summary: str
    facts: dict[str, Any]
