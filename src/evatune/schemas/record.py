"""The record of a calibration, and that of its checkpoint, as they stand in the metadata."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from evatune.calibration.config import CalibrationConfig
from evatune.calibration.status import Status

Count = Annotated[int, Field(ge=0, le=2**53)]  # beyond that a float no longer counts
Number = Annotated[int, Field(ge=1, le=2**53)]  # counted from 1
# A layer that was never called has no tensor that its width could be held against.
Width = Annotated[int, Field(ge=1, le=2**24)]
Share = Annotated[float, Field(ge=0, le=1)]
Energy = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Name = Annotated[str, Field(max_length=1024)]


class Strict(BaseModel):
    """No conversions, no unknown keys, no numbers that are none."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class LayerRecord(Strict):
    """A `CalibratedLayer` with its `LayerSpec`, but for the name, and how it ended."""

    in_features: Width
    out_features: Width
    input: Count | None
    first_bad_batch: Number | None = None
    bad_process: Count | None = None
    cap: Count | None = None
    floor: Count = 0
    groups: Width = 1
    rank_group: Name = Field(default="", alias="unit")
    status: Status
    estimated_missed: Share | None = None  # unknown in files of older versions

    @model_validator(mode="after")
    def _ends_as_it_went(self) -> Self:
        if (self.status is Status.NON_FINITE) != (self.first_bad_batch is not None):
            raise ValueError(f"status {self.status} and first_bad_batch contradict each other")
        if self.bad_process is not None and self.first_bad_batch is None:
            raise ValueError("bad_process is named, and no bad batch")
        known = self.input is not None
        if known and self.status in (Status.NON_FINITE, Status.NEVER_CALLED):
            raise ValueError(f"status {self.status} and an input contradict each other")
        if not known and self.status not in _WITHOUT_INPUT:
            raise ValueError(f"status {self.status} and no input contradict each other")
        return self


# An expert may get an adapter without having been called, where others of its layer were.
_WITHOUT_INPUT = (Status.NON_FINITE, Status.NEVER_CALLED, Status.SELDOM_ROUTED)


class InputRecord(Strict):
    """The numbers of a spectrum and its certificate."""

    total_energy: Energy
    rows: Count
    fresh_total_energy: Energy | None = None
    fresh_rows: Number | None = None
    input_energy: Energy | None = None  # of x, where the spectrum is of gradients

    @model_validator(mode="after")
    def _certificate_is_whole(self) -> Self:
        if (self.fresh_rows is None) != (self.fresh_total_energy is None):
            raise ValueError("fresh_rows and fresh_total_energy come together or not at all")
        return self


class CalibrationRecord(Strict):
    """All of a calibration but its tensors."""

    config: CalibrationConfig
    batches: Count
    estimated_missed: Share | None = None
    model: Annotated[str, Field(max_length=8192)]
    processes: Number = 1
    bytes_sent: Count = 0
    versions: dict[Name, Name]
    inputs: dict[str, InputRecord]
    layers: dict[Name, LayerRecord]

    @model_validator(mode="after")
    def _inputs_and_layers_fit(self) -> Self:
        widths: dict[int, int] = {}
        for layer in self.layers.values():
            if layer.input is None:
                continue
            width = widths.setdefault(layer.input, layer.in_features)
            if width != layer.in_features:
                raise ValueError(f"layers of input {layer.input} have widths {width} and others")
        used = {str(number) for number in widths}
        unmatched = sorted(used ^ self.inputs.keys())
        if unmatched:
            number = unmatched[0][:40]
            raise ValueError(f"inputs and layers do not fit: number {number!r} is in one only")
        for name, layer in self.layers.items():
            if layer.bad_process is not None and layer.bad_process >= self.processes:
                raise ValueError(f"{name[:80]!r} names a process beyond the {self.processes}")
        return self


class EstimateRecord(Strict):
    """`evatune.calibration.convergence.Estimate`."""

    missed: dict[Name, Share]
    mean: Share | None
    mean_of_all: Share


class CheckpointRecord(Strict):
    """All of a calibration's checkpoint but its tensors."""

    model_config = ConfigDict(extra="allow")  # what else must be the same, which is compared

    layers: dict[Name, JsonValue]
    groups: list[Annotated[list[Name], Field(min_length=1)]]
    bad: dict[Name, Annotated[list[Count], Field(min_length=2, max_length=2)]]
    settled: list[Name]
    drifting: list[Name] = []  # unknown in files of older versions
    checked: Annotated[list[Number], Field(max_length=2)]  # batches at the last checks
    estimate: EstimateRecord | None
    batches: Number
    stop_early: bool
    about: dict[str, JsonValue]

    @model_validator(mode="after")
    def _names_are_of_layers(self) -> Self:
        grouped = [name for group in self.groups for name in group]
        named = [*grouped, *self.bad, *self.settled, *self.drifting]
        unknown = [name for name in named if name not in self.layers]
        if unknown:
            raise ValueError(f"{unknown[0][:80]!r} is no layer of the record")
        if len(set(grouped)) < len(grouped):
            raise ValueError("a layer is in two groups")
        return self
