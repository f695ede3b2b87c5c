"""The whole model, the head alone, nothing at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from evatune.errors import ConfigError
from evatune.finetune.methods import METHODS
from evatune.finetune.run import run
from tests.finetune.helpers import MethodCase, small
from tests.helpers import tiny_llama

torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("method", "moved"),
    [("full", ["bert", "classifier"]), ("head", ["classifier"]), ("untouched", [])],
)
def test_a_step_moves_what_the_method_trains_and_nothing_else(
    method: str, moved: list[str], tmp_path: Path
) -> None:
    case = MethodCase("bert")
    before = case.model().state_dict()
    model = case.started(method, tmp_path / "start")
    if moved:
        model(**case.batches[0]).loss.backward()
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.data -= parameter.grad
    changed = {name for name, value in model.state_dict().items() if (value != before[name]).any()}
    assert sorted({name.split(".")[0] for name in changed}) == moved


@pytest.mark.parametrize("method", ["full", "head", "untouched", "lora"])
def test_what_is_saved_is_loaded_onto_the_base_model(method: str, tmp_path: Path) -> None:
    case = MethodCase("bert")
    model = case.started(method, tmp_path / "start")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    METHODS[method].save(model, tmp_path / "saved", tmp_path / "start")
    loaded = METHODS[method].load(case.model(), tmp_path / "saved").eval()
    assert torch.equal(case.logits(loaded), case.logits(model))


def test_a_head_that_shares_the_embeddings_weights_is_refused() -> None:
    case = MethodCase("llama")
    model = tiny_llama()
    model.lm_head.weight = model.model.embed_tokens.weight
    case.model = lambda: model
    with pytest.raises(ConfigError, match="finds no weights of its own in lm_head"):
        case.adapted("head")


def test_only_the_head_learns_with_head_and_all_with_full(
    bert_folder: Path, tmp_path: Path
) -> None:
    short = ["training.steps=1", "training.eval_every=1", "data.train=8", "data.test=8"]
    head, full = (
        run(small(bert_folder, f"method={method}", *short), tmp_path / method, quiet=True)
        for method in ("head", "full")
    )
    assert head["trainable_parameters"] == 32 * 5 + 5
    total = sum(
        p.numel()
        for p in AutoModelForSequenceClassification.from_pretrained(
            bert_folder, num_labels=5
        ).parameters()
    )
    assert full["trainable_parameters"] == total
