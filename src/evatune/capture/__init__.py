"""From a running model to rows: which modules, which rows of their inputs, and who shares an input."""

from evatune.capture.kinds import Tokens
from evatune.capture.rows import DecoderRows, RowSelector, decoder_of, selector_for
from evatune.capture.sharing import InputGroup, Sharing
from evatune.capture.tap import Tap
from evatune.capture.targets import Site, find_sites

__all__ = [
    "DecoderRows",
    "InputGroup",
    "RowSelector",
    "Sharing",
    "Site",
    "Tap",
    "Tokens",
    "decoder_of",
    "find_sites",
    "selector_for",
]
