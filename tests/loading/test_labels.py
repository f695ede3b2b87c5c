"""Classes of examples."""

from __future__ import annotations

from typing import Any

import datasets
import pytest

from evatune.errors import DataError
from evatune.loading.labels import LabelColumn


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (["pos", "neg", "pos", None], r"row 4 \(1 of 4 rows have none\); fill it in"),
        ([0, None, 1, None], r"'label' of 'mine' holds no label in row 2 \(2 of 4 rows"),
        ([0.0, float("nan"), 1.0], "no label in row 2 .* name another column with --label-column"),
    ],
)
def test_a_row_without_a_label_is_named(values: list[Any], text: str) -> None:
    table = datasets.Dataset.from_dict({"label": values})
    with pytest.raises(DataError, match=text):
        LabelColumn("label", "mine").numbers(table, list(table["label"]))
