"""Libraries of extras that are not installed."""

from __future__ import annotations

import sys

import pytest

from evatune.errors import MissingExtraError
from evatune.utils.extras import extras, require


def test_a_missing_library_of_an_extra_is_named_with_the_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError) as caught, extras("plot()"):
        import matplotlib.figure  # noqa: F401
    assert str(caught.value) == (
        "matplotlib is not installed, which plot() needs; install it with: pip install"
        " 'evatune[cli]'"
    )
    assert caught.value.name == "matplotlib"


def test_any_other_missing_library_is_passed_on() -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_library") as caught, extras("plot()"):
        import no_such_library  # noqa: F401
    assert not isinstance(caught.value, MissingExtraError)


def test_an_error_that_names_its_extra_is_not_told_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(MissingExtraError, match="digits"), extras("this"), extras("digits"):
        import sklearn  # noqa: F401


def test_a_command_asks_for_its_whole_extra_before_it_begins(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    require("cli", "this command")
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingExtraError, match="jinja2 is not installed, which this command"):
        require("cli", "this command")
