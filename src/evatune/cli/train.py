"""`evatune train` and `recipes`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from evatune.cli.completion import recipe_names
from evatune.cli.libraries import (
    TRUST_HELP,
    libraries_on_stderr,
    loading_libraries,
    progress_on_stderr,
)
from evatune.utils.markup import printable
from evatune.utils.names import as_shown
from evatune.utils.text import folded

RUNS = Path("runs")
Trust = Annotated[bool, typer.Option("--trust-remote-code", help=TRUST_HELP)]
TRUSTED = "trust_remote_code=true"


def train(
    recipe: Annotated[
        str,
        typer.Argument(
            help="A recipe of ours (evatune recipes ls) or a YAML file.",
            autocompletion=recipe_names,
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="Settings that replace the recipe's, such as method=lora training.steps=100."
        ),
    ] = None,
    trust_remote_code: Trust = False,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="Folder of the run. Default: runs/RECIPE-METHOD-seedN, or with your own data"
            " runs/RECIPE-DATA-METHOD-seedN.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Fine-tune by a recipe; again, it resumes a killed run or reads a finished one."""
    from evatune.finetune.recipe import OWN_TASK, load

    settings = load(recipe, [*(overrides or []), *([TRUSTED] if trust_remote_code else [])])
    name = Path(recipe).stem
    if settings.data.source is not None:  # one recipe is for all of the user's data
        name += f"-{settings.task.removeprefix(f'{OWN_TASK}-')}"
    folder = as_shown(out or RUNS / f"{name}-{settings.method}-seed{settings.seed}")

    from rich.console import Console

    from evatune.utils.launcher import is_first

    log = Console(stderr=True, quiet=as_json or not is_first())
    with loading_libraries(log):
        from evatune.finetune.run import run
        from evatune.loading.quiet import quiet_libraries
        from evatune.report.pages.run import render
        from evatune.report.run_cards import write_run_card
        from evatune.report.tables import plain
        from evatune.report.text import caution, score_text
        from evatune.utils.atomic import write_text

        quiet_libraries()

    def say(sentence: str) -> None:
        log.print(plain(sentence), soft_wrap=True)

    with libraries_on_stderr(), progress_on_stderr(as_json):
        result = run(settings, folder, quiet=as_json, say=say)
    if not is_first():
        return
    write_text(folder / "report.html", render(folder, settings, recipe))
    write_run_card(folder, settings, result)
    if as_json:
        typer.echo(json.dumps({"out": str(folder)} | result))
        return
    typer.echo(
        f"{settings.method} on {printable(settings.task)}: {score_text(result)}, evaluation"
        f" loss {result['eval_loss']:.3f}; {result['trainable_parameters']:,} trainable parameters;"
        f" {result['init_seconds']:.1f} s to initialize, {result['train_seconds']:.1f} s to train"
        + (
            ""
            if result["first_gradient_b"] is None
            else f"; gradient of B at step 1: {result['first_gradient_b']:.3g}"
        )
    )
    if doubt := caution(result):
        typer.echo(doubt)
    for path in sorted(folder.iterdir()):
        if not path.name.startswith(".") and path.name != "checkpoints":
            typer.echo(printable(str(path)))


recipes = typer.Typer(help="List, show or copy recipes.")


@recipes.command()
def ls(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """List the recipes that come with evatune."""
    from evatune.finetune.recipe import load, ours, text_of

    about = {name: text_of(name).splitlines()[0].removeprefix("#").strip() for name in ours()}
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
    from evatune.finetune.recipe import as_tree, flat, load, recipe_keys, text_of

    settings = load(recipe)
    values = {key.name: False for key in recipe_keys()} | flat(as_tree(settings))
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
    from evatune.finetune.recipe import text_of
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
