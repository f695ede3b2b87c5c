"""LoRA-GA, by its authors' formula and as PEFT has it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraGAConfig, preprocess_loraga

from evatune.adapters.lora_layers import lora_layers
from tests.finetune.helpers import ALPHA, RANK, MethodCase, PlantedGradient
from tests.sketches import principal_angles

torch.set_num_threads(1)


def test_the_directions_of_lora_ga_are_those_of_the_losss_gradient(tmp_path: Path) -> None:
    case = MethodCase("llama")
    model = case.model()
    batches = list(case.of(2))
    for batch in batches:
        (model(**batch).loss / len(batches)).backward()
    for name, layer in lora_layers(case.started("lora-ga", tmp_path / "start")).items():
        u, _, vt = torch.linalg.svd(model.get_submodule(name).weight.grad, full_matrices=False)
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        length = layer.out_features**0.25 / 4
        assert principal_angles(a / length, vt[:RANK]).max() < 0.05
        assert principal_angles(b.T / length, u[:, RANK : 2 * RANK].T).max() < 0.05


@torch.no_grad()
@pytest.mark.parametrize("conv1d", [False, True])
def test_lora_ga_by_hand(conv1d: bool, tmp_path: Path) -> None:
    # Singular values 8, 4, 2, 0.5 at inputs 0, 1, 2, 3 and outputs 5, 9, 3, 7; the third is < 0.
    case = PlantedGradient(conv1d=conv1d)
    layer = case.started("lora-ga", rank=2, alpha=6, start=tmp_path / "start")
    a, b = torch.zeros(2, 4), torch.zeros(16, 2)
    a[0, 0] = a[1, 1] = 0.5  # 16^¼ / √16
    b[3, 0], b[7, 1] = -0.5, 0.5
    assert torch.allclose(layer.lora_A["default"].weight, a, atol=1e-6)
    assert torch.allclose(layer.lora_B["default"].weight, b, atol=1e-6)
    base = layer.get_base_layer().weight
    expected = case.weight - 6 / 2**0.5 * b @ a
    assert torch.allclose(base.T if conv1d else base, expected, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("conv1d", [False, True])
def test_gradient_a_leaves_the_base_as_it_is(conv1d: bool, tmp_path: Path) -> None:
    case = PlantedGradient(conv1d=conv1d)
    layer = case.started("gradient-a", rank=2, alpha=6, start=tmp_path / "start")
    assert torch.allclose(layer.lora_A["default"].weight, torch.eye(4)[:2], atol=1e-6)
    assert not layer.lora_B["default"].weight.any()
    base = layer.get_base_layer().weight
    assert torch.equal(base.T if conv1d else base, case.weight)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
def test_lora_ga_peft_starts_as_peft_does(tmp_path: Path) -> None:
    case = MethodCase("llama")
    targets = ["v_proj", "down_proj"]
    model = case.model()
    config = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=targets,
        init_lora_weights="lora_ga",
        lora_ga_config=LoraGAConfig(),
    )

    def run() -> None:
        for batch in case.of(2):
            model(**batch).loss.backward()

    preprocess_loraga(model, config, run)
    theirs = lora_layers(get_peft_model(model, config))
    ours = lora_layers(case.started("lora-ga-peft", tmp_path / "start", targets=targets))
    assert ours.keys() == theirs.keys()
    for name, layer in ours.items():
        # signs are those of an SVD, which has none of its own
        for x in ("lora_A", "lora_B"):
            a, b = (getattr(one, x)["default"].weight for one in (layer, theirs[name]))
            assert torch.allclose(a.abs(), b.abs(), rtol=1e-3, atol=1e-5), (name, x)
