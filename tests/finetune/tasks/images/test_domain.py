"""Image classification: runs, splits, data of the user."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from evatune.errors import ConfigError, DataError
from evatune.finetune.metrics import read_metrics
from evatune.finetune.recipe import Recipe
from evatune.finetune.recipe_files import load
from evatune.finetune.run import run
from evatune.finetune.run_folder import RESULT
from evatune.finetune.tasks import images
from evatune.finetune.tasks.images import domain
from tests.finetune.helpers import small_images as small

torch.set_num_threads(1)


def of_the_user(source: Path | str, *more: str) -> Recipe:
    sizes = ["data.train=6", "data.test=2"]
    return load("images-digits", ["task=mine", *sizes, f"data.source={source}", *more])


def table(labels: Any, feature: Any = None, column: str = "label") -> datasets.Dataset:
    pictures = [Image.fromarray(np.full((10, 12), 20 * i, np.uint8)) for i in range(len(labels))]
    found = datasets.Dataset.from_dict(
        {"image": pictures, column: labels, "extra": ["x"] * len(labels)}
    )
    found = found.cast_column("image", datasets.Image())
    return found if feature is None else found.cast_column(column, feature)


def saved(folder: Path, *args: Any, **options: Any) -> Path:
    datasets.disable_progress_bars()
    table(*args, **options).save_to_disk(folder)
    return folder


@pytest.mark.parametrize("task", images.TASKS)
def test_every_task_trains_and_is_judged(task: str, tmp_path: Path) -> None:
    result = run(small(task, "method=lora"), tmp_path, quiet=True)
    assert 0 <= result["score"] <= 1
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 2, 4]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 4
    assert all(np.isfinite(losses))


def test_eva_starts_from_the_loss_of_lora(tmp_path: Path) -> None:
    for method in ("lora", "eva"):
        run(small("digits", f"method={method}"), tmp_path / method, quiet=True)
    before = [
        next(line["eval_loss"] for line in read_metrics(tmp_path / method))
        for method in ("lora", "eva")
    ]
    assert before[0] == before[1]


def test_equal_seeds_give_equal_runs(tmp_path: Path) -> None:
    first, second = (
        run(small("location", "method=eva", "seed=3"), tmp_path / name, quiet=True) for name in "ab"
    )
    assert first["eval_loss"] == second["eval_loss"]


def test_a_resumed_run_of_all_weights_keeps_all_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def weights() -> Any:
        model, info = transformers.Dinov2ForImageClassification.from_pretrained(
            tmp_path / "model", output_loading_info=True
        )
        assert not any(info.values())
        return model.state_dict()

    with monkeypatch.context() as patch:  # as if it had been killed before its last line
        patch.setattr("evatune.finetune.run.shutil.rmtree", lambda *_, **__: None)
        run(small("digits", "method=full"), tmp_path, quiet=True)
    before = weights()
    (tmp_path / RESULT).unlink()
    assert run(small("digits", "method=full"), tmp_path, quiet=True)["resumed"]
    after = weights()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_split_is_the_same_for_every_seed_and_nothing_is_in_both_halves() -> None:
    one, other = (images.prepare(small("counting", f"seed={seed}")) for seed in (0, 5))
    assert one.train.indices == other.train.indices
    assert one.test.indices == other.test.indices
    assert not set(one.train.indices) & set(one.test.indices)


def test_a_drawn_image_is_processed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    domain._processed.cache_clear()
    seen = []
    _, plain, _ = domain._load_model(small("location"), 25)
    processor = type(plain)
    process = processor.__call__

    def noted(self: Any, pictures: Any, **options: Any) -> Any:
        seen.append(len(pictures))
        return process(self, pictures, **options)

    monkeypatch.setattr(processor, "__call__", noted)
    first, second = (images.prepare(small("location", f"seed={seed}")) for seed in (0, 1))
    pairs = [first.train[i] for i in (3, 0, 5)]
    one = first.collator(pairs)
    more = second.collator([*pairs[::-1], first.train[7]])
    assert seen == [1, 3, 1]  # one tells the size
    assert torch.equal(one["pixel_values"], more["pixel_values"][:3].flip(0))
    picture = first.train.source.picture(first.train.indices[7]).convert("RGB")
    alone = plain([picture], return_tensors="pt")["pixel_values"]
    assert torch.equal(alone[0], more["pixel_values"][3])


@pytest.mark.parametrize("kind", ["parquet", "saved", "splits", "imagefolder"])
def test_data_of_the_user_are_read(kind: str, tmp_path: Path) -> None:
    datasets.disable_progress_bars()
    labels = [0, 1, 2, 0, 1, 2, 0, 1]
    data = table(labels, datasets.ClassLabel(names=["a", "b", "c"]))
    folder = tmp_path / "data"
    if kind == "parquet":
        folder.mkdir()
        data.to_parquet(folder / "train.parquet")
    elif kind == "saved":
        data.save_to_disk(folder)
    elif kind == "splits":
        datasets.DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(folder)
    else:
        for i, label in enumerate(labels):
            (folder / "abc"[label]).mkdir(parents=True, exist_ok=True)
            data[i]["image"].save(folder / "abc"[label] / f"{i}.png")
    task = images.prepare(of_the_user(folder))
    assert task.model.config.num_labels == 3
    assert sorted(label for _, label in [*task.train, *task.test]) == sorted(labels)
    batch = task.collator(list(task.train))
    assert batch["pixel_values"].shape == (6, 3, 32, 32)
    assert torch.isfinite(task.model(**batch).loss)


def test_classes_may_be_names(tmp_path: Path) -> None:
    source = saved(tmp_path / "data", ["dog", "cat"] * 4, column="kind")
    task = images.prepare(of_the_user(source, "data.label_column=kind"))
    assert task.model.config.num_labels == 2
    assert sorted(label for _, label in [*task.train, *task.test]) == [0] * 4 + [1] * 4


def test_a_checkpoint_of_another_size_brings_its_own_processor(tmp_path: Path) -> None:
    config = transformers.ViTConfig(
        image_size=16,
        patch_size=8,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    transformers.ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(
        tmp_path / "vit"
    )
    result = run(
        small("digits", f"model={tmp_path / 'vit'}", "method=eva"), tmp_path / "run", quiet=True
    )
    assert result["steps"] == 4


@pytest.mark.parametrize(
    ("overrides", "error", "text"),
    [
        (["task=nothing"], ConfigError, "tasks of image classification are digits, location"),
        (
            ["task=digits", "data.source=x/y"],
            ConfigError,
            "has data of its own; with data.source, leave the task out or give it another",
        ),
        (
            ["data.train=1700", "data.test=98"],
            ConfigError,
            "is 1798, but task 'digits' has 1797 examples; lower them",
        ),
        (["task=fonts", "data.train=99999"], ConfigError, "has 200 examples"),
        (["model=./nowhere"], DataError, "model './nowhere' does not exist"),
        (
            ["task=mine", "data.source=./nowhere"],
            DataError,
            "data.source './nowhere' does not exist",
        ),
    ],
)
def test_a_mistake_in_the_recipe_says_what_is_allowed(
    overrides: list[str], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        images.prepare(load("images-digits", overrides))


@pytest.mark.parametrize(
    ("labels", "overrides", "text"),
    [
        ([0, 1] * 4, ["data.columns=[photo]"], "has no column 'photo'; it has image, label, extra"),
        (
            [0, 1] * 4,
            ["data.label_column=kind"],
            "has no column 'kind' with the classes; it has image, label, extra: name",
        ),
        ([0, 1] * 4, ["data.columns=[extra]"], "column 'extra' of .* holds no images"),
        ([-1] * 8, [], "column 'label' of .* holds the label -1; its 1 classes"),
        ([1, 2] * 4, [], "holds the label 2; its 2 classes must be names, or numbers from 0 to 1"),
        ([0.5, 1.5] * 4, [], "holds the label 0.5"),
        ([0, 1, None, 0] * 2, [], r"holds no label in row 3 \(2 of 8 rows have none\); fill it in"),
        (["a"] * 8, [], "holds one class only; give at least two"),
        ([0, 1], [], "has 2 examples; lower them"),
    ],
)
def test_a_mistake_in_the_data_names_the_column(
    labels: Any, overrides: list[str], text: str, tmp_path: Path
) -> None:
    source = saved(tmp_path / "data", labels)
    with pytest.raises((ConfigError, DataError), match=text):
        images.prepare(of_the_user(source, *overrides))


def test_data_without_a_split_to_train_on_say_which_there_are(tmp_path: Path) -> None:
    datasets.disable_progress_bars()
    datasets.DatasetDict({"test": table([0, 1])}).save_to_disk(tmp_path / "data")
    with pytest.raises(DataError, match="has no split 'train'; choose one of test"):
        images.prepare(of_the_user(tmp_path / "data"))


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    "overrides", [["model=facebook/dinov2-none"], ["task=mine", "data.source=nobody/nothing"]]
)
def test_without_a_network_a_hub_id_leads_to_what_works_offline(overrides: list[str]) -> None:
    with pytest.raises(DataError, match=r"the model hub cannot be reached.* images-digits"):
        images.prepare(load("images-digits", overrides))


def test_a_model_of_another_kind_is_told(bert_folder: Path) -> None:
    with pytest.raises(DataError, match="cannot load an image classifier"):
        images.prepare(small("digits", f"model={bert_folder}"))


def test_a_file_that_is_no_image_is_named(tmp_path: Path) -> None:
    for label in ("cat", "dog"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for number in range(5):
            picture = Image.fromarray(np.full((10, 12), 20 * number, np.uint8))
            picture.save(tmp_path / "photos" / label / f"{number}.png")
    (tmp_path / "photos" / "dog" / "9.png").write_bytes(b"no picture")
    sizes = ("data.train=8", "data.test=3")
    task = images.prepare(of_the_user(tmp_path / "photos", *sizes))
    everything = [part[index] for part in (task.train, task.test) for index in range(len(part))]
    with pytest.raises(DataError, match=r"dog/9\.png' cannot be read as an image"):
        task.collator(everything)
