"""What results have in common, where a library is missing."""

from __future__ import annotations

import sys

import pytest

from evatune.errors import MissingExtraError
from evatune.sketch.spectrum import empty


@pytest.mark.parametrize(("library", "method"), [("pandas", "to_pandas"), ("matplotlib", "plot")])
def test_a_missing_library_is_named_with_what_to_install(
    monkeypatch: pytest.MonkeyPatch, library: str, method: str
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingExtraError) as error:
        getattr(empty(4), method)()
    assert str(error.value) == (
        f"{method}() needs {library}, which is not installed: pip install {library}"
    )
