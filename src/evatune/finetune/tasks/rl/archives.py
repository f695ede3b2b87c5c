"""Episodes on Meta-World that others have recorded, of which a run reads as many as it asks for.

The data set ml-jku/meta-world of the hub has two million steps of each task, played by an agent
that learned meanwhile. A task comes in one of these forms; the first that is there is read.

    hammer-v2/*.npz     a file for each episode: states (T, 39), actions (T, 4), rewards (T,)
    hammer-v2.tar.gz    such a folder, packed
    hammer-v2.npz       all episodes after each other: observations (N, 39), actions (N, 4), rewards
                        (N,), and dones (N,), 1 at the last step of each

In memory are the episodes that were drawn, twice while they are put together, and no others.
"""

from __future__ import annotations

import io
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import huggingface_hub
import numpy as np
import torch
from torch import Tensor

from evatune.errors import ConfigError, DataError
from evatune.finetune.recipe import HUB, DataOptions
from evatune.finetune.tasks.base import DataSource
from evatune.finetune.tasks.rl.simulator import ACTIONS, STATES
from evatune.finetune.tasks.splits import Split, draw
from evatune.finetune.tasks.user_data import own_sources, sized
from evatune.loading.arrays import arrays_of
from evatune.loading.hub import reading
from evatune.utils.names import stays_below

_REPOSITORY = "ml-jku/meta-world"
_COPIES = "a folder with copies of its archives, as in data.source=FOLDER"
_VERSION = "-v2"  # of Meta-World
_PACKED, _ARRAYS = ".tar.gz", ".npz"
_OTHERS = (".hdf5", ".h5", ".pkl")  # forms of an episode that the authors' code reads too
_MOST_FILES = 1_000_000  # in an archive
_MOST_BYTES = 64 << 20  # of an episode's file
_LONGEST = 10_000  # steps of an episode
_MOST_STEPS = 20_000_000  # of a task


@dataclass(frozen=True)
class _Episode:
    """States (T, 39) and actions (T, 4), float32, and the sum of the rewards."""

    states: np.ndarray
    actions: np.ndarray
    total: float


class _Recording(Protocol):
    """The episodes of a task, numbered, in one of the forms."""

    def __len__(self) -> int: ...

    def read(self, numbers: Sequence[int]) -> Iterator[tuple[int, _Episode]]:
        """Yield the episodes of ascending numbers with these, in the order they are stored in."""
        ...


def recorded(task: str, data: DataOptions, tasks: int) -> Split[dict[str, Tensor]]:
    """Return episodes of a task for each part, drawn with the seed 0; none is in two of them.

    Agents fail until they have learned, and what is recorded is their reward, not their success.
    So the return to go is, at every step, the reward of the whole episode as a share of the best
    one's that is trained on, within 0 and 1.

    Args:
        data: its source is "hub", or a folder with a copy of the task's archive; its sizes count
            episodes of all tasks together, and those left open are as for the user's own data.
        tasks: how many of them share the sizes.

    Returns:
        states (steps, 39), actions (steps, 4), labels (the actions), returns_to_go (steps, 1),
        lengths (episodes,).

    Raises:
        ConfigError: sizes beyond the data. DataError: nothing can be read there.
    """
    source = str(data.source)
    recording = _find(source, task)
    total = len(recording)
    each = [size and max(1, size // tasks) for size in (data.train, data.validation, data.test)]
    shared = replace(data, train=each[0], validation=each[1], test=each[2])
    sizes = sized(shared, total, total)
    asked = sizes.train + sizes.validation + sizes.test
    if asked > total:
        raise ConfigError(
            f"data.train, data.validation and data.test ask for {asked} episodes of task {task!r},"
            f" and {source!r} has {total}; lower them"
        )
    parts = draw(total, task, train=sizes.train, validation=sizes.validation, test=sizes.test)
    episodes = dict(recording.read(sorted(number for part in parts for number in part)))
    best = max(episodes[number].total for number in parts[0])
    if best <= 0:
        raise DataError(
            f"no episode of task {task!r} in {source!r} has a reward above 0; get them anew"
        )
    return Split(*(_joined([episodes[number] for number in part], best) for part in parts))


def _joined(episodes: Sequence[_Episode], best: float) -> dict[str, Tensor]:
    lengths = [len(episode.states) for episode in episodes]
    shares = [min(max(episode.total / best, 0.0), 1.0) for episode in episodes]
    states = np.concatenate(
        [np.empty((0, STATES), "f4"), *(episode.states for episode in episodes)]
    )
    actions = np.concatenate(
        [np.empty((0, ACTIONS), "f4"), *(episode.actions for episode in episodes)]
    )
    returns = np.repeat(np.array(shares, "f4"), np.array(lengths, int))
    return {
        "states": torch.from_numpy(states),
        "actions": torch.from_numpy(actions),
        "labels": torch.from_numpy(actions),
        "returns_to_go": torch.from_numpy(returns)[:, None],
        "lengths": torch.tensor(lengths, dtype=torch.long, device="cpu"),
    }


def sources(data: DataOptions, tasks: Sequence[str]) -> list[DataSource]:
    """Return what the recordings of tasks are read from: a folder, or the hub's archives."""
    if data.source != HUB:
        return own_sources(data)
    archives = tuple(f"{task}{_VERSION}{_PACKED}" for task in tasks)
    return [DataSource(_REPOSITORY, files=archives)]


def _find(source: str, task: str) -> _Recording:
    """Return a task's episodes in a folder, or on the hub; DataError where there are none."""
    names = [f"{task}{_VERSION}", task]
    for folder in _folders(source, names):
        if not folder.is_dir():  # the hub has no such file
            continue
        below = sorted(path for path in folder.iterdir() if path.is_dir())
        for stem in (place / name for name in names for place in (folder, *below)):
            packed, arrays = (stem.with_name(stem.name + end) for end in (_PACKED, _ARRAYS))
            if stem.is_dir():
                return _Folder(stem)
            if packed.is_file():
                return _Archive(packed)
            if arrays.is_file():
                return _Table(arrays)
    raise DataError(
        f"{source!r} has no {names[0]}{_PACKED}, no folder {names[0]} and no file"
        f" {names[0]}{_ARRAYS}; give {HUB}, or {_COPIES}"
    )


def _folders(source: str, names: Sequence[str]) -> Iterator[Path]:
    """Yield where a task of these names may be; on the hub one form is downloaded at a time."""
    if source == HUB:
        for end in (_PACKED, _ARRAYS):
            yield _download([name + end for name in names])
    elif Path(source).is_dir():
        yield Path(source)
    else:
        raise DataError(f"data.source {source!r} is no folder; give {HUB}, or {_COPIES}")


def _download(names: Sequence[str]) -> Path:
    """Return a folder with those of the files that the hub's repository has, wherever they are."""
    patterns = [pattern for name in names for pattern in (name, f"*/{name}")]
    with reading(_REPOSITORY, "episodes", _COPIES):
        folder = huggingface_hub.snapshot_download(
            _REPOSITORY, repo_type="dataset", allow_patterns=patterns
        )
    return Path(folder)


class _Folder:
    """A folder with a file for each episode."""

    def __init__(self, path: Path) -> None:
        names = sorted(file.name for file in path.iterdir() if file.is_file())
        self._files = [path / name for name in _episodes_of(names, path)]

    def __len__(self) -> int:
        return len(self._files)

    def read(self, numbers: Sequence[int]) -> Iterator[tuple[int, _Episode]]:
        for number in numbers:
            file = self._files[number]
            _require_size(file.stat().st_size, repr(str(file)))
            yield number, _read_episode(file, repr(str(file)))


class _Archive:
    """A tar.gz of such a folder; all of its members are checked before one is read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        members: dict[str, tarfile.TarInfo] = {}
        with _unpacking(path), tarfile.open(path, "r:gz") as opened:
            for count, member in enumerate(opened):
                self._check(member, count)
                if member.isfile():
                    members[member.name] = member
        self._members = [members[name] for name in _episodes_of(sorted(members), path)]

    def _check(self, member: tarfile.TarInfo, count: int) -> None:
        shown = f"{str(self._path)!r} holds {member.name[:80]!r}"
        if not stays_below(member.name) and member.name != ".":
            raise DataError(f"{shown}, which leads out of its folder; get it from elsewhere")
        if not member.isfile() and not member.isdir():
            raise DataError(f"{shown}, a link or a device; get it from elsewhere")
        if count >= _MOST_FILES:
            raise DataError(
                f"{str(self._path)!r} holds more than {_MOST_FILES:,} files; get it from elsewhere"
            )

    def __len__(self) -> int:
        return len(self._members)

    def read(self, numbers: Sequence[int]) -> Iterator[tuple[int, _Episode]]:
        stored = sorted(numbers, key=lambda number: self._members[number].offset)
        with _unpacking(self._path), tarfile.open(self._path, "r:gz") as opened:
            for number in stored:
                member = self._members[number]
                where = f"{member.name!r} of {str(self._path)!r}"
                _require_size(member.size, where)
                stream = opened.extractfile(member)
                assert stream is not None  # it is a file
                # an npz file is read from its end, and a tar.gz from its beginning
                yield number, _read_episode(io.BytesIO(stream.read()), where)


class _Table:
    """An npz file of all episodes after each other; steps after the last end are left out."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with arrays_of(path, repr(str(path))) as arrays:
            (done,) = arrays.rows("dones", 1, _MOST_STEPS)
        ends = [0, *(np.flatnonzero(done) + 1).tolist()]
        self._bounds = [slice(*pair) for pair in pairwise(ends)]
        if not self._bounds:
            raise DataError(f"no episode ends in {str(path)!r}, by its dones; get it anew")

    def __len__(self) -> int:
        return len(self._bounds)

    def read(self, numbers: Sequence[int]) -> Iterator[tuple[int, _Episode]]:
        bounds = [self._bounds[number] for number in numbers]
        with arrays_of(self._path, repr(str(self._path))) as arrays:
            states = arrays.rows("observations", STATES, _MOST_STEPS, bounds)
            actions = arrays.rows("actions", ACTIONS, _MOST_STEPS, bounds)
            rewards = arrays.rows("rewards", 1, _MOST_STEPS, bounds)
        for index, number in enumerate(numbers):
            yield number, _Episode(states[index], actions[index], float(rewards[index].sum()))


def _episodes_of(names: Sequence[str], path: Path) -> list[str]:
    """Return the names that are files of episodes; DataError where there are none."""
    arrays = [name for name in names if name.endswith(_ARRAYS)]
    others = [name for name in names if name.endswith(_OTHERS)]
    if arrays:
        return arrays
    if others:
        raise DataError(
            f"{str(path)!r} holds episodes such as {others[0]!r}, and {_ARRAYS} alone is read here;"
            " write each by numpy.savez_compressed with states, actions and rewards"
        )
    raise DataError(f"{str(path)!r} holds no episode, which is a file {_ARRAYS}; get it anew")


def _require_size(size: int, where: str) -> None:
    if size > _MOST_BYTES:
        raise DataError(
            f"{where} has {size >> 20} MiB, which is no single episode; write a file for each"
        )


def _read_episode(file: Path | io.BytesIO, where: str) -> _Episode:
    with arrays_of(file, where) as arrays:
        (states,) = arrays.rows("states", STATES, _LONGEST)
        (actions,) = arrays.rows("actions", ACTIONS, _LONGEST)
        (rewards,) = arrays.rows("rewards", 1, _LONGEST)
    if not len(states) == len(actions) == len(rewards) > 0:
        raise DataError(
            f"{where} has {len(states)} states, {len(actions)} actions and {len(rewards)} rewards;"
            " one of each for every step belongs there"
        )
    return _Episode(states, actions, float(rewards.sum()))


@contextmanager
def _unpacking(path: Path) -> Iterator[None]:
    """Tell in a DataError of a tar.gz that is cut off, or no such file."""
    try:
        yield
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise DataError(f"{str(path)!r} is no whole tar.gz ({error}); get it anew") from error
