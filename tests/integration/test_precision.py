"""Models in 16 bits, compiled, checkpointed, offloaded: the same directions."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import evatune
from evatune import Calibration, CalibrationConfig, Status
from tests.helpers import Toy, inputs, tiny_bert
from tests.quantized import QUANTIZED, batches, plain
from tests.sketches import captured_energy

torch.set_num_threads(1)
SETTINGS = CalibrationConfig(rank=4, tolerance=0)


def words(count: int = 6) -> list[dict[str, Tensor]]:
    """Batches for `tiny_bert`, with padding."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(count):
        ids = torch.randint(0, 60, (4, 32), generator=generator)
        lengths = torch.randint(16, 33, (4, 1), generator=generator)
        batches.append({"input_ids": ids, "attention_mask": (torch.arange(32) < lengths).long()})
    return batches


def rows_of(model: nn.Module, name: str, forward: Any = None) -> Tensor:
    """What a layer really saw, in float32."""
    seen: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(
        lambda module, args: seen.append(args[0].float())
    )
    with torch.no_grad():
        for batch in words():
            forward(model, batch) if forward else model(**batch)
    hook.remove()
    return torch.cat(
        [x[batch["attention_mask"].bool()] for x, batch in zip(seen, words(), strict=True)]
    )


def require_right(calibration: Calibration, model: nn.Module, forward: Any = None) -> None:
    """Rows, energies and directions are those of what the layers saw."""
    for name, spectrum in calibration.spectra.items():
        if "pooler" in name:
            continue  # sees one token of each text
        x = rows_of(model, name, forward)
        assert spectrum.rows == len(x)
        assert spectrum.total_energy == pytest.approx(
            float(x.double().square().sum()) / len(x), rel=1e-5
        )
        best = torch.linalg.svd(x.double(), full_matrices=False)[2][:4]
        assert captured_energy(spectrum.directions[:4], x) > 0.999 * captured_energy(best, x), name
        assert spectrum.directions.dtype == spectrum.energies.dtype == torch.float32
    assert all(status.usable for status in calibration.status.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_models(dtype: torch.dtype) -> None:
    model = tiny_bert().to(dtype)
    require_right(evatune.calibrate(model, words(), SETTINGS), model)
    adapted = get_peft_model(
        tiny_bert().to(dtype), LoraConfig(r=4, target_modules=["query", "dense"])
    )
    before = model(**words()[0]).last_hidden_state
    evatune.initialize(adapted, words())
    assert torch.equal(adapted.eval()(**words()[0]).last_hidden_state, before)


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("base", ["bfloat16", "nf4"])
def test_an_adapter_keeps_the_dtype_that_peft_gave_it_whatever_its_rank(
    base: str, autocast: bool
) -> None:
    model = QUANTIZED["bitsandbytes, 4 bits"]() if base == "nf4" else plain().bfloat16()
    data = batches() if base == "nf4" else [x.bfloat16() for x in batches()]
    model = get_peft_model(
        model, LoraConfig(r=4, target_modules=["0", "2"]), autocast_adapter_dtype=autocast
    )
    dtypes = {name: p.dtype for name, p in model.named_parameters() if "lora_" in name}
    calibration = evatune.initialize(model, data, metric="raw")
    assert set(calibration.allocate().ranks.values()) != {4}
    assert {name: p.dtype for name, p in model.named_parameters() if "lora_" in name} == dtypes
    assert base == "nf4" or set(dtypes.values()) == {torch.float32 if autocast else torch.bfloat16}
    model(data[0]).sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora_B" in name)


def test_float16_that_overflows_is_named_and_not_used() -> None:
    model = Toy().half()
    data = [x.half() for x in inputs()]
    data[2] *= 60000  # finite, and more than float16 holds after the first block
    found = evatune.calibrate(model, data, SETTINGS)
    assert found.status["blocks.0.q"] in (Status.DATA_EXHAUSTED, Status.NON_FINITE)
    assert found.status["blocks.1.q"] == Status.NON_FINITE
    assert found.layers["blocks.1.q"].first_bad_batch == 3


def test_autocast_on_the_cpu() -> None:
    def forward(model: nn.Module, batch: dict[str, Tensor]) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(**batch)

    model = tiny_bert()
    inside = evatune.calibrate(model, words(), SETTINGS, forward=forward)
    require_right(inside, model, forward)
    # around all of it: the products of the sketch must not be cast
    with torch.autocast("cpu", dtype=torch.bfloat16):
        around = evatune.calibrate(model, words(), SETTINGS)
    for name, spectrum in inside.spectra.items():
        assert around.spectra[name].total_energy == pytest.approx(spectrum.total_energy, rel=1e-6)
        assert torch.allclose(around.spectra[name].energies, spectrum.energies, rtol=1e-4), name


# torch.compile imports what torch itself has deprecated
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_models_run_uncompiled_under_their_own_names() -> None:
    plain = evatune.calibrate(tiny_bert(), words(), SETTINGS)
    in_place, by_block = tiny_bert(), tiny_bert()
    in_place.compile(backend="eager")
    by_block.encoder.layer[1] = torch.compile(by_block.encoder.layer[1], backend="eager")
    by_block.pooler.dense = torch.compile(by_block.pooler.dense, backend="eager")
    from torch._dynamo.utils import counters

    counters.clear()
    for model in (torch.compile(tiny_bert(), backend="eager"), in_place, by_block):
        found = evatune.calibrate(model, words(), SETTINGS)
        assert found.model == plain.model
        assert found.spectra.keys() == plain.spectra.keys()
        assert found.status == plain.status
        for name, spectrum in plain.spectra.items():
            assert found.spectra[name].rows == spectrum.rows
            assert torch.equal(found.spectra[name].directions, spectrum.directions)
            assert torch.equal(found.spectra[name].energies, spectrum.energies)
        evatune.initialize(
            get_peft_model(tiny_bert(), LoraConfig(r=4, target_modules="all-linear")), found
        )
    assert not counters["frames"]
    with torch.no_grad():
        by_block(**words()[0])
    assert counters["frames"]  # compiled after all, once evatune is done


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_adapter_of_a_model_compiled_by_blocks_loads_where_peft_looks_for_it(
    tmp_path: Path,
) -> None:
    def by_block() -> Any:
        model = tiny_bert()
        model.encoder.layer[1] = torch.compile(model.encoder.layer[1], backend="eager")
        return model

    first = "encoder.layer.1._orig_mod.attention.self.query"
    adapted = get_peft_model(
        by_block(), LoraConfig(r=4, target_modules=["query", "key"], rank_pattern={first: 3})
    )
    calibration = evatune.initialize(adapted, words(), config=CalibrationConfig(tolerance=0))
    assert calibration.layers["encoder.layer.1.attention.self.query"].cap == 3
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(by_block(), tmp_path)
    saved = {name: p for name, p in adapted.named_parameters() if "lora_" in name}
    assert saved
    for name, parameter in loaded.named_parameters():
        if "lora_" in name:
            assert torch.equal(parameter, saved.pop(name))
    assert not saved


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool) -> None:
    def adapted() -> PeftModel:
        return get_peft_model(tiny_bert(), LoraConfig(r=4, target_modules=["query", "dense"]))

    plain, checkpointed = adapted(), adapted()
    checkpointed.enable_input_require_grads()
    checkpointed.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    expected, found = (
        evatune.initialize(model.train(), words()) for model in (plain, checkpointed)
    )
    assert checkpointed.training
    assert checkpointed.base_model.model.is_gradient_checkpointing
    for name, spectrum in expected.spectra.items():
        assert found.spectra[name].rows == spectrum.rows  # and not once more for the recomputation
        assert torch.equal(found.spectra[name].directions, spectrum.directions)
    checkpointed(**words()[0]).last_hidden_state.square().mean().backward()
    assert all(
        p.grad is not None
        for n, p in checkpointed.named_parameters()
        if "lora_B" in n and "pooler" not in n
    )


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_weights_that_are_elsewhere_until_they_are_needed(tmp_path: Path, where: str) -> None:
    """What accelerate's device_map does with layers that do not fit on the device."""
    from accelerate import cpu_offload, disk_offload

    plain = evatune.calibrate(tiny_bert(), words(), SETTINGS)
    model = tiny_bert()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        device = torch.device("cpu")
        cpu_offload(model, device) if where == "cpu" else disk_offload(model, str(tmp_path), device)
    assert model.encoder.layer[0].output.dense.weight.device.type == "meta"
    found = evatune.calibrate(model, words(), SETTINGS)
    assert found.status == plain.status
    for name, spectrum in plain.spectra.items():
        assert torch.equal(found.spectra[name].directions, spectrum.directions)
    assert model.encoder.layer[0].output.dense.weight.device.type == "meta"


def test_sketches_live_where_their_layer_runs() -> None:
    """Two devices in one model; the second is the meta device, on which shapes and places are all
    there is."""
    from evatune.sketch import SketchSettings, make_sketch

    for device in ("cpu", "meta"):
        sketch = make_sketch("exact", SketchSettings(8, 2, device=torch.device(device)))
        sketch.update(torch.randn(16, 8, device=device))
        assert {sketch.gram.device.type, sketch.row_sum.device.type, sketch.energy.device.type} == {
            device
        }  # type: ignore[attr-defined]
