"""Lightning: one callback, which runs before optimizers are built. MiniLM learns the topics of BBC
news.

    pip install 'evatune[demo,lightning]'
    python examples/lightning_callback.py

Beside the adapter it saves the calibration: `EvaCallback(Calibration.load(path))` starts a second
run, or every process of one on several GPUs, alike.
"""

import argparse
from pathlib import Path

import lightning.pytorch as pl
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from evatune.loading.corpora import bbc
from evatune.loading.demo import demo_model
from evatune.trainers.lightning import EvaCallback


class Topics(pl.LightningModule):
    """MiniLM with a LoRA adapter and a new head."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        model = AutoModelForSequenceClassification.from_pretrained(
            demo_model(), num_labels=classes
        ).train()
        self.model = get_peft_model(
            model,
            LoraConfig(
                r=8, lora_alpha=8, task_type="SEQ_CLS", target_modules=["query", "value", "dense"]
            ),
        )

    def training_step(self, batch: tuple[torch.Tensor, ...], index: int) -> torch.Tensor:
        """The loss of a batch of token ids, mask and topics."""
        ids, mask, topics = batch
        loss = self.model(input_ids=ids, attention_mask=mask, labels=topics).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Built after the callback's `setup`, so that it holds EVA's parameters."""
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=2e-3)


def main() -> None:
    """Train, and save the adapter as plain PEFT does."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("topics"), help="folder for logs and the adapter"
    )
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()

    pl.seed_everything(0)
    texts, topics = bbc()
    tokenizer = AutoTokenizer.from_pretrained(demo_model())
    tokens = tokenizer(
        texts[::14], max_length=48, truncation=True, padding=True, return_tensors="pt"
    )
    data = torch.utils.data.TensorDataset(
        tokens["input_ids"], tokens["attention_mask"], torch.tensor(topics[::14])
    )

    # Batches are tuples here, and the model wants two of three by name.
    eva = EvaCallback(
        forward=lambda model, batch: model(input_ids=batch[0], attention_mask=batch[1])
    )
    module = Topics(max(topics) + 1)
    trainer = pl.Trainer(
        max_steps=arguments.steps,
        callbacks=[eva],
        default_root_dir=arguments.out,
        enable_checkpointing=False,
        logger=False,
        log_every_n_steps=5,
        enable_model_summary=False,
    )
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=8, shuffle=True))
    module.model.save_pretrained(arguments.out / "adapter")
    eva.calibration.save(arguments.out / "calibration.safetensors")


if __name__ == "__main__":
    main()
