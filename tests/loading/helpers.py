"""Files of text and of records for the tests of loading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from evatune.loading.columns import find_records
from evatune.loading.records import Origin, Records
from evatune.loading.tables import load_table
from evatune.loading.texts import load_texts

ASKED, SAID = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}
FROM = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]


def texts_of(source: Path, *arguments: Any, **options: Any) -> list[str]:
    return list(load_texts(source, *arguments, **options)["text"])


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def records(folder: Path, *rows: dict[str, Any], columns: tuple[str, ...] = ()) -> Records:
    path = folder / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return find_records(load_table(path), columns, Origin("mine.jsonl"))
