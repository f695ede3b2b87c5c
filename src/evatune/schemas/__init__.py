"""Strict schemas of the files that evatune reads, and one reader for each kind of container.

`text` reads JSON and YAML, `tensors` safetensors; `record`, `adapter` and `run` say what may be in
them. All of them raise `Damage`, a clause without the file's name: the caller knows the file, and
makes a sentence of it with `raise_with_path`.
"""

from __future__ import annotations

from evatune.schemas.damage import Damage, brief, naming_file

__all__ = ["Damage", "brief", "naming_file"]
