"""From a running model to rows: target layers, the rows that count, and shared inputs."""

from evatune.capture.examples import ExampleRecorder
from evatune.capture.input_views import OneHotRows
from evatune.capture.labels import loss_denominator, selector_for
from evatune.capture.layer_types import TargetLayer
from evatune.capture.masks import Masks
from evatune.capture.recorder import InputRecorder
from evatune.capture.row_selection import RowSelector
from evatune.capture.shared_inputs import InputGroup, SharedInputs
from evatune.capture.targets import find_target_layers

__all__ = [
    "ExampleRecorder",
    "InputGroup",
    "InputRecorder",
    "Masks",
    "OneHotRows",
    "RowSelector",
    "SharedInputs",
    "TargetLayer",
    "find_target_layers",
    "loss_denominator",
    "selector_for",
]
