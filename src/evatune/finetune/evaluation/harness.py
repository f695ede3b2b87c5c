"""Tasks of lm-evaluation-harness, and ours for it: found by name, loaded, run."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from evatune.choices import IGNORED
from evatune.errors import ConfigError
from evatune.loading.encoding import encode_answer
from evatune.loading.hub import reading
from evatune.utils.extras import require
from evatune.utils.text import first_line

EXTRA, PURPOSE = "eval", "evatune evaluate"
PREFIX = "evatune_"
"""Of the names of our own tasks, which are scored on the tokens of training."""
COMMONSENSE = f"{PREFIX}commonsense"
RUNS_CODE = "--run-generated-code"
_OURS = Path(__file__).parent / "tasks"
_INSTEAD = "other --tasks, or tasks of your own with data on this machine by --include-path FOLDER"


@dataclass(frozen=True)
class Loaded:
    """Tasks and groups of them with their data, and lm-eval's manager of them."""

    manager: Any
    ours: list[Any]
    others: list[Any]


@dataclass(frozen=True)
class Scoring:
    """The settings that a model is run on tasks with.

    Attributes:
        longest: tokens of a question of ours with an answer. batch_size: sequences at once.
        limit: examples of each task; None is all. run_code: whether tasks may run what is written.
    """

    longest: int
    batch_size: int
    limit: int | None
    run_code: bool


def load_tasks(
    names: Sequence[str], include: Path | None, source: str, *, run_code: bool, extra: Sequence[str]
) -> Loaded:
    """Return tasks by their names, with their data.

    Args:
        include: a folder with task files of the user's. source: of our tasks, see `read_rows`.
        run_code: whether tasks that run what a model writes are allowed.
        extra: names that are known elsewhere, to be thought of where one is misspelled.

    Raises:
        ConfigError: no such task, or one that runs code. DataError: data that cannot be had.
        MissingExtraError: lm-evaluation-harness is not installed.
    """
    require(EXTRA, PURPOSE)
    with _harness(run_code):
        manager = _manager_of(names, include, source)
        _require_known(names, [*manager.all_tasks, *extra])
        if not run_code:
            for name in names:
                _require_no_code(manager, name)
        loaded = Loaded(manager, [], [])
        for name in dict.fromkeys(names):
            tasks = loaded.ours if name.startswith(PREFIX) else loaded.others
            tasks += _load(manager, name, include)
    return loaded


def _manager_of(names: Sequence[str], include: Path | None, source: str) -> Any:
    """Return lm-eval's task manager; its own 15,000 tasks are read only if one is named."""
    from lm_eval.tasks import TaskManager

    folders = [_OURS] if include is None else [_OURS, include]
    know = partial(TaskManager, include_path=folders, metadata={"evatune_source": source})
    manager = know(include_defaults=False)
    # A group of the user's may hold tasks of lm-eval.
    is_known = [name.startswith(PREFIX) or name in manager.all_subtasks for name in names]
    return manager if all(is_known) else know()


def _require_known(names: Sequence[str], known: Sequence[str]) -> None:
    """Raise a ConfigError for a name of no task, with those that are like it."""
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            raise ConfigError(
                f"there is no task {name!r}; {hint}tasks are those of lm-evaluation-harness"
                f" (lm-eval ls tasks), {COMMONSENSE}, and yours with --include-path FOLDER"
            )


def _require_no_code(manager: Any, name: str) -> None:
    """Raise a ConfigError for a task or group of tasks that runs what a model writes."""
    for leaf in _leaves(manager, name, set()):
        if (manager.task_index[leaf].cfg or {}).get("unsafe_code"):
            refuse_code(leaf)


def refuse_code(name: str) -> None:
    """Raise the ConfigError for a task that runs what a model writes, without leave to."""
    raise ConfigError(
        f"task {name!r} runs the programs that the model writes on this machine; give {RUNS_CODE}"
        " if they may run, best in a container without secrets"
    )


def _leaves(manager: Any, name: str, seen: set[str]) -> Iterator[str]:
    """Yield the tasks of a task, tag or group, each once."""
    entry = manager.task_index.get(name)
    if entry is None or name in seen:
        return
    seen.add(name)
    members = (entry.cfg or {}).get("task")
    if isinstance(members, list):
        for member in members:
            inner = member.get("task") if isinstance(member, dict) else member
            if isinstance(inner, str):
                yield from _leaves(manager, inner, seen)
    elif entry.yaml_path is None:
        for inner in sorted(entry.tags):
            yield from _leaves(manager, inner, seen)
    else:
        yield name


def _load(manager: Any, name: str, include: Path | None) -> list[Any]:
    """Return a task, a group, or the tasks of a tag, with their data."""
    path = manager.task_index[name].yaml_path
    is_users = include is not None and path is not None and path.is_relative_to(include)
    with reading(path if is_users else name, "a task", _INSTEAD):
        loaded = manager.load([name])
    if name in loaded["groups"]:
        return [loaded["groups"][name]]
    return list(loaded["tasks"].values())


def scores(
    model: Any, tokenizer: Any, loaded: Loaded, scoring: Scoring
) -> dict[str, dict[str, Any]]:
    """Return the measures and the number of examples of tasks and groups, by their names.

    Ours see the tokens of training: prompt and answer encoded apart, and the answer's end. Others
    see what lm-evaluation-harness makes of them for any model.
    """
    by_name: dict[str, dict[str, Any]] = {}
    for tasks, as_trained in ((loaded.ours, True), (loaded.others, False)):
        if tasks:
            by_name |= _scores(model, tokenizer, loaded.manager, tasks, scoring, as_trained)
    return by_name


def _scores(
    model: Any, tokenizer: Any, manager: Any, tasks: list[Any], scoring: Scoring, as_trained: bool
) -> dict[str, dict[str, Any]]:
    """Return the same of tasks of one kind."""
    with _harness(scoring.run_code):
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        # HFLM ties weights anew, which fails where an adapter is on a tied output embedding.
        model.tie_weights = lambda *_, **__: None
        adapted = HFLM(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=scoring.batch_size,
            max_length=scoring.longest if as_trained else None,
            softmax_dtype="float32",
        )
        if as_trained:
            adapted._encode_pair = partial(_encoded_as_trained, tokenizer, scoring.longest)
        try:
            results = simple_evaluate(
                adapted,
                tasks=tasks,
                limit=scoring.limit,
                log_samples=False,
                confirm_run_unsafe_code=scoring.run_code,
                task_manager=manager,
            )
        except ValueError as error:  # such as a task beside a group that holds it, or of images
            raise ConfigError(
                f"lm-evaluation-harness refuses these tasks ({first_line(error)}); name other"
                " --tasks"
            ) from error
    both = {**results["results"], **results.get("groups", {})}
    return {
        name: {
            "measures": measures,
            "examples": fields.get("sample_len"),
        }
        for name, fields in both.items()
        if (measures := _measures(fields))
    }


def _encoded_as_trained(
    tokenizer: Any, longest: int, prompt: str, answer: str
) -> tuple[list[int], list[int]]:
    """Return the tokens of a prompt and those of an answer with its end, as `encode_answer` has."""
    row = encode_answer(tokenizer, prompt, answer, longest)
    start = row["labels"].count(IGNORED)
    return row["input_ids"][:start], row["input_ids"][start:]


def _measures(fields: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """Return the scores of a task by metric, and by filter of the answers where there is one.

    Args:
        fields: "METRIC,FILTER" and "METRIC_stderr,FILTER" → number, or text where there is none,
            beside others.
    """
    measures = {}
    for key, value in fields.items():
        metric, comma, kind = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
            error = fields.get(f"{metric}_stderr,{kind}")
            measures[metric if kind == "none" else f"{metric} ({kind})"] = {
                "score": float(value),
                "standard_error": float(error) if isinstance(error, int | float) else None,
            }
    return measures


@contextmanager
def _harness(run_code: bool) -> Iterator[None]:
    """Keep lm-eval from logging, and let its metrics run code where that is allowed."""
    logger, variable = logging.getLogger("lm_eval"), "HF_ALLOW_CODE_EVAL"
    level, before = logger.level, os.environ.get(variable)
    logger.setLevel(logging.ERROR)
    os.environ[variable] = str(int(run_code))
    try:
        yield
    finally:
        logger.setLevel(level)
        del os.environ[variable]
        if before is not None:
            os.environ[variable] = before
