"""A layer's calls as examples: whose tokens their rows are, and which of them count."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from evatune.capture.input_views import DenseRows
from evatune.sketch import Examples


@dataclass(eq=False)
class ExampleCall:
    """A call of a layer, until its gradient comes.

    Attributes:
        index: which of the flat positions count; None: all.
        again: it was made in the backward pass, where checkpointing computes a second time.
    """

    x: Tensor
    index: Tensor | None
    time_first: bool
    again: bool = False
    gradient: Tensor | None = None


@dataclass(frozen=True)
class ExampleBlock:
    """The tokens of S examples, T of each.

    Attributes:
        x: (S, T, d) inputs, or (S, T) token ids.
        g: (S, T, out) output gradients.
        rows: how many tokens count.
        kept: (S, T) bool, those that count; None: all.
    """

    x: Tensor
    g: Tensor
    rows: int
    kept: Tensor | None

    @staticmethod
    def of(view: DenseRows, call: ExampleCall, examples: int) -> ExampleBlock:
        """Return the tokens of a call, those of an example together.

        Whatever lies between the first dimension and the last, or the windows that a model has
        made of its images, are tokens of an example, as long as their number can be divided so.
        Rows (1, T) that a whole batch shares, such as positions, are one example's, so that the
        result of such a layer depends on the size of batches.
        """
        assert call.gradient is not None
        x, g = view.all_rows(call.x), view.output_rows(call.gradient)
        leading = g.shape[:-1]
        kept = view.real_tokens(call.x)
        rows = leading.numel() if call.index is None else len(call.index)
        if kept is not None:
            rows = int(kept.sum() if call.index is None else kept.flatten()[call.index].sum())
        if call.index is not None:
            chosen = torch.zeros(leading.numel(), dtype=torch.bool, device=g.device)
            chosen[call.index.to(g.device)] = True
            kept = chosen if kept is None else chosen & kept.flatten()
        if call.time_first:
            x, g = x.transpose(0, 1), g.transpose(0, 1)
            kept = None if kept is None else kept.reshape(leading).transpose(0, 1)
        total = leading.numel()
        is_shared = len(leading) > 1 and leading[0] == 1
        is_divisible = total % examples == 0 and not is_shared
        count = examples if is_divisible else leading[:1].numel()
        shape = (count, total // max(1, count))
        x_shape = shape if view.is_tokens else (*shape, x.shape[-1])
        return ExampleBlock(
            x.reshape(x_shape),
            g.reshape(*shape, g.shape[-1]),
            rows,
            None if kept is None else kept.reshape(shape),
        )

    @staticmethod
    def joined(blocks: list[ExampleBlock]) -> ExampleBlock:
        """Return several calls as one, in which an example has the tokens of all."""
        if len(blocks) == 1:
            return blocks[0]
        kept = None
        if any(block.kept is not None for block in blocks):
            kept = torch.cat([block.all_kept() for block in blocks], dim=1)
        x = torch.cat([block.x for block in blocks], dim=1)
        g = torch.cat([block.g for block in blocks], dim=1)
        return ExampleBlock(x, g, sum(block.rows for block in blocks), kept)

    def all_kept(self) -> Tensor:
        """Return `kept`, with ones where it is None."""
        if self.kept is not None:
            return self.kept
        return torch.ones(self.g.shape[:2], dtype=torch.bool, device=self.g.device)

    def pieces(self, size: int, weight: float) -> Iterator[Examples]:
        """Yield the examples, so many at a time."""
        rows = self.rows  # of the first piece, as counting each would wait for the device
        for start in range(0, max(1, len(self.x)), size):
            piece = slice(start, start + size)
            kept = None if self.kept is None else self.kept[piece]
            yield Examples(self.x[piece], self.g[piece], rows, kept, weight)
            rows = 0
