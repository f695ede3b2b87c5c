"""Image classification: a class for an image, and accuracy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor

from evatune.errors import DataError
from evatune.finetune.recipe import Recipe
from evatune.finetune.tasks import drawing
from evatune.finetune.tasks.task import Task
from evatune.finetune.tasks.understanding import accuracy
from evatune.loading import user_data as own
from evatune.loading.assets import asset, built
from evatune.loading.text import reading, require_path

# how an image is drawn, classes
_DRAWN: dict[str, tuple[Callable[[np.random.Generator, int], Any], int]] = {
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

    Raises ConfigError for an unknown task or sizes beyond the data, DataError where model or data
    cannot be had.
    """
    data = recipe.data
    if data.source is None:
        found = _ours(recipe.task)
        train, test = own.sizes(len(found.labels), data.train, data.test, recipe.task)
    else:
        found, train, test = _of_the_user(recipe)
    model, processor = _model(recipe, found.classes)

    def batch(examples: list[tuple[Image.Image, int]]) -> dict[str, Tensor]:
        images, labels = zip(*examples, strict=True)
        inputs = processor([image.convert("RGB") for image in images], return_tensors="pt")
        return {**inputs, "labels": _numbers(labels)}

    return Task(
        model=model,
        train=_Examples(found, train),
        test=_Examples(found, test),
        collator=batch,
        metric=accuracy,
        head=["classifier"],
        new_head=True,
        task_type=None,  # PEFT has none for images
    )


@dataclass(frozen=True)
class _Examples(torch.utils.data.Dataset[tuple[Image.Image, int]]):
    """Pairs, which Trainer hands to the collator as they are; of a dict it would drop what the
    model does not name."""

    of: _Labelled
    indices: list[int]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        index = self.indices[i]
        return self.of.picture(index), self.of.labels[index]


def _model(recipe: Recipe, classes: int) -> tuple[Any, Any]:
    """The classifier with a head for so many classes, and what makes its input of images."""
    source = asset("vit-glyphs") if recipe.model == "demo" else recipe.model
    require_path(source, "model")
    instead = (
        "a local folder with config.json, weights and preprocessor_config.json, or model=demo as in"
        " the recipe images-digits"
    )
    with reading(source, "an image classifier", instead):
        processor = transformers.AutoImageProcessor.from_pretrained(
            source, trust_remote_code=recipe.trust_remote_code
        )
        model = transformers.AutoModelForImageClassification.from_pretrained(
            source,
            num_labels=classes,
            ignore_mismatched_sizes=True,
            dtype=torch.float32,
            trust_remote_code=recipe.trust_remote_code,
        )
    if not isinstance(getattr(model, "classifier", None), torch.nn.Module):
        raise DataError(
            f"the head of {recipe.model!r} is not named classifier; give a model such as ViT,"
            " DINOv2, Swin or ConvNeXt"
        )
    # transformers writes a checkpoint with the names of the architecture's first release, and its
    # Trainer resumes only from those that the modules have now: a resumed run would lose what
    # attention layers have learnt.
    model.save_pretrained = partial(model.save_pretrained, save_original_format=False)
    return model, processor


def _ours(task: str) -> _Labelled:
    own.require_task(task, TASKS, "image classification")
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
        return {"images": images, "labels": _numbers(labels)}

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
    return [
        Image.fromarray(np.uint8(image * (255 / 16))) for image in found.images
    ], found.target.tolist()


def _of_the_user(recipe: Recipe) -> tuple[_Labelled, list[int], list[int]]:
    """Images and labels of `data.source`."""
    data = recipe.data
    column = (data.columns or ["image"])[0]
    train, test = own.split(recipe, [column, data.label_column], TASKS, "images-digits")
    if not isinstance(train.features[column], datasets.Image):
        raise DataError(
            f"column {column!r} of {str(data.source)!r} holds no images; name another with"
            " data.columns"
        )
    first, second, classes = own.labels(train, test, data)
    count = len(first)

    def picture(i: int) -> Image.Image:
        image: Image.Image = train[i][column] if i < count else test[i - count][column]
        return image

    return (
        _Labelled(picture, first + second, classes),
        list(range(count)),
        list(range(count, count + len(second))),
    )


def _numbers(labels: Sequence[int]) -> Tensor:
    """(n,) int64 on the CPU."""
    return torch.tensor(labels, dtype=torch.int64, device="cpu")
