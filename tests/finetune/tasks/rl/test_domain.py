"""Decision Transformers on Meta-World: runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel

from evatune.errors import ConfigError, EvatuneError, MissingExtraError
from evatune.finetune.comparison.grid import grid
from evatune.finetune.comparison.summary import summarize
from evatune.finetune.metrics import read_metrics
from evatune.finetune.run import run
from evatune.finetune.tasks import rl
from tests.finetune.helpers import batch_of
from tests.finetune.helpers import small_rl as small

torch.set_num_threads(1)
# Where MuJoCo cannot draw, its half-made objects complain when they are collected.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <function"
    " (GLContext|Renderer).__del__:pytest.PytestUnraisableExceptionWarning"
)


@pytest.mark.usefixtures("no_drawing")  # which takes most of the time
def test_equal_seeds_give_equal_runs_and_eva_starts_where_lora_starts(
    small_folder: Path, tmp_path: Path
) -> None:
    def of(name: str, method: str) -> tuple[dict[str, Any], list[float]]:
        result = run(small(small_folder, f"method={method}"), tmp_path / name, quiet=True)
        return result, [
            line["eval_loss"] for line in read_metrics(tmp_path / name) if "eval_loss" in line
        ]

    (first, losses), (second, again), (_, lora) = of("a", "eva"), of("b", "eva"), of("c", "lora")
    assert losses == again
    assert losses[0] == pytest.approx(lora[0], abs=1e-6)
    assert losses[-1] != lora[-1]
    for key in ("score", "eval_loss", "measures"):
        assert first[key] == second[key]


@pytest.mark.usefixtures("no_drawing")  # which takes most of the time
@pytest.mark.parametrize("method", ["lora", "eva", "pissa"])
def test_a_saved_adapter_gives_its_loss_on_the_plain_model_by_plain_peft(
    method: str, small_folder: Path, tmp_path: Path
) -> None:
    recipe = small(
        small_folder, f"method={method}", "training.learning_rate=0.01", "data.episodes=1"
    )
    result = run(recipe, tmp_path / "run", quiet=True)
    base = transformers.DecisionTransformerModel.from_pretrained(small_folder)
    model = PeftModel.from_pretrained(base, str(tmp_path / "run" / "adapter")).eval()
    test = rl.prepare(recipe).test
    squares, count = 0.0, 0
    # as Trainer does: the mean over batches, weighted by their windows
    for start in range(0, len(test), 32):
        batch = batch_of(test, *range(start, min(start + 32, len(test))))
        labels = batch.pop("labels")
        real = batch["attention_mask"].bool()
        with torch.no_grad():
            error = (model(**batch).action_preds - labels)[real].square().mean().item()
        squares, count = squares + error * len(real), count + len(real)
    assert squares / count == pytest.approx(result["eval_loss"], abs=1e-5)


@pytest.mark.usefixtures("no_drawing")  # which takes most of the time
def test_the_method_head_trains_the_action_layer_and_saves_an_ordinary_model(
    small_folder: Path, tmp_path: Path
) -> None:
    result = run(
        small(small_folder, "method=head", "data.episodes=1"), tmp_path / "run", quiet=True
    )
    assert result["trainable_parameters"] == 32 * 4 + 4
    before = transformers.AutoModel.from_pretrained(small_folder).state_dict()
    after = transformers.AutoModel.from_pretrained(tmp_path / "run" / "model")
    assert type(after) is transformers.DecisionTransformerModel
    changed = {
        key for key, value in after.state_dict().items() if not torch.equal(value, before[key])
    }
    assert changed == {"predict_action.0.weight", "predict_action.0.bias"}


@pytest.mark.usefixtures("no_drawing")  # which takes most of the time
def test_a_comparison_takes_a_score_that_is_known_at_the_end_only(
    small_folder: Path, tmp_path: Path
) -> None:
    cells = grid([small(small_folder, "data.episodes=1")], ["untouched", "lora"], [0], [], tmp_path)
    for cell in cells:
        run(cell.recipe, cell.folder, quiet=True)
    lines = {line.method: line for line in summarize(cells).lines}
    assert [point[2] for point in lines["lora"].curve] == [None, None, lines["lora"].score.mean]
    assert [point[2] for point in lines["untouched"].curve] == [lines["untouched"].score.mean]
    json.dumps([line.curve for line in lines.values()], allow_nan=False)


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("task=juggle", "task is 'juggle'; tasks of reinforcement learning are hammer, push-wall"),
        ("data.episodes=0", "data.episodes is 0: input should be greater than or equal to 1"),
        ("data.max_length=17", "data.max_length is 17 steps, but this model sees 16 at most"),
        ("model=./nowhere", "model './nowhere' does not exist"),
        ("adapter.targets=[q_proj]", "match no layer of this model"),
        ("method=olora", "method 'olora' is not right on GPT-2's Conv1D layers"),
    ],
)
def test_a_mistake_has_one_sentence_and_leaves_no_folder(
    override: str, text: str, small_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(EvatuneError, match=text):
        run(small(small_folder, override), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_another_kind_of_model_is_refused(bert_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError,
        match="no Decision Transformer with state_dim 39 and act_dim 4 \\(it is bert with",
    ):
        run(small(bert_folder), tmp_path / "run", quiet=True)


def test_without_meta_world_the_extra_is_named(
    small_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "metaworld", None)
    with pytest.raises(MissingExtraError, match="pip install 'evatune\\[rl\\]'"):
        run(small(small_folder), tmp_path / "run", quiet=True)
