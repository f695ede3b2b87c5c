"""The watch for NaN and Inf in what layers are given."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from evatune.capture import InputGroup, SharedInputs
from evatune.distributed.group import ProcessGroup


class NonFiniteWatch:
    """Finds layers with NaN or Inf in their rows, and stops watching them.

    Attributes:
        first_seen: layer → the first batch with any, counted over all processes, and its process.
    """

    def __init__(self, shared_inputs: SharedInputs, process_group: ProcessGroup) -> None:
        self._shared_inputs = shared_inputs
        self._process_group = process_group
        self.first_seen: dict[str, tuple[int, int]] = {}

    def check(self, batch_number: int) -> None:
        """Look at every sketch, with one wait for each device, however many layers there are."""
        by_device: dict[torch.device, list[InputGroup]] = {}
        for group in self._shared_inputs.groups:
            by_device.setdefault(group.sketch.device, []).append(group)
        for groups in by_device.values():
            energies = torch.stack([group.sketch.watched_energy for group in groups])
            is_finite = torch.isfinite(energies).tolist()
            for group, finite in zip(groups, is_finite, strict=True):
                if not finite:
                    self._note(group, batch_number)

    def merge(self, everyone: Iterable[Mapping[str, Sequence[int]]]) -> None:
        """Take what all processes have seen; of one layer the first batch counts."""
        seen = [
            (name, (batch, process))
            for first_seen in everyone
            for name, (batch, process) in first_seen.items()
        ]
        # the first batch is the one that stays
        latest_first = sorted(seen, key=lambda entry: entry[1], reverse=True)
        self.set_state(dict(latest_first))

    def set_state(self, first_seen: Mapping[str, Sequence[int]]) -> None:
        """Go on from an earlier `first_seen`."""
        self.first_seen = {name: (batch, process) for name, (batch, process) in first_seen.items()}
        for name in self.first_seen:
            self._shared_inputs.stop_watching(name)

    def _note(self, group: InputGroup, batch_number: int) -> None:
        for name in group.members:
            self.first_seen.setdefault(name, (batch_number, self._process_group.rank))
            self._shared_inputs.stop_watching(name)
