"""Length of the rows of A."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import evatune
from evatune.adapters.scale import scaled_rows
from tests.helpers import (
    lora,
    lora_layers,
    tiny_bert,
    tokens,
)


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
