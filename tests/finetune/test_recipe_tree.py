"""Recipes from plain values: what is implied, and mistakes that are all told at once."""

from __future__ import annotations

import pytest

from evatune.errors import ConfigError
from evatune.finetune.recipe_files import load
from evatune.finetune.recipe_tree import as_tree, parse


def test_a_recipe_survives_its_plain_values() -> None:
    recipe = load("understanding-bbc", ["seed=3"])
    assert parse(as_tree(recipe)) == recipe


def test_all_mistakes_are_told_at_once_with_the_nearest_key() -> None:
    wrong = ["training.learnin_rate=3", "adapter.rank=0", "tsk=3", "training.steps=abc"]
    with pytest.raises(ConfigError, match="4 mistakes") as caught:
        load("understanding-movie", wrong)
    text = str(caught.value)
    assert "unknown key 'training.learnin_rate' (nearest: training.learning_rate)" in text
    assert "unknown key 'tsk' (nearest: task)" in text
    assert "adapter.rank is 0: input should be greater than or equal to 1" in text
    assert "training.steps is 'abc'" in text


def test_alpha_is_the_rank_unless_told() -> None:
    def alpha(*overrides: str) -> float:
        return load("understanding-bbc", overrides).adapter.alpha

    assert alpha() == load("understanding-bbc").adapter.rank
    assert alpha("adapter.rank=16") == 16
    assert alpha("adapter.rank=16", "adapter.alpha=32") == 32


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
