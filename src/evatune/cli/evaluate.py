"""`evatune evaluate`: a finished run on standard tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from evatune.cli.libraries import libraries_on_stderr, loading_libraries, progress_on_stderr
from evatune.cli.options import Trust, split_names
from evatune.utils.markup import printable


def evaluate(
    run: Annotated[Path, typer.Argument(help="Folder that evatune train wrote.")],
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            help="Names, with commas or repeated: evatune_commonsense, humaneval, mbpp, and those"
            " of lm-evaluation-harness. Default: those of the run's recipe, where it has any.",
        ),
    ] = None,
    include_path: Annotated[
        Path | None,
        typer.Option(help="Folder with tasks of your own, YAML files of lm-evaluation-harness."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder with copies of the data of evatune_…, humaneval and mbpp, by their ids on"
            " the hub. Default: the run's own, or the hub."
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Examples of each task.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Sequences at once.")] = None,
    run_generated_code: Annotated[
        bool,
        typer.Option(
            "--run-generated-code",
            help="Let programs that the model writes run on this machine, under limits that stop"
            " mistakes and no attacker: best in a container.",
        ),
    ] = False,
    trust_remote_code: Trust = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure a finished run of language generation on standard tasks.

    Scores are kept in evaluation.json of the run, and shown on its page and its model card.
    """
    with loading_libraries(as_json):
        from evatune.finetune.evaluation.evaluate import EvaluationOptions
        from evatune.finetune.evaluation.evaluate import evaluate as measure
        from evatune.finetune.run_folder import EVALUATION, finished_run
        from evatune.loading.quiet import quiet_libraries
        from evatune.report.pages.run import render
        from evatune.report.run_cards import write_run_card
        from evatune.report.tables import console, evaluation_table
        from evatune.utils.atomic import write_text

        quiet_libraries()

    names = [name for text in tasks or [] for name in split_names(text)]
    options = EvaluationOptions(
        tasks=list(dict.fromkeys(names)),
        include=include_path,
        data=data,
        limit=limit,
        batch_size=batch_size,
        run_code=run_generated_code,
        trust_remote_code=trust_remote_code,
    )
    with libraries_on_stderr(), progress_on_stderr(as_json):
        measured = measure(run, options)
    recipe, result = finished_run(run)
    write_text(run / "report.html", render(run, recipe))
    write_run_card(run, recipe, result)
    file = str(run / EVALUATION)
    if as_json:
        typer.echo(json.dumps({"out": file, "tasks": measured}))
        return
    terminal = console()
    terminal.print(evaluation_table(terminal, measured))
    for path in (file, str(run / "report.html")):
        typer.echo(printable(path))
