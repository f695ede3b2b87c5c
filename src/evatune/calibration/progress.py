"""Shows how far a calibration is, where the caller has not said how to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch

from evatune.calibration.config import CalibrationConfig
from evatune.calibration.convergence import MIN_BATCHES
from evatune.errors import ConfigError
from evatune.utils.progress import Display, display
from evatune.utils.text import duration, size


@dataclass(frozen=True)
class Progress:
    """The state of a run after a batch, as a `progress` callback receives it."""

    batch: int  # batches done
    max_batches: int  # bound of the settings, or of the data where it says how long it is
    rows: int  # most rows any layer has seen
    settled: int  # layers whose directions have settled, as of the last check
    layers: int
    inputs: int = 0  # distinct inputs of these layers, each with one sketch
    sketch_bytes: int = 0  # memory of the sketches


ProgressFunction = Callable[[Progress], None]
ProgressOption = ProgressFunction | Literal["auto"] | None


@contextmanager
def progress_callback(
    progress: ProgressOption, config: CalibrationConfig, *, runs: bool = True
) -> Iterator[ProgressFunction | None]:
    """Yield the function that a run calls after each batch; None for none.

    Args:
        progress: as for `evatune.calibrate`.
        runs: whether there are batches to run; without any, "auto" shows nothing.

    Raises ConfigError for a value that is none of the three.
    """
    if callable(progress) or progress is None:
        yield progress
    elif progress != "auto":
        raise ConfigError(
            f"progress is {progress!r}; it must be 'auto', None, or a function of one"
            " evatune.Progress"
        )
    elif not (runs and _is_first_process()):
        yield None
    else:
        with display("calibrating", "batches") as shown:
            reporter = _Reporter(shown, config)
            yield reporter
            reporter.end()


def _is_first_process() -> bool:
    """Return whether this is the only process, or the first of those that are known to torch."""
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not together or torch.distributed.get_rank() == 0


class _Reporter:
    """Tells a display what a run tells of itself."""

    def __init__(self, shown: Display, config: CalibrationConfig) -> None:
        self._display = shown
        self._may_stop = config.tolerance > 0
        self._latest: Progress | None = None

    def __call__(self, now: Progress) -> None:
        self._latest = now
        expected = self._display.forecast(now.batch, now.max_batches)
        if expected is not None:
            self._display.say(self._before(now, expected))
        self._display.update(now.batch, now.max_batches, self._settled(now))

    def end(self) -> None:
        """Leave a line of what was done, unless it was soon done."""
        if self._latest is not None:
            seconds = duration(self._display.seconds)
            done = f"calibrated on {self._latest.batch} batches in {seconds}"
            settled = self._settled(self._latest)
            self._display.end(f"{done}, {settled}" if settled else done)

    def _settled(self, now: Progress) -> str:
        """Return how many layers have settled; nothing where the run does not stop for it."""
        return f"{now.settled} of {now.layers} layers settled" if self._may_stop else ""

    def _before(self, now: Progress, expected: float) -> str:
        """Return what the run will take: the batches that may come, their time, and the memory."""
        batches, seconds = f"{now.max_batches} batches", f"about {duration(expected)}"
        if self._may_stop and now.max_batches > MIN_BATCHES:
            batches = f"{MIN_BATCHES} to {batches} until directions settle"
            seconds += " at most"
        return f"{now.inputs} inputs, {batches}, {seconds}, {size(now.sketch_bytes)} of sketches"
