"""Pre-trains a Decision Transformer on tasks of Meta-World other than CW10, and writes
assets/src/evatune_assets/dt-metaworld.

    python scripts/pretrain/dt_metaworld.py

About 15 minutes on one core. Started again, it goes on from its last checkpoint.
"""

from __future__ import annotations

import torch
import transformers
from common import train, write_asset
from torch import Tensor
from torch.utils.data import DataLoader

from evatune.finetune.tasks.rl.demonstrations import demonstrations
from evatune.finetune.tasks.rl.playing import play
from evatune.finetune.tasks.rl.policy import Imitator, PolicySize, Windows, new_policy
from evatune.finetune.tasks.rl.simulator import CW10, TEST, TRAIN

NAME, SEED = "dt-metaworld", 0
PRETRAINING = (
    "reach",
    "reach-wall",
    "button-press",
    "button-press-topdown",
    "coffee-button",
    "coffee-push",
    "coffee-pull",
    "dial-turn",
    "door-close",
    "door-unlock",
    "drawer-open",
    "drawer-close",
    "faucet-open",
    "handle-press",
    "handle-pull-side",
    "hand-insert",
    "lever-pull",
    "pick-place",
    "plate-slide",
    "soccer",
    "stick-push",
    "sweep-into",
    "window-open",
    "peg-insert-side",
)
JUDGED = ("reach", "button-press", "door-close", "drawer-open", "plate-slide", "sweep-into")
EPISODES, HELD_OUT, LENGTH = 40, 4, 10
# of a number in the state: some never change in these tasks, and do in others
SMALLEST_DEVIATION = 0.05


def load(purpose: int, count: int) -> dict[str, Tensor]:
    parts = [demonstrations(task, purpose, count) for task in PRETRAINING]
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


@torch.no_grad()
def fold(model: Imitator, mean: Tensor, deviation: Tensor) -> None:
    """From a model of standardised states to the same function of states as the simulator gives
    them."""
    layer = model.embed_state
    layer.weight /= deviation
    layer.bias -= layer.weight @ mean


@torch.no_grad()
def error(model: Imitator, windows: Windows) -> float:
    batches = DataLoader(windows, batch_size=256)
    counts = [int(batch["attention_mask"].sum()) for batch in batches]
    losses = [float(model(**batch).loss) for batch in batches]
    return sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)


def main() -> None:
    assert not set(PRETRAINING) & set(CW10)
    torch.set_num_threads(1)
    transformers.set_seed(SEED)
    model = new_policy(PolicySize(width=128, layers=4, heads=4, steps=32))
    data, unseen = load(TRAIN, EPISODES), load(TEST, HELD_OUT)
    mean, deviation = data["states"].mean(0), data["states"].std(0).clamp(min=SMALLEST_DEVIATION)
    train_set, test_set = (
        Windows(part | {"states": (part["states"] - mean) / deviation}, LENGTH)
        for part in (data, unseen)
    )
    trainer = train(
        model,
        train_set,
        test_set,
        transformers.default_data_collator,
        name=NAME,
        seed=SEED,
        max_steps=3000,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=200,
        weight_decay=0.01,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=256,
        eval_strategy="steps",
        eval_steps=1500,
        logging_steps=100,
    )
    trained = trainer.model.eval()
    fold(trained, mean, deviation)
    trained.half().float()  # as it will be stored
    mse = error(trained, Windows(unseen, LENGTH))
    success = [
        play(trained, "test", None, tasks=[task], episodes=10, length=LENGTH)["success"]
        for task in JUDGED
    ]
    told = ", ".join(f"{task} {share:.0%}" for task, share in zip(JUDGED, success, strict=True))
    plain = transformers.DecisionTransformerModel(trained.config)
    plain.load_state_dict(trained.state_dict())
    write_asset(
        plain,
        NAME,
        seed=SEED,
        title="A Decision Transformer for Meta-World",
        data=(
            f"{EPISODES} successful episodes of Meta-World's scripted experts on each of"
            f" {', '.join(PRETRAINING)}; none of CW10's tasks. Windows of 10 steps; states as the"
            " simulator gives them, return to go 1"
        ),
        score=(
            f"mean squared error of actions {mse:.4f} on {HELD_OUT} unseen episodes per task;"
            f" success in 10 episodes with unseen goals: {told}"
        ),
    )


if __name__ == "__main__":
    main()
