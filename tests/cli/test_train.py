"""`evatune train` and `recipes`."""

from __future__ import annotations

import json
from pathlib import Path

from evatune.finetune.recipe import as_tree, load, ours, recipe_keys, text_of
from evatune.utils.lock import held
from tests.conftest import Command, refused
from tests.finetune.helpers import SMALL


def test_the_main_run_on_minilm_writes_what_it_says(command: Command, tmp_path: Path) -> None:
    settings = ["data.train=64", "data.test=32", "training.steps=6", "training.eval_every=6"]
    found = command("train", "understanding-bbc", *settings, "--out", tmp_path / "run")
    assert found.status == 0, found.err
    assert "eva on bbc: score" in found.out
    for name in (
        "adapter",
        "calibration.safetensors",
        "metrics.jsonl",
        "report.html",
    ):
        assert (tmp_path / "run" / name).exists()
        assert name in found.out
    card = (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert "base_model: sentence-transformers/all-MiniLM-L6-v2" in card
    assert "fine-tuned by the method `eva`" in card


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
    settings = [*SMALL, f"model={bert_folder}"]
    folder = tmp_path / "run"
    with held(folder):
        for name, method in (("train", ["method=head"]), ("compare", ["--methods", "head"])):
            answer = command(name, "understanding-bbc", *settings, *method, "--out", folder)
            refused(answer, "in use by another evatune train, compare or evaluate")
        assert [path.name for path in folder.iterdir()] == [".evatune.lock"]
    assert list(tmp_path.iterdir()) == []


def test_recipes_are_listed_each_with_what_it_is(command: Command) -> None:
    lines = command("recipes", "ls").out.splitlines()
    assert [line.split()[0] for line in lines] == list(ours())
    assert all(len(line.split()) > 2 for line in lines)
    facts = json.loads(command("recipes", "ls", "--json").out)["recipes"]
    assert [fact["name"] for fact in facts] == list(ours())
    assert {"domain", "task", "model", "about"} < facts[0].keys()


def test_a_recipe_is_shown_with_every_key_that_it_may_have(command: Command) -> None:
    shown = command("recipes", "show", "understanding-bbc").out
    assert shown.startswith(text_of("understanding-bbc").rstrip())
    for key in recipe_keys():
        assert f"# {key.name} = " in shown
        assert f"#     {key.meaning}\n#     {key.kind}; " in shown
    facts = json.loads(command("recipes", "show", "understanding-bbc", "--json").out)
    assert facts["recipe"] == as_tree(load("understanding-bbc"))
    assert [fact["name"] for fact in facts["keys"]] == [key.name for key in recipe_keys()]


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
