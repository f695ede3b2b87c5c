"""Sketches that several processes add up: equal bases, sums, and what neither may change."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from evatune.sketch import SKETCHES, AdditiveSketch, is_additive
from tests.sketches import build, feed, planted, principal_angles

ADDITIVE = [kind for kind in SKETCHES if is_additive(kind)]


def additive(kind: str, width: int, components: int, *, center: bool = False) -> AdditiveSketch:
    sketch = build(kind, width, components, center=center)
    assert isinstance(sketch, AdditiveSketch)
    return sketch


def empty_like(sketch: AdditiveSketch) -> AdditiveSketch:
    """A sketch without rows that starts from the same basis and shift."""
    empty = sketch.clone()
    empty.set_basis(sketch.basis_state())
    return empty


def test_those_that_add_up_are_known() -> None:
    assert ADDITIVE == ["nystrom", "exact"]


def refreshed(kind: str) -> tuple[AdditiveSketch, Tensor]:
    """A sketch that has a basis, and rows that are still to come."""
    rows = planted(4096, 96, seed=2)
    sketch = additive(kind, 96, 12)
    sketch.update(rows[:512])
    sketch.refresh()
    return sketch, rows[512:]


def assert_same(sketch: AdditiveSketch, other: AdditiveSketch) -> None:
    one, two = sketch.spectrum(), other.spectrum()
    assert one.rows == two.rows
    assert principal_angles(one.directions[:6], two.directions[:6]).max() < 1e-4
    assert torch.allclose(one.energies, two.energies, rtol=1e-5)


@pytest.mark.parametrize("kind", ADDITIVE)
def test_with_equal_bases_the_order_of_rows_does_not_matter(kind: str) -> None:
    whole, rows = refreshed(kind)
    shuffled = whole.clone()
    whole.update(rows)
    for part in reversed(rows.split(256)):
        shuffled.update(part)
    assert_same(whole, shuffled)


@pytest.mark.parametrize("kind", ADDITIVE)
def test_with_equal_bases_merged_halves_are_the_whole(kind: str) -> None:
    whole, rows = refreshed(kind)
    left, right = whole.clone(), empty_like(whole)
    whole.update(rows)
    left.update(rows[:1488])
    right.update(rows[1488:])
    left.merge(right)
    assert_same(whole, left)


@pytest.mark.parametrize("kind", ADDITIVE)
def test_updates_may_be_made_by_a_sketch_with_an_equal_basis(kind: str) -> None:
    whole, rows = refreshed(kind)
    added = whole.clone()
    updates = [whole.summarize(part) for part in rows.split(700)]
    whole.update(rows)
    for update in updates:
        added.add(update)
    assert_same(whole, added)


@pytest.mark.parametrize("kind", ADDITIVE)
@pytest.mark.parametrize("center", [False, True])
def test_a_sketch_that_takes_over_a_basis_holds_no_rows(kind: str, center: bool) -> None:
    sketch = additive(kind, 32, 4, center=center)
    feed(sketch, planted(300, 32), 100)
    fresh = empty_like(sketch).spectrum()
    assert (fresh.rows, fresh.total_energy) == (0, 0)
    assert sketch.spectrum().rows == 300


@pytest.mark.parametrize("kind", ADDITIVE)
@pytest.mark.parametrize("center", [False, True])
def test_sums_about_one_basis_are_those_of_all_rows(kind: str, center: bool) -> None:
    rows = planted(900, 32, mean=0.5)
    whole = additive(kind, 32, 4, center=center)
    whole.update(rows[:300])
    whole.refresh()
    left, right = whole.clone(), empty_like(whole)
    left.update(rows[300:500])
    right.update(rows[500:])
    whole.update(rows[300:])
    left.set_sums(left.sums() + right.sums())
    assert left.spectrum().rows == 900
    assert torch.allclose(left.sums(), whole.sums(), rtol=1e-5, atol=1e-4)
    assert torch.allclose(left.spectrum().energies, whole.spectrum().energies, rtol=1e-5)


@pytest.mark.parametrize("kind", ADDITIVE)
@pytest.mark.parametrize("center", [False, True])
def test_a_changed_basis_keeps_every_row(kind: str, center: bool) -> None:
    rows = planted(600, 24, mean=0.5)
    sketch, other = additive(kind, 24, 4, center=center), additive(kind, 24, 4, center=center)
    sketch.update(rows[:300])
    other.update(rows[300:])
    before = sketch.spectrum()
    sketch.change_basis(other.basis_state())
    after = sketch.spectrum()
    assert after.rows == before.rows
    assert torch.allclose(after.energies, before.energies, rtol=1e-4)
    for name, value in other.basis_state().items():
        assert torch.equal(sketch.basis_state()[name], value), name
