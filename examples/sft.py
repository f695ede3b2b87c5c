"""TRL's SFTTrainer, with a chat template and packing: a small Llama learns to work out word
problems.

    pip install 'evatune[recipes,trl]'
    python examples/sft.py

The Llama comes with evatune's recipes. Loss and calibration look at the same tokens: those of the
answers only.
"""

import argparse
from pathlib import Path

from datasets import Dataset
from peft import EvaConfig, LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import evatune
from evatune.finetune.tasks.generation import arithmetic
from evatune.loading.assets import asset

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument(
    "--out", type=Path, default=Path("sums"), help="folder for checkpoints and the adapter"
)
parser.add_argument("--steps", type=int, default=20)
arguments = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(asset("llama-small"))
tokenizer.chat_template = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% else %}{% generation"
    " %}{{ m['content'] + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
)
problems = [
    {
        "messages": [
            {"role": "user", "content": pair.prompt},
            {"role": "assistant", "content": pair.answer},
        ]
    }
    for pair in arithmetic.examples(800, 0).train
]

trainer = SFTTrainer(
    model=AutoModelForCausalLM.from_pretrained(asset("llama-small"), dtype="float32"),
    args=SFTConfig(
        output_dir=str(arguments.out),
        max_steps=arguments.steps,
        per_device_train_batch_size=4,
        learning_rate=5e-3,
        packing=True,
        max_length=128,
        assistant_only_loss=True,
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=5,
        save_strategy="no",
    ),
    train_dataset=Dataset.from_list(problems),
    processing_class=tokenizer,
    # TRL builds the adapter. EvaConfig's use_label_mask, its default, leaves out tokens without a
    # loss.
    peft_config=LoraConfig(
        r=8,
        lora_alpha=8,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        init_lora_weights="eva",
        eva_config=EvaConfig(),
    ),
)
evatune.initialize(trainer)
trainer.train()
trainer.save_model(str(arguments.out / "adapter"))
