"""Images for `evatune init`, with the model that sees them."""

from __future__ import annotations

from typing import Any

from evatune.errors import ConfigError, DataError
from evatune.loading.batches import ImageBatches
from evatune.loading.hub import reading, require_path
from evatune.loading.inputs import InputOptions, Inputs, Loading
from evatune.loading.labels import LabelColumn, find_label_column
from evatune.loading.models import (
    IMAGE_TASKS,
    ImageModel,
    load_image_model,
    require_loadable,
    task_of,
)
from evatune.loading.records import Origin, image_column
from evatune.loading.tables import load_split
from evatune.loading.text_inputs import CLASSES, head_options

_CLASSIFIES = "image-classification"
_INSTEAD = "a folder of images, with a subfolder per class or without"


def image_inputs(options: InputOptions, loading: Loading) -> Inputs:
    """Load images and model, and return what a calibration runs on.

    Raises DataError or ConfigError for what cannot be read, or does not go together.
    """
    require_loadable(options.model, options.task, options.device, options.dtype, IMAGE_TASKS)
    task = options.task
    if task == "auto":
        with reading(options.model, "a model", "a local folder with config.json and weights"):
            task = task_of(options.model, options.trust_remote_code)
    if task not in IMAGE_TASKS:
        raise DataError(
            f"{str(options.model)!r} is no model of images ({task}); give it texts with --data, or"
            " name another --model"
        )
    require_path(options.data, "images")
    with loading(f"images {options.shown}"), reading(options.data, "images", _INSTEAD):
        table = load_split(options.data, options.split)
    column = image_column(table, options.columns, Origin(options.shown))
    labels = None
    if task == _CLASSIFIES:
        labels = find_label_column(table, options.label_column, options.shown)
    if options.needs_loss and labels is None:
        raise ConfigError(
            "--objective needs a loss: give a model of --task image-classification, and images with"
            " classes (a subfolder each, or a --label-column)"
        )
    images, names = _table(table, column, labels)
    with loading(f"model {options.model}"):
        loaded = load_image_model(
            options.model,
            task,
            options.device,
            options.dtype,
            trust_remote_code=options.trust_remote_code,
            **(head_options(names) if names else {}),
        )
    classes = CLASSES if names else None
    batches = ImageBatches(
        loaded.processor, images, column, options.batch_size, options.seed, classes
    )
    of_classes = f", of {len(names)} classes in column {labels.name}" if labels else ""
    return Inputs(
        model=loaded.model,
        task=loaded.task,
        peft_task=loaded.peft_task,
        fresh=loaded.fresh,
        batches=batches,
        about=f"{options.shown}: {len(table):,} images in column {column}{of_classes}",
        head=_random_head(loaded) if loaded.task == _CLASSIFIES else (),
    )


def _table(table: Any, column: str, labels: LabelColumn | None) -> tuple[Any, list[str]]:
    """Return images, with the numbers of their classes where they have some, and the names."""
    images = table.select_columns([column])
    if labels is None:
        return images, []
    numbers, names = labels.numbers(table, list(table[labels.name]))
    return images.add_column(CLASSES, numbers), names


def _random_head(loaded: ImageModel) -> tuple[str, ...]:
    """Return the names of the modules, outside the base model, of which the checkpoint lacks a
    weight."""
    base = loaded.model.base_model_prefix
    outside = [name.split(".")[0] for name in loaded.fresh]
    return tuple(dict.fromkeys(name for name in outside if name != base))
