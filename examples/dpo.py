"""TRL's DPOTrainer: the start sees what is chosen and what is rejected, as the loss does.

    pip install 'evatune[recipes,trl]'
    python examples/dpo.py

A small Llama of evatune's recipes learns to work word problems out rather than to shirk them.
KTOTrainer and RewardTrainer take the same line; for GRPOTrainer the start sees the prompts.
"""

import argparse
from pathlib import Path

from datasets import Dataset
from peft import EvaConfig, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

import evatune
from evatune.finetune.tasks.generation import arithmetic
from evatune.loading.assets import asset

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument(
    "--out", type=Path, default=Path("preferred"), help="folder for checkpoints and the adapter"
)
parser.add_argument("--steps", type=int, default=20)
arguments = parser.parse_args()

preferences = [
    {"prompt": pair.prompt, "chosen": pair.answer, "rejected": "I cannot say."}
    for pair in arithmetic.examples(120, 0).train
]
model = AutoModelForCausalLM.from_pretrained(asset("llama-small"), dtype="float32")
model = get_peft_model(
    model,
    # EvaConfig's use_label_mask, its default, leaves the tokens of the prompts out; plain LoRA's
    # config would count them as well.
    LoraConfig(
        r=8,
        lora_alpha=8,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        init_lora_weights="eva",
        eva_config=EvaConfig(),
    ),
)

trainer = DPOTrainer(
    model=model,
    args=DPOConfig(
        output_dir=str(arguments.out),
        max_steps=arguments.steps,
        per_device_train_batch_size=4,
        learning_rate=2e-3,
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=5,
        save_strategy="no",
    ),
    train_dataset=Dataset.from_list(preferences),
    processing_class=AutoTokenizer.from_pretrained(asset("llama-small")),
)
evatune.initialize(trainer)
trainer.train()
trainer.save_model(str(arguments.out / "adapter"))
