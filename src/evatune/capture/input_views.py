"""The ways in which a layer's input is read as rows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from evatune.capture.row_selection import RowSelector

# Patches overlap: all of an image's at once take up to Π kernel / Π stride times the memory of the
# image.
_PIECE_BYTES = 16 << 20

Piece = tuple[Tensor, Tensor | None]  # rows, and the indices of those to take (None: all)


@dataclass(frozen=True)
class DenseRows:
    """Rows that are the last dimension of the input."""

    is_tokens: ClassVar[bool] = False  # whether a row is the one-hot vector of an integer

    def all_rows(self, x: Tensor) -> Tensor:
        """Return what a `rows` function is handed."""
        return x

    def leading_shape(self, x: Tensor) -> torch.Size | None:
        """Return the dimensions by which a mask of tokens knows the rows; None where none can."""
        return x.shape[:-1]

    def pieces(self, x: Tensor, selector: RowSelector) -> Iterator[Piece]:
        """Yield the rows of one activation that count.

        They come in pieces of bounded size where they do not lie in memory already.
        """
        yield selector.rows(x)

    def output_rows(self, y: Tensor) -> Tensor:
        """Return an output, or its gradient, with a row (…, out) for each row of the input."""
        return y

    def real_tokens(self, x: Tensor) -> Tensor | None:
        """Return bool, false where an input says by itself that its row is padding; None: all."""
        return None

    def accepts(self, x: Tensor) -> bool:
        """Return whether an input is of a dtype that can be read this way."""
        return True

    def rows_fit(self, rows: Tensor, width: int) -> bool:
        """Return whether a `rows` function has returned rows of this width."""
        return rows.ndim == 2 and rows.shape[1] == width

    def shape_of_rows(self, width: int) -> str:
        """Return the shape that a `rows` function must return, in words."""
        return f"(rows, {width})"


@dataclass(frozen=True)
class OneHotRows(DenseRows):
    """Rows that are the one-hot vectors of token ids.

    Attributes:
        padding: a token whose embedding is never trained, and which is left out.
    """

    is_tokens: ClassVar[bool] = True
    padding: int | None = None

    def leading_shape(self, x: Tensor) -> torch.Size:
        return x.shape

    def pieces(self, x: Tensor, selector: RowSelector) -> Iterator[Piece]:
        tokens = x.flatten()
        index = selector.chosen(x.shape)
        if index is not None:
            tokens = tokens[index.to(x.device)]
        if self.padding is not None:
            tokens = tokens[tokens != self.padding]
        yield tokens, None

    def real_tokens(self, x: Tensor) -> Tensor | None:
        return None if self.padding is None else x != self.padding

    def accepts(self, x: Tensor) -> bool:
        return not x.is_floating_point() and x.dtype != torch.bool

    def rows_fit(self, rows: Tensor, width: int) -> bool:
        return rows.ndim == 1

    def shape_of_rows(self, width: int) -> str:
        return "(rows,)"


@dataclass(frozen=True)
class ConvPatches(DenseRows):
    """Rows that are what a convolution's kernel covers at each position.

    A row is ordered as the weight is: by channel, then by place in the kernel.

    Attributes:
        kernel: size per spatial dimension, as `stride` and `dilation` have theirs.
        padding: (before, after) per spatial dimension.
        mode: how the padding is filled, in the words of `torch.nn.functional.pad`.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    mode: str

    @classmethod
    def of(cls, conv: nn.Module) -> ConvPatches:
        """Return the patches of an `nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d`."""
        kernel: Any = conv.kernel_size
        stride: Any = conv.stride
        dilation: Any = conv.dilation
        mode: Any = conv.padding_mode
        return cls(
            kernel,
            stride,
            _padding_sides(conv),
            dilation,
            "constant" if mode == "zeros" else mode,
        )

    def all_rows(self, x: Tensor) -> Tensor:
        """Return (batch, positions, channels · kernel), a copy."""
        windows = self._windows(x)
        positions = math.prod(windows.shape[1 : 1 + len(self.kernel)])
        return windows.reshape(len(windows), positions, self._width(windows))

    def output_rows(self, y: Tensor) -> Tensor:
        spatial = len(self.kernel)
        batched = y if y.ndim == spatial + 2 else y[None]
        return batched.flatten(2).transpose(1, 2)

    def pieces(self, x: Tensor, selector: RowSelector) -> Iterator[Piece]:
        windows = self._windows(x)
        width = self._width(windows)
        samples, lines = windows.shape[:2]  # a line: all positions at one of the first dimension
        index = self._chosen(x, selector)
        bytes_per_line = windows[:1, :1].numel() * x.element_size()
        lines_per_piece = max(1, _PIECE_BYTES // max(1, bytes_per_line))
        sample_step = max(1, lines_per_piece // max(1, lines))
        line_step = min(lines_per_piece, max(1, lines))
        # once even for no rows, so that an update has its shapes
        for sample in range(0, max(1, samples), sample_step):
            for line in range(0, max(1, lines), line_step):
                piece = windows[sample : sample + sample_step, line : line + line_step]
                rows = piece.reshape(-1, width)
                one_piece = len(piece) == samples and piece.shape[1] == lines
                # Which rows are in a piece depends on values, for which a GPU would be waited for.
                chosen = index if one_piece else _within(index, sample * lines + line, len(rows))
                yield rows, chosen

    def leading_shape(self, x: Tensor) -> torch.Size | None:
        """Return (batch, positions): a mask speaks about the patch at a token's own position."""
        if len(self.kernel) != 1:
            return None
        length = x.shape[-1] + sum(self.padding[0])
        positions = (length - self._span(0)) // self.stride[0] + 1
        return torch.Size([1 if x.ndim == 2 else len(x), positions])

    def _chosen(self, x: Tensor, selector: RowSelector) -> Tensor | None:
        shape = self.leading_shape(x)
        index = None if shape is None else selector.chosen(shape)
        return None if index is None else index.to(x.device)

    def _span(self, dim: int) -> int:
        """Return how far the kernel reaches in a spatial dimension."""
        return self.dilation[dim] * (self.kernel[dim] - 1) + 1

    def _windows(self, x: Tensor) -> Tensor:
        """Return (batch, positions…, channels, kernel…), a view of the padded input."""
        spatial = len(self.kernel)
        if x.ndim == spatial + 1:
            x = x[None]
        # torch pads the last dimension first
        sides = [side for both in reversed(self.padding) for side in both]
        if any(sides):
            x = nn.functional.pad(x, sides, mode=self.mode)
        for dim in range(spatial):
            x = x.unfold(2 + dim, self._span(dim), self.stride[dim])
            x = x[..., :: self.dilation[dim]]
        positions = range(2, 2 + spatial)
        kernel = range(2 + spatial, 2 + 2 * spatial)
        return x.permute(0, *positions, 1, *kernel)

    def _width(self, windows: Tensor) -> int:
        return math.prod(windows.shape[1 + len(self.kernel) :])


def _padding_sides(conv: nn.Module) -> tuple[tuple[int, int], ...]:
    """Return the padding (before, after) of a convolution, per spatial dimension."""
    padding: Any = conv.padding
    if not isinstance(padding, str):
        return tuple((size, size) for size in padding)
    kernel: Any = conv.kernel_size
    dilation: Any = conv.dilation
    if padding != "same":
        return ((0, 0),) * len(kernel)
    totals = [step * (size - 1) for size, step in zip(kernel, dilation, strict=True)]
    # of an odd number, the end gets the larger half
    return tuple((total // 2, total - total // 2) for total in totals)


def _within(index: Tensor | None, start: int, count: int) -> Tensor | None:
    """Return the part of `index` that falls on `count` rows from `start` on, counted from there."""
    if index is None:
        return None
    inside = (index >= start) & (index < start + count)
    return index[inside] - start
