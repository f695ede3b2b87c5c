"""What the sketches of gradients have in common: a moving basis, and further sums beside it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Self

from torch import Tensor

from evatune.sketch.base import SketchUpdate
from evatune.sketch.examples import Examples, ExampleSketch, FloatExamples
from evatune.sketch.nystrom import POWER_STEPS, NystromMoment
from evatune.sketch.rows import FIRST_ROWS


class ExampleMoment(NystromMoment, ExampleSketch):
    """A second moment C that examples add to, by its product with a moving basis.

    A subclass says what C is (`_image`), which sums it keeps besides (`_EXTRA`), and how examples
    add to all of them (`_sum`). Its updates have the further sums under the same names.
    """

    # Attributes that are sums of the data, beside those of `NystromMoment`; part of `_STATE`.
    _EXTRA: ClassVar[tuple[str, ...]]

    def add(self, update: SketchUpdate) -> None:
        super().add(update)
        for name in self._EXTRA:
            getattr(self, name).add_(getattr(update, name))

    def change_basis(self, basis_state: Mapping[str, Tensor]) -> None:
        """Keep the further sums as they are, and change the rest as `NystromMoment` does."""
        extra = {name: getattr(self, name).clone() for name in self._EXTRA}
        super().change_basis(basis_state)
        for name, value in extra.items():
            setattr(self, name, value)

    # -- what each algorithm fills in --------------------------------------------------------------

    @abstractmethod
    def _sum(self, floats: FloatExamples, rows: int) -> SketchUpdate:
        """Return the sums over examples of which so many rows count."""

    @abstractmethod
    def _image(self, floats: FloatExamples) -> Tensor:
        """Return C of a few examples times the basis, (l, d), up to a factor."""

    # -- examples ----------------------------------------------------------------------------------

    def _summarize(self, examples: Examples) -> SketchUpdate:
        if self.shift is None:
            self._initialize(examples.first(FIRST_ROWS))
        return self._sum(FloatExamples(examples, self.width, self.dtype), examples.rows)

    def _initialize(self, examples: Examples) -> None:
        """Choose the first basis, by power steps on a few examples."""
        floats = FloatExamples(examples, self.width, self.dtype)
        self.shift = self.basis.new_zeros(self.width)
        for _ in range(POWER_STEPS):
            self._power_step(self._image(floats))

    def _fresh_squares(self, projected: Tensor, image: Tensor) -> Tensor:
        """Return what tokens add to the certificate, (m,): Σ projection · image, both (S, T, l)."""
        if len(self._fresh) == 0:
            return self._fresh
        return (projected * image).sum((0, 1), dtype=self.dtype)

    def _merge_moment(self, other: Self, offset: Tensor) -> None:
        super()._merge_moment(other, offset)
        for name in self._EXTRA:
            setattr(self, name, getattr(self, name) + getattr(other, name))
