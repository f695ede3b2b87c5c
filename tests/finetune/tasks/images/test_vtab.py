"""VTAB-1K by its bundle: a stand-in with its layout, and one tiny model like DINOv2-g."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel
from PIL import Image

from evatune.errors import ConfigError, DataError
from evatune.finetune.recipe_files import bundled_recipes, load
from evatune.finetune.run import run
from evatune.finetune.tasks.images import domain as images
from evatune.finetune.tasks.images import vtab
from evatune.finetune.tasks.images.vtab import VTAB
from tests.finetune.paper_data import save_stand_in, save_vtab, write_list

_TEST = 8  # images of a stand-in's test


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle") / "vtab-1k"
    for name in ("vtab-dtd", "vtab-kitti"):
        save_vtab(folder, name, _TEST)
    return folder


@pytest.fixture(autouse=True)
def _small_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("vtab-dtd", "vtab-kitti"):
        monkeypatch.setitem(VTAB, name, replace(VTAB[name], test=_TEST))


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_stand_in("dinov2", tmp_path_factory.mktemp("models") / "dinov2")


def test_every_task_of_the_benchmark_has_a_recipe() -> None:
    names = [name for name in bundled_recipes() if name.startswith("paper-vtab-")]
    assert {load(name).task for name in names} == set(VTAB)
    assert len(VTAB) == 19
    assert len({task.folder for task in VTAB.values()}) == 19


def test_a_recipe_trains_on_the_bundle_and_plain_peft_loads_what_it_wrote(
    bundle: Path, dinov2: Path, tmp_path: Path
) -> None:
    sizes = ["training.steps=2", "training.eval_every=2", "training.batch_size=8"]
    settings = [f"data.source={bundle}", f"model={dinov2}", "training.precision=float32", *sizes]
    recipe = load("paper-vtab-dtd", settings)
    result = run(recipe, tmp_path / "run", quiet=True)
    assert result["scored"] == _TEST
    model = transformers.AutoModelForImageClassification.from_pretrained(dinov2, num_labels=47)
    before = {name: value.clone() for name, value in model.named_parameters()}
    loaded = PeftModel.from_pretrained(model, tmp_path / "run" / "adapter")
    changed = {
        name
        for name, value in loaded.get_base_model().named_parameters()
        if name in before and not torch.equal(value, before[name])
    }
    assert any(name.endswith("norm1.bias") for name in changed)
    token, patches = loaded.get_base_model().classifier.weight.chunk(2, dim=-1)
    assert token.abs().min() > 0
    assert patches.abs().max() == 0  # the head reads the class token alone


def test_images_are_squeezed_to_224_pixels_with_imagenets_statistics(
    bundle: Path, dinov2: Path
) -> None:
    task = images.prepare(load("paper-vtab-kitti", [f"data.source={bundle}", f"model={dinov2}"]))
    assert (len(task.train), task.validation, len(task.test)) == (1000, None, _TEST)
    pixels = task.collator([task.train[0]])["pixel_values"]
    assert pixels.shape == (1, 3, 224, 224)
    with Image.open(bundle / "kitti" / "images" / "all" / "0.png") as picture:
        squeezed = np.asarray(picture.resize((224, 224), Image.Resampling.BICUBIC)) / 255
    mean, deviation = vtab.VTAB_OPTIONS["image_mean"], vtab.VTAB_OPTIONS["image_std"]
    expected = torch.from_numpy((squeezed - mean) / deviation).permute(2, 0, 1).float()
    torch.testing.assert_close(pixels[0], expected, atol=0.02, rtol=0)
    tuning = load(
        "paper-vtab-kitti",
        [f"data.source={bundle}", f"model={dinov2}", "data.train=800", "data.validation=200"],
    )
    assert len(images.prepare(tuning).validation) == 200


def test_the_zip_file_is_taken_apart_once(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVATUNE_CACHE", str(tmp_path / "cache"))
    archive = tmp_path / "vtab-1k.zip"
    shutil.make_archive(str(archive.with_suffix("")), "zip", bundle.parent, "vtab-1k")
    data = load("paper-vtab-dtd", [f"data.source={archive}"]).data
    found = vtab.vtab_images("vtab-dtd", data)
    assert [len(part) for part in vars(found.parts).values()] == [1000, 0, _TEST]
    monkeypatch.setattr(zipfile, "ZipFile", None)
    assert vtab.vtab_images("vtab-dtd", data).files == found.files


def climb(folder: Path) -> None:
    lines = (folder / "test.txt").read_text().splitlines()
    (folder / "test.txt").write_text("\n".join(["../../secret.png 0", *lines[1:]]))


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda folder: (folder / "test.txt").unlink(), r"no folder dtd with a test\.txt"),
        (
            lambda folder: write_list(folder, "test", 9, 47),
            "lists 9 images, and VTAB-1K has 8",
        ),
        (lambda folder: (folder / "images" / "all" / "3.png").unlink(), "there is no such file"),
        (climb, "a path that leads out of the folder"),
        (
            lambda folder: (folder / "test.txt").write_text("images/all/0.png 47\n" * _TEST),
            "a path and a class below 47 belong there",
        ),
    ],
)
def test_a_bundle_that_is_not_the_benchmarks_is_refused(
    spoil: Callable[[Path], Any], text: str, bundle: Path, tmp_path: Path
) -> None:
    shutil.copytree(bundle / "dtd", tmp_path / "vtab-1k" / "dtd")
    spoil(tmp_path / "vtab-1k" / "dtd")
    data = load("paper-vtab-dtd", [f"data.source={tmp_path}"]).data
    with pytest.raises(DataError, match=text):
        vtab.vtab_images("vtab-dtd", data)


def test_an_archive_that_climbs_out_is_refused_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVATUNE_CACHE", str(tmp_path / "cache"))
    with zipfile.ZipFile(tmp_path / "vtab-1k.zip", "w") as archive:
        archive.writestr("vtab-1k/dtd/../../../out.txt", "x")
    data = load("paper-vtab-dtd", [f"data.source={tmp_path / 'vtab-1k.zip'}"]).data
    with pytest.raises(DataError, match="leads out of its folder"):
        vtab.vtab_images("vtab-dtd", data)
    (tmp_path / "vtab-1k.zip").write_bytes(b"PK no zip")
    with pytest.raises(DataError, match="is no whole zip file"):
        vtab.vtab_images("vtab-dtd", data)
    assert not list((tmp_path / "cache").rglob("*.txt"))


def test_other_sizes_than_the_benchmarks_are_refused(bundle: Path) -> None:
    for sizes in (
        ["data.train=900"],
        ["data.test=100"],
        ["data.train=1000", "data.validation=200"],
    ):
        data = load("paper-vtab-dtd", [f"data.source={bundle}", *sizes]).data
        with pytest.raises(ConfigError, match="VTAB-1K is 800 and 200 to choose settings by"):
            vtab.vtab_images("vtab-dtd", data)
