"""`evatune merge`: calibrations of separate shards of the data in, one calibration out."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from evatune.cli.libraries import load_torch
from evatune.utils.names import CALIBRATION_FILE, resolved
from evatune.utils.text import shortened

if TYPE_CHECKING:
    from evatune.calibration.merge import LossBound
    from evatune.calibration.result import Calibration
    from evatune.calibration.status import Status


def merge(
    shards: Annotated[
        list[Path],
        typer.Argument(
            help="Two or more calibration.safetensors, or folders that evatune init wrote."
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="File to write, such as calibration.safetensors.")
    ],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a calibration.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of tables.")
    ] = False,
) -> None:
    """Join calibrations of the same model that were computed apart on different data."""
    load_torch()
    from evatune.calibration.merge import loss_bounds
    from evatune.calibration.result import Calibration
    from evatune.cli.inspect import calibration_facts
    from evatune.errors import ConfigError
    from evatune.report.summary import plan_of
    from evatune.utils.outputs import claimed_file

    files = [path / CALIBRATION_FILE if path.is_dir() else path for path in shards]
    for index, file in enumerate(files):
        if resolved(file) in (resolved(other) for other in files[:index]):
            raise ConfigError(f"{str(file)!r} is given twice; its data would count twice")
    if resolved(out) in (resolved(file) for file in files):
        raise ConfigError(
            f"output {str(out)!r} is one of the calibrations to merge; name another with --out"
        )
    with claimed_file(out, overwrite, _is_calibration) as output:
        parts = [Calibration.load(file) for file in files]
        merged = Calibration.merge(parts)
        with output.whole() as temporary:
            merged.save(temporary)
    out = output.shown
    plan, problem = plan_of(merged)
    bounds = loss_bounds(merged, parts, plan.ranks)
    if as_json:
        about = [
            {"file": str(file), "batches": part.batches, "status": part.status}
            for file, part in zip(files, parts, strict=True)
        ]
        lost = {name: bound._asdict() for name, bound in bounds.items()}
        typer.echo(
            json.dumps(
                {"out": str(out), "shards": about, "loss_bounds": lost} | calibration_facts(merged)
            )
        )
        return
    from evatune.report.tables import console, say, show_calibration

    terminal = console()
    show_calibration(terminal, merged)
    if problem is None:
        say(terminal, _loss(bounds.values(), merged.config.sketch))
    say(
        terminal,
        *_unknown(files, parts, merged),
        "",
        f"{out}  the record; evatune inspect prints it",
    )


def _loss(bounds: Collection[LossBound], sketch: str) -> str:
    from evatune.report.text import percent

    proven, given_best = (
        f"{percent(sum(shares) / len(shares))} on average and {percent(max(shares))} in the worst"
        " layer"
        for shares in zip(*bounds, strict=True)
    )
    condition = ""
    if sketch != "exact":
        condition = f" if each shard's sketch found its best ones; else {proven}"
    return (
        "Energy that the chosen directions can have lost against one pass over all the data: at"
        f" most {given_best}{condition}"
    )


def _unknown(files: Sequence[Path], parts: Sequence[Calibration], merged: Calibration) -> list[str]:
    """Return a line per shard without a usable result for layers that the others know."""
    lines = []
    for file, part in zip(files, parts, strict=True):
        by_status: dict[Status, list[str]] = {}
        for name, status in part.status.items():
            if merged.status[name].usable and not status.usable:
                by_status.setdefault(status, []).append(name)
        for status, names in by_status.items():
            lines.append(f"{shortened(names, 3)}: {status} in {file}, known from the other shards.")
    return lines


def _is_calibration(file: Path) -> bool:
    from evatune.calibration.result import Calibration
    from evatune.errors import RecordError

    try:
        Calibration.load(file)
    except RecordError:
        return False
    return True
