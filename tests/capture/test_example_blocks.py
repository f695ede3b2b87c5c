"""The rows of a layer's calls, by the examples that they are of."""

from __future__ import annotations

import torch
from torch import Tensor

from evatune.capture.example_blocks import ExampleBlock, ExampleCall
from evatune.capture.input_views import DenseRows


def block(x: Tensor, examples: int, *, time_first: bool = False) -> ExampleBlock:
    """The block of a call of which all rows but the first count; gradients are inputs, doubled."""
    index = torch.arange(1, x[..., 0].numel())
    call = ExampleCall(x, index, time_first, gradient=2 * x)
    return ExampleBlock.of(DenseRows(), call, examples)


def numbered(*shape: int) -> Tensor:
    """Rows of one number each, counted from 0."""
    count = torch.Size(shape).numel()
    return torch.arange(float(count)).reshape(*shape, 1)


def test_windows_of_an_example_are_its_tokens() -> None:
    found = block(numbered(6, 2), examples=3)
    assert found.x[..., 0].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert torch.equal(found.g, 2 * found.x)
    assert found.kept is not None
    assert found.kept.tolist() == [[False, True, True, True], [True] * 4, [True] * 4]
    assert found.rows == 11


def test_time_may_come_before_the_examples() -> None:
    found = block(numbered(2, 3), examples=3, time_first=True)
    assert found.x[..., 0].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert found.kept is not None
    assert found.kept.tolist() == [[False, True], [True, True], [True, True]]


def test_rows_that_a_batch_shares_are_of_one_example() -> None:
    assert block(numbered(1, 6), examples=3).x.shape == (1, 6, 1)


def test_joined_calls_have_the_tokens_of_each_and_come_in_pieces_with_rows_counted_once() -> None:
    one = block(numbered(3, 2), examples=3)
    whole = ExampleBlock(one.x, one.g, 6, kept=None)
    joined = ExampleBlock.joined([one, whole])
    assert joined.x.shape == (3, 4, 1)
    assert joined.all_kept().sum() == joined.rows == 11
    pieces = list(joined.pieces(2, weight=0.5))
    assert [(len(piece.x), piece.rows, piece.weight) for piece in pieces] == [
        (2, 11, 0.5),
        (1, 0, 0.5),
    ]
