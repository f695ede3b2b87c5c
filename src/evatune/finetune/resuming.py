"""The newest of Trainer's checkpoints that is whole, which a run goes on from."""

from __future__ import annotations

import shutil
import warnings
import zipfile
import zlib
from pathlib import Path

from evatune.schemas import FormatError
from evatune.schemas.run import TrainerState
from evatune.schemas.tensors import read_header
from evatune.schemas.text import read_text, validate_json
from evatune.utils.names import ADAPTER_FILE

_STATE = "trainer_state.json"  # written last
_SCHEDULE = "scheduler.pt"
_OPTIMIZER = "optimizer.pt"
_FSDP2 = ("optimizer.bin", "pytorch_model_fsdp.bin")  # what it has in place of that
_ZERO_3 = "global_step*/*.pt"  # the same, two of each process
_RANDOM_STATES = "rng_state*.pth"  # one of each process

# NotImplementedError and RuntimeError: a method or an encryption that a flipped bit makes up.
_ZIP_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    OSError,
    NotImplementedError,
    RuntimeError,
    ValueError,
)

_WEIGHTS = ("model.safetensors", ADAPTER_FILE)


def newest_whole(folder: Path) -> Path | None:
    """Return the newest whole checkpoint in `folder`, or None where the run must begin again.

    Those that are damaged or half written are removed, with a warning that says why: they would
    fail again at every further try, and Trainer would count them among those it keeps.
    """
    for path in sorted(_checkpoints(folder), key=_step, reverse=True):
        try:
            _require_whole(path)
        except FormatError as fault:
            shutil.rmtree(path, ignore_errors=True)
            warnings.warn(
                f"checkpoint {str(path)!r} cannot be gone on from: it {fault}. It is removed, and "
                "the run goes on from the one before, or from its beginning",
                stacklevel=3,
            )
        else:
            return path
    return None


def _checkpoints(folder: Path) -> list[Path]:
    folders = [path for path in folder.glob("checkpoint-*") if path.is_dir()]
    return [path for path in folders if _step(path) >= 0]


def _step(path: Path) -> int:
    digits = path.name.removeprefix("checkpoint-")
    return int(digits) if digits.isdecimal() and len(digits) < 16 else -1


def _require_whole(path: Path) -> None:
    """Raise FormatError unless every file that Trainer reads is there and is what was written."""
    states = sorted(state.name for state in path.glob(_RANDOM_STATES))
    optimizer = _optimizer(path)
    missing = [name for name in (_STATE, _SCHEDULE, *optimizer) if not (path / name).is_file()]
    if not states:
        missing.append(_RANDOM_STATES)
    if missing:
        raise FormatError(f"lacks {missing[0]}")
    state = validate_json(TrainerState, read_text(path / _STATE))
    if state.global_step != _step(path):
        raise FormatError(f"is of step {state.global_step} by its {_STATE}")
    for name in (_SCHEDULE, *optimizer, *states):
        _require_whole_archive(path / name)
    weights = [path / name for name in _WEIGHTS if (path / name).is_file()]
    if not weights:
        raise FormatError(f"lacks {' and '.join(_WEIGHTS)}")
    for file in weights:
        try:
            read_header(file)
        except FormatError as fault:
            raise FormatError(f"holds a {file.name} that {fault}") from fault


def _optimizer(path: Path) -> list[str]:
    """Return the names of the files with the optimizer's state, and the shards where there are."""
    if (path / _FSDP2[0]).is_file():
        return list(_FSDP2)
    shards = sorted(str(file.relative_to(path)) for file in path.glob(_ZERO_3))
    return shards or [_OPTIMIZER]


def _require_whole_archive(path: Path) -> None:
    """Raise FormatError unless a file of torch.save has its own checksums; nothing is unpickled."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except _ZIP_ERRORS as error:
        raise FormatError(f"holds a damaged {path.name} ({error})") from error
    if damaged is not None:
        raise FormatError(
            f"holds a damaged {path.name} (the checksum of {damaged[:80]!r} is another)"
        )
