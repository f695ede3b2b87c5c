"""The keys of a recipe: what each may hold, and which one a misspelled key means."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from typing import Annotated, Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from evatune.finetune.recipe import Recipe

_LONGEST = 13  # letters of a bound; larger numbers only keep nonsense out
_TYPES = {int: "whole number", float: "number", bool: "true or false", str: "text"}
# What other libraries and other people call it.
_ALIASES = {
    "lr": "training.learning_rate",
    "epochs": "training.steps",
    "num_train_epochs": "training.steps",
    "max_steps": "training.steps",
    "iters": "training.steps",
    "bs": "training.batch_size",
    "per_device_train_batch_size": "training.batch_size",
    "gradient_accumulation_steps": "training.accumulate",
    "lr_scheduler_type": "training.schedule",
    "warmup_ratio": "training.warmup",
    "min_lr_rate": "training.floor",
    "gradient_clipping": "training.max_grad_norm",
    "bf16": "training.precision",
    "fp16": "training.precision",
    "dtype": "training.precision",
    "r": "adapter.rank",
    "lora_r": "adapter.rank",
    "lora_alpha": "adapter.alpha",
    "target_modules": "adapter.targets",
    "dataset": "data.source",
    "data": "data.source",
    "max_seq_length": "data.max_length",
    "cutoff_len": "data.max_length",
    "model_name": "model",
    "model_name_or_path": "model",
    "base_model": "model",
    "init_lora_weights": "method",
}


@dataclass(frozen=True)
class RecipeKey:
    """A setting of a recipe."""

    name: str  # with the name of its part: "training.steps"
    type: str
    default: Any  # None for a key that must be given, too
    required: bool
    allowed: list[str] | None  # the values there are; None where there are too many
    bounds: str  # of a number, in words; "" without
    meaning: str

    @property
    def kind(self) -> str:
        """The values that it may hold, in words."""
        if self.allowed is not None:
            return f"one of {', '.join(self.allowed)}"
        return f"{self.type}, {self.bounds}" if self.bounds else self.type

    def facts(self) -> dict[str, Any]:
        """Return all of it for `--json`."""
        return asdict(self)


def recipe_keys() -> list[RecipeKey]:
    """Return every key that a recipe may have."""
    return list(_keys_of(Recipe))


def _keys_of(kind: Any, prefix: str = "") -> Iterator[RecipeKey]:
    """Yield the keys of a dataclass of pydantic's, and of those that it holds, in their order."""
    for name, field in kind.__pydantic_fields__.items():
        if is_dataclass(field.default):
            yield from _keys_of(type(field.default), f"{prefix}{name}.")
        else:
            yield _key(prefix + name, field)


def known_as(key: str, names: Sequence[str]) -> str | None:
    """Return which of the keys `names` has this name without its part, or in another library."""
    by_last_part = {name.rpartition(".")[2]: name for name in names}
    return (_ALIASES | by_last_part).get(key.replace("-", "_").rpartition(".")[2])


def nearest_key(key: str, names: Sequence[str]) -> str | None:
    """Return which of the keys `names` is meant by one that does not exist, or None.

    It may lack its part ("steps"), be another library's ("lr"), or be misspelled.
    """
    known = known_as(key, names)
    if known is not None:
        return known
    near = difflib.get_close_matches(key, names, n=1)
    if near:
        return near[0]
    by_last_part = {name.rpartition(".")[2]: name for name in names}
    similar = difflib.get_close_matches(key.rpartition(".")[2], by_last_part, n=1)
    return by_last_part[similar[0]] if similar else None


def _key(name: str, field: FieldInfo) -> RecipeKey:
    required = field.is_required()
    allowed: Any = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    return RecipeKey(
        name=name,
        type="text" if allowed else _in_words(field.annotation),
        default=None if required else field.get_default(call_default_factory=True),
        required=required,
        allowed=list(allowed) if allowed else None,
        bounds=_bounds(field.metadata),
        meaning=field.description or "",
    )


def _in_words(annotation: Any) -> str:
    if annotation in _TYPES:
        return _TYPES[annotation]
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _in_words(arguments[0])
    if origin is list:
        return f"list of {_in_words(arguments[0])}s"
    return " or ".join(_in_words(kind) for kind in arguments if kind is not type(None))


def _bounds(metadata: Sequence[Any]) -> str:
    """Return the bounds of a number in words; of the upper ones, those that may be met."""
    words = []
    for bound in metadata:
        if isinstance(bound, Ge):
            words.append(f"at least {bound.ge}")
        elif isinstance(bound, Gt):
            words.append(f"above {bound.gt}")
        elif isinstance(bound, Le):
            words.append(f"at most {bound.le}")
        elif isinstance(bound, Lt):
            words.append(f"below {bound.lt}")
    return ", ".join(word for word in words if len(word) < _LONGEST)
