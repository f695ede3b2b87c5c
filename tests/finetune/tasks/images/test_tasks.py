"""The tasks of image classification."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from evatune.finetune.tasks import images
from evatune.finetune.tasks.images import counting, fonts, location, orientation
from tests.finetune.helpers import small_images as small

torch.set_num_threads(1)


DRAWN = {
    "location": (location.draw, 25),
    "orientation": (orientation.draw, 16),
    "counting": (counting.draw, 5),
    "fonts": (fonts.draw, 9),
}


@pytest.mark.parametrize("task", DRAWN)
def test_a_drawing_is_a_function_of_its_random_numbers(task: str) -> None:
    draw, _ = DRAWN[task]
    first, again, other = (draw(np.random.default_rng(seed), 3) for seed in (0, 0, 1))
    assert first.dtype == np.uint8
    assert first.shape == (32, 32)
    assert (first == again).all()
    assert (first != other).any()


@pytest.mark.parametrize("task", DRAWN)
def test_labels_are_balanced(task: str) -> None:
    labels = images.prepare(small(task)).train.source.labels
    counts = np.bincount(labels)
    assert len(counts) == DRAWN[task][1]
    assert counts.max() - counts.min() <= 1
