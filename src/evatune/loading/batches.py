"""Batches for a calibration: of texts, of answers with their questions, of images, of audio."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from evatune.choices import IGNORED, require_whole
from evatune.errors import DataError
from evatune.loading.encoding import Encoder, as_completion, has_loss, require_rows
from evatune.loading.pictures import read_picture
from evatune.loading.records import Chat, Records
from evatune.loading.sounds import read_wave
from evatune.loading.texts import truncate_texts
from evatune.utils.extras import extras

with extras(__name__):
    import datasets


class ShuffledBatches(ABC):
    """Batches of a table's rows in random order; iterable any number of times, the same each time.

    Attributes:
        batch_size: rows of a batch. seed: of their order.
    """

    batch_size: int
    seed: int

    @property
    @abstractmethod
    def table(self) -> Any:
        """The `datasets.Dataset`, of images and sounds with what their files hold."""

    @abstractmethod
    def collate(self, rows: dict[str, list[Any]]) -> Any:
        """Return the batch of some rows, given by columns; None where nothing of them counts."""

    def __post_init__(self) -> None:
        require_whole("batch_size", self.batch_size, 1)
        require_whole("seed", self.seed, 0)

    def digest(self) -> str:
        """Return a hash of what the rows hold, by which a run that goes on knows its data."""
        digest = hashlib.sha256()
        for row in self.table:
            digest.update(repr(self.content(row)).encode("utf-8", "surrogatepass") + b"\0")
        return digest.hexdigest()

    def content(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return a row of the table with what it holds in place of where that is."""
        return row

    @property
    def template(self) -> str | None:
        """The chat template by which records become texts; None where there is none."""
        return None

    def __len__(self) -> int:
        return -(-len(self.table) // self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        shuffled = self.table.shuffle(seed=self.seed, keep_in_memory=True)
        for start in range(0, len(shuffled), self.batch_size):
            batch = self.collate(shuffled[start : start + self.batch_size])
            if batch is not None:
                yield batch


@dataclass(frozen=True)
class TextBatches(ShuffledBatches):
    """Tokenized batches of shuffled texts, or of pairs of texts.

    Attributes:
        texts: a `datasets.Dataset` with a column "text".
        labels: add those of a language model, each token's own id, and -100 for padding.
        columns: of the text, or of both texts of a pair.
        classes: column of numbers that are the labels, in place of tokens' own.
    """

    tokenizer: Any
    texts: Any
    batch_size: int
    max_length: int
    seed: int
    labels: bool = False
    columns: tuple[str, ...] = ("text",)
    classes: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_whole("max_length", self.max_length, 1)

    @property
    def table(self) -> Any:
        return self.texts

    def collate(self, rows: dict[str, list[Any]]) -> Any:
        limit = min(self.max_length, self.tokenizer.model_max_length)
        texts = [
            truncate_texts([text or "" for text in rows[column]], self.tokenizer, limit)
            for column in self.columns
        ]
        batch = self.tokenizer(
            *texts, truncation=True, max_length=limit, padding=True, return_tensors="pt"
        )
        if self.classes is not None:
            batch["labels"] = torch.tensor(rows[self.classes], dtype=torch.int64, device="cpu")
        elif self.labels:
            batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
        return batch


@dataclass(frozen=True)
class RecordBatches(ShuffledBatches):
    """Tokenized batches of shuffled records."""

    encoder: Encoder
    records: Records
    batch_size: int
    seed: int

    @property
    def table(self) -> Any:
        return self.records.table


@dataclass(frozen=True)
class AnswerBatches(RecordBatches):
    """Tokenized batches of shuffled records, with a label for each token that is to be learned.

    Attributes:
        labels: False: without labels, for models that learn in another way.
    """

    labels: bool = True

    @property
    def template(self) -> str | None:
        template = self.encoder.tokenizer.chat_template
        return None if template is None else str(template)

    def collate(self, rows: dict[str, list[Any]]) -> Any:
        encoded = [self.encoder(self.records.record(row)) for row in _by_row(rows)]
        if self.labels:
            encoded = [row for row in encoded if has_loss(row)]
        if not encoded:
            return None
        batch = transformers.DataCollatorForSeq2Seq(self.encoder.tokenizer)(encoded)
        if not self.labels:
            del batch["labels"]
        return batch

    def __iter__(self) -> Iterator[Any]:
        batch = None
        for batch in super().__iter__():
            yield batch
        require_rows([] if batch is None else [batch], self.encoder.origin)


class TargetBatches(RecordBatches):
    """Tokenized batches for encoder-decoder models: prompts to read, answers to write as labels."""

    def collate(self, rows: dict[str, list[Any]]) -> Any:
        records = [self.records.record(row) for row in _by_row(rows)]
        pairs = [as_completion(record) for record in records if not isinstance(record, Chat)]
        tokenizer, longest = self.encoder.tokenizer, self.encoder.longest
        prompts = truncate_texts([pair.prompt.rstrip() for pair in pairs], tokenizer, longest)
        answers = truncate_texts([pair.answer for pair in pairs], tokenizer, longest)
        sizes = {"truncation": True, "max_length": longest}
        encoded = tokenizer(prompts, text_target=answers, **sizes)
        return transformers.DataCollatorForSeq2Seq(tokenizer)(_by_row(encoded))


@dataclass(frozen=True)
class MediaBatches(ShuffledBatches):
    """Batches of shuffled images or sounds, as the model's processor prepares them.

    Attributes:
        rows: the `datasets.Dataset`. column: of the images or sounds.
        classes: column of numbers that are the labels; None: without labels.
    """

    processor: Any
    rows: Any
    column: str
    batch_size: int
    seed: int
    classes: str | None = None

    @property
    def table(self) -> Any:
        return self.rows

    def content(self, row: dict[str, Any]) -> dict[str, Any]:
        return row | {self.column: hashlib.sha256(_file_bytes(row[self.column])).hexdigest()}

    def collate(self, rows: dict[str, list[Any]]) -> Any:
        batch = self.prepared(rows[self.column])
        if self.classes is not None:
            batch["labels"] = torch.tensor(rows[self.classes], dtype=torch.int64, device="cpu")
        return batch

    @abstractmethod
    def prepared(self, media: list[Any]) -> dict[str, Any]:
        """Return the model's inputs for some images or sounds."""


class ImageBatches(MediaBatches):
    """Batches of images, each of which is decoded when its batch is made."""

    @property
    def table(self) -> Any:
        return self.rows.cast_column(self.column, datasets.Image(decode=False))

    def prepared(self, media: list[Any]) -> dict[str, Any]:
        pictures = [read_picture(picture) for picture in media]
        return dict(self.processor(pictures, return_tensors="pt"))


class AudioBatches(MediaBatches):
    """Batches of sounds, whose column is not decoded."""

    def prepared(self, media: list[Any]) -> dict[str, Any]:
        rate = self.processor.sampling_rate
        waves = [read_wave(sound, rate) for sound in media]
        return dict(self.processor(waves, sampling_rate=rate, padding=True, return_tensors="pt"))


def _file_bytes(medium: Mapping[str, Any]) -> bytes:
    """Return the file of an image or a sound, given as {"bytes", "path"}.

    Raises DataError for one that is not there.
    """
    if medium["bytes"] is not None:
        return bytes(medium["bytes"])
    try:
        return Path(medium["path"]).read_bytes()
    except OSError as error:
        raise DataError(
            f"{medium['path']!r} cannot be read ({error.strerror}); mend it, or move it out of the"
            " data"
        ) from error


def _by_row(columns: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Return the rows of a table that is given by columns."""
    return [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]
