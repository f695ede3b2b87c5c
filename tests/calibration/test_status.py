"""Every outcome of a layer has a name and advice."""

from __future__ import annotations

from evatune import Status
from tests.helpers import every_outcome


def test_every_outcome_has_a_name_and_advice() -> None:
    calibration = every_outcome()
    assert calibration.status == {
        "fine": "data_exhausted",
        "zero": "no_signal",
        "nan": "non_finite",
        "few": "too_few_rows",
        "unused": "never_called",
    }
    assert list(calibration.spectra) == list(calibration.status)
    assert all(status.advice for status in Status)
