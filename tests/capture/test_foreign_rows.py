"""What comes from no token of a mask, by shapes and memory."""

from __future__ import annotations

import pytest
import torch

from evatune.capture.foreign_rows import ForeignRows, may_be_tokens, may_hold_tokens
from evatune.capture.row_selection import RowSelector

TOKENS = torch.ones(4, 12, dtype=torch.bool)
TOKENS[:, 9:] = False
TEXT = RowSelector(TOKENS)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((4, 12), True), ((4, 12, 8), True), ((12, 4, 8), True), ((4, 7, 8), False)],
)
def test_tokens_have_the_dimensions_of_their_mask(shape: tuple[int, ...], expected: bool) -> None:
    assert may_hold_tokens(torch.zeros(shape), TEXT) is expected
    assert not may_hold_tokens(torch.zeros(*shape, 3, 3), TEXT)


@pytest.mark.parametrize(
    ("leading_shape", "expected"),
    [((4, 7), True), ((48,), True), ((36,), False), ((4,), False), ((5, 7), False)],
    ids=["longer", "flat", "without padding already", "pooled", "another batch"],
)
def test_rows_that_a_mask_does_not_fit_may_be_tokens(
    leading_shape: tuple[int, ...], expected: bool
) -> None:
    assert may_be_tokens(torch.Size(leading_shape), TEXT) is expected


def test_images_beside_a_text_are_foreign_and_so_is_what_lies_in_their_memory() -> None:
    rows = ForeignRows()
    assert not rows
    text, image, mask = torch.zeros(4, 12, 8), torch.zeros(4, 3, 6, 6), torch.zeros(4, 3, 6, 6)
    rows.add_inputs({"x": text, "pixel_values": [image], "pixel_mask": mask}, TEXT)
    assert rows
    assert image.flatten(2) in rows
    for other in (text, mask, image.clone(), None):
        assert other not in rows
    output = {"hidden": torch.zeros(4, 9, 8)}
    rows.add_output((output, "a name"))
    assert output["hidden"] in rows


def test_without_a_mask_nothing_is_foreign() -> None:
    rows = ForeignRows()
    rows.add_inputs({"pixel_values": torch.zeros(4, 3, 6, 6)}, RowSelector())
    assert not rows
