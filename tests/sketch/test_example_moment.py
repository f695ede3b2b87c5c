"""The sums that sketches of gradients keep beside a second moment and its basis."""

from __future__ import annotations

import pytest
import torch

from evatune.choices import OBJECTIVES
from evatune.sketch import Examples, SketchSettings, make_example_sketch
from evatune.sketch.example_moment import ExampleMoment

WITH_GRADIENTS = [objective for objective in OBJECTIVES if objective != "activations"]


def sketched(objective: str, seed: int) -> ExampleMoment:
    """A sketch of ten random examples; those of unequal seeds have unequal bases."""
    sketch = make_example_sketch(objective, SketchSettings(48, 6, 4, seed=seed), 24)
    assert isinstance(sketch, ExampleMoment)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(10, 5, 48, generator=generator)
    g = torch.randn(10, 5, 24, generator=generator)
    sketch.add(sketch.summarize_examples(iter([Examples(x, g, 50)])))
    return sketch


@pytest.mark.parametrize("objective", WITH_GRADIENTS)
def test_further_sums_add_up_where_bases_are_equal(objective: str) -> None:
    one = sketched(objective, seed=0)
    whole, other = one.clone(), one.clone()
    whole.merge(other)
    for name in one._EXTRA:
        assert torch.equal(getattr(whole, name), 2 * getattr(one, name))


@pytest.mark.parametrize("objective", WITH_GRADIENTS)
def test_a_change_of_basis_keeps_the_sums_that_do_not_refer_to_it(objective: str) -> None:
    sketch = sketched(objective, seed=0)
    before = sketch.clone()
    sketch.change_basis(sketched(objective, seed=1).basis_state())
    assert not torch.equal(sketch.basis, before.basis)
    for name in set(sketch._EXTRA) - {"input_product"}:
        assert torch.equal(getattr(sketch, name), getattr(before, name))
        assert getattr(sketch, name).abs().sum() > 0
