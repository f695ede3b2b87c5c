"""Bases of 4 bits below an adapter."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel

from evatune.errors import ConfigError, MissingExtraError
from evatune.finetune.methods import METHODS
from evatune.finetune.recipe import AdapterOptions, Recipe
from evatune.finetune.run import run
from evatune.finetune.tasks.quantization import keep_trainable, quantized
from tests.conftest import save_model
from tests.finetune.helpers import MethodCase, small, small_generation, small_rl
from tests.helpers import tiny_llama

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed", exc_type=ImportError)
torch.set_num_threads(1)

NF4 = "adapter.quantize=nf4"
OPTIONS = Recipe(task="any", adapter=AdapterOptions(quantize="nf4"))


class _QuantizedCase(MethodCase):
    def __init__(self, folder: Path) -> None:
        super().__init__("llama")
        self._folder = folder

    def model(self) -> Any:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            self._folder, dtype=torch.float32, **quantized(OPTIONS)
        )
        keep_trainable(model)
        return model


@pytest.mark.parametrize("name", [name for name, one in METHODS.items() if one.fits_quantized])
def test_methods_start_above_4_bits_and_leave_them_as_they_are(
    name: str, llama_folder: Path, tmp_path: Path
) -> None:
    case = _QuantizedCase(llama_folder)
    model = case.started(name, tmp_path / "start")
    base = [module for name, module in model.named_modules() if name.endswith(".base_layer")]
    assert [type(layer).__name__ for layer in base] == ["Linear4bit"] * 14
    torch.testing.assert_close(case.logits(model), case.logits(case.model()), rtol=1e-4, atol=1e-5)
    loss = model(**case.batches[0]).loss
    loss.backward()
    trained = [p for name, p in model.named_parameters() if "lora_B" in name and p.requires_grad]
    assert all(torch.isfinite(parameter.grad).all() for parameter in trained)


def test_an_evaluation_leaves_weights_that_gradients_go_through(llama_folder: Path) -> None:
    model = _QuantizedCase(llama_folder).model().eval()
    embeddings = model.get_input_embeddings().weight.requires_grad_(True)
    batch = torch.arange(3, 10)[None]
    with torch.no_grad():
        model(batch)
    model(batch).logits.sum().backward()
    assert embeddings.grad.norm() > 0


@pytest.fixture
def wide_folder(tmp_path: Path) -> Path:
    """A model as wide as a block of weights, which bitsandbytes packs on a CPU with AVX512."""
    return save_model(tiny_llama(hidden_size=64, intermediate_size=64), tmp_path / "wide")


def test_a_run_is_read_by_plain_peft(wide_folder: Path, tmp_path: Path) -> None:
    recipe = small_generation(
        "clock",
        NF4,
        "method=lora",
        f"model={wide_folder}",
        "training.gradient_checkpointing=true",
    )
    result = run(recipe, tmp_path / "run", quiet=True)
    base = transformers.AutoModelForCausalLM.from_pretrained(wide_folder, **quantized(recipe))
    model = PeftModel.from_pretrained(base, str(tmp_path / "run" / "adapter")).eval()
    assert result["first_gradient_b"] > 0
    assert model(torch.arange(3, 10)[None]).logits.isfinite().all()
    plain = replace(recipe, training=replace(recipe.training, gradient_checkpointing=False))
    again = run(plain, tmp_path / "plain", quiet=True)
    assert again["eval_loss"] == pytest.approx(result["eval_loss"], rel=1e-5)


@pytest.mark.parametrize(
    "method", [name for name, one in METHODS.items() if not one.fits_quantized]
)
def test_other_methods_are_refused(method: str, tmp_path: Path) -> None:
    recipe = small("anything", NF4, f"method={method}")
    with pytest.raises(ConfigError, match=rf"'{method}' cannot run above a base of 4 bits .*lora"):
        run(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("setting", [NF4, "training.sharding=fsdp2"])
def test_policies_are_neither_quantized_nor_in_shards(setting: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="which policies are too small for"):
        run(small_rl("anything", setting), tmp_path / "run")


def test_without_bitsandbytes_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr("evatune.utils.extras.find_spec", lambda name: None)
    advice = r"^bitsandbytes is not .* pip install 'evatune\[quantized\]'$"
    with pytest.raises(MissingExtraError, match=advice):
        run(small_generation("clock", NF4), tmp_path / "run")
