"""The page of a calibration."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import evatune
from evatune.report.pages.calibration import render
from evatune.report.summary import Figures
from evatune.report.text import percent, rate_text, verdict
from tests.report.pages.helpers import Document, specs


def test_the_page_says_what_was_calibrated_and_how_it_ended(written: Path) -> None:
    text = (written / "report.html").read_text(encoding="utf-8")
    page = Document(text)
    calibration = evatune.Calibration.load(written / "calibration.safetensors")
    assert all(f">{name}</td>" in text for name in calibration.layers)
    assert '<th scope="row">seed</th><td>3</td>' in text
    rate = rate_text(calibration.learning_rate(2e-4, scale="paper"))
    assert f"A LoRA rate of 2e-4 corresponds to {rate} at scale=paper, where κ is " in page.text
    assert "r / ρ / α 4 / 2 / 4" in page.text
    figures = Figures.of(calibration)
    assert verdict(figures) in page.text
    assert specs(text).keys() == {"ranks", "energy", "spectra"}
    without_scale = render(figures, {}, None)
    assert "LoRA rate" not in without_scale


def test_energy_is_held_against_a_random_start_of_the_same_ranks(written: Path) -> None:
    calibration = evatune.Calibration.load(written / "calibration.safetensors")
    plan = calibration.allocate()
    widths = {name: layer.in_features for name, layer in calibration.layers.items()}
    ranks = {name: rank for name, rank in plan.ranks.items() if rank}
    chance = sum(rank / widths[name] for name, rank in ranks.items()) / len(ranks)
    figures = Figures.of(calibration)
    assert figures.totals.random_mean == pytest.approx(chance)
    assert f"what a random A of the same ranks would ({percent(chance)})" in verdict(figures)


def test_the_verdict_asks_for_more_batches_where_the_directions_are_not_settled(
    calibration: evatune.Calibration,
) -> None:
    plan = calibration.allocate()
    moving = Figures.of(replace(calibration, estimated_missed=0.2))
    settled = replace(calibration, estimated_missed=0.001)
    told = verdict(Figures.of(settled))
    # A random A of 2 of 8 directions holds so much that nothing else could be said.
    assert "little to gain" in told
    few = replace(plan, ranks=dict.fromkeys(plan.ranks, 0), spent=0)
    assert verdict(Figures.of(settled, few)).startswith("Nothing is known")
    assert verdict(moving) == told
