"""Refreshing sketches that several processes feed: sums travel to one of them, what it finds
travels back.

A sketch's rows are spread over the processes as sums about one and the same basis, so that what all
of them have seen is the sum of the sums. At a refresh each layer input is given to one process,
which adds up, factorises and sends the new basis and the spectrum to the others, bit for bit;
theirs start again from zero. So the factorisations are shared out too, nothing has the size of an
activation, and what travels is 8·d·l bytes to the owner and 4·d·l back.

A newborn sketch has chosen its basis from its own process's rows. At its first refresh one
process's basis is taken, and the others' sums are carried over to it as well as their own l
directions of that one batch can (`Sketch.change_basis`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from evatune.capture import InputGroup, SharedInputs
from evatune.distributed.group import ProcessGroup
from evatune.sketch import Sketch, refresh_all
from evatune.sketch.spectrum import Spectrum

# Sums are added up in pieces of about this size, so that no process needs room for all of them
# twice.
_PIECE_BYTES = 64 << 20


class DistributedSketches:
    """The sketches of all processes as one set.

    Args:
        team: the processes; every one calls `refresh` at the same points.
        sharing: this process's groups.
        names: of all watched layers, in an order that all processes have.
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
            for owner in sorted(set(owners.values())):
                spectra |= self._refresh_of(
                    owner, [group for group in owners if owners[group] == owner]
                )
        return {group: spectra[group] for group in owners}

    def _arrange(self) -> dict[InputGroup, int]:
        """Make the groups the same everywhere, as fine as the finest; and say which process works
        on which."""
        mine = {group: number for number, group in enumerate(self._shared_inputs.groups)}
        own = [
            mine[group] if (group := self._shared_inputs.group_of(name)) else None
            for name in self._names
        ]
        rows = [group.sketch.count for group in mine]
        everyone = self._process_group.gather({"groups": own, "rows": rows})
        parts: dict[tuple[int | None, ...], list[str]] = {}
        for place, name in enumerate(self._names):
            key = tuple(said["groups"][place] for said in everyone)
            if any(number is not None for number in key):
                parts.setdefault(key, []).append(name)
        groups = self._shared_inputs.arrange(list(parts.values()), self._make)
        owners = {}
        for place, (group, key) in enumerate(zip(groups, parts, strict=True)):
            seen = [rank for rank, number in enumerate(key) if number is not None]
            seen = [rank for rank in seen if everyone[rank]["rows"][key[rank]]] or seen
            owners[group] = seen[place % len(seen)]
        # who failed so far says so here, and not in the middle of what follows
        self._process_group.gather(None)
        return owners

    def _find_common_basis(self, owners: dict[InputGroup, int]) -> None:
        new = {
            group: owner
            for group, owner in owners.items()
            if not self._common.issuperset(group.members)
        }
        for owner in sorted(set(new.values())):
            groups = [group for group in new if new[group] == owner]
            for group, start in zip(
                groups, self._broadcast(owner, [g.sketch.start() for g in groups]), strict=True
            ):
                if owner != self._process_group.rank:
                    group.sketch.change_basis(start)
        # One that has not seen a row will choose its basis by its first ones, on each process by
        # other ones.
        self._common.update(
            name for group in new if group.sketch.shift is not None for name in group.members
        )

    def _refresh_of(self, owner: int, groups: list[InputGroup]) -> dict[InputGroup, Spectrum]:
        """Refresh the groups of one owner, and bring all processes to what it finds."""
        at_home = owner == self._process_group.rank
        for piece in _pieces(groups):
            home = piece[0].sketch.device
            sums = [group.sketch.sums().to(home) for group in piece]
            added = self._process_group.reduce(torch.cat(sums), owner)
            if at_home:
                for group, part in zip(
                    piece, torch.split(added, [len(part) for part in sums]), strict=True
                ):
                    group.sketch.set_sums(part)
        if at_home:
            spectra = refresh_all([group.sketch for group in groups])
            found = [
                _payload(group.sketch, spectrum)
                for group, spectrum in zip(groups, spectra, strict=True)
            ]
        else:
            found = [{} for _ in groups]
        shared = self._broadcast(owner, found)
        if not at_home:
            for group, payload in zip(groups, shared, strict=True):
                group.sketch.set_basis(payload)
                payload.setdefault("directions", group.sketch.leading(len(payload["energies"])))
            spectra = [Spectrum.of_state(payload) for payload in shared]
        return dict(zip(groups, spectra, strict=True))

    def _broadcast(self, owner: int, values: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """One named set of tensors per group, in one message."""
        flat = {
            f"{place}.{key}": tensor
            for place, value in enumerate(values)
            for key, tensor in value.items()
        }
        shared: list[dict[str, Tensor]] = [{} for _ in values]
        for name, tensor in self._process_group.broadcast(owner, flat).items():
            place, _, key = name.partition(".")
            shared[int(place)][key] = tensor
        return shared


def _payload(sketch: Sketch, spectrum: Spectrum) -> dict[str, Tensor]:
    """What the others need to have the same spectrum and basis. The directions are, as a rule, in
    the basis already."""
    payload = spectrum.state() | sketch.start()
    if torch.equal(sketch.leading(len(spectrum.energies)), spectrum.directions):
        del payload["directions"]
    return payload


def _pieces(groups: list[InputGroup]) -> Iterator[list[InputGroup]]:
    piece: list[InputGroup] = []
    for group in groups:
        piece.append(group)
        if sum(group.sketch.nbytes for group in piece) >= _PIECE_BYTES:
            yield piece
            piece = []
    if piece:
        yield piece
