"""From a Trainer's one line to an adapter that PEFT loads, on a GPU."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments

import evatune
from tests.gpu.helpers import words
from tests.helpers import matrices, result, tiny_bert, tiny_llama

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_trainer_in_mixed_precision(precision: str, tmp_path: Path, device: torch.device) -> None:
    model = get_peft_model(
        tiny_bert("classification"),
        LoraConfig(r=4, task_type="SEQ_CLS", target_modules="all-linear"),
    )
    examples = [
        {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor(number % 2)}
        for batch in words()
        for number, (ids, mask) in enumerate(
            zip(batch["input_ids"], batch["attention_mask"], strict=True)
        )
    ]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        max_steps=4,
        save_strategy="no",
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        learning_rate=1e-3,
        **{precision: True},
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=examples)
    calibration = evatune.initialize(trainer)
    assert calibration.batches > 1
    assert all(status.usable for status in calibration.status.values())
    start = matrices(model, "A")
    assert {a.device.type for a in start.values()} == {device.type}
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 4
    assert all(math.isfinite(loss) for loss in losses)
    lengths = [float(b.norm()) for b in matrices(model, "B").values()]
    assert all(math.isfinite(length) for length in lengths)
    # float16's first steps may be skipped while its scale of the loss is found
    assert precision == "fp16" or all(length > 0 for length in lengths)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_peft_loads_what_was_saved_on_a_gpu(
    dtype: torch.dtype, tmp_path: Path, device: torch.device
) -> None:
    data = [{key: value.to(device) for key, value in batch.items()} for batch in words()]
    base = tiny_llama().to(device, dtype)
    with torch.no_grad():
        before = result(base, data[0])
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
    evatune.initialize(model, data)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama().to(device, dtype), str(tmp_path)).eval()
    with torch.no_grad():
        assert torch.equal(result(loaded, data[0]), before)
    saved, found = matrices(model, "A"), matrices(loaded, "A")
    assert saved.keys() == found.keys()
    for name, a in saved.items():
        assert found[name].device.type == device.type
        assert torch.equal(found[name], a), name
    assert not any(b.any() for b in matrices(loaded, "B").values())


def test_the_gpus_generator_is_where_it_was(device: torch.device) -> None:
    model = get_peft_model(tiny_bert().to(device), LoraConfig(r=4, target_modules="all-linear"))
    batches = [{name: ids.to(device) for name, ids in batch.items()} for batch in words()]
    before = torch.cuda.get_rng_state(device)
    calibration = evatune.initialize(model, batches, rho=2)
    assert len(set(calibration.allocate(rank=4).ranks.values())) > 1  # layers were made anew
    assert torch.equal(torch.cuda.get_rng_state(device), before)
