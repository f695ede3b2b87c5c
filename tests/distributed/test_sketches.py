"""Two processes calibrate together, and find what one finds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import evatune
from evatune import CalibrationConfig, Status
from evatune.errors import LayerError
from tests.distributed.scenarios import Routed, routed, rows_outside
from tests.processes import (
    ALL,
    GRADIENTS,
    REGRESSION,
    SETTINGS,
    facts,
    mean_square,
    same,
    toy,
    wide,
)
from tests.sketches import captured_energy


@pytest.mark.parametrize(
    "name",
    [
        *SETTINGS,
        "gradients",
        "regression",
        "uneven",
        "more_processes_than_batches",
        "default_stop",
        "experts",
    ],
)
def test_both_processes_end_with_the_same_record_bit_for_bit(
    both: list[dict[str, Any]], name: str
) -> None:
    assert same(both[0][name], both[1][name])
    assert both[0][name]["processes"] == 2


@pytest.mark.parametrize("kind", SETTINGS)
def test_they_find_what_one_process_finds_on_the_same_batches(
    both: list[dict[str, Any]], kind: str
) -> None:
    seen: dict[str, list[Tensor]] = {}
    model = toy().eval()
    names = list(both[0][kind]["layers"])
    for name in names:

        def hook(module: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
            seen.setdefault(name, []).append(args[0].detach().flatten(0, 1))

        model.get_submodule(name).register_forward_pre_hook(hook)
    for batch in wide():
        model(batch)
    one = evatune.calibrate(toy(), wide(), SETTINGS[kind])
    for name in names:
        directions, energies, mean, rows, total, certificate = both[0][kind]["layers"][name]
        spectrum = one.spectra[name]
        x = torch.cat(seen[name])
        x = x - x.mean(0) if kind == "centered" else x
        # The stated tolerance: of the energy that one process captures, two lose less than a
        # thousandth.
        ours, theirs = captured_energy(directions, x), captured_energy(spectrum.directions, x)
        assert ours > theirs * (1 - (1e-6 if kind == "exact" else 1e-3)), name
        assert energies.sum() > spectrum.energies.sum() * (1 - 1e-2)
        assert rows == spectrum.rows == 16 * 128
        assert total == pytest.approx(spectrum.total_energy, rel=1e-6)
        assert torch.allclose(mean, spectrum.mean, atol=1e-5)
        assert certificate == pytest.approx(spectrum.certificate.captured(), abs=0.02)
    assert both[0][kind]["batches"] == one.batches == 16
    assert both[0][kind]["status"] == one.status
    assert both[0][kind]["inputs"] == {name: layer.input for name, layer in one.layers.items()}


@pytest.mark.parametrize("objective", ["gradients", "regression"])
def test_objectives_with_gradients_find_the_same_on_two_processes(
    both: list[dict[str, Any]], objective: str
) -> None:
    settings = GRADIENTS if objective == "gradients" else REGRESSION
    one = evatune.calibrate(toy(), wide(), settings, loss=mean_square)
    for name, (directions, energies, _, rows, total, _) in both[0][objective]["layers"].items():
        spectrum = one.spectra[name]
        assert rows == spectrum.rows
        assert total == pytest.approx(spectrum.total_energy, rel=0.05)
        assert energies[:4] == pytest.approx(spectrum.energies[:4], rel=0.05)
        assert captured_energy(spectrum.directions[:6], directions[:3]) > 0.95


def test_without_distributed_each_works_for_itself(both: list[dict[str, Any]]) -> None:
    alone = evatune.calibrate(
        toy(),
        wide()[1::2],
        CalibrationConfig(rank=4, max_batches=16, tolerance=0, distributed=False),
    )
    assert same(both[1]["alone"], facts(alone))
    assert both[0]["alone"]["bytes"] == 0


def test_a_process_whose_data_ends_first_waits_for_the_others(both: list[dict[str, Any]]) -> None:
    found = both[0]["uneven"]
    assert found["batches"] == 9
    assert {layer[3] for layer in found["layers"].values()} == {9 * 128}
    assert set(found["status"].values()) == {Status.DATA_EXHAUSTED}


def test_data_that_only_some_have_more_of_is_not_exhausted(both: list[dict[str, Any]]) -> None:
    found = both[0]["one_much_shorter"]
    assert found["batches"] == 8 + 1  # eight steps for two processes
    assert set(found["status"].values()) == {Status.MAX_BATCHES}


def test_layers_whose_first_rows_come_late_have_one_basis_too(both: list[dict[str, Any]]) -> None:
    assert same(both[0]["rows_come_late"], both[1]["rows_come_late"])
    one = evatune.calibrate(
        toy(), wide(), ALL, targets=["q", "down"], rows=rows_outside(wide()[:2])
    )
    for name, (_, energies, _, rows, total, certificate) in both[0]["rows_come_late"][
        "layers"
    ].items():
        spectrum = one.spectra[name]
        assert rows == spectrum.rows == 14 * 128
        assert total == pytest.approx(spectrum.total_energy, rel=1e-6)
        assert energies.sum() > spectrum.energies.sum() * (1 - 1e-2)
        assert certificate == pytest.approx(spectrum.certificate.captured(), abs=0.02)


def test_every_process_has_a_turn_whatever_max_batches(both: list[dict[str, Any]]) -> None:
    assert both[0]["more_processes_than_batches"]["batches"] == 2


def test_a_bound_within_a_step_is_kept_though_all_ask_for_a_batch(
    both: list[dict[str, Any]],
) -> None:
    found = [process["bound_within_a_step"] for process in both]
    assert same(*found)
    assert found[0]["batches"] == 5
    assert set(found[0]["status"].values()) == {"max_batches_reached"}


def test_all_stop_together_when_the_directions_have_settled(both: list[dict[str, Any]]) -> None:
    found = both[0]["default_stop"]
    one = evatune.calibrate(toy(), wide(64), CalibrationConfig(rank=4, tolerance=0.05))
    assert found["batches"] == one.batches < 64
    assert Status.CONVERGED in found["status"].values()
    for name, layer in one.layers.items():
        assert found["missed"][name] == pytest.approx(layer.estimated_missed, rel=0.05)


def test_layers_that_only_one_process_calls_are_everywhere_in_the_end(
    both: list[dict[str, Any]],
) -> None:
    found = both[0]["experts"]
    rows = {name: layer[3] for name, layer in found["layers"].items()}
    assert rows == {"even": 4 * 64, "odd": 4 * 64, "common": 8 * 64, "beside": 8 * 64}
    assert len(set(found["inputs"].values())) == 4  # equal on one process, but not on the other
    one = evatune.calibrate(Routed(), routed(), CalibrationConfig(rank=2, tolerance=0))
    for name, (_, energies, _, _, total, _) in found["layers"].items():
        assert total == pytest.approx(one.spectra[name].total_energy, rel=1e-6)
        assert torch.allclose(energies, one.spectra[name].energies, rtol=0.02)


def test_a_nan_is_named_with_its_layer_batch_and_process_on_every_process(
    both: list[dict[str, Any]],
) -> None:
    for found in both:
        assert found["bad_rows"]["found"]["status"]["blocks.0.q"] == Status.NON_FINITE
        assert found["bad_rows"]["found"]["bad"]["blocks.0.q"] == [6, 1]
        kind, message = found["bad_rows"]["error"]
        assert kind == LayerError.__name__
        assert "blocks.0.q (first in batch 6 on process 1)" in message
