"""From lines of runs to one summary."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import fmean

import pytest

from evatune.errors import ConfigError
from evatune.finetune.comparison.run_lines import read_lines
from evatune.finetune.comparison.tuned_conditions import KnownRecipe
from evatune.finetune.comparison.tuned_summary import summarize
from evatune.finetune.recipe_files import load
from evatune.finetune.recipe_tree import all_settings, as_tree
from evatune.report.advice import repeat_command
from evatune.schemas.tuned import RunLine
from tests.tuned_lines import FACTOR, STEPS, line_of, tuned_lines

TWO = ("lora", "eva")


def test_the_rate_is_chosen_on_tuning_seeds_and_tested_on_others() -> None:
    lines = tuned_lines(methods=("full", *TWO), tasks=("digits",))
    (group,) = summarize(lines).groups
    assert (group.tuning_seeds, group.test_seeds) == ((0, 1, 2), (10, 11, 12, 13, 14))
    cell = group.cell("digits", "eva")
    assert cell is not None
    assert cell.rate == pytest.approx(0.0025)
    assert cell.inside
    assert cell.settled
    assert list(cell.scores) == [10, 11, 12, 13, 14]
    assert [len(point.losses) for point in cell.rates] == [1, 3, 3, 3, 1]
    assert 0 < cell.convergence.to_full[10] < cell.convergence.to_reference[10] < STEPS
    reference = group.cell("digits", "lora")
    assert reference is not None
    assert set(reference.convergence.to_reference.values()) == {float(STEPS)}
    assert cell.convergence.sooner[10] == pytest.approx(
        1 - cell.convergence.to_reference[10] / STEPS
    )
    assert set(reference.convergence.sooner.values()) == {0.0}
    assert cell.convergence.area[10] < reference.convergence.area[10] < 1
    assert group.parameters_saved()["digits"]["eva"][10] == pytest.approx(0.04)
    # Seed 0 alone has both lower rates; one is nearly as good as the best, one a little worse.
    (gained,) = group.gained_at_lower_rates()["digits"]["lora"].items()
    assert gained == (0, pytest.approx(0.99, abs=0.01))


def test_rates_that_two_methods_share_are_compared_by_the_seeds_that_all_of_them_have() -> None:
    lines = tuned_lines(methods=("lora", "dora"), tasks=("digits",))
    lines.append(line_of("images", "digits", "dora", 0.01 * FACTOR**3, 0, False, diverged=True))
    (group,) = summarize(lines).groups
    of_lora, of_dora = (
        [point.scores[0] for point in cell.rates if point.rate <= 0.01 * FACTOR**2]
        for cell in group.cells
    )
    gained = group.gained_over_rates()["digits"]
    assert gained == {"lora": {0: 0.0}, "dora": {0: pytest.approx(fmean(of_dora) - fmean(of_lora))}}


def test_a_rate_with_one_seed_is_not_chosen_over_those_with_three() -> None:
    lines = tuned_lines(methods=("lora",), tasks=("digits",))
    lucky = line_of("images", "digits", "lora", 0.01 * FACTOR**3, 0, False)
    measured = lucky.validation.model_copy(update={"loss": 0.0})
    lines.append(lucky.model_copy(update={"validation": measured}))
    (cell,) = summarize(lines).groups[0].cells
    assert cell.rate == 0.01


def test_a_search_that_diverged_everywhere_has_no_rate() -> None:
    lines = [line_of("images", "digits", "lora", rate, 0, False, True) for rate in (0.1, 1.0)]
    (cell,) = summarize(lines).groups[0].cells
    assert cell.rate is None
    assert cell.score is None
    assert not cell.inside
    assert all(math.isinf(point.loss) for point in cell.rates)


def test_a_seed_that_one_rate_has_alone_does_not_choose_it() -> None:
    lines = tuned_lines(methods=("lora",), tasks=("digits",))
    lines.append(line_of("images", "digits", "lora", 0.01 / FACTOR, 3, False))
    (cell,) = summarize(lines).groups[0].cells
    assert (cell.rate, cell.settled) == (0.01, True)


def test_a_scale_that_differs_is_a_condition_also_where_the_rank_does() -> None:
    def conditions(*alphas: int) -> list[str]:
        lines = []
        for alpha in alphas:
            lines += tuned_lines(methods=TWO, tasks=("digits",), rank=16, alpha=alpha)
        lines += tuned_lines(methods=TWO, tasks=("digits",), rank=2, alpha=2)
        settings = {"adapter.rank": 2, "adapter.alpha": 2, "adapter.rho": 2}
        source = KnownRecipe("mine.yaml", settings)
        return [
            group.condition for group in summarize(lines, {("images", "digits"): source}).groups
        ]

    assert conditions(16) == ["", "rank 16"]
    assert conditions(16, 2) == conditions(2, 16) == ["", "rank 16", "rank 16, alpha 2"]


def test_settings_that_differ_make_methods_and_conditions() -> None:
    lines = tuned_lines(methods=TWO, tasks=("digits",))
    lines += tuned_lines(methods=TWO, tasks=("digits",), rho=1)
    lines += tuned_lines(methods=TWO, tasks=("digits",), rank=16)
    lines += of_ratio(64.0, tuned_lines(methods=("lora", "loraplus"), tasks=("digits",)))
    settings = {"adapter.rank": 2, "adapter.rho": 2, "training.steps": STEPS}
    settings["training.lora_plus_ratio"] = 16
    groups = summarize(lines, {("images", "digits"): KnownRecipe("mine.yaml", settings)}).groups
    found = {group.condition: group.methods for group in groups}
    assert found == {
        "": ["lora", "eva", "eva (rho 1)", "loraplus (ratio 64)"],
        "rank 16": ["lora", "eva"],
    }
    cell = groups[0].cell("digits", "eva (rho 1)")
    assert cell is not None
    assert cell.overrides == {"adapter.rho": 1}


def test_settings_that_a_run_leaves_out_at_their_defaults_make_conditions_too() -> None:
    lines = tuned_lines(methods=("lora",), tasks=("digits",))
    for line in list(lines):
        adapter = {"rank": 2, "rho": 2, "quantize": "nf4"}
        settings = line.settings.model_copy(update={"adapter": adapter})
        lines.append(line.model_copy(update={"settings": settings, "id": f"{line.id}-nf4"}))
    ours = all_settings(as_tree(load("images-digits", ["training.max_grad_norm=0.5"])))
    same = ("adapter.quantize", "training.max_grad_norm")
    source = KnownRecipe("mine.yaml", {key: ours[key] for key in same})
    groups = summarize(lines, {("images", "digits"): source}).groups
    assert {group.condition for group in groups} == {"", "quantize nf4"}
    command = repeat_command(groups[1].cells[0])
    assert command is not None
    assert command.endswith("adapter.quantize=nf4 training.max_grad_norm=1.0")


def of_ratio(ratio: float, lines: list[RunLine]) -> list[RunLine]:
    """Return the lines as of runs whose B has a rate of its own; LoRA does not heed it."""
    changed = []
    for line in lines:
        training = line.settings.training.model_copy(update={"lora_plus_ratio": ratio})
        settings = line.settings.model_copy(update={"training": training})
        changed.append(line.model_copy(update={"settings": settings, "id": f"{line.id}-{ratio}"}))
    return changed


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    line = line_of("images", "digits", "lora", 0.01, 0, False)
    with pytest.raises(ConfigError, match="2 versions of its data or code"):
        summarize([line, line.model_copy(update={"code": 2})])
    with pytest.raises(ConfigError, match="seed 0 of 'lora' on 'digits' both chose"):
        summarize([line, line_of("images", "digits", "lora", 0.01, 0, True)])
    path = tmp_path / "runs.jsonl"
    path.write_text(line.model_dump_json() + "\n" + '{"id": "x"}\n')
    with pytest.raises(ConfigError, match=r"has a line 2 that does not fit: .*settings"):
        read_lines([path])


def test_a_line_that_two_files_have_comes_once(tmp_path: Path) -> None:
    line = line_of("images", "digits", "lora", 0.01, 0, False)
    facts = json.loads(line.model_dump_json()) | {"later": 1}
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text(json.dumps(facts) + "\n")
    assert read_lines(sorted(tmp_path.iterdir())) == [line]
