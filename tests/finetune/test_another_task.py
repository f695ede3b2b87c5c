"""Another task for the same checkpoint."""

from __future__ import annotations

import pytest

from evatune.errors import ConfigError
from evatune.finetune import another_task as module
from evatune.finetune.another_task import another_task
from evatune.finetune.recipe import Recipe
from evatune.finetune.recipe_files import load

SMALL = ("data.train=8", "data.validation=8", "data.test=8", "training.batch_size=4")


@pytest.fixture(autouse=True)
def few_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "load", lambda name: load(name, SMALL))


def recipe(name: str) -> Recipe:
    return load(name, [*SMALL, "seed=3"])


def test_the_next_recipe_is_taken_and_after_the_last_the_first() -> None:
    other, task = another_task(recipe("images-ring"))
    assert (other.task, other.seed, other.training.batch_size) == ("square", 3, 4)
    assert len(task.train) == 8
    assert another_task(recipe("images-triangle"))[0].task == "counting"


def test_a_task_of_another_checkpoint_is_passed_over_and_its_classes_are_left_out() -> None:
    other, task = another_task(recipe("understanding-any"))  # "bbc" is MiniLM's
    assert other.task == "kind"
    assert sorted(task.collator([task.train[0]])) == ["attention_mask", "input_ids"]


def test_a_domain_without_another_task_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "bundled_recipes", lambda: ["images-ring", "generation-numbers"])
    with pytest.raises(ConfigError, match="no other task of images for the model of task 'ring'"):
        another_task(recipe("images-ring"))
