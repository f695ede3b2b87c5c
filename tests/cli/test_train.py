"""`evatune train`, `compare` and `recipes`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evatune.finetune import search
from evatune.finetune.recipe import keys, load, ours, text_of
from evatune.finetune.search import Search
from evatune.finetune.tuning import Seeds
from evatune.utils.lock import held
from tests.conftest import Command, refused
from tests.finetune.helpers import SMALL
from tests.tuned_lines import tuned_lines


def test_the_main_run_on_minilm_writes_what_it_says(command: Command, tmp_path: Path) -> None:
    settings = ["data.train=64", "data.test=32", "training.steps=6", "training.eval_every=6"]
    found = command("train", "understanding-bbc", *settings, "--out", tmp_path / "run")
    assert found.status == 0, found.err
    assert "eva on bbc: score" in found.out
    for name in (
        "adapter",
        "calibration.safetensors",
        "curves.png",
        "metrics.jsonl",
        "ranks.png",
        "report.html",
    ):
        assert (tmp_path / "run" / name).exists()
        assert name in found.out


def test_mistakes_have_one_sentence_and_status_2(command: Command, tmp_path: Path) -> None:
    for arguments, text in (
        (["understanding-bbc", "method=best"], "method is 'best'; choose one of lora"),
        (["understanding-bbc", "task=nothing"], "tasks of language understanding are movie"),
        (["understanding-bbc", "domain=cooking"], "domain is 'cooking'"),
        (["understanding-bbc", "data.train=99999"], "has 2124 examples"),
        (["understanding-bbc", "model=./nowhere"], "model './nowhere' does not exist"),
        (
            ["understanding-bbc", "training.schedule=jumpy"],
            "training.schedule is 'jumpy'; choose one of linear",
        ),
        (["understanding-bbc", "adapter.targets=nothing"], "match no layer of this model"),
        (["understanding-bbc", f"seed={2**40}"], "seed is 1099511627776"),
    ):
        refused(command("train", *arguments, "--out", tmp_path / "run"), text, folder=tmp_path)


def test_a_folder_is_for_one_process_at_a_time(
    bert_folder: Path,
    tmp_path: Path,
    command: Command,
) -> None:
    settings = [*SMALL, f"model={bert_folder}", "method=head"]
    folder = tmp_path / "run"
    with held(folder):
        for name in ("train", "compare"):
            answer = command(name, "understanding-bbc", *settings, "--out", folder)
            refused(answer, "in use by another evatune train or compare")
        assert [path.name for path in folder.iterdir()] == [".evatune.lock"]
    assert list(tmp_path.iterdir()) == []


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
    assert (tmp_path / "c" / "curves.png").stat().st_size > 1000


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


def test_recipes_are_listed_each_with_what_it_is(command: Command) -> None:
    lines = command("recipes", "ls").out.splitlines()
    assert [line.split()[0] for line in lines] == list(ours())
    assert all(len(line.split()) > 2 for line in lines)


def test_a_recipe_is_shown_with_every_key_that_it_may_have(command: Command) -> None:
    shown = command("recipes", "show", "understanding-bbc").out
    assert shown.startswith(text_of("understanding-bbc").rstrip())
    for key, meaning in keys().items():
        assert f"# {key} = " in shown
        assert meaning in shown


def test_a_recipe_is_copied_as_it_is_and_onto_nothing(command: Command, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    assert command("recipes", "cp", "understanding-bbc", file).out == f"{file}\n"
    assert file.read_text() == text_of("understanding-bbc")
    refused(command("recipes", "cp", "understanding-movie", file), "exists; name another")
    assert file.read_text() == text_of("understanding-bbc")
    refused(
        command("recipes", "cp", "understanding-bbc", tmp_path / "no" / "a.yaml"),
        "make it first",
        folder=tmp_path,
        left=frozenset({"mine.yaml"}),
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


def test_what_a_tuned_comparison_cannot_do_is_refused(command: Command, tmp_path: Path) -> None:
    out = tmp_path / "out"
    asked = ["compare", "images-digits", "--tune", "--out", out]
    refused(command(*asked), "no examples to choose a learning rate by; add some, such as")
    refused(command(*asked, "--test-seeds", "2,3"), "share 2, so that what is tested would have")
    refused(command(*asked, "--lrs", "1e-3"), "--tune chooses the learning rates")
    assert list(tmp_path.iterdir()) == []
