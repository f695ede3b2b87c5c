"""The sketch of gradients: exact where it can be, near the optimum elsewhere, in every layout."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

from evatune.sketch import Examples, SketchSettings, make_example_sketch
from evatune.sketch.gradients import GradientSketch
from evatune.sketch.spectrum import Spectrum
from tests.sketches import captured_energy

Pair = tuple[Tensor, Tensor]


def pairs(count: int, tokens: int, d: int, out: int, *, seed: int = 0) -> list[Pair]:
    """Examples (T, d) and (T, out), in which gradients depend on the inputs they come with."""
    generator = torch.Generator().manual_seed(seed)
    decay = 0.9 ** torch.arange(d)
    turn = torch.linalg.qr(torch.randn(d, d, generator=generator))[0]
    gate = torch.randn(d, out, generator=generator) / d**0.5
    examples = []
    for _ in range(count):
        x = (torch.randn(tokens, d, generator=generator) * decay + 0.3) @ turn
        g = torch.tanh(x @ gate) * torch.randn(tokens, 1, generator=generator)
        examples.append((x, g))
    return examples


def build(d: int, components: int = 8, *, seed: int = 0) -> GradientSketch:
    sketch = make_example_sketch("gradients", SketchSettings(d, components, seed=seed), 0)
    assert isinstance(sketch, GradientSketch)
    return sketch


def feed(sketch: GradientSketch, examples: Iterable[Pair], at_once: int = 1) -> Spectrum:
    chunk: list[Pair] = []
    batches = []
    for pair in examples:
        chunk.append(pair)
        if len(chunk) == at_once:
            batches.append(chunk)
            chunk = []
    for number, batch in enumerate([*batches, chunk] if chunk else batches):
        x, g = (torch.stack(parts) for parts in zip(*batch, strict=True))
        piece = Examples(x, g, x.shape[0] * x.shape[1])
        sketch.add(sketch.summarize_examples(iter([piece])))
        if number in (0, 1, 3):
            sketch.refresh()
    return sketch.spectrum()


def truth(examples: Iterable[Pair]) -> tuple[Tensor, Tensor]:
    """R and C per token, (d, d) float64."""
    r = c = torch.zeros(())
    tokens = 0
    for x, g in examples:
        gradient = g.double().T @ x.double()
        r = r + gradient.T @ gradient
        c = c + x.double().T @ x.double()
        tokens += len(x)
    return r / tokens, c / tokens


def assert_same(one: Spectrum, other: Spectrum) -> None:
    assert one.rows == other.rows
    assert one.energies == pytest.approx(other.energies, rel=1e-3)
    assert one.total_energy == pytest.approx(other.total_energy, rel=1e-3)
    assert one.second_moments == pytest.approx(other.second_moments, rel=1e-2)
    assert one.total_second_moment == pytest.approx(other.total_second_moment, rel=1e-5)
    assert one.mean == pytest.approx(other.mean, abs=1e-5)


@pytest.mark.parametrize("tokens", [1, 5, 70], ids=["one token", "kernel", "thin products"])
def test_a_basis_of_all_dimensions_finds_r_and_c_exactly(tokens: int) -> None:
    examples = pairs(12, tokens, d=20, out=9)
    spectrum = feed(build(20), examples, at_once=4)
    r, c = truth(examples)
    v = spectrum.directions.double()
    leading = torch.linalg.eigvalsh(r).flip(0)[:8]
    assert spectrum.energies.double() == pytest.approx(leading, rel=1e-4)
    assert spectrum.total_energy == pytest.approx(float(r.trace()), rel=1e-5)
    assert (v @ r * v).sum(1) == pytest.approx(leading, rel=1e-4)
    assert spectrum.second_moments.double() == pytest.approx((v @ c * v).sum(1), rel=1e-4)
    assert spectrum.total_second_moment == pytest.approx(float(c.trace()), rel=1e-5)
    assert spectrum.rows == 12 * tokens


@pytest.mark.parametrize("tokens", [8, 100])
def test_a_narrow_basis_comes_near_the_optimum(tokens: int) -> None:
    examples = pairs(32, tokens, d=120, out=30)
    spectrum = feed(build(120), examples, at_once=4)
    r, c = truth(examples)
    v = spectrum.directions.double()
    best = torch.linalg.eigvalsh(r).flip(0)[:8].sum()
    assert float((v @ r * v).sum()) > 0.99 * float(best)
    assert spectrum.total_energy == pytest.approx(float(r.trace()), rel=0.05)
    assert spectrum.second_moments.double() == pytest.approx((v @ c * v).sum(1), rel=0.1)
    assert spectrum.total_second_moment == pytest.approx(float(c.trace()), rel=1e-5)


def test_batches_their_order_and_lengths_change_nothing_but_rounding() -> None:
    short, long = pairs(8, 3, 16, 5), pairs(8, 50, 16, 5, seed=1)
    one = feed(build(16), [*short, *long])
    other = feed(build(16), [*reversed(long), *short], at_once=4)
    assert torch.allclose(one.energies, other.energies, rtol=1e-4)
    assert captured_energy(one.directions[:4], other.directions[:4]) == pytest.approx(1, abs=1e-4)


def test_merged_sketches_know_what_one_does() -> None:
    examples = pairs(16, 20, 24, 7)
    whole = feed(build(24), examples, at_once=4)
    halves = []
    for half in (examples[:8], examples[8:]):
        halves.append(build(24))
        feed(halves[-1], half, at_once=4)
    halves[0].merge(halves[1])
    merged = halves[0].spectrum()
    assert torch.allclose(merged.energies, whole.energies, rtol=1e-4)
    assert torch.allclose(merged.second_moments, whole.second_moments, rtol=1e-3)
    assert merged.rows == whole.rows


def test_tokens_that_do_not_count_are_as_if_absent() -> None:
    ((x, g),) = pairs(1, 12, 16, 5)
    kept = torch.arange(12) % 3 != 0
    spoiled = torch.where(kept[:, None], x, torch.nan)
    sketches = [build(16), build(16)]
    whole = Examples(spoiled[None], g[None], int(kept.sum()), kept[None])
    rest = Examples(x[kept][None], g[kept][None], int(kept.sum()))
    for sketch, examples in zip(sketches, (whole, rest), strict=True):
        sketch.add(sketch.summarize_examples(iter([examples])))
    assert_same(sketches[0].spectrum(), sketches[1].spectrum())


@pytest.mark.parametrize("tokens", [6, 60])
def test_ids_are_one_hot_rows(tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 40, (5, tokens), generator=generator)
    g = torch.randn(5, tokens, 6, generator=generator)
    kept = torch.rand(5, tokens, generator=generator) < 0.8
    by_id, dense = build(40), build(40)
    one_hot = torch.nn.functional.one_hot(ids, 40).float()
    for sketch, x in ((by_id, ids), (dense, one_hot)):
        sketch.add(sketch.summarize_examples(iter([Examples(x, g, int(kept.sum()), kept)])))
    assert_same(by_id.spectrum(), dense.spectrum())


@pytest.mark.parametrize("factors", [(1e18, 1e-18), (1e-20, 1e12)])
def test_numbers_near_the_ends_of_float32_keep_their_directions(factors: Pair) -> None:
    examples = pairs(8, 6, 16, 5)
    plain = feed(build(16), examples)
    scaled = feed(build(16), [(x * factors[0], g * factors[1]) for x, g in examples])
    unit = (factors[0] * factors[1]) ** 2
    assert (scaled.energies.double() / unit).float() == pytest.approx(plain.energies, rel=1e-3)


@pytest.mark.parametrize("where", ["x", "g"])
@pytest.mark.parametrize("tokens", [4, 60])
def test_nan_and_inf_void_the_sketch(where: str, tokens: int) -> None:
    for value in (torch.nan, torch.inf):
        ((x, g),) = pairs(1, tokens, 40, 5)
        (x if where == "x" else g)[1, 2] = value
        sketch = build(40)
        sketch.add(sketch.summarize_examples(iter([Examples(x[None], g[None], tokens)])))
        assert not sketch.finite


def test_no_gradient_at_all_is_a_spectrum_without_energy() -> None:
    ((x, g),) = pairs(1, 6, 16, 5)
    sketch = build(16)
    sketch.add(sketch.summarize_examples(iter([Examples(x[None], 0 * g[None], 6)])))
    spectrum = sketch.refresh()
    assert spectrum.total_energy == 0
    assert spectrum.usable == 0
    assert spectrum.total_second_moment > 0


def test_moments_of_inputs_that_rounding_hides_are_not_taken_for_nothing() -> None:
    # the largest inputs have no gradient, and those with one are 1e-8 of them
    ((x, g),) = pairs(1, 60, 16, 5)
    x, g = x.clone(), g.clone()
    x[:30] = 1e4 * torch.eye(16)[0]
    x[30:, 0], x[30:, 1:] = 0, 1e-4 * x[30:, 1:]
    g[:30] = 0
    spectrum = feed(build(16), [(x, g)] * 3)
    assert spectrum.usable > 0
    assert float(spectrum.second_moments.min()) >= 0.99e-10 * spectrum.total_second_moment
