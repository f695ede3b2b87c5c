"""What the pre-training scripts share: a seeded, resumable Trainer, and the folder with its
card."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

ROOT = Path(__file__).parents[2]


def train(
    model: Any,
    train_set: Any,
    test_set: Any,
    collator: Any,
    *,
    name: str,
    seed: int,
    **options: Any,
) -> transformers.Trainer:
    """Train, from the last checkpoint under runs/pretrain/NAME where there is one.

    Args:
        options: of `TrainingArguments`.
    """
    folder = ROOT / "runs" / "pretrain" / name
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        seed=seed,
        save_strategy="steps",
        save_steps=500,
        save_total_limit=1,
        report_to=[],
        dataloader_pin_memory=False,
        **options,
    )
    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=train_set,
        eval_dataset=test_set,
        data_collator=collator,
    )
    last = transformers.trainer_utils.get_last_checkpoint(str(folder)) if folder.is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    return trainer


def write_asset(
    model: Any,
    name: str,
    *,
    seed: int,
    title: str,
    data: str,
    score: str,
    licence: str = "Apache-2.0",
    tokenizer: Any = None,
) -> Path:
    """Write a folder of evatune-assets: weights in float16, the tokenizer, and the card.

    The old folder stands until the new one is whole.

    Args:
        data: what it was trained on, and what was left out. score: on data it has not seen, with
            its unit.
    """
    folder = ROOT / "assets" / "src" / "evatune_assets" / name
    temporary = folder.with_name(f".{name}")
    shutil.rmtree(temporary, ignore_errors=True)
    model.to(torch.float16).save_pretrained(temporary)
    if tokenizer is not None:
        tokenizer.save_pretrained(temporary)
    weights = (temporary / "model.safetensors").read_bytes()
    script = Path(sys.argv[0]).resolve().relative_to(ROOT)
    commit = subprocess.run(
        ["git", "log", "-1", "--format=%h", "--", str(script)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    (temporary / "README.md").write_text(
        f"# {title}\n\n| | |\n|---|---|\n| script | `python {script}`, as of commit"
        f" {commit or 'to come'} |\n| seed | {seed} |\n| parameters |"
        f" {sum(p.numel() for p in model.parameters()):,}, stored as float16"
        f" ({len(weights) / 1e6:.1f} MB) |\n| SHA-256 of model.safetensors |"
        f" `{hashlib.sha256(weights).hexdigest()}` |\n| data | {data} |\n| held-out score | {score}"
        f" |\n| made with | torch {torch.__version__}, transformers {transformers.__version__} |\n|"
        f" licence | {licence} |\n",
        encoding="utf-8",
    )
    shutil.rmtree(folder, ignore_errors=True)
    for path in temporary.iterdir():  # safetensors writes files for the owner alone
        path.chmod(0o644)
    os.replace(temporary, folder)
    return folder
