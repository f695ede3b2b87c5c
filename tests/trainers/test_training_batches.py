"""Training batches for a pass before training."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import torch
import transformers

import evatune
from evatune.trainers.hf import training_batches
from tests.helpers import lora, tiny_llama

torch.set_num_threads(1)


def test_batches_for_a_pass_are_the_trainers_examples_in_the_seeds_order(tmp_path: Path) -> None:
    examples = [{"input_ids": torch.tensor([i]), "labels": torch.tensor(i)} for i in range(10)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), report_to=[], per_device_train_batch_size=4
    )
    trainer = transformers.Trainer(model=tiny_llama(), args=arguments, train_dataset=examples)
    orders = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(orders))
        batches = list(training_batches(trainer, 3, seed))
        assert [len(batch["labels"]) for batch in batches] == [3, 3, 3, 1]
        orders.append(torch.cat([batch["labels"] for batch in batches]).tolist())
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2]) == list(range(10))
    assert trainer.accelerator._dataloaders == []
    parts = [list(training_batches(trainer, 4, 0, process, 5)) for process in range(5)]
    labels = [torch.cat([batch["labels"] for batch in part]).tolist() for part in parts]
    assert sorted(chain.from_iterable(labels)) == list(range(10))
    assert all(labels)


def test_a_trainer_says_how_many_batches_there_are(tmp_path: Path) -> None:
    examples = [{"input_ids": torch.arange(4), "labels": torch.arange(4)} for _ in range(10)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        report_to=[],
        per_device_train_batch_size=4,
        dataloader_pin_memory=False,
    )
    model = lora(tiny_llama(), r=2)
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=examples)
    seen: list[evatune.Progress] = []
    evatune.initialize(trainer, progress=seen.append)
    assert [now.max_batches for now in seen] == [3, 3, 3]
