"""Image classification: a class for an image, and accuracy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor

from evatune.errors import ConfigError, DataError
from evatune.recipes import DataOptions, Recipe
from evatune.tasks import drawing
from evatune.tasks.store import asset, built
from evatune.tasks.task import Task
from evatune.tasks.text import reading, require_path
from evatune.tasks.understanding import accuracy

_DRAWN: dict[str, tuple[Callable[[np.random.Generator, int], Any], int]] = {  # how an image is drawn, classes
    "location": (drawing.location, drawing.CELLS**2),
    "orientation": (drawing.orientation, drawing.ANGLES),
    "counting": (drawing.counting, drawing.MOST_SHAPES),
    "fonts": (drawing.fonts, len(drawing.TASK_FONTS)),
}
_DRAWN_COUNT, _DRAWN_VERSION = 5000, 1
TASKS = ("digits", *_DRAWN)


@dataclass(frozen=True)
class _Labelled:
    picture: Callable[[int], Image.Image]
    labels: list[int]
    classes: int


def prepare(recipe: Recipe) -> Task:
    """Load everything a run needs. The split depends on the sizes alone, not on the run's seed.

    Raises ConfigError for an unknown task or sizes beyond the data, DataError where model or data cannot be had.
    """
    data = recipe.data
    found = _of_the_user(recipe) if data.source is not None else _ours(recipe.task)
    total = data.train + data.test
    if total > len(found.labels):
        raise ConfigError(
            f"data.train + data.test is {total}, but task {recipe.task!r} has {len(found.labels)} examples; lower them"
        )
    model, processor = _model(recipe.model, found.classes)

    def batch(examples: list[tuple[Image.Image, int]]) -> dict[str, Tensor]:
        images, labels = zip(*examples, strict=True)
        return {**processor([image.convert("RGB") for image in images], return_tensors="pt"), "labels": torch.tensor(labels)}

    order = np.random.default_rng(0).permutation(len(found.labels))[:total].tolist()
    return Task(
        model=model,
        train=_Examples(found, order[: data.train]),
        test=_Examples(found, order[data.train :]),
        collator=batch,
        metric=accuracy,
        head=["classifier"],
        new_head=True,
        task_type=None,  # PEFT has none for images
    )


@dataclass(frozen=True)
class _Examples(torch.utils.data.Dataset[tuple[Image.Image, int]]):
    """Pairs, which Trainer hands to the collator as they are; of a dict it would drop what the model does not name."""

    of: _Labelled
    indices: list[int]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        index = self.indices[i]
        return self.of.picture(index), self.of.labels[index]


def _model(name: str, classes: int) -> tuple[Any, Any]:
    """The classifier with a head for so many classes, and what makes its input of images."""
    source = asset("vit-glyphs") if name == "demo" else name
    require_path(source, "model")
    instead = (
        "a local folder with config.json, weights and preprocessor_config.json, or model=demo as in the recipe images-digits"
    )
    with reading(source, "an image classifier", instead):
        processor = transformers.AutoImageProcessor.from_pretrained(source)
        model = transformers.AutoModelForImageClassification.from_pretrained(
            source, num_labels=classes, ignore_mismatched_sizes=True, dtype=torch.float32
        )
    if not isinstance(getattr(model, "classifier", None), torch.nn.Module):
        raise DataError(f"the head of {name!r} is not named classifier; give a model such as ViT, DINOv2, Swin or ConvNeXt")
    # transformers writes a checkpoint with the names of the architecture's first release, and its Trainer resumes only from
    # those that the modules have now: a resumed run would lose what attention layers have learnt.
    model.save_pretrained = partial(model.save_pretrained, save_original_format=False)
    return model, processor


def _ours(task: str) -> _Labelled:
    if task not in TASKS:
        raise ConfigError(
            f"task is {task!r}; tasks of image classification are {', '.join(TASKS)}, or any other name with data.source"
        )
    if task == "digits":
        pictures, labels = _digits()
        classes = 10
    else:
        draw, classes = _DRAWN[task]
        labels = [i % classes for i in range(_DRAWN_COUNT)]

    def image(i: int) -> Any:
        rng = np.random.default_rng([0, i])
        return drawing.scene(rng, pictures[i]) if task == "digits" else draw(rng, labels[i])

    def build() -> dict[str, Tensor]:
        images = torch.from_numpy(np.stack([image(i) for i in range(len(labels))]))
        return {"images": images, "labels": torch.tensor(labels)}

    found = built(f"images-{task}", {"version": _DRAWN_VERSION}, build)
    pixels = found["images"].numpy()
    return _Labelled(lambda i: Image.fromarray(pixels[i]), found["labels"].tolist(), classes)


def _digits() -> tuple[list[Image.Image], list[int]]:
    """Pictures of 8 × 8, and which digit each is."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(
            "task 'digits' reads the handwritten digits of scikit-learn, which is not installed; "
            "install it with: pip install 'evatune[images]'"
        ) from error
    found = load_digits()  # values from 0 to 16
    return [Image.fromarray(np.uint8(image * (255 / 16))) for image in found.images], found.target.tolist()


def _of_the_user(recipe: Recipe) -> _Labelled:
    """Images and labels of the split "train" of `data.source`."""
    data, source = recipe.data, str(recipe.data.source)
    if recipe.task in TASKS:
        raise ConfigError(f"task {recipe.task!r} has data of its own; with data.source, give the task another name")
    require_path(source, "data.source")
    instead = "a folder with a subfolder of images per class, or of Parquet files, or run images-digits, which has its data"
    with reading(source, "images", instead):
        saved = any((Path(source) / name).exists() for name in ("dataset_info.json", "dataset_dict.json"))
        table = datasets.load_from_disk(source) if saved else datasets.load_dataset(source)
    if isinstance(table, datasets.DatasetDict):
        if "train" not in table:
            raise DataError(f"{source!r} has no split 'train'; it has {', '.join(table)}")
        table = table["train"]
    for column in (data.image_column, data.label_column):
        if column not in table.column_names:
            raise DataError(f"{source!r} has no column {column!r}; it has {', '.join(table.column_names)}")
    if not isinstance(table.features[data.image_column], datasets.Image):
        raise DataError(f"column {data.image_column!r} of {source!r} holds no images; name another with data.image_column")
    labels, classes = _labels(table, data)
    return _Labelled(lambda i: table[i][data.image_column], labels, classes)


def _labels(table: Any, data: DataOptions) -> tuple[list[int], int]:
    """Labels as numbers, and how many classes there are: as the column declares them, else as many as occur."""
    labels, feature = list(table[data.label_column]), table.features[data.label_column]
    if all(isinstance(label, str) for label in labels):
        names = {name: i for i, name in enumerate(sorted(set(labels)))}
        labels = [names[label] for label in labels]
    classes = feature.num_classes if isinstance(feature, datasets.ClassLabel) else len(set(labels))
    wrong = next((label for label in labels if not isinstance(label, int) or not 0 <= label < classes), None)
    if wrong is not None or None in labels:
        raise DataError(
            f"column {data.label_column!r} of {str(data.source)!r} holds the label {wrong!r}; its {classes} classes must be "
            f"names, or numbers from 0 to {classes - 1}; name another column with data.label_column, or another source"
        )
    if classes < 2:
        raise DataError(f"column {data.label_column!r} of {str(data.source)!r} holds one class only; give at least two")
    return labels, classes
