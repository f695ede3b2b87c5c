"""A process group that fails clearly: the few messages that calibrating together takes."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from evatune.errors import ProcessError
from evatune.utils.text import ABSENT, Difference, first_difference, one_line

# A process that is not heard of for this long is given up; torch's own default for gloo is three
# times as long.
_TIMEOUT = timedelta(minutes=10)
# After a message failed: how long the others may take to show that it was not they who were lost.
_GRACE_SECONDS = 10.0
_ADVICE = (
    "call evatune on every process, or let each work alone with"
    " CalibrationConfig(distributed=False) on every one"
)
# of groups formed so far, equal on all processes since they form them in the same order
_formed = 0


class ProcessGroup:
    """The processes that calibrate together; one alone is a group of one, and sends nothing.

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
        together: bool, device: torch.device | None, timeout: float
    ) -> Iterator[ProcessGroup]:
        """Yield the group of all of torch.distributed's processes, or of this one alone.

        Args:
            together: True if processes share the work, if there are several.
            device: where sums live; they travel by the backend of that device, everything else by
                gloo.
            timeout: seconds within which all processes must join.
        """
        if not together or not _has_several_processes():
            yield ProcessGroup()
            return
        process_group = _DistributedGroup(device or torch.device("cpu"), timeout)
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
        """Return the `value` of every process, by rank; anything that JSON can hold."""
        return [value]

    def broadcast(self, source: int, tensors: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """Return the named tensors of process `source`, on every process."""
        return dict(tensors or {})

    def reduce(self, sums: Tensor, to: int) -> Tensor:
        """Return the sum of everyone's `sums` (m,) on process `to`, and anything on the others."""
        return sums

    @contextmanager
    def exchange(self) -> Iterator[None]:
        """Enclose messages that belong together; between them no process can say why it failed."""
        yield

    @contextmanager
    def library_messages(self) -> Iterator[None]:
        """Enclose what sends messages of its own, such as training; here only errors are told.

        Raises ProcessError where another process is lost meanwhile.
        """
        yield

    def require_equal(
        self, facts: Mapping[str, Any], what: str = "calibrate the same thing"
    ) -> None:
        """Raise ProcessError on every process, naming a difference, unless `facts` are equal.

        Args:
            what: all of them should do, in the words of the message.
        """
        text = json.dumps(facts, sort_keys=True)
        hashes = self.gather(hashlib.sha256(text.encode()).hexdigest())
        if len(set(hashes)) == 1:
            return
        everyone = self.gather(facts)
        rank = next(rank for rank, hash_ in enumerate(hashes) if hash_ != hashes[0])
        # Numbers that are written in two ways, 2 and 2.0, differ in their text only.
        difference = first_difference(everyone[0], everyone[rank]) or Difference(
            "the whole", everyone[0], everyone[rank]
        )
        raise ProcessError(
            f"the processes do not {what}: {_in_words(difference, rank)}; start all of them with"
            " the same libraries, model, weights, targets and settings, or set distributed=False to"
            " let each work alone"
        )


class _DistributedGroup(ProcessGroup):
    """Several processes of torch.distributed, with a gloo group of their own for JSON."""

    def __init__(self, device: torch.device, timeout: float) -> None:
        super().__init__()
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        global _formed
        self._name = f"evatune/{_formed}"
        try:
            missing = self._wait_for_all(timeout)
            if not missing:
                self.group: Any = dist.new_group(backend="gloo", timeout=_TIMEOUT)
        except RuntimeError as error:
            raise ProcessError(
                f"the {self.size} processes cannot reach each other; {_ADVICE}"
            ) from error
        if missing:
            raise ProcessError(
                f"process {_listed(missing)} of {self.size} did not come to calibrate within"
                f" {timeout:g} seconds; {_ADVICE}, or give slow ones time with"
                " CalibrationConfig(rendezvous_timeout=...)"
            )
        _formed += 1
        self._store = self.group.get_group_store()
        self._messages = 0
        self._busy = False  # between the parts of a message, when nothing else can be said
        # the group by which tensors travel, and the device from which they do
        self._transport: tuple[Any, torch.device] = (dist.group.WORLD, device)
        if _backend_of(device) == "gloo":
            self._transport = (self.group, torch.device("cpu"))

    def _wait_for_all(self, timeout: float) -> list[int]:
        """Wait for all processes to come here; return the ranks that are missing at the end.

        `new_group` would wait as long as for a message later on, and not tell who is missing. Where
        some are, this process takes back that it came, so that a late one does not count on it and
        all can try again; those that it never saw are named before others that gave up.
        """
        store = dist.group.WORLD.get_group_store()  # type: ignore[union-attr]
        came = [f"{self._name}/came/{rank}" for rank in range(self.size)]
        store.set(came[self.rank], "")
        end = time.monotonic() + timeout
        unseen = list(range(self.size))
        while not store.check(came):
            if time.monotonic() > end:
                gone = [rank for rank, key in enumerate(came) if not store.check([key])]
                if gone:
                    store.delete_key(came[self.rank])
                return [rank for rank in gone if rank in unseen] or gone
            unseen = [rank for rank in unseen if not store.check([came[rank]])]
            time.sleep(0.02)
        return []

    def gather(self, value: Any) -> list[Any]:
        messages = self._gather_text(json.dumps({"value": value}))
        for rank, message in enumerate(messages):
            if "error" in message:
                raise ProcessError(
                    f"process {rank} of {self.size} stopped, and so do all: {message['error']}"
                )
        return [message["value"] for message in messages]

    def broadcast_error(self, error: Exception) -> None:
        """Tell the others, who wait for the next message or will, that none will come.

        ProcessError: one of them is lost.
        """
        if self._busy:
            return
        reason = f"{type(error).__name__}: {one_line(error, most=500)}"
        try:
            self._gather_text(json.dumps({"error": reason}))
        except ProcessError as lost:
            raise ProcessError(f"{reason}; while telling the others: {lost}") from error

    def close(self) -> None:
        """Close the connections, which ends the wait of others for a message that will not come."""
        try:
            dist.destroy_process_group(self.group)
        finally:  # an error's traceback may keep this object, and with it the connections
            del self.group, self._transport, self._store

    def broadcast(self, source: int, tensors: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        group, device = self._transport
        with self._guarded():
            header, payload = b"", torch.empty(0, dtype=torch.uint8, device=device)
            if self.rank == source:
                assert tensors is not None
                header, payload = _packed(tensors, payload)
                self.bytes_sent += len(header) + len(payload)
            sizes = _integers(len(header), len(payload))
            dist.broadcast(sizes, source, self.group)
            text = _bytes(header, int(sizes[0]))
            dist.broadcast(text, source, self.group)
            if self.rank != source:
                payload = payload.new_empty(int(sizes[1]))
            dist.broadcast(payload, source, group)
        return _unpacked(bytes(text.tolist()), payload)

    def reduce(self, sums: Tensor, to: int) -> Tensor:
        group, device = self._transport
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

    @contextmanager
    def library_messages(self) -> Iterator[None]:
        with self.exchange():
            try:
                yield
            except RuntimeError as error:
                if isinstance(error, dist.DistError) or "gloo" in str(error):
                    raise ProcessError(self._explain_loss()) from error
                raise

    def _gather_text(self, text: str) -> list[Any]:
        """Return the JSON text of every process, by rank, as values."""
        sent = text.encode()
        self._messages += 1
        with self._guarded():
            self._store.set(f"{self._name}/{self.rank}", str(self._messages))
            sizes = [_integers(0) for _ in range(self.size)]
            dist.all_gather(sizes, _integers(len(sent)), self.group)
            longest = max(int(size) for size in sizes)
            received = [_bytes(b"", longest) for _ in range(self.size)]
            dist.all_gather(received, _bytes(sent, longest), self.group)
            self.bytes_sent += len(sent)
        messages = []
        for padded, size in zip(received, sizes, strict=True):
            message = padded[: int(size)]
            messages.append(json.loads(bytes(message.tolist())))
        return messages

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Raise ProcessError, saying who was lost, for what the backend raises in the block."""
        try:
            yield
        # of the backend: a connection that closed, or nobody there in time
        except RuntimeError as error:
            self._busy = True
            raise ProcessError(self._explain_loss()) from error

    def _explain_loss(self) -> str:
        """Name who did not come to the message that failed, as far as can be told."""
        missing = set(range(self.size)) - {self.rank}
        end = time.monotonic() + _GRACE_SECONDS
        try:
            while missing and time.monotonic() < end:
                missing = {rank for rank in missing if self._messages_of(rank) < self._messages}
                time.sleep(0.1)
        except RuntimeError:
            return (
                "the process that keeps the group's records (0, or the launcher) is gone; see its"
                " output, and start again"
            )
        if not missing:
            return (
                f"one of the {self.size} processes stopped in the middle of a message; see their"
                " outputs, and start again"
            )
        return (
            f"lost process {_listed(sorted(missing))} of {self.size} (it ended, or hangs); see its"
            " output, and start again"
        )

    def _messages_of(self, rank: int) -> int:
        key = f"{self._name}/{rank}"
        return int(self._store.get(key)) if self._store.check([key]) else 0


def _has_several_processes() -> bool:
    """Return True if torch.distributed is running more than this process."""
    if not dist.is_available() or not dist.is_initialized():
        return False
    return dist.get_world_size() > 1


def _backend_of(device: torch.device) -> str:
    """Return the backend of the default group for a device; gloo if it names none."""
    config = dist.get_backend_config()  # such as cpu:gloo,cuda:nccl
    backends = dict(pair.split(":") for pair in config.split(","))
    return str(backends.get(device.type, "gloo"))


def _packed(tensors: Mapping[str, Tensor], empty: Tensor) -> tuple[bytes, Tensor]:
    """Return a JSON header of names, shapes and dtypes, and all values as bytes (n,) uint8.

    Args:
        empty: (0,) uint8, on the device to send from.
    """
    header = []
    values = [empty]
    for name, tensor in tensors.items():
        moved = tensor.contiguous().to(empty.device)
        header.append([name, list(moved.shape), str(moved.dtype).removeprefix("torch.")])
        values.append(moved.reshape(-1).view(torch.uint8))
    return json.dumps(header).encode(), torch.cat(values)


def _unpacked(header: bytes, payload: Tensor) -> dict[str, Tensor]:
    """Return the tensors of which `_packed` made a header and a payload."""
    tensors = {}
    start = 0
    for name, shape, dtype_name in json.loads(header):
        dtype = getattr(torch, dtype_name)
        stop = start + math.prod(shape) * dtype.itemsize
        # A copy, since a view as a wider type has to begin at a multiple of its size.
        tensors[name] = payload[start:stop].clone().view(dtype).reshape(shape)
        start = stop
    return tensors


def _bytes(text: bytes, size: int) -> Tensor:
    """Return bytes as (size,) uint8, filled up with zeros."""
    padded = text.ljust(size, b"\0")
    return torch.tensor(list(padded), dtype=torch.uint8, device="cpu")


def _integers(*values: int) -> Tensor:
    """Return integers as (n,) int64 on the CPU."""
    return torch.tensor(values, dtype=torch.int64, device="cpu")


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))


def _in_words(difference: Difference, rank: int) -> str:
    """Return the difference between process 0 and process `rank` in words."""
    where, first, other = difference
    if other is ABSENT:
        return f"only process 0 has {where}"
    if first is ABSENT:
        return f"only process {rank} has {where}"
    return f"{where} is {first} on process 0 and {other} on process {rank}"
