"""`evatune recipes`."""

from __future__ import annotations

import json
from pathlib import Path

from evatune.finetune.recipe import as_tree, load, ours, recipe_keys, text_of
from tests.conftest import Command, refused


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
