"""Quantized linear layers that run on a CPU, where their libraries are installed; others by their
attributes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

import evatune
from evatune.capture import find_target_layers
from tests.helpers import round_trip
from tests.quantized import QUANTIZED, batches

torch.set_num_threads(1)


@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.filterwarnings(
    "ignore:TorchaoLoraLinear was instantiated", "ignore:MatMul8bitLt", "ignore::FutureWarning"
)
def test_a_quantized_layer_has_its_input_rows_and_an_adapter_that_plain_peft_loads(
    kind: str, tmp_path: Path
) -> None:
    build = QUANTIZED[kind]
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
    model = QUANTIZED["bitsandbytes, 4 bits"]().train()
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
