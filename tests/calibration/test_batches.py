"""Steps of a run: which batch, and what is due after it."""

from __future__ import annotations

import pytest

from evatune.calibration.batches import BatchSource
from evatune.distributed.group import ProcessGroup
from evatune.errors import DataError, NoBatchError


def source(count: int, max_batches: int = 16) -> BatchSource:
    return BatchSource(list(range(1, count + 1)), ProcessGroup(), max_batches)


def test_refreshes_are_due_at_powers_of_two_and_halfway_between() -> None:
    steps = list(source(20))
    assert [step.batch for step in steps] == list(range(1, 17))
    assert [step.number for step in steps if step.refresh_due] == [1, 2, 3, 4, 6, 8, 12, 16]
    assert [step.number for step in steps if step.is_last] == [16]


def test_data_that_ends_before_the_bound_has_no_last_step() -> None:
    batches = source(5)
    assert [step.batches_done for step in batches] == [1, 2, 3, 4, 5]
    assert batches.total == 5
    assert not batches.reached_bound


def test_skipped_batches_are_counted_and_the_steps_go_on_after_them() -> None:
    batches = source(5)
    batches.skip(3)
    assert [(step.number, step.batch) for step in batches] == [(4, 4), (5, 5)]
    with pytest.raises(DataError, match="the data ended after 5 batches, but 6 were seen"):
        source(5).skip(6)


def test_no_batch_at_all_is_an_error_of_its_own() -> None:
    batches = source(0)
    assert list(batches) == []
    with pytest.raises(NoBatchError, match="batches is empty"):
        batches.require_batches()
