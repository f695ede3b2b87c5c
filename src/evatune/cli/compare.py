"""`evatune compare`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from evatune.cli.compare_options import TEST_SEEDS, CompareOptions
from evatune.cli.hints import AXES
from evatune.cli.libraries import libraries_on_stderr, loading_libraries, progress_on_stderr
from evatune.cli.options import split_names, takes_options, this_command
from evatune.cli.train import RUNS
from evatune.utils.launcher import require_alone
from evatune.utils.markup import printable
from evatune.utils.names import as_shown

if TYPE_CHECKING:
    from evatune.finetune.comparison.summary import Comparison
    from evatune.finetune.recipe import Recipe


@takes_options(CompareOptions)
def compare(options: CompareOptions) -> None:
    """Compare methods under equal conditions; the same command again goes on."""
    from evatune.finetune.recipe_files import expand, load

    sources = expand(text for text in options.recipes if "=" not in text)
    overrides = [text for text in options.recipes if "=" in text]
    require_alone("evatune compare")
    _require_no_axis(overrides, options.lrs)
    trusted = options.trust_remote_code
    settings = [load(source, overrides, trust_remote_code=trusted) for source in sources]
    folder = as_shown(options.out or _default_folder(sources, settings, options.tune))
    if options.tune:
        _compare_tuned(options, sources, settings, folder)
    else:
        _compare_grid(options, settings, folder)


def _compare_grid(options: CompareOptions, settings: list[Recipe], folder: Path) -> None:
    """Run every method with every seed and rate, write table and page, and print the table."""
    from evatune.errors import ConfigError, EvatuneError

    seeds, rates = _numbers(options.seeds, int, "--seeds"), _numbers(options.lrs, float, "--lrs")
    if options.test_seeds is not None:
        raise ConfigError(
            "--test-seeds are for --tune, which tests what other seeds chose; add --tune, or give"
            " all seeds to --seeds"
        )
    with loading_libraries(options.as_json):
        from evatune.finetune.comparison.grid import Run, grid, run_all
        from evatune.finetune.comparison.summary import summarize
        from evatune.report.runs import comparison_table
        from evatune.report.tables import console
        from evatune.utils.lock import lock_folder

    runs = grid(settings, split_names(options.methods), seeds, rates, folder / "cells")
    _require_comparison(folder)
    with lock_folder(folder):
        with libraries_on_stderr(), _runs_shown(options.as_json, len(runs)) as tell:

            def ended(run: Run, problem: str | None) -> None:
                tell(run.folder.name, problem)

            failed = run_all(runs, _workers(options), ended, options.executor)
        comparison = summarize(runs, options.target_loss)
        following = _tuned_command(options, settings)
        facts = _write_comparison(comparison, failed, folder, settings, following)
    if options.as_json:
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
    options: CompareOptions, sources: list[str], settings: list[Recipe], folder: Path
) -> None:
    """Search, test, write tables and pictures, and print them."""
    from evatune.errors import ConfigError, EvatuneError

    tuning = _numbers(options.seeds, int, "--seeds")
    tests = _numbers(options.test_seeds or TEST_SEEDS, int, "--test-seeds")
    if options.lrs or options.target_loss is not None:
        raise ConfigError(
            "--tune chooses the learning rates and the losses to reach; leave out --lrs and"
            " --target-loss"
        )
    with loading_libraries(options.as_json):
        from evatune.finetune.comparison.rate_rule import Seeds, Trial
        from evatune.finetune.comparison.search import tune
        from evatune.utils.lock import lock_folder

        # It comes after hours, and may lack an extra.
        import_module("evatune.report.tuned_markdown")

    seeds, workers = Seeds(tuple(tuning), tuple(tests)), _workers(options)
    path = folder / "runs.jsonl"
    _require_comparison(folder)
    with lock_folder(folder):
        with libraries_on_stderr(), _runs_shown(options.as_json, None) as tell:

            def ended(name: str, trial: Trial, problem: str | None) -> None:
                aim = "test" if trial.tested else "tune"
                tell(f"{name}, {aim}, seed {trial.seed}", problem)

            methods = split_names(options.methods)
            searches = tune(settings, methods, seeds, path, workers, ended, options.executor)
        if path.exists():
            _show_tuned(path, sources, settings, options.as_json)
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
    from evatune.finetune.comparison.run_lines import read_lines
    from evatune.finetune.comparison.tuned_conditions import KnownRecipe
    from evatune.finetune.comparison.tuned_summary import summarize
    from evatune.finetune.recipe_files import load
    from evatune.finetune.recipe_tree import all_settings, as_tree
    from evatune.report.advice import advice_lines
    from evatune.report.pages.tuned import render
    from evatune.report.tables import console, say
    from evatune.report.tuned import overview_lines, tuned_facts, tuned_tables
    from evatune.report.tuned_markdown import write_pages
    from evatune.utils.atomic import write_text

    recipes = {
        (recipe.domain, recipe.task): KnownRecipe(source, all_settings(as_tree(load(source))))
        for source, recipe in zip(sources, settings, strict=True)
    }
    summary = summarize(read_lines([path]), recipes)
    command = this_command()
    written = write_pages(summary, path.parent / "tables", command)
    report = path.parent / "report.html"
    write_text(report, render(summary, command))
    written.append(report)
    if as_json:
        typer.echo(json.dumps({"pages": [str(page) for page in written]} | tuned_facts(summary)))
        return
    terminal = console()
    for table in tuned_tables(summary, terminal):
        terminal.print(table)
    say(terminal, *overview_lines(summary))
    advised = advice_lines(summary.groups)
    if advised:
        say(terminal, "", "By validation:", *advised, "")
    for page in written:
        if page.suffix in (".md", ".html"):
            typer.echo(printable(str(page)))


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
    from dataclasses import asdict

    from evatune.finetune.comparison.run_lines import finite
    from evatune.report.pages.comparison import render
    from evatune.report.runs import comparison_markdown
    from evatune.utils.atomic import write_text

    command = this_command()
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


def _tuned_command(options: CompareOptions, settings: list[Recipe]) -> str:
    """Return the command of the fair comparison of the same methods, which searches their rates."""
    import shlex

    validated = all(recipe.data.has_validation for recipe in settings)
    examples = [] if validated else ["data.validation=200"]
    asked = [*options.recipes, *examples, "--methods", options.methods, "--tune"]
    return shlex.join(["evatune", "compare", *asked])


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
def _runs_shown(quiet: bool, total: int | None) -> Iterator[Callable[[str, str | None], None]]:
    """Yield a function that shows how many runs have ended, and which was the last.

    It takes the run's name and what went wrong, or None. With `quiet` it shows nothing.
    """
    from evatune.utils.progress import display

    with progress_on_stderr(quiet), display("comparing", "runs", shown=not quiet) as bar:
        bar.begin(total)
        done = 0

        def tell(name: str, problem: str | None) -> None:
            nonlocal done
            done += 1
            bar.update(done, total, f"{'failed' if problem else 'done'}: {name}")

        yield tell


def _workers(options: CompareOptions) -> int:
    return options.workers or os.cpu_count() or 1


def _numbers(text: str, kind: Any, option: str) -> list[Any]:
    from evatune.errors import ConfigError

    try:
        return [kind(part) for part in split_names(text)]
    except ValueError:
        raise ConfigError(
            f"{option} is {text!r}; give numbers with commas between, such as {option} 0,1,2"
        ) from None
