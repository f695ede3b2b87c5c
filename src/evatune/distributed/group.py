"""Several processes as one team: the few messages of a joint calibration, and what happens when one
fails."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from evatune.errors import ConfigError, ProcessError
from evatune.utils.text import ABSENT, Difference, first_difference

# A process that is not heard of for this long is given up; torch's own default for gloo is three
# times as long.
_PATIENCE = timedelta(minutes=10)


# After a message failed: how long the others may take to show that it was not they who were lost.
_GRACE_SECONDS = 10.0


_ALL_COME = (
    "call evatune on every process, or let each work alone with"
    " CalibrationConfig(distributed=False) on every one"
)


# of teams, equal on all processes since they form them in the same order
_numbers = itertools.count()


class ProcessGroup:
    """The processes that calibrate together; one process alone is a team of one, and sends nothing.

    Every process calls the same methods in the same order. Messages are JSON and tensors; nothing
    is unpickled. Where a process fails between two messages it tells the others in place of its
    next one, and all of them raise.
    """

    rank, size = 0, 1

    def __init__(self) -> None:
        # handed to collectives by this process; what they cost on the wire is up to the backend
        self.bytes_sent = 0

    @staticmethod
    @contextmanager
    def create(
        together: bool, device: torch.device | None, patience: float
    ) -> Iterator[ProcessGroup]:
        """The team of all of torch.distributed's processes, or of this one alone.

        Args:
            together: whether processes share the work, if there are several.
            device: where sums live; they travel by the backend of that device, everything else by
                gloo.
            patience: seconds in which all must have come.
        """
        if (
            not together
            or not dist.is_available()
            or not dist.is_initialized()
            or dist.get_world_size() == 1
        ):
            yield ProcessGroup()
            return
        process_group = _DistributedGroup(device or torch.device("cpu"), patience)
        try:
            yield process_group
            process_group.gather(None)  # nobody leaves before all are done
        except ProcessError:
            raise
        except Exception as error:
            process_group.broadcast_error(error)
            raise
        finally:
            process_group.close()

    def gather(self, value: Any) -> list[Any]:
        """The `value` of every process, by rank; anything that JSON can hold."""
        return [value]

    def broadcast(self, source: int, tensors: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """The named tensors of process `source`, on every process."""
        return dict(tensors or {})

    def reduce(self, sums: Tensor, to: int) -> Tensor:
        """On process `to`: the sum of everyone's `sums` (m,). On the others the result has no
        meaning."""
        return sums

    @contextmanager
    def exchange(self) -> Iterator[None]:
        """Around messages that belong together: who fails in between cannot tell the others, and
        leaves instead."""
        yield

    def require_equal(self, facts: Mapping[str, Any]) -> None:
        """Raise a ProcessError on every process, with the difference named, unless all have the
        same `facts`."""
        text = json.dumps(facts, sort_keys=True)
        prints = self.gather(hashlib.sha256(text.encode()).hexdigest())
        if len(set(prints)) == 1:
            return
        everyone = self.gather(facts)
        other = next(rank for rank, print_ in enumerate(prints) if print_ != prints[0])
        # Numbers that are written in two ways, 2 and 2.0, differ in their text only.
        difference = first_difference(everyone[0], everyone[other]) or Difference(
            "the whole", everyone[0], everyone[other]
        )
        raise ProcessError(
            "the processes do not calibrate the same thing:"
            f" {_in_words(difference, other)}; start all of them with the same"
            " model, weights, targets and settings, or set distributed=False to let each work"
            " alone"
        )


class _DistributedGroup(ProcessGroup):
    def __init__(self, device: torch.device, patience: float) -> None:
        super().__init__()
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._name = f"evatune/{next(_numbers)}"
        try:
            missing = self._missing(patience)
            if not missing:
                self.group: Any = dist.new_group(backend="gloo", timeout=_PATIENCE)
        except RuntimeError as error:
            raise ProcessError(
                f"the {self.size} processes cannot reach each other; {_ALL_COME}"
            ) from error
        if missing:
            names = ", ".join(map(str, missing))
            raise ProcessError(
                f"process {names} of {self.size} did not come to calibrate within {patience:g}"
                f" seconds; {_ALL_COME}, or give slow ones time with"
                " CalibrationConfig(rendezvous_timeout=...)"
            )
        self._store = self.group.get_group_store()
        self._messages = 0
        self._busy = False  # between the parts of a message, when nothing else can be said
        # Backends by device, such as cpu:gloo,cuda:nccl.
        native = dict(pair.split(":") for pair in dist.get_backend_config().split(",")).get(
            device.type, "gloo"
        )
        self._wire = (
            (self.group, torch.device("cpu")) if native == "gloo" else (dist.group.WORLD, device)
        )

    def _missing(self, patience: float) -> list[int]:
        """Wait for all processes to come here; the ranks of those who have not when the time is up.

        `new_group` would wait as long as for a message later on, and not tell who is missing.
        """
        store = dist.group.WORLD.get_group_store()  # type: ignore[union-attr]
        store.set(f"{self._name}/came/{self.rank}", "")
        end = time.monotonic() + patience
        missing = list(range(self.size))
        while missing:
            missing = [rank for rank in missing if not store.check([f"{self._name}/came/{rank}"])]
            if time.monotonic() > end:
                break
            time.sleep(0.02 if missing else 0)
        return missing

    def gather(self, value: Any) -> list[Any]:
        said = self._gather_text(json.dumps({"value": value}))
        for rank, message in enumerate(said):
            if "error" in message:
                raise ProcessError(
                    f"process {rank} of {self.size} stopped, and so do all: {message['error']}"
                )
        return [message["value"] for message in said]

    def broadcast_error(self, error: Exception) -> None:
        """Tell the others, who wait for the next message or will, that none will come.
        ProcessError: one of them is lost."""
        if not self._busy:
            try:
                self._gather_text(
                    json.dumps(
                        {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"}
                    )
                )
            except ProcessError as lost:
                raise lost from error

    def close(self) -> None:
        """Close the connections, which ends the wait of others for a message that will not come."""
        try:
            dist.destroy_process_group(self.group)
        finally:  # an error's traceback may keep the team, and with it the connections
            del self.group, self._wire, self._store

    def broadcast(self, source: int, tensors: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        group, device = self._wire
        with self._guarded():
            spec, payload = b"", torch.empty(0, dtype=torch.uint8, device=device)
            if self.rank == source:
                assert tensors is not None
                flat = {name: tensor.contiguous().to(device) for name, tensor in tensors.items()}
                spec = json.dumps(
                    [
                        [n, list(t.shape), str(t.dtype).removeprefix("torch.")]
                        for n, t in flat.items()
                    ]
                ).encode()
                payload = torch.cat(
                    [payload, *(tensor.reshape(-1).view(torch.uint8) for tensor in flat.values())]
                )
                self.bytes_sent += len(spec) + len(payload)
            sizes = _integers(len(spec), len(payload))
            dist.broadcast(sizes, source, self.group)
            text = _bytes(spec, int(sizes[0]))
            dist.broadcast(text, source, self.group)
            if self.rank != source:
                payload = payload.new_empty(int(sizes[1]))
            dist.broadcast(payload, source, group)
        shared, start = {}, 0
        for name, shape, dtype in json.loads(bytes(text.tolist())):
            kind = getattr(torch, dtype)
            stop = start + math.prod(shape) * kind.itemsize
            # A copy, since a view as a wider type has to begin at a multiple of its size.
            shared[name] = payload[start:stop].clone().view(kind).reshape(shape)
            start = stop
        return shared

    def reduce(self, sums: Tensor, to: int) -> Tensor:
        group, device = self._wire
        with self._guarded():
            moved = sums.to(device)
            dist.reduce(moved, to, group=group)
            if self.rank != to:
                self.bytes_sent += moved.nbytes
        return moved.to(sums.device)

    @contextmanager
    def exchange(self) -> Iterator[None]:
        self._busy = True
        yield
        self._busy = False

    def _gather_text(self, text: str) -> list[Any]:
        spoken = text.encode()
        self._messages += 1
        with self._guarded():
            self._store.set(f"{self._name}/{self.rank}", str(self._messages))
            sizes = [_integers(0) for _ in range(self.size)]
            dist.all_gather(sizes, _integers(len(spoken)), self.group)
            longest = max(int(size) for size in sizes)
            heard = [_bytes(b"", longest) for _ in range(self.size)]
            dist.all_gather(heard, _bytes(spoken, longest), self.group)
            self.bytes_sent += len(spoken)
        return [
            json.loads(bytes(t[: int(size)].tolist())) for t, size in zip(heard, sizes, strict=True)
        ]

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        # of the backend: a connection that closed, or nobody there in time
        except RuntimeError as error:
            self._busy = True
            raise ProcessError(self._lost()) from error

    def _lost(self) -> str:
        """Who did not come to the message that failed, as far as can be told."""
        missing = set(range(self.size)) - {self.rank}
        end = time.monotonic() + _GRACE_SECONDS
        try:
            while missing and time.monotonic() < end:
                missing = {rank for rank in missing if self._messages_of(rank) < self._messages}
                time.sleep(0.1)
        except RuntimeError:
            return (
                "the process that keeps the team's records (0, or the launcher) is gone; see its"
                " output, and start again"
            )
        if not missing:
            return (
                f"one of the {self.size} processes stopped in the middle of a message; see their"
                " outputs, and start again"
            )
        names = ", ".join(map(str, sorted(missing)))
        return (
            f"lost process {names} of {self.size} (it ended, or hangs); see its output, and start"
            " again"
        )

    def _messages_of(self, rank: int) -> int:
        key = f"{self._name}/{rank}"
        return int(self._store.get(key)) if self._store.check([key]) else 0


def require_alone(command: str) -> None:
    """Raise a ConfigError in a process that a launcher started as one of several."""
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes != "1":
        raise ConfigError(
            f"this is one of {processes} processes, and {command} is for one; start it without"
            " torchrun or accelerate launch, or call evatune.initialize in a script of your own,"
            " which works on any number"
        )


def _bytes(text: bytes, size: int) -> Tensor:
    """(size,) uint8, filled up with zeros."""
    return torch.tensor(list(text.ljust(size, b"\0")), dtype=torch.uint8, device="cpu")


def _integers(*values: int) -> Tensor:
    """(n,) int64 on the CPU."""
    return torch.tensor(values, dtype=torch.int64, device="cpu")


def _in_words(difference: Difference, rank: int) -> str:
    """Return the difference between process 0 and process `rank` in words."""
    where, first, other = difference
    if other is ABSENT:
        return f"only process 0 has {where}"
    if first is ABSENT:
        return f"only process {rank} has {where}"
    return f"{where} is {first} on process 0 and {other} on process {rank}"
