"""Patches of convolutions and one-hot rows of embeddings, against the exact answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import evatune
from evatune.capture import RowSelector, input_views
from evatune.capture.input_views import ConvPatches
from evatune.errors import DataError
from tests.layer_models import CONVS, EXACT_6, Words, best, images, moments, patches, texts
from tests.sketches import captured_energy

torch.set_num_threads(1)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("piece", [16 << 20, 500], ids=["whole", "in small pieces"])
@pytest.mark.parametrize("kind", CONVS)
def test_the_rows_of_a_convolution_are_its_patches(
    kind: str, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(input_views, "_PIECE_BYTES", piece)
    conv = CONVS[kind]()
    xs = images(conv)
    rows = torch.cat([patches(conv, x) for x in xs])
    spectrum = evatune.calibrate(nn.Sequential(conv), xs, EXACT_6, targets=["0"]).spectra["0"]
    assert spectrum.rows == len(rows)
    assert spectrum.total_energy == pytest.approx(float(rows.square().sum(1).mean()), rel=1e-5)
    assert torch.allclose(
        spectrum.energies.double(), moments(rows, len(spectrum.energies)), rtol=1e-4, atol=1e-5
    )
    k = len(spectrum.energies)
    assert captured_energy(spectrum.directions, rows) == pytest.approx(best(rows, k), rel=1e-5)


def test_patches_come_in_pieces_of_bounded_size() -> None:
    input_view = ConvPatches.of(nn.Conv2d(4, 8, 3, padding=1))
    x = torch.randn(2, 4, 300, 200)
    pieces = [rows for rows, _ in input_view.pieces(x, RowSelector(None))]
    assert (
        max(rows.nbytes for rows in pieces)
        <= input_views._PIECE_BYTES
        < sum(rows.nbytes for rows in pieces)
    )
    assert torch.equal(torch.cat(pieces), input_view.all_rows(x).flatten(0, 1))


def test_a_mask_of_tokens_chooses_the_patches_at_their_positions() -> None:
    class Speech(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.halves = (
                nn.Conv1d(3, 4, 3, padding="same"),
                nn.Conv1d(4, 4, 2, stride=2),
            )

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.halves(self.conv(x))

    model, x, mask = Speech(), torch.randn(2, 3, 8), torch.ones(2, 8)
    mask[1, 5:] = 0
    with pytest.warns(
        UserWarning, match=r"no mask fits the rows of these layers.*: halves; .*rows="
    ):
        spectra = evatune.calibrate(
            model, [{"x": x, "attention_mask": mask}], EXACT_6, targets=["conv", "halves"]
        ).spectra
    rows = patches(model.conv, x)[mask.flatten().bool()]
    assert spectra["conv"].rows == 13
    assert spectra["conv"].total_energy == pytest.approx(
        float(rows.square().sum(1).mean()), rel=1e-5
    )
    assert spectra["halves"].rows == 8  # of another length: the mask does not speak about them


def test_layers_that_read_one_tensor_differently_do_not_share_a_sketch() -> None:
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv1d(6, 4, 3, padding=1), nn.Conv1d(6, 4, 3, padding=1)
            self.strided, self.point, self.lin = (
                nn.Conv1d(6, 4, 3, 2),
                nn.Conv1d(6, 4, 1),
                nn.Linear(6, 4),
            )

        def forward(self, x: Tensor) -> None:
            self.a(x), self.b(x), self.strided(x), self.point(x), self.lin(x)

    layers = evatune.calibrate(Fork(), [torch.randn(4, 6, 6)] * 2, EXACT_6, targets=r"\w+").layers
    assert layers["a"].input == layers["b"].input
    assert len({layer.input for layer in layers.values()}) == 4


@pytest.mark.parametrize("sketch", ["nystrom", "exact", "incremental"])
@pytest.mark.parametrize("center", [False, True])
def test_the_directions_of_an_embedding_are_its_most_frequent_tokens(
    sketch: str, center: bool
) -> None:
    config = evatune.CalibrationConfig(components=5, sketch=sketch, tolerance=0, center=center)
    spectrum = evatune.calibrate(Words(), texts(), config, targets=["table"]).spectra["table"]
    counts = torch.bincount(torch.cat([b["ids"].flatten() for b in texts()]), minlength=12)
    frequency = counts.double() / counts.sum()
    first = sorted(range(12), key=lambda token: (-int(counts[token]), token))[:5]
    assert spectrum.rows == 160
    assert torch.equal(spectrum.directions, torch.eye(12)[first])
    assert torch.allclose(spectrum.mean.double(), frequency)
    one_hot = torch.eye(12, dtype=torch.float64)[torch.cat([b["ids"].flatten() for b in texts()])]
    rows = one_hot - one_hot.mean(0) if center else one_hot
    assert spectrum.total_energy == pytest.approx(float(rows.square().sum(1).mean()))
    assert torch.allclose(
        spectrum.energies.double(), (rows @ torch.eye(12).double()[first].T).square().mean(0)
    )
    assert spectrum.certificate is not None
    assert 0 < spectrum.certificate.captured() <= 1


def test_padding_is_no_token() -> None:
    batches = texts()
    for batch in batches:
        batch["attention_mask"] = torch.ones(4, 10)
        batch["attention_mask"][1, 3:] = 0
    masked = evatune.calibrate(Words(), batches, EXACT_6, targets=["table"]).spectra["table"]
    assert masked.rows == 4 * 33
    spectrum = evatune.calibrate(Words(padding=0), texts(), EXACT_6, targets=["table"]).spectra[
        "table"
    ]
    assert spectrum.rows == sum(int((b["ids"] != 0).sum()) for b in texts())
    assert spectrum.mean[0] == 0


def test_counts_of_shards_add_up_and_a_saved_calibration_comes_back(tmp_path: Path) -> None:
    whole = evatune.calibrate(Words(), texts(), EXACT_6, targets=["table"])
    parts = [
        evatune.calibrate(Words(), texts()[i : i + 2], EXACT_6, targets=["table"]) for i in (0, 2)
    ]
    merged = evatune.Calibration.merge(parts)
    assert merged.spectra["table"].total_energy == pytest.approx(1)
    assert torch.allclose(merged.spectra["table"].mean, whole.spectra["table"].mean)
    whole.save(tmp_path / "c.safetensors")
    assert torch.equal(
        evatune.Calibration.load(tmp_path / "c.safetensors").spectra["table"].directions,
        whole.spectra["table"].directions,
    )


def test_a_rows_function_is_handed_patches_and_ids() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.conv = nn.Embedding(12, 8), nn.Conv1d(8, 4, 3)

        def forward(self, ids: Tensor) -> Tensor:
            return self.conv(self.table(ids).transpose(1, 2))

    shapes = {}

    def rows(activation: Tensor, batch: Any, name: str) -> Tensor:
        shapes[name] = tuple(activation.shape)
        return activation[:2].flatten() if name == "table" else activation[:2].flatten(0, 1)

    calibration = evatune.calibrate(Both(), texts(), EXACT_6, targets=["table", "conv"], rows=rows)
    assert shapes == {"table": (4, 10), "conv": (4, 8, 24)}
    assert (calibration.spectra["table"].rows, calibration.spectra["conv"].rows) == (4 * 20, 4 * 16)
    with pytest.raises(
        DataError,
        match=r"'table'\) returned shape \(4, 10\); it must return a tensor of shape \(rows,\)",
    ):
        evatune.calibrate(
            Both(),
            texts(),
            EXACT_6,
            targets=["table"],
            rows=lambda activation, batch, name: activation,
        )
