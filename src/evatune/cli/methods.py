"""`evatune methods`."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def methods(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """List the methods that train and compare know, and where each comes from."""
    from evatune.cli.libraries import loading_libraries

    with loading_libraries(as_json):
        from evatune.finetune.methods import METHODS
        from evatune.report.tables import console, fitted_table

    facts = [
        {"name": method.name, "about": method.about, "source": method.source}
        for method in METHODS.values()
    ]
    if as_json:
        typer.echo(json.dumps({"methods": facts}))
        return
    terminal = console()
    rows = [(fact["name"], fact["about"], fact["source"]) for fact in facts]
    headings, droppable = ("method", "what it does", "source"), ("source",)
    terminal.print(fitted_table(terminal, "", headings, rows, droppable=droppable))
