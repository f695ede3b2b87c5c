"""Make the pictures of docs/images: MiniLM on BBC news, which the extra `demo` brings.

python scripts/pictures.py
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib as mpl
import torch
from PIL import Image

import evatune
from evatune.loading.batches import TextBatches
from evatune.loading.demo import demo_data, demo_model
from evatune.loading.models import load_model
from evatune.loading.texts import load_texts

mpl.use("svg")
mpl.rcParams |= {"svg.hashsalt": "evatune", "svg.fonttype": "none", "font.size": 10}
from matplotlib import pyplot as plt  # noqa: E402

_FOLDER = Path(__file__).resolve().parents[1] / "docs" / "images"
_SHOWN = {
    "encoder.layer.0.attention.self.query": "layer 0, query",
    "encoder.layer.2.intermediate.dense": "layer 2, MLP up",
    "encoder.layer.4.output.dense": "layer 4, MLP down",
    "encoder.layer.5.attention.output.dense": "layer 5, attention output",
}
_WIDTH, _HEIGHT = 1100, 720  # of the part of the report page that is shown
_COLORS = 128
_ROLES = {
    "attention.self.query": "query",
    "attention.self.key": "key",
    "attention.self.value": "value",
    "attention.output.dense": "attention output",
    "intermediate.dense": "MLP up",
    "output.dense": "MLP down",
}


def main() -> None:
    loaded = load_model(demo_model(), device="cpu")
    batches = TextBatches(loaded.tokenizer, load_texts(demo_data()), 16, 128, 0)
    config = evatune.CalibrationConfig(rank=16, components=64, max_batches=16, tolerance=0)
    calibration = evatune.calibrate(loaded.model, batches, config)
    for name, draw in (("captured", captured), ("ranks", ranks)):
        figure = draw(calibration)
        figure.savefig(
            _FOLDER / f"{name}.svg", bbox_inches="tight", metadata={"Date": None}, facecolor="white"
        )
        plt.close(figure)
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser:
        report(browser, _FOLDER / "report.png")


def captured(calibration: evatune.Calibration) -> plt.Figure:
    """Share of energy inside the leading directions and random ones, against their number."""
    figure, axes = plt.subplots(figsize=(6.4, 3.2))
    for layer, label in _SHOWN.items():
        spectrum = calibration.spectra[layer]
        share = torch.cumsum(spectrum.explained_variance_ratio, 0)
        (line,) = axes.plot(range(1, len(share) + 1), share, label=label)
        width = calibration.layers[layer].in_features
        axes.plot((0, len(share)), (0, len(share) / width), "--", color=line.get_color(), lw=1)
    axes.set(xlabel="rank r", ylabel="share of the input's energy", xlim=(0, 64), ylim=(0, 1))
    axes.axvline(16, color="0.8", lw=1, zorder=0)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def ranks(calibration: evatune.Calibration) -> plt.Figure:
    """Ranks by type of layer and depth, colored by the difference from uniform."""
    plan = calibration.allocate(rank=16, rho=2.0)
    depth = 6  # blocks of MiniLM-L6
    figure, axes = plt.subplots(figsize=(6.4, 2.6))
    grid = [
        [plan.ranks[f"encoder.layer.{block}.{role}"] for block in range(depth)] for role in _ROLES
    ]
    axes.imshow(grid, cmap="RdBu_r", vmin=0, vmax=32, aspect="auto")
    for row, values in enumerate(grid):
        for column, rank in enumerate(values):
            color = "white" if abs(rank - 16) > 11 else "black"
            axes.text(column, row, str(rank), ha="center", va="center", color=color)
    axes.set_yticks(range(len(_ROLES)), list(_ROLES.values()))
    axes.set_xticks(range(depth))
    axes.set_xlabel("block")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure


def report(browser: str, picture: Path) -> None:
    """The first screen of the page that `evatune init` writes, as a browser shows it."""
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        model, data = work / "all-MiniLM-L6-v2", work / "bbc-news"  # as the page shall name them
        model.symlink_to(demo_model())
        data.symlink_to(demo_data())
        init = [sys.executable, "-m", "evatune", "init", "--model", model.name, "--data", data.name]
        subprocess.run([*init, "--max-length", "128", "--out", "adapter"], cwd=work, check=True)
        shot = work / "report.png"
        options = ["--headless", "--no-sandbox", "--hide-scrollbars", "--virtual-time-budget=8000"]
        size = f"--window-size={_WIDTH},{_HEIGHT}"
        page = (work / "adapter" / "report.html").as_uri()
        subprocess.run([browser, *options, size, f"--screenshot={shot}", page], check=True)
        Image.open(shot).convert("RGB").quantize(_COLORS).save(picture, optimize=True)


if __name__ == "__main__":
    main()
