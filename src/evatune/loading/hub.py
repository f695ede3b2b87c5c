"""The model hub and paths on this machine: what exists, what can be reached, and what to say."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub

from evatune.errors import DataError, EvatuneError
from evatune.loading.data_files import kind_of
from evatune.loading.error_text import reason, root_cause
from evatune.utils.extras import extras

with extras(__name__):
    import datasets

TIMEOUT = 5.0
"""Seconds for the hub to answer."""


def require_path(source: str | Path, what: str) -> None:
    """Raise a DataError for a path that does not exist; what may be a hub id passes.

    Hub ids have at most one slash, no leading dot and no ending of a data file.
    """
    text = str(source)
    starts_like_path = text.startswith((".", "~", os.sep))
    looks_local = isinstance(source, Path) or starts_like_path or text.count("/") > 1
    must_exist = looks_local or kind_of(Path(text)) is not None
    if not text or (must_exist and not Path(text).exists()):
        raise DataError(
            f"{what} {text!r} does not exist; give a hub id, or a folder or file that is there"
        )


@contextmanager
def reading(source: str | Path, what: str, instead: str) -> Iterator[None]:
    """Turn every error while `source` is read into a DataError that says what to give instead."""
    local = Path(source).exists()
    reachable = local or hub_is_reachable()
    try:
        with cache_only(not reachable):
            yield
    except EvatuneError:
        raise
    # the libraries and their parsers raise errors of many unrelated kinds
    except Exception as error:
        message = _explain(error, str(source), what, instead, reachable=reachable)
        raise DataError(message) from error


def _explain(error: Exception, source: str, what: str, instead: str, *, reachable: bool) -> str:
    """Return why `source` could not be read and what to do about it."""
    problem = f"cannot load {what} from {source!r}"
    if not reachable:
        return (
            f"{problem}: there is no such file or folder, the model hub cannot be reached, and its"
            f" cache here has nothing of that name. Give {instead}, or try again with a connection"
        )
    unwritable = _unwritable(root_cause(error))
    if unwritable is not None:
        return (
            f"{problem}: the cache of the Hugging Face libraries cannot be written ({unwritable});"
            " make room or rights there, or set HF_HOME to a folder that you may write to"
        )
    if "trust_remote_code" in str(error):  # the option that transformers' own sentence names
        return (
            f"{source!r} comes with Python code of its own, which is not run unless"
            f" --trust-remote-code allows it; look at the code first, or give {instead} for an"
            " architecture of transformers"
        )
    local = Path(source).exists()
    alternative = instead if local else f"a hub id that can be reached, or {instead}"
    return f"{problem}: {reason(error)} Give {alternative}"


def _unwritable(error: BaseException) -> str | None:
    """Return what an error says of a file in the libraries' cache; None for any other error."""
    if not isinstance(error, OSError):
        return None
    folders = (
        huggingface_hub.constants.HF_HUB_CACHE,
        huggingface_hub.constants.HF_HOME,
        datasets.config.HF_DATASETS_CACHE,
        datasets.config.HF_CACHE_HOME,
    )
    caches = [Path(folder).absolute() for folder in folders]
    name = error.filename
    in_cache = isinstance(name, str) and any(
        Path(name).absolute().is_relative_to(cache) for cache in caches
    )
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # what is loaded is only read
    if not in_cache and not full:
        return None
    return f"{name or datasets.config.HF_DATASETS_CACHE}: {error.strerror or error}"


def hub_is_reachable() -> bool:
    """Return whether the model hub answers."""
    session = huggingface_hub.get_session()
    try:
        session.head(huggingface_hub.constants.ENDPOINT, timeout=TIMEOUT)
    # the kinds depend on which HTTP client this version of huggingface_hub has; all mean no answer
    except Exception:
        return False
    return True


@contextmanager
def cache_only(switch: bool) -> Iterator[None]:
    """Keep the libraries from asking the hub.

    Without an answer they would go on trying for half a minute. The environment variables for this
    are read when the libraries are imported, which was before.

    Args:
        switch: False changes nothing.
    """
    before = huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    try:
        if switch:
            huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
        yield
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before
