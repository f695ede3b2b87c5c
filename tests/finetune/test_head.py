"""Which weights are a model's head."""

from __future__ import annotations

import pytest

from evatune.finetune.head import is_in_head


@pytest.mark.parametrize(
    ("parameter", "expected"),
    [
        ("classifier.weight", True),
        ("base.classifier.dense.bias", True),
        ("pooler.weight", True),
        ("classifiers.weight", False),
        ("base.layers.0.weight", False),
    ],
)
def test_weights_of_the_head_are_those_of_modules_with_its_names(
    parameter: str, expected: bool
) -> None:
    assert is_in_head(parameter, ["classifier", "pooler"]) is expected
