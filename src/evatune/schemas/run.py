"""Files that a fine-tuning run writes and reads again: result, metrics, and Trainer's state."""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from evatune.schemas.record import Count, Name, Strict

_LARGEST = 1e100  # squares and sums of it are still numbers


def _moderate(value: float) -> float:
    if math.isfinite(value) and abs(value) > _LARGEST:
        raise ValueError(f"it must lie between -{_LARGEST:g} and {_LARGEST:g}, or be NaN or Inf")
    return value


_Seconds = Annotated[float, Field(ge=0, le=1e12)]
# NaN or Inf in a run that diverged.
_Measure = Annotated[float, Field(allow_inf_nan=True), AfterValidator(_moderate)]

_Unbounded = Annotated[float, Field(allow_inf_nan=True)]  # a perplexity of words may be anything


class Result(Strict):
    """`result.json`; see `evatune.finetune.run.run` for what the keys mean."""

    score: _Measure
    score_name: Name = "score"  # unknown in files of older versions, as is the number
    scored: Count | None = None
    eval_loss: _Measure
    measures: dict[Name, _Measure]
    validation: dict[Name, _Measure] | None = None
    trainable_parameters: Count
    first_gradient_b: _Measure | None
    init_seconds: _Seconds
    train_seconds: _Seconds
    resumed: bool
    steps: Count
    peak_memory_bytes: Count
    versions: dict[Name, Name]
    data_fingerprint: Name | None = None  # unknown in files of older versions


class Measured(Strict):
    """A score of a task, and its standard error where there is one."""

    score: _Unbounded
    standard_error: _Unbounded | None = None


class EvaluatedTask(Strict):
    """Scores of a run on a task by their names, and how they came about.

    Attributes:
        examples: how many the scores are over. limit: how many were asked for; None is all.
        versions: of the libraries that a score may depend on.
    """

    measures: dict[Name, Measured]
    examples: Count | None = None
    limit: Count | None = None
    batch_size: Count
    versions: dict[Name, Name]


class Evaluation(Strict):
    """`evaluation.json`: tasks by their names."""

    tasks: dict[Name, EvaluatedTask]


class MetricsLine(Strict):
    """A line of `metrics.jsonl`: its step, and numbers by name."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, _Measure]

    step: Count


class TrainerState(BaseModel):
    """The keys that a run needs of a checkpoint's `trainer_state.json`, which has more."""

    model_config = ConfigDict(strict=True, extra="ignore")

    global_step: Count
    log_history: list[dict[Name, Any]]
