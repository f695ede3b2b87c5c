"""Keeping what other libraries print out of the user's way."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout


@contextmanager
def libraries_on_stderr() -> Iterator[None]:
    """What libraries and worker processes print on stdout meanwhile goes to stderr; stdout is for results."""
    with redirect_stdout(sys.stderr):
        try:
            results = os.dup(1)
            os.dup2(2, 1)
        except OSError:  # one of the two is closed
            yield
            return
        try:
            yield
        finally:
            os.dup2(results, 1)
            os.close(results)


def quiet_libraries() -> None:
    """One progress bar is enough, and what the libraries warn each other about is not the user's business."""
    import warnings

    import datasets
    import transformers

    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\..*")
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # its errors come to us as exceptions as well
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
