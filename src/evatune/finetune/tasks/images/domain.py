"""Image classification: a class for an image, and accuracy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import islice
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from evatune.errors import DataError
from evatune.finetune.recipe import Recipe
from evatune.finetune.tasks.base import DataSource, Domain, ModelKind, Task, accuracy
from evatune.finetune.tasks.images.tasks import TASKS
from evatune.finetune.tasks.images.vtab import (
    ARCHIVE,
    VTAB,
    VTAB_OPTIONS,
    read_class_token,
    vtab_images,
)
from evatune.finetune.tasks.new_modules import new_modules
from evatune.finetune.tasks.pretrained import load_pretrained
from evatune.finetune.tasks.splits import Split, draw_from, draw_split
from evatune.finetune.tasks.user_data import (
    checked,
    describe_parts,
    encode_labels,
    label_column,
    load_examples,
    own_origin,
    own_sources,
    require_task,
)
from evatune.loading.assets import asset
from evatune.loading.cache import build_once
from evatune.loading.columns import media_column, require_labels
from evatune.loading.pictures import read_picture
from evatune.utils.progress import Display

_DRAWN_VERSION = 2  # of the code that draws
_KEPT_TASKS = 2  # in memory: a comparison goes from task to task
_KEPT_BYTES = 2**28  # of one task, beyond which images are processed again for each batch
_INSTEAD = (
    "a local folder with config.json, weights and preprocessor_config.json, or model=demo as in"
    " the recipe images-digits"
)


# Indices of images → what the model takes.
_Process = Callable[[Sequence[int]], dict[str, Tensor]]


@dataclass(frozen=True)
class _Labeled:
    picture: Callable[[int], Image.Image]
    labels: list[int]
    classes: int


@dataclass(frozen=True)
class _Examples(torch.utils.data.Dataset[tuple[int, int]]):
    """Pairs of an image's index and its label, which Trainer hands to the collator as they are.

    Of a dict it would drop what the model does not name.
    """

    source: _Labeled
    indices: list[int]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> tuple[int, int]:
        index = self.indices[i]
        return index, self.source.labels[index]


@dataclass(frozen=True)
class _Drawn:
    """Images of one of our tasks; equal ones are processed alike."""

    task: str
    count: int
    settings: str
    process: _Process = field(compare=False)


def prepare(recipe: Recipe, max_examples: int | None = None) -> Task:
    """Load everything a run needs. The split depends on the sizes alone, not on the run's seed.

    Args:
        max_examples: images of each part, after the labels of all have been looked at.

    Raises ConfigError for an unknown task or sizes beyond the data, DataError where model or data
    cannot be had.
    """
    data = recipe.data
    about = ""
    options: dict[str, Any] = {}
    if recipe.task in VTAB:
        images, split = _vtab_images(recipe)
        options = VTAB_OPTIONS
    elif data.source is None:
        images, split = _bundled_images(recipe)
    else:
        images, split, about = _user_images(recipe)
    model, processor, head = _load_model(recipe, images.classes)
    if recipe.task in VTAB:
        read_class_token(model)
    split = split.map(lambda part: part[:max_examples])

    def process(indices: Sequence[int]) -> dict[str, Tensor]:
        pictures = [images.picture(index).convert("RGB") for index in indices]
        return dict(processor(pictures, return_tensors="pt", **options))

    inputs: _Process = process
    if data.source is None:
        settings = processor.to_json_string()
        inputs = _processed(_Drawn(recipe.task, len(images.labels), settings, process))

    def collate(examples: list[tuple[int, int]]) -> dict[str, Tensor]:
        indices, labels = zip(*examples, strict=True)
        return {**inputs(indices), "labels": _label_tensor(labels)}

    return Task(
        models=MODELS,
        model=model,
        train=_Examples(images, split.train),
        validation=_Examples(images, split.validation) if split.validation else None,
        test=_Examples(images, split.test),
        collator=collate,
        metric=accuracy,
        head=head,
        about=about,
    )


def _load_model(recipe: Recipe, classes: int) -> tuple[Any, Any, list[str]]:
    """Return a classifier for the classes, its image processor, and the names of what is new."""
    options = {"num_labels": classes, "ignore_mismatched_sizes": True}
    model, processor, missing = load_pretrained(
        MODELS, recipe, "an image classifier", _INSTEAD, **options
    )
    if not isinstance(getattr(model, "classifier", None), torch.nn.Module):
        raise DataError(
            f"the head of {recipe.model!r} is not named classifier; give a model such as ViT,"
            " DINOv2, Swin or ConvNeXt"
        )
    # transformers writes a checkpoint with the names of the architecture's first release, and its
    # Trainer resumes only from those that the modules have now: a resumed run would lose what
    # attention layers have learned.
    model.save_pretrained = partial(model.save_pretrained, save_original_format=False)
    return model, processor, new_modules(model, missing, MODELS.head(model))


def _bundled_images(recipe: Recipe) -> tuple[_Labeled, Split[list[int]]]:
    """Return the images of one of our tasks, drawn the first time, and which are in which part."""
    name = recipe.task
    require_task(name, tuple(TASKS), "image classification")
    task = TASKS[name]
    drawings = task.drawings()
    if drawings.parts is None:
        split = draw_split(len(drawings.labels), recipe.data, name)
    else:
        split = draw_from(drawings.parts, recipe.data, name)

    def build(progress: Display) -> dict[str, Tensor]:
        images = []
        for index in range(len(drawings.labels)):
            images.append(drawings.draw(np.random.default_rng([0, index]), index))
            progress.update(len(images), len(drawings.labels))
        return {
            "images": torch.from_numpy(np.stack(images)),
            "labels": _label_tensor(drawings.labels),
        }

    settings = {"version": _DRAWN_VERSION}
    tensors = build_once(f"images-{name}", settings, build, f"drawing images of {name}", "images")
    pixels = tensors["images"].numpy()
    labels = tensors["labels"].tolist()
    return _Labeled(lambda index: Image.fromarray(pixels[index]), labels, task.classes), split


@lru_cache(maxsize=_KEPT_TASKS)
def _processed(drawn: _Drawn) -> _Process:
    """Return the processing of images, which keeps what it has processed, for all later runs."""
    kept = {
        key: values.new_empty(drawn.count, *values.shape[1:])
        for key, values in drawn.process([0]).items()
    }
    if sum(values.nbytes for values in kept.values()) > _KEPT_BYTES:
        return drawn.process
    done = np.zeros(drawn.count, dtype=bool)

    def process(indices: Sequence[int]) -> dict[str, Tensor]:
        wanted = np.asarray(indices)
        missing = wanted[~done[wanted]]
        if len(missing):
            for key, values in drawn.process(missing.tolist()).items():
                kept[key][missing] = values
            done[missing] = True
        return {key: values[wanted] for key, values in kept.items()}

    return process


def _vtab_images(recipe: Recipe) -> tuple[_Labeled, Split[list[int]]]:
    """Return the images of one of VTAB's tasks, and which are in which part."""
    images = vtab_images(recipe.task, recipe.data)

    def picture(index: int) -> Image.Image:
        with Image.open(images.files[index]) as opened:
            return opened.convert("RGB")

    return _Labeled(picture, images.labels, VTAB[recipe.task].classes), images.parts


def _user_images(recipe: Recipe) -> tuple[_Labeled, Split[list[int]], str]:
    """Return the images of `data.source`, which are in which part, and what they are."""
    data = recipe.data
    origin = own_origin(data)

    def find(table: Any) -> str:
        require_labels(table, data.label_column, origin)
        label_column(data).require_each(table[data.label_column])
        return media_column(table, data.columns, origin)

    tables = load_examples(recipe, checked(find), tuple(TASKS), "images-digits")
    column = find(tables.train)
    labels, _, classes = encode_labels(tables, data)
    what = f"{origin.source}: images in {column} with {classes} classes in {data.label_column}"
    rows = datasets.concatenate_datasets([tables.train, tables.validation, tables.test])
    rows = rows.cast_column(column, datasets.Image(decode=False))

    def picture(index: int) -> Image.Image:
        return read_picture(rows[index][column])

    numbers = iter(range(len(rows)))
    split = labels.map(lambda part: list(islice(numbers, len(part))))
    everything = [*labels.train, *labels.validation, *labels.test]
    return _Labeled(picture, everything, classes), split, f"{what}; {describe_parts(tables, data)}"


def _label_tensor(labels: Sequence[int]) -> Tensor:
    """Return the labels as (n,) int64 on the CPU."""
    return torch.tensor(labels, dtype=torch.int64, device="cpu")


def _sources(recipe: Recipe) -> list[DataSource]:
    if recipe.task in VTAB and recipe.data.source is not None:
        return [DataSource(recipe.data.source, files=(ARCHIVE,))]
    return own_sources(recipe.data)


MODELS = ModelKind(
    loader="AutoModelForImageClassification",
    demo=lambda recipe: asset("vit-glyphs"),
    head=lambda model: ["classifier"],
    new_head=True,
    task_type=None,  # PEFT has none for images
    processor="AutoImageProcessor",
)
DOMAIN = Domain("images", prepare, MODELS, _sources)
