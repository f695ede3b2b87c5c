"""Handwritten digits."""

from __future__ import annotations

import sys

import pytest
import torch

from evatune.errors import MissingExtraError
from evatune.finetune.tasks import images
from tests.finetune.helpers import small_images as small

torch.set_num_threads(1)


def test_digits_name_the_extra_that_they_come_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'evatune\[images\]'"):
        images.prepare(small("digits"))
