"""The one line for Trainer users."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments

import evatune
from evatune.errors import AdapterError, DataError
from tests.toys import tiny_bert, tokens

torch.set_num_threads(1)


def trainer(folder: Path, **options: Any) -> Trainer:
    model = get_peft_model(tiny_bert("classification"), LoraConfig(r=4, task_type="SEQ_CLS", target_modules="all-linear"))
    rows = [
        {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor(number % 2)}
        for batch in tokens(8, padded=True)
        for number, (ids, mask) in enumerate(zip(batch["input_ids"], batch["attention_mask"], strict=True))
    ]
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=4, max_steps=4, report_to=[], use_cpu=True, disable_tqdm=True,
        logging_strategy="no", save_strategy="no", dataloader_pin_memory=False, learning_rate=1e-2,
    )  # fmt: skip
    return Trainer(model=model, args=arguments, train_dataset=rows, **options)


def test_one_line_between_the_trainer_and_its_training(tmp_path: Path) -> None:
    run = trainer(tmp_path / "a")
    calibration = evatune.initialize(run)
    assert calibration.batches > 1
    run.train()
    held = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in run.model.parameters() if p.requires_grad} <= held
    b = [p for n, p in run.model.named_parameters() if "lora_B" in n]
    assert all(p.any() for p in b)
    run.save_model(str(tmp_path / "b"))
    loaded = PeftModel.from_pretrained(tiny_bert("classification"), str(tmp_path / "b"))
    with torch.no_grad():
        batch = tokens()[0]
        assert torch.allclose(loaded.eval()(**batch).logits, run.model.eval()(**batch).logits, atol=1e-6)


def test_the_training_data_come_in_the_order_they_would_have_come(tmp_path: Path) -> None:
    plain, ours = trainer(tmp_path / "a"), trainer(tmp_path / "b")
    evatune.initialize(ours)
    torch.manual_seed(0)
    expected = [batch["input_ids"] for batch in plain.get_train_dataloader()]
    torch.manual_seed(0)
    found = [batch["input_ids"] for batch in ours.get_train_dataloader()]
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert len(ours.accelerator._dataloaders) == len(plain.accelerator._dataloaders)


def test_too_late_is_a_clear_error(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.create_optimizer()
    with pytest.raises(AdapterError, match=r"already has an optimiser.*before trainer\.train"):
        evatune.initialize(run)


def test_batches_beside_a_trainer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="takes its batches from the trainer"):
        evatune.initialize(trainer(tmp_path), tokens())


def test_random_states_are_as_they_were(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    evatune.initialize(run)
    assert torch.equal(torch.rand(1), expected)


_TWO_PROCESSES = """
import sys, warnings
import datasets, torch, transformers
import evatune
from peft import LoraConfig, get_peft_model

warnings.simplefilter("ignore")
torch.manual_seed(0)
config = transformers.LlamaConfig(
    vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, intermediate_size=64
)
model = get_peft_model(transformers.LlamaForCausalLM(config), LoraConfig(r=4, target_modules="all-linear"))
ids = torch.randint(0, 60, (64, 12), generator=torch.Generator().manual_seed(1)).tolist()
arguments = transformers.TrainingArguments(
    output_dir=sys.argv[1], use_cpu=True, max_steps=3, per_device_train_batch_size=4, report_to=[], save_strategy="no",
    disable_tqdm=True,
)
data = datasets.Dataset.from_dict({"input_ids": ids, "labels": ids})
trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data)
evatune.initialize(trainer)
trainer.train()
trained = torch.cat([p.detach().flatten() for name, p in model.named_parameters() if "lora_" in name])
torch.save(trained, f"{sys.argv[1]}/{trainer.args.process_index}.pt")
torch.distributed.barrier()
torch.distributed.destroy_process_group()  # or gloo's threads may abort the process at its end
"""


def test_two_processes_start_from_the_same_adapter_and_train_it(tmp_path: Path) -> None:
    (tmp_path / "two.py").write_text(_TWO_PROCESSES)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(tmp_path / "two.py"), str(tmp_path)], capture_output=True, text=True, timeout=300, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert torch.equal(first, second)
