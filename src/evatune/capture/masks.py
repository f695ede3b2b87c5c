"""Finds the mask for a layer's rows: the one that the nearest module around it was called with.

Models make masks of their own on the way: of audio frames from one of samples, of sequences padded
to a window, of choices laid out one after another. A module that is called with such a mask has
rows of that kind inside. A mask says nothing about what did not come from its tokens, such as the
patches of an image, of whatever number they may be.

Three batches of four examples, and which rows of a linear layer inside count:

Text, `input_ids` and `attention_mask` (4, 12). The model is called with the mask, and so are its
blocks, or they are called with nothing new. A layer that is handed (4, 12, d) has a row for each
position of the mask, and those of padding are left out.

The same with `pixel_values` (4, 3, 32, 32). These cannot be tokens of the mask, by their shape, and
are noted as foreign. The vision tower is handed them, so all rows inside it count, though there may
be 12 patches too; what it returns is foreign as well, and so all rows inside the projector count.
Where the model puts the result between embedded tokens it makes a new tensor, which is not foreign:
in the language model the mask of the tokens decides again.

An encoder-decoder, with `decoder_input_ids` (4, 7) beside the text. In the encoder the mask of the
text decides. The decoder begins anew: its own mask decides, or the labels, or else all rows count.
Its cross-attention is handed the encoder's output as `encoder_hidden_states`. Layers that are given
this very tensor, of keys and values, go by the mask of the text, and those of queries by the
decoder's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from evatune.capture.calls import (
    ENCODED,
    ENCODER_MASK,
    MASK,
    Call,
    Signature,
    inputs_of,
    tensor_argument,
)
from evatune.capture.foreign_rows import ForeignRows, floats_in, may_be_tokens, may_hold_tokens
from evatune.capture.layer_types import TargetLayer
from evatune.capture.row_selection import ALL_ROWS, RowSelector, batch_field, token_mask
from evatune.capture.shared_inputs import memory
from evatune.choices import IGNORED
from evatune.modeling.wrappers import encoder_decoders, is_wrapper
from evatune.utils.text import shortened
from evatune.utils.warn import warn


class Masks:
    """Follows the calls of the modules around the target layers, and says which rows count.

    Inside the decoder of an encoder-decoder model, tokens count as the decoder's own mask says,
    else where `labels` have a loss (in training a position without one is padding), else all. An
    encoder's output is recognized by identity where it is handed on as `encoder_hidden_states`, and
    goes by the `encoder_attention_mask` beside it.

    Args:
        labels_only: go by the labels in a decoder even where there is a mask.
        ignore_index: label of tokens without a loss.
    """

    def __init__(
        self,
        model: nn.Module,
        target_layers: Sequence[TargetLayer],
        *,
        labels_only: bool = False,
        ignore_index: int = IGNORED,
    ) -> None:
        self._decoder = decoder_of(model)
        followed = [model, *_around(model, target_layers)]
        if self._decoder is not None:
            followed.append(self._decoder)
        self._signatures = {module: Signature.of(module) for module in followed}
        self._labels_only = labels_only
        self._ignore_index = ignore_index
        # layers whose rows no mask could tell apart, though some are masked out
        self._unplaced: dict[str, None] = {}
        self._warned = False
        self.begin(None, ALL_ROWS)

    def begin(self, batch: Any, scope: RowSelector) -> None:
        """Get ready for a forward pass on `batch`, which itself says `scope`."""
        self._batch, self._scope = batch, scope
        self._running: list[tuple[nn.Module, Call]] = []
        self._foreign = ForeignRows()
        self._known: dict[Any, tuple[Tensor, RowSelector | None]] = {}
        self._answers: dict[Any, tuple[RowSelector, bool]] = {}
        given = batch_field(batch, MASK)
        if isinstance(given, Tensor):
            self._known[scope, memory(given)] = given, scope

    def watch(self, undo: ExitStack) -> None:
        """Put hooks on the modules around the target layers, until `undo` is closed.

        Those that take no mask matter only where rows may come from something else than tokens.
        """
        scope = self._scope
        others = any(
            scope.mask is None or not may_hold_tokens(x, scope) for x in floats_in(self._batch)
        )
        for module, signature in self._signatures.items():
            if others or signature.takes_masks:
                enter = partial(self._enter, signature)
                undo.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
                undo.callback(module.register_forward_hook(self._leave, always_call=True).remove)

    def selector(self, name: str, x: Tensor, leading_shape: torch.Size | None) -> RowSelector:
        """Return the selector for the rows of `x`, an activation of the layer `name`.

        Args:
            leading_shape: of the activation; None where no mask can speak about its rows.
        """
        if leading_shape is None or x in self._foreign:
            return ALL_ROWS
        calls = list(dict.fromkeys(call.after or call for _, call in reversed(self._running)))
        encoders = [call.encoder_mask for call in calls if call.encoded is x]
        key = calls[0] if calls else None, leading_shape, bool(encoders)
        if key not in self._answers:
            self._answers[key] = self._find(calls, encoders, leading_shape)
        answer, unplaced = self._answers[key]
        if unplaced:
            self._unplaced[name] = None
        return answer

    def _find(
        self, calls: list[Call], encoders: list[Tensor | None], leading_shape: torch.Size
    ) -> tuple[RowSelector, bool]:
        """Return the selector of the nearest mask that fits.

        Also return True where a mask excludes tokens but cannot be matched to these rows, which may
        be tokens.
        """
        around = calls[0].scope if calls else self._scope
        scope, given = around, [call.mask for call in calls if call.scope is around]
        if encoders:
            scope, given = ALL_ROWS, encoders
        masks = [mask for mask in given if mask is not None]
        # Those of four dimensions are made from the others, and to read one is to wait for the
        # device once more.
        flat = [*(self._selector(mask, scope) for mask in masks if mask.ndim < 4), scope]
        square = [mask for mask in masks if mask.ndim == 4]
        fitting = [mask for mask in square if mask.shape[-1] in leading_shape]
        squares = (self._selector(mask, scope) for mask in fitting)
        missed = None
        for selector in chain(flat, squares):
            if selector is None or selector.mask is None:
                continue
            if selector.fits(leading_shape):
                return ALL_ROWS if selector.index is None else selector, False
            missed = missed if selector.index is None else selector
        mixed = bool(calls) and calls[0].mixed
        return ALL_ROWS, missed is not None and not mixed and may_be_tokens(leading_shape, missed)

    def warn_once(self) -> None:
        """Warn of the layers of which padding may have been counted, after the first such pass."""
        if self._warned or not self._unplaced:
            return
        self._warned = True
        names = list(self._unplaced)
        warn(
            "some tokens of the batch are masked out, and no mask fits the rows of these layers,"
            " of which all are counted:"
            f" {shortened(names)}; if those that are padding must not count, choose with"
            " rows=lambda activation, batch, layer: …"
        )

    def _enter(
        self,
        signature: Signature,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        outer = self._running[-1][1] if self._running else None
        given = signature.arguments(args, kwargs)
        new = outer is None or self._says_something_new(signature, module, given, outer)
        call = self._call(signature, module, given, outer) if new else outer
        assert call is not None
        self._running.append((module, call))

    def _says_something_new(
        self, signature: Signature, module: nn.Module, given: Mapping[str, Any], outer: Call
    ) -> bool:
        """Return whether a call tells more than the one around it.

        Most do not, and cost next to nothing.
        """
        if self._foreign or outer.encoded is not None or given.get(ENCODED) is not None:
            return True
        if module is self._decoder:
            return True
        mask = given.get(MASK)
        return signature.is_model if mask is None else mask is not outer.mask

    def _call(
        self,
        signature: Signature,
        module: nn.Module,
        given: Mapping[str, Any],
        outer: Call | None,
    ) -> Call:
        scope = self._scope if outer is None else outer.scope
        mask, encoder_mask = tensor_argument(given, MASK), tensor_argument(given, ENCODER_MASK)
        inputs = inputs_of(given)
        if outer is None:
            foreign = False
            selector = None if mask is None else self._selector(mask, scope)
            self._foreign.add_inputs(given, selector or scope)
        else:
            foreign = outer.foreign or self._enters_foreign(signature, given, inputs, scope)
            if foreign and not outer.foreign:
                scope = RowSelector()
        if module is self._decoder:
            scope, foreign = self._of_decoder(mask), False
        encoded = self._encoded(given, inputs)
        # cross-attention, which has one mask
        if encoded is not None and ENCODER_MASK not in (*signature.names, *given):
            mask, encoder_mask = None, mask
        mixed = any(value in self._foreign for value in inputs[1:])
        return Call(mask, encoded, encoder_mask, scope, foreign, mixed)

    def _enters_foreign(
        self,
        signature: Signature,
        given: Mapping[str, Any],
        inputs: Sequence[Tensor],
        scope: RowSelector,
    ) -> bool:
        """Return whether the rows of a call come from no token of the masks around it."""
        mask = tensor_argument(given, MASK)
        if mask is not None and (scope, memory(mask)) in self._known:
            return False  # the model inside its wrapper, or around its parts
        first = inputs[0] if inputs else None
        if first in self._foreign:
            return True
        nested = signature.is_model and given.get(MASK) is None
        return nested and self._is_of_other_length(first, scope)

    def _encoded(self, given: Mapping[str, Any], inputs: Sequence[Tensor]) -> Tensor | None:
        """Return the rows of an encoder that are handed on; cross-attention may rename them."""
        encoded = tensor_argument(given, ENCODED)
        if encoded is not None:
            return encoded
        for _, call in self._running:
            if call.encoded is not None and any(call.encoded is value for value in inputs):
                return call.encoded
        return None

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if all(running is not module for running, _ in self._running):
            return  # another hook ended the call before ours saw it
        while self._running and self._running[-1][0] is not module:
            self._running.pop()
        call = self._running.pop()[1]
        outer = self._running[-1][1] if self._running else None
        if call.foreign and outer is not None and not outer.foreign:
            self._foreign.add_output(output)
        if module is self._decoder:
            for _, around in self._running:
                around.after = call

    def _selector(self, mask: Tensor, scope: RowSelector) -> RowSelector | None:
        """Return the selector of a module's mask, with the labels of the tokens around it."""
        key = scope, memory(mask)
        if key not in self._known:
            tokens = token_mask(mask, given_by_user=not self._running)
            self._known[key] = mask, None if tokens is None else scope.narrowed(tokens)
        return self._known[key][1]

    def _of_decoder(self, mask: Any) -> RowSelector:
        """Return the selector of the decoder's tokens, of which the batch may have labels."""
        labels = batch_field(self._batch, "labels")
        per_token = isinstance(labels, Tensor) and labels.ndim == 2
        use_labels = per_token and (self._labels_only or mask is None)
        decoded = {MASK: mask, "labels": labels}
        return RowSelector.of_batch(
            decoded, labels_only=use_labels, ignore_index=self._ignore_index
        )

    def _is_of_other_length(self, x: Any, scope: RowSelector) -> bool:
        """Return whether `x` holds no row for each of the tokens that the masks around mean."""
        selectors = [scope]
        for _, call in self._running:
            if call.mask is not None and call.mask.ndim < 4:
                selector = self._selector(call.mask, scope)
                if selector is not None:
                    selectors.append(selector)
        masked = [selector for selector in selectors if selector.mask is not None]
        if not masked or not isinstance(x, Tensor):
            return False
        return not any(may_hold_tokens(x, selector) for selector in masked)


def decoder_of(model: nn.Module) -> nn.Module | None:
    """Return the decoder of an encoder-decoder model; None for any other model.

    It is called with masks of its own.
    """
    for module in encoder_decoders(model):
        if hasattr(module, "get_decoder"):
            decoder = module.get_decoder()  # type: ignore[operator]
            return decoder if isinstance(decoder, nn.Module) else None
    return None


def _around(model: nn.Module, target_layers: Sequence[TargetLayer]) -> list[nn.Module]:
    """Return the modules whose calls the target layers are part of, under whatever name."""
    watched = {target_layer.module for target_layer in target_layers}
    modules = dict(model.named_modules(remove_duplicate=False))
    names = {name for name, module in modules.items() if module in watched}
    prefixes = {""}
    for name in names:
        parts = name.split(".")
        prefixes.update(".".join(parts[:depth]) for depth in range(1, len(parts)))
    outer = [modules[name] for name in modules if name in prefixes]
    around = [module for module in outer if not is_wrapper(module)]
    # torch's attention is handed several sequences itself.
    around += [target_layer.module for target_layer in target_layers if target_layer.parameter]
    return list(dict.fromkeys(around))
