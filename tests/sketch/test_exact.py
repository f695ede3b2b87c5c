"""The exact sketch beside rows of very unequal size."""

from __future__ import annotations

import pytest
import torch

from tests.sketches import build, captured_energy, feed, planted, principal_angles, truth


@pytest.mark.parametrize("norm", [1e3, 1e4])
@pytest.mark.parametrize("center", [False, True])
def test_the_exact_sketch_is_exact_beside_an_attention_sink(norm: float, center: bool) -> None:
    """A token in 256 is as long as `norm` others: a float32 product is off by as much as all of
    them hold."""
    rows = planted(2048, 64, decay=0.95)
    rows[::256] = (
        norm * rows.norm(dim=1).median() * torch.nn.functional.normalize(torch.ones(64), dim=0)
    )
    spectrum = feed(build("exact", 64, 8, center=center), rows, 256)
    directions, energies, _ = truth(rows, 8, center)
    assert principal_angles(spectrum.directions, directions).max() < 1e-5
    assert torch.allclose(spectrum.energies.double(), energies, rtol=1e-6)
    default = feed(build("nystrom", 64, 8, center=center), rows, 256)
    tokens = rows[torch.arange(2048) % 256 > 0]
    assert captured_energy(default.directions, tokens) > 0.999 * captured_energy(
        spectrum.directions, tokens
    )
