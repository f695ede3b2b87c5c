"""Whole models on a GPU: in 16 bits, under autocast, quantized, compiled, spread over devices."""

from __future__ import annotations

import gc
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import evatune
from evatune import Calibration, CalibrationConfig
from tests.gpu.helpers import moment_of, require_best, rows_seen, words
from tests.helpers import matrices, result, tiny_bert, tiny_llama

pytestmark = pytest.mark.gpu

SETTINGS = CalibrationConfig(rank=4, tolerance=0)


def require_right(
    model: nn.Module,
    names: list[str],
    forward: Any = None,
    around: Any = None,
    config: CalibrationConfig = SETTINGS,
) -> None:
    """Calibrate; energies and directions are those of what the layers were called with."""
    data = words()
    masks = [batch["attention_mask"] for batch in data]
    with rows_seen(model, names, masks) as rows, around or nullcontext():
        found = evatune.calibrate(model, data, config, forward=forward)
    assert all(status.usable for status in found.status.values()), found.status
    for name in names:
        x = torch.cat(rows[name])
        assert found.spectra[name].rows == len(x)
        require_best(found.spectra[name], moment_of(x))


def bert_layers(model: nn.Module) -> list[str]:
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "pooler" not in name
    ]


def llama_layers(model: nn.Module) -> list[str]:
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "lm_head" not in name
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_models_of_every_dtype(dtype: torch.dtype, device: torch.device) -> None:
    bert = tiny_bert().to(device, dtype)
    require_right(bert, bert_layers(bert))
    llama = tiny_llama().to(device, dtype)
    require_right(llama, llama_layers(llama))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_an_adapter_on_a_16_bit_model_starts_without_a_change(
    dtype: torch.dtype, device: torch.device
) -> None:
    data = [{key: value.to(device) for key, value in batch.items()} for batch in words()]
    model = tiny_llama().to(device, dtype)
    with torch.no_grad():
        before = result(model, data[0])
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    calibration = evatune.initialize(model, data)
    for name, parameter in model.named_parameters():
        assert parameter.device.type == device.type
        assert "lora_B" not in name or not parameter.any()
    ranks = calibration.allocate().ranks
    assert {name: len(a) for name, a in matrices(model, "A").items()} == {
        name: rank for name, rank in ranks.items() if rank
    }
    with torch.no_grad():
        assert torch.equal(result(model.eval(), data[0]), before)
    out = model(**data[0], labels=data[0]["input_ids"])
    out.loss.backward()
    gradients = [p.grad for n, p in model.named_parameters() if "lora_B" in n]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype, device: torch.device) -> None:
    def forward(model: nn.Module, batch: dict[str, Tensor]) -> Any:
        batch = {key: value.to(device) for key, value in batch.items()}
        with torch.autocast(device.type, dtype=dtype):
            return model(**batch)

    model = tiny_bert().to(device)
    require_right(model, bert_layers(model), forward)
    # around all of it: the products of the sketch must not be cast
    require_right(model, bert_layers(model), around=torch.autocast(device.type, dtype=dtype))


def quantized(bits: int, device: torch.device) -> nn.Module:
    layers = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed").nn
    model: Any = tiny_llama(hidden_size=64, intermediate_size=128)
    model.to(torch.float16 if bits == 8 else torch.bfloat16)
    for name in llama_layers(model):
        layer = model.get_submodule(name)
        sizes = (layer.in_features, layer.out_features)
        if bits == 8:
            new = layers.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False)
        else:
            new = layers.Linear4bit(
                *sizes, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
            )
        new.load_state_dict(layer.state_dict())
        parent, _, key = name.rpartition(".")
        setattr(model.get_submodule(parent), key, new)
    model.is_loaded_in_8bit, model.is_loaded_in_4bit = bits == 8, bits == 4
    for child in model.children():  # transformers may refuse to move such a model as a whole
        child.to(device)
    return model


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_models(bits: int, device: torch.device) -> None:
    model = quantized(bits, device)
    exact = CalibrationConfig(rank=4, sketch="exact", tolerance=0)
    require_right(model, llama_layers(model), config=exact)
    data = [{key: value.to(device) for key, value in batch.items()} for batch in words()]
    with torch.no_grad():
        before = result(model, data[0])
    adapted = get_peft_model(
        model, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"])
    )
    evatune.initialize(adapted, data)
    with torch.no_grad():
        after = result(adapted.eval(), data[0])
    assert torch.allclose(after.float(), before.float(), rtol=1e-2, atol=1e-2)
    adapted.train()
    adapted(**data[0], labels=data[0]["input_ids"]).loss.backward()
    gradients = [p.grad for n, p in adapted.named_parameters() if "lora_B" in n]
    assert gradients
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


def test_compiled_models_run_uncompiled_under_their_own_names(device: torch.device) -> None:
    from torch._dynamo.utils import counters

    plain = evatune.calibrate(tiny_bert().to(device), words(), SETTINGS)
    in_place, by_block = tiny_bert().to(device), tiny_bert().to(device)
    in_place.compile()
    by_block.encoder.layer[1] = torch.compile(by_block.encoder.layer[1])
    counters.clear()
    for model in (torch.compile(tiny_bert().to(device)), in_place, by_block):
        require_equal(evatune.calibrate(model, words(), SETTINGS), plain)
    assert not counters["frames"]


def require_equal(found: Calibration, expected: Calibration) -> None:
    assert found.status == expected.status
    assert found.spectra.keys() == expected.spectra.keys()
    for name, spectrum in expected.spectra.items():
        other = found.spectra[name]
        assert other.rows == spectrum.rows
        assert other.total_energy == pytest.approx(spectrum.total_energy, rel=1e-3)
        largest = float(spectrum.energies[0])
        assert torch.allclose(other.energies, spectrum.energies, rtol=1e-3, atol=1e-4 * largest)
        v = spectrum.directions
        moment = v.double().T @ (spectrum.energies.double()[:, None] * v.double())
        kept = other.directions.double()
        assert float((kept @ moment * kept).sum()) >= (1 - 1e-4) * float(moment.trace())


@pytest.mark.parametrize("main", ["gpu", "cpu"])
def test_models_spread_over_cpu_and_gpu(main: str, device: torch.device) -> None:
    """With the GPU as the main device the CPU holds weights until they are needed; else layers run
    where they are."""
    from accelerate import dispatch_model

    expected = evatune.calibrate(tiny_bert(), words(), SETTINGS)
    place = device.index if device.index is not None else device
    places = {
        "embeddings": place,
        "encoder.layer.0": place,
        "encoder.layer.1": "cpu",
        "pooler": "cpu",
    }
    model = dispatch_model(
        tiny_bert(), places, main_device=place if main == "gpu" else "cpu", force_hooks=True
    )
    require_equal(evatune.calibrate(model, words(), SETTINGS), expected)
    first, second = (layer.output.dense.weight.device.type for layer in model.encoder.layer)
    assert first == device.type
    assert second == "cpu" or main == "gpu"
    if main == "cpu":
        data = words()
        before = result(model, data[0])
        adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["query", "dense"]))
        evatune.initialize(adapted, data)
        assert torch.equal(result(adapted.eval(), data[0]), before)


@pytest.mark.parametrize("on_gpu", [True, False], ids=["model on it", "model on the cpu"])
def test_a_gpu_as_the_default_device(on_gpu: bool, device: torch.device) -> None:
    expected = evatune.calibrate(tiny_bert(), words(), SETTINGS)
    model = tiny_bert()
    if on_gpu:
        model.to(device)
    data = words()
    adapted = get_peft_model(tiny_bert(), LoraConfig(r=4, target_modules=["query", "dense"]))
    adapted.to(device if on_gpu else "cpu")
    torch.set_default_device(device)
    try:
        found = evatune.calibrate(model, data, SETTINGS)
        evatune.initialize(adapted, data)
    finally:
        torch.set_default_device(None)
    require_equal(found, expected)
    places = {parameter.device.type for parameter in adapted.parameters()}
    assert places == {device.type if on_gpu else "cpu"}


def test_tf32_that_the_user_has_turned_on_stays_on_and_does_no_harm(device: torch.device) -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        model = tiny_bert().to(device)
        require_right(model, bert_layers(model))
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_memory_is_given_back(device: torch.device) -> None:
    model = nn.Sequential(nn.Linear(1024, 1024), nn.Tanh(), nn.Linear(1024, 1024)).to(device)
    generator = torch.Generator().manual_seed(0)
    data = [torch.randn(256, 1024, generator=generator) for _ in range(4)]

    def held() -> int:
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated(device)

    evatune.calibrate(model, data, SETTINGS)  # libraries keep workspaces of their own
    before = held()
    calibration = evatune.calibrate(model, data, SETTINGS)
    assert held() <= before
    assert len(calibration.spectra) == 2

    def fails(model: nn.Module, batch: Tensor) -> Any:
        model(batch.to(device))
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        evatune.calibrate(model, data, SETTINGS, forward=fails)
    assert held() <= before
