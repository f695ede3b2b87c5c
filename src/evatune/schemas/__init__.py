"""Strict schemas of the files that evatune reads, and one reader for each kind of container.

`text` reads JSON and YAML, `tensors` safetensors; `record`, `adapter` and `run` say what may be in
them. All of them raise `FormatError`, a clause without the file's name: the caller knows the file,
and makes a sentence of it with `raise_with_path`.
"""

from __future__ import annotations

from evatune.schemas.format_error import FormatError, raise_with_path, short_repr

__all__ = ["FormatError", "raise_with_path", "short_repr"]
