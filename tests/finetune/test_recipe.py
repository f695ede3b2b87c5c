"""Recipes: defaults, overrides, and mistakes that are all told at once."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from evatune.errors import ConfigError
from evatune.finetune.recipe import as_tree, expand, load, ours, parse, recipe_keys, text_of


@pytest.mark.parametrize("name", ours())
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


def test_a_recipe_survives_its_plain_values() -> None:
    recipe = load("understanding-bbc", ["seed=3"])
    assert parse(as_tree(recipe)) == recipe


def test_every_key_has_a_help_text() -> None:
    assert all(key.meaning and key.type for key in recipe_keys())


def test_all_mistakes_are_told_at_once_with_the_nearest_key() -> None:
    wrong = ["training.learnin_rate=3", "adapter.rank=0", "tsk=3", "training.steps=abc"]
    with pytest.raises(ConfigError, match="4 mistakes") as caught:
        load("understanding-movie", wrong)
    text = str(caught.value)
    assert "unknown key 'training.learnin_rate' (nearest: training.learning_rate)" in text
    assert "unknown key 'tsk' (nearest: task)" in text
    assert "adapter.rank is 0: input should be greater than or equal to 1" in text
    assert "training.steps is 'abc'" in text


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("understanding-movi", "did you mean understanding-movie"),
        ("nothing/at/all.yaml", "there is no recipe or file"),
    ],
)
def test_an_unknown_recipe_names_ours(source: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        load(source)


@pytest.mark.parametrize(
    ("content", "text"),
    [("a: [", "is not YAML"), ("- 1", "holds list"), ("domain: x", "key 'task' is missing")],
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


def test_alpha_is_the_rank_unless_told() -> None:
    def alpha(*overrides: str) -> float:
        return load("understanding-bbc", overrides).adapter.alpha

    assert alpha() == load("understanding-bbc").adapter.rank
    assert alpha("adapter.rank=16") == 16
    assert alpha("adapter.rank=16", "adapter.alpha=32") == 32


@pytest.mark.parametrize("name", [name for name in ours() if name.startswith("paper-")])
def test_the_papers_runs_say_its_alpha_and_its_scale(name: str) -> None:
    recipe = load(name)
    if recipe.method != "full":
        assert (recipe.adapter.alpha, recipe.adapter.scale) == (1, "paper")


def test_an_unknown_scale_is_a_mistake_that_names_the_scales() -> None:
    with pytest.raises(ConfigError, match=r"adapter.scale is 'big': choose one of paper, whiten"):
        load("understanding-bbc", ["adapter.scale=big"])


@pytest.mark.parametrize(
    ("name", "setting", "mistake"),
    [
        ("understanding-bbc", "data.max_length=3", "is 3, but texts need at least 4 tokens"),
        ("understanding-bbc", "data.metric=success", "is for the domain rl"),
        ("understanding-bbc", "data.train=0", "data.train is 0, which is for data.source"),
    ],
)
def test_a_value_that_another_forbids_is_a_mistake(name: str, setting: str, mistake: str) -> None:
    with pytest.raises(ConfigError, match=mistake):
        load(name, [setting])


def test_a_policy_may_see_a_single_step() -> None:
    assert load("rl-push", ["data.max_length=1"]).data.max_length == 1
