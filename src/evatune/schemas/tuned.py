"""The lines of a tuned comparison: one JSON object per finished run."""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from evatune.schemas.record import Count, Name

_Number = Annotated[float, Field(allow_inf_nan=False)] | None  # None where it is not finite
_Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Point = tuple[Count, _Number, _Number]


class _Lenient(BaseModel):
    """Base of records that ignore keys of later versions."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class _Training(BaseModel):
    model_config = ConfigDict(frozen=True, extra="allow")

    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    steps: Annotated[int, Field(ge=1)]


class _Settings(BaseModel):
    """The recipe of a run, as a tree; what identifies the run is checked."""

    model_config = ConfigDict(frozen=True, extra="allow")

    domain: Name
    task: Name
    method: Name
    seed: Count
    training: _Training


class Evaluation(_Lenient):
    """Loss and score of a run on validation or test examples."""

    loss: _Number
    score: _Number


class RunLine(_Lenient):
    """A finished run."""

    id: Name
    settings: _Settings
    data: Name  # digest of the examples
    code: int  # version of the domain's tasks
    tested: bool  # whether it was measured on test examples; its seed then tunes nothing
    curve: tuple[_Point, ...]  # (step, loss, score) on validation examples
    validation: Evaluation
    test: Evaluation | None
    diverged: bool
    parameters: Count
    init_seconds: _Seconds
    train_seconds: _Seconds
    peak_memory_bytes: Count
    kappa: _Number = None  # first step over LoRA's, median layer
    participation: _Number = None  # participation ratio of the inputs, median layer
    ranks: dict[Name, Count] | None = None  # where they are redistributed

    @property
    def key(self) -> tuple[str, str]:
        """Domain and task."""
        return self.settings.domain, self.settings.task

    @property
    def task(self) -> str:
        return self.settings.task

    @property
    def method(self) -> str:
        return self.settings.method

    @property
    def seed(self) -> int:
        return self.settings.seed

    @property
    def rate(self) -> float:
        return self.settings.training.learning_rate

    @property
    def final_loss(self) -> float:
        """Return the loss on validation examples after training; infinite where it diverged."""
        loss = self.validation.loss
        return math.inf if self.diverged or loss is None else loss

    def tree(self) -> dict[str, Any]:
        """Return the settings as plain values."""
        return self.settings.model_dump()
