"""Watches the inputs of layers while the model runs: forward pre-hooks that always come off again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from evatune.capture.rows import RowSelector
from evatune.capture.sharing import Sharing
from evatune.capture.targets import Site
from evatune.errors import DataError

RowsFunction = Callable[[Tensor, Any, str], Tensor]


class EnoughSeen(BaseException):
    """Ends a forward pass of which nothing that is still to come is watched.

    Not an Exception: a model that catches those must not swallow it.
    """


class Tap:
    """Context manager: inside it, every call of a site offers its input to `sharing`.

    Call `begin` before each forward pass. With a `rows` function the user's own choice replaces the
    selector. While `cut_short` is true, a forward pass that has called every site once ends there with
    `EnoughSeen`.
    """

    def __init__(self, sites: Sequence[Site], sharing: Sharing, rows: RowsFunction | None = None) -> None:
        self._sites = sites
        self._sharing = sharing
        self._rows = rows
        self._handles: list[RemovableHandle] = []
        self._batch: Any = None
        self._selector: RowSelector | None = None
        self._calls: Counter[str] = Counter()
        self._watching = True
        self.cut_short = False

    def begin(self, batch: Any, selector: RowSelector | None, *, watch: bool = True) -> None:
        """A forward pass on `batch` comes next, which counts if `watch` says so."""
        self._batch, self._selector, self._watching = batch, selector, watch
        self._calls.clear()

    @property
    def each_called_once(self) -> bool:
        """Whether the forward pass since `begin` called every site exactly once."""
        return self._calls.total() == len(self._calls) == len(self._sites)

    def __enter__(self) -> Self:
        for site in self._sites:
            hook = self._hook_for(site)
            self._handles.append(site.module.register_forward_pre_hook(hook, with_kwargs=True))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._batch = self._selector = None

    def _hook_for(self, site: Site) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
            if x is not None and self._watching:
                self._take(site, x.detach() if x.requires_grad else x, original=x)
            self._calls[site.name] += 1
            if self.cut_short and self.each_called_once:
                raise EnoughSeen

        return hook

    @torch.no_grad()
    @torch.inference_mode(mode=False)  # a sketch made or added to in inference mode could not be changed outside it
    def _take(self, site: Site, x: Tensor, original: Tensor) -> None:
        x = x.clone() if x.is_inference() else x
        if self._rows is not None:
            flat, index = self._chosen(site, x), None
        else:
            assert self._selector is not None
            flat, index = self._selector.rows(x)
        self._sharing.offer(site.name, original, lambda sketch: sketch.digest(flat, index))

    def _chosen(self, site: Site, x: Tensor) -> Tensor:
        assert self._rows is not None
        rows = self._rows(x, self._batch, site.name)
        if not isinstance(rows, Tensor) or rows.ndim != 2 or rows.shape[1] != site.in_features:
            got = f"shape {tuple(rows.shape)}" if isinstance(rows, Tensor) else type(rows).__name__
            raise DataError(
                f"rows(activation, batch, {site.name!r}) returned {got}; it must return a tensor of shape "
                f"(rows, {site.in_features})"
            )
        return rows.detach()
