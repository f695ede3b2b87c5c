"""The state of a running calibration, and the part of it that a checkpoint keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from evatune.calibration.batches import BatchSource
from evatune.calibration.config import CalibrationConfig
from evatune.calibration.convergence import CheckedSpectra, ConvergenceMonitor, Estimate
from evatune.calibration.nonfinite import NonFiniteWatch
from evatune.calibration.options import RunOptions
from evatune.calibration.refresh import SketchRefresher
from evatune.capture import InputGroup, SharedInputs, TargetLayer
from evatune.distributed.group import ProcessGroup
from evatune.modeling.fingerprint import fingerprint
from evatune.modeling.forward import model_device
from evatune.modeling.wrappers import describe
from evatune.sketch import (
    TOKEN_COUNTS,
    Sketch,
    SketchSettings,
    make_example_sketch,
    make_sketch,
)
from evatune.sketch.spectrum import Spectrum

if TYPE_CHECKING:
    from evatune.schemas.record import CheckpointRecord


class CalibrationState:
    """Sketches, spectra, the stop rule's memory and bad layers of a run, on this process."""

    def __init__(
        self,
        model: nn.Module,
        target_layers: Sequence[TargetLayer],
        config: CalibrationConfig,
        process_group: ProcessGroup,
        options: RunOptions,
    ) -> None:
        self.model = model
        self.target_layers = target_layers
        self.config = config
        self.process_group = process_group
        self.shared_inputs = SharedInputs(
            self._new_sketch, share=options.rows is None and not config.needs_loss
        )
        names = [target_layer.name for target_layer in target_layers]
        self.refresher = SketchRefresher(
            self.shared_inputs, config, process_group, names, self._sketch_by_name
        )
        self.convergence = ConvergenceMonitor(
            target_layers, self.shared_inputs, config, options.caps
        )
        self.nonfinite = NonFiniteWatch(self.shared_inputs, process_group)
        self._caps = dict(options.caps)
        self._refreshed_at = 0  # batches of all processes
        self._weights: dict[str, str] = {}  # by name, their hashes, once somebody asked

    def refresh(self, source: BatchSource) -> bool:
        """Refresh with what all processes have seen; return whether the run has converged.

        Where nobody has seen a batch since the last time there is nothing to do.
        """
        self._synchronize(source)
        if source.total == self._refreshed_at:
            return False
        self._refreshed_at = source.total
        self.refresher.refresh(source.total)
        return self.has_converged(source.total)

    def _synchronize(self, source: BatchSource) -> None:
        """Tell the other processes of the batches and bad rows here, and hear of theirs."""
        here = {
            "batches": source.count,
            "open": source.is_open,
            "bad": self.nonfinite.first_seen,
        }
        everyone = self.process_group.gather(here)
        self.nonfinite.merge(there["bad"] for there in everyone)
        total = sum(there["batches"] for there in everyone)
        source.synchronized(total, any(there["open"] for there in everyone))

    def has_converged(self, batches: int) -> bool:
        """Return what the stop rule says after a refresh, the same on every process.

        Never true while any layer drifts.
        """
        converged = self.convergence.check(self.refresher.latest, batches)
        converged = converged and not self.refresher.drifts
        return bool(self.process_group.gather(converged)[0])

    def identity(self) -> dict[str, Any]:
        """Return what must be the same for a checkpoint to fit, and on every process."""
        specs = [target_layer.spec for target_layer in self.target_layers]
        self._weights = self._weights or fingerprint(self.model)  # they stay as they are meanwhile
        return {
            "model": describe(self.model),
            "layers": {
                spec.name: [spec.in_features, spec.out_features, spec.groups, spec.rank_group]
                for spec in specs
            },
            "config": asdict(self.config),
            "caps": self._caps,
            "weights": self._weights,
        }

    def snapshot(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return all that was found so far, as named tensors and JSON."""
        tensors: dict[str, Tensor] = {}
        groups = self.shared_inputs.groups
        for number, group in enumerate(groups):
            states = {"sketch": group.sketch.state()}
            for key, spectra in self._spectra_by_key().items():
                if group in spectra:
                    states[key] = spectra[group].state()
            for key, state in states.items():
                for name, tensor in state.items():
                    tensors[f"{number}.{key}.{name}"] = tensor
        estimate = self.convergence.latest
        return tensors, {
            "groups": [group.members for group in groups],
            "bad": self.nonfinite.first_seen,
            "settled": sorted(self.convergence.settled),
            "drifting": sorted(self.refresher.drifting),
            "checked": [known.batches for known in self.convergence.known],
            "estimate": estimate and estimate._asdict(),
        }

    def restore(self, tensors: Mapping[str, Tensor], record: CheckpointRecord) -> None:
        """Go on from what `snapshot` returned."""
        states: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            number, key, tensor_name = name.split(".", 2)
            states.setdefault(f"{number}.{key}", {})[tensor_name] = tensor
        self.convergence.known = [CheckedSpectra(batches, {}) for batches in record.checked]
        if self.convergence.known:  # the last check was of the last refresh
            self.refresher.latest = self.convergence.known[-1].spectra
        groups = self.shared_inputs.arrange(record.groups, self._sketch_by_name)
        for index, group in enumerate(groups):
            group.sketch.set_state(states[f"{index}.sketch"])
            for key, spectra in self._spectra_by_key().items():
                state = states.get(f"{index}.{key}")
                if state is not None:
                    # copies: products of float32 round by where in memory a tensor begins
                    copies = {name: tensor.clone() for name, tensor in state.items()}
                    spectra[group] = Spectrum.of_state(copies)
        self.nonfinite.set_state(record.bad)
        if record.estimate is not None:
            self.convergence.latest = Estimate(**record.estimate.model_dump())
        self.convergence.settled = set(record.settled)
        self.refresher.drifting = set(record.drifting)

    def _spectra_by_key(self) -> dict[str, dict[InputGroup, Spectrum]]:
        """Return the spectra of the last refresh, and those of the check before it."""
        before = self.convergence.known[0].spectra if len(self.convergence.known) > 1 else {}
        return {"latest": self.refresher.latest, "before": before}

    def _new_sketch(self, target_layer: TargetLayer, device: torch.device) -> Sketch:
        config = self.config
        settings = SketchSettings(
            target_layer.in_features,
            config.n_components,
            oversampling=config.oversampling,
            center=config.center,
            seed=config.seed,
            device=device,
        )
        if config.needs_loss:
            return make_example_sketch(config.objective, settings, target_layer.out_features)
        kind = TOKEN_COUNTS if target_layer.input_view.is_tokens else config.sketch
        return make_sketch(kind, settings)

    def _sketch_by_name(self, name: str) -> Sketch:
        """Return an empty sketch for a layer that has not been called on this process."""
        target_layer = next(layer for layer in self.target_layers if layer.name == name)
        device = model_device(target_layer.module) or model_device(self.model)
        return self._new_sketch(target_layer, device or torch.device("cpu"))
