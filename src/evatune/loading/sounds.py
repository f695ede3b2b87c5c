"""Sounds from the bytes of their files, at the rate that a model listens at."""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from evatune.errors import DataError
from evatune.loading.data_files import is_hidden
from evatune.utils.extras import extras
from evatune.utils.text import one_line

with extras(__name__):
    import datasets

_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")
_LONGEST = 30  # seconds of a sound that count


def load_sounds(folder: Path) -> Any:
    """Return the sounds anywhere below a folder, as a `datasets.Dataset` of undecoded audio.

    With subfolders it has a column "label", of their names. `datasets` itself would need torchcodec
    for as much as listing them.

    Raises DataError where there is none.
    """
    sounds = (path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES)
    files = sorted(path for path in sounds if not is_hidden(path, folder))
    if not files:
        raise DataError(
            f"folder {str(folder)!r} holds no file that ends in {', '.join(_SUFFIXES)}; give one"
            " that does"
        )
    table = datasets.Dataset.from_dict({"audio": [{"bytes": None, "path": str(f)} for f in files]})
    table = table.cast_column("audio", datasets.Audio(decode=False))
    labels = [path.parent.name for path in files]
    return table if len(set(labels)) == 1 else table.add_column("label", labels)


def read_wave(sound: Mapping[str, Any], rate: int) -> Any:
    """Return the start of a sound as (n,) float32 in [-1, 1], all channels as one.

    WAV files are read by SciPy, others (FLAC, OGG, MP3) by soundfile where it is installed.

    Args:
        sound: {"bytes", "path"}, as `datasets` gives it undecoded. rate: samples per second.

    Raises DataError for what cannot be read.
    """
    name = sound["path"] or "a sound"
    try:
        file: Any = io.BytesIO(sound["bytes"]) if sound["bytes"] is not None else sound["path"]
        file_rate, samples = _read(file)
    except (OSError, ValueError, RuntimeError, struct.error) as error:
        raise DataError(
            f"{name!r} cannot be read as a sound ({one_line(error)}); give WAV files, or for"
            " others: pip install soundfile"
        ) from error
    mono = samples.mean(-1) if samples.ndim > 1 else samples
    mono = mono[: _LONGEST * file_rate]
    if file_rate != rate:
        with extras("--audio"):
            from scipy.signal import resample_poly  # takes half a second to import

        common = math.gcd(file_rate, rate)
        mono = resample_poly(mono, rate // common, file_rate // common)
    return np.ascontiguousarray(mono, dtype=np.float32)


def _read(file: Any) -> tuple[int, Any]:
    """Return samples per second, and (n,) or (n, channels) in [-1, 1]."""
    try:
        import soundfile
    except ImportError:
        with extras("--audio"):
            from scipy.io import wavfile

        rate, samples = wavfile.read(file)
        if samples.dtype.kind == "u":  # 8 bits
            return rate, samples.astype(np.float32) / 128 - 1
        if samples.dtype.kind == "i":
            return rate, samples.astype(np.float32) / -float(np.iinfo(samples.dtype).min)
        return rate, samples
    samples, rate = soundfile.read(file, dtype="float32")
    return rate, samples
