"""Patterns and targets that name layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import evatune
from tests.helpers import (
    lora,
    lora_layers,
)


class Nested(nn.Module):
    """Layer names that end in one another: "x.a" and "y.x.a"."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.x = nn.ModuleDict({"a": nn.Linear(8, 8)})
        self.y = nn.ModuleDict({"x": nn.ModuleDict({"a": nn.Linear(8, 8)})})
        self.other = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        strong = self.x["a"](torch.nn.functional.normalize(x, dim=-1) * x[..., :1])
        return self.other(x) + strong + self.y["x"]["a"](0.01 * x)


def test_names_that_end_in_one_another_are_told_apart(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    xs = [torch.randn(50, 8, generator=generator) * 0.5 ** torch.arange(8) for _ in range(8)]
    model = get_peft_model(Nested(), LoraConfig(r=2, target_modules="all-linear"))
    ranks = evatune.initialize(model, xs, rho=4, metric="raw").allocate().ranks
    assert ranks["x.a"] > 0
    assert ranks["y.x.a"] == 0
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B["default"].weight.normal_()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Nested(), str(tmp_path))
    assert set(lora_layers(loaded)) == {name for name, rank in ranks.items() if rank}
    with torch.no_grad():
        assert torch.allclose(loaded.eval()(xs[0]), model.eval()(xs[0]), atol=1e-6)


class Flux(nn.Module):
    """Names that end in one another, and sort the other way than by their lengths."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(24, 24)
        self.zz = nn.ModuleDict({"fc": nn.Linear(24, 24), "gc": nn.Linear(24, 24)})

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.zz["gc"](torch.relu(self.zz["fc"](torch.relu(self.fc(x)))))
        return out


@pytest.mark.parametrize("rho", [1, 2])
def test_a_saved_pattern_is_the_same_in_any_order(tmp_path: Path, rho: float) -> None:
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["fc", "gc"], alpha_pattern={"^fc": 16})
    model = get_peft_model(Flux(), config)
    batches = [torch.randn(64, 24) * torch.logspace(0, -2, 24) for _ in range(6)]
    evatune.initialize(model, batches, rho=rho)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B["default"].weight.normal_()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Flux(), str(tmp_path))
    for name, layer in lora_layers(model).items():
        assert lora_layers(loaded)[name].r == layer.r
        assert lora_layers(loaded)[name].scaling == pytest.approx(layer.scaling)
    assert torch.allclose(loaded(batches[0]), model(batches[0]), atol=1e-5)


def test_layers_whose_names_end_in_one_another_keep_their_own_ranks(tmp_path: Path) -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.lin, self.other = nn.Linear(16, 16), nn.Linear(16, 16)
            self.block = nn.ModuleDict({"lin": nn.Linear(16, 16)})

        def forward(self, x: Tensor) -> Tensor:
            return self.other(torch.relu(self.block["lin"](torch.tanh(self.lin(x)))))

    generator = torch.Generator().manual_seed(0)
    for decay in (0.5, 0.7, 0.9):
        batches = [
            torch.randn(40, 16, generator=generator) * decay ** torch.arange(16) for _ in range(4)
        ]
        model = lora(Nested(), target_modules=["lin", "other"])
        calibration = evatune.initialize(model, batches)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(Nested(), str(tmp_path))
        ranks = calibration.allocate().ranks
        assert {name: layer.r["default"] for name, layer in lora_layers(loaded).items()} == {
            n: r for n, r in ranks.items() if r
        }
        assert all(
            layer.scaling["default"] == pytest.approx(2) for layer in lora_layers(loaded).values()
        )
        assert torch.allclose(loaded(batches[0]), model(batches[0]), atol=1e-6)
