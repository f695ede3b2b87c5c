"""`evatune push`: an adapter and its model card to the model hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from evatune.cli.libraries import libraries_on_stderr, load_torch
from evatune.errors import RecordError
from evatune.utils.markup import printable


def push(
    adapter: Annotated[Path, typer.Argument(help="Folder of a LoRA adapter.")],
    repository: Annotated[
        str, typer.Argument(help="Repository on the model hub, such as your-name/my-adapter.")
    ],
    base_model: Annotated[
        str | None,
        typer.Option(help="Hub id of the base model. Default: the one that the adapter names."),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Make a new repository a private one.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Push an adapter to the Hugging Face hub: weights, config, tokenizer, and a model card.

    A card that you wrote stays as it is, but for the base model it names.
    """
    load_torch()
    from evatune.adapters.publish import (
        base_model_of,
        published_files,
        push_files,
        require_repository,
        require_token,
    )

    require_repository(repository)
    if not adapter.is_dir():
        raise RecordError(
            f"adapter {str(adapter)!r} is not a folder; give one that evatune or PEFT's"
            " save_pretrained wrote"
        )
    require_token()
    with libraries_on_stderr():
        from evatune.report.cards import own_card, pushed_card

        card = own_card(adapter)
        base = base_model_of(adapter, base_model, card.data.get("base_model") if card else None)
        content = published_files(adapter, base) | pushed_card(adapter, repository, base)
        address = push_files(repository, content, private=private)
    if as_json:
        facts = {"address": address, "base_model": base, "files": sorted(content)}
        typer.echo(json.dumps(facts))
        return
    typer.echo(printable(f"{address}  {len(content)} files, an adapter for {base}"))
