"""Eight sets of questions on a stand-in: their columns and splits, and a tiny Gemma 2."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers
from peft import PeftModel

from evatune.errors import ConfigError, DataError
from evatune.finetune.recipe import Recipe
from evatune.finetune.recipe_files import load
from evatune.finetune.run import run
from evatune.finetune.tasks.generation.question_sets import SETS, question_sets
from tests.finetune.paper_data import rows, save_set, save_stand_in


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    for name, one in SETS.items():
        save_set(folder, name, {"train": rows(name), one.tested_on: rows(name, 4)})
    return folder


def recipe(copies: Path, *more: str) -> Recipe:
    return load("paper-commonsense", [f"data.source={copies}", "data.validation=8", *more])


def test_without_a_size_some_are_held_out_to_choose_settings_by(copies: Path) -> None:
    sets = question_sets(recipe(copies, "data.train=0", "data.validation=0").data)
    assert (len(sets.train), len(sets.validation)) == (8 * 6 - 4, 4)
    few = question_sets(recipe(copies, "data.train=5", "data.validation=0").data)
    assert (len(few.train), len(few.validation)) == (5, 0)


def test_all_sets_are_learned_together_and_each_is_tested(copies: Path) -> None:
    found = question_sets(recipe(copies).data)
    assert (len(found.train), len(found.validation)) == (8 * 6 - 8, 8)
    assert {name: len(pairs) for name, pairs in found.tests.items()} == dict.fromkeys(SETS, 4)
    first = {name: pairs[1] for name, pairs in found.tests.items()}
    assert first["boolq"].prompt == "w1 w2\n\nIs w1 so?\n- no\n- yes\nAnswer:\n"
    assert {name: pair.answer for name, pair in first.items()} == {
        "boolq": "yes",
        "piqa": "w2 w3",
        "siqa": "w2",
        "hellaswag": "w2",
        "winogrande": "w4",
        "arc_easy": "w2",
        "arc_challenge": "w2",
        "openbookqa": "w2",
    }
    assert all(pair.answer in pair.choices for pair in found.train)


# PEFT's advice on merging; the paper adapts lm_head, whose weight Gemma's embedding shares.
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
def test_a_tiny_gemma_learns_them_and_is_scored_on_each(copies: Path, tmp_path: Path) -> None:
    save_stand_in("gemma2", tmp_path / "gemma")
    sizes = ["training.steps=2", "training.eval_every=2", "training.precision=float32"]
    settings = [f"model={tmp_path / 'gemma'}", "data.max_length=48", "adapter.rank=2", *sizes]
    result = run(recipe(copies, *settings), tmp_path / "run", quiet=True)
    assert set(SETS) < set(result["measures"])
    shares = [result["measures"][name] for name in SETS]
    assert result["score"] == pytest.approx(sum(shares) / 8)
    assert result["scored"] == 32
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "gemma")
    loaded = PeftModel.from_pretrained(model, tmp_path / "run" / "adapter")
    assert any("lm_head" in name and "lora_A" in name for name, _ in loaded.named_parameters())


def test_answers_that_are_kept_secret_are_refused(copies: Path, tmp_path: Path) -> None:
    for name, column, value in (("piqa", "label", -1), ("hellaswag", "label", "")):
        for other in SETS:
            save_set(tmp_path, other, {"train": rows(other), SETS[other].tested_on: rows(other)})
        secret = [row | {column: value} for row in rows(name)]
        save_set(tmp_path, name, {"train": rows(name), "validation": secret})
        with pytest.raises(DataError, match=r"row 0 of .* is no question with its right answer"):
            question_sets(recipe(tmp_path).data)


def test_a_folder_without_a_set_and_sizes_beyond_them_are_refused(
    copies: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        DataError, match=r"there is no folder .*aps/super_glue.*; give data\.source=hub"
    ):
        question_sets(recipe(tmp_path).data)
    with pytest.raises(ConfigError, match="'commonsense-hub' has 48 questions to train on"):
        question_sets(recipe(copies, "data.validation=48").data)
