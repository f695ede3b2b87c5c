"""Quantised linear layers that run on a CPU, where their libraries are installed; others by their
attributes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

import evatune
from evatune.capture import find_target_layers
from tests.helpers import round_trip

torch.set_num_threads(1)


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64, bias=False), nn.Tanh(), nn.Linear(64, 32, bias=False))


def torchao() -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization", exc_type=ImportError)
    model = plain()
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


def bitsandbytes(kind: str, **options: Any) -> nn.Module:
    layers = pytest.importorskip("bitsandbytes", exc_type=ImportError).nn
    model = plain()
    for name in ("0", "2"):
        layer = model.get_submodule(name)
        quantised = getattr(layers, kind)(
            layer.in_features, layer.out_features, bias=False, **options
        )
        quantised.load_state_dict(layer.state_dict())
        # else its weight is packed for inference at the first call
        quantised.support_avx512bf16_for_cpu = False
        setattr(model, name, quantised.to("cpu"))
    setattr(model, "is_loaded_in_8bit" if kind == "Linear8bitLt" else "is_loaded_in_4bit", True)
    return model


QUANTISED: dict[str, Callable[[], nn.Module]] = {
    "torchao, 8 bits": torchao,
    "bitsandbytes, 8 bits": lambda: bitsandbytes("Linear8bitLt", has_fp16_weights=False),
    "bitsandbytes, 4 bits": lambda: bitsandbytes("Linear4bit", compute_dtype=torch.float32),
}


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(50, 64, generator=generator) * 0.9 ** torch.arange(64) for _ in range(4)]


@pytest.mark.parametrize("kind", QUANTISED)
@pytest.mark.filterwarnings(
    "ignore:TorchaoLoraLinear was instantiated", "ignore:MatMul8bitLt", "ignore::FutureWarning"
)
def test_a_quantised_layer_has_its_input_rows_and_an_adapter_that_plain_peft_loads(
    kind: str, tmp_path: Path
) -> None:
    build = QUANTISED[kind]
    model = build()
    seen: list[Tensor] = []
    model.get_submodule("2").register_forward_pre_hook(
        lambda module, args: seen.append(args[0].clone())
    )
    config = evatune.CalibrationConfig(components=8, sketch="exact", tolerance=0)
    spectrum = evatune.calibrate(model, batches(), config).spectra["2"]
    rows = torch.cat(seen).double()
    assert spectrum.rows == 200
    wanted = torch.linalg.eigvalsh(rows.T @ rows / 200).flip(0)[:8]
    assert torch.allclose(spectrum.energies.double(), wanted, rtol=1e-4)
    calibration, start = round_trip(
        build, LoraConfig(r=4, target_modules=["0", "2"]), batches(), tmp_path
    )
    for name, rank in calibration.allocate().ranks.items():
        assert torch.equal(start[name], calibration.spectra[name].directions[:rank])


def test_a_4_bit_weight_is_not_packed_for_inference() -> None:
    model = QUANTISED["bitsandbytes, 4 bits"]().train()
    layer = model.get_submodule("0")
    layer.support_avx512bf16_for_cpu = True
    before = layer.weight.data.clone()
    evatune.calibrate(model, batches())
    assert torch.equal(layer.weight.data, before)
    model(batches()[0].requires_grad_()).sum().backward()


def test_other_makes_of_linear_layers_are_known_by_their_sizes() -> None:
    class QuantLinear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.infeatures, self.outfeatures = 6, 3
            self.qweight = nn.Buffer(torch.zeros(1, 3, dtype=torch.int32))

        def forward(self, x: Tensor) -> Tensor:
            return x[..., :3]

    target_layers = find_target_layers(nn.ModuleDict({"q": QuantLinear()}), "all-linear")
    assert [
        (target_layer.name, target_layer.in_features, target_layer.out_features)
        for target_layer in target_layers
    ] == [("q", 6, 3)]
