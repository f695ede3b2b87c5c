"""The search for the best rate, and lines of runs that are killed."""

from __future__ import annotations

import json
import math

import pytest


def searched(search, loss, center, **options):
    """Losses of a whole search, in the order in which they were asked for."""
    losses = {}
    while (tried := search.next_try(losses, center, **options)) is not None:
        assert tried not in losses
        losses[tried] = loss(*tried)
        assert len(losses) < 100
    return losses


@pytest.mark.parametrize("optimum", [-12, -8, -7, -3, 0])
def test_search_ends_inside_the_grid_with_all_seeds_around_the_best(search, optimum):
    losses = searched(search, lambda position, seed: abs(position - optimum) + 0.1 * seed, -8)

    tried = {position for position, seed in losses if seed == 0}
    assert set(range(-11, -4)) <= tried
    assert min(tried) < optimum < max(tried)
    around = {(position, seed) for position in range(optimum - 1, optimum + 2) for seed in (1, 2)}
    assert {key for key in losses if key[1]} == around
    assert search.chosen_position(losses) == optimum


def test_extension_is_bounded_where_losses_fall_for_ever(search):
    losses = searched(search, lambda position, _: -position, 0)

    assert len({position for position, _ in losses}) == search.MOST_POSITIONS


def test_search_leaves_rates_that_diverge_for_smaller_ones(search):
    def loss(position, _):
        return math.inf if position > -10 else abs(position + 12)

    assert search.chosen_position(searched(search, loss, -5)) == -12


def test_mean_over_seeds_decides_among_the_neighbors_of_the_first_seeds_best(search):
    first = {(position, 0): abs(position) for position in range(-3, 4)}
    others = {(position, seed): position for position in (-1, 0, 1) for seed in (1, 2)}

    assert search.chosen_position(first) is None
    assert search.chosen_position(first | others) == -1


def test_search_of_one_seed_takes_strides(search):
    losses = searched(search, lambda position, _: abs(position), -8, spread=1, stride=2, seeds=(0,))

    assert sorted(losses) == [(position, 0) for position in (-10, -8, -6, -4, -2, 0, 2)]


def test_positions_and_rates_are_inverse(search):
    assert [search.position_of(search.rate_at(k)) for k in range(-30, 5)] == list(range(-30, 5))
    assert search.rate_at(-8) == pytest.approx(1e-2)


def test_torn_last_line_is_ignored_and_replaced(search, tmp_path):
    path = tmp_path / "folder" / "grid.jsonl"
    assert search.read_lines(path) == []
    search.append_line(path, {"run": 1})
    search.append_line(path, {"run": 2})
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"run": 3, "cur')

    assert search.read_lines(path) == [{"run": 1}, {"run": 2}]
    search.append_line(path, {"run": 3})

    assert path.read_bytes() == whole + b'{"run": 3}\n'


def test_file_of_one_torn_line_begins_anew(search, tmp_path):
    path = tmp_path / "grid.jsonl"
    path.write_text('{"run"')
    search.append_line(path, {"run": 1})

    assert json.loads(path.read_text()) == {"run": 1}


@pytest.mark.parametrize(
    ("ends", "lost"), [((2.0, 1.0), False), ((2.0, 2.5), True), ((2.0, None), True)]
)
def test_run_diverged_if_it_ends_in_no_number_or_worse_than_it_began(search, ends, lost):
    assert search.diverged([{"loss": loss} for loss in ends]) is lost
