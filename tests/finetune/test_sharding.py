"""Runs whose weights are in shards from the first step on: two gloo processes on the CPU."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from evatune.errors import ConfigError, MissingExtraError
from evatune.finetune import training
from evatune.finetune.methods import METHODS
from evatune.finetune.recipe import Recipe
from evatune.finetune.run import run
from evatune.finetune.sharding import sharding_arguments
from tests.finetune.helpers import small
from tests.helpers import tiny_bert
from tests.processes import error_of, launched

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed", exc_type=ImportError)
torch.set_num_threads(1)

# DeepSpeed splits every model that a process loads after its first.
_RUNS = {"fsdp2": ("eva", "full"), "zero3": ("eva",)}


def _recipe(model: Path, method: str, *more: str) -> Recipe:
    sizes = ("data.validation=32", "data.test=32")
    return small(model, f"method={method}", *sizes, *more)


def _prepare_for_cpu() -> None:
    """Have accelerate shard on a CPU, which it refuses, and DeepSpeed send without a compiler."""
    import deepspeed
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    deepspeed.ops.__compatible_ops__.clear()
    begin = AcceleratorState.__init__

    def begin_as_if_on_accelerators(self: Any, *arguments: Any, **options: Any) -> None:
        if not AcceleratorState._shared_state:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU
        begin(self, *arguments, **options | {"cpu": False})

    AcceleratorState.__init__ = begin_as_if_on_accelerators


class _Interruption(transformers.TrainerCallback):  # type: ignore[misc]
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 3:
            raise RuntimeError("interrupted")


def _be_interrupted(recipe: Recipe, folder: Path) -> None:
    _prepare_for_cpu()
    training._AfterStep.on_step_end = _Interruption.on_step_end  # type: ignore[method-assign]
    assert error_of(partial(run, recipe, folder, quiet=True))[1] == "interrupted"


def _run_all(recipes: dict[str, Recipe], folder: Path) -> None:
    _prepare_for_cpu()
    found = {name: run(recipe, folder / name, quiet=True) for name, recipe in recipes.items()}
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def alone(
    steady_bert: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[dict[str, Any], Path]]:
    """Method → what a run of one process found, and its folder."""
    folder = tmp_path_factory.mktemp("alone")
    return {
        name: (run(_recipe(steady_bert, name), folder / name, quiet=True), folder / name)
        for name in _RUNS["fsdp2"]
    }


@pytest.mark.parametrize("sharding", _RUNS)
def test_runs_in_shards_end_like_one_process_and_go_on(
    sharding: str,
    alone: dict[str, tuple[dict[str, Any], Path]],
    steady_bert: Path,
    tmp_path: Path,
) -> None:
    recipes = {
        name: _recipe(steady_bert, name, f"training.sharding={sharding}")
        for name in _RUNS[sharding]
    }
    assert launched(_be_interrupted, recipes["eva"], tmp_path / "eva") == [0, 0]
    assert launched(_run_all, recipes, tmp_path) == [0, 0]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert first["eva"]["resumed"]
    for name, found in first.items():
        expected, folder = alone[name]
        assert found["score"] == expected["score"]
        assert found["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-4)
        saved = next(folder.glob("*/*model.safetensors")).relative_to(folder)
        tensors, others = load_file(tmp_path / name / saved), load_file(folder / saved)
        if name == "eva":  # its calibration is in another order, and a rank may differ
            assert tensors.keys() == others.keys()
        else:
            torch.testing.assert_close(tensors, others, rtol=1e-3, atol=1e-4)
            assert found["trainable_parameters"] == expected["trainable_parameters"]


@pytest.mark.parametrize("method", [name for name, one in METHODS.items() if not one.fits_shards])
def test_other_methods_are_refused(method: str, tmp_path: Path) -> None:
    recipe = small("anything", "training.sharding=zero3", f"method={method}")
    with pytest.raises(ConfigError, match=rf"'{method}' cannot run on weights in shards .*full"):
        run(recipe, tmp_path / "run")


def test_weights_of_4_bits_stay_whole(tmp_path: Path) -> None:
    recipe = small("anything", "training.sharding=fsdp2", "adapter.quantize=nf4")
    with pytest.raises(ConfigError, match=r"do not go together, .* leave one of them out"):
        run(recipe, tmp_path / "run")


def test_one_process_and_a_missing_library_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="'fsdp2', and this is one process; start several"):
        sharding_arguments("fsdp2", tiny_bert())
    monkeypatch.setattr("evatune.utils.extras.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'evatune\[deepspeed\]'"):
        run(small("anything", "training.sharding=zero3"), tmp_path / "run")
