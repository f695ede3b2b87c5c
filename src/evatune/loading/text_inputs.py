"""Texts, chats and answers for `evatune init`, with the model that reads them."""

from __future__ import annotations

from typing import Any

from evatune.errors import ConfigError
from evatune.loading.batches import AnswerBatches, ShuffledBatches, TargetBatches, TextBatches
from evatune.loading.chats import load_template, require_template
from evatune.loading.columns import LABEL_COLUMNS, find_records, text_columns
from evatune.loading.encoding import Encoder
from evatune.loading.hub import reading
from evatune.loading.inputs import InputOptions, Inputs, Loading
from evatune.loading.labels import LabelColumn, find_label_column
from evatune.loading.models import (
    TextModel,
    load_model,
    require_loadable,
    require_texts,
    task_of,
    tokenizer_of,
)
from evatune.loading.records import Origin, Records
from evatune.loading.tables import load_table

CLASSES = "labels"  # column of our own, with the numbers of classes
_INSTEAD = "a local folder with config.json, weights and tokenizer"
_CLASSIFIES = "sequence-classification"


def text_inputs(options: InputOptions, loading: Loading) -> Inputs:
    """Load the data and the model, and return what a calibration runs on.

    Raises DataError or ConfigError for what cannot be read, or does not go together.
    """
    require_loadable(options.model, options.task, options.device, options.dtype)
    template = None if options.chat_template is None else load_template(options.chat_template)
    task = _task(options)
    with loading(f"data {options.shown}"):
        table = load_table(options.data, options.split)
        labels = None
        if task == _CLASSIFIES:
            labels = find_label_column(table, options.label_column, options.shown)
    if labels is not None:
        return _classified(options, loading, table, labels)
    if options.needs_loss and task != "causal-lm":
        raise ConfigError(
            f"--objective needs a loss: a model of --task causal-lm has one on texts, and one of"
            f" {_CLASSIFIES} on data with a label column, but none of {task}; in Python"
            " evatune.initialize takes batches with labels"
        )
    records = find_records(table, options.columns, Origin(options.shown), LABEL_COLUMNS)
    if records.layout.kind == "chat" and template is None:  # said before a large model is loaded
        with reading(options.model, "a tokenizer", _INSTEAD):
            tokenizer = tokenizer_of(options.model, options.trust_remote_code)
        require_template(tokenizer, records.origin)
    loaded = _load(options, loading, task)
    if template is not None:
        loaded.tokenizer.chat_template = template
    return _of_records(options, loaded, records)


def _task(options: InputOptions) -> str:
    """Return what the model is loaded as. DataError for one that reads no texts."""
    if options.task != "auto":
        return options.task
    with reading(options.model, "a model", _INSTEAD):
        task = task_of(options.model, options.trust_remote_code)
    require_texts(options.model, task)
    return task


def _load(options: InputOptions, loading: Loading, task: str, **more: Any) -> TextModel:
    with loading(f"model {options.model}"):
        return load_model(
            options.model,
            task,
            options.device,
            options.dtype,
            trust_remote_code=options.trust_remote_code,
            **more,
        )


def _of_records(options: InputOptions, loaded: TextModel, records: Records) -> Inputs:
    """Return inputs of chats, answers or texts."""
    tokenizer, layout = loaded.tokenizer, records.layout
    length = min(options.max_length, tokenizer.model_max_length)
    size, seed = options.batch_size, options.seed
    masked = layout.has_answers and loaded.task == "causal-lm"
    encoder = Encoder(tokenizer, length, records.origin)
    batches: ShuffledBatches
    if layout.has_answers and layout.kind != "chat" and loaded.task == "seq2seq-lm":
        batches = TargetBatches(encoder, records, size, seed)
    elif masked or layout.kind in ("chat", "instruction"):
        batches = AnswerBatches(encoder, records, size, seed, masked)
    else:  # encoders read a prompt with its completion as a pair of texts
        batches = TextBatches(
            tokenizer, records.table, size, length, seed, options.needs_loss, layout.columns
        )
    about = records.describe(len(records), template=bool(tokenizer.chat_template), masked=masked)
    return _inputs(loaded, batches, about, length, labels_only=masked)


def _classified(options: InputOptions, loading: Loading, table: Any, labels: LabelColumn) -> Inputs:
    """Return inputs of texts, or of pairs of them, with their classes."""
    columns = text_columns(table, options.columns, Origin(options.shown), labels.name)
    numbers, names = labels.numbers(table, list(table[labels.name]))
    texts = table.select_columns(list(columns)).add_column(CLASSES, numbers)
    loaded = _load(options, loading, _CLASSIFIES, **head_options(names))
    length = min(options.max_length, loaded.tokenizer.model_max_length)
    batches = TextBatches(
        loaded.tokenizer,
        texts,
        options.batch_size,
        length,
        options.seed,
        columns=columns,
        classes=CLASSES,
    )
    what = "texts" if len(columns) == 1 else "pairs of texts"
    about = (
        f"{options.shown}: {len(table):,} {what} in {', '.join(columns)}, of {len(names)} classes"
        f" in column {labels.name}; every token counts"
    )
    return _inputs(loaded, batches, about, length)


def head_options(names: list[str]) -> dict[str, Any]:
    """Return options of `from_pretrained` for a head with these classes."""
    return {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: number for number, name in enumerate(names)},
        "ignore_mismatched_sizes": True,  # a head for other classes gives way to a new one
    }


def _inputs(
    loaded: TextModel,
    batches: ShuffledBatches,
    about: str,
    length: int,
    *,
    labels_only: bool = False,
) -> Inputs:
    return Inputs(
        model=loaded.model,
        task=loaded.task,
        peft_task=loaded.peft_task,
        fresh=loaded.fresh,
        batches=batches,
        about=about,
        length=length,
        labels_only=labels_only,
    )
