"""`evatune train`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from evatune.cli.libraries import libraries_on_stderr, loading_libraries, progress_on_stderr
from evatune.cli.options import Trust, recipe_names
from evatune.utils.launcher import is_main_process
from evatune.utils.markup import printable
from evatune.utils.names import as_shown

RUNS = Path("runs")


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
    from evatune.finetune.recipe import USER_TASK
    from evatune.finetune.recipe_files import load

    settings = load(recipe, overrides or (), trust_remote_code=trust_remote_code)
    name = Path(recipe).stem
    if settings.data.source is not None:  # one recipe is for all of the user's data
        name += f"-{settings.task.removeprefix(f'{USER_TASK}-')}"
    folder = as_shown(out or RUNS / f"{name}-{settings.method}-seed{settings.seed}")
    with loading_libraries(as_json or not is_main_process()) as log:
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
    if not is_main_process():
        return
    write_text(folder / "report.html", render(folder, settings))
    write_run_card(folder, settings, result)
    if as_json:
        typer.echo(json.dumps({"out": str(folder)} | result))
        return
    typer.echo(
        f"{settings.method} on {printable(settings.task)}: {score_text(result)}, test loss"
        f" {result['eval_loss']:.3f}; {result['trainable_parameters']:,} trainable parameters;"
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
