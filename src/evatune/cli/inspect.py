"""`evatune inspect`: print a calibration or an adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from evatune.calibration import Calibration


def inspect(
    file: Annotated[Path, typer.Argument(help="calibration.safetensors, an adapter's safetensors, or their folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Print ranks, energies and statuses of a calibration, or ranks and scales of an adapter."""
    from evatune.errors import RecordError

    if not file.exists():
        raise RecordError(f"{str(file)!r} does not exist; give a calibration.safetensors, an adapter file, or a folder")
    calibration = file / "calibration.safetensors" if file.is_dir() else file
    adapter = file / "adapter_model.safetensors" if file.is_dir() else file
    facts: dict[str, Any] = {}
    shown: list[Any] = []
    if file.is_dir() and not calibration.exists() and not adapter.exists():
        raise RecordError(f"folder {str(file)!r} holds neither calibration.safetensors nor adapter_model.safetensors")
    is_adapter = (adapter.parent / "adapter_config.json").exists() and (file.is_dir() or adapter.name.startswith("adapter"))
    if is_adapter and adapter.exists():
        from evatune.adapters.saved import adapter_rows
        from evatune.report.tables import adapter_table

        rows = adapter_rows(adapter)
        facts["adapter"] = rows
        shown.append(adapter_table(rows))
    if calibration.exists() and (file.is_dir() or not is_adapter):
        from evatune.calibration import Calibration
        from evatune.report.tables import calibration_table, summary_lines

        loaded = Calibration.load(calibration)
        facts |= calibration_facts(loaded)
        plan = loaded.allocate()
        shown += [calibration_table(loaded, plan), *summary_lines(loaded, plan)]
    if as_json:
        typer.echo(json.dumps(facts))
        return
    from evatune.report.tables import console

    terminal = console()
    for part in shown:
        terminal.print(part, highlight=False)


def calibration_facts(calibration: Calibration) -> dict[str, Any]:
    """What `--json` says about a calibration."""
    from dataclasses import asdict

    from evatune.report.summary import layer_rows, totals

    plan = calibration.allocate()
    return {
        "model": calibration.model,
        "config": asdict(calibration.config),
        "versions": calibration.versions,
        "totals": totals(calibration, plan),
        "layers": [asdict(row) for row in layer_rows(calibration, plan)],
    }
