"""Ways to look at a value, the same for all results."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from evatune.errors import MissingExtraError
from evatune.utils.extras import extras

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
        try:
            import_module("pandas")
        except ImportError as error:
            raise MissingExtraError(
                "pandas is not installed, which to_pandas() needs; install it with: pip install"
                " pandas",
                name="pandas",
            ) from error
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
        with extras("plot()"):
            import_module("matplotlib")
        axes: Axes = import_module("evatune.report.view_plots").plot(self, ax)
        return axes

    def _repr_html_(self) -> str:
        """Return the summary as HTML; a notebook asks for it."""
        return str(_views().html(self))


def _views() -> Any:
    return import_module("evatune.report.views")
