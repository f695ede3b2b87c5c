"""A trial, on stand-ins of tiny models; and what it refuses, as a run would."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from evatune.errors import AdapterError, ConfigError, DataError, EvatuneError
from evatune.finetune.check import check, trial
from evatune.finetune.check.trial import try_recipe
from evatune.finetune.methods import find_method
from evatune.finetune.recipe import Recipe
from evatune.finetune.recipe_files import load


def lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def labeled(path: Path, label: Callable[[int], Any]) -> Path:
    return lines(path, [{"text": f"w{n} w{n % 7}", "label": label(n)} for n in range(60)])


def understanding(model: Path, data: Path, *more: str) -> Recipe:
    settings = [f"model={model}", f"data.source={data}", "method=lora", *more]
    return load("own-understanding", settings)


def test_a_language_model_is_tried_from_end_to_end(llama_folder: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"w{n}", "completion": f"w{n % 9} " * 90} for n in range(40)]
    data = lines(tmp_path / "data.jsonl", rows)
    settings = [f"model={llama_folder}", f"data.source={data}", "data.max_length=60"]
    found = try_recipe(load("own-generation", settings))
    assert found.stand_in
    assert found.difference is not None
    assert found.difference < 1e-4
    assert "40 prompts with completions" in found.task.about
    assert "32 to train on" in found.task.about  # of all, not of the few
    assert len(found.task.train) == 8
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]


@pytest.mark.parametrize("method", ["full", "untouched"])
def test_what_is_saved_is_compared_where_there_is_something(
    method: str, bert_folder: Path, tmp_path: Path
) -> None:
    data = labeled(tmp_path / "data.jsonl", lambda n: n % 3)
    found = try_recipe(understanding(bert_folder, data, f"method={method}"))
    assert found.task.model.config.num_labels == 3
    assert (found.difference is None) == (method == "untouched")


def test_images_are_tried_with_the_processor_that_comes_with_the_model(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for n in range(6):
            pixels = np.random.default_rng(n).integers(0, 255, (20, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{n}.png")
    config = transformers.Dinov2Config(
        hidden_size=96, num_hidden_layers=3, num_attention_heads=3, image_size=28, patch_size=14
    )
    transformers.Dinov2Model(config).save_pretrained(tmp_path / "model")
    processor = transformers.BitImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
    )
    processor.save_pretrained(tmp_path / "model")
    own = [f"model={tmp_path / 'model'}", f"data.source={tmp_path / 'data'}", "method=eva"]
    found = check(load("own-images", own))
    assert found.trial is not None
    assert found.trial.task.model.config.num_hidden_layers == 2
    assert found.size is not None
    assert found.size.parameters > 4 * sum(p.numel() for p in found.trial.task.model.parameters())


def test_all_weights_in_mixed_precision_are_compared_in_one(
    bert_folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text("".join(f'{{"text": "w{n} w2", "label": {n % 2}}}\n' for n in range(60)))
    own = [f"model={bert_folder}", f"data.source={path}"]
    found = try_recipe(load("own-understanding", [*own, "method=full", "training.precision=bf16"]))
    assert found.difference is not None
    assert found.difference < 1e-6


@pytest.mark.parametrize(
    ("label", "more", "error", "text"),
    [
        (lambda n: n % 2, ["data.columns=[words]"], DataError, "words"),
        (lambda n: n % 2, ["data.label_column=kind"], DataError, "'kind'"),
        (lambda n: n % 2 + 1, [], DataError, "holds the label 2; its 2 classes must be names"),
        (lambda n: n / 7, [], DataError, "classes must be names, or numbers from 0"),
        (lambda n: "ab"[n % 2], ["data.metric=pearson"], DataError, "is for numbers"),
        # A third class so seldom that the few examples of a trial need not hold it.
        (lambda n: 2 if n == 59 else n % 2, ["data.metric=f1"], ConfigError, "these are 3"),
        (lambda n: "same", [], DataError, "holds one class only"),
        (lambda n: n % 2, ["data.train=100"], ConfigError, "has 60 examples"),
        (lambda n: n % 2, ["training.schedule=jumpy"], ConfigError, "schedule is 'jumpy'"),
    ],
)
def test_what_a_run_refuses_is_refused(
    label: Callable[[int], Any],
    more: list[str],
    error: type[EvatuneError],
    text: str,
    bert_folder: Path,
    tmp_path: Path,
) -> None:
    data = labeled(tmp_path / "data.jsonl", label)
    with pytest.raises(error, match=text):
        try_recipe(understanding(bert_folder, data, *more))


def test_chats_without_a_template_are_refused(llama_folder: Path, tmp_path: Path) -> None:
    answer = {"role": "assistant", "content": "w2"}
    chats = [[{"role": "user", "content": f"w{i}"}, answer] for i in range(12)]
    data = lines(tmp_path / "data.jsonl", [{"messages": chat} for chat in chats])
    with pytest.raises(DataError, match="the model's tokenizer has no chat template"):
        try_recipe(load("own-generation", [f"model={llama_folder}", f"data.source={data}"]))


def test_a_difference_in_what_was_saved_is_an_error(
    bert_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = type(find_method("lora"))
    read = lora.load

    def spoiled(self: Any, model: Any, folder: Path) -> Any:
        found = read(self, model, folder)
        with torch.no_grad():
            for parameter in found.parameters():
                parameter.mul_(1.5)
        return found

    monkeypatch.setattr(lora, "load", spoiled)
    data = labeled(tmp_path / "data.jsonl", lambda n: n % 2)
    with pytest.raises(AdapterError, match="computes something else when it is read anew"):
        try_recipe(understanding(bert_folder, data))


def test_an_error_of_the_stand_in_s_own_class_is_one_sentence(
    bert_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("sizes 3 and 4 differ\nmore")

    monkeypatch.setattr(trial, "run", fail)
    data = labeled(tmp_path / "data.jsonl", lambda n: n % 2)
    with pytest.raises(DataError, match=r"ended in RuntimeError: sizes 3 and 4 differ\. Run them"):
        try_recipe(understanding(bert_folder, data))


def test_one_of_several_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="evatune recipes check is for one"):
        check(load("generation-clock"))
