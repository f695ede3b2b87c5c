"""Another task for the same checkpoint: the control of whether a task's own data matter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from evatune.errors import ConfigError
from evatune.finetune.head import is_in_head
from evatune.finetune.recipe import USER_TASK, Recipe
from evatune.finetune.recipe_files import bundled_recipes, load
from evatune.finetune.tasks import Task, find_domain


def another_task(recipe: Recipe) -> tuple[Recipe, Task]:
    """Return the next of our recipes for the same checkpoint, in the order of names, and its task.

    All but the task and its data is the given recipe's. After the last name comes the first. Where
    tasks have classes of their own the batches hold no labels, which the head may have no class
    for.

    Raises ConfigError where no other recipe of ours is for this domain and checkpoint.
    """
    domain = find_domain(recipe.domain)
    shapes = _shapes_of_base(domain.prepare(recipe))
    for other in _others(recipe):
        candidate = replace(recipe, task=other.task, data=other.data)
        task = domain.prepare(candidate)
        if _shapes_of_base(task) == shapes:
            return candidate, _without_classes(task)
    raise ConfigError(
        f"there is no other task of {recipe.domain} for the model of task {recipe.task!r}, whose"
        " data this method starts from; choose another method"
    )


def _others(recipe: Recipe) -> list[Recipe]:
    """Return our recipes of other tasks of the domain for its demo model, those after it first."""
    recipes = {name: load(name) for name in bundled_recipes()}
    others = {name: other for name, other in recipes.items() if _is_other(other, recipe)}
    name_of_recipe = f"{recipe.domain}-{recipe.task}"
    after = [other for name, other in others.items() if name > name_of_recipe]
    before = [other for name, other in others.items() if name < name_of_recipe]
    return after + before


def _is_other(other: Recipe, recipe: Recipe) -> bool:
    """Return whether a recipe of ours is for another task, on the demo model of the same domain."""
    is_on_demo_model = (other.domain, other.model) == (recipe.domain, "demo")
    return is_on_demo_model and other.task not in (recipe.task, USER_TASK)


def _without_classes(task: Task) -> Task:
    """Return the task with no labels in its batches where its head, and so its classes, are new."""
    if not task.models.new_head:
        return task

    def collate(examples: Any) -> Any:
        batch = task.collator(examples)
        return {key: value for key, value in batch.items() if key != "labels"}

    return replace(task, collator=collate)


def _shapes_of_base(task: Task) -> dict[str, Any]:
    """Return the shapes of the parameters that come from the checkpoint."""
    return {
        name: tuple(parameter.shape)
        for name, parameter in task.model.named_parameters()
        if not is_in_head(name, task.head)
    }
