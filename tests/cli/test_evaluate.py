"""`evatune evaluate`: what needs no run; the rest is in tests/finetune/evaluation."""

from __future__ import annotations

from pathlib import Path

from tests.conftest import Command, refused


def test_mistakes_have_one_sentence_and_status_2(command: Command, tmp_path: Path) -> None:
    for arguments, text in (
        ([tmp_path / "no"], "holds no run of evatune; give the folder that `evatune train` wrote"),
        ([tmp_path, "--limit", "0"], "'--limit'"),
        ([tmp_path, "--batch-size", "many"], "'--batch-size'"),
        ([], "Missing argument"),
    ):
        refused(command("evaluate", *arguments), text, folder=tmp_path)
