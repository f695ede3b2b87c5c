"""The paper's sketch: minibatches that are too short wait."""

from __future__ import annotations

import torch

from tests.sketches import build, feed, planted, truth


def test_the_incremental_sketch_buffers_short_minibatches() -> None:
    rows = planted(40, 32)
    spectrum = feed(build("incremental", 32, 8), rows, 3, refresh=False)
    assert spectrum.rows == 40
    assert torch.allclose(spectrum.energies[:4].double(), truth(rows, 4)[1], rtol=0.05)
