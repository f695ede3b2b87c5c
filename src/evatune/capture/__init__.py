"""From a running model to rows: which modules, which rows of their inputs, and who shares an input."""

from evatune.capture.kinds import Tokens
from evatune.capture.labels import selector_for
from evatune.capture.masks import Masks
from evatune.capture.rows import RowSelector
from evatune.capture.sharing import InputGroup, Sharing
from evatune.capture.tap import Tap
from evatune.capture.targets import Site, find_sites

__all__ = [
    "InputGroup",
    "Masks",
    "RowSelector",
    "Sharing",
    "Site",
    "Tap",
    "Tokens",
    "find_sites",
    "selector_for",
]
