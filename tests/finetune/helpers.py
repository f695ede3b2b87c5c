"""Small runs, and tiny models for the tests of methods."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from evatune import initialize
from evatune.cli import main
from evatune.finetune.methods import METHODS, AdapterSetup, Preparation
from evatune.finetune.metrics import read_metrics
from evatune.finetune.recipe import AdapterOptions, Recipe
from evatune.finetune.recipe_files import load
from evatune.finetune.tasks.rl.policy import Windows
from tests.helpers import tiny_bert, tiny_llama, tokens

RANK, ALPHA = 4, 8
SMALL = [
    "data.train=48",
    "data.test=24",
    "training.steps=6",
    "training.batch_size=8",
    "training.log_every=1",
    "training.eval_every=3",
    "training.save_every=2",
    "adapter.rank=4",
]

# To the tiny tokenizer every text is one unknown word over and over: the input of the pooler has
# one direction, which is too few where every layer must keep its rank, and that is its mean.
NARROW_TARGETS = {
    method: ["adapter.targets=[query,key,value]"]
    for method in (
        "eva-rho1",
        "eva-paper-rho1",
        "eva-fa",
        "eva-centered",
        "eva-paper-centered",
        "eva-paper-random",
    )
}


def small(model: Path | str, *more: str) -> Recipe:
    return load("understanding-bbc", [*SMALL, f"model={model}", *more])


def command_line(folder: str, *arguments: str) -> None:
    """Be the command line with these arguments; what it prints is in two files of the folder."""
    torch.set_num_threads(1)
    for stream, name in ((sys.stdout, "printed"), (sys.stderr, "errors")):
        with Path(folder, name).open("w") as file:
            os.dup2(file.fileno(), stream.fileno())
    sys.argv = ["evatune", *arguments]
    main()


def evaluations(folder: Path) -> dict[int, float]:
    """Step → evaluation loss; each step is evaluated once."""
    lines = [line for line in read_metrics(folder) if "eval_loss" in line]
    found = {line["step"]: line["eval_loss"] for line in lines}
    assert len(found) == len(lines)
    return found


class MethodCase:
    """A tiny model of one kind, with labeled batches."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.targets: str | list[str] = (
            ["c_attn", "c_proj", "c_fc"] if kind == "gpt2" else "all-linear"
        )
        self.task_type = {
            "bert": "SEQ_CLS",
            "llama": "CAUSAL_LM",
            "gpt2": "CAUSAL_LM",
            "dinov2": None,
        }[kind]
        generator = torch.Generator().manual_seed(0)
        classes = torch.tensor([0, 1, 2, 0])
        if kind == "dinov2":
            images = [torch.randn(4, 3, 28, 28, generator=generator) for _ in range(4)]
            self.batches: list[dict[str, Tensor]] = [
                {"pixel_values": x, "labels": classes} for x in images
            ]
        else:
            self.batches = [
                batch | {"labels": classes if kind == "bert" else batch["input_ids"]}
                for batch in tokens(4)
            ]

    def model(self) -> Any:
        torch.manual_seed(0)
        if self.kind == "bert":
            return tiny_bert("classification", num_labels=3)
        if self.kind == "llama":
            return tiny_llama()
        if self.kind == "gpt2":
            config = transformers.GPT2Config(
                vocab_size=60, n_embd=16, n_layer=2, n_head=2, n_positions=64
            )
            return transformers.GPT2LMHeadModel(config).eval()
        config = transformers.Dinov2Config(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
            mlp_ratio=2,
            num_labels=3,
        )
        return transformers.Dinov2ForImageClassification(config).eval()

    def of(self, size: int) -> Iterator[dict[str, Tensor]]:
        whole = {key: torch.cat([batch[key] for batch in self.batches]) for key in self.batches[0]}
        for at in range(0, len(whole["labels"]), size):
            yield {key: value[at : at + size] for key, value in whole.items()}

    def adapted(self, method: str, rank: int = RANK, targets: Any = None) -> Any:
        head = self.kind in ("bert", "dinov2")
        setup = AdapterSetup(
            adapter=AdapterOptions(rank=rank, alpha=ALPHA, targets=targets or self.targets),
            task_type=self.task_type,
            head=["classifier"] if head else ["lm_head"],
            new_head=head,
            steps=20,
        )
        return METHODS[method].adapt(self.model(), setup)

    def started(self, method: str, start: Path, **options: Any) -> Any:
        model = self.adapted(method, **options)
        return self.prepared(model, method, start)

    def prepared(self, model: Any, method: str, start: Path) -> Any:
        self.prepare(
            model, method, start, lambda **options: initialize(model, self.batches, **options)
        )
        return model.eval()

    def prepare(
        self, model: Any, method: str, start: Path, initialize: Any = None, batches: Any = None
    ) -> None:
        preparation = Preparation(
            initialize=initialize or (lambda **_: None),
            initialize_elsewhere=initialize or (lambda **_: None),
            batches=batches or self.of,
            seed=0,
            initial_adapter=start,
            options={"rho": 2},
        )
        METHODS[method].prepare(model, preparation)

    @torch.no_grad()
    def logits(self, model: Any) -> Tensor:
        batch = {key: value for key, value in self.batches[0].items() if key != "labels"}
        return model(**batch).logits


class PlantedGradient:
    """A model of one layer, (4 inputs, 16 outputs), whose mean gradient over two batches is known.

    It has 8 at (output 5, input 0), 4 at (9, 1), -2 at (3, 2) and 0.5 at (7, 3), else zeros.
    """

    def __init__(self, *, conv1d: bool) -> None:
        self.model = _Planted(conv1d)
        weight = self.model.layer.weight.detach().clone()
        self.weight = weight.T if conv1d else weight  # (16, 4)
        # By themselves the batches have other orders.
        self.batches = [
            {"x": torch.eye(4), "g": torch.zeros(4, 16)},
            {"x": torch.eye(4), "g": torch.zeros(4, 16)},
        ]
        for batch, entries in zip(
            self.batches, [(2.0, 6.0, -3.0, 1.0), (14.0, 2.0, -1.0, 0.0)], strict=True
        ):
            for i, (output, entry) in enumerate(zip((5, 9, 3, 7), entries, strict=True)):
                batch["g"][i, output] = entry

    def started(self, method: str, *, rank: int, alpha: float, start: Path) -> Any:
        """Return the LoRA layer as the method starts it."""
        setup = AdapterSetup(
            adapter=AdapterOptions(rank=rank, alpha=alpha, targets=["layer"]),
            task_type=None,
            head=[],
            new_head=False,
            steps=20,
        )
        model = METHODS[method].adapt(self.model, setup)
        preparation = Preparation(
            initialize=lambda **_: None,
            initialize_elsewhere=lambda **_: None,
            batches=lambda size: self.batches,
            seed=0,
            initial_adapter=start,
            options={"rho": 2},
        )
        METHODS[method].prepare(model, preparation)
        return model.base_model.model.layer


class _Planted(torch.nn.Module):
    """The loss is linear in the output: the gradient of the weight is Σ g xᵀ."""

    def __init__(self, conv1d: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = (
            transformers.pytorch_utils.Conv1D(16, 4)
            if conv1d
            else torch.nn.Linear(4, 16, bias=False)
        )

    def forward(self, x: Tensor, g: Tensor) -> dict[str, Tensor]:
        return {"loss": (self.layer(x) * g).sum()}


SMALL_GENERATION = [
    "data.train=64",
    "data.test=20",
    "training.steps=4",
    "training.batch_size=8",
    "training.eval_every=4",
    "training.log_every=1",
]
SMALL_IMAGES = [
    "data.train=48",
    "data.validation=8",
    "data.test=24",
    "training.steps=4",
    "training.batch_size=8",
    "training.log_every=1",
    "training.eval_every=2",
    "adapter.rank=4",
]
SMALL_RL = [
    "data.train=2",
    "data.test=1",
    "data.max_length=4",
    "data.episodes=2",
    "training.steps=4",
    "training.batch_size=8",
    "training.log_every=1",
    "training.eval_every=2",
    "adapter.rank=2",
]


def small_generation(task: str, *more: str) -> Recipe:
    return load(f"generation-{task}", [*SMALL_GENERATION, *more])


def small_images(task: str, *more: str) -> Recipe:
    return load(f"images-{task}", [*SMALL_IMAGES, *more])


def small_rl(model: Path | str, *more: str) -> Recipe:
    return load("rl-push", ["task=faucet-close", *SMALL_RL, f"model={model}", *more])


def planted_episodes(*lengths: int) -> dict[str, torch.Tensor]:
    """Episodes in which every number occurs once."""
    steps = sum(lengths)
    sizes = {"states": 39, "actions": 4, "labels": 4}
    values = {
        key: torch.arange(steps * d, dtype=torch.float32).reshape(steps, d) + 1
        for key, d in sizes.items()
    }
    return values | {"lengths": torch.tensor(lengths)}


def batch_of(windows: Windows, *steps: int) -> dict[str, torch.Tensor]:
    return dict(transformers.default_data_collator([windows[step] for step in steps]))
