"""This process's batches, one per step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from evatune.distributed.group import ProcessGroup
from evatune.errors import DataError, NoBatchError
from evatune.modeling.batches import iterate

_NO_DATA = "batches is empty: not one batch came; give a DataLoader, list or generator with data"


_END = object()


class BatchSource:
    """This process's batches, one per turn: turn t of process p is batch (t - 1)·size + p + 1 of
    them all."""

    def __init__(self, batches: Iterable[Any], process_group: ProcessGroup, limit: int) -> None:
        self._data = iterate(batches)
        self._process_group = process_group
        self._limit = limit
        self.steps = -(-limit // process_group.size)
        self.count = 0  # batches so far
        self.open = True  # there may be more
        self.batch: Any = None  # the last one

    def number(self, step: int) -> int:
        """Counted from 1, over all processes."""
        return (step - 1) * self._process_group.size + self._process_group.rank + 1

    def advance(self, step: int) -> bool:
        """Take the batch of this turn; false if there is none for this process."""
        self.open = self.open and self.number(step) <= self._limit
        batch = next(self._data, _END) if self.open else _END
        self.open = batch is not _END
        if self.open:
            self.batch, self.count = batch, self.count + 1
        return self.open

    def skip(self, count: int) -> None:
        """Read batches that were seen before an interruption."""
        for step in range(1, count + 1):
            if not self.advance(step):
                raise DataError(
                    f"the data ended after {step - 1} batches, but {count} were seen before the"
                    " interruption; resume with the same data"
                )


def _anyone(process_group: ProcessGroup, has_batch: bool, step: int) -> bool:
    """Whether any process has a batch in this turn; in the first one all must."""
    everyone = process_group.gather(has_batch)
    lacking = [str(rank) for rank, has in enumerate(everyone) if not has]
    if step == 1 and len(lacking) == process_group.size:
        raise NoBatchError(_NO_DATA)
    if step == 1 and lacking:
        raise DataError(
            f"process {', '.join(lacking)} of {process_group.size} got not one batch; give every"
            " process data of its own, or start fewer processes"
        )
    return any(everyone)
