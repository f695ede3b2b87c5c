"""`evatune compare`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from evatune.cli.completion import recipe_names
from evatune.cli.hints import AXES
from evatune.cli.libraries import libraries_on_stderr, loading_libraries, progress_on_stderr
from evatune.cli.train import RUNS, TRUSTED, Trust
from evatune.utils.launcher import require_alone
from evatune.utils.markup import printable
from evatune.utils.names import as_shown

if TYPE_CHECKING:
    from evatune.finetune.comparison.rate_rule import Seeds, Trial
    from evatune.finetune.comparison.search import Progress
    from evatune.finetune.comparison.summary import Comparison
    from evatune.finetune.recipe import Recipe
    from evatune.utils.progress import Display


_TEST_SEEDS = "10,11,12,13,14"


def compare(
    recipes: Annotated[
        list[str],
        typer.Argument(
            help=(
                "Recipes of ours, patterns of their names such as 'images-*', or YAML files; with"
                " settings that replace "
                "theirs, such as training.steps=100."
            ),
            autocompletion=recipe_names,
        ),
    ],
    methods: Annotated[str, typer.Option(help="Methods, with commas between.")] = "lora,eva",
    seeds: Annotated[
        str, typer.Option(help="Seeds, with commas between; with --tune, to tune with.")
    ] = "0,1,2",
    lrs: Annotated[
        str, typer.Option(help="Learning rates, with commas between. Default: the recipe's.")
    ] = "",
    tuned: Annotated[
        bool,
        typer.Option(
            "--tune",
            help=(
                "Search each method's learning rate around the recipe's on validation examples"
                " (data.validation), then test it with other seeds."
            ),
        ),
    ] = False,
    test_seeds: Annotated[
        str | None, typer.Option(help=f"With --tune: seeds to test with. Default: {_TEST_SEEDS}.")
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Runs at a time, of one thread each. Default: one per core."),
    ] = None,
    executor: Annotated[
        str, typer.Option(help="process, or ray: a cluster (RAY_ADDRESS), else this machine.")
    ] = "process",
    target_loss: Annotated[
        float | None,
        typer.Option(
            help="Evaluation loss to reach. Default: what every seed of the first method reached."
        ),
    ] = None,
    trust_remote_code: Trust = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder. Default: runs/compare-RECIPE, or -DOMAIN."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Compare methods under equal conditions; the same command again goes on."""
    from evatune.errors import EvatuneError
    from evatune.finetune.recipe_files import expand, load

    sources = expand(text for text in recipes if "=" not in text)
    overrides = [text for text in recipes if "=" in text]
    require_alone("evatune compare")
    _require_no_axis(overrides, lrs)
    overrides += [TRUSTED] if trust_remote_code else []
    settings = [load(source, overrides) for source in sources]
    folder = as_shown(out or _default_folder(sources, settings, tuned))
    chosen_seeds, rates = _numbers(seeds, int, "--seeds"), _numbers(lrs, float, "--lrs")

    from rich.console import Console

    log = Console(stderr=True, quiet=as_json)
    with loading_libraries(log):
        from evatune.errors import ConfigError
        from evatune.finetune.comparison.grid import grid, run_all
        from evatune.finetune.comparison.rate_rule import Seeds
        from evatune.finetune.comparison.summary import summarize
        from evatune.report.runs import comparison_table
        from evatune.report.tables import console
        from evatune.utils.lock import held

    names = [name.strip() for name in methods.split(",") if name.strip()]
    count = workers or os.cpu_count() or 1
    if tuned:
        if rates or target_loss is not None:
            raise ConfigError(
                "--tune chooses the learning rates and the losses to reach; leave out --lrs and"
                " --target-loss"
            )
        tests = _numbers(test_seeds or _TEST_SEEDS, int, "--test-seeds")
        split_seeds = Seeds(tuple(chosen_seeds), tuple(tests))
        _compare_tuned(sources, settings, names, split_seeds, folder, count, executor, as_json)
        return
    if test_seeds is not None:
        raise ConfigError(
            "--test-seeds are for --tune, which tests what other seeds chose; add --tune, or give"
            " all seeds to --seeds"
        )
    runs = grid(settings, names, chosen_seeds, rates, folder / "cells")
    _require_comparison(folder)
    with held(folder):
        with libraries_on_stderr():
            failed = _with_bar(as_json, runs, lambda tell: run_all(runs, count, tell, executor))
        comparison = summarize(runs, target_loss)
        following = _tuned_command(recipes, methods, settings)
        facts = _write_comparison(comparison, failed, folder, settings, following)
    if as_json:
        typer.echo(json.dumps(facts))
    elif comparison.lines:
        terminal = console()
        terminal.print(comparison_table(terminal, comparison))
        for name in ("report.html", "comparison.json", "comparison.md"):
            typer.echo(printable(str(folder / name)))
    if failed:
        path, why = next(iter(failed.items()))
        raise EvatuneError(
            f"{len(failed)} of {len(runs)} runs failed, for example {path.name}: {why}"
        )


def _default_folder(sources: list[str], settings: list[Recipe], tuned: bool) -> Path:
    """Return a folder that is named by what is compared."""
    name = Path(sources[0]).stem
    if len(sources) > 1:
        name = "-".join(dict.fromkeys(recipe.domain for recipe in settings))
    elif name == "recipe":  # as every run calls its own
        name = f"{settings[0].domain}-{settings[0].task}"
    return RUNS / f"{'tuned' if tuned else 'compare'}-{name}"


def _require_no_axis(overrides: list[str], lrs: str) -> None:
    """Raise a ConfigError for settings of which a comparison has several, by an option."""
    from evatune.errors import ConfigError

    options = AXES | ({"training.learning_rate": "--lrs"} if lrs else {})
    for override in overrides:
        key, _, value = override.partition("=")
        if key in options:
            raise ConfigError(
                f"{override!r} does not fit: a comparison sets {key} itself, by its option; give"
                f" {options[key]} {value}, with commas between several"
            )


def _compare_tuned(
    sources: list[str],
    settings: list[Recipe],
    methods: list[str],
    seeds: Seeds,
    folder: Path,
    workers: int,
    executor: str,
    as_json: bool,
) -> None:
    """Search, test, write tables and pictures, and print them."""
    import_module("evatune.report.tuned")  # which may lack an extra, and comes after hours

    from evatune.errors import EvatuneError
    from evatune.finetune.comparison.search import tune
    from evatune.utils.lock import held

    path = folder / "runs.jsonl"
    _require_comparison(folder)
    with held(folder):
        with libraries_on_stderr(), _search_bar(as_json) as tell:
            searches = tune(settings, methods, seeds, path, workers, tell, executor)
        if path.exists():
            _show_tuned(path, sources, settings, as_json)
    failed = {search.name: search.problem for search in searches if search.problem}
    failed |= {search.name: "every run diverged" for search in searches if search.diverged}
    if failed:
        name, why = next(iter(failed.items()))
        raise EvatuneError(
            f"{len(failed)} of {len(searches)} searches failed, for example that of {name}: {why}"
        )


def _show_tuned(path: Path, sources: list[str], settings: list[Recipe], as_json: bool) -> None:
    """Write the pages of a tuned comparison beside its lines, and print its tables.

    Args:
        sources: of the recipes. settings: the recipes themselves, with what the command replaces.
    """
    import shlex
    import sys

    from evatune.finetune.comparison.run_lines import read_lines
    from evatune.finetune.comparison.tuned_conditions import Source
    from evatune.finetune.comparison.tuned_summary import summarize
    from evatune.finetune.recipe_files import load
    from evatune.finetune.recipe_tree import all_settings, as_tree
    from evatune.report.advice import advice_lines
    from evatune.report.pages.tuned import render
    from evatune.report.tables import console, say
    from evatune.report.tuned import overview_lines, tuned_facts, tuned_tables, write_pages
    from evatune.utils.atomic import write_text

    recipes = {
        (recipe.domain, recipe.task): Source(source, all_settings(as_tree(load(source))))
        for source, recipe in zip(sources, settings, strict=True)
    }
    summary = summarize(read_lines([path]), recipes)
    command = shlex.join(["evatune", *sys.argv[1:]])
    written = write_pages(summary, path.parent / "tables", command)
    report = path.parent / "report.html"
    write_text(report, render(summary, command))
    written.append(report)
    if as_json:
        typer.echo(json.dumps({"pages": [str(page) for page in written]} | tuned_facts(summary)))
        return
    terminal = console()
    for table in tuned_tables(summary):
        terminal.print(table)
    say(terminal, *overview_lines(summary))
    advised = advice_lines(summary.groups)
    if advised:
        say(terminal, "", "By validation:", *advised, "")
    for page in written:
        if page.suffix in (".md", ".html"):
            typer.echo(printable(str(page)))


@contextmanager
def _search_bar(quiet: bool) -> Iterator[Progress]:
    """Show how many runs of a tuned comparison have ended, and which was the last."""
    with _bar(quiet) as bar:
        bar.begin(None)
        done = 0

        def tell(name: str, trial: Trial, problem: str | None) -> None:
            nonlocal done
            done += 1
            aim = "test" if trial.tested else "tune"
            state = "failed" if problem else "done"
            bar.update(done, None, f"{state}: {name}, {aim}, seed {trial.seed}")

        yield tell


def _write_comparison(
    comparison: Comparison,
    failed: dict[Path, str],
    folder: Path,
    recipes: list[Recipe],
    following: str,
) -> dict[str, Any]:
    """Write table and page of a comparison, and return its facts, which are written too.

    Args:
        following: the command that the page advises next.
    """
    import shlex
    import sys
    from dataclasses import asdict

    from evatune.finetune.comparison.run_lines import finite
    from evatune.report.pages.comparison import render
    from evatune.report.runs import comparison_markdown
    from evatune.utils.atomic import write_text

    command = shlex.join(["evatune", *sys.argv[1:]])
    facts: dict[str, Any] = {
        "command": command,
        "target_losses": comparison.targets,
        "lines": [asdict(line) for line in comparison.lines],
        "averages": comparison.averages(),
        "failed": {str(path): why for path, why in failed.items()},
    }
    facts = finite(facts)
    write_text(folder / "comparison.json", json.dumps(facts, indent=2) + "\n")
    if comparison.lines:
        write_text(folder / "comparison.md", comparison_markdown(comparison, command))
        page = render(comparison, recipes, command, following, len(failed))
        write_text(folder / "report.html", page)
    return facts


def _tuned_command(recipes: list[str], methods: str, settings: list[Recipe]) -> str:
    """Return the command of the fair comparison of the same methods, which searches their rates."""
    import shlex

    validated = all(recipe.data.has_validation for recipe in settings)
    examples = [] if validated else ["data.validation=200"]
    return shlex.join(["evatune", "compare", *recipes, *examples, "--methods", methods, "--tune"])


def _require_comparison(folder: Path) -> None:
    """Raise a ConfigError for a folder that is there and not empty, but holds no comparison."""
    from evatune.errors import ConfigError

    if (
        folder.is_dir()
        and not (folder / "cells").is_dir()
        and not (folder / "runs.jsonl").is_file()
        and any(not path.name.startswith(".") for path in folder.iterdir())
    ):
        raise ConfigError(
            f"{str(folder)!r} exists and holds no comparison of evatune; name another --out"
        )


@contextmanager
def _bar(quiet: bool) -> Iterator[Display]:
    """Yield a progress display of finished runs; with `quiet`, one that shows nothing."""
    from evatune.utils.progress import display

    with progress_on_stderr(quiet), display("comparing", "runs", shown=not quiet) as bar:
        yield bar


def _with_bar(quiet: bool, runs: Any, work: Any) -> dict[Path, str]:
    with _bar(quiet) as bar:
        bar.begin(len(runs))
        done = 0

        def tell(run_: Any, problem: str | None) -> None:
            nonlocal done
            done += 1
            state = "failed" if problem else "done"
            bar.update(done, len(runs), f"{state}: {run_.folder.name}")

        failed: dict[Path, str] = work(tell)
        return failed


def _numbers(text: str, kind: Any, option: str) -> list[Any]:
    from evatune.errors import ConfigError

    try:
        return [kind(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ConfigError(
            f"{option} is {text!r}; give numbers with commas between, such as {option} 0,1,2"
        ) from None
