"""Batches, and the hash by which a run that goes on knows its data."""

from __future__ import annotations

import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from scipy.io import wavfile

from evatune.errors import DataError
from evatune.loading.batches import AudioBatches, ImageBatches
from evatune.loading.sounds import load_sounds
from evatune.loading.tables import load_split


def save(folder: Path, value: int) -> None:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / "sounds").mkdir(exist_ok=True)
    for name in ("1", "2"):
        Image.new("L", (2, 2), value).save(folder / "images" / f"{name}.png")
        wavfile.write(folder / "sounds" / f"{name}.wav", 16000, np.full(9, value, np.int16))


def digests(folder: Path) -> tuple[str, str]:
    images, sounds = load_split(folder / "images", "train"), load_sounds(folder / "sounds")
    return (
        ImageBatches(None, images, "image", 2, 0).digest(),
        AudioBatches(None, sounds, "audio", 2, 0).digest(),
    )


def test_the_hash_is_of_what_files_hold_wherever_they_are(tmp_path: Path) -> None:
    save(tmp_path / "a", 1)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    first = digests(tmp_path / "a")
    assert digests(tmp_path / "b") == first
    save(tmp_path / "a", 2)
    assert set(digests(tmp_path / "a")).isdisjoint(first)


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    table = datasets.Dataset.from_dict({"image": [str(tmp_path / "gone.png")]})
    table = table.cast_column("image", datasets.Image(decode=False))
    with pytest.raises(DataError, match=r"gone\.png' cannot be read \(No such file"):
        ImageBatches(None, table, "image", 2, 0).digest()
