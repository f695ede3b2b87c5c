"""Every recipe of the paper's, from end to end: stand-ins of its model and its data, two steps.

A trial evaluates, saves, reads the result with plain PEFT and compares the outputs.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from evatune.finetune.check.trial import try_recipe
from evatune.finetune.recipe_files import bundled_recipes, load
from evatune.finetune.tasks import find_domain
from evatune.finetune.tasks.generation.question_sets import SETS
from evatune.finetune.tasks.images.vtab import VTAB
from evatune.finetune.tasks.rl.policy import PolicySize, new_policy
from tests.finetune.paper_data import (
    rows,
    save_episodes,
    save_glue,
    save_mathematics,
    save_set,
    save_stand_in,
    save_vtab,
)

torch.set_num_threads(1)
pytestmark = [
    # PEFT's advice on merging; the paper adapts lm_head, whose weight Gemma's embedding shares.
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
]

PAPER = [name for name in bundled_recipes() if name.startswith("paper-")]
TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
# What a task's own measures are, beside its score and loss.
MEASURES = {
    "glue-cola": {"accuracy", "f1"},
    "glue-mrpc": {"f1"},
    "glue-qqp": {"f1"},
    "glue-stsb": {"spearman"},
    "glue-mnli": {"validation_mismatched_score"},
    "commonsense-hub": set(SETS),
    "mathematics-hub": {"gsm8k", "math"},
}
Models = Callable[[str], Path]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Name → folder of a stand-in, made the first time."""
    folder = tmp_path_factory.mktemp("paper")

    def made(name: str) -> Path:
        place = folder / name
        return place if place.exists() else save_stand_in(name, place)

    return made


def settings_of(name: str, models: Models, folder: Path) -> list[str]:
    """Return what points a recipe to stand-ins of its model and its data."""
    family, _, task = name.removeprefix("paper-").partition("-")
    if family == "glue":
        source, model = save_glue(folder, task), models("deberta" if task == "mnli" else "roberta")
    elif family == "vtab":
        save_vtab(folder / "vtab-1k", load(name).task, 8)
        source, model = folder / "vtab-1k", models("dinov2")
    elif name == "paper-commonsense":
        for one, questions in SETS.items():
            save_set(folder, one, {"train": rows(one), questions.tested_on: rows(one, 4)})
        source, model = folder, models("gemma2")
    elif name == "paper-metamath":
        source, model = save_mathematics(folder), models("llama3")
    else:
        source, model = folder / "chats.jsonl", models("gemma2")
        answer = {"role": "assistant", "content": "w2 w3"}
        chats = [[{"role": "user", "content": f"w{n}"}, answer] * 2 for n in range(24)]
        source.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
        (folder / "chat.jinja").write_text(TEMPLATE)
    settings = [f"data.source={source}", f"model={model}", "training.precision=float32"]
    if family == "glue":
        settings += ["data.train=16", "data.test=8"]
    if name == "paper-code":
        settings += [f"data.chat_template={folder / 'chat.jinja'}", "data.test=4"]
    if load(name).data.validation:
        settings.append("data.validation=4")
    return settings


@pytest.mark.parametrize("name", [name for name in PAPER if load(name).domain != "rl"])
def test_a_recipe_runs_on_stand_ins(
    name: str, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = load(name).task
    if task in VTAB:
        monkeypatch.setitem(VTAB, task, replace(VTAB[task], test=8))
    trial = try_recipe(load(name, settings_of(name, models, tmp_path)))
    assert trial.difference is not None
    assert trial.difference < 1e-5
    assert MEASURES.get(task, set()) <= trial.result["measures"].keys()
    assert trial.result["first_gradient_b"] > 0


@pytest.mark.parametrize("name", [name for name in PAPER if name.startswith("paper-cw10-")])
def test_a_policy_reads_its_tasks_episodes(name: str, tmp_path: Path) -> None:
    recipe = load(name)
    save_episodes(tmp_path, recipe.task)
    new_policy(PolicySize(width=16, layers=1, heads=2, steps=50, dropout=0.2)).save_pretrained(
        tmp_path / "policy"
    )
    sizes = ["data.train=2", "data.validation=1", "data.test=1"]
    here = [f"data.source={tmp_path}", f"model={tmp_path / 'policy'}"]
    task = find_domain("rl").prepare(load(name, [*here, *sizes]))
    assert task.train[0]["states"].shape == (50, 39)
    assert (task.score_name, task.episodes) == ("share of the episodes that succeed", 100)
