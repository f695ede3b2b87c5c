"""The file of a calibration: one safetensors file, with its record in the metadata."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from evatune.calibration.config import CalibrationConfig
from evatune.calibration.data import CalibratedLayer, CalibrationData
from evatune.calibration.status import Status
from evatune.layers import LayerSpec
from evatune.schemas import FormatError, raise_with_path, short_repr
from evatune.sketch.spectrum import Certificate, InputMoments, Spectrum, empty
from evatune.utils.atomic import MAKE_ROOM, atomic_file, writing

if TYPE_CHECKING:
    from evatune.schemas.record import CalibrationRecord, InputRecord, LayerRecord

Data = TypeVar("Data", bound=CalibrationData)

# Written is the first; the second has no checksum.
_FORMATS = ("evatune-calibration-2", "evatune-calibration-1")

_ADVICE = "give the calibration.safetensors that evatune wrote, or run the calibration again"


def save_calibration(calibration: CalibrationData, path: str | os.PathLike[str]) -> None:
    """Write the file; see `Calibration.save`."""
    from evatune.schemas.tensors import save_sealed

    tensors: dict[str, Tensor] = {}
    inputs: dict[str, dict[str, Any]] = {}
    for name, layer in calibration.layers.items():
        key = str(layer.input)
        if layer.input is not None and key not in inputs:
            inputs[key] = _spectrum_facts(calibration.spectra[name])
            tensors |= _spectrum_tensors(key, calibration.spectra[name])
    layers = {
        name: _layer_facts(layer, calibration.status[name])
        for name, layer in calibration.layers.items()
    }
    record = {
        "config": asdict(calibration.config),
        "batches": calibration.batches,
        "estimated_missed": calibration.estimated_missed,
        "model": calibration.model,
        "processes": calibration.processes,
        "bytes_sent": calibration.bytes_sent,
        "versions": calibration.versions,
        "inputs": inputs,
        "layers": layers,
    }
    with writing(Path(path), MAKE_ROOM):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(Path(path)) as temporary:
        save_sealed(temporary, tensors, _FORMATS[0], json.dumps(record))


def load_calibration(path: str | os.PathLike[str], kind: type[Data]) -> Data:
    """Read a file as an object of class `kind`; see `Calibration.load`."""
    from evatune.schemas.record import CalibrationRecord
    from evatune.schemas.tensors import read_sealed
    from evatune.schemas.text import validate_json

    with raise_with_path(path, _ADVICE):
        tensors, text = read_sealed(Path(path), _FORMATS, "an evatune calibration")
        try:
            return _from_record(validate_json(CalibrationRecord, text), tensors, kind)
        except FormatError as fault:
            raise FormatError(
                f"says it is an evatune calibration, but its record is damaged: it {fault}"
            ) from fault


def _from_record(record: CalibrationRecord, tensors: dict[str, Tensor], kind: type[Data]) -> Data:
    config = record.config
    by_input = {
        number: _spectrum(number, facts, config, tensors) for number, facts in record.inputs.items()
    }
    if tensors:
        raise FormatError(f"does not say what the tensor {short_repr(min(tensors))} is")
    spectra, status, layers = {}, {}, {}
    for name, facts in record.layers.items():
        status[name] = facts.status
        layers[name] = _layer_of(name, facts)
        if facts.input is None:
            spectra[name] = empty(facts.in_features, config.center)
        else:
            spectra[name] = by_input[str(facts.input)]
        _require_fit(name, layers[name], status[name], spectra[name])
    return kind(
        spectra,
        status,
        layers,
        config,
        record.batches,
        record.model,
        processes=record.processes,
        bytes_sent=record.bytes_sent,
        estimated_missed=record.estimated_missed,
        versions=record.versions,
    )


def _spectrum_facts(spectrum: Spectrum) -> dict[str, Any]:
    """Return the numbers of a spectrum and its certificate, for JSON."""
    facts: dict[str, Any] = {"total_energy": spectrum.total_energy, "rows": spectrum.rows}
    if spectrum.certificate is not None:
        facts["fresh_total_energy"] = spectrum.certificate.total_energy
        facts["fresh_rows"] = spectrum.certificate.rows
    if spectrum.inputs is not None:
        facts["input_energy"] = spectrum.inputs.total
    return facts


def _spectrum_tensors(key: str, spectrum: Spectrum) -> dict[str, Tensor]:
    """Return the tensors of a spectrum and its certificate, by their names in the file."""
    # copies, as two spectra may have one and the same, which safetensors does not write
    return {
        f"{key}.{name}": tensor.clone(memory_format=torch.contiguous_format)
        for name, tensor in spectrum.tensors().items()
    }


def _spectrum(
    number: str,
    facts: InputRecord,
    config: CalibrationConfig,
    tensors: dict[str, Tensor],
) -> Spectrum:
    """Return what the tensors of an input say, and take them out of `tensors`.

    Raises FormatError for what contradicts itself.
    """

    def take(key: str) -> Tensor:
        if f"{number}.{key}" not in tensors:
            raise FormatError(f"lacks the tensor {number}.{key}")
        return tensors.pop(f"{number}.{key}")

    certificate, inputs = None, None
    if facts.fresh_rows is not None and facts.fresh_total_energy is not None:
        energies = take("fresh_energies")
        certificate = Certificate(energies, facts.fresh_total_energy, facts.fresh_rows)
    if (facts.input_energy is not None) != config.needs_loss:
        raise FormatError(f"does not fit objective {config.objective!r} in input {number}")
    if facts.input_energy is not None:
        inputs = InputMoments(take("input_moments"), facts.input_energy)
    spectrum = Spectrum(
        take("directions"),
        take("energies"),
        facts.total_energy,
        facts.rows,
        take("mean"),
        centered=config.center,
        certificate=certificate,
        inputs=inputs,
        mixing=take("mixing") if config.objective == "regression" else None,
    )
    for contradiction in spectrum.contradictions(config.n_components):
        raise FormatError(f"contradicts itself in input {number}: {contradiction}")
    return spectrum


def _layer_facts(layer: CalibratedLayer, status: Status) -> dict[str, Any]:
    """Return a layer as the file has it; `_layer_of` reads it."""
    facts: dict[str, Any] = {
        "in_features": layer.spec.in_features,
        "out_features": layer.spec.out_features,
        "input": layer.input,
        "first_bad_batch": layer.first_bad_batch,
        "bad_process": layer.bad_process,
        "cap": layer.cap,
        "floor": layer.floor,
        "groups": layer.spec.groups,
        "unit": layer.spec.rank_group,
        "status": status,
    }
    if layer.estimated_missed is not None:  # older files have none
        facts["estimated_missed"] = layer.estimated_missed
    return facts


def _layer_of(name: str, facts: LayerRecord) -> CalibratedLayer:
    return CalibratedLayer(
        LayerSpec(name, facts.in_features, facts.out_features, facts.groups, facts.rank_group),
        input=facts.input,
        first_bad_batch=facts.first_bad_batch,
        bad_process=facts.bad_process,
        cap=facts.cap,
        estimated_missed=facts.estimated_missed,
        floor=facts.floor,
    )


def _require_fit(name: str, layer: CalibratedLayer, status: Status, spectrum: Spectrum) -> None:
    """Raise FormatError unless the spectrum is one of this layer that may have ended so."""
    if layer.input is not None and spectrum.directions.shape[1] != layer.in_features:
        raise FormatError(
            f"gives {short_repr(name)} {layer.in_features} inputs, and others in its directions"
        )
    # An expert may get an adapter that no row says anything of.
    seldom = status is Status.SELDOM_ROUTED
    if status.usable and not seldom and not (spectrum.rows and spectrum.total_energy):
        raise FormatError(f"calls {short_repr(name)} {status}, and its rows have no energy")
