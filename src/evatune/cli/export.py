"""`evatune export`: an adapter in a form that servers read."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from evatune.cli.libraries import TRUST_HELP, libraries_on_stderr, quiet_libraries
from evatune.utils.markup import printable

_FORMATS = ("uniform", "merged")


def export(
    adapter: Annotated[Path, typer.Argument(help="Folder of a LoRA adapter.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")],
    kind: Annotated[
        str,
        typer.Option(
            "--format",
            help=(
                "uniform: an adapter of one rank and one alpha. merged: the base model with it"
                " added in."
            ),
        ),
    ] = "uniform",
    model: Annotated[
        str | None,
        typer.Option(
            help="Base model to merge into, hub id or folder. Default: the one the adapter names."
        ),
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help=TRUST_HELP)
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a folder that evatune export wrote.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write an adapter for servers that do not read rank_pattern (vLLM, SGLang, llama.cpp), or a
    merged model."""
    from evatune.errors import ConfigError, RecordError

    if kind not in _FORMATS:
        raise ConfigError(f"format is {kind!r}; choose one of {', '.join(_FORMATS)}")
    if not adapter.is_dir():
        raise RecordError(
            f"adapter {str(adapter)!r} is not a folder; give one that evatune or PEFT's"
            " save_pretrained wrote"
        )
    from evatune.adapters.export import export_uniform
    from evatune.utils.names import as_shown

    if kind == "uniform":
        facts: dict[str, Any] = asdict(export_uniform(adapter, out, overwrite=overwrite))
        text = f"rank {facts['rank']}, alpha {facts['alpha']:g}, {facts['layers']} layers"
        for key, what in (
            ("zeros", "filled with zeros beside their neighbours"),
            ("rescaled", "with their scale in B"),
        ):
            text += f", {len(facts[key])} {what}" if facts[key] else ""
    else:
        with libraries_on_stderr():
            facts = _merge(adapter, out, overwrite, model, trust_remote_code)
        text = f"{facts['model']} with the adapter added in"
        text += f", not checked ({facts['unchecked']})" if facts["unchecked"] else ""
    out = as_shown(out)
    if as_json:
        typer.echo(json.dumps({"out": str(out), "format": kind} | facts))
    else:
        typer.echo(printable(f"{out}  {text}"))


def _merge(
    adapter: Path, out: Path, overwrite: bool, model: str | None, trust_remote_code: bool
) -> dict[str, Any]:
    from evatune.adapters.export import head_size, write_card, write_merged, write_record
    from evatune.adapters.saved import read_config
    from evatune.errors import DataError
    from evatune.loading import text
    from evatune.utils.markup import markdown_code
    from evatune.utils.outputs import claimed_folder, require_apart

    quiet_libraries()
    config = read_config(adapter)
    source = model or config.base_model_name_or_path
    if not source:
        raise DataError(
            f"adapter {str(adapter)!r} does not say what its base model is; name it with --model"
        )
    require_apart(out, adapter=adapter, model=source)
    with claimed_folder(out, overwrite) as output:
        labels = head_size(adapter)
        options: dict[str, Any] = {} if labels is None else {"num_labels": labels}
        task = next(
            (name for name, (_, kind) in text.TASKS.items() if kind and kind == config.task_type),
            "auto",
        )
        try:
            text.require_loadable(source, task)
            base = text.read_model(source, task, trust_remote_code=trust_remote_code, **options)
        except DataError as error:
            raise DataError(
                f"base model of {str(adapter)!r}: {error}; --model names another place"
            ) from error
        tokenizer = text.own_tokenizer(adapter, trust_remote_code) or base.tokenizer
        batch = text.few_tokens(base)
        with output.whole() as folder:
            unchecked = write_merged(base.model, adapter, folder, batch)
            tokenizer.save_pretrained(folder)
            about = f"{markdown_code(str(source))} with a LoRA adapter merged into its weights."
            write_card(folder, about, str(source), library="transformers")
            write_record(
                folder, {"format": "merged", "base_model": str(source), "adapter": str(adapter)}
            )
    return {"model": str(source), "task": base.task, "unchecked": unchecked}
