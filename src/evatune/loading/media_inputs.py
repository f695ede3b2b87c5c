"""Images and audio for `evatune init`, with the model that they are for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from evatune.errors import ConfigError
from evatune.loading.batches import AudioBatches, ImageBatches
from evatune.loading.columns import media_column
from evatune.loading.data_files import is_saved_by_datasets
from evatune.loading.hub import reading, require_path
from evatune.loading.inputs import InputOptions, Inputs, Loading
from evatune.loading.labels import LabelColumn, find_label_column
from evatune.loading.models import (
    AUDIO,
    MediaModel,
    Medium,
    load_media_model,
    media_task,
    require_loadable,
)
from evatune.loading.records import Origin
from evatune.loading.sounds import load_sounds
from evatune.loading.tables import load_split
from evatune.loading.text_inputs import CLASSES, head_options
from evatune.utils.extras import extras

with extras(__name__):
    import datasets


def media_inputs(options: InputOptions, medium: Medium, loading: Loading) -> Inputs:
    """Load images or audio and the model, and return what a calibration runs on.

    Raises DataError or ConfigError for what cannot be read, or does not go together.
    """
    require_loadable(options.model, options.task, options.device, options.dtype, medium.tasks)
    task = media_task(options.model, medium, options.task, options.trust_remote_code)
    table, column = _table(options, medium, loading)
    labels = None
    if task == medium.classifies:
        labels = find_label_column(table, options.label_column, options.shown)
    if options.needs_loss and labels is None:
        raise ConfigError(
            f"--objective needs a loss: give a model of --task {medium.classifies}, and"
            f" {medium.name} with classes (a subfolder each, or a --label-column)"
        )
    inputs, names = _with_classes(table, column, labels)
    with loading(f"model {options.model}"):
        loaded = load_media_model(
            options.model,
            medium,
            task,
            options.device,
            options.dtype,
            trust_remote_code=options.trust_remote_code,
            **(head_options(names) if names else {}),
        )
    kind = AudioBatches if medium is AUDIO else ImageBatches
    classes = CLASSES if names else None
    batches = kind(loaded.processor, inputs, column, options.batch_size, options.seed, classes)
    of_classes = f", of {len(names)} classes in column {labels.name}" if labels else ""
    return Inputs(
        model=loaded.model,
        task=loaded.task,
        peft_task=None,
        fresh=loaded.fresh,
        batches=batches,
        about=f"{options.shown}: {len(table):,} {medium.name} in column {column}{of_classes}",
        head=_random_head(loaded) if loaded.task == medium.classifies else (),
    )


def _table(options: InputOptions, medium: Medium, loading: Loading) -> tuple[Any, str]:
    """Return the data set, undecoded if it is audio, and the column to read."""
    instead = f"a folder of {medium.name}, with a subfolder per class or without"
    require_path(options.data, medium.name)
    with (
        loading(f"{medium.name} {options.shown}"),
        reading(options.data, medium.name, instead),
    ):
        path = Path(options.data)
        listed = medium is AUDIO and path.is_dir() and not is_saved_by_datasets(path)
        if listed and options.split != "train":
            raise ConfigError(
                f"--split is {options.split!r}, and a folder of audio has no splits; give the"
                " folder with the files of this one"
            )
        table = load_sounds(path) if listed else load_split(options.data, options.split)
    column = media_column(table, options.columns, Origin(options.shown), medium.name)
    if medium is AUDIO:
        table = table.cast_column(column, datasets.Audio(decode=False))
    return table, column


def _with_classes(table: Any, column: str, labels: LabelColumn | None) -> tuple[Any, list[str]]:
    """Return images or sounds, with the numbers of their classes if they have some, and names."""
    inputs = table.select_columns([column])
    if labels is None:
        return inputs, []
    numbers, names = labels.numbers(table, list(table[labels.name]))
    return inputs.add_column(CLASSES, numbers), names


def _random_head(loaded: MediaModel) -> tuple[str, ...]:
    """Return the names of the modules, outside the base model, of which the checkpoint lacks a
    weight."""
    base = loaded.model.base_model_prefix
    outside = [name.split(".")[0] for name in loaded.fresh]
    return tuple(dict.fromkeys(name for name in outside if name != base))
