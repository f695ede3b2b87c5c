"""Model folders with Python code of their own: it runs where the user says so, and nowhere else."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers
from safetensors.torch import load_file, save_file

from evatune.errors import ConfigError, DataError
from evatune.finetune.recipe_files import load
from evatune.finetune.recipe_tree import as_tree, parse
from evatune.finetune.tasks import DOMAINS, understanding
from evatune.finetune.tasks.rl import simulator
from evatune.loading.models import read_model
from tests.conftest import Command, refused

CODE = """
import pathlib, transformers
pathlib.Path({marker!r}).write_text("ran")

class OurConfig(transformers.BertConfig):
    model_type = "ours"

class OurModel(transformers.BertModel):
    config_class = OurConfig

class OurClassifier(transformers.BertForSequenceClassification):
    config_class = OurConfig
"""


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "ran"


@pytest.fixture
def foreign(
    tmp_path: Path, bert_folder: Path, marker: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """A model whose architecture is in its own folder, and a user who says yes to whatever is
    asked."""
    folder = tmp_path / "foreign"
    shutil.copytree(bert_folder, folder)
    (folder / "ours.py").write_text(CODE.format(marker=str(marker)))
    config = json.loads((folder / "config.json").read_text())
    classes = {
        "AutoConfig": "OurConfig",
        "AutoModel": "OurModel",
        "AutoModelForSequenceClassification": "OurClassifier",
        "AutoModelForCausalLM": "OurModel",
        "AutoModelForImageClassification": "OurModel",
    }
    config |= {
        "model_type": "ours",
        "auto_map": {auto: f"ours.{name}" for auto, name in classes.items()},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"auto_map": {"AutoImageProcessor": "ours.OurProcessor"}})
    )
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 100))
    monkeypatch.setattr(
        transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    before = list(sys.path)
    yield folder
    sys.path[:] = before
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
        del sys.modules[name]


@pytest.fixture
def adapter(tmp_path: Path, foreign: Path) -> Path:
    """An adapter that names such a base."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    config = {
        "peft_type": "LORA",
        "r": 1,
        "target_modules": ["query"],
        "base_model_name_or_path": str(foreign),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    weights = load_file(foreign / "model.safetensors")
    state = {}
    for name, weight in weights.items():
        if name.endswith("query.weight"):
            layer = f"base_model.model.{name.removesuffix('.weight')}"
            state[f"{layer}.lora_A.weight"], state[f"{layer}.lora_B.weight"] = (
                weight[:1].clone(),
                weight[:, :1].clone(),
            )
    save_file(state, folder / "adapter_model.safetensors")
    return folder


def test_no_command_runs_the_code_of_a_model_unasked(
    command: Command, foreign: Path, adapter: Path, marker: Path, text_file: Path, tmp_path: Path
) -> None:
    parts = str(foreign), "Python code of its own", "--trust-remote-code"
    out = tmp_path / "out"
    refused(command("init", "--model", foreign, "--data", text_file, "--out", out), *parts)
    refused(command("export", adapter, "--format", "merged", "-o", out), "base model of", *parts)
    refused(
        command(
            "train",
            "understanding-bbc",
            f"model={foreign}",
            "data.train=8",
            "data.test=8",
            "--out",
            out,
        ),
        *parts,
    )
    assert not marker.exists()
    assert not out.exists()


@pytest.mark.parametrize(
    ("domain", "task"),
    [
        ("generation", "arithmetic"),
        ("images", "orientation"),
        ("understanding", "bbc"),
        ("rl", "push"),
    ],
)
def test_no_domain_runs_the_code_of_a_model_unasked(
    domain: str, task: str, foreign: Path, marker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simulator, "load_metaworld", lambda: None)
    recipe = parse({"task": task, "model": str(foreign), "data": {"train": 8, "test": 8}})
    with pytest.raises(DataError, match="--trust-remote-code"):
        DOMAINS[domain].prepare(recipe)
    assert not marker.exists()


def test_code_that_is_trusted_runs(
    command: Command, foreign: Path, adapter: Path, marker: Path, text_file: Path, tmp_path: Path
) -> None:
    arguments = (
        "--rank",
        "2",
        "--max-batches",
        "1",
        "--trust-remote-code",
        "--out",
        tmp_path / "out",
    )
    assert command("init", "--model", foreign, "--data", text_file, *arguments).status == 0
    assert marker.exists()
    merged = tmp_path / "merged"
    assert (
        command("export", adapter, "--format", "merged", "-o", merged, "--trust-remote-code").status
        == 0
    )
    name = "encoder.layer.0.attention.self.query.weight"
    before, after = (load_file(folder / "model.safetensors")[name] for folder in (foreign, merged))
    assert not before.equal(after)
    assert type(read_model(merged, trust_remote_code=True).model).__name__ == "OurModel"
    recipe = load(
        "understanding-bbc",
        [f"model={foreign}", "data.train=8", "data.test=8", "trust_remote_code=true"],
    )
    assert type(understanding.prepare(recipe).model).__name__ == "OurClassifier"


def test_a_recipe_file_cannot_allow_foreign_code(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("task: bbc\ntrust_remote_code: true\n")
    with pytest.raises(ConfigError, match=r"only the command line can: .*--trust-remote-code"):
        load(str(file))
    assert "trust_remote_code" not in as_tree(load("understanding-bbc"))
    trusted = load("understanding-bbc", ["trust_remote_code=true"])
    assert parse(as_tree(trusted)) == trusted
