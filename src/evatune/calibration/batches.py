"""The steps of a run: this process's batches, each with what is due after it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from evatune.calibration.convergence import is_due, is_refresh
from evatune.distributed.group import ProcessGroup
from evatune.errors import DataError, NoBatchError
from evatune.modeling.batches import iterate, length_of

_NO_DATA = "batches is empty: not one batch came; give a DataLoader, list or generator with data"
_END = object()


@dataclass(frozen=True)
class Step:
    """One step of a run, which all processes take together, each with a batch of its own.

    Attributes:
        number: counted from 1.
        batch: this process's batch, or its last one where its data has ended.
        batch_number: counted from 1, over all processes.
        has_batch: whether this process has a batch that counts.
        runs_model: whether the model runs. In shards it does without a batch as well, since the
            other processes wait for this one's part of the weights.
        batches_done: of all processes, after this step, if each had a batch.
        refresh_due: whether a refresh and a check of the stop rule follow the forward pass.
        is_last: whether there is no further step, as far as is known before the refresh.
    """

    number: int
    batch: Any
    batch_number: int
    has_batch: bool
    runs_model: bool
    batches_done: int
    refresh_due: bool
    is_last: bool


class BatchSource:
    """Yields steps until the batches of all processes have ended, or their bound is reached.

    Step t of process p has batch (t - 1)·size + p + 1 of them all. Where the bound ends within a
    step, all processes ask their data for a batch nevertheless, since making one may take all of
    them, and those past the bound leave theirs unread.

    Args:
        batches: this process's.
        process_group: the processes that share the work.
        max_batches: bound of all processes together; each gets at least one.
        in_lockstep: whether each forward pass needs all processes, as with a model in shards.

    Attributes:
        count: batches of this process so far.
        may_have_more: whether any process may, as of the last `synchronize`.
    """

    def __init__(
        self,
        batches: Iterable[Any],
        process_group: ProcessGroup,
        max_batches: int,
        in_lockstep: bool = False,
    ) -> None:
        self._data = iterate(batches)
        self._length = length_of(batches)
        self._process_group = process_group
        self._in_lockstep = in_lockstep
        self._max_batches = max_batches
        self._total = 0
        self._batch: Any = None  # the last one
        self.limit = max(max_batches, process_group.size)
        self.count = 0
        self.is_open = True  # this process may have more
        self.may_have_more = True

    @property
    def total(self) -> int:
        """Batches of all processes, as of the last `synchronize`."""
        return self.count if self._process_group.size == 1 else self._total

    @property
    def most(self) -> int:
        """The most batches that can come: `limit`, or fewer where the data says its length.

        Of several processes, each is taken to have as many as this one.
        """
        if self._length is None:
            return self.limit
        return min(self.limit, self._length * self._process_group.size)

    @property
    def reached_bound(self) -> bool:
        """True where there may be data left that `max_batches` did not let come."""
        # Of several processes some may have ended early, while the steps of the others ran out.
        others_have_more = self._process_group.size > 1 and self.may_have_more
        return self.total >= self._max_batches or others_have_more

    def __iter__(self) -> Iterator[Step]:
        last = -(-self.limit // self._process_group.size)
        for number in range(self.count + 1, last + 1):
            has_batch = anyone_has_batch = self._advance(number)
            if self._process_group.size == 1 and not has_batch:
                return
            if self._process_group.size > 1 and (number == 1 or self._in_lockstep):
                anyone_has_batch = self._anyone_has_batch(has_batch, number)
            all_ended = self._in_lockstep and not anyone_has_batch
            runs_model = has_batch or (self._in_lockstep and anyone_has_batch)
            step = self._step(number, has_batch, runs_model, number == last or all_ended)
            yield step
            if step.is_last or not self.may_have_more:
                return

    def synchronized(self, total: int, may_have_more: bool) -> None:
        """Note what all processes have told each other."""
        self._total, self.may_have_more = total, may_have_more

    def skip(self, count: int) -> None:
        """Read batches that were seen before an interruption."""
        for number in range(1, count + 1):
            if not self._advance(number):
                raise DataError(
                    f"the data ended after {number - 1} batches, but {count} were seen before the"
                    " interruption; resume with the same data"
                )

    def require_batches(self) -> None:
        """Raise a NoBatchError unless any process had a batch."""
        if self.total == 0:
            raise NoBatchError(_NO_DATA)

    def _step(self, number: int, has_batch: bool, runs_model: bool, is_last: bool) -> Step:
        size = self._process_group.size
        before, after = min((number - 1) * size, self.limit), min(number * size, self.limit)
        return Step(
            number=number,
            batch=self._batch,
            batch_number=self._batch_number(number),
            has_batch=has_batch,
            runs_model=runs_model,
            batches_done=after,
            refresh_due=is_due(before, after, is_refresh) or (is_last and size > 1),
            is_last=is_last,
        )

    def _batch_number(self, number: int) -> int:
        return (number - 1) * self._process_group.size + self._process_group.rank + 1

    def _advance(self, number: int) -> bool:
        """Take the batch of a step; false if there is none for this process."""
        batch = next(self._data, _END) if self.is_open else _END
        self.is_open = batch is not _END
        if not self.is_open or self._batch_number(number) > self.limit:
            return False
        self._batch = batch
        self.count += 1
        return True

    def _anyone_has_batch(self, has_batch: bool, number: int) -> bool:
        """Return whether any process has a batch in this step; in the first one all must."""
        size = self._process_group.size
        everyone = self._process_group.gather(has_batch)
        lacking = [str(rank) for rank, has in enumerate(everyone) if not has]
        if number == 1 and len(lacking) == size:
            raise NoBatchError(_NO_DATA)
        if number == 1 and lacking:
            raise DataError(
                f"process {', '.join(lacking)} of {size} got not one batch; give every"
                " process data of its own, or start fewer processes"
            )
        return any(everyone)
