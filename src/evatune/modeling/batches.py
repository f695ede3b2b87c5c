"""Walks over the tensors of a batch; says in one sentence what to do where there is no batch."""

from __future__ import annotations

import copy
import inspect
import os
from collections import UserDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from operator import length_hint
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from evatune.errors import ConfigError, DataError

# Dimensions of a batch of a model's main input, by the names that transformers has for it.
_DIMENSIONS = {
    "input_ids": 2,
    "input_values": 2,
    "input_features": 3,
    "inputs_embeds": 3,
    "pixel_values": 4,
}

_COLLATE = (
    "wrap the data set in DataLoader(dataset, batch_size=…, collate_fn=…), such as transformers'"
    " DataCollatorWithPadding"
)

_TOKENIZE = (
    "models take token ids: DataLoader(texts, batch_size=…, collate_fn=lambda some: tokenizer(some,"
    " padding=True, return_tensors='pt'))"
)


def tensors_in(batch: Any) -> Iterator[Tensor]:
    """Yield the tensors of a batch in their order.

    They may be in mappings, tuples, lists and dataclasses of any depth.
    """
    values: Iterable[Any] = ()
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        values = batch.values()
    elif isinstance(batch, (tuple, list)):
        values = batch
    elif is_dataclass(batch) and not isinstance(batch, type):
        values = [getattr(batch, field.name) for field in fields(batch)]
    for value in values:
        yield from tensors_in(value)


def map_tensors(batch: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Return the batch with `function` of each of its tensors, in containers of its own.

    The sizes of a packed sequence, which stay on the CPU, are none of them.
    """
    if isinstance(batch, Tensor):
        return function(batch)
    # transformers' BatchEncoding, whose own methods would change the caller's
    if isinstance(batch, UserDict):
        mapped = copy.copy(batch)
        mapped.data = {key: map_tensors(value, function) for key, value in batch.items()}
        return mapped
    if isinstance(batch, Mapping):
        return {key: map_tensors(value, function) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return _map_sequence(batch, function)
    if is_dataclass(batch) and not isinstance(batch, type):
        return _map_dataclass(batch, function)
    return batch


def _map_sequence(batch: Any, function: Callable[[Tensor], Tensor]) -> Any:
    values = [map_tensors(value, function) for value in batch]
    if isinstance(batch, PackedSequence):
        values[1] = batch.batch_sizes
    return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)


def _map_dataclass(batch: Any, function: Callable[[Tensor], Tensor]) -> Any:
    mapped = copy.copy(batch)
    for field in fields(batch):
        value = map_tensors(getattr(batch, field.name), function)
        object.__setattr__(mapped, field.name, value)  # as dataclasses do that are frozen
    return mapped


def iterate(batches: Iterable[Any]) -> Iterator[Any]:
    """Return an iterator over batches.

    Raises a DataError for what cannot be iterated over, or is a single batch.
    """
    kind = type(batches).__name__
    if isinstance(batches, (str, os.PathLike)):
        raise DataError(
            f"batches is a {kind}, {str(batches)[:60]!r}, which is not opened as a file; give an"
            " iterable of batches, such as a DataLoader over what it holds"
        )
    if (
        isinstance(batches, Mapping)
        and batches
        and not any(isinstance(v, (Tensor, list, str)) for v in batches.values())
    ):
        names = [str(name) for name in batches]
        raise DataError(
            f"batches is a {kind} of {', '.join(names[:5])}; give one of these:"
            f" batches[{names[0]!r}], as a DataLoader"
        )
    if isinstance(batches, (Tensor, Mapping, bytes)):
        raise DataError(
            f"batches is a single {kind}; give an iterable of batches, such as a DataLoader or a"
            " list with this one batch in it"
        )
    try:
        return iter(batches)
    except TypeError:
        raise DataError(
            f"batches is of type {kind}, which cannot be iterated over; give a DataLoader, a list"
            " or a generator of batches"
        ) from None


def length_of(batches: Iterable[Any]) -> int | None:
    """Return how many batches there are, where they say so."""
    try:
        return length_hint(batches) or None
    except NotImplementedError:  # of a loader of a stream
        return None


def fault_of(batch: Any, model: nn.Module) -> str | None:
    """Return the fault of a batch on which a model has failed, and what to do.

    None where it looks like a batch.
    """
    if _is_text(batch):
        return f"each batch is text ({type(batch).__name__}); {_TOKENIZE}"
    if (
        isinstance(batch, (list, tuple))
        and batch
        and all(isinstance(x, (Mapping, str)) for x in batch)
    ):
        return (
            f"each batch is a list of {len(batch)} single examples ({type(batch[0]).__name__});"
            f" {_COLLATE}"
        )
    if isinstance(batch, Mapping) and {"prompt_ids", "completion_ids"} <= batch.keys():
        return (
            "each batch holds prompts and what the model has made of them (prompt_ids,"
            " completion_ids), as of TRL's GRPOTrainer and its like; call"
            " evatune.initialize(trainer), which reads its prompts, or give tokenized prompts"
        )
    return (
        _single_example(batch, model)
        or _without_content(batch)
        or _too_many_arguments(batch, model)
    )


def require_arguments(name: str, function: Callable[..., Any] | None, arguments: str) -> None:
    """Raise a ConfigError unless a function of the caller's takes these arguments.

    Args:
        arguments: their names, with commas between.
    """
    if function is None:
        return
    wanted = f"{name} is called as {name}({arguments})"
    if isinstance(function, nn.Module):
        raise ConfigError(
            f"{wanted}, and a module of type {type(function).__name__} was given; write"
            f" {name}=lambda {arguments}: …"
        )
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some builtins have none
        return
    try:
        signature.bind(*arguments.split(", "))
    except TypeError:
        raise ConfigError(
            f"{wanted}, and what was given takes {signature}; write {name}=lambda {arguments}: …"
        ) from None


def _is_text(batch: Any) -> bool:
    """Return whether a batch is text, or columns with text among them and nothing for a model."""
    if isinstance(batch, Mapping):
        values = list(batch.values())
        known = _DIMENSIONS.keys() & batch.keys()
        if known or any(True for _ in tensors_in(batch)):
            return False
        return any(_is_text(value) for value in values)
    if isinstance(batch, (list, tuple)):
        return bool(batch) and all(isinstance(x, (str, bytes)) for x in batch)
    return isinstance(batch, (str, bytes))


def _single_example(batch: Any, model: nn.Module) -> str | None:
    """Return advice for an example that no collator has put into a batch or made tensors of."""
    main = getattr(model, "main_input_name", None)
    if isinstance(batch, Tensor) and isinstance(main, str):
        batch = {main: batch}
    if not isinstance(batch, Mapping):
        return None
    for name in _DIMENSIONS.keys() & batch.keys():
        value, dimensions = batch[name], _DIMENSIONS[name]
        if isinstance(value, Tensor) and value.ndim == dimensions - 1:
            shape = "one dimension" if value.ndim == 1 else f"{value.ndim} dimensions"
            return (
                f"each batch is a single example ({name} of {shape}, and a batch has {dimensions});"
                f" {_COLLATE}"
            )
        if isinstance(value, list) and value and not isinstance(value[0], (list, Tensor)):
            return (
                f"each batch is a single example ({name} is a list of {len(value)} numbers);"
                f" {_COLLATE}"
            )
        if isinstance(value, list):
            return (
                f"{name} of each batch is a list of {len(value)} and not a tensor; pad them to one"
                " length and make tensors of them: tokenizer(…, padding=True, return_tensors='pt')"
            )
    return None


def _without_content(batch: Any) -> str | None:
    """Return advice for a batch without a tensor in it, or whose tensors have no entries."""
    tensors = list(tensors_in(batch))
    if any(tensor.numel() for tensor in tensors):
        return None
    if tensors:
        return (
            f"a batch is empty (a tensor of shape {tuple(tensors[0].shape)}); leave out examples"
            " without content, such as empty texts"
        )
    kinds = (
        {str(key): type(value).__name__ for key, value in batch.items()}
        if isinstance(batch, Mapping)
        else {}
    )
    inside = f" ({', '.join(f'{key}: {kind}' for key, kind in kinds.items())})" if kinds else ""
    return (
        f"each batch is of type {type(batch).__name__}{inside}, without a tensor in it; make"
        " tensors of it, with a collate_fn"
    )


def _too_many_arguments(batch: Any, model: nn.Module) -> str | None:
    """Return advice for a batch such as (x, y), where the model's `forward` takes x alone."""
    if not isinstance(batch, (list, tuple)):
        return None
    signature = inspect.signature(model.forward)
    fitting = [count for count in range(1, len(batch) + 1) if _binds(signature, count)]
    if not fitting or fitting[-1] == len(batch):
        return None
    count = fitting[-1]
    call = "model(batch[0])" if count == 1 else f"model(*batch[:{count}])"
    return (
        f"each batch is a {type(batch).__name__} of {len(batch)}, and"
        f" {type(model).__name__}.forward takes {count} of them: {signature}; pass forward=lambda"
        f" model, batch: {call}"
    )


def _binds(signature: inspect.Signature, count: int) -> bool:
    try:
        signature.bind(*range(count))
    except TypeError:
        return False
    return True
