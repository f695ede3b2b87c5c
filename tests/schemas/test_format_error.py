"""A fault of a file is told in one sentence, whatever the kind of file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from evatune.errors import ConfigError, EvatuneError, RecordError
from evatune.schemas import FormatError, raise_with_path, short_repr
from tests.fuzzing import fuzz


@pytest.mark.parametrize("error", [RecordError, ConfigError])
def test_damage_becomes_a_sentence_with_the_file_and_what_to_do(error: type[EvatuneError]) -> None:
    with (
        pytest.raises(error, match=r"^'c\.json' holds no key; write it again$"),
        raise_with_path("c.json", "write it again", error),
    ):
        raise FormatError("holds no key")


LONG = ["x" * 10_000, 10**1000, [[[[1]]]] * 50, {number: number for number in range(99)}]


@pytest.mark.parametrize("value", LONG, ids=["text", "number", "list", "dict"])
def test_values_are_shown_in_one_short_line(value: Any) -> None:
    text = short_repr(value)
    assert len(text) <= 160
    assert "\n" not in text


def test_mutated_files_end_in_one_sentence(tmp_path: Path) -> None:
    for name, kind in fuzz.FILE_KINDS.items():
        if not name.startswith("data"):
            for seed in range(6):
                folder = tmp_path / f"{name}-{seed}"
                folder.mkdir()
                assert fuzz.outcome(kind, seed, folder) in ("accepted", "refused"), (name, seed)
