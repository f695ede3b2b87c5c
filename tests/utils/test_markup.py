"""Names that a terminal, a plot, a page, Markdown or YAML would take for their own signs."""

from __future__ import annotations

import io
import xml.etree.ElementTree
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from torch import nn

import evatune
from evatune.adapters.export.files import write_card
from evatune.finetune.compare import Comparison, MeanStd, MethodSummary
from evatune.report import plots
from evatune.report.page import render
from evatune.report.runs import comparison_markdown, comparison_plot, comparison_table, rank_plot
from evatune.report.tables import adapter_table, show_calibration
from evatune.utils.markup import markdown_code, markdown_text, plot_text, printable
from tests.conftest import Command, refused, sentences

ESCAPE = "\x1b[31mred"
NAMES = (
    "a[/b]",
    "[bold]b",
    r"$\frac$",
    "$x$",
    "_under",
    "<script>x",
    ":smile:",
    "c:\\d",
    "中文",
    ESCAPE,
    "new\nline",
    "\udce9",
)


class Named(nn.Module):
    """A layer of every name."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({name: nn.Linear(8, 4) for name in NAMES})

    def forward(self, x: torch.Tensor) -> None:
        for number, layer in enumerate(self.layers.values(), 1):
            layer(x * number)


@pytest.fixture(scope="module")
def calibration() -> evatune.Calibration:
    batches = [
        torch.randn(32, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(4)
    ]
    return evatune.calibrate(Named(), batches, evatune.CalibrationConfig(rank=2, max_batches=4))


def terminal() -> Console:
    return Console(file=io.StringIO(), width=250, force_terminal=True, color_system=None)


def test_a_table_shows_every_name_as_it_is(calibration: evatune.Calibration) -> None:
    shown = terminal()
    show_calibration(shown, calibration)
    row = {"rank": 1, "alpha": 1.0, "scale": 1.0, "parameters": 1, "a_row_norm": 1.0, "b_norm": 1.0}
    shown.print(adapter_table(shown, [row | {"layer": name} for name in NAMES]))
    text = shown.file.getvalue()  # type: ignore[attr-defined]
    assert all(text.count(printable(name)) >= 2 for name in NAMES)
    assert "\x1b" not in text


def test_plots_and_page_show_every_name_as_it_is(
    calibration: evatune.Calibration, tmp_path: Path
) -> None:
    plan = calibration.allocate()
    page = render(calibration, plan, {"model": "<i>&\udce9"})
    page.encode("utf-8")
    assert "<i>" not in page
    assert "<script>" not in page
    assert "layers.a[/b]" in page
    assert "\x1b" not in page
    drawing = xml.etree.ElementTree.fromstring(plots.spectra(calibration, plan))
    words = {
        "".join(element.itertext()).strip()
        for element in drawing.iter()
        if element.tag.endswith("text")
    }
    assert {f"layers.{printable(name)}" for name in NAMES} <= words
    rank_plot(calibration, plan, tmp_path / "ranks.png")
    assert (tmp_path / "ranks.png").stat().st_size > 1000


def test_a_legend_leaves_no_name_out() -> None:
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    for name in NAMES:
        axes.plot([0, 1], label=plot_text(name))
    assert len(axes.get_legend_handles_labels()[1]) == len(NAMES)


def test_a_comparison_shows_every_name_as_it_is(tmp_path: Path) -> None:
    def line(task: str) -> MethodSummary:
        values: dict[str, Any] = {field.name: MeanStd(1.0, None) for field in fields(MethodSummary)}
        return MethodSummary(
            **values
            | {
                "task": task,
                "method": "eva",
                "learning_rate": 1e-3,
                "seeds": 1,
                "best": True,
                "curve": [(1, 1.0, 1.0)],
            }
        )

    names = [*NAMES, "a|b", "`code`"]
    comparison = Comparison([line(name) for name in names], dict.fromkeys(names, 1.0))
    shown = terminal()
    shown.print(comparison_table(comparison))
    assert all(printable(name) in shown.file.getvalue() for name in names)  # type: ignore[attr-defined]
    comparison_plot(Comparison([line(name) for name in NAMES[:4]], {}), tmp_path / "curves.png")
    text = comparison_markdown(comparison, "evatune compare 'a`b'")
    assert text.startswith("`` evatune compare 'a`b' ``\n")
    rows = [row for row in text.splitlines() if row.startswith("|")]
    assert len(rows) == 2 + len(names) + 1
    assert len({row.replace(r"\|", "").count("|") for row in rows}) == 1


@pytest.mark.parametrize(
    "base", ["x: [y]", 'a"\n---\nevil: "1', "#no", "- item", "\udce9", "plain/name", "null", "`b`"]
)
def test_a_card_names_its_base_whatever_it_is_called(tmp_path: Path, base: str) -> None:
    write_card(tmp_path, f"An adapter for {markdown_code(base)}.", base, library="peft")
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert yaml.safe_load(card.split("\n---\n")[0].removeprefix("---\n")) == {
        "base_model": base,
        "library_name": "peft",
        "tags": ["lora"],
    }
    assert len(card.rpartition("\n---\n")[2].strip().splitlines()) == 1


def test_what_a_user_writes_reaches_no_terminal_as_a_command(
    command: Command, bert_folder: Path, tmp_path: Path
) -> None:
    place = tmp_path / f"a[{ESCAPE}"
    place.mkdir()
    data = place / "b].txt"  # "[/b]" closes a style that was never opened
    data.write_text("\n".join(sentences(32)))
    out = tmp_path / f"o[{ESCAPE}" / "o]"
    answer = command(
        "init",
        "--model",
        bert_folder,
        "--data",
        data,
        "--rank",
        2,
        "--max-batches",
        1,
        "--out",
        out,
    )
    assert answer.status == 0, answer
    assert "\x1b" not in answer.out + answer.err
    assert f"o[{printable(ESCAPE)}/o]" in answer.out
    refused(
        command("init", "--model", bert_folder, "--data", data, "--rank", 2, "--targets", ESCAPE),
        printable(ESCAPE),
    )
    refused(command("recipes", "ls", f"[/b]{ESCAPE}\nmore"), "[/b]", printable(ESCAPE))


def test_what_stands_for_itself_is_left_alone() -> None:
    name = "encoder.layer.0.attention.self.query of Qwen/Qwen3-0.6B, σ → ρ"
    assert printable(name) == plot_text(name) == markdown_text(name) == name
    assert markdown_code(name) == f"`{name}`"
