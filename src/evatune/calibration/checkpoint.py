"""A calibration that was interrupted goes on where it was: one file, whole or absent."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from evatune.choices import is_whole
from evatune.errors import ConfigError
from evatune.schemas import FormatError, raise_with_path, short_repr
from evatune.utils.outputs import claimed_file
from evatune.utils.text import ABSENT, Difference, first_difference

if TYPE_CHECKING:
    from evatune.schemas.record import CheckpointRecord

_FAMILY = "evatune-checkpoint-"
_FORMAT = f"{_FAMILY}3"
_ADVICE = "move it away, or name another checkpoint (evatune init: another --out)"


@dataclass(frozen=True)
class Checkpoint:
    """A file from which a calibration goes on after an interruption.

    The batches must come in the same order again: those already seen are read and passed over.

    Attributes:
        path: of the safetensors file, as text or a `Path`; written under a temporary name and
            renamed, so that it is never torn.
        every: batches from one writing to the next.
        resume: go on from the file, if there is one.
        about: whatever else must be the same for the file to fit, such as a fingerprint of the
            data; as JSON.
    """

    path: Path
    every: int = 8
    resume: bool = False
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))
        if not is_whole(self.every) or self.every < 1:
            raise ConfigError(
                f"checkpoint_every is {self.every!r}; it must be a whole number of at least 1 batch"
            )

    def due(self, batches: int) -> bool:
        """Return whether to write after this many batches."""
        return batches % self.every == 0

    def write(self, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Replace the file."""
        from evatune.schemas.tensors import save_sealed

        text = json.dumps({**record, "about": dict(self.about)})
        # Two spectra may be one and the same, which safetensors does not write.
        copies = {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, tensor in tensors.items()
        }
        with (
            claimed_file(self.path, True, _is_checkpoint, _ADVICE) as output,
            output.whole() as temporary,
        ):
            save_sealed(temporary, copies, _FORMAT, text)

    def remove(self) -> None:
        """Remove the file if it is a checkpoint, and what a killed process may have left of it."""
        with claimed_file(self.path, True, _is_checkpoint, _ADVICE) as output:
            output.remove()

    def require_own(self) -> None:
        """Raise a ConfigError if the path cannot be written, or holds what is no checkpoint."""
        with claimed_file(self.path, True, _is_checkpoint, _ADVICE):
            pass

    def read(self, same: Mapping[str, Any]) -> tuple[dict[str, Tensor], CheckpointRecord] | None:
        """Return tensors and record, or None where there is nothing to resume.

        Raises:
            ConfigError: the record's `same` or `about` differ from today's; the message names the
                difference. Or there is nothing to resume, and the path is not free for a
                checkpoint.
            RecordError: it is no checkpoint, or a damaged one.
        """
        if not self.resume or not self.path.exists():
            self.require_own()
            return None
        from evatune.schemas.record import CheckpointRecord
        from evatune.schemas.tensors import read_sealed
        from evatune.schemas.text import validate_json

        with raise_with_path(self.path, "remove it, or leave --resume out"):
            tensors, text = read_sealed(self.path, [_FORMAT], "a checkpoint of evatune")
            record = validate_json(CheckpointRecord, text)
            unsupported = [name for name, tensor in tensors.items() if not _is_whole(tensor)]
            if unsupported:
                raise FormatError(f"is damaged: {short_repr(unsupported[0])} has NaN or Inf in it")
        values = record.model_dump()
        was = {**{key: values.get(key) for key in same}, **record.about}
        now = json.loads(json.dumps({**same, **self.about}))
        keys = dict.fromkeys([*now, *was])
        difference = first_difference(
            {key: was.get(key) for key in keys}, {key: now.get(key) for key in keys}
        )
        if difference is not None:
            raise ConfigError(
                f"{self.path} does not fit: {_in_words(difference)}; resume with the same options"
                " and data, or leave --resume out to begin again"
            )
        return tensors, record


def _is_checkpoint(path: Path) -> bool:
    from evatune.schemas.tensors import read_header

    try:
        return read_header(path).metadata.get("format", "").startswith(_FAMILY)
    except FormatError:
        return False


def _is_whole(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def _in_words(difference: Difference) -> str:
    where, *values = difference
    was, now = (None if value is ABSENT else value for value in values)
    return f"{where} was {was} and is {now}"
