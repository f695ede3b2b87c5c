"""`Calibration.merge`: separate shards, joined from their records."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import evatune
from evatune import Calibration, CalibrationConfig, Status
from evatune.calibration.merge import loss_bounds
from evatune.errors import ConfigError
from evatune.sketch.spectrum import Spectrum
from tests.calibration_shards import SHARDS, of_rows, planted, routed
from tests.helpers import Toy, inputs
from tests.sketches import captured_energy, principal_angles

torch.set_num_threads(1)


# orthonormal columns
TO_SIX = torch.linalg.qr(torch.randn(24, 6, generator=torch.Generator().manual_seed(9)))[0]


def moment(rows: Tensor, center: bool = False) -> Tensor:
    rows = rows.double()
    rows = rows - rows.mean(0) if center else rows
    return rows.T @ rows / len(rows)


def best(rows: Tensor, r: int, center: bool = False) -> float:
    """Energy per row inside the r best directions."""
    return float(torch.linalg.eigvalsh(moment(rows, center)).flip(0)[:r].sum())


def captured(spectrum: Spectrum, rows: Tensor, r: int, center: bool = False) -> float:
    directions = spectrum.directions[:r].double()
    return float((directions @ moment(rows, center) @ directions.T).trace())


def mean_tail(shards: list[Calibration]) -> float:
    spectra = [shard.spectra["layer"] for shard in shards]
    return sum(s.rows * (s.total_energy - float(s.energies.double().sum())) for s in spectra) / sum(
        s.rows for s in spectra
    )


# -- what it computes ------------------------------------------------------------------------------


@pytest.mark.parametrize("center", [False, True])
def test_with_all_energy_kept_the_merge_is_one_pass(center: bool) -> None:
    """Unequal shards with means of their own: weights and means must both be right."""
    low = [rows @ TO_SIX @ TO_SIX.T for rows in SHARDS]
    options = {"components": 8, "rank": 4, "center": center}
    merged = Calibration.merge([of_rows(rows, **options) for rows in low]).spectra["layer"]
    whole = of_rows(torch.cat(low), **options).spectra["layer"]
    k = 6
    assert merged.rows == whole.rows == 800
    assert merged.centered is center
    assert merged.total_energy == pytest.approx(whole.total_energy, rel=1e-6)
    assert torch.allclose(merged.mean, whole.mean, atol=1e-5)
    assert torch.allclose(merged.energies[:k], whole.energies[:k], rtol=1e-4)
    assert principal_angles(merged.directions[:k], whole.directions[:k]).max() < 1e-4
    assert torch.allclose(merged.directions[0], whole.directions[0], atol=1e-3)


@pytest.mark.parametrize("center", [False, True])
def test_totals_rows_and_means_are_those_of_one_pass_whatever_is_dropped(center: bool) -> None:
    merged = Calibration.merge([of_rows(rows, components=2, center=center) for rows in SHARDS])
    whole = of_rows(torch.cat(SHARDS), components=2, center=center)
    one, other = merged.spectra["layer"], whole.spectra["layer"]
    assert (one.rows, merged.batches) == (other.rows, whole.batches)
    assert one.total_energy == pytest.approx(other.total_energy, rel=1e-6)
    assert torch.allclose(one.mean, other.mean, atol=1e-6)


def test_the_order_of_shards_changes_rounding_only() -> None:
    answers = [
        Calibration.merge([of_rows(SHARDS[i], seed=i) for i in order])
        for order in itertools.permutations(range(3))
    ]
    first = answers[0].spectra["layer"]
    for answer in answers[1:]:
        spectrum = answer.spectra["layer"]
        assert torch.allclose(spectrum.energies, first.energies, rtol=1e-6)
        assert torch.allclose(spectrum.directions, first.directions, atol=1e-5)
        assert spectrum.certificate is not None
        assert first.certificate is not None
        assert spectrum.certificate.captured() == pytest.approx(
            first.certificate.captured(), rel=1e-5
        )
        assert (answer.config, answer.status, answer.layers) == (
            answers[0].config,
            answers[0].status,
            answers[0].layers,
        )


def test_directions_are_orthonormal_descending_and_as_many_as_asked_for() -> None:
    spectrum = Calibration.merge([of_rows(rows) for rows in SHARDS]).spectra["layer"]
    assert spectrum.directions.shape == (4, 24)
    assert spectrum.directions.dtype == spectrum.energies.dtype == torch.float32
    assert torch.allclose(spectrum.directions @ spectrum.directions.T, torch.eye(4), atol=1e-6)
    assert (spectrum.energies.diff() <= 0).all()


def test_layers_that_share_an_input_still_do_and_the_record_comes_back(tmp_path: Path) -> None:
    config = CalibrationConfig(rank=4, tolerance=0)
    shards = [evatune.calibrate(Toy(), inputs(4, seed=seed), config) for seed in range(2)]
    merged = Calibration.merge(shards)
    one = merged.layers
    assert (
        one["blocks.0.q"].input
        == one["blocks.0.k"].input
        == one["blocks.0.v"].input
        != one["blocks.1.q"].input
    )
    assert merged.spectra["blocks.0.q"] is merged.spectra["blocks.0.v"]
    assert len({layer.input for layer in one.values()}) == 6
    merged.save(tmp_path / "c.safetensors")
    loaded = Calibration.load(tmp_path / "c.safetensors")
    assert (loaded.layers, loaded.status, loaded.config) == (
        merged.layers,
        merged.status,
        merged.config,
    )
    assert loaded.allocate() == merged.allocate()
    assert sum(loaded.allocate().ranks.values()) == 40


def test_layers_that_share_an_input_in_one_shard_only_part() -> None:
    class Switch(nn.Module):
        def __init__(self, share: bool) -> None:
            super().__init__()
            self.share, self.a, self.b = share, nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> None:
            self.a(x)
            self.b(x if self.share else 2 * x)

    config = CalibrationConfig(rank=2, tolerance=0)
    shards = [
        evatune.calibrate(Switch(share), [torch.randn(40, 8)], config) for share in (True, False)
    ]
    merged = Calibration.merge(shards)
    assert merged.layers["a"].input != merged.layers["b"].input
    assert merged.spectra["b"].total_energy > merged.spectra["a"].total_energy


def test_shards_are_left_as_they_were() -> None:
    shards = [of_rows(rows) for rows in SHARDS]
    before = [shard.spectra["layer"].directions.clone() for shard in shards]
    Calibration.merge(shards)
    assert all(
        torch.equal(b, s.spectra["layer"].directions) for b, s in zip(before, shards, strict=True)
    )


# -- what it can lose ------------------------------------------------------------------------------


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("sketch", ["exact", "nystrom", "incremental"])
def test_the_bound_holds_and_says_something(sketch: str, center: bool) -> None:
    """best - T ≤ Σ energies ≤ captured ≤ best for every r, with T a small part of the energy."""
    shards = [of_rows(rows, components=8, rank=4, sketch=sketch, center=center) for rows in SHARDS]
    merged = Calibration.merge(shards)
    spectrum, rows, bound = merged.spectra["layer"], torch.cat(SHARDS), mean_tail(shards)
    slack = 1e-5 * spectrum.total_energy
    for r in range(1, 9):
        reported, truly = float(spectrum.energies[:r].sum()), captured(spectrum, rows, r, center)
        assert best(rows, r, center) - bound <= reported + slack
        assert reported <= truly + slack
        assert truly <= best(rows, r, center) + slack
    assert bound < 0.1 * best(rows, 8, center)
    if sketch != "exact":
        assert loss_bounds(merged, shards, {"layer": 8})["layer"].proven == pytest.approx(
            bound / spectrum.total_energy
        )


@pytest.mark.parametrize("center", [False, True])
def test_with_the_exact_sketch_the_bound_is_tighter(center: bool) -> None:
    """A long flat tail, of which the records keep little: T says next to nothing, D does."""
    flat = [planted(seed, 200, decay=0.9) for seed in range(3)]
    shards = [of_rows(rows, center=center) for rows in flat]
    merged, rows = Calibration.merge(shards), torch.cat(flat)
    spectrum = merged.spectra["layer"]
    for r in range(1, 5):
        bound = loss_bounds(merged, shards, {"layer": r})["layer"]
        assert bound.proven == bound.given_best
        lost = best(rows, r, center) - captured(spectrum, rows, r, center)
        assert -1e-5 < lost <= bound.proven * spectrum.total_energy + 1e-5
        assert (
            best(rows, r, center) - float(spectrum.energies[:r].sum())
            <= bound.proven * spectrum.total_energy + 1e-5
        )
    assert loss_bounds(merged, shards, {"layer": 2})[
        "layer"
    ].proven * spectrum.total_energy < 0.7 * mean_tail(shards)


def test_shards_that_agree_lose_nothing_and_the_bound_says_so() -> None:
    rows = planted(0, 300, decay=0.9)
    shards = [of_rows(rows), of_rows(-rows)]
    bound = loss_bounds(Calibration.merge(shards), shards, {"layer": 4})["layer"]
    assert mean_tail(shards) > 0.1 * shards[0].spectra["layer"].total_energy
    assert bound.proven < 1e-6


def test_the_bound_is_nearly_reached_where_every_shard_hides_the_same_direction() -> None:
    shards = []
    for i in range(8):
        rows = torch.zeros(100, 9)
        rows[:50, i], rows[50:, 8] = 1.0, 0.99
        shards.append(rows)
    parts = [of_rows(rows, components=1, rank=1, rho=1.0) for rows in shards]
    merged, rows = Calibration.merge(parts), torch.cat(shards)
    spectrum = merged.spectra["layer"]
    lost = best(rows, 1) - captured(spectrum, rows, 1)
    assert 0.8 * mean_tail(parts) < lost <= mean_tail(parts) + 1e-6
    bound = loss_bounds(merged, parts, {"layer": 1})["layer"].proven * spectrum.total_energy
    assert 0.9 * bound < lost <= bound + 1e-6


# -- energy of unseen rows -------------------------------------------------------------------------


def test_the_certificate_is_a_low_estimate_for_rows_nobody_has_seen() -> None:
    shards = [of_rows(planted(0, n)[torch.randperm(n)], components=8, rank=4) for n in (600, 500)]
    unseen = planted(0, 4000)[1000:]
    spectrum = Calibration.merge(shards).spectra["layer"]
    assert spectrum.certificate is not None
    truth = captured_energy(spectrum.directions, unseen)
    assert truth - 0.1 < spectrum.certificate.captured() <= truth + 0.01
    assert spectrum.certificate.rows == 500


def test_shards_that_have_nothing_in_common_do_not_vouch_for_each_other() -> None:
    """Each certifies itself perfectly; the joint directions hold half of what comes, and must not
    claim more."""
    left, right = torch.zeros(400, 16), torch.zeros(400, 16)
    left[:, :4], right[:, 8:12] = torch.randn(400, 4), torch.randn(400, 4)
    shards = [of_rows(rows) for rows in (left, right)]
    assert all(shard.spectra["layer"].certificate.captured() > 0.99 for shard in shards)  # type: ignore[union-attr]
    spectrum = Calibration.merge(shards).spectra["layer"]
    truth = captured_energy(spectrum.directions, torch.cat([left, right]))
    assert spectrum.certificate is not None
    assert spectrum.certificate.captured() <= truth < 0.7


# -- statuses --------------------------------------------------------------------------------------


@pytest.mark.parametrize("poor", ["zero", "few", "never", "none"])
def test_a_layer_that_one_shard_knows_is_known(poor: str, tmp_path: Path) -> None:
    """What the other shard has is counted as one pass would have counted it."""
    for shards in ([routed(a="fine"), routed(a=poor)], [routed(a=poor), routed(a="fine")]):
        merged = Calibration.merge(shards)
        assert merged.status["a"] is Status.DATA_EXHAUSTED
        assert merged.spectra["a"].rows == 80 + {"zero": 80, "few": 2, "never": 0, "none": 0}[poor]
        fine = next(s for s in shards if s.status["a"].usable).spectra["a"]
        assert principal_angles(merged.spectra["a"].directions, fine.directions).max() < 0.2
        certificate = merged.spectra["a"].certificate
        assert certificate is not None
        # nobody else has seen rows with energy: what the shard says of itself stands
        if poor != "few":
            assert certificate is fine.certificate
        merged.save(tmp_path / "c.safetensors")
        assert Calibration.load(tmp_path / "c.safetensors").status == merged.status


@pytest.mark.parametrize(
    ("fates", "expected"),
    [
        (("zero", "zero"), "no_signal"),
        (("never", "never"), "never_called"),
        (("few", "never"), "too_few_rows"),
        (("none", "none"), "too_few_rows"),
        (("zero", "few"), "data_exhausted"),
        (("fine", "nan"), "non_finite"),
        (("never", "nan"), "non_finite"),
    ],
)
def test_what_no_shard_knows_keeps_its_name(
    fates: tuple[str, str], expected: str, tmp_path: Path
) -> None:
    merged = Calibration.merge([routed(a=fate, seed=seed) for seed, fate in enumerate(fates)])
    assert merged.status["a"] == expected
    merged.save(tmp_path / "c.safetensors")
    assert Calibration.load(tmp_path / "c.safetensors").status == merged.status


def test_rows_too_few_in_every_shard_may_be_enough_together() -> None:
    merged = Calibration.merge([routed(a="few", seed=seed) for seed in range(3)])
    assert merged.spectra["a"].rows == 6
    assert merged.status["a"] is Status.DATA_EXHAUSTED
    merged.require_usable()


def test_the_first_bad_batch_is_counted_through_the_shards() -> None:
    merged = Calibration.merge([routed(a="fine", b="fine", batches=3), routed(a="nan", b="fine")])
    assert merged.layers["a"].first_bad_batch == 4
    assert merged.spectra["a"].rows == 0
    assert merged.status["b"] is Status.DATA_EXHAUSTED


def test_a_layer_is_as_settled_as_in_its_least_settled_shard() -> None:
    def ended(*ends: Status) -> Status:
        return Calibration.merge(
            [replace(of_rows(SHARDS[0]), status={"layer": end}) for end in ends]
        ).status["layer"]

    assert ended(Status.CONVERGED, Status.CONVERGED) is Status.CONVERGED
    assert ended(Status.CONVERGED, Status.MAX_BATCHES) is Status.MAX_BATCHES
    assert ended(Status.DATA_EXHAUSTED, Status.CONVERGED, Status.UNSETTLED) is Status.DATA_EXHAUSTED


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_are_refused(count: int) -> None:
    with pytest.raises(ConfigError, match=f"merge got {count} calibrations; it joins two or more"):
        Calibration.merge([of_rows(SHARDS[0])] * count)


@pytest.mark.parametrize(
    "options",
    [
        {"center": True},
        {"components": 3},
        {"rank": 3},
        {"rho": 1.5},
        {"budget": "parameters"},
        {"metric": "raw"},
        {"sketch": "nystrom"},
        {"labels_only": "auto"},
    ],
)
def test_settings_that_differ_are_named(options: dict[str, Any]) -> None:
    first = of_rows(SHARDS[0])
    ((name, value),) = options.items()
    text = (
        f"calibration 3 does not fit calibration 1: its {name} is {value!r} and that of calibration"
        " 1 is"
    )
    with pytest.raises(ConfigError, match=text):
        Calibration.merge([first, first, replace(first, config=replace(first.config, **options))])


def test_seeds_and_lengths_may_differ() -> None:
    shards = [of_rows(SHARDS[0], seed=3, max_batches=2), of_rows(SHARDS[1], seed=2, max_batches=5)]
    merged = Calibration.merge(shards)
    assert (merged.config.seed, merged.config.max_batches, merged.batches) == (2, 7, 7)


def test_other_layers_widths_and_models_are_named() -> None:
    first = routed(a="fine", b="fine")
    with pytest.raises(
        ConfigError, match="only calibration 1 has b; merge calibrations of the same layers"
    ):
        Calibration.merge([first, routed(a="fine")])
    with pytest.raises(ConfigError, match="only calibration 2 has b"):
        Calibration.merge([routed(a="fine"), first])
    with pytest.raises(ConfigError, match="layer is 12→12 there and 24→24 in calibration 1"):
        Calibration.merge([of_rows(SHARDS[0]), of_rows(torch.randn(100, 12))])
    one, other = (replace(first, model=f"Bert {path}") for path in ("/data/large", "hub/small"))
    with pytest.raises(
        ConfigError,
        match="its model is 'Bert hub/small' and that of calibration 1 is 'Bert /data/large'",
    ):
        Calibration.merge([one, other])
    Calibration.merge([one, replace(first, model="Bert /elsewhere/large")])
    capped = replace(
        first, layers={name: replace(layer, cap=1) for name, layer in first.layers.items()}
    )
    with pytest.raises(
        ConfigError, match=r"a may get any number of ranks there and 1 in .*same rank_pattern"
    ):
        Calibration.merge([capped, first])
    for change, words in (
        ({"floor": 1}, "a gets at least 1 ranks there and 0 in"),
        ({"groups": 2}, "a is 8→8 in 2 groups there and 8→8 in"),
        ({"rank_group": "experts"}, "a is 8→8 as a part of experts there and 8→8 in"),
    ):
        layers = {
            name: replace(layer, **change)
            if "floor" in change
            else replace(layer, spec=replace(layer.spec, **change))
            for name, layer in first.layers.items()
        }
        with pytest.raises(ConfigError, match=words):
            Calibration.merge([first, replace(first, layers=layers)])
    assert {layer.cap for layer in Calibration.merge([capped, capped]).layers.values()} == {1}
