"""The tree of errors."""

from __future__ import annotations

import evatune
from evatune import errors


def test_every_error_has_the_same_root_and_is_drawn_in_the_tree() -> None:
    ours = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, Exception)]
    assert all(issubclass(e, evatune.EvatuneError) for e in ours)
    assert all(e.__name__ in (errors.__doc__ or "") for e in ours)


def test_every_error_but_a_process_s_is_a_value_error() -> None:
    leaves = set(errors.EvatuneError.__subclasses__())
    others = {errors.MissingExtraError, errors.ProcessError}
    assert {error for error in leaves if not issubclass(error, ValueError)} == others
    assert issubclass(errors.MissingExtraError, ModuleNotFoundError)
    assert issubclass(errors.ProcessError, RuntimeError)
