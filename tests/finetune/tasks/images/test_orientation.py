"""Which way a dart points."""

from __future__ import annotations

import numpy as np
import torch

from evatune.finetune.tasks.images import orientation

torch.set_num_threads(1)


def test_a_dart_points_where_its_label_says() -> None:
    # Its tip is thin and far out, so along its direction its mass is skewed to the front.
    places = np.stack(np.meshgrid(np.arange(32), np.arange(32)), -1).reshape(-1, 2)
    for label in range(16):
        direction = np.array([np.cos(2 * np.pi * label / 16), np.sin(2 * np.pi * label / 16)])
        skews = []
        for i in range(40):
            image = orientation.draw(np.random.default_rng([label, i]), label) / 255
            contrast = np.abs(image - np.median(image))
            share = np.where(contrast > 0.2, contrast, 0).reshape(-1)
            share = share / share.sum()
            skews.append(share @ ((places - share @ places) @ direction) ** 3)
        assert np.median(skews) > 0
