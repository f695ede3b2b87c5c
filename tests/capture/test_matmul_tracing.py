"""Rows that attention and experts multiply their weights with, against the exact answer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._C import _len_torch_dispatch_stack

import evatune
from tests.layer_models import EXACT_6, Attends, Experts, Mixture, moments, routed, sequences

torch.set_num_threads(1)


def what_out_proj_sees(model: Attends, batch: dict[str, Tensor]) -> Tensor:
    """(batch, tokens, d): with the identity for its weight, attention gives what its output
    projection is given."""
    replaced = {"attn.out_proj.weight": torch.eye(16), "attn.out_proj.bias": torch.zeros(16)}
    replaced |= {"head.weight": torch.eye(16), "head.bias": torch.zeros(16)}
    with torch.no_grad():
        found: Tensor = torch.func.functional_call(model, replaced, kwargs=batch)
    return found


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_the_rows_of_both_projections_of_attention(
    batch_first: bool, cross: bool, masked: bool
) -> None:
    model, batches = Attends(batch_first, cross), sequences(cross)
    mask = torch.ones(5, 7)
    if masked:
        mask[2, 4:] = 0
    kept = mask.bool()
    ins = [b["x"][kept] for b in batches] + [b["memory"].flatten(0, 1) for b in batches if cross]
    outs = torch.cat([what_out_proj_sees(model, b)[kept] for b in batches])
    batches = [b | {"attention_mask": mask} for b in batches]
    spectra = evatune.calibrate(model, batches, EXACT_6, targets=["attn"]).spectra
    assert list(spectra) == ["attn", "attn.out_proj"]
    for name, rows in {"attn": torch.cat(ins), "attn.out_proj": outs}.items():
        assert spectra[name].rows == len(rows)
        assert torch.allclose(spectra[name].energies.double(), moments(rows, 6), rtol=1e-4)


def rows_of_expert(
    model: Mixture, batches: list[dict[str, Tensor]], expert: int
) -> tuple[Tensor, Tensor]:
    """What its slices of `up` and `down` are multiplied with, padding left out."""
    kept = [b["x"][b["attention_mask"].bool() & (b["chosen"] == expert).any(-1)] for b in batches]
    x = torch.cat(kept)
    up = model.experts.up[expert].detach()
    return x, torch.tanh(x @ (up if model.experts.is_transposed else up.T))


@pytest.mark.parametrize("transposed", [False, True])
def test_each_expert_has_the_rows_routed_to_it(transposed: bool) -> None:
    model, batches = Mixture(transposed), routed()
    config = evatune.CalibrationConfig(components=4, sketch="exact", tolerance=0)
    calibration = evatune.calibrate(model, batches, config, targets=["experts.up", "experts.down"])
    assert list(calibration.spectra) == [
        f"experts.{key}.{e}" for key in ("up", "down") for e in range(4)
    ]
    for expert in range(3):
        for key, rows in zip(("up", "down"), rows_of_expert(model, batches, expert), strict=True):
            spectrum = calibration.spectra[f"experts.{key}.{expert}"]
            assert spectrum.rows == len(rows)
            assert torch.allclose(spectrum.energies.double(), moments(rows, 4), rtol=1e-4)
            assert calibration.status[f"experts.{key}.{expert}"].usable


def test_experts_that_are_multiplied_all_at_once_have_the_rows_that_are_not_zero() -> None:
    class AtOnce(Experts):
        def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
            routed = (chosen[:, None, :] == torch.arange(4)[:, None]).any(-1)  # (n, 4)
            every = x[None] * routed.T[..., None]
            return torch.bmm(torch.tanh(torch.bmm(every, self.up)), self.down).sum(0)

    batches, config = routed(), evatune.CalibrationConfig(components=4, sketch="exact", tolerance=0)
    targets = ["experts.up", "experts.down"]
    model = Mixture(transposed=True)
    one_by_one = evatune.calibrate(model, batches, config, targets=targets)
    model.experts = AtOnce(transposed=True)
    at_once = evatune.calibrate(model, batches, config, targets=targets)
    for name, spectrum in one_by_one.spectra.items():
        assert at_once.spectra[name].rows == spectrum.rows
        assert torch.allclose(
            at_once.spectra[name].energies, spectrum.energies, rtol=1e-4, atol=1e-7
        )


def test_a_stack_of_one_weight_has_all_rows() -> None:
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(1, 6, 8))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight[0])

    x = torch.randn(50, 8)
    spectrum = evatune.calibrate(
        nn.Sequential(Single()), [x], EXACT_6, targets=["0.weight"]
    ).spectra["0.weight.0"]
    assert spectrum.rows == 50
    assert torch.allclose(spectrum.energies.double(), moments(x, 6), rtol=1e-4)


def test_a_model_that_fails_inside_its_experts_is_left_as_it_was() -> None:
    class Failing(Experts):
        def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
            super().forward(x, chosen)
            raise RuntimeError("the experts broke")

    model = Mixture()
    model.experts = Failing(transposed=False)
    # as transformers names it
    model.experts.config = SimpleNamespace(_experts_implementation="grouped_mm")
    with pytest.raises(RuntimeError, match="the experts broke"):
        evatune.calibrate(model, routed(), EXACT_6, targets=["experts.up"])
    assert not _len_torch_dispatch_stack()
    assert not model.experts._forward_pre_hooks
    assert not model.experts._forward_hooks
    assert model.experts.config._experts_implementation == "grouped_mm"


def test_padding_is_left_out_of_experts_rows_under_autocast_and_in_inference_mode_too() -> None:
    batches = routed()
    config = evatune.CalibrationConfig(components=4, sketch="exact", tolerance=0)
    targets = ["experts.up", "experts.down"]
    plain = evatune.calibrate(Mixture(), batches, config, targets=targets).spectra

    def autocast(model: nn.Module, batch: dict[str, Tensor]) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(**batch)

    def inference(model: nn.Module, batch: dict[str, Tensor]) -> None:
        with torch.inference_mode():
            model(**batch)

    for forward in (autocast, inference):
        found = evatune.calibrate(
            Mixture(), batches, config, targets=targets, forward=forward
        ).spectra
        for name, spectrum in plain.items():
            assert found[name].rows == spectrum.rows
            assert found[name].total_energy == pytest.approx(spectrum.total_energy, rel=0.02)


def test_experts_that_are_layers_of_their_own_have_their_own_rows_and_statuses() -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(8, 8) for _ in range(4)])

        def forward(self, x: Tensor, chosen: Tensor, attention_mask: Tensor) -> Tensor:
            x, chosen = x.flatten(0, 1), chosen.flatten(0, 1)
            return sum(  # type: ignore[return-value]
                layer(x[(chosen == number).any(1)]).sum()
                for number, layer in enumerate(self.experts)
                if (chosen == number).any()
            )

    with pytest.warns(
        UserWarning,
        match=r"no mask fits the rows of these layers.*: experts.0, experts.1, experts.2; ",
    ):
        calibration = evatune.calibrate(
            Listed(), routed(seldom=9), evatune.CalibrationConfig(components=4, tolerance=0)
        )
    assert calibration.status["experts.3"] == "never_called"
    assert calibration.status["experts.0"].usable
    assert calibration.spectra["experts.0"].rows == sum(
        int((b["chosen"] == 0).any(-1).sum()) for b in routed(seldom=9)
    )


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attn = nn.MultiheadAttention(16, 2, batch_first=True)
        self.interrupt = False

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.attn(x, x, x, need_weights=False)[0]
        return out


def test_ctrl_c_inside_attention_leaves_the_model_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, x = Attending(), torch.randn(2, 8, 16)
    before = model(x)

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", interrupted)
        with pytest.raises(KeyboardInterrupt):
            evatune.calibrate(model, [x], targets=["attn"])
    assert torch.equal(model(x), before)
    assert not model.attn._forward_pre_hooks


def test_autocast_around_all_batches_hides_no_product_of_attention() -> None:
    data = [torch.randn(2, 8, 16) for _ in range(4)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = evatune.calibrate(
            Attending(), data, evatune.CalibrationConfig(rank=4, tolerance=0), targets=["attn"]
        )
    assert {spectrum.rows for spectrum in found.spectra.values()} == {4 * 16}
    assert torch.is_autocast_cache_enabled()
