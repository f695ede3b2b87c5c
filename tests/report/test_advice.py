"""What validation advises."""

from __future__ import annotations

from evatune.finetune.comparison.tuned_cells import Group
from evatune.finetune.comparison.tuned_summary import summarize
from evatune.finetune.recipe_files import load
from evatune.report.advice import advice, advice_lines, repeat_command, train_command
from tests.tuned_lines import line_of, tuned_lines


def group_of(*methods: str, **settings: float) -> Group:
    lines = tuned_lines(tasks=("digits", "fonts"), methods=methods, **settings)
    (group,) = summarize(lines).groups
    return group


def test_the_method_of_the_lowest_validation_loss_is_advised_with_its_rate() -> None:
    group = group_of("lora", "eva", "pissa", rho=1)
    digits, fonts = advice(group)
    cell = group.cell("digits", "eva (rho 1)")
    assert cell is not None
    assert (digits.task, digits.method, fonts.task) == ("digits", "eva (rho 1)", "fonts")
    assert digits.learning_rate == cell.rate
    assert "train with eva (rho 1) at 0.0025: its validation loss is the lowest" in digits.text
    assert "; next is lora's, " in digits.text
    assert digits.text.endswith(" of 3 tuning seeds")
    assert digits.command is not None
    settings = load(*_arguments(digits.command))
    assert (settings.method, settings.seed, settings.adapter.rho) == ("eva", 0, 1)
    assert settings.training.learning_rate == cell.rate
    assert advice_lines([group])[:2] == [f"images digits: {digits.text}.", f"  {digits.command}"]


def _arguments(command: str) -> tuple[str, list[str]]:
    evatune, train, recipe, *overrides = command.split()
    assert (evatune, train) == ("evatune", "train")
    return recipe, overrides


def test_controls_and_full_fine_tuning_are_no_choice() -> None:
    for each in advice(group_of("lora", "eva-paper-random", "full", "dora")):
        assert each.method in ("lora", "dora")
    assert advice(group_of("lora", "eva-paper-random", "full")) == []


def test_what_diverged_at_every_rate_is_no_choice() -> None:
    lines = tuned_lines(tasks=("digits",), methods=("lora",))
    lines += [
        line_of("images", "digits", "eva", 0.01, seed, False, diverged=True) for seed in range(3)
    ]
    (group,) = summarize(lines).groups
    assert advice(group) == []


def test_a_command_repeats_a_row_with_the_first_test_seed() -> None:
    cell = group_of("lora", "eva", rho=1).cell("digits", "eva (rho 1)")
    assert cell is not None
    command = repeat_command(cell)
    assert command is not None
    settings = load(*_arguments(command))
    assert (settings.method, settings.seed, settings.adapter.rho) == ("eva", 10, 1)
    assert settings.training.learning_rate == cell.rate
    assert settings.training.steps == cell.steps
    assert train_command(cell, 10) == command
