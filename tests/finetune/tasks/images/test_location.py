"""In which cell a shape lies."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from evatune.finetune.tasks.images import location

torch.set_num_threads(1)


def test_a_shape_lies_in_the_cell_that_its_label_names() -> None:
    for label in range(25):
        drawn = [location.draw(np.random.default_rng([label, i]), label) / 255 for i in range(40)]
        contrast = np.mean([np.abs(image - np.median(image)) for image in drawn], axis=0)[
            4:28, 4:28
        ]
        cells = np.asarray(
            Image.fromarray(contrast.astype(np.float32)).resize((5, 5), Image.Resampling.BOX)
        )
        assert cells.argmax() == label
