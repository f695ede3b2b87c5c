"""`evatune export`: an adapter in a form that servers read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from evatune.adapters.export import FORMATS, ExportRequest, export_adapter
from evatune.cli.libraries import libraries_on_stderr, load_torch
from evatune.cli.options import Trust
from evatune.errors import ConfigError
from evatune.utils.markup import printable
from evatune.utils.names import as_shown

_FORMAT_HELP = " ".join(f"{name}: {format_.description}." for name, format_ in FORMATS.items())


def export(
    adapter: Annotated[Path, typer.Argument(help="Folder of a LoRA adapter.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")],
    kind: Annotated[
        str,
        typer.Option(
            "--format",
            help=_FORMAT_HELP,
        ),
    ] = "uniform",
    model: Annotated[
        str | None,
        typer.Option(
            help="Base model to merge into, hub id or folder. Default: the one the adapter names."
        ),
    ] = None,
    trust_remote_code: Trust = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a folder that evatune export wrote.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write an adapter for servers without rank_pattern (vLLM, llama.cpp), or a merged model."""
    _require_used(kind, {"--model": model is not None, "--trust-remote-code": trust_remote_code})
    load_torch()
    request = ExportRequest(adapter, out, overwrite, model, trust_remote_code)
    if kind in FORMATS and FORMATS[kind].loads_base_model and adapter.is_dir():
        from evatune.loading.quiet import quiet_libraries

        quiet_libraries()
    with libraries_on_stderr():
        exported = export_adapter(kind, request)
    shown = str(as_shown(out))
    if as_json:
        typer.echo(json.dumps({"out": shown, "format": kind} | exported.facts))
    else:
        typer.echo(printable(f"{shown}  {exported.summary}"))


def _require_used(kind: str, given: Mapping[str, bool]) -> None:
    """Raise a ConfigError for an option about the base model, where the format loads none.

    Args:
        given: option → whether it was given.
    """
    if kind not in FORMATS or FORMATS[kind].loads_base_model:
        return
    loading = [name for name, format_ in FORMATS.items() if format_.loads_base_model]
    for option, is_given in given.items():
        if is_given:
            raise ConfigError(
                f"{option} is for --format {' or '.join(loading)}, which loads the base model, and"
                f" this is {kind}; leave it out"
            )
