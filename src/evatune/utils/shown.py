"""Ways to look at a value, the same for all results."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from evatune.errors import MissingExtraError
from evatune.utils.extras import EXTRA_OF, missing

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes


class Shown:
    """Gives a result its summary, table and plot.

    `evatune.report` draws them and is loaded by name when one is asked for, so that rooms of
    numerics know nothing of it.
    """

    def summary(self) -> str:
        """Return a short text for people: the figures in a table, and what they mean."""
        return str(_views().summary(self))

    def to_pandas(self) -> pandas.DataFrame:
        """Return the figures as a DataFrame with one row per layer, of a spectrum per component.

        Raises MissingExtraError where pandas is not installed.
        """
        _require("pandas", "to_pandas()")
        frame: pandas.DataFrame = _views().frame(self)
        return frame

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw it and return matplotlib's axes: `.figure.savefig("plot.png")` writes a file.

        A calibration shows the cumulative share of energy of every input, the color being its
        depth, with a dot at the rank; a plan its ranks by block and layer type; a spectrum its
        cumulative share. Raises MissingExtraError where matplotlib is not installed.

        Args:
            ax: where to draw. Default: a new figure.
        """
        _require("matplotlib", "plot()")
        axes: Axes = import_module("evatune.report.view_plots").plot(self, ax)
        return axes

    def _repr_html_(self) -> str:
        """Return the summary as HTML; a notebook asks for it."""
        return str(_views().html(self))


def _views() -> Any:
    return import_module("evatune.report.views")


def _require(library: str, what: str) -> None:
    """Raise a MissingExtraError where a library is not installed."""
    try:
        import_module(library)
    except ImportError as error:
        if library in EXTRA_OF:
            raise missing(library, what) from error
        raise MissingExtraError(
            f"{library} is not installed, which {what} needs; install it with: pip install"
            f" {library}",
            name=library,
        ) from error
