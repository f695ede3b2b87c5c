"""Watches the inputs of layers while the model runs: forward pre-hooks that always come off again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from evatune.capture.kinds import Piece, Tokens, sequences_of
from evatune.capture.masks import Masks
from evatune.capture.products import Places, Products, loops_over_experts
from evatune.capture.rows import ALL_ROWS, RowSelector, full_precision
from evatune.capture.sharing import Sharing
from evatune.capture.targets import Site
from evatune.errors import DataError, TargetError

RowsFunction = Callable[[Tensor, Any, str], Tensor]


class EnoughSeen(BaseException):
    """Ends a forward pass of which nothing that is still to come is watched.

    Not an Exception: a model that catches those must not swallow it.
    """


class Tap:
    """Offers to `sharing` the rows of every call of a site, during the forward passes inside `watching` alone.

    While `cut_short` is true, a forward pass that has called every site once ends there.

    Args:
        rows: the user's own choice of rows; replaces that of `masks`.
        masks: says which rows count. Default: all.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        sharing: Sharing,
        rows: RowsFunction | None = None,
        masks: Masks | None = None,
    ) -> None:
        self._sites = sites
        self._sharing = sharing
        self._rows = rows
        self._masks = masks
        self._batch: Any = None
        self._calls: Counter[str] = Counter()
        self._watching = False
        self.cut_short = False

    @property
    def each_called_once(self) -> bool:
        """Whether the latest forward pass called every site exactly once, and all of it is known by now."""
        return self._calls.total() == len(self._calls) == len(self._sites)

    @contextmanager
    def watching(self, batch: Any, selector: RowSelector = ALL_ROWS, *, watch: bool = True) -> Iterator[None]:
        """Hooks are on the model inside, for one forward pass on `batch`, which counts if `watch` says so.

        Args:
            selector: which rows count as far as the batch itself says.
        """
        self._batch, self._watching = batch, watch
        self._calls.clear()
        with ExitStack() as undo, suppress(EnoughSeen):
            if self._masks is not None and self._rows is None:
                self._masks.begin(batch, selector)
                undo.callback(self._masks.begin, None, ALL_ROWS)
                self._masks.watch(undo)
            self._watch_sites(undo)
            yield
        self._batch = None

    def _watch_sites(self, undo: ExitStack) -> None:
        held: dict[nn.Module, list[Site]] = {}
        for site in self._sites:
            if site.part.parameter:
                held.setdefault(site.module, []).append(site)
            else:
                # ZeRO-3's own hook hands every layer an alias, by which nobody would know what layers share.
                first = any(hasattr(parameter, "ds_id") for parameter in site.module.parameters(recurse=False))
                hook = site.module.register_forward_pre_hook(self._hook_for(site), with_kwargs=True, prepend=first)
                undo.callback(hook.remove)
        if held:  # autocast would keep 16-bit copies of weights from one call to the next, which nobody would recognise
            undo.callback(torch.set_autocast_cache_enabled, torch.is_autocast_cache_enabled())
            torch.set_autocast_cache_enabled(False)
        for module, sites in held.items():
            self._watch_products(module, sites, undo)
        undo.callback(loops_over_experts(list(held)))

    def _hook_for(self, site: Site) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
            if x is not None and self._watching:
                self._take(site, x.detach() if x.requires_grad else x, original=x)
            self._calls[site.name] += 1
            if self.cut_short and self.each_called_once:
                raise EnoughSeen

        return hook

    def _watch_products(self, module: nn.Module, sites: list[Site], undo: ExitStack) -> None:
        """Watch what a module multiplies parameters with, from each of its calls' start to its end."""
        by_product = {(site.part.parameter, site.part.expert): site for site in sites}
        active: list[Products] = []

        def start(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            sequences = sequences_of(module, args, kwargs)

            def seen(parameter: str, expert: int | None, rows: Tensor, places: Places | None) -> None:
                site = by_product.get((parameter, expert))
                if site is not None and self._watching:
                    self._take(site, sequences(rows), original=rows, places=places)

            parameters = {key: attrgetter(key)(module) for key, _ in by_product}
            active.append(Products(parameters, seen))
            active[-1].__enter__()  # type: ignore[no-untyped-call]

        def end(*_: Any) -> None:
            if active:
                active.pop().__exit__(None, None, None)  # type: ignore[no-untyped-call]

        def abandon() -> None:  # torch runs no hook after KeyboardInterrupt and its like
            while active:
                end()

        undo.callback(abandon)
        undo.callback(module.register_forward_pre_hook(start, with_kwargs=True).remove)
        undo.callback(module.register_forward_hook(end, always_call=True).remove)

    @torch.no_grad()
    @torch.inference_mode(mode=False)  # a sketch made or added to in inference mode could not be changed outside it
    def _take(self, site: Site, x: Tensor, original: Tensor, places: Places | None = None) -> None:
        x = x.clone() if x.is_inference() else x
        if isinstance(site.part.view, Tokens) and (x.is_floating_point() or x.dtype == torch.bool):
            raise TargetError(
                f"{site.name} is an embedding ({type(site.module).__name__}) that is called with {x.dtype} numbers and not "
                "with token ids; leave it out of the targets, or with exclude_modules in the LoraConfig"
            )
        pieces: Callable[[], Iterator[Piece]]
        chooser = ALL_ROWS
        if self._rows is not None:
            chosen = self._chosen(site, x)
            pieces = lambda: iter([(chosen, None)])  # noqa: E731
        else:
            leading = site.part.view.places(x) if places is None else torch.Size([places[1]])
            if self._masks is not None:
                chooser = self._masks.selector(site.name, original, leading)
            if places is not None:
                index = chooser.of_places(*places)
                pieces = lambda: iter([(x, index)])  # noqa: E731
            else:
                pieces = partial(site.part.view.pieces, x, chooser)
        with full_precision(x.device):
            self._sharing.offer(site, original, chooser, lambda sketch: sketch.digest_pieces(pieces()))

    def _chosen(self, site: Site, x: Tensor) -> Tensor:
        assert self._rows is not None
        view = site.part.view
        rows = self._rows(view.whole(x), self._batch, site.name)
        shape = "(rows,)" if isinstance(view, Tokens) else f"(rows, {site.in_features})"
        fits = isinstance(rows, Tensor) and (
            rows.ndim == 1 if isinstance(view, Tokens) else rows.ndim == 2 and rows.shape[1] == site.in_features
        )
        if not fits:
            got = f"shape {tuple(rows.shape)}" if isinstance(rows, Tensor) else type(rows).__name__
            raise DataError(
                f"rows(activation, batch, {site.name!r}) returned {got}; it must return a tensor of shape {shape}"
            )
        return rows.detach()
