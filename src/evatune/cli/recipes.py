"""`evatune recipes`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from evatune.cli.libraries import libraries_on_stderr, loading_libraries
from evatune.cli.options import Trust, recipe_names
from evatune.utils.markup import printable
from evatune.utils.text import folded

recipes = typer.Typer(help="List, show, copy or check recipes.")


@recipes.command()
def ls(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """List the recipes that come with evatune."""
    from evatune.finetune.recipe_files import bundled_recipes, load, text_of

    about = {
        name: text_of(name).splitlines()[0].removeprefix("#").strip() for name in bundled_recipes()
    }
    if not as_json:
        for name, text in about.items():
            typer.echo(folded(f"{name:24} {text}", " " * 4))
        return
    facts = []
    for name, text in about.items():
        recipe = load(name)
        facts.append(
            {
                "name": name,
                "about": text,
                "domain": recipe.domain,
                "task": recipe.task,
                "model": recipe.model,
            }
        )
    typer.echo(json.dumps({"recipes": facts}))


@recipes.command()
def show(
    recipe: Annotated[str, typer.Argument(help="Name or file.", autocompletion=recipe_names)],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print a recipe, and every key it may have: its value here, type, default and meaning."""
    from evatune.finetune.recipe_files import load, text_of
    from evatune.finetune.recipe_keys import recipe_keys
    from evatune.finetune.recipe_tree import all_settings, as_tree

    settings = load(recipe)
    values = all_settings(as_tree(settings))
    if as_json:
        keys = [key.facts() | {"value": values[key.name]} for key in recipe_keys()]
        typer.echo(json.dumps({"recipe": as_tree(settings), "keys": keys}))
        return
    typer.echo("\n".join(map(printable, text_of(recipe).rstrip().split("\n"))) + "\n")
    for key in recipe_keys():
        default = "must be given" if key.required else f"default {_as_written(key.default)}"
        typer.echo(printable(f"# {key.name} = {_as_written(values[key.name])}"))
        for line in (key.meaning, f"{key.kind}; {default}"):
            typer.echo(folded(printable(f"#     {line}"), "#     "))


@recipes.command()
def check(
    recipe: Annotated[
        str,
        typer.Argument(help="A recipe of ours or a YAML file.", autocompletion=recipe_names),
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings that replace the recipe's.")
    ] = None,
    download: Annotated[
        bool,
        typer.Option(
            "--download",
            help="Fetch data, and what prepares the model's inputs, to try the recipe. The weights"
            " are not fetched.",
        ),
    ] = False,
    trust_remote_code: Trust = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Tell what a recipe downloads and costs, and try it on a small stand-in of its model."""
    from evatune.finetune.recipe_files import load

    settings = load(recipe, overrides or (), trust_remote_code=trust_remote_code)
    with loading_libraries(as_json) as log:
        from evatune.finetune.check import check as check_recipe
        from evatune.loading.quiet import quiet_libraries
        from evatune.report.checks import facts, show
        from evatune.report.tables import console

        quiet_libraries()

    with log.status("trying the recipe"), libraries_on_stderr():
        report = check_recipe(settings, download=download)
    if as_json:
        typer.echo(json.dumps(facts(report)))
        return
    show(console(), report, ["evatune", "train", recipe, *(overrides or [])])


def _as_written(value: Any) -> str:
    """Return a value as YAML has it in one line."""
    return json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else value


@recipes.command()
def cp(
    recipe: Annotated[
        str, typer.Argument(help="Name of a recipe of ours.", autocompletion=recipe_names)
    ],
    file: Annotated[Path, typer.Argument(help="Where to.")],
) -> None:
    """Copy a recipe, to change it."""
    from evatune.errors import ConfigError
    from evatune.finetune.recipe_files import text_of
    from evatune.utils.outputs import claimed_file

    text = text_of(recipe)
    if os.path.lexists(file):
        raise ConfigError(f"file {str(file)!r} exists; name another")
    if not file.absolute().parent.is_dir():
        raise ConfigError(
            f"folder {str(file.absolute().parent)!r} does not exist; make it first, or name another"
            " file"
        )
    with (
        claimed_file(file, False, lambda _: False, "name another") as output,
        output.whole() as temporary,
    ):
        temporary.write_text(text, encoding="utf-8")
    typer.echo(printable(str(file)))
