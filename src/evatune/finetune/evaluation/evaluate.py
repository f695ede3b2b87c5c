"""Measures a finished run on standard tasks, and keeps the scores beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from evatune.errors import ConfigError
from evatune.finetune.evaluation import harness
from evatune.finetune.evaluation.code_sets import CODE_SETS, METRIC, read_problems, share_passed
from evatune.finetune.methods import find_method
from evatune.finetune.recipe import HUB, Recipe
from evatune.finetune.run import library_versions
from evatune.finetune.run_folder import add_evaluation, finished_run
from evatune.finetune.tasks.generation import DOMAIN, question_sets
from evatune.finetune.tasks.generation.domain import load_model
from evatune.loading.chats import load_template
from evatune.loading.hub import reading
from evatune.loading.models import default_device
from evatune.utils.lock import lock_folder
from evatune.utils.names import resolved


@dataclass(frozen=True)
class EvaluationOptions:
    """Settings of an evaluation.

    Attributes:
        tasks: names; none: those of the run's own recipe, where it has any.
        include: folder with tasks of the user's for lm-evaluation-harness.
        data: folder with copies of the data of our own tasks; None: the run's own, or the hub.
        limit: examples of each task; None is all.
        batch_size: sequences at once; None: as many as a finished run is tested with.
        run_code: whether programs that the model writes may run on this machine.
        trust_remote_code: whether code that comes with the model may run.
    """

    tasks: Sequence[str] = ()
    include: Path | None = None
    data: Path | None = None
    limit: int | None = None
    batch_size: int | None = None
    run_code: bool = False
    trust_remote_code: bool = False


def evaluate(folder: Path, options: EvaluationOptions) -> dict[str, dict[str, Any]]:
    """Measure the finished run in a folder, and write the scores into its `evaluation.json`.

    They stand there beside those of other tasks, and in place of earlier ones of the same tasks.
    Programs that a model wrote, with how each ended, are in `answers-TASK.jsonl`.

    Returns:
        Per task, and per group of tasks: measures (by metric: score and standard_error), examples,
            limit, batch_size, versions.

    Raises:
        ConfigError: no finished run of language generation, no such task, or one that runs what
            the model writes, without leave to. DataError: a model or data cannot be had.
        MissingExtraError: lm-evaluation-harness is not installed.
    """
    folder = resolved(folder)
    recipe, _ = finished_run(folder)
    options = _completed(recipe, options)
    with lock_folder(folder):
        measured: dict[str, dict[str, Any]] = {}
        for entries in _measured(recipe, folder, options):
            add_evaluation(folder, entries)
            measured |= entries
    return measured


def _completed(recipe: Recipe, options: EvaluationOptions) -> EvaluationOptions:
    """Return the options with what a recipe says where they say nothing.

    Raises ConfigError for a run or options that nothing can be measured with.
    """
    if recipe.domain != DOMAIN.name:
        raise ConfigError(
            f"the run is of the domain {recipe.domain!r}, and tasks are for {DOMAIN.name!r}; its"
            " own score is in result.json"
        )
    tasks_of_recipe = [harness.COMMONSENSE] if recipe.task == question_sets.TASK else []
    tasks = options.tasks or tasks_of_recipe
    if not tasks:
        raise ConfigError(
            f"a run of task {recipe.task!r} has no tasks of its own to be measured on; name some"
            f" with --tasks, such as {harness.COMMONSENSE}, {', '.join(CODE_SETS)}, or arc_easy and"
            " others of lm-evaluation-harness"
        )
    for option, path in (("--include-path", options.include), ("--data", options.data)):
        if path is not None and not path.is_dir():
            raise ConfigError(f"{option} {str(path)!r} is no folder; name one that is there")
    for name in tasks:
        if name in CODE_SETS and not options.run_code:
            harness.refuse_code(name)
    size = options.batch_size or recipe.evaluation_batch
    return replace(options, tasks=tasks, batch_size=size)


def _measured(
    recipe: Recipe, folder: Path, options: EvaluationOptions
) -> Iterator[dict[str, dict[str, Any]]]:
    """Yield what a run measures on tasks of one kind after the other, once all data are there."""
    source = HUB if options.data is None else str(options.data)
    is_commonsense = options.data is None and recipe.task == question_sets.TASK
    of_questions = str(recipe.data.source) if is_commonsense else source
    others = [name for name in options.tasks if name not in CODE_SETS]
    loaded = None
    if others:
        known = tuple(CODE_SETS)
        loaded = harness.load_tasks(
            others, options.include, of_questions, run_code=options.run_code, extra=known
        )
    problems = {
        name: read_problems(name, source, options.limit)
        for name in options.tasks
        if name in CODE_SETS
    }
    model, tokenizer = load_trained(
        replace(recipe, trust_remote_code=options.trust_remote_code), folder
    )
    size = options.batch_size
    assert size is not None  # `_completed` sets it
    if loaded is not None:
        scoring = harness.Scoring(recipe.data.max_length, size, options.limit, options.run_code)
        scores = harness.scores(model, tokenizer, loaded, scoring)
        yield {name: _entry(score, options, ["lm_eval"]) for name, score in scores.items()}
    for name, set_problems in problems.items():
        file = folder / f"answers-{name}.jsonl"
        score = share_passed(model, tokenizer, name, set_problems, size, file)
        measured = {"measures": {METRIC: score}, "examples": len(set_problems)}
        yield {name: _entry(measured, options, [])}


def _entry(
    measured: Mapping[str, Any], options: EvaluationOptions, libraries: Sequence[str]
) -> dict[str, Any]:
    """Return what was measured on a task with its settings and the libraries' versions."""
    versions = library_versions() | {name: version(name) for name in libraries}
    settings = {"limit": options.limit, "batch_size": options.batch_size}
    return {**measured, **settings, "versions": versions}


def load_trained(recipe: Recipe, folder: Path) -> tuple[Any, Any]:
    """Return a finished run's model, as it was saved, and its tokenizer, on the accelerator if any.

    Raises DataError where the model, or what the run saved, cannot be loaded.
    """
    method, template = find_method(recipe.method), recipe.data.chat_template
    model, tokenizer = load_model(recipe)
    if template is not None:
        tokenizer.chat_template = load_template(template)
    saved = folder / method.saved_as
    with reading(saved, "what the run trained", "a run whose folder is as it was written"):
        model = method.load(model, saved)
    return model.eval().to(default_device()), tokenizer
