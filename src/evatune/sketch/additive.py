"""Sketches whose sums add up over processes: what the sums refer to, and how it is changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from evatune.sketch.base import Sketch, named_tensors, set_tensors


class AdditiveSketch(Sketch):
    """A sketch that is linear in the data.

    `basis_state` is what the sums refer to, `change_basis` changes that, and the `sums` of sketches
    with an equal one are those of all their rows together.
    """

    # The part of the state that the sums refer to; all other attributes of the state are sums.
    _BASIS: ClassVar[tuple[str, ...]] = ("shift",)

    def basis_state(self) -> dict[str, Tensor]:
        """Return shift and basis, as far as there are any, and how many directions are known."""
        known_directions = torch.tensor(len(self._fresh), dtype=torch.int64, device="cpu")
        return named_tensors(self, self._BASIS) | {"known_directions": known_directions}

    def set_basis(self, basis_state: Mapping[str, Tensor]) -> None:
        """Drop every row, and go on from the `basis_state` of another sketch of this size."""
        set_tensors(self, self._BASIS, basis_state)
        for name, value in self._sums().items():
            if isinstance(value, Tensor):
                value.zero_()
            else:
                setattr(self, name, 0)
        self.certificate = None
        self._start_fresh(int(basis_state["known_directions"]))

    def change_basis(self, basis_state: Mapping[str, Tensor]) -> None:
        """Keep every row, as far as possible, with sums that refer to another `basis_state`.

        For sketches that have not been refreshed yet.
        """
        rows = self.clone()
        self.set_basis(basis_state)
        self.merge(rows)

    def leading(self, count: int) -> Tensor:
        """Return the first directions that `basis_state` tells, (≤ count, d) float32 on the CPU."""
        return torch.zeros(0, self.width, dtype=torch.float32, device="cpu")

    @property
    def sum_bytes(self) -> int:
        """Bytes of the sums that are tensors."""
        tensors = [value for value in self._sums().values() if isinstance(value, Tensor)]
        return sum(tensor.nbytes for tensor in tensors)

    def sums(self) -> Tensor:
        """Return all sums as (m,) of `dtype`, to be added up over sketches of an equal basis."""
        tensors = [
            torch.as_tensor(value, dtype=self.dtype, device=self.device)
            for value in self._sums().values()
        ]
        return torch.cat([tensor.flatten() for tensor in tensors])

    def set_sums(self, sums: Tensor) -> None:
        """Replace all sums by those of a row (m,) as `sums` returns it."""
        start = 0
        for name, value in self._sums().items():
            size = value.numel() if isinstance(value, Tensor) else 1
            part = sums[start : start + size].to(self.device)
            start += size
            if isinstance(value, Tensor):
                setattr(self, name, part.reshape(value.shape).clone())
            else:
                setattr(self, name, round(float(part)))

    def _sums(self) -> dict[str, Tensor | int]:
        names = [name for name in self._STATE if name not in self._BASIS]
        return {name: getattr(self, name) for name in names}
