"""Every sketch on a GPU: against the truth in float64, and against itself on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import pytest
import torch
from torch import Tensor

from evatune.sketch import (
    SKETCHES,
    Examples,
    InputSketch,
    SketchSettings,
    make_example_sketch,
    make_sketch,
    refresh_all,
)
from evatune.sketch.spectrum import Spectrum
from tests.gpu.helpers import moment_of, require_best, require_same
from tests.sketches import planted

pytestmark = pytest.mark.gpu

WIDTH, COMPONENTS = 96, 16
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CPU = torch.device("cpu")


def build(kind: str, device: torch.device, *, center: bool = False) -> InputSketch:
    return make_sketch(kind, SketchSettings(WIDTH, COMPONENTS, center=center, device=device))


def feed(sketch: InputSketch, rows: Tensor, index: Tensor | None = None) -> Spectrum:
    """Rows in unequal parts, those of an index where there is one; refreshed now and then."""
    start = 0
    for number, size in enumerate((700, 1, 40, 1300, 959)):
        part = rows[start : start + size]
        chosen = None
        if index is not None:
            chosen = index[(index >= start) & (index < start + size)] - start
        sketch.update(part.to(sketch.device), None if chosen is None else chosen.to(sketch.device))
        if number in (0, 2):
            sketch.refresh()
        start += size
    assert start == len(rows)
    return sketch.spectrum()


@dataclass(frozen=True)
class Case:
    rows: Callable[[torch.dtype], Tensor]
    center: bool = False
    every: int = 1  # one row of so many counts


def spread(decades: float) -> Tensor:
    """Rows whose lengths differ by orders of magnitude, up and down."""
    generator = torch.Generator().manual_seed(1)
    exponents = decades * (2 * torch.rand(3000, 1, generator=generator) - 1)
    return planted(3000, WIDTH) * 10**exponents


def largest_power(dtype: torch.dtype) -> float:
    return 2.0 if dtype == torch.float16 else 12.0


CASES = {
    "plain": Case(lambda dtype: planted(3000, WIDTH)),
    "centered": Case(lambda dtype: planted(3000, WIDTH, mean=1.0), center=True),
    "large mean": Case(lambda dtype: planted(3000, WIDTH, mean=30.0)),
    "large mean, centered": Case(
        lambda dtype: planted(3000, WIDTH, mean=30.0 if dtype == torch.float32 else 3.0),
        center=True,
    ),
    "rows of 1e-6 to 1e6": Case(lambda dtype: spread(3 if dtype == torch.float16 else 6)),
    "large rows": Case(lambda dtype: planted(3000, WIDTH) * 10 ** largest_power(dtype)),
    "small rows": Case(lambda dtype: planted(3000, WIDTH) * 10 ** -largest_power(dtype)),
    "by index": Case(lambda dtype: planted(3000, WIDTH, mean=1.0), every=3),
    "by index, centered": Case(lambda dtype: planted(3000, WIDTH, mean=1.0), center=True, every=3),
}


@pytest.mark.parametrize("kind", SKETCHES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_rows_of_every_dtype(
    name: str, dtype: torch.dtype, kind: str, device: torch.device
) -> None:
    case = CASES[name]
    rows = case.rows(dtype).to(dtype)
    index = None if case.every == 1 else torch.arange(0, len(rows), case.every)
    chosen = rows if index is None else rows[index]
    moment = moment_of(chosen, case.center)
    found, on_cpu = (
        feed(build(kind, place, center=case.center), rows, index) for place in (device, CPU)
    )
    require_same(found, on_cpu, moment)
    assert found.rows == len(chosen)
    if kind != "incremental":  # which drops what it truncates
        require_best(found, moment)
    if found.certificate is not None:
        assert on_cpu.certificate is not None
        assert found.certificate.rows == on_cpu.certificate.rows
        assert found.certificate.captured() == pytest.approx(
            on_cpu.certificate.captured(), abs=1e-3
        )


@pytest.mark.parametrize(
    ("dtype", "kind", "factor"),
    [
        *product([torch.float32], ["nystrom", "exact"], [1e-18, 1e18]),
        *product([torch.bfloat16], ["exact"], [1e-18, 1e18]),
        # rows of 16 bits that are not cast: up to about 1e16
        *product([torch.bfloat16], ["nystrom"], [1e-18, 1e16]),
    ],
    ids=str,
)
def test_large_and_small_rows(
    dtype: torch.dtype, kind: str, factor: float, device: torch.device
) -> None:
    rows = (planted(3000, WIDTH) * factor).to(dtype)
    require_best(feed(build(kind, device), rows), moment_of(rows))


@pytest.mark.parametrize("kind", SKETCHES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_in_any_layout(dtype: torch.dtype, kind: str, device: torch.device) -> None:
    rows = planted(3000, WIDTH).to(dtype)
    moment = moment_of(rows)
    expected = feed(build(kind, CPU), rows)
    apart = torch.zeros(3000, 2 * WIDTH, dtype=dtype, device=device)
    apart[:, ::2] = rows.to(device)
    for layout in (apart[:, ::2], rows.to(device).T.contiguous().T):
        require_same(feed(build(kind, device), layout), expected, moment)


@pytest.mark.parametrize("kind", SKETCHES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("center", [False, True])
def test_rows_without_energy_or_none_at_all(
    center: bool, dtype: torch.dtype, kind: str, device: torch.device
) -> None:
    sketch = build(kind, device, center=center)
    sketch.update(torch.zeros(50, WIDTH, dtype=dtype, device=device))
    sketch.update(torch.zeros(0, WIDTH, dtype=dtype, device=device))
    nothing = torch.zeros(0, dtype=torch.int64, device=device)
    sketch.update(torch.ones(9, WIDTH, dtype=dtype, device=device), nothing)
    found = sketch.spectrum()
    assert (found.rows, found.total_energy, found.usable) == (50, 0.0, 0)
    rows = planted(400, WIDTH).to(dtype)
    sketch.update(rows.to(device))
    assert bool(sketch.finite)
    found = sketch.spectrum()
    both = torch.cat([torch.zeros(50, WIDTH, dtype=dtype), rows])
    assert found.rows == 450
    total = float(moment_of(both, center).trace())
    assert found.total_energy == pytest.approx(total, rel=1e-3)
    sketch.refresh()
    sketch.update(rows.to(device))
    twice = torch.cat([both, rows])
    total = float(moment_of(twice, center).trace())
    assert sketch.spectrum().total_energy == pytest.approx(total, rel=1e-3)


@pytest.mark.parametrize("kind", SKETCHES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("first", [True, False], ids=["in the first rows", "later"])
def test_rows_that_are_not_finite_are_reported(
    first: bool, bad: float, dtype: torch.dtype, kind: str, device: torch.device
) -> None:
    rows = planted(200, WIDTH).to(dtype).to(device)
    sketch = build(kind, device)
    if not first:
        sketch.update(rows)
        assert bool(sketch.finite)
    rows = rows.clone()
    rows[7, 3] = bad
    sketch.update(rows)
    assert not bool(sketch.finite)
    others = build(kind, device)
    others.update(rows, torch.arange(8, 200, device=device))
    assert bool(others.finite)


@pytest.mark.parametrize("kind", SKETCHES)
@pytest.mark.parametrize("center", [False, True])
def test_copies_sums_and_states(kind: str, center: bool, device: torch.device) -> None:
    rows = planted(3000, WIDTH, mean=1.0).bfloat16()
    moment = moment_of(rows, center)

    def halves(place: torch.device) -> Spectrum:
        one, other = build(kind, place, center=center), build(kind, place, center=center)
        one.update(rows[:1000].to(place))
        refresh_all([one, other])
        other.update(rows[1000:2000].to(place))
        refresh_all([one, other])
        other.update(rows[2000:].to(place))
        restored = build(kind, place, center=center)
        restored.set_state({name: value.cpu() for name, value in one.state().items()})
        copy = restored.clone()
        copy.merge(other)
        assert {copy.energy.device.type, copy.row_sum.device.type} == {place.type}
        return copy.spectrum()

    require_same(halves(device), halves(CPU), moment)


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_counts_are_the_same_to_the_last_bit(
    dtype: torch.dtype, center: bool, device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.multinomial(0.95 ** torch.arange(WIDTH), 2000, True, generator=generator).to(dtype)

    def count(place: torch.device) -> Spectrum:
        sketch = build("counts", place, center=center)
        sketch.update(ids[:500].to(place))
        sketch.refresh()
        sketch.update(ids[500:].to(place), torch.arange(0, 1500, 2, device=place))
        return sketch.spectrum()

    found, expected = count(device), count(CPU)
    assert found.rows == expected.rows == 1250
    assert torch.equal(found.directions, expected.directions)
    assert torch.equal(found.energies, expected.energies)
    assert found.total_energy == pytest.approx(expected.total_energy, rel=1e-15)
    assert found.certificate is not None
    assert expected.certificate is not None
    assert torch.equal(found.certificate.energies, expected.certificate.energies)


@pytest.mark.parametrize("objective", ["gradients", "regression"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [5, 70], ids=["kernel", "thin products"])
@pytest.mark.parametrize("ids", [False, True], ids=["dense", "token ids"])
def test_examples_with_gradients(
    ids: bool, tokens: int, dtype: torch.dtype, objective: str, device: torch.device
) -> None:
    width, out = 24, 9
    generator = torch.Generator().manual_seed(0)
    gate = torch.randn(width, out, generator=generator) / width**0.5
    pieces = []
    for _ in range(4):
        x = planted(12 * tokens, width, mean=0.3)
        g = torch.tanh(x @ gate) * torch.randn(len(x), 1, generator=generator)
        x = x.view(12, tokens, width).to(dtype)
        if ids:
            x = torch.randint(0, width, (12, tokens), generator=generator)
        kept = torch.rand(12, tokens, generator=generator) < 0.9
        g = (g.view(12, tokens, out) * 1e-3).to(dtype)
        pieces.append(Examples(x, g, int(kept.sum()), kept, weight=2.0))

    def summed(place: torch.device) -> Spectrum:
        settings = SketchSettings(width, width, device=place)  # all directions: no chance in it
        sketch = make_example_sketch(objective, settings, out)
        for number, piece in enumerate(pieces):
            there = Examples(
                piece.x.to(place), piece.g.to(place), piece.rows, piece.kept.to(place), 2.0
            )
            sketch.add(sketch.summarize_examples(iter([there])))
            if number == 1:
                sketch.refresh()
        assert bool(sketch.finite)
        return sketch.spectrum()

    found, expected = summed(device), summed(CPU)
    assert found.rows == expected.rows
    assert found.total_energy == pytest.approx(expected.total_energy, rel=1e-3)
    largest = float(expected.energies[0])
    count = min(len(found.energies), len(expected.energies))
    assert torch.allclose(
        found.energies[:count], expected.energies[:count], rtol=5e-3, atol=1e-4 * largest
    )
    assert found.inputs is not None
    assert expected.inputs is not None
    assert found.inputs.total == pytest.approx(expected.inputs.total, rel=1e-3)
    # the rows of A that matter span what they span on the CPU
    lead = found.directions[:4].double() @ expected.directions[:4].double().T
    weights = expected.energies[:4].double()
    assert float(lead.square().sum(0) @ weights) >= 0.999 * float(weights.sum())
    assert (found.mixing is None) == (expected.mixing is None) == (objective == "gradients")
