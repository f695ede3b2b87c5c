"""What holds for every method that has an adapter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from evatune.errors import ConfigError
from evatune.finetune.methods import METHODS
from evatune.finetune.recipe_files import load
from evatune.finetune.run import run
from tests.finetune.helpers import MethodCase

torch.set_num_threads(1)


ADAPTERS = [name for name, method in METHODS.items() if method.saved_as == "adapter"]
LAYER_TYPES = ["bert", "llama", "gpt2", "dinov2"]


# LoRA-One starts with a step taken.
@pytest.mark.parametrize("kind", LAYER_TYPES)
@pytest.mark.parametrize("method", [name for name in ADAPTERS if name != "lora-one"])
def test_before_training_the_output_is_the_base_models(
    method: str, kind: str, tmp_path: Path
) -> None:
    case = MethodCase(kind)
    if kind == "gpt2" and not METHODS[method].conv1d:
        with pytest.raises(
            ConfigError, match=f"method '{method}' is not right on GPT-2's Conv1D layers"
        ):
            case.adapted(method)
        return
    assert torch.allclose(
        case.logits(case.started(method, tmp_path / "start")), case.logits(case.model()), atol=1e-6
    )


@pytest.mark.parametrize(
    ("method", "rank", "text"),
    [
        (
            "pissa",
            17,
            "needs layers at least 17 wide, and bert.encoder.layer.0.attention.self.query maps "
            "16 to 16",
        ),
        ("milora", 17, "needs layers at least 17 wide"),
        ("lora-ga", 9, "needs layers at least 18 wide"),
        ("mica", 17, "method 'mica' cannot run on this model \\(MiCA requires"),
        ("lora-one", 17, "needs layers at least 17 wide"),
        ("lora-orthogonal", 17, "needs layers at least 17 wide"),
    ],
)
def test_a_rank_that_a_method_cannot_have_is_refused(method: str, rank: int, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        MethodCase("bert").adapted(method, rank=rank)


def test_a_refused_run_leaves_no_folder(bert_folder: Path, tmp_path: Path) -> None:
    recipe = load(
        "understanding-bbc", [f"model={bert_folder}", "method=lora-ga", "adapter.rank=17"]
    )
    with pytest.raises(ConfigError, match="needs layers at least 34 wide"):
        run(recipe, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()
