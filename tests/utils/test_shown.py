"""What results have in common, where a library is missing."""

from __future__ import annotations

import sys

import pytest

from evatune.errors import MissingExtraError
from evatune.sketch.spectrum import empty


@pytest.mark.parametrize(
    ("library", "method", "install"),
    [("pandas", "to_pandas", "pandas"), ("matplotlib", "plot", "'evatune[cli]'")],
)
def test_a_missing_library_is_named_with_what_to_install(
    monkeypatch: pytest.MonkeyPatch, library: str, method: str, install: str
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingExtraError) as error:
        getattr(empty(4), method)()
    assert str(error.value) == (
        f"{library} is not installed, which {method}() needs; install it with: pip install"
        f" {install}"
    )
