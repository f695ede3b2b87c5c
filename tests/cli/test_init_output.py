"""What `evatune init` replaces, and what it leaves alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import FILES
from tests.conftest import Command, refused


def test_an_output_folder_that_exists_is_refused(init: Command, work: Path) -> None:
    (work / "out").mkdir()
    refused(init(), "'out' exists", "--overwrite", folder=work, left=frozenset({"out"}))
    assert list((work / "out").iterdir()) == []


def test_overwrite_replaces_a_folder_that_evatune_wrote(init: Command, work: Path) -> None:
    assert init(max_batches=2).status == 0
    before = (work / "out" / "run.json").read_text()
    assert init(max_batches=2, seed=5, overwrite=True).status == 0
    assert (work / "out" / "run.json").read_text() != before
    assert {path.name for path in (work / "out").iterdir()} == FILES
    assert [path.name for path in work.iterdir()] == ["out"]


def test_overwrite_leaves_what_evatune_did_not_write(init: Command, work: Path) -> None:
    (work / "out").mkdir()
    (work / "out" / "thesis.tex").write_text("years")
    refused(
        init(overwrite=True),
        "not written by evatune",
        "--out",
        folder=work,
        left=frozenset({"out"}),
    )
    (work / "out" / "calibration.safetensors").touch()
    refused(init(overwrite=True), "thesis.tex", "--out", folder=work, left=frozenset({"out"}))
    assert (work / "out" / "thesis.tex").read_text() == "years"


def test_overwrite_does_not_replace_the_folder_one_is_in(init: Command, work: Path) -> None:
    (work / "calibration.safetensors").touch()
    refused(init(out=".", overwrite=True), "the folder you are in", "--out")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("error", "status"), [(OSError(28, "No space left on device"), 2), (KeyboardInterrupt(), 130)]
)
def test_a_failure_while_writing_leaves_the_earlier_results(
    init: Command, work: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int
) -> None:
    assert init(max_batches=2).status == 0
    before = contents(work / "out")

    def fail(*_: Any) -> str:
        raise error

    monkeypatch.setattr("evatune.report.pages.calibration.render", fail)
    assert init(max_batches=2, overwrite=True).status == status
    assert contents(work / "out") == before
    answer = init(out="new/deep/out", max_batches=2)
    assert answer.status == status
    assert answer.err.count("\n") == 1
    assert [path.name for path in work.iterdir()] == ["out"]
