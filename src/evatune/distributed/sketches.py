"""Sketches of several processes, refreshed together: sums travel to one, the spectrum travels back.

A sketch's rows are spread over the processes as sums about one and the same basis, so that what all
of them have seen is the sum of the sums. At a refresh each layer input is given to one process,
which adds up, factorizes and sends the new basis and the spectrum to the others, bit for bit;
theirs start again from zero. So the factorizations are shared out too, nothing has the size of an
activation, and what travels is 8·d·l bytes to the owner and 4·d·l back.

A sketch that was never refreshed has chosen its basis from the rows of its own process. At its
first refresh one process's basis is taken, and the others' sums are carried over to it as well as
their own l directions of that one batch can (`AdditiveSketch.change_basis`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from evatune.capture import InputGroup, SharedInputs
from evatune.distributed.group import ProcessGroup
from evatune.sketch import AdditiveSketch, Sketch, refresh_all
from evatune.sketch.spectrum import Spectrum

# Sums are added up in pieces of about this size, so that no process needs room for all of them
# twice.
_PIECE_BYTES = 64 << 20
_NamedTensors = dict[str, Tensor]


class DistributedSketches:
    """The sketches of all processes as one set.

    Args:
        process_group: the processes; every one calls `refresh` at the same points.
        shared_inputs: the groups of layers of this process; their sketches are additive.
        names: of all layers that are recorded, in an order that all processes have.
        make: builds an empty sketch for a layer that another process has seen and this one has not.
    """

    def __init__(
        self,
        process_group: ProcessGroup,
        shared_inputs: SharedInputs,
        names: Sequence[str],
        make: Callable[[str], Sketch],
    ) -> None:
        self._process_group = process_group
        self._shared_inputs = shared_inputs
        self._names = names
        self._make = make
        self._common: set[str] = set()  # layers whose sketch has the same basis everywhere

    def refresh(self) -> dict[InputGroup, Spectrum]:
        """Refresh every sketch on the rows of all processes; the same answer on each of them."""
        owners = self._arrange()
        with self._process_group.exchange():
            self._find_common_basis(owners)
            spectra: dict[InputGroup, Spectrum] = {}
            for owner, groups in _by_owner(owners):
                spectra |= self._refresh_of(owner, groups)
        return {group: spectra[group] for group in owners}

    def _arrange(self) -> dict[InputGroup, int]:
        """Make the groups the same everywhere, as fine as the finest; return each one's owner."""
        everyone = self._process_group.gather(self._numbers_and_rows())
        # Layers that are together on every process have equal numbers on every process.
        together: dict[tuple[int | None, ...], list[str]] = {}
        for position, name in enumerate(self._names):
            numbers = tuple(process["groups"][position] for process in everyone)
            if any(number is not None for number in numbers):
                together.setdefault(numbers, []).append(name)
        groups = self._shared_inputs.arrange(list(together.values()), self._make)
        rows = [process["rows"] for process in everyone]
        owners = {}
        for position, (group, numbers) in enumerate(zip(groups, together, strict=True)):
            candidates = _owner_candidates(numbers, rows)
            owners[group] = candidates[position % len(candidates)]
        # a process that failed so far says so here, and not in the middle of what follows
        self._process_group.gather(None)
        return owners

    def _numbers_and_rows(self) -> dict[str, list[int | None]]:
        """Return the number of the group of each layer, and the rows of each group, for JSON."""
        numbers = {group: number for number, group in enumerate(self._shared_inputs.groups)}
        of_names: list[int | None] = []
        for name in self._names:
            group = self._shared_inputs.group_of(name)
            of_names.append(None if group is None else numbers[group])
        return {"groups": of_names, "rows": [group.sketch.count for group in numbers]}

    def _find_common_basis(self, owners: dict[InputGroup, int]) -> None:
        """Give sketches that chose their basis on their own process the basis of their owner."""
        uncommon = {
            group: owner
            for group, owner in owners.items()
            if not self._common.issuperset(group.members)
        }
        for owner, groups in _by_owner(uncommon):
            basis_states = [_sketch_of(group).basis_state() for group in groups]
            received = self._broadcast(owner, basis_states)
            if owner == self._process_group.rank:
                continue
            for group, basis_state in zip(groups, received, strict=True):
                _sketch_of(group).change_basis(basis_state)
        # A sketch without rows has yet to choose its basis, and each process would choose another.
        for group in uncommon:
            if group.sketch.shift is not None:
                self._common.update(group.members)

    def _refresh_of(self, owner: int, groups: list[InputGroup]) -> dict[InputGroup, Spectrum]:
        """Refresh the groups of one owner, and bring all processes to what it finds."""
        is_owner = owner == self._process_group.rank
        for piece in _pieces(groups):
            self._reduce(owner, piece)
        payloads: list[_NamedTensors] = [{} for _ in groups]
        if is_owner:
            spectra = refresh_all([group.sketch for group in groups])
            payloads = [
                _payload(_sketch_of(group), spectrum)
                for group, spectrum in zip(groups, spectra, strict=True)
            ]
        payloads = self._broadcast(owner, payloads)
        if not is_owner:
            spectra = [
                _take_over(_sketch_of(group), payload)
                for group, payload in zip(groups, payloads, strict=True)
            ]
        return dict(zip(groups, spectra, strict=True))

    def _reduce(self, owner: int, groups: list[InputGroup]) -> None:
        """Add up the sums of the groups on their owner, in one message."""
        device = groups[0].sketch.device
        sums = [_sketch_of(group).sums().to(device) for group in groups]
        reduced = self._process_group.reduce(torch.cat(sums), owner)
        if owner != self._process_group.rank:
            return
        sizes = [len(flat) for flat in sums]
        for group, total in zip(groups, torch.split(reduced, sizes), strict=True):
            _sketch_of(group).set_sums(total)

    def _broadcast(self, owner: int, payloads: list[_NamedTensors]) -> list[_NamedTensors]:
        """Return the owner's payloads, one per group, in one message."""
        flat: _NamedTensors = {}
        for position, payload in enumerate(payloads):
            flat |= {f"{position}.{key}": tensor for key, tensor in payload.items()}
        received: list[_NamedTensors] = [{} for _ in payloads]
        for name, tensor in self._process_group.broadcast(owner, flat).items():
            position_text, _, key = name.partition(".")
            received[int(position_text)][key] = tensor
        return received


def _sketch_of(group: InputGroup) -> AdditiveSketch:
    sketch = group.sketch
    assert isinstance(sketch, AdditiveSketch)  # others are refused before the first batch
    return sketch


def _by_owner(owners: dict[InputGroup, int]) -> Iterable[tuple[int, list[InputGroup]]]:
    """Return the groups of each owner, by rank."""
    groups: dict[int, list[InputGroup]] = {}
    for group, owner in owners.items():
        groups.setdefault(owner, []).append(group)
    return sorted(groups.items(), key=lambda item: item[0])


def _owner_candidates(numbers: Sequence[int | None], rows: Sequence[Sequence[int]]) -> list[int]:
    """Return the ranks that have rows of a group, or else those that know it at all.

    Args:
        numbers: of the group on each process, None where it is not known.
        rows: on each process, of each of its groups.
    """
    known = {rank: number for rank, number in enumerate(numbers) if number is not None}
    with_rows = [rank for rank, number in known.items() if rows[rank][number]]
    return with_rows or list(known)


def _payload(sketch: AdditiveSketch, spectrum: Spectrum) -> _NamedTensors:
    """Return what the others need to have the same spectrum and basis.

    The directions are, as a rule, in the basis already.
    """
    payload = spectrum.state() | sketch.basis_state()
    if torch.equal(sketch.leading(len(spectrum.energies)), spectrum.directions):
        del payload["directions"]
    return payload


def _take_over(sketch: AdditiveSketch, payload: _NamedTensors) -> Spectrum:
    """Bring a sketch to what its owner found, and return the spectrum."""
    sketch.set_basis(payload)
    if "directions" not in payload:
        payload["directions"] = sketch.leading(len(payload["energies"]))
    return Spectrum.of_state(payload)


def _pieces(groups: list[InputGroup]) -> Iterator[list[InputGroup]]:
    """Yield the groups in runs of about `_PIECE_BYTES` of sums."""
    piece: list[InputGroup] = []
    for group in groups:
        piece.append(group)
        if sum(_sketch_of(member).sum_bytes for member in piece) >= _PIECE_BYTES:
            yield piece
            piece = []
    if piece:
        yield piece
