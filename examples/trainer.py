"""transformers' Trainer: one line between `Trainer(...)` and `trainer.train()`.

    pip install 'evatune[demo]'
    python examples/trainer.py
    accelerate launch --multi_gpu --num_processes 2 examples/trainer.py     # on several GPUs, the
    same script

With `--report-to tensorboard` (or wandb, mlflow, trackio, …) the calibration's figures are in the
tracker, as evatune/….
"""

import argparse
from pathlib import Path

from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
)

import evatune
from evatune.loading.corpora import bbc
from evatune.loading.demo import demo_model

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument(
    "--out", type=Path, default=Path("bbc"), help="folder for checkpoints and the adapter"
)
parser.add_argument("--report-to", nargs="*", default=[], help="trackers, by transformers' names")
parser.add_argument("--steps", type=int, default=20)
arguments = parser.parse_args()

texts, topics = bbc()
tokenizer = AutoTokenizer.from_pretrained(demo_model())
examples = [
    tokenizer(text, max_length=48, truncation=True) | {"labels": topic}
    for text, topic in zip(texts[::14], topics[::14], strict=True)
]
model = AutoModelForSequenceClassification.from_pretrained(demo_model(), num_labels=max(topics) + 1)
model = get_peft_model(
    model,
    LoraConfig(r=8, lora_alpha=8, task_type="SEQ_CLS", target_modules=["query", "value", "dense"]),
)

trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir=str(arguments.out),
        per_device_train_batch_size=8,
        max_steps=arguments.steps,
        learning_rate=2e-3,
        logging_steps=5,
        save_strategy="no",
        report_to=arguments.report_to,
    ),
    train_dataset=examples,
    processing_class=tokenizer,
)
evatune.initialize(trainer)
trainer.train()
trainer.save_model(str(arguments.out / "adapter"))
