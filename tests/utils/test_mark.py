"""A folder of ours is known by a list of what it holds, with content."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from evatune.errors import ConfigError
from evatune.utils.mark import MARK
from evatune.utils.outputs import claimed_folder
from tests.helpers import texts_below, tree, write_folder


def forged(folder: Path, **changes: Any) -> None:
    record = json.loads((folder / MARK).read_text()) | changes
    (folder / MARK).write_text(json.dumps(record))


@pytest.mark.parametrize(
    "change",
    [
        "add",
        "edit",
        "same size",
        "nested",
        "empty folder",
        "link for file",
        "link for folder",
        "no list",
        "list is a link",
        "other format",
        "deep list",
        "list of names",
    ],
)
def test_a_folder_is_replaced_only_if_it_holds_what_the_list_says(change: str, work: Path) -> None:
    write_folder("out", "old")
    out = work / "out"
    if change == "add":
        (out / "calibration.safetensors").write_text("years")
    elif change in ("edit", "same size"):
        (out / "a").write_text("OLD" if change == "same size" else "years")
    elif change == "nested":
        (out / "sub" / "thesis").write_text("years")
    elif change == "empty folder":
        (out / "sub" / "folder").mkdir()
    elif change == "link for file":
        (out / "a").rename(work / "a")
        (out / "a").symlink_to(work / "a")
    elif change == "link for folder":
        (out / "sub").rename(work / "sub")
        (out / "sub").symlink_to(work / "sub")
    elif change == "no list":
        (out / MARK).unlink()
        (out / "export.json").write_text(json.dumps({"files": os.listdir(out)}))
    elif change == "list is a link":
        (out / MARK).rename(work / "list")
        (out / MARK).symlink_to(work / "list")
    elif change == "other format":
        forged(out, format="evatune-output-0")
    elif change == "deep list":
        (out / MARK).write_text("[" * 100_000)
    else:
        forged(out, files=["a", "sub/b"])
    before = tree()
    with (
        pytest.raises(ConfigError, match="--overwrite leaves it alone"),
        claimed_folder("out", overwrite=True),
    ):
        pass
    assert tree() == before


def test_a_folder_from_which_the_user_took_a_file_is_replaced() -> None:
    write_folder("out", "old")
    Path("out/a").unlink()
    write_folder("out", "new")
    assert texts_below("out") == {"new"}
