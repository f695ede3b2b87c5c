"""Length of the rows of A."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import evatune
from evatune.scaling import pad_with_random_rows, scaled_rows, step_ratio
from evatune.sketch.spectrum import InputMoments
from tests.helpers import (
    Toy,
    inputs,
    lora,
    lora_layers,
    tiny_bert,
    tokens,
)
from tests.sketches import build, feed, planted, truth


def rows_of(model: nn.Module, batches: list[dict[str, Tensor]], name: str) -> Tensor:
    seen: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(
        lambda m, a: seen.append(a[0].flatten(0, 1))
    )
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    hook.remove()
    return torch.cat(seen).double()


@pytest.mark.parametrize("center", [False, True])
class TestScales:
    name = "encoder.layer.1.output.dense"

    def setting(self, center: bool) -> tuple[evatune.Spectrum, Tensor]:
        config = evatune.CalibrationConfig(rank=4, center=center, sketch="exact", tolerance=0)
        return evatune.calibrate(tiny_bert(), tokens(8), config).spectra[self.name], rows_of(
            tiny_bert(), tokens(8), self.name
        )

    def test_paper_rows_are_orthonormal(self, center: bool) -> None:
        a = scaled_rows(self.setting(center)[0], 5, "paper")
        assert torch.allclose(a @ a.T, torch.eye(5), atol=1e-5)

    def test_whitened_components_have_unit_variance_over_tokens(self, center: bool) -> None:
        spectrum, rows = self.setting(center)
        components = rows @ scaled_rows(spectrum, 5, "whiten").double().T
        assert torch.allclose(
            components.var(0, correction=0), torch.ones(5, dtype=torch.float64), rtol=1e-3
        )

    def test_matched_rows_see_the_energy_that_pefts_default_rows_see(self, center: bool) -> None:
        spectrum, rows = self.setting(center)
        ours = (rows @ scaled_rows(spectrum, 5, "matched").double().T).square().sum(1).mean()
        torch.manual_seed(0)
        theirs = []
        for _ in range(300):
            # what PEFT draws: kaiming uniform, a = √5
            a = nn.Linear(rows.shape[1], 5, bias=False).weight
            theirs.append((rows @ a.detach().double().T).square().sum(1).mean())
        assert float(ours) == pytest.approx(float(torch.stack(theirs).mean()), rel=0.1)
        expected = 5 / (3 * rows.shape[1]) * float(rows.square().sum(1).mean())
        assert float(ours) == pytest.approx(expected, rel=1e-3)

    def test_nothing_shared_is_scaled_twice(self, center: bool) -> None:
        model = lora(tiny_bert())
        config = evatune.CalibrationConfig(rank=4, center=center)
        calibration = evatune.initialize(model, tokens(8), scale="whiten", rho=1, config=config)
        layers = lora_layers(model)
        q, k, v = (
            layers[f"encoder.layer.0.attention.self.{part}"].lora_A["default"].weight
            for part in ("query", "key", "value")
        )
        assert torch.equal(q, k)
        assert torch.equal(k, v)
        spectrum = calibration.spectra["encoder.layer.0.attention.self.query"]
        assert torch.allclose(
            spectrum.directions @ spectrum.directions.T,
            torch.eye(len(spectrum.directions)),
            atol=1e-5,
        )


def test_whitening_a_constant_direction_stays_finite() -> None:
    x = torch.randn(400, 8) * torch.tensor([0.0, 1, 1, 1, 1, 1, 1, 1]) + torch.eye(8)[0] * 3
    spectrum = evatune.calibrate(
        nn.Sequential(nn.Linear(8, 8)), [x], evatune.CalibrationConfig(components=4)
    ).spectra["0"]
    a = scaled_rows(spectrum, 4, "whiten")
    assert a.isfinite().all()
    assert float(a[0].norm()) <= 1.01 / (1e-3 * 3)


def seen_by(rows: Tensor, a: Tensor) -> Tensor:
    """Return A C Aᵀ of rows (n, d), float64."""
    seen = rows.double() @ a.double().T
    return seen.T @ seen / len(rows)


class TestWhitenMatched:
    rows = planted(400, 24, decay=0.7, mean=0.5)

    def test_every_component_has_the_energy_that_pefts_default_row_has(self) -> None:
        spectrum = feed(build("exact", 24, 12), self.rows, 100)
        found = seen_by(self.rows, scaled_rows(spectrum, 12, "whiten-matched"))
        *_, total = truth(self.rows, 12)
        assert float(found.trace()) == pytest.approx(12 * total / (3 * 24), rel=1e-4)
        aim = total / (3 * 24) * torch.eye(12, dtype=torch.float64)
        assert torch.allclose(found, aim, rtol=0, atol=1e-3 * total / (3 * 24))

    def test_centered_directions_have_it_each_without_being_uncorrelated(self) -> None:
        spectrum = feed(build("exact", 24, 6, center=True), self.rows, 100)
        found = seen_by(self.rows, scaled_rows(spectrum, 6, "whiten-matched"))
        aim = torch.full((6,), truth(self.rows, 6)[2] / (3 * 24), dtype=torch.float64)
        assert torch.allclose(found.diagonal(), aim, rtol=1e-3)

    def test_rows_along_hardly_any_energy_are_bounded(self) -> None:
        scales = torch.tensor([1.0, 1.0, 2e-4, 0, 0, 0])  # of one, energy 2e-8 of the whole
        generator = torch.Generator().manual_seed(0)
        rows = torch.randn(500, 6, generator=generator) * scales
        spectrum = feed(build("exact", 6, 4), rows, 500)
        a = scaled_rows(spectrum, 4, "whiten-matched")
        assert len(a) == 3  # no direction without energy
        assert float(a[2].norm()) == pytest.approx((1e6 / (3 * 6)) ** 0.5, rel=1e-4)


@pytest.mark.parametrize(
    ("scale", "length"),
    [("paper", 1.0), ("whiten", None), ("matched", 3**-0.5), ("whiten-matched", 3**-0.5)],
)
def test_random_rows_are_as_long_as_pefts_at_the_scales_that_match_it(
    scale: str, length: float | None
) -> None:
    spectrum = feed(build("exact", 24, 4), planted(400, 24)[:2], 2)
    rows = scaled_rows(spectrum, 4, scale)
    assert len(rows) == 2
    norms = pad_with_random_rows(rows, 4, scale, seed=0).norm(dim=1)
    aim = float(norms[:2].mean()) if length is None else length
    assert torch.allclose(norms[2:], torch.full((2,), aim))


class TestStepRatio:
    rows = planted(400, 24, decay=0.7, mean=0.5)
    spectrum = feed(build("exact", 24, 12), rows, 100)

    def test_of_unit_rows_it_is_the_square_root_of_three_d_c_over_r(self) -> None:
        _, energies, total = truth(self.rows, 5)
        share = float(energies.sum()) / total
        aim = (3 * 24 * share / 4) ** 0.5
        assert step_ratio(self.spectrum, 5, "paper", 4) == pytest.approx(aim, rel=1e-4)

    @pytest.mark.parametrize("scale", ["matched", "whiten-matched"])
    def test_of_matched_rows_it_is_one_at_loras_rank(self, scale: str) -> None:
        assert step_ratio(self.spectrum, 4, scale, 4) == pytest.approx(1, rel=1e-4)
        assert step_ratio(self.spectrum, 9, scale, 4) == pytest.approx(1.5, rel=1e-4)

    @pytest.mark.parametrize("scale", ["paper", "whiten", "matched", "whiten-matched"])
    @pytest.mark.parametrize("center", [False, True])
    def test_it_compares_what_the_rows_see_with_what_pefts_rows_see(
        self, scale: str, center: bool
    ) -> None:
        spectrum = feed(build("exact", 24, 12, center=center), self.rows, 100)
        ours = seen_by(self.rows, scaled_rows(spectrum, 6, scale)).trace()
        theirs = 4 / (3 * 24) * self.rows.double().square().sum(1).mean()
        found = step_ratio(spectrum, 6, scale, 4)
        assert found == pytest.approx(float(ours / theirs) ** 0.5, rel=1e-3)


@pytest.mark.parametrize("scale", ["paper", "matched", "whiten-matched"])
def test_bs_first_step_under_adam_changes_outputs_by_the_step_ratio(scale: str) -> None:
    model, batch = lora(Toy(), target_modules=["q"]), torch.cat(inputs(6))
    config = evatune.CalibrationConfig(sketch="exact")
    calibration = evatune.initialize(model, [batch], scale=scale, config=config)
    layers, seen = lora_layers(model.eval()), {}
    for name, layer in layers.items():
        layer.register_forward_pre_hook(lambda _, x, name=name: seen.update({name: x[0].detach()}))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-3, eps=1e-30)
    model(batch).square().mean().backward()
    optimizer.step()
    for name, ratio in calibration.step_ratios(scale).items():
        change = seen[name] @ layers[name].get_delta_weight("default").detach().T
        energy_of_loras = 4 * calibration.spectra[name].total_second_moment / (3 * 16)
        aim = (2 * 1e-3) ** 2 * 16 * ratio**2 * energy_of_loras  # α/r and the rate, 16 outputs
        assert float(change.square().sum(-1).mean()) == pytest.approx(aim, rel=1e-3)


def test_random_rows_count_in_the_step_ratio_by_the_energy_that_they_see_on_average() -> None:
    even = InputMoments(torch.full((4,), 5.0), 24 * 5.0)
    two = replace(feed(build("exact", 24, 4), planted(400, 24)[:2], 2), inputs=even)
    assert step_ratio(two, 4, "paper", 4) == pytest.approx(3**0.5)
    assert step_ratio(two, 4, "whiten-matched", 4) == pytest.approx(1)


def test_under_adam_longer_rows_are_a_larger_alpha_and_a_rate_of_their_own() -> None:
    """(α, A₀, η_A, η_B), (α/c, c·A₀, c·η_A, η_B) and (α, c·A₀, c·η_A, η_B/c) train the same."""

    def trained(alpha: float, length: float, rate_of_b: float) -> dict[str, Tensor]:
        model = lora(Toy().double().eval(), lora_alpha=alpha, target_modules=["q", "down"]).double()
        generator = torch.Generator().manual_seed(1)
        groups: list[dict[str, object]] = []
        for layer in lora_layers(model).values():
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            start = torch.randn(a.shape, generator=generator, dtype=torch.float64)
            a.data.copy_(length * start / 4)
            groups += [{"params": [a], "lr": length * 3e-3}, {"params": [b], "lr": rate_of_b}]
        optimizer = torch.optim.Adam(groups, eps=1e-30)
        for x in inputs(6):
            optimizer.zero_grad()
            model(x.double()).square().mean().backward()
            optimizer.step()
        layers = lora_layers(model)
        return {name: layer.get_delta_weight("default") for name, layer in layers.items()}

    usual = trained(8, 1, 1e-2)
    longer = trained(8 / 11.3, 11.3, 1e-2), trained(8, 11.3, 1e-2 / 11.3)
    assert len(usual) == 4
    for name, change in usual.items():
        assert float(change.detach().norm()) > 0.05
        for long in longer:
            assert torch.allclose(change, long[name], rtol=1e-9, atol=1e-12), name


@pytest.mark.parametrize("scale", ["matched", "whiten-matched"])
def test_gradients_that_avoid_an_inputs_energy_do_not_make_rows_long(scale: str) -> None:
    # of an attention sink: nearly all energy is outside of the directions that have a gradient
    spectrum = feed(build("exact", 16, 4), planted(64, 16), 64)
    sink = InputMoments(torch.full((4,), 1e-3), 1e4)
    rows = scaled_rows(replace(spectrum, inputs=sink), 4, scale)
    assert rows.norm(dim=1) == pytest.approx(torch.ones(4), rel=1e-4)
    mixing = torch.eye(4) * 30
    regression = replace(spectrum, inputs=sink, mixing=mixing)
    rows = scaled_rows(regression, 4, scale)
    assert rows.norm(dim=1) == pytest.approx(torch.ones(4), rel=1e-4)
    # of rows cut to length 1 the energy is that of a thirtieth of a row that sees an energy of 1
    seen = 4 / 30**2 if scale == "whiten-matched" else 4 * 1e-3
    usual = 4 * 1e4 / (3 * 16)
    assert step_ratio(regression, 4, scale, 4) == pytest.approx((seen / usual) ** 0.5, rel=1e-4)
