"""Classes of examples, as numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from evatune.errors import DataError
from evatune.loading.columns import LABEL_COLUMNS, require_labels
from evatune.loading.records import Origin
from evatune.utils.extras import extras

with extras(__name__):
    import datasets


@dataclass(frozen=True)
class LabelColumn:
    """The column that holds the classes of a data set.

    Attributes:
        option: that names another one.
    """

    name: str
    source: str
    option: str = "--label-column"

    def numbers(self, table: Any, values: Sequence[Any]) -> tuple[list[int], list[str]]:
        """Return the classes as numbers from 0 on, and the names of all classes.

        They are those that the column declares, else those that occur.

        Args:
            table: a `datasets.Dataset` with the column. values: its entries, or those of other
                splits too.

        Raises DataError for entries that are missing or no classes, or of one class only.
        """
        self.require_each(values)
        feature = table.features[self.name]
        declared = isinstance(feature, datasets.ClassLabel)
        if all(isinstance(value, str) for value in values):
            names = sorted(set(values))
            number_of = {name: number for number, name in enumerate(names)}
            numbers = [number_of[value] for value in values]
        else:
            count = feature.num_classes if declared else len(set(map(repr, values)))
            names = list(feature.names) if declared else [str(number) for number in range(count)]
            numbers = [self._number(value, count) for value in values]
        if len(names) < 2:
            raise DataError(
                f"column {self.name!r} of {self.source!r} holds one class only; give at least two"
            )
        return numbers, names

    def require_each(self, values: Sequence[Any]) -> None:
        """Raise a DataError that names the first row without a label.

        Args:
            values: the entries of the column from its first row on.
        """
        missing = [row for row, value in enumerate(values, 1) if value is None or value != value]
        if missing:
            raise DataError(
                f"column {self.name!r} of {self.source!r} holds no label in row {missing[0]:,}"
                f" ({len(missing):,} of {len(values):,} rows have none); fill it in, take such rows"
                f" out, or name another column with {self.option}"
            )

    def _number(self, value: Any, count: int) -> int:
        if isinstance(value, int) and 0 <= value < count:
            return int(value)
        raise DataError(
            f"column {self.name!r} of {self.source!r} holds the label {value!r}; its {count}"
            f" classes must be names, or numbers from 0 to {count - 1}; name another column with"
            f" {self.option}"
        )


def find_label_column(table: Any, name: str | None, source: str) -> LabelColumn | None:
    """Return the column with the classes: the one named, else `label` or `labels`; None without.

    Raises DataError for a name that the table does not have.
    """
    if name is not None:
        require_labels(table, name, Origin(source))
        return LabelColumn(name, source)
    name = next((column for column in LABEL_COLUMNS if column in table.column_names), None)
    return None if name is None else LabelColumn(name, source)
