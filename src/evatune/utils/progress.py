"""Shows how far a long run is: a bar in a terminal or a notebook, elsewhere lines of a log."""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import Any, Protocol

from evatune.utils.markup import printable
from evatune.utils.text import duration

LOGGER = logging.getLogger("evatune")
LONG = 5.0  # seconds from which on a run is long: it is worth a line before, and lines in a log
_SOON = 0.5  # seconds in which a run may end without a bar
_FRAME = 0.1  # seconds between two drawings of it
_BETWEEN_LINES = 5.0  # seconds
_ROWS = 24  # of a terminal, more than a bar needs
_NO_FRAME_YET = 1e-9  # seconds of tqdm's delay, by which it draws nothing when it is made
_BESIDE_NOTE = 50  # columns that the bar and its figures take
_NARROW = 60  # columns up to which a terminal has no room for words beside the bar


class Renderer(Protocol):
    """Draws the state of a run in one of the places where it may be looked at.

    Attributes:
        delay: seconds in which a run may end without being drawn.
        pause: seconds between two drawings.
    """

    delay: float
    pause: float

    def draw(self, done: int, total: int | None, note: str) -> None:
        """Show that so many steps are done."""

    def say(self, line: str) -> None:
        """Show a line that stays."""

    def close(self) -> None:
        """Take the bar away."""


class Display:
    """The state of one run, drawn at most as often as an eye can follow."""

    def __init__(self, renderer: Renderer) -> None:
        self._renderer = renderer
        self._start = self._drawn = time.monotonic()
        self._shown = False
        self._announced = False
        self._first: tuple[int, float] | None = None  # a count, and when it was reached

    @property
    def seconds(self) -> float:
        """Seconds since the display was made."""
        return time.monotonic() - self._start

    def update(self, done: int, total: int | None, note: str = "") -> None:
        """Tell how many steps of how many are done, and a few words beside."""
        now = time.monotonic()
        if now - self._start < self._renderer.delay or now - self._drawn < self._renderer.pause:
            return
        self._drawn, self._shown = now, True
        self._renderer.draw(done, total, note)

    def begin(self, total: int | None) -> None:
        """Draw the bar of a run whose first step may take long; a log has its lines in time."""
        if self._renderer.delay < LONG:
            self._renderer.draw(0, total, "")

    def forecast(self, done: int, total: int) -> float | None:
        """Return how many seconds the run takes in all, as steps so far suggest.

        None where nothing is known yet, where the run is short, and when it was told before. The
        first step is left out, which costs more than others, unless it alone takes long.
        """
        if self._announced:
            return None
        if self._first is None:
            self._first = (done, self.seconds)
            if self.seconds < LONG:
                return None
        count, seconds = self._first
        if done == count:
            seconds_per_step = self.seconds / done
        else:
            seconds_per_step = (self.seconds - seconds) / (done - count)
        expected = self.seconds + seconds_per_step * (total - done)
        if expected < LONG:
            return None
        self._announced = True
        return expected

    def say(self, line: str) -> None:
        """Show a line that stays."""
        self._renderer.say(printable(line))

    def end(self, line: str) -> None:
        """Take the bar away; of a run that was shown, leave a line."""
        self._renderer.close()
        if self._shown or self._announced:
            self.say(line)

    def close(self) -> None:
        """Take the bar away."""
        self._renderer.close()


@contextmanager
def display(title: str, unit: str, *, shown: bool = True) -> Iterator[Display]:
    """Yield a display that is closed with the block.

    Args:
        title: what is done: "calibrating". unit: what is counted: "batches".
        shown: False for one that shows nothing.
    """
    bar = Display(_renderer(title, unit) if shown else NoRenderer())
    try:
        yield bar
    finally:
        bar.close()


def _renderer(title: str, unit: str) -> Renderer:
    if in_notebook():
        return NotebookBar(title, unit)
    return TerminalBar(title, unit) if in_terminal() else LogLines(title, unit)


def in_notebook() -> bool:
    """Return whether this process is the kernel of a notebook; loads nothing to find out."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return getattr(shell, "kernel", None) is not None


def in_terminal() -> bool:
    """Return whether stderr is a terminal on which a line can be drawn again."""
    stream = sys.stderr
    return stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"


class TerminalBar:
    """A bar on the last line of a terminal."""

    delay, pause = _SOON, _FRAME

    def __init__(self, title: str, unit: str) -> None:
        self._title, self._unit = title, unit
        self._bar: Any = None
        self._start = time.monotonic()

    def draw(self, done: int, total: int | None, note: str) -> None:
        from tqdm import tqdm

        columns = _columns()
        if self._bar is None:
            # Sizes are given, as a terminal that does not know its own would get no bar.
            options = {"ncols": columns - 1, "nrows": _ROWS, "leave": False, "delay": _NO_FRAME_YET}
            self._bar = tqdm(desc=self._title, total=total, file=sys.stderr, **options)
            self._bar.start_t -= time.monotonic() - self._start  # it is drawn only now
        bar = self._bar
        bar.n, bar.total, bar.ncols = done, total, columns - 1
        room = columns - _BESIDE_NOTE
        note = note if len(note) <= room else f"{note[: max(0, room - 1)]}…"
        bar.bar_format = _bar_format(total, self._unit, note, columns <= _NARROW)
        bar.refresh()

    def say(self, line: str) -> None:
        from tqdm import tqdm

        tqdm.write(line, file=sys.stderr)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _bar_format(total: int | None, unit: str, note: str, narrow: bool) -> str:
    """Return tqdm's format of the line; a narrow one has room for the bar and the time."""
    words = f", {note}".replace("{", "{{").replace("}", "}}") if note and not narrow else ""
    if total is None:
        return f"{{desc}} {{n_fmt}} {unit}, {{elapsed}}{words}"
    if narrow:
        return "{desc} {bar} {n_fmt}/{total_fmt}, {elapsed}"
    return f"{{desc}} {{bar}} {{n_fmt}}/{{total_fmt}} {unit}, {{elapsed}}<{{remaining}}{words}"


def _columns() -> int:
    """Return the width of the terminal; COLUMNS counts before what the terminal says."""
    text = os.environ.get("COLUMNS", "")
    if text.isdecimal() and int(text) > 0:
        return int(text)
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


class NotebookBar:
    """A bar in the output of a notebook's cell, by HTML's own element for one."""

    delay, pause = _SOON, _FRAME

    def __init__(self, title: str, unit: str) -> None:
        self._title, self._unit = title, unit
        self._lines: list[str] = []
        self._bar = ""
        self._words = ""
        self._handle: Any = None
        self._start = time.monotonic()

    def draw(self, done: int, total: int | None, note: str) -> None:
        seconds = duration(time.monotonic() - self._start)
        self._words = ", ".join(filter(None, [_count(done, total, self._unit), seconds, note]))
        ends = "" if total is None else f' max="{total}" value="{done}"'
        self._bar = f'<progress{ends} style="width: 16em; vertical-align: middle"></progress>'
        self._show()

    def say(self, line: str) -> None:
        self._lines.append(line)
        self._show()

    def close(self) -> None:
        if self._bar:
            self._bar = self._words = ""
            self._show()

    def _show(self) -> None:
        from IPython.display import display

        lines = [*self._lines, *([f"{self._title}: {self._words}"] if self._bar else [])]
        parts = [f"<div>{escape(line)}</div>" for line in self._lines]
        if self._bar:
            parts.append(f"<div>{escape(self._title)} {self._bar} {escape(self._words)}</div>")
        data = {"text/html": "".join(parts), "text/plain": "\n".join(lines)}
        if self._handle is None:
            self._handle = display(data, raw=True, display_id=True)
        else:
            self._handle.update(data, raw=True)


class LogLines:
    """A line every few seconds, for the log of a script or a job."""

    delay = pause = _BETWEEN_LINES

    def __init__(self, title: str, unit: str) -> None:
        self._title, self._unit = title, unit
        self._start = time.monotonic()

    def draw(self, done: int, total: int | None, note: str) -> None:
        seconds = duration(time.monotonic() - self._start)
        words = ", ".join(filter(None, [_count(done, total, self._unit), seconds, note]))
        LOGGER.info("%s: %s", self._title, printable(words))

    def say(self, line: str) -> None:
        LOGGER.info("%s", line)

    def close(self) -> None:
        """Do nothing: lines stay."""


class NoRenderer:
    """Shows nothing."""

    delay = pause = math.inf

    def draw(self, done: int, total: int | None, note: str) -> None:
        """Do nothing."""

    def say(self, line: str) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


def _count(done: int, total: int | None, unit: str) -> str:
    return f"{done} {unit}" if total is None else f"{done} of {total} {unit}"
