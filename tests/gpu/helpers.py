"""What a result on a GPU is compared with: the same rows on the CPU, and the truth in float64."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from evatune.sketch.spectrum import Spectrum


def moment_of(rows: Tensor, center: bool = False) -> Tensor:
    """(d, d) float64, the second moment per row, or the covariance."""
    rows = rows.cpu().double()
    if center:
        rows = rows - rows.mean(0)
    return rows.T @ rows / len(rows)


def captured(directions: Tensor, moment: Tensor) -> float:
    """Return the share of a moment's trace in the span of orthonormal directions (k, d)."""
    v = directions.double()
    return float((v @ moment * v).sum() / moment.trace())


def require_best(found: Spectrum, moment: Tensor) -> None:
    """The spectrum has the leading eigenpairs of a moment (d, d) float64."""
    values = torch.linalg.eigvalsh(moment).flip(0)[: len(found.energies)]
    total = float(moment.trace())
    assert found.total_energy == pytest.approx(total, rel=1e-3)
    assert captured(found.directions, moment) >= float(values.sum()) / total - 1e-4
    close = torch.isclose(found.energies.double(), values, rtol=1e-3, atol=1e-4 * float(values[0]))
    assert close.all(), (found.energies, values)


def require_same(found: Spectrum, expected: Spectrum, moment: Tensor) -> None:
    """The spectrum is as good as another of the same rows, whose moment is (d, d) float64."""
    assert found.rows == expected.rows
    assert found.directions.device.type == found.energies.device.type == "cpu"
    assert found.directions.dtype == torch.float32
    assert found.total_energy == pytest.approx(expected.total_energy, rel=1e-3)
    largest = float(expected.energies.max()) if len(expected.energies) else 0.0
    count = min(len(found.energies), len(expected.energies))
    close = torch.isclose(
        found.energies[:count], expected.energies[:count], rtol=1e-3, atol=1e-4 * largest
    )
    assert close.all(), (found.energies, expected.energies)
    assert (found.energies[count:] <= 1e-4 * largest).all()
    assert (expected.energies[count:] <= 1e-4 * largest).all()
    rms = expected.total_second_moment**0.5
    assert torch.allclose(found.mean, expected.mean, rtol=1e-3, atol=1e-4 * rms)
    if moment.trace() > 0:
        assert captured(found.directions, moment) >= captured(expected.directions, moment) - 1e-4


@contextmanager
def rows_seen(model: nn.Module, names: Iterable[str], masks: list[Tensor]) -> Iterator[Any]:
    """Keep what layers are called with while this is open: name → (n, d) float64 on the CPU.

    Args:
        masks: (B, T) of each batch in turn, the tokens that count.
    """
    rows: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = []
    for name, parts in rows.items():

        def keep(module: nn.Module, args: Any, parts: list[Tensor] = parts) -> None:
            mask = masks[len(parts)].bool().cpu()
            parts.append(args[0].detach().cpu().double()[mask])

        handles.append(model.get_submodule(name).register_forward_pre_hook(keep))
    try:
        yield rows
    finally:
        for handle in handles:
            handle.remove()


def words(count: int = 6) -> list[dict[str, Tensor]]:
    """Batches for `tiny_bert` and `tiny_llama`, with padding."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(count):
        ids = torch.randint(1, 60, (4, 32), generator=generator)
        lengths = torch.randint(16, 33, (4, 1), generator=generator)
        batches.append({"input_ids": ids, "attention_mask": (torch.arange(32) < lengths).long()})
    return batches
