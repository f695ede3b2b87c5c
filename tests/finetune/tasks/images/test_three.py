"""In which cell the handwritten 3 lies."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from evatune.errors import MissingExtraError
from evatune.finetune.tasks import images
from evatune.finetune.tasks.images import three
from tests.finetune.helpers import small_images as small

torch.set_num_threads(1)


@pytest.mark.parametrize("label", [0, 6, 15])
def test_the_3_lies_in_the_cell_of_the_label_among_three_other_digits(
    label: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(three, "ground_and_ink", lambda _: (np.zeros((32, 32)), 1.0))
    bright, dark = (Image.fromarray(np.full((8, 8), level, np.uint8)) for level in (255, 120))
    pictures = {digit: [bright if digit == 3 else dark] for digit in range(10)}
    for seed in range(5):
        image = three.draw(np.random.default_rng(seed), label, pictures)
        # the middle of each cell of 8 × 8 pixels
        cells = image.reshape(4, 8, 4, 8)[:, 2:6, :, 2:6].mean((1, 3)).flatten()
        assert (cells > 25).sum() == 4
        assert np.flatnonzero(cells > 180).tolist() == [label]


def test_no_handwritten_digit_is_in_two_parts() -> None:
    parts = three.pictures_by_part()
    seen = {
        part: {picture.tobytes() for group in pictures.values() for picture in group}
        for part, pictures in parts.items()
    }
    assert sum(len(group) for group in parts["train"].values()) == 1000
    assert all(group for pictures in parts.values() for group in pictures.values())
    assert not seen["train"] & seen["test"]
    assert not seen["validation"] & (seen["train"] | seen["test"])


def test_examples_are_drawn_from_the_images_of_their_part() -> None:
    task = images.prepare(small("three", "data.validation=10"))
    parts = three.TASK.drawings().parts
    assert parts is not None
    for part, examples in (("train", task.train), ("validation", task.validation)):
        assert set(examples.indices) <= set(getattr(parts, part))
    assert set(task.test.indices) <= set(parts.test)


def test_three_names_the_extra_that_it_comes_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingExtraError, match=r"'three' .*'evatune\[images\]'"):
        images.prepare(small("three"))
