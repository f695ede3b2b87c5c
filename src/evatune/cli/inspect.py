"""`evatune inspect`: print a calibration or an adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from evatune.cli.libraries import load_torch
from evatune.utils.names import ADAPTER_FILE, CALIBRATION_FILE

if TYPE_CHECKING:
    from evatune.calibration.result import Calibration


def inspect(
    file: Annotated[
        Path,
        typer.Argument(help="calibration.safetensors, an adapter's safetensors, or their folder."),
    ],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of tables.")
    ] = False,
) -> None:
    """Print ranks, energies and statuses of a calibration, or ranks and scales of an adapter."""
    from dataclasses import asdict

    load_torch()
    from evatune.adapters.saved import adapter_rows
    from evatune.calibration.result import Calibration

    adapter, record = _find(file)
    rows = adapter_rows(adapter) if adapter else None
    calibration = Calibration.load(record) if record else None
    if as_json:
        facts: dict[str, Any] = {}
        if rows is not None:
            facts["adapter"] = [asdict(row) for row in rows]
        typer.echo(json.dumps(facts | (calibration_facts(calibration) if calibration else {})))
        return
    from evatune.report.tables import adapter_table, console, show_calibration

    terminal = console()
    if rows is not None:
        terminal.print(adapter_table(terminal, rows))
    if calibration is not None:
        show_calibration(terminal, calibration)


def _find(file: Path) -> tuple[Path | None, Path | None]:
    """Return (adapter, calibration) behind a path, by what the files hold, not by their names."""
    from evatune.adapters.saved import is_adapter
    from evatune.errors import RecordError

    if not file.exists():
        raise RecordError(
            f"{str(file)!r} does not exist; give a calibration.safetensors, an adapter file, or a"
            " folder"
        )
    if not file.is_dir():
        return (file, None) if is_adapter(file) else (None, file)
    files = [
        path if path.exists() else None for path in (file / ADAPTER_FILE, file / CALIBRATION_FILE)
    ]
    if not any(files):
        raise RecordError(
            f"folder {str(file)!r} holds neither {CALIBRATION_FILE} nor {ADAPTER_FILE}; give a"
            " folder that evatune init or PEFT's save_pretrained wrote"
        )
    return files[0], files[1]


def calibration_facts(calibration: Calibration) -> dict[str, Any]:
    """Return what `--json` says about a calibration."""
    from dataclasses import asdict

    from evatune.report.summary import Figures

    figures = Figures.of(calibration)
    return {
        "model": calibration.model,
        "config": asdict(calibration.config),
        "versions": calibration.versions,
        "totals": asdict(figures.totals),
        "problem": figures.problem,
        "layers": [row.facts() for row in figures.rows],
    }
