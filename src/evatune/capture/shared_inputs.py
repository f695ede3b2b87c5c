"""Which layers have the same input, and one sketch for all of them.

Found by tensor identity while the model runs: the query, key and value projections are handed the
very same tensor, and read it as rows in the same way. No value is read. Layers join a group at
their first call; whoever is later handed something else leaves it with a copy of the sketch as it
stood, so a group is right at every moment and sharing changes the cost only.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from evatune.capture.layer_types import TargetLayer
from evatune.sketch import Sketch, SketchUpdate


class _Identity:
    """Recognises a tensor seen before: the same memory, still alive, not written to since, the same
    rows of it chosen."""

    def __init__(self, x: Tensor, chooser: object) -> None:
        self.ref = weakref.ref(x)
        self.key = memory(x)
        self.chooser = chooser

    def matches(self, x: Tensor, chooser: object) -> bool:
        # While the first tensor lives its memory cannot be handed to another one. Inference tensors
        # keep no count of writes, so two calls with one of them may have seen different values.
        alive = self.ref() is not None and not x.is_inference()
        return alive and chooser is self.chooser and memory(x) == self.key


def memory(x: Tensor) -> tuple[object, ...]:
    """What tells a tensor from any other that is alive, and from itself after a write."""
    version = 0 if x.is_inference() else x._version
    return (x.data_ptr(), x.shape, x.stride(), x.dtype, x.device, version)


@dataclass
class _Pending:
    """One activation of this forward pass that some members of the group have seen and others not
    yet."""

    identity: _Identity
    summarize: SketchUpdate


@dataclass(eq=False)
class InputGroup:
    """Layers that have been handed the same tensors so far, and their common sketch."""

    sketch: Sketch
    # member → how many of `pending` it has seen
    consumed: dict[str, int] = field(default_factory=dict)
    pending: list[_Pending] = field(default_factory=list)
    open: bool = True  # nothing has gone into the sketch yet, so that a layer may still join

    @property
    def members(self) -> list[str]:
        return list(self.consumed)

    def flush(self) -> None:
        """Add to the sketch what every member has seen."""
        while self.pending and min(self.consumed.values()) > 0:
            self.open = False
            self.sketch.add(self.pending.pop(0).summarize)
            for name in self.consumed:
                self.consumed[name] -= 1

    def split(self, names: list[str]) -> InputGroup:
        """Members that have seen the same part of `pending` leave with a copy of the sketch."""
        seen = self.consumed[names[0]]
        other = InputGroup(
            self.sketch.clone(), dict.fromkeys(names, seen), self.pending[:seen], open=False
        )
        for name in names:
            del self.consumed[name]
        other.flush()
        self.flush()
        return other


class SharedInputs:
    """Routes activations to groups.

    Args:
        make: builds a newborn sketch for the input of a layer.
        share: False when rows depend on the layer's name, so that no two layers can share.
    """

    def __init__(
        self, make: Callable[[TargetLayer, torch.device], Sketch], *, share: bool = True
    ) -> None:
        self._make = make
        self._share = share
        self._group: dict[str, InputGroup] = {}
        # born in this forward pass, by first tensor
        self._uninitialized: dict[object, tuple[_Identity, InputGroup]] = {}
        self._uninitialized_groups: set[InputGroup] = set()
        self._unwatched: set[str] = set()

    @property
    def groups(self) -> list[InputGroup]:
        """The distinct groups, in the order of their first call."""
        return list(dict.fromkeys(self._group.values()))

    def group_of(self, name: str) -> InputGroup | None:
        return self._group.get(name)

    def record(
        self,
        target_layer: TargetLayer,
        x: Tensor,
        chooser: object,
        summarize: Callable[[Sketch], SketchUpdate],
    ) -> None:
        """A layer is called with `x`; `digest(sketch)` summarises the rows that `chooser` chooses,
        and is called if new."""
        name = target_layer.name
        if name in self._unwatched:
            return
        group = self._group.get(name) or self._join(target_layer, x, chooser)
        seen = group.consumed[name]
        if seen < len(group.pending) and not group.pending[seen].identity.matches(x, chooser):
            group = self._group[name] = group.split([name])
            seen = group.consumed[name]
        if seen == len(group.pending):
            group.pending.append(_Pending(_Identity(x, chooser), summarize(group.sketch)))
        group.consumed[name] = seen + 1
        # others may still join those, and must find all of it pending
        if group not in self._uninitialized_groups:
            group.flush()

    def stop_watching(self, name: str) -> None:
        """Between forward passes: drop a layer and its sketch, for good."""
        if name in self._group:
            del self._group.pop(name).consumed[name]
        self._unwatched.add(name)

    def arrange(
        self, parts: Sequence[Sequence[str]], make: Callable[[str], Sketch]
    ) -> list[InputGroup]:
        """Between forward passes: make each part a group of its own; in the order of `parts`.

        A part is some or all members of one group, or layers that have not been called; those get
        what `make` says.
        """
        groups = []
        for names in parts:
            group = self._group.get(names[0])
            if group is None:
                group = InputGroup(make(names[0]), dict.fromkeys(names, 0), open=False)
            elif len(names) < len(group.consumed):
                group = group.split(list(names))
            self._group.update(dict.fromkeys(names, group))
            groups.append(group)
        return groups

    def end_of_forward(self) -> None:
        """Members that missed what others saw leave their group; nothing stays pending."""
        self._uninitialized.clear()
        self._uninitialized_groups.clear()
        for group in self.groups:
            group.flush()
            while group.pending:
                late = [name for name, seen in group.consumed.items() if seen == 0]
                other = group.split(late)
                for name in late:
                    self._group[name] = other

    def _join(self, target_layer: TargetLayer, x: Tensor, chooser: object) -> InputGroup:
        # a convolution's patches are not a linear layer's rows
        key = (target_layer.input_view, target_layer.in_features, *memory(x))
        first, group = self._uninitialized.get(key, (None, None))
        if (
            self._share
            and first is not None
            and group is not None
            and group.open
            and first.matches(x, chooser)
        ):
            group.consumed[target_layer.name] = 0
        else:
            group = InputGroup(self._make(target_layer, x.device), {target_layer.name: 0})
            self._uninitialized[key] = (_Identity(x, chooser), group)
            self._uninitialized_groups.add(group)
        self._group[target_layer.name] = group
        return group
