"""How far a run is, in a terminal, a notebook and a log."""

from __future__ import annotations

import io
import logging
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from evatune.utils import progress
from evatune.utils.progress import Display, LogLines, NotebookBar, TerminalBar, display


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: self.now))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


class Terminal(io.StringIO):
    """Takes the place of stderr in a test; pytest would undo that in a fixture."""

    encoding = "utf-8"

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        monkeypatch.setattr(sys, "stderr", self)
        monkeypatch.setenv("TERM", "xterm")

    def isatty(self) -> bool:
        return True


def test_a_short_run_shows_nothing(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(monkeypatch)
    with display("working", "steps") as shown:
        for done in range(1, 5):
            clock.now += 0.1
            assert shown.forecast(done, 4) is None
            shown.update(done, 4)
        shown.end("done")
    assert terminal.getvalue() == ""


@pytest.mark.parametrize("columns", [80, 40])
def test_a_terminal_has_a_bar_within_its_width_and_a_line_at_the_end(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    terminal = Terminal(monkeypatch)
    monkeypatch.setenv("COLUMNS", str(columns))
    with display("working", "steps") as shown:
        for done in (1, 2, 3):
            clock.now += 2
            shown.update(done, 30, "well {under} way")
        shown.end("worked for 6 s")
    *drawn, last = terminal.getvalue().split("\r")
    assert last == "worked for 6 s\n"
    assert all(len(line) < columns for line in drawn)
    bars = [line for line in drawn if "█" in line]
    assert "3/30" in bars[-1]
    assert ("well {under} way" in bars[-1]) == (columns == 80)
    assert "\x1b" not in terminal.getvalue()


def test_a_log_has_a_line_every_few_seconds(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "evatune"), display("working", "steps") as shown:
        for done in range(1, 13):
            clock.now += 1
            shown.update(done, 20, "well\x1b")
        shown.end("worked for 12 s")
    assert [record.message for record in caplog.records] == [
        "working: 5 of 20 steps, 5 s, well\\x1b",
        "working: 10 of 20 steps, 10 s, well\\x1b",
        "worked for 12 s",
    ]


def test_a_terminal_that_draws_nothing_again_gets_the_log(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Terminal(monkeypatch)
    assert progress.in_terminal()
    monkeypatch.setenv("TERM", "dumb")
    assert not progress.in_terminal()
    monkeypatch.setattr(sys, "stderr", None)  # as under pythonw
    assert not progress.in_terminal()


def test_a_notebook_has_one_output_that_changes(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs: list[dict[str, str]] = []

    def show(data: dict[str, str], **options: Any) -> Any:
        assert options == {"raw": True, "display_id": True}
        outputs.append(data)
        return SimpleNamespace(update=lambda data, raw: outputs.append(data))

    shell = SimpleNamespace(kernel=object())
    module = SimpleNamespace(get_ipython=lambda: shell)
    monkeypatch.setitem(sys.modules, "IPython", module)
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=show))
    with display("working", "steps") as shown:
        clock.now = 3
        shown.say("before <it>")
        shown.update(1, 4, "a & b")
        shown.end("worked for 3 s")
    assert [data["text/plain"] for data in outputs] == [
        "before <it>",
        "before <it>\nworking: 1 of 4 steps, 3 s, a & b",
        "before <it>",
        "before <it>\nworked for 3 s",
    ]
    assert '<progress max="4" value="1"' in outputs[1]["text/html"]
    assert "a &amp; b" in outputs[1]["text/html"]
    assert outputs[-1]["text/html"] == "<div>before &lt;it&gt;</div><div>worked for 3 s</div>"
    shell.kernel = None  # IPython in a terminal
    assert not progress.in_notebook()


def test_a_forecast_leaves_the_first_step_out_and_comes_once(clock: Clock) -> None:
    shown = Display(LogLines("working", "steps"))
    clock.now = 4
    assert shown.forecast(1, 11) is None
    clock.now = 5
    assert shown.forecast(2, 11) == 4 + 10
    assert shown.forecast(3, 11) is None
    slow = Display(TerminalBar("working", "steps"))
    clock.now += 20
    assert slow.forecast(1, 3) == 60
    fast = Display(NotebookBar("working", "steps"))
    clock.now += 0.1
    assert fast.forecast(1, 20) is None
    clock.now += 0.1
    assert fast.forecast(2, 20) is None
    assert fast.forecast(3, 2000) == pytest.approx(0.2 + 1997 * 0.05)
