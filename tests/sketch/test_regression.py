"""The sketch for regression: rows that whiten the inputs, in the order of what they save."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from evatune.sketch import Examples, SketchSettings, make_example_sketch
from evatune.sketch.regression import RegressionSketch
from evatune.sketch.spectrum import Spectrum
from tests.sketches import captured_energy


def sketched(x: Tensor, g: Tensor, components: int, *, parts: int = 4) -> RegressionSketch:
    sketch = make_example_sketch("regression", SketchSettings(x.shape[-1], components), g.shape[-1])
    assert isinstance(sketch, RegressionSketch)
    for number, (a, b) in enumerate(zip(x.chunk(parts), g.chunk(parts), strict=True)):
        piece = Examples(a, b, a.shape[0] * a.shape[1])
        sketch.add(sketch.summarize_examples(iter([piece])))
        if number in (0, 1):
            sketch.refresh()
    return sketch


def data(d: int, out: int, rank: int | None = None) -> tuple[Tensor, Tensor]:
    """Inputs with a steep spectrum, and gradients whose mean product with them is of `rank`."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 10, d, generator=generator) * 0.9 ** torch.arange(d)
    turn = torch.linalg.qr(torch.randn(d, d, generator=generator))[0]
    x = x @ turn
    inner = min(d, out) if rank is None else rank
    down = torch.randn(d, inner, generator=generator) / d**0.5
    up = torch.randn(inner, out, generator=generator) * 0.8 ** torch.arange(inner)[:, None]
    return x, x @ down @ up


def solved(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """C, singular values and V_rᵀ C^(-½) of reduced-rank regression, in full and float64."""
    rows, gradients = x.flatten(0, 1).double(), g.flatten(0, 1).double()
    c = rows.T @ rows / len(rows)
    mean = gradients.T @ rows / len(rows)
    values, vectors = torch.linalg.eigh(c)
    root = vectors @ torch.diag(values.rsqrt()) @ vectors.T
    _, s, v = torch.linalg.svd(mean @ root, full_matrices=False)
    return c, s, v @ root


def rows_of(spectrum: Spectrum) -> Tensor:
    assert spectrum.mixing is not None
    return spectrum.mixing.double() @ spectrum.directions.double()


def test_a_basis_of_all_dimensions_solves_the_regression_exactly() -> None:
    x, g = data(20, 12)
    spectrum = sketched(x, g, 6).spectrum()
    c, s, rows = solved(x, g)
    found = rows_of(spectrum)
    assert spectrum.energies.double() == pytest.approx(s[:6].square(), rel=1e-3)
    assert spectrum.total_energy == pytest.approx(float(s.square().sum()), rel=1e-3)
    assert found @ c @ found.T == pytest.approx(torch.eye(6).double(), abs=1e-3)
    for rank in range(1, 7):  # the rows of each rank span what the regression of that rank does
        q = torch.linalg.qr(rows[:rank].T)[0].T
        assert captured_energy(spectrum.directions[:rank], q) == pytest.approx(1, abs=1e-3)
    v = spectrum.directions.double()
    assert spectrum.second_moments.double() == pytest.approx((v @ c * v).sum(1), rel=1e-3)


def test_a_narrow_basis_finds_a_planted_subspace_that_carries_little_energy() -> None:
    d = 90
    generator = torch.Generator().manual_seed(0)
    decay = 0.95 ** torch.arange(d)
    x = torch.randn(60, 10, d, generator=generator) * decay
    weak = torch.eye(d)[[50, 60]]  # two coordinates of a thousandth of the first's energy
    g = (x @ weak.T / decay[[50, 60]]) @ torch.randn(2, 30, generator=generator)
    spectrum = sketched(x, g, 4).spectrum()
    mean = g.flatten(0, 1).T @ x.flatten(0, 1)
    unwhitened = torch.linalg.svd(mean, full_matrices=False)[2][:2]
    assert captured_energy(spectrum.directions[:2], weak) > 0.7
    assert captured_energy(unwhitened, weak) < 0.3
    assert float(spectrum.energies[:2].sum()) > 0.8 * spectrum.total_energy


def test_the_mean_gradient_adds_up_over_sketches() -> None:
    x, g = data(24, 8)
    whole = sketched(x, g, 4).spectrum()
    halves = [sketched(x[part], g[part], 4) for part in (slice(0, 20), slice(20, 40))]
    halves[0].merge(halves[1])
    merged = halves[0].spectrum()
    assert torch.allclose(merged.energies, whole.energies, rtol=1e-3)
    assert captured_energy(merged.directions, whole.directions) == pytest.approx(1, abs=1e-3)


def test_nan_in_a_gradient_voids_the_sketch() -> None:
    x, g = data(24, 8)
    g[0, 0, 0] = torch.nan
    sketch = sketched(x[1:], g[1:], 4, parts=1)
    assert sketch.finite
    sketch.add(sketch.summarize_examples(iter([Examples(x[:1], g[:1], 10)])))
    assert not sketch.finite


@pytest.mark.parametrize("nothing", ["x", "g"])
def test_without_inputs_or_gradients_there_is_no_energy(nothing: str) -> None:
    x, g = data(24, 8)
    spectrum = sketched(x * (nothing != "x"), g * (nothing != "g"), 4).spectrum()
    assert spectrum.total_energy == 0
    assert spectrum.usable == 0
