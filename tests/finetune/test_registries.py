"""A method and a domain of one's own: their hooks and one entry in a registry are enough."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from evatune.adapters.lora_layers import lora_layers
from evatune.errors import ConfigError
from evatune.finetune.methods import METHODS, find_method
from evatune.finetune.methods.base import Lora, Preparation
from evatune.finetune.recipe import TrainingOptions
from evatune.finetune.recipe_tree import parse
from evatune.finetune.run import run
from evatune.finetune.tasks import DOMAINS, Domain, ModelKind, Task, find_domain
from evatune.finetune.tasks.images import tasks as image_tasks
from evatune.finetune.tasks.images.base import ImageTask, balanced

torch.set_num_threads(1)


@dataclass(frozen=True)
class ToyMethod(Lora):
    """LoRA with A all ones, SGD, and a note of every step."""

    def prepare(self, model: Any, preparation: Preparation) -> None:
        for layer in lora_layers(model).values():
            nn.init.ones_(layer.lora_A["default"].weight)

    def optimizer(self, model: nn.Module, training: TrainingOptions) -> Any:
        return torch.optim.SGD(model.parameters(), lr=training.learning_rate)

    def after_step(self, model: nn.Module, step: int) -> None:
        steps.append(step)


steps: list[int] = []


class ToyModel(nn.Module):
    """A linear regression whose loss is part of its output."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 2)
        self.head = nn.Linear(2, 1)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        outputs = self.head(self.linear(x)).squeeze(-1)
        return {"loss": (outputs - labels).square().mean(), "logits": outputs}


MODELS = ModelKind(
    loader="AutoModel",
    demo=lambda recipe: Path("toy"),
    head=lambda model: ["head"],
    new_head=False,
    task_type=None,
    processor=None,
)


def prepare(recipe: Any, max_examples: int | None = None) -> Task:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(recipe.data.train, 4, generator=generator)
    examples = [{"x": x, "labels": x.sum()} for x in inputs]

    def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        return {key: torch.stack([row[key] for row in rows]) for key in ("x", "labels")}

    return Task(
        models=MODELS,
        model=ToyModel(),
        train=examples,
        validation=None,
        test=examples,
        collator=collate,
        head=MODELS.head(None),
        metric=lambda prediction: {"score": 0.5},
    )


def test_a_toy_method_trains_a_task_of_a_toy_domain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "toy", ToyMethod("toy"))
    monkeypatch.setitem(DOMAINS, "sums", Domain("sums", prepare, MODELS, lambda recipe: []))
    steps.clear()
    recipe = parse(
        {
            "domain": "sums",
            "task": "four",
            "method": "toy",
            "data": {"train": 16},
            "adapter": {"rank": 2, "targets": ["linear"]},
            "training": {"steps": 3, "batch_size": 4},
        }
    )
    result = run(recipe, tmp_path / "run", quiet=True)
    assert steps == [0, 1, 2]
    assert result["score"] == 0.5
    assert result["first_gradient_b"] > 0
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").exists()


def test_a_toy_task_of_images_is_drawn_and_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import numpy as np

    def draw(rng: np.random.Generator, label: int) -> Any:
        return np.full((32, 32), 100 * label, np.uint8)

    monkeypatch.setenv("EVATUNE_CACHE", str(tmp_path))
    monkeypatch.setitem(
        image_tasks.TASKS, "shades", ImageTask("shades", 2, lambda: balanced(draw, 2))
    )
    recipe = parse(
        {"domain": "images", "task": "shades", "data": {"train": 8, "test": 4}, "method": "lora"}
    )
    task = find_domain("images").prepare(recipe)
    assert (len(task.train), len(task.test)) == (8, 4)
    for index, label in task.train:
        assert task.train.source.picture(index).getpixel((0, 0)) == 100 * label


def test_names_that_no_registry_has_are_refused_with_those_that_there_are() -> None:
    with pytest.raises(ConfigError, match="domain is 'sums'; choose one of generation, underst"):
        find_domain("sums")
    with pytest.raises(ConfigError, match=r"'lora_ga'; did you mean lora-ga\? `evatune methods`"):
        find_method("lora_ga")
    with pytest.raises(ConfigError, match="method is 'toy'; choose one of lora, "):
        find_method("toy")


def test_every_name_is_that_of_its_entry() -> None:
    assert all(name == method.name for name, method in METHODS.items())
    assert all(name == domain.name for name, domain in DOMAINS.items())
