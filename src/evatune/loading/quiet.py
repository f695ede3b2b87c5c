"""Libraries that draw bars and give each other advice, silenced."""

from __future__ import annotations

import warnings

import transformers

from evatune.utils.extras import extras

with extras(__name__):
    import datasets


def quiet_libraries() -> None:
    """Silence transformers and datasets: a command draws one bar, and errors reach us anyway."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\..*")
    datasets.disable_progress_bars()
    # its errors come to us as exceptions as well
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
