"""Libraries that draw bars and give each other advice, silenced."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator

import datasets
import pytest
import transformers

from evatune.loading.quiet import quiet_libraries


@pytest.fixture(autouse=True)
def settings_kept() -> Iterator[None]:
    """What the libraries were told before holds again afterwards."""
    theirs = transformers.utils.logging
    levels = datasets.logging.get_verbosity(), theirs.get_verbosity()
    bars = not datasets.are_progress_bars_disabled(), theirs.is_progress_bar_enabled()
    datasets.logging.set_verbosity_info()
    theirs.set_verbosity_info()
    datasets.enable_progress_bars()
    theirs.enable_progress_bar()
    with warnings.catch_warnings():
        yield
    datasets.logging.set_verbosity(levels[0])
    theirs.set_verbosity(levels[1])
    if not bars[0]:
        datasets.disable_progress_bars()
    if not bars[1]:
        theirs.disable_progress_bar()


def test_neither_library_draws_a_bar() -> None:
    quiet_libraries()
    assert datasets.are_progress_bars_disabled()
    assert not transformers.utils.logging.is_progress_bar_enabled()


def test_errors_of_transformers_are_logged_and_advice_is_not() -> None:
    quiet_libraries()
    logger = logging.getLogger("transformers.models")
    assert logger.isEnabledFor(logging.ERROR)
    assert not logger.isEnabledFor(logging.WARNING)
    assert not logging.getLogger("datasets.builder").isEnabledFor(logging.ERROR)


def test_only_warnings_of_transformers_about_the_future_are_dropped() -> None:
    quiet_libraries()

    def warn(category: type[Warning], module: str) -> None:
        warnings.warn_explicit("soon", category, "file.py", 1, module=module)

    warn(FutureWarning, "transformers.models.bert")
    for category, module in (
        (FutureWarning, "evatune.layers"),
        (UserWarning, "transformers.models.bert"),
    ):
        with pytest.raises(category, match="soon"):
            warn(category, module)
