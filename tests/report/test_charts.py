"""Plots: colors that can be read, data that is small, and names as they are."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import evatune
from evatune.report.charts import (
    COLORS,
    Curve,
    HeatCell,
    curves,
    heat_color,
    heat_map,
    spectra,
)
from evatune.report.colors import contrast, ink_on, rgb
from evatune.report.vega import picture

WHITE, DARK = (255, 255, 255), (0x14, 0x18, 0x1D)


def test_figures_in_a_heat_map_have_the_contrast_of_wcag_aa() -> None:
    for step in range(-20, 21):
        color = heat_color(step / 20)
        assert contrast(color, rgb(ink_on(color))) >= 4.5
    assert contrast((0, 0, 0), WHITE) == pytest.approx(21)


@pytest.mark.parametrize("ground", [WHITE, DARK])
def test_lines_have_contrast_on_light_and_dark_pages(ground: tuple[int, int, int]) -> None:
    assert min(contrast(rgb(color), ground) for color in COLORS) >= 3


def test_a_heat_map_is_centered_on_uniform_and_keeps_the_models_order() -> None:
    names = ["h.1.up", "h.0.up", "h.0.down", "head"]
    cells = [HeatCell(name, 5, place - 1.0, {"rank": 5}) for place, name in enumerate(names)]
    spec = heat_map(cells, "more or fewer")
    color = spec["layer"][0]["encoding"]["color"]
    assert color["scale"]["domain"] == [-2, 0, 2]
    assert color["legend"]["title"] == "more or fewer"
    assert spec["encoding"]["x"]["sort"] == ["1", "0", "–"]
    assert spec["encoding"]["y"]["sort"] == ["up", "down", "head"]
    assert picture(spec).startswith(b"\x89PNG")


def test_many_blocks_without_experts_keep_their_facts() -> None:
    cells = [HeatCell(f"h.{block}.up", 1.0, 0.0, {"rank": block}) for block in range(200)]
    spec = heat_map(cells, "points")
    assert spec["data"]["values"][7]["layer"] == "h.7.up"
    assert spec["data"]["values"][7]["rank"] == 7


def test_experts_share_a_cell_with_their_means() -> None:
    names = [f"h.{block}.experts.{expert}.up" for block in range(4) for expert in range(50)]
    cells = [HeatCell(name, place % 2, place % 2, {}) for place, name in enumerate(names)]
    values = heat_map([*cells, HeatCell("head", None, 0, {})], "")["data"]["values"]
    assert [value["block"] for value in values] == ["0", "1", "2", "3", "–"]
    assert [value["difference"] for value in values] == [0.5, 0.5, 0.5, 0.5, 0]
    assert values[0]["layers"] == 50
    assert values[0]["type"] == "experts.up"


def test_a_spectrum_is_cumulative_and_ends_at_its_rank(calibration: evatune.Calibration) -> None:
    plan = calibration.allocate()
    values = spectra(calibration, plan)["data"]["values"]
    name = next(iter(calibration.layers))
    of_layer = [value for value in values if value["layer"] == name]
    shares = calibration.spectra[name].explained_variance_ratio.cumsum(0).tolist()
    assert [value["share"] for value in of_layer] == pytest.approx(shares, abs=1e-4)
    assert [value["rank"] for value in of_layer if "rank" in value] == [plan.ranks[name]]
    assert of_layer[0]["random"] == pytest.approx(1 / 8)


class Blocks(nn.Module):
    """Blocks 2 and 3, and a layer outside of blocks, which no other layer shares an input with."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.ModuleDict({"up": nn.Linear(8, 8)})
        self.h = nn.ModuleDict({"2": block, "3": nn.ModuleDict({"up": nn.Linear(8, 8)})})
        self.head = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.h.values():
            x = block["up"](x)
        return self.head(x)


def test_spectra_have_the_numbers_of_their_blocks_and_gray_for_what_is_in_none() -> None:
    torch.manual_seed(0)
    batches = [torch.randn(16, 8) for _ in range(4)]
    calibration = evatune.calibrate(Blocks(), batches, evatune.CalibrationConfig(rank=2))
    spec = spectra(calibration, calibration.allocate())
    values = spec["data"]["values"]
    depths = {value["layer"]: value.get("depth") for value in values}
    assert depths == {"h.2.up": 0, "h.3.up": 1, "head": None}
    assert {value["layer"] for value in values if "outside" in value} == {"head"}
    drawn = picture(spec, "svg").decode()
    labels = re.findall(r">([^<>]+)</text>", drawn)
    assert labels[-4:] == ["2", "3", "block", "–"]  # a legend's title comes after its labels


def test_one_figure_has_a_tick_that_says_it() -> None:
    drawn = picture(curves([Curve("eva", [(0, 2.8), (5, 2.8)])], ["eva"]), "svg").decode()
    assert ">2.8<" in drawn
    assert "axis" not in curves([Curve("eva", [(0, 2.8), (5, 2.7)])], ["eva"])["encoding"]["y"]


def test_curves_of_several_tasks_have_panels_and_no_numbers_that_are_none() -> None:
    lines = [Curve("eva", [(1, 1.0), (2, float("nan"))], "a"), Curve("eva", [(1, 2.0)], "b")]
    spec = curves(lines, ["eva"])
    assert [value["step"] for value in spec["data"]["values"]] == [1, 1]
    assert spec["usermeta"] == {"fit": "facet", "panels": 2}
    assert picture(spec, "svg").startswith(b"<svg")
