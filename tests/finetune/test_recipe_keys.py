"""The keys of a recipe, and which one a misspelled key means."""

from __future__ import annotations

import pytest

from evatune.choices import SCALES
from evatune.finetune.recipe_keys import nearest_key, recipe_keys

KEYS = {key.name: key for key in recipe_keys()}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("task", "text"),
        ("seed", "whole number, at least 0"),
        ("trust_remote_code", "true or false"),
        ("data.source", "text"),
        ("data.columns", "list of texts"),
        ("adapter.alpha", "number, above 0"),
        ("adapter.budget", "one of ranks, parameters"),
        ("adapter.scale", f"one of {', '.join(SCALES)}"),
        ("adapter.targets", "text or list of texts"),
        ("training.warmup", "number, at least 0, below 1"),
    ],
)
def test_what_a_key_may_hold_is_said_in_words(name: str, kind: str) -> None:
    assert KEYS[name].kind == kind


def test_defaults_are_there_but_for_what_must_be_given() -> None:
    assert [key.name for key in KEYS.values() if key.required] == ["task"]
    assert KEYS["training.steps"].default == 60
    assert KEYS["data.columns"].default == []


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("training.lr", "training.learning_rate"),
        ("lr", "training.learning_rate"),
        ("learning-rate", "training.learning_rate"),
        ("steps", "training.steps"),
        ("training.rank", "adapter.rank"),
        ("lora_alpha", "adapter.alpha"),
        ("epochs", "training.steps"),
        ("training.batchsize", "training.batch_size"),
        ("metod", "method"),
        ("frobnicate", None),
    ],
)
def test_the_key_that_is_meant_is_found(key: str, meant: str | None) -> None:
    assert nearest_key(key, list(KEYS)) == meant


def test_every_key_has_a_help_text() -> None:
    assert all(key.meaning and key.type for key in KEYS.values())
