"""VTAB-1K: nineteen tasks of a thousand images each, from the bundle that most papers share.

The bundle holds a folder per task, `vtab-1k/dtd`, with images and four lists: `train800.txt` and
`val200.txt` to choose settings by, both together in `train800val200.txt`, and `test.txt`. A line of
a list is a path below the folder and a class: `images/train800val200/000001.jpg 33`.
"""

from __future__ import annotations

import shutil
import stat
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import huggingface_hub
import torch
from filelock import FileLock
from huggingface_hub.errors import HfHubHTTPError
from torch import Tensor, nn

from evatune.errors import ConfigError, DataError
from evatune.finetune.recipe import DataOptions
from evatune.finetune.tasks.splits import Split
from evatune.loading.cache import cache_folder
from evatune.loading.hub import reading, require_path
from evatune.schemas import raise_with_path
from evatune.schemas.text import read_text
from evatune.utils.names import stays_below
from evatune.utils.outputs import claimed_folder

VTAB_PIXELS = 224
"""Height and width of an image."""
VTAB_OPTIONS = {
    "size": {"height": VTAB_PIXELS, "width": VTAB_PIXELS},
    "do_resize": True,
    "do_center_crop": False,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}
"""Of an image processor: 224 pixels square, whatever the shape, and ImageNet's statistics."""

_TOP = "vtab-1k"
ARCHIVE = f"{_TOP}.zip"
"""The bundle, as one file."""
_TRAIN, _VALIDATION, _BOTH, _TEST = "train800", "val200", "train800val200", "test"
_PATIENCE = 1800.0  # seconds that a process waits for another to extract a task
_SIZES = {_TRAIN: 800, _VALIDATION: 200, _BOTH: 1000}


@dataclass(frozen=True)
class VtabTask:
    """A task: its folder in the bundle, and how much the benchmark says is in it."""

    folder: str
    group: str
    classes: int
    test: int


_ROWS: tuple[tuple[str, str, str, int, int], ...] = (
    ("caltech101", "caltech101", "natural", 102, 6085),
    ("cifar100", "cifar", "natural", 100, 10000),
    ("dtd", "dtd", "natural", 47, 1880),
    ("flowers102", "oxford_flowers102", "natural", 102, 6149),
    ("pets", "oxford_iiit_pet", "natural", 37, 3669),
    ("svhn", "svhn", "natural", 10, 26032),
    ("sun397", "sun397", "natural", 397, 21750),
    ("camelyon", "patch_camelyon", "specialized", 2, 32768),
    ("eurosat", "eurosat", "specialized", 10, 5400),
    ("resisc45", "resisc45", "specialized", 45, 6300),
    ("retinopathy", "diabetic_retinopathy", "specialized", 5, 42670),
    ("clevr-count", "clevr_count", "structured", 8, 15000),
    ("clevr-distance", "clevr_dist", "structured", 6, 15000),
    ("dmlab", "dmlab", "structured", 6, 22735),
    ("kitti", "kitti", "structured", 4, 711),
    ("dsprites-location", "dsprites_loc", "structured", 16, 73728),
    ("dsprites-orientation", "dsprites_ori", "structured", 16, 73728),
    ("smallnorb-azimuth", "smallnorb_azi", "structured", 18, 12150),
    ("smallnorb-elevation", "smallnorb_ele", "structured", 9, 12150),
)
VTAB = {
    f"vtab-{name}": VtabTask(folder, group, classes, test)
    for name, folder, group, classes, test in _ROWS
}
"""Task of a recipe → what it is."""


@dataclass(frozen=True)
class VtabImages:
    """Files and classes of a task's images, and which are in which part."""

    files: list[Path]
    labels: list[int]
    parts: Split[list[int]]


@torch.no_grad()
def read_class_token(model: Any) -> None:
    """Have DINOv2's head read the class token alone, as the paper's does; leave others as they are.

    transformers' head reads the mean of the patches as well, behind the token. Its weights for that
    are zero here and get no gradient, so that its own class computes the same from them.
    """
    head, width = model.classifier, getattr(model.config, "hidden_size", 0)
    if getattr(head, "in_features", 0) == 2 * width > 0:
        head.weight[:, width:] = 0
        head.register_forward_pre_hook(_without_patches)


def _without_patches(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    token, patches = inputs[0].chunk(2, dim=-1)
    return (torch.cat([token, torch.zeros_like(patches)], dim=-1),)


def vtab_images(name: str, data: DataOptions) -> VtabImages:
    """Return the images of one of `VTAB`, by the benchmark's own lists.

    With 200 examples to validate on the others are the 800 that the benchmark has for choosing
    settings; without, all 1000 are trained on. The test is the whole of its own.

    Args:
        data: its source is the bundle, as a folder, the zip file, or the hub id of the latter.

    Raises:
        ConfigError: other sizes. DataError: the bundle cannot be had, or a list of it is not what
            the benchmark says.
    """
    task = VTAB[name]
    if (data.train, data.validation) not in ((800, 200), (1000, 0)) or data.test:
        raise ConfigError(
            f"{name} has data.train {data.train}, data.validation {data.validation} and data.test"
            f" {data.test}; VTAB-1K is 800 and 200 to choose settings by, or 1000 and 0, and"
            " data.test=0, which is all of its test"
        )
    folder = _folder_of(task, str(data.source))
    lists = (_BOTH, None, _TEST) if data.validation == 0 else (_TRAIN, _VALIDATION, _TEST)
    files: list[Path] = []
    labels: list[int] = []
    parts: list[list[int]] = []
    for part in lists:
        first = len(files)
        for file, label in _listed(folder, part, task) if part else ():
            files.append(file)
            labels.append(label)
        parts.append(list(range(first, len(files))))
    return VtabImages(files, labels, Split(*parts))


def _listed(folder: Path, part: str, task: VtabTask) -> Iterator[tuple[Path, int]]:
    """Yield the images of a list, with their classes; DataError where it is not whole."""
    path = folder / f"{part}.txt"
    with raise_with_path(path, "get the bundle anew, or another copy of it", DataError):
        lines = read_text(path).splitlines()
    expected = _SIZES.get(part, task.test)
    if len(lines) != expected:
        raise DataError(
            f"{str(path)!r} lists {len(lines)} images, and VTAB-1K has {expected} there; get the"
            " bundle anew"
        )
    for number, line in enumerate(lines, 1):
        name, _, label = line.rpartition(" ")
        where = f"line {number} of {str(path)!r} is {line[:80]!r}"
        if not label.isdecimal() or len(label) > 4 or int(label) >= task.classes:
            raise DataError(
                f"{where}; a path and a class below {task.classes} belong there: get the bundle"
                " anew"
            )
        if not stays_below(name):
            raise DataError(f"{where}, a path that leads out of the folder; get the bundle anew")
        file = folder / name
        if not file.is_file():
            raise DataError(f"{where}, and there is no such file; get the bundle anew")
        yield file, int(label)


def _folder_of(task: VtabTask, source: str) -> Path:
    """Return the folder of a task, out of the zip file where it is in one."""
    require_path(source, "data.source")
    path = Path(source)
    if not path.exists():
        path = _download(source)
    if path.is_file():
        return _extracted(path, task.folder)
    for folder in (path / task.folder, path / _TOP / task.folder, path):
        if (folder / f"{_TEST}.txt").is_file():
            return folder
    raise DataError(
        f"{source!r} has no folder {task.folder} with a {_TEST}.txt; give the folder {_TOP} of the"
        f" bundle, or {ARCHIVE}"
    )


def _download(source: str) -> Path:
    """Return the zip file of a hub's repository, of data or of a model."""
    instead = f"the folder {_TOP} of the bundle, or the file {ARCHIVE}"
    with reading(source, "VTAB-1K", instead):
        try:
            path = huggingface_hub.hf_hub_download(source, ARCHIVE, repo_type="dataset")
        except HfHubHTTPError:
            path = huggingface_hub.hf_hub_download(source, ARCHIVE)
    return Path(path)


def _extracted(archive: Path, name: str) -> Path:
    """Return a task's folder, taken out of the zip file once."""
    stamp = archive.stat()
    target = cache_folder() / f"{_TOP}-{stamp.st_size}-{stamp.st_mtime_ns}" / name
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    # Several processes of a run come here together: the first one extracts, the others wait.
    with FileLock(target.with_name(f".{name}.lock"), timeout=_PATIENCE):
        if not target.is_dir():
            _extract_task(archive, name, target)
    return target


def _extract_task(archive: Path, name: str, target: Path) -> None:
    """Write a task's folder of the zip file; DataError for one that is not whole or climbs out."""
    try:
        with zipfile.ZipFile(archive) as opened:
            everything = opened.infolist()
            members = [
                member for member in everything if name in PurePosixPath(member.filename).parts
            ]
            for member in members:
                if not stays_below(member.filename) or stat.S_ISLNK(member.external_attr >> 16):
                    raise DataError(
                        f"{str(archive)!r} holds {member.filename[:80]!r}, which leads out of its"
                        " folder; get the bundle from elsewhere"
                    )
            if not members:
                raise DataError(f"{str(archive)!r} has no folder {name}; get the whole bundle")
            with claimed_folder(target, overwrite=False) as output, output.whole() as temporary:
                _extract(opened, members, name, temporary)
    except (zipfile.BadZipFile, zipfile.LargeZipFile, EOFError, NotImplementedError) as error:
        raise DataError(
            f"{str(archive)!r} is no whole zip file ({error}); get the bundle anew"
        ) from error


def _extract(
    opened: zipfile.ZipFile, members: list[zipfile.ZipInfo], name: str, folder: Path
) -> None:
    """Write the members of a task's folder below another one."""
    for member in members:
        parts = PurePosixPath(member.filename).parts
        below = folder.joinpath(*parts[parts.index(name) + 1 :])
        if member.is_dir():
            below.mkdir(parents=True, exist_ok=True)
            continue
        below.parent.mkdir(parents=True, exist_ok=True)
        with opened.open(member) as content, below.open("wb") as file:
            shutil.copyfileobj(content, file)
