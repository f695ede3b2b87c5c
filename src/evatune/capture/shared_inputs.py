"""Finds the layers that have the same input, and keeps one sketch for all of them.

Told by tensor identity while the model runs: the query, key and value projections are handed the
very same tensor, and read it as rows in the same way. No value is read. Layers join a group at
their first call; one that is later handed something else leaves it with a copy of the sketch as it
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
    """Recognizes a tensor that was recorded before.

    It has the same memory, is still alive and has not been written to since, and the same selector
    chooses among its rows.
    """

    def __init__(self, x: Tensor, selector: object) -> None:
        self.ref = weakref.ref(x)
        self.key = memory(x)
        self.selector = selector

    def matches(self, x: Tensor, selector: object) -> bool:
        # While the first tensor lives its memory cannot be handed to another one. Inference tensors
        # keep no count of writes, so two calls with one of them may have seen different values.
        alive = self.ref() is not None and not x.is_inference()
        return alive and selector is self.selector and memory(x) == self.key


def memory(x: Tensor) -> tuple[object, ...]:
    """Return a key that no other living tensor has, nor the same one after a write."""
    version = 0 if x.is_inference() else x._version
    return (x.data_ptr(), x.shape, x.stride(), x.dtype, x.device, version)


@dataclass
class _Pending:
    """An activation of this forward pass that only some members of the group have seen yet."""

    identity: _Identity
    update: SketchUpdate


@dataclass(eq=False)
class InputGroup:
    """Layers that have been handed the same tensors so far, and their common sketch.

    Attributes:
        consumed: member → how many of `pending` it has seen.
        open: nothing has gone into the sketch yet, so that a layer may still join.
    """

    sketch: Sketch
    consumed: dict[str, int] = field(default_factory=dict)
    pending: list[_Pending] = field(default_factory=list)
    open: bool = True

    @property
    def members(self) -> list[str]:
        """The names of the layers, in the order in which they joined."""
        return list(self.consumed)

    def flush(self) -> None:
        """Add to the sketch what every member has seen."""
        while self.pending and min(self.consumed.values()) > 0:
            self.open = False
            self.sketch.add(self.pending.pop(0).update)
            for name in self.consumed:
                self.consumed[name] -= 1

    def split(self, names: list[str]) -> InputGroup:
        """Return a group of some members, all of which have seen the same part of `pending`.

        They leave this group and take a copy of its sketch along.
        """
        seen = self.consumed[names[0]]
        consumed = dict.fromkeys(names, seen)
        other = InputGroup(self.sketch.clone(), consumed, self.pending[:seen], open=False)
        for name in names:
            del self.consumed[name]
        other.flush()
        self.flush()
        return other


class SharedInputs:
    """Routes activations to groups.

    Args:
        make: builds an empty sketch for the input of a layer.
        share: False when rows depend on the layer's name, so that no two layers can share.
    """

    def __init__(
        self, make: Callable[[TargetLayer, torch.device], Sketch], *, share: bool = True
    ) -> None:
        self._make = make
        self._share = share
        self._group: dict[str, InputGroup] = {}
        # made in this forward pass, by their first tensor
        self._open_groups: dict[object, tuple[_Identity, InputGroup]] = {}
        self._new_groups: set[InputGroup] = set()
        self._dropped: set[str] = set()

    @property
    def groups(self) -> list[InputGroup]:
        """The distinct groups, in the order of their first call."""
        return list(dict.fromkeys(self._group.values()))

    def group_of(self, name: str) -> InputGroup | None:
        """Return the group of a layer; None where it has not been called."""
        return self._group.get(name)

    def record(
        self,
        target_layer: TargetLayer,
        x: Tensor,
        selector: object,
        summarize: Callable[[Sketch], SketchUpdate],
    ) -> None:
        """Record that a layer is called with `x`.

        Args:
            selector: chooses among the rows of `x`.
            summarize: from a sketch to the summary of those rows; called if no other layer has
                recorded them yet.
        """
        name = target_layer.name
        if name in self._dropped:
            return
        group = self._group.get(name) or self._join(target_layer, x, selector)
        seen = group.consumed[name]
        if seen < len(group.pending) and not group.pending[seen].identity.matches(x, selector):
            group = self._group[name] = group.split([name])
            seen = group.consumed[name]
        if seen == len(group.pending):
            group.pending.append(_Pending(_Identity(x, selector), summarize(group.sketch)))
        group.consumed[name] = seen + 1
        # others may still join a group of this forward pass, and must find all of it pending
        if group not in self._new_groups:
            group.flush()

    def stop_watching(self, name: str) -> None:
        """Drop a layer and its share of a sketch for good, between forward passes."""
        if name in self._group:
            del self._group.pop(name).consumed[name]
        self._dropped.add(name)

    def arrange(
        self, parts: Sequence[Sequence[str]], make: Callable[[str], Sketch]
    ) -> list[InputGroup]:
        """Make each part a group of its own, between forward passes; return them in this order.

        Args:
            parts: each is some or all members of one group, or layers that have not been called.
            make: from the first of such layers to their sketch.
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
        """Split groups whose members have not seen the same activations; nothing stays pending."""
        self._open_groups.clear()
        self._new_groups.clear()
        for group in self.groups:
            group.flush()
            while group.pending:
                behind = [name for name, seen in group.consumed.items() if seen == 0]
                other = group.split(behind)
                for name in behind:
                    self._group[name] = other

    def _join(self, target_layer: TargetLayer, x: Tensor, selector: object) -> InputGroup:
        """Put a layer at its first call into a group."""
        # a convolution's patches are not a linear layer's rows
        key = (target_layer.input_view, target_layer.in_features, *memory(x))
        group = self._joinable(key, x, selector)
        if group is None:
            group = InputGroup(self._make(target_layer, x.device))
            self._open_groups[key] = (_Identity(x, selector), group)
            self._new_groups.add(group)
        group.consumed[target_layer.name] = 0
        self._group[target_layer.name] = group
        return group

    def _joinable(self, key: object, x: Tensor, selector: object) -> InputGroup | None:
        """Return the group of this forward pass that a layer with the input `x` may still join."""
        if not self._share or key not in self._open_groups:
            return None
        first, group = self._open_groups[key]
        return group if group.open and first.matches(x, selector) else None
