"""The registry of layer types, and experts that are seldom called."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import evatune
from evatune import CalibrationConfig
from evatune.capture import TargetLayer, find_target_layers
from evatune.capture.layer_types import LAYER_TYPES, LayerType
from evatune.errors import LayerError, TargetError
from evatune.layers import LayerSpec
from tests.helpers import matrices
from tests.layer_models import EXACT_6, Mixture, moments, routed

torch.set_num_threads(1)


def test_an_expert_that_is_seldom_called_says_so_and_starts_from_what_it_saw() -> None:
    model = get_peft_model(
        Mixture(),
        LoraConfig(r=3, target_modules=[], target_parameters=["experts.up", "experts.down"]),
    )
    calibration = evatune.initialize(model, routed(), scale="paper")
    for key in ("up", "down"):
        assert calibration.spectra[f"experts.{key}.3"].rows == 1
        assert calibration.status[f"experts.{key}.3"] == "seldom_routed"
        assert "random" in calibration.status[f"experts.{key}.3"].advice
        rank = calibration.allocate().ranks[f"experts.{key}.3"]
        own = matrices(model, "A")[f"experts.{key}"][3 * rank :]
        assert torch.allclose(own @ own.T, torch.eye(rank), atol=1e-5)
        assert torch.equal(own[0], calibration.spectra[f"experts.{key}.3"].directions[0])


@pytest.mark.parametrize("seldom", [3, 9], ids=["once", "never"])
def test_shards_that_route_too_little_together_may_route_enough(
    seldom: int, tmp_path: Path
) -> None:
    config = evatune.CalibrationConfig(components=2, sketch="exact", tolerance=0)
    parts = [
        evatune.calibrate(Mixture(), routed(1, seldom), config, targets=["experts.up"])
        for _ in range(2)
    ]
    parts[0].save(tmp_path / "part.safetensors")
    parts[0] = evatune.Calibration.load(tmp_path / "part.safetensors")
    assert {part.status["experts.up.3"] for part in parts} == {"seldom_routed"}
    merged = evatune.Calibration.merge(parts)
    assert merged.status["experts.up.3"] == ("data_exhausted" if seldom == 3 else "seldom_routed")
    assert merged.layers["experts.up.3"].spec.rank_group == "experts.up"
    assert len(set(merged.allocate(rank=1, rho=2).ranks.values())) == 1


def test_a_parameter_whose_products_never_come_is_an_error() -> None:
    class Unused(Mixture):
        def forward(
            self, x: Tensor, chosen: Tensor, attention_mask: Tensor | None = None
        ) -> Tensor:
            return self.head(x)

    model = get_peft_model(
        Unused(), LoraConfig(r=2, target_modules=["head"], target_parameters=["experts.up"])
    )
    with pytest.raises(LayerError, match=r"never_called: experts\.up\.0"):
        evatune.initialize(model, routed())


def test_an_expert_that_no_token_reaches_does_not_hold_up_the_rest() -> None:
    config = evatune.CalibrationConfig(rank=2, max_batches=32, tolerance=0.05)
    calibration = evatune.calibrate(
        Mixture(), routed(1, seldom=9) * 32, config, targets=["experts.up", "head"]
    )
    assert calibration.batches < 32
    assert calibration.status["experts.up.3"] == "seldom_routed"


# -- the registry ----------------------------------------------------------------------------------


class Scaled(nn.Module):
    """A layer of a type that the package does not know: (in, out) numbers, with input last."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(d, d))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.table


@pytest.fixture
def scaled_layers() -> Iterator[None]:
    def target_layers(name: str, module: nn.Module) -> list[TargetLayer]:
        assert isinstance(module, Scaled)
        return [TargetLayer(LayerSpec(name, *module.table.shape), module)]

    def matches(module: nn.Module) -> bool:
        return isinstance(module, Scaled)

    LAYER_TYPES.append(LayerType("scaled layers", matches, target_layers))
    yield
    LAYER_TYPES.pop()


def test_a_layer_of_a_type_without_an_entry_is_refused() -> None:
    with pytest.raises(TargetError, match=r"0 \(Scaled\); supported are linear layers"):
        find_target_layers(nn.Sequential(Scaled(8)), ["0"])


@pytest.mark.usefixtures("scaled_layers")
def test_a_layer_type_is_added_by_one_entry() -> None:
    model = nn.Sequential(Scaled(8), nn.Linear(8, 4))
    assert [layer.name for layer in find_target_layers(model, "all-linear")] == ["1"]
    x = torch.randn(50, 8) * 0.8 ** torch.arange(8)
    calibration = evatune.calibrate(model, [x], EXACT_6, targets=["0", "1"])
    assert calibration.layers["0"].spec == LayerSpec("0", 8, 8)
    assert torch.allclose(calibration.spectra["0"].energies.double(), moments(x, 6), rtol=1e-4)
    with pytest.raises(TargetError, match=r"supported are .*, scaled layers and stacked"):
        find_target_layers(nn.ModuleDict({"a": nn.Bilinear(2, 2, 2)}), ["a"])


@pytest.mark.parametrize("kind", ["complex", "sparse", "nested"])
def test_inputs_that_are_no_dense_rows_of_real_numbers_are_refused(kind: str) -> None:
    x = torch.randn(6, 16)
    batch = {
        "complex": lambda: x.to(torch.complex64),
        "sparse": x.to_sparse,
        "nested": lambda: torch.nested.nested_tensor([x, x[:3]], layout=torch.jagged),
    }[kind]()
    model = nn.Sequential(nn.Linear(16, 4, dtype=batch.dtype))
    with pytest.raises(TargetError, match=r"^0 \(Linear\) is called with a .*leave it out"):
        evatune.calibrate(model, [batch] * 2, CalibrationConfig(rank=2), progress=None)


def test_a_batch_without_examples_counts_no_rows() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.conv = nn.Conv1d(8, 4, 3)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            y = self.conv(self.attention(x, x, x)[0].transpose(1, 2))
            return {"loss": y.square().sum()}

    batches = [torch.randn(count, 6, 8) for count in (2, 0, 2)]
    config = CalibrationConfig(rank=2, tolerance=0)
    found = evatune.calibrate(Model(), batches, config, targets=["attention", "conv"])
    assert found.spectra["conv"].rows == 16
    assert found.spectra["attention"].rows == 24
    config = CalibrationConfig(rank=2, tolerance=0, objective="gradients")
    found = evatune.calibrate(Model(), batches, config, targets=["conv"])
    assert found.spectra["conv"].rows == 16
