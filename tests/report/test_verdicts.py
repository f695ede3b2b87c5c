"""Sentences that a rule makes of intervals."""

from __future__ import annotations

from collections.abc import Sequence

from evatune.finetune.comparison.tuned_summary import summarize
from evatune.report.evidence import Verdict
from evatune.report.verdicts import verdicts
from evatune.schemas.tuned import RunLine
from tests.tuned_lines import tuned_lines

FASTER, HIGHER = "Faster convergence?", "Higher average?"
BEST, FEWER = "Above the best competitor?", "Fewer parameters?"
PRECISE, LOWER = "Precise enough to tell?", "Better at lower rates?"
UNTUNED = "Higher, without tuning?"
KAPPA = "Does κ predict the ratio of best rates?"
PARTICIPATION = "Does PR predict the gain of eva?"
VALIDATION = "Higher, where validation chooses?"


def told(lines: Sequence[RunLine]) -> dict[str, Verdict]:
    """Return the verdicts by their claims."""
    return {verdict.claim: verdict for verdict in verdicts(summarize(lines).groups)}


def test_planted_differences_are_told() -> None:
    answers = told(tuned_lines(methods=("lora", "eva", "lora-ga", "pissa")))
    claims = (FASTER, HIGHER, BEST, FEWER, PRECISE, LOWER, UNTUNED, KAPPA, PARTICIPATION)
    assert tuple(answers) == claims
    faster, higher, best, fewer, precise, _, _, kappa, _ = answers.values()
    assert [one.outcome for one in (faster, higher, fewer, kappa)] == ["win", "win", "win", "yes"]
    assert "of a run sooner than lora does. On these tasks: win [+" in faster.text
    assert "of tasks 4 won, 0 tied, 0 lost." in fewer.text
    assert "trains 4.0 % fewer parameters" in fewer.text
    assert "above lora-ga, the competitor" in best.text
    assert (precise.outcome, "not every task has full" in precise.text) == ("yes", True)
    assert "1.00 κ in the median" in kappa.text


def test_an_interval_is_precise_that_is_narrow_beside_what_full_fine_tuning_gains() -> None:
    lines = tuned_lines(methods=("lora", "eva", "full"), tasks=("digits", "fonts"), test_seeds=2)
    precise = told(lines)[PRECISE]
    assert precise.outcome == "yes"
    assert "full fine-tuning is 5." in precise.text
    scattered = [
        line
        if line.method != "eva" or not line.tested
        else line.model_copy(update={"test": line.test.model_copy(update={"score": line.seed % 2})})
        for line in lines
    ]
    assert told(scattered)[PRECISE].outcome == "no"


def test_the_papers_settings_have_verdicts_of_their_own() -> None:
    methods = ("lora", "eva", "eva-paper-centered", "lora-ga", "pissa")
    answers = told(tuned_lines(methods=methods))
    faster, higher, best = (
        answers[f"{claim}, with the paper's settings?"]
        for claim in ("Faster", "Higher", "Above the best competitor")
    )
    assert (faster.outcome, higher.outcome, best.outcome) == ("win", "win", "win")
    assert "eva-paper-centered is 1.8 points above lora-ga, the competitor" in best.text
    assert "eva-paper-centered reaches the larger one" in faster.text
    assert "eva-paper-centered is 3.0 points above lora" in higher.text


def test_nothing_is_said_of_a_default_that_nobody_ran() -> None:
    answers = told(tuned_lines(methods=("lora", "eva-paper-centered")))
    assert tuple(answers) == (
        "Faster, with the paper's settings?",
        "Higher, with the paper's settings?",
        "Better at lower rates, with the paper's settings?",
        "Higher without tuning, with the paper's settings?",
        VALIDATION,
        KAPPA,
        "Does PR predict the gain of eva-paper-centered?",
    )


def test_nothing_is_asked_that_takes_more_tasks_or_a_competitor() -> None:
    few = told(tuned_lines(methods=("lora", "eva"), tasks=("digits",)))
    assert tuple(few) == (FASTER, HIGHER, FEWER, PRECISE, LOWER, UNTUNED)


def test_a_comparison_without_eva_says_what_it_can() -> None:
    other = verdicts(summarize(tuned_lines(methods=("lora", "dora", "full"))).groups)
    assert [one.claim for one in other] == [
        f"{claim} with {method}?" for method in ("dora", "full") for claim in ("Faster", "Higher")
    ]
    assert "full is 5." in other[3].text
    assert (other[3].outcome, other[1].text.split(" is ")[0]) == ("win", "dora")
    (alone,) = verdicts(summarize(tuned_lines(methods=("lora",))).groups)
    assert (alone.outcome, alone.text) == (
        "unknown",
        "No method has tested runs on every task with a seed of lora's.",
    )


def test_validation_chooses_before_test_examples_are_seen() -> None:
    lines = as_method("eva-paper-centered", "lora-fa", ("digits",))
    lines += tuned_lines(methods=("lora", "eva-paper-centered"), tasks=("fonts",))
    answers = told(lines)
    higher, chosen = answers["Higher, with the paper's settings?"], answers[VALIDATION]
    assert (higher.outcome, chosen.outcome) == ("win", "win")
    assert "lower with eva-paper-centered than with lora on 1 of 2 tasks" in chosen.text
    assert "of tasks 1 won, 0 tied, 0 lost, 1 left to lora." in chosen.text
    assert "1 won, 0 tied, 1 lost" in higher.text


def test_an_interval_that_does_not_stand_among_many_says_so() -> None:
    rivals = ("lora-ga", "pissa", "dora", "rslora", "lora-orthogonal", "eva-shuffled")
    lines = tuned_lines(methods=("lora", "eva", *rivals), tasks=("digits",), test_seeds=3)
    higher = told(lines)[HIGHER]
    assert higher.outcome == "win"
    assert "not significant among all methods (Holm's p = 0." in higher.text
    alone = told([line for line in lines if line.method in ("lora", "eva")])[HIGHER]
    assert (alone.outcome, "not significant" in alone.text) == ("win", False)


def test_the_larger_rate_of_b_is_in_the_first_step_of_lora_plus() -> None:
    groups = summarize(tuned_lines(methods=("lora", "loraplus"), tasks=("digits",))).groups
    assert {cell.method: cell.kappa for cell in groups[0].cells} == {"lora": 1, "loraplus": 16}


def test_participation_is_held_against_gains_within_domains() -> None:
    groups = summarize(tuned_lines(("images", "rl"), methods=("lora", "eva"))).groups
    answers = {verdict.claim: verdict for verdict in verdicts(groups)}
    assert answers[PARTICIPATION].text.startswith("Within 2 domains the rank correlation")


def test_frozen_starts_are_held_against_each_other() -> None:
    answers = told(tuned_lines(methods=("lora", "eva", "lora-fa", "eva-fa")))
    frozen = answers["Better directions where A is frozen?"]
    assert frozen.outcome == "loss"
    assert "points below lora-fa" in frozen.text


def test_directions_are_held_against_random_ones_of_the_same_first_step() -> None:
    methods = ("lora", "eva", "eva-paper-centered", "eva-paper-random")
    same_step = told(tuned_lines(methods=methods))["Better directions at the same first step?"]
    assert same_step.outcome == "win"
    assert "eva-paper-centered is 1.0 points above eva-paper-random" in same_step.text


def as_eva(method: str, tasks: tuple[str, ...] = ("digits", "fonts")) -> list[RunLine]:
    return as_method("eva", method, tasks)


def as_method(called: str, method: str, tasks: tuple[str, ...]) -> list[RunLine]:
    """Return the lines of LoRA and of a method, which is called by another name."""
    swapped = []
    for line in tuned_lines(methods=("lora", method), tasks=tasks):
        name = {method: called}.get(line.method, line.method)
        settings = line.settings.model_copy(update={"method": name})
        swapped.append(line.model_copy(update={"settings": settings}))
    return swapped


def test_a_control_does_not_compete_and_a_method_that_is_no_longer_registered_does() -> None:
    tasks = ("digits", "fonts")
    lines = tuned_lines(methods=("lora", "eva", "lora-orthogonal", "pissa"), tasks=tasks)
    assert "above pissa, the competitor" in told(lines)[BEST].text
    lines += as_method("gone", "lora-ga", tasks)
    assert "above gone, the competitor" in told(lines)[BEST].text


def test_lower_rates_are_those_below_loras_best() -> None:
    three = ("digits", "fonts", "counting")
    lower = told(as_eva("lora-fa", three))[LOWER]
    assert lower.outcome == "loss"
    assert "1.8 and 3.2 times below lora's best, eva's validation loss falls by" in lower.text
    assert "% less than lora's" in lower.text
    untuned = told(as_eva("lora-fa", three))[UNTUNED]
    assert untuned.outcome == "loss"
    assert "eva is 1.9 points below lora in score on validation examples" in untuned.text
    one_task = told(as_eva("lora-fa", ("digits",)))
    assert (
        one_task[LOWER].outcome == one_task[UNTUNED].outcome == "unknown (fewer than three tasks)"
    )
    # whose first step is three times as long, and whose rates are others
    lower = told(as_eva("pissa"))[LOWER]
    assert (lower.outcome, "lack 2 rates" in lower.text) == ("unknown", True)
    untuned = told(tuned_lines(methods=("lora", "eva"), tasks=("digits",)))[UNTUNED]
    assert (untuned.outcome, "do not have two rates" in untuned.text) == ("unknown", True)


def test_a_loss_is_told_like_a_win() -> None:
    answers = told(as_eva("pissa"))
    faster, higher, fewer = answers[FASTER], answers[HIGHER], answers[FEWER]
    assert [faster.outcome, higher.outcome, fewer.outcome] == ["loss", "loss", "tie"]
    assert "of a run later than lora does" in faster.text
    assert "points below lora in score" in higher.text


def test_one_seed_tells_nothing_of_precision() -> None:
    lines = tuned_lines(methods=("lora", "eva"), tasks=("digits",), test_seeds=1)
    precise = told(lines)[PRECISE]
    assert (precise.outcome, precise.text) == (
        "unknown (one seed)",
        "A mean of one seed has no interval.",
    )


def test_without_runs_to_compare_nothing_is_claimed() -> None:
    groups = summarize(tuned_lines(methods=("eva",), tasks=("digits",))).groups
    assert {one.outcome for one in verdicts(groups)} == {"unknown"}
