"""Pre-train the small vision transformer of the images recipes: which letter, in which font, where
and how.

    python scripts/pretrain/vit_glyphs.py

About 15 minutes on one core; the same command again goes on after an interruption. Letters only, in
DejaVu fonts only: no digits, no plain shapes, and none of the fonts of the task of recognising
fonts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import transformers
from common import train, write_asset
from PIL import Image
from torch import Tensor

from evatune.finetune.tasks.images.drawing import LETTERS, PRETRAINING_FONTS, SIDE, letter

SEED, STEPS, BATCH, HELD_OUT = 0, 2400, 64, 2000
GEOMETRY = ["right", "down", "height", "turn"]
NAMES = [*LETTERS, *PRETRAINING_FONTS, *GEOMETRY]
PARTS = [len(LETTERS), len(PRETRAINING_FONTS), len(GEOMETRY)]  # of the outputs
GEOMETRY_WEIGHT = 10  # of its squared error, which is small beside the two cross-entropies


class Glyphs(torch.utils.data.Dataset[tuple[Image.Image, list[float]]]):
    """Image i is a function of the seed and i; it is drawn when it is asked for."""

    def __init__(self, seed: int, count: int) -> None:
        self.seed, self.count = seed, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> tuple[Image.Image, list[float]]:
        rng = np.random.default_rng([self.seed, i])
        which, font = int(rng.integers(len(LETTERS))), int(rng.integers(len(PRETRAINING_FONTS)))
        # From easy to hard: of hard images alone a transformer without convolutions learns nothing
        # for thousands of steps.
        hard = rng.random()
        image, geometry = letter(
            rng,
            LETTERS[which],
            PRETRAINING_FONTS[font],
            sizes=(int(30 - 14 * hard), 32),
            tilt=30 * hard,
            spread=hard,
            clear=1 - hard,
        )
        return Image.fromarray(image), [which, font, *geometry]


class Questions(transformers.Dinov2ForImageClassification):  # type: ignore[misc]
    """The outputs answer for the letter, the font and the geometry."""

    # labels: (batch, 6)
    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = super().forward(pixel_values).logits
        if labels is None:
            return {"logits": logits}
        which, font, geometry = torch.split(logits, PARTS, dim=-1)
        loss = torch.nn.functional.cross_entropy(which, labels[:, 0].long())
        loss = loss + torch.nn.functional.cross_entropy(font, labels[:, 1].long())
        return {
            "loss": loss + GEOMETRY_WEIGHT * torch.nn.functional.mse_loss(geometry, labels[:, 2:]),
            "logits": logits,
        }

    def save_pretrained(self, folder: Any, **options: Any) -> None:
        # Trainer resumes from the names that the modules have now, not from those of DINOv2's first
        # checkpoints.
        super().save_pretrained(folder, **options, save_original_format=False)


def main() -> None:
    torch.set_num_threads(1)
    transformers.set_seed(SEED)
    config = transformers.Dinov2Config(
        image_size=SIDE,
        patch_size=8,
        hidden_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        mlp_ratio=4,
        id2label=dict(enumerate(NAMES)),
        label2id={name: i for i, name in enumerate(NAMES)},
    )
    model = Questions(config)
    # transformers starts them at 0.02, far below the patches (0.4), and then place is not learnt in
    # thousands of steps.
    torch.nn.init.normal_(model.dinov2.embeddings.position_embeddings, std=0.5)
    processor = transformers.BitImageProcessorPil(
        size={"height": SIDE, "width": SIDE},
        do_center_crop=False,
        image_mean=[0.5] * 3,
        image_std=[0.25] * 3,
    )

    def collate(examples: list[tuple[Image.Image, list[float]]]) -> dict[str, Any]:
        images, labels = zip(*examples, strict=True)
        return {**processor(list(images), return_tensors="pt"), "labels": torch.tensor(labels)}

    held_out = Glyphs(SEED + 1, HELD_OUT)
    trainer = train(
        model,
        Glyphs(SEED, STEPS * BATCH),
        held_out,
        collate,
        name="vit-glyphs",
        seed=SEED,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=200,
        max_steps=STEPS,
        learning_rate=1.5e-3,
        warmup_steps=100,
        lr_scheduler_type="cosine",
        weight_decay=0.05,
        logging_steps=50,
    )
    found = trainer.predict(held_out)
    labels = torch.from_numpy(found.label_ids)
    which, font, geometry = torch.split(torch.from_numpy(found.predictions), PARTS, dim=-1)
    right = [
        float((part.argmax(-1) == labels[:, i]).float().mean())
        for i, part in enumerate((which, font))
    ]
    error = SIDE / 2 * float((geometry - labels[:, 2:])[:, :2].abs().mean())
    plain = transformers.Dinov2ForImageClassification(config)
    plain.load_state_dict(model.state_dict())
    write_asset(
        plain,
        "vit-glyphs",
        seed=SEED,
        tokenizer=processor,
        title=(
            "vit-glyphs: a small vision transformer (DINOv2's architecture) that reads drawn"
            " letters"
        ),
        data=(
            f"{STEPS * BATCH:,} drawn images of one letter (A–Z, a–z) in one of {PARTS[1]} DejaVu"
            " fonts, with random place, size, tilt, ground, lines and noise; no digits, no plain"
            " shapes, no other fonts; asked for letter, font, place, height and turn"
        ),
        score=(
            f"accuracy {right[0]:.1%} for the letter ({PARTS[0]}), {right[1]:.1%} for the font"
            f" ({PARTS[1]}), place within {error:.1f} pixels on average; {HELD_OUT:,} images"
        ),
    )


if __name__ == "__main__":
    main()
