"""What PEFT's EVA gets wrong (peft 0.21.2), one test per defect: ours must not.

Numbers are those of the list of defects that this project keeps: 1-11 and 14 concern the engine.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import BatchEncoding

import evatune
from evatune import Calibration, CalibrationConfig, Status
from evatune.capture.row_selection import label_mask
from tests.helpers import Toy, inputs, tiny_bert, tiny_llama, tokens

torch.set_num_threads(1)


def adapted(model: Any, **options: Any) -> PeftModel:
    return get_peft_model(model, LoraConfig(**({"r": 4, "target_modules": "all-linear"} | options)))


def test_1_batch_encodings_and_sequence_classification_with_labels_work() -> None:
    batches = [
        BatchEncoding({**batch, "labels": torch.tensor([0, 1, 0, 1])})
        for batch in tokens(6, padded=True)
    ]
    model = adapted(tiny_bert("classification"), task_type="SEQ_CLS")
    calibration = evatune.initialize(model, batches)
    assert calibration.spectra["bert.encoder.layer.0.intermediate.dense"].rows == sum(
        int(batch["attention_mask"].sum()) for batch in batches
    )


def test_2_whitening_divides_layers_that_share_an_input_once_each() -> None:
    model = adapted(tiny_bert(), target_modules=["query", "key", "value"])
    calibration = evatune.initialize(model, tokens(8), scale="whiten", rho=1)
    for part in ("query", "key", "value"):
        name = f"encoder.layer.0.attention.self.{part}"
        a = model.base_model.model.get_submodule(name).lora_A["default"].weight
        spectrum = calibration.spectra[name]
        assert torch.allclose(a.norm(dim=1), spectrum.variances[: len(a)].rsqrt(), rtol=1e-4)


def test_3_minibatches_shorter_than_the_components_end_and_the_first_pass_is_not_kept() -> None:
    import gc
    import weakref

    given: list[weakref.ref[Tensor]] = []

    def short() -> Any:
        for x in inputs(100, rows=8):
            batch = x[:1].clone()  # two rows, for sixteen components
            given.append(weakref.ref(batch))
            yield batch
            del batch

    calibration = evatune.calibrate(
        Toy(), short(), CalibrationConfig(rank=8, tolerance=0, max_batches=30)
    )
    gc.collect()
    assert calibration.batches == 30
    assert len(given) == 30
    assert not any(ref() is not None for ref in given)


def test_4_non_contiguous_inputs_work_and_no_activation_becomes_python_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """BERT's pooler reads a strided slice."""

    def never(self: Tensor) -> Any:
        assert self.numel() < 100, "an activation was turned into a list"
        return original(self)

    original = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", never)
    calibration = evatune.calibrate(tiny_bert(), tokens(8), CalibrationConfig(rank=4))
    assert calibration.spectra["pooler.dense"].rows == 32


def test_5_generators_and_iterable_datasets_work() -> None:
    class Stream(torch.utils.data.IterableDataset[Tensor]):
        def __iter__(self) -> Any:
            return iter(torch.cat(inputs()))

    loader = torch.utils.data.DataLoader(Stream(), batch_size=4)
    assert evatune.calibrate(Toy(), loader, CalibrationConfig(rank=4, tolerance=0)).batches == 6


def test_6_nan_names_the_layer() -> None:
    model = tiny_bert()
    with torch.no_grad():
        model.encoder.layer[0].output.dense.bias[3] = float("inf")
    calibration = evatune.calibrate(model, tokens())
    assert calibration.status["encoder.layer.0.output.dense"].usable
    assert calibration.status["encoder.layer.1.attention.self.query"] is Status.NON_FINITE
    with pytest.raises(
        evatune.EvatuneError,
        match=r"encoder\.layer\.1\.attention\.self\.query \(first in batch 1\)",
    ):
        evatune.initialize(adapted(model), tokens())


def test_7_all_zero_inputs_are_an_error_and_never_get_rank() -> None:
    model = tiny_bert()
    with torch.no_grad():
        for parameter in model.embeddings.parameters():
            parameter.zero_()
    target = ["layer.0.attention.self.query", "layer.1.output.dense"]
    calibration = evatune.calibrate(model, tokens(), targets=target)
    assert calibration.status["encoder.layer.0.attention.self.query"] is Status.NO_SIGNAL
    with pytest.raises(
        evatune.EvatuneError,
        match=r"no_signal: .*layer\.0\.attention\.self\.query.*every input was zero",
    ):
        evatune.initialize(adapted(model, target_modules=target), tokens())


def test_8_an_exception_leaves_no_hook_and_the_callers_mappings_are_whole() -> None:
    model = adapted(tiny_bert()).train()
    batches = tokens(3)
    batches[1]["input_ids"] = batches[1]["input_ids"] + 10_000  # beyond the vocabulary
    before = [dict(batch) for batch in batches]
    with pytest.raises(IndexError):
        evatune.initialize(model, batches)
    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert all(
        batch.keys() == old.keys() and all(batch[k] is old[k] for k in old)
        for batch, old in zip(batches, before, strict=True)
    )


def test_9_one_call_does_it_all_also_on_the_meta_device() -> None:
    model = get_peft_model(
        tiny_bert(),
        LoraConfig(
            r=4, target_modules="all-linear", init_lora_weights="eva", eva_config=EvaConfig()
        ),
        low_cpu_mem_usage=True,
    )
    assert any(p.device.type == "meta" for p in model.parameters())
    evatune.initialize(model, tokens(8))
    assert not any(p.device.type == "meta" for p in model.parameters())
    found = model(**tokens()[0])
    (found.last_hidden_state.pow(3).sum() + found.pooler_output.sum()).backward()
    grads = [p.grad for n, p in model.named_parameters() if "lora_B" in n]
    assert grads
    assert all(grad is not None and grad.any() for grad in grads)


def test_10_a_calibration_of_the_base_model_has_its_names_and_can_be_saved(tmp_path: Path) -> None:
    calibration = evatune.calibrate(tiny_bert(), tokens(8), CalibrationConfig(rank=4))
    calibration.save(tmp_path / "c.safetensors")
    loaded = Calibration.load(tmp_path / "c.safetensors")
    through = evatune.calibrate(adapted(tiny_bert()), tokens(8), CalibrationConfig(rank=4))
    assert list(loaded.spectra) == list(through.spectra)
    assert all(
        torch.equal(loaded.spectra[n].directions, through.spectra[n].directions)
        for n in loaded.spectra
    )


@pytest.mark.parametrize("rslora", [False, True])
def test_11_the_scale_is_the_same_in_every_layer(rslora: bool, tmp_path: Path) -> None:
    model = adapted(tiny_bert(), lora_alpha=1, use_rslora=rslora)
    calibration = evatune.initialize(model, tokens(8))
    assert len(set(calibration.allocate().ranks.values())) > 1
    model.save_pretrained(tmp_path)
    expected = 1 / 4**0.5 if rslora else 1 / 4
    for found in (model, PeftModel.from_pretrained(tiny_bert(), str(tmp_path))):
        scales = [m.scaling["default"] for m in found.modules() if isinstance(m, LoraLayer)]
        assert scales == pytest.approx([expected] * len(scales))


def test_14_the_label_mask_is_shifted_for_causal_models() -> None:
    batch = tokens(1)[0]
    labels = batch["input_ids"].clone()
    labels[:, :-1] = -100  # only the last token has a loss: its row is the position before it
    seen: list[Tensor] = []
    model = tiny_llama()
    hook = model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(
        lambda m, a: seen.append(a[0].clone())
    )
    calibration = evatune.calibrate(
        model,
        [{**batch, "labels": labels}],
        CalibrationConfig(components=2, labels_only=True, sketch="exact"),
    )
    hook.remove()
    spectrum = calibration.spectra["model.layers.0.self_attn.q_proj"]
    assert spectrum.rows == 4
    assert spectrum.total_energy == pytest.approx(
        float(seen[-1][:, -2].square().sum(1).mean()), rel=1e-5
    )
    assert label_mask(labels, -100, shift=True)[:, -2].all()
