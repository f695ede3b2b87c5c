"""Trainings by Trainer on the processes of a launcher, one after another.

    python -m torch.distributed.run --nproc-per-node 2 tests/trainers/launched.py FOLDER plain zero3

Each process saves what it found as FOLDER/RANK.pt: training → facts.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import datasets
import torch
import torch.distributed as dist
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import evatune
from tests.processes import ZERO_3, leave


def adapter(model: nn.Module) -> Tensor:
    named = model.named_parameters()
    return torch.cat([p.detach().flatten() for name, p in named if "lora_" in name])


def train(folder: str, deepspeed: dict[str, Any] | None) -> dict[str, Any]:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=60,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=64,
    )
    base = transformers.LlamaForCausalLM(config)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
    ids = torch.randint(0, 60, (64, 12), generator=torch.Generator().manual_seed(1)).tolist()
    arguments = transformers.TrainingArguments(
        output_dir=folder,
        use_cpu=True,
        max_steps=3,
        per_device_train_batch_size=4,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
        deepspeed=deepspeed,
    )
    data = datasets.Dataset.from_dict({"input_ids": ids, "labels": ids})
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data)
    calibration = evatune.initialize(trainer)
    started = adapter(model)
    trainer.train()
    return {
        "processes": calibration.processes,
        "started": started,
        "trained": adapter(model),
        "history": trainer.state.log_history,
        "wrapped": type(trainer.model_wrapped).__name__,
    }


def main(folder: str, *trainings: str) -> None:
    warnings.simplefilter("ignore")
    found = {}
    for training in trainings:
        if training == "zero3":
            import deepspeed

            # or it compiles an operator of its own for messages on a CPU
            deepspeed.ops.__compatible_ops__.clear()
        found[training] = train(folder, ZERO_3 if training == "zero3" else None)
    torch.save(found, Path(folder) / f"{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()
    leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
