"""Recipes of ours and of files: names, patterns, overrides, and what is no recipe."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from evatune.errors import ConfigError
from evatune.finetune.recipe_files import bundled_recipes, expand, load, text_of


@pytest.mark.parametrize("name", bundled_recipes())
def test_each_of_ours_loads_and_names_its_command(name: str) -> None:
    recipe = load(name)
    assert name.startswith((recipe.domain, "paper-", "own-"))
    assert f"evatune train {name}" in text_of(name)


def test_overrides_reach_into_the_tree() -> None:
    recipe = load(
        "understanding-movie",
        ["method=lora", "training.learning_rate=3e-4", "adapter.targets=[query, value]"],
    )
    assert (recipe.method, recipe.training.learning_rate, recipe.adapter.targets) == (
        "lora",
        3e-4,
        ["query", "value"],
    )
    assert recipe.data == load("understanding-movie").data


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (
            "understanding-movi",
            "did you mean understanding-movie\\? `evatune recipes ls` lists ours$",
        ),
        ("zzz", "there is no recipe or file 'zzz'; ours are generation-"),
    ],
)
def test_an_unknown_recipe_names_ours(source: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        load(source)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("a: [", "is not YAML"),
        ("- 1", "holds a list, not keys"),
        ("# nothing\n", "is empty, not keys"),
        ("domain: x", "key 'task' is missing"),
    ],
)
def test_a_file_that_is_no_recipe_says_so(content: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(content)
    with pytest.raises(ConfigError, match=text):
        load(str(tmp_path / "mine.yaml"))


def test_data_in_place_of_a_recipe_name_the_one_that_trains_on_them(tmp_path: Path) -> None:
    (tmp_path / "my chats.jsonl").write_text("{}")
    (tmp_path / "records.json").write_text("[{}]")
    for source in (tmp_path, tmp_path / "my chats.jsonl", tmp_path / "records.json"):
        command = f"own-generation data.source={shlex.quote(str(source))}"
        with pytest.raises(ConfigError, match=re.escape(command)):
            load(str(source))


@pytest.mark.parametrize(
    ("override", "text"), [("steps", "is not key=value"), ("task.a=1", "'task' is a value")]
)
def test_an_override_that_is_none_says_so(override: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        load("understanding-movie", [override])


def test_patterns_name_recipes_of_ours() -> None:
    assert expand(["generation-*", "generation-code", "mine.yaml"]) == [
        "generation-arithmetic",
        "generation-clock",
        "generation-code",
        "generation-commonsense",
        "generation-dates",
        "generation-numbers",
        "generation-reviews",
        "mine.yaml",
    ]
    with pytest.raises(ConfigError, match=r"no recipe of ours fits 'cooking-\*'"):
        expand(["cooking-*"])
    with pytest.raises(ConfigError, match="name at least one recipe"):
        expand([])


@pytest.mark.parametrize("name", [name for name in bundled_recipes() if name.startswith("paper-")])
def test_the_papers_runs_say_its_alpha_and_its_scale(name: str) -> None:
    recipe = load(name)
    if recipe.method != "full":
        assert (recipe.adapter.alpha, recipe.adapter.scale) == (1, "paper")
