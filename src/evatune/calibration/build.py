"""The end of a run: a spectrum and a status for every layer, as one `Calibration`."""

from __future__ import annotations

from evatune.calibration.data import CalibratedLayer
from evatune.calibration.result import Calibration
from evatune.calibration.state import CalibrationState
from evatune.calibration.status import Status, shortage
from evatune.capture import TargetLayer
from evatune.modeling.wrappers import describe
from evatune.sketch.spectrum import Spectrum, empty


def build_calibration(state: CalibrationState, ended: Status, batches: int) -> Calibration:
    """Return the record of a run.

    Args:
        state: what the run has found.
        ended: how it ended, for the layers as a whole.
        batches: of all processes.
    """
    spectra, status, layers = {}, {}, {}
    group_of = state.shared_inputs.group_of
    groups = [group_of(target_layer.name) for target_layer in state.target_layers]
    # Numbered by the order of the layers, which all processes have in common.
    distinct = list(dict.fromkeys(group for group in groups if group))
    final = state.refresher.final_spectra(distinct, batches)
    numbers = {group: number for number, group in enumerate(distinct)}
    estimate = state.convergence.final_estimate(final, batches)
    for target_layer, group in zip(state.target_layers, groups, strict=True):
        name = target_layer.name
        if group:
            spectra[name] = final[group]
        else:
            spectra[name] = empty(target_layer.in_features, state.config.center)
        status[name] = _status(state, target_layer, spectra[name], ended)
        bad_batch, bad_process = state.nonfinite.first_seen.get(name, (None, None))
        layers[name] = CalibratedLayer(
            target_layer.spec,
            input=numbers[group] if group else None,
            first_bad_batch=bad_batch,
            bad_process=bad_process if state.process_group.size > 1 else None,
            estimated_missed=estimate.missed.get(name),
        )
    return Calibration(
        spectra=spectra,
        status=status,
        layers=layers,
        config=state.config,
        batches=batches,
        model=describe(state.model),
        estimated_missed=estimate.mean,
        processes=state.process_group.size,
        bytes_sent=state.process_group.bytes_sent,
    )


def _status(
    state: CalibrationState, target_layer: TargetLayer, spectrum: Spectrum, ended: Status
) -> Status:
    """Return how the calibration of one layer ended: what is wrong with it comes first."""
    name = target_layer.name
    if name in state.nonfinite.first_seen:
        return Status.NON_FINITE
    lack = _lack(state, target_layer, spectrum)
    if lack is not None:
        return Status.SELDOM_ROUTED if _is_routed(state, target_layer) else lack
    if name in state.refresher.drifting:
        return Status.DRIFTING
    if name in state.convergence.settled:
        return Status.CONVERGED
    return Status.UNSETTLED if ended is Status.CONVERGED else ended


def _lack(state: CalibrationState, target_layer: TargetLayer, spectrum: Spectrum) -> Status | None:
    """Return what the layer's rows lack, or None."""
    if state.shared_inputs.group_of(target_layer.name) is None:
        return Status.NEVER_CALLED
    needed = min(state.config.n_components, target_layer.spec.max_rank)
    return shortage(spectrum.rows, spectrum.total_energy, needed)


def _is_routed(state: CalibrationState, target_layer: TargetLayer) -> bool:
    """Return whether the layer is an expert of which another one was called."""
    if target_layer.expert is None:
        return False
    rank_key = target_layer.spec.rank_key
    experts = [other for other in state.target_layers if other.spec.rank_key == rank_key]
    return any(state.shared_inputs.group_of(expert.name) for expert in experts)
