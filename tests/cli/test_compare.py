"""`evatune compare`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evatune.finetune.comparison import search
from evatune.finetune.comparison.rate_rule import Seeds
from evatune.finetune.comparison.search import Search
from evatune.finetune.recipe_files import load
from tests.conftest import Command, refused
from tests.finetune.helpers import SMALL
from tests.tuned_lines import tuned_lines


def test_the_command_compares_and_shows(
    command: Command, bert_folder: Path, tmp_path: Path
) -> None:
    found = command(
        "compare",
        "understanding-bbc",
        *SMALL,
        "training.steps=4",
        "data.validation=10",
        f"model={bert_folder}",
        "--methods",
        "lora,eva",
        "--seeds",
        "0",
        "--lrs",
        "1e-3,1e-2",
        "--out",
        tmp_path / "c",
        "--workers",
        "1",
        "--json",
    )
    assert found.status == 0, found.err
    facts = json.loads(found.out)
    assert len(facts["lines"]) == 4
    assert facts["failed"] == {}
    assert facts["averages"].keys() == {"lora", "eva"}
    table = (tmp_path / "c" / "comparison.md").read_text()
    assert table.count("| bbc |") == 4
    assert "`evatune compare understanding-bbc" in table
    page = (tmp_path / "c" / "report.html").read_text()
    assert "--methods lora,eva --tune</code>" in page


def test_numbers_that_are_none_and_a_folder_of_something_else_are_refused(
    command: Command, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for name in ("seeds", "lrs"):
        refused(
            command("compare", "understanding-bbc", f"--{name}", "0,x", "--out", out),
            f"--{name} is '0,x'; give numbers with commas between",
        )
    assert not out.exists()
    out.mkdir()
    (out / "notes.txt").write_text("keep")
    refused(
        command("compare", "understanding-bbc", "--out", out),
        "holds no comparison of evatune",
        folder=out,
        left=frozenset({"notes.txt"}),
    )


def test_a_tuned_comparison_prints_its_tables_and_says_which_search_failed(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = load("images-digits", ["data.validation=50"])
    lora, eva = (Search(settings, method, Seeds()) for method in ("lora", "eva"))
    eva.problem = "out of luck"

    def tune(recipes: Any, methods: Any, seeds: Seeds, path: Path, *_: Any) -> list[Search]:
        assert [recipe.task for recipe in recipes] == ["digits"]
        assert (methods, seeds) == (["lora", "eva"], Seeds((4,), (5, 6)))
        lines = tuned_lines(tasks=["digits"], methods=["lora", "eva"])
        path.write_text("".join(line.model_dump_json() + "\n" for line in lines))
        return [lora, eva]

    monkeypatch.setattr(search, "tune", tune)
    options = ["--tune", "--seeds", "4", "--test-seeds", "5,6", "--out", tmp_path / "t"]
    found = command("compare", "images-digits", "data.validation=50", *options)
    assert found.status == 2
    assert "1 of 2 searches failed, for example that of digits, eva: out of luck" in found.err
    assert "digits" in found.out
    assert str(tmp_path / "t" / "tables" / "README.md") in found.out.replace("\n", "")
    assert (tmp_path / "t" / "tables" / "images.md").is_file()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["seed=3"], "'seed=3' does not fit: a comparison sets seed itself"),
        (["method=eva"], "give --methods eva, with commas between several"),
        (["training.learning_rate=1e-3", "--lrs", "1e-3"], "give --lrs 1e-3, with commas"),
    ],
)
def test_a_setting_of_which_a_comparison_has_several_is_refused(
    command: Command, tmp_path: Path, arguments: list[str], text: str
) -> None:
    out = tmp_path / "out"
    refused(command("compare", "images-digits", *arguments, "--out", out), text)
    assert not out.exists()


def test_what_a_tuned_comparison_cannot_do_is_refused(command: Command, tmp_path: Path) -> None:
    out = tmp_path / "out"
    asked = ["compare", "images-digits", "--tune", "--out", out]
    refused(command(*asked), "no examples to choose a learning rate by; add some, such as")
    refused(command(*asked, "--test-seeds", "2,3"), "share 2, so that what is tested would have")
    refused(command(*asked, "--lrs", "1e-3"), "--tune chooses the learning rates")
    assert list(tmp_path.iterdir()) == []


def test_one_of_several_processes_is_refused(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    answer = command("compare", "understanding-bbc", "--out", tmp_path / "out")
    refused(answer, "this is one of 4 processes, and evatune compare is for one", folder=tmp_path)
