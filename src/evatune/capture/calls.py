"""The calls of modules: what may be handed to one, and what a running one says of its rows."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from evatune.capture.row_selection import RowSelector

MASK, ENCODED, ENCODER_MASK = "attention_mask", "encoder_hidden_states", "encoder_attention_mask"


@dataclass(frozen=True)
class Signature:
    """The arguments that a module's `forward` takes by position.

    Attributes:
        is_model: the module is a whole model of transformers.
    """

    names: tuple[str, ...]
    is_model: bool

    @classmethod
    def of(cls, module: nn.Module) -> Signature:
        """Return what a module's `forward` takes."""
        try:
            parameters = inspect.signature(module.forward).parameters.values()
        except (TypeError, ValueError):  # some builtins have none
            parameters = ()  # type: ignore[assignment]
        names = tuple(
            p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        )
        # Those models are handed the mask of their own input, if it has one.
        return cls(names, hasattr(type(module), "main_input_name"))

    def arguments(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of a call by name, in the order of the signature."""
        given = dict(zip(self.names, args, strict=False))
        given |= {str(index): value for index, value in enumerate(args[len(self.names) :])}
        given |= {name: kwargs[name] for name in self.names if name in kwargs}
        return given | dict(kwargs)

    @property
    def takes_masks(self) -> bool:
        """True where a mask may come with a call: by name, or among keywords of any name."""
        if self.is_model or not self.names:
            return True
        return not {MASK, ENCODER_MASK, ENCODED}.isdisjoint(self.names)


@dataclass(eq=False)
class Call:
    """What a running module's arguments say about its rows.

    Modules inside it share this unless they receive another mask or rows of another kind.

    Attributes:
        mask: of its own tokens.
        encoded: rows of an encoder, handed to it.
        encoder_mask: of those.
        scope: of the tokens around it, and where inner masks find their labels.
        foreign: its rows come from no token of the masks around it.
        mixed: it is handed such rows as well.
        after: the decoder that has run inside it, to whose tokens what comes later belongs.
    """

    mask: Tensor | None
    encoded: Tensor | None
    encoder_mask: Tensor | None
    scope: RowSelector
    foreign: bool
    mixed: bool
    after: Call | None = None


def tensor_argument(given: Mapping[str, Any], name: str) -> Tensor | None:
    """Return an argument of a call, if it is there and a tensor."""
    value = given.get(name)
    return value if isinstance(value, Tensor) else None


def inputs_of(given: Mapping[str, Any]) -> list[Tensor]:
    """Return the tensors among the arguments of a call that are no masks, in their order."""
    tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    return [tensor for name, tensor in tensors.items() if "mask" not in name]
