"""Measures of language understanding: of classes, and of numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from evatune.utils.extras import extras

with extras(__name__):
    from scipy.stats import pearsonr, spearmanr

OF_NUMBERS = ("pearson", "spearman")
"""Metrics for which a model predicts a number in place of a class."""


def class_measures(prediction: Any, metric: str) -> dict[str, float]:
    """Return the measures of the most likely classes, with one of them as the score.

    Of two classes these are accuracy, F1 of the second, and Matthews' correlation, which is that of
    the two rows of zeros and ones (0 where one of them is constant); of more, accuracy.

    Args:
        prediction: Trainer's, with logits (n, classes) and labels (n,). metric: their names.
    """
    predicted, labels = prediction.predictions.argmax(-1), prediction.label_ids
    measured = {"accuracy": float((predicted == labels).mean())}
    if prediction.predictions.shape[-1] == 2:
        hits = 2 * int((predicted & labels).sum())
        either = int(predicted.sum() + labels.sum())
        measured["f1"] = hits / either if either else 0.0
        measured["matthews"] = _correlation(pearsonr, predicted, labels)
    return _scored(measured, metric)


def number_measures(prediction: Any, metric: str) -> dict[str, float]:
    """Return Pearson's and Spearman's correlation of predictions (n, 1) and labels, as above."""
    predicted, labels = prediction.predictions[:, 0], prediction.label_ids
    measured = {
        "pearson": _correlation(pearsonr, predicted, labels),
        "spearman": _correlation(spearmanr, predicted, labels),
    }
    return _scored(measured, metric)


def _scored(measured: dict[str, float], metric: str) -> dict[str, float]:
    return {"score": measured.pop(metric), **measured}


def _correlation(of: Any, predicted: NDArray[Any], labels: NDArray[Any]) -> float:
    if np.ptp(predicted) == 0 or np.ptp(labels) == 0:  # of which scipy warns, and gives NaN
        return 0.0
    return float(of(predicted, labels).statistic)
