"""Vega-Lite: the library that a page carries, and pictures of its plots."""

from __future__ import annotations

import base64
import gzip
import json
import zlib
from functools import cache
from pathlib import Path
from typing import Any

from evatune.errors import ConfigError
from evatune.loading.cache import cache_folder
from evatune.utils.atomic import atomic_file
from evatune.utils.extras import extras
from evatune.utils.markup import printable_in

with extras(__name__):
    import vl_convert

Spec = dict[str, Any]  # of Vega-Lite; its `usermeta` says how a page fits it to the width

_VERSION = "6.1"  # of Vega-Lite
SCHEMA = f"https://vega.github.io/schema/vega-lite/v{_VERSION.partition('.')[0]}.json"
_PLAIN = {
    "view": {"stroke": None},
    "axis": {"titleFontWeight": "normal"},
    "legend": {"titleFontWeight": "normal"},
}
_SCALE = 2.0  # pixels of a picture per unit of a plot


@cache
def library() -> str:
    """Return Vega, Vega-Lite and Vega-Embed in one script, compressed by gzip, as base64.

    That is 0.4 MB in place of 0.9. Joining them takes seconds, so the script is kept in the cache
    folder where that can be written.
    """
    name = f"vega-{vl_convert.get_vega_version()}-lite-{_VERSION}.js.gz"
    path = cache_folder() / name
    packed = _whole(path)
    if packed is None:
        script = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed", vl_version=_VERSION)
        packed = gzip.compress(script.encode("utf-8"), mtime=0)
        _keep(path, packed)
    return base64.b64encode(packed).decode("ascii")


def picture(spec: Spec, kind: str = "png") -> bytes:
    """Return a plot as a file of the kind "png" or "svg", on white."""
    text = json.dumps(printable_in({**spec, "background": "white", "config": _PLAIN}))
    if kind == "svg":
        return vl_convert.vegalite_to_svg(text, _VERSION).encode("utf-8")
    return vl_convert.vegalite_to_png(text, _VERSION, scale=_SCALE)


def _whole(path: Path) -> bytes | None:
    """Return what is in the cache; None where nothing is, or it is damaged."""
    try:
        packed = path.read_bytes()
        gzip.decompress(packed)
    except (OSError, EOFError, zlib.error):
        return None
    return packed


def _keep(path: Path, packed: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as temporary:
            temporary.write_bytes(packed)
    except (OSError, ConfigError):  # a cache that cannot be written costs the next page seconds
        return
