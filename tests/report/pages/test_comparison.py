"""The page of a comparison."""

from __future__ import annotations

from typing import Any

from evatune.finetune.comparison.summary import Comparison, MeanStd, MethodSummary
from evatune.finetune.recipe_tree import parse
from evatune.report.pages.comparison import render
from tests.report.pages.helpers import Document, specs


def line(task: str, method: str, scores: list[float], rate: float = 1e-3, **other: Any) -> Any:
    one = MeanStd(1.0, None)
    values: dict[str, Any] = {
        "task": task,
        "method": method,
        "learning_rate": rate,
        "seeds": len(scores),
        "score": MeanStd(sum(scores) / len(scores), 0.01),
        "eval_loss": one,
        "steps_to_target": None,
        "trainable_parameters": one,
        "first_gradient_b": None,
        "init_seconds": one,
        "train_seconds": one,
        "curve": [(0, 2.0, 0.1), (2, 1.0, 0.5)],
        "scores": dict(enumerate(scores)),
        "best": True,
    }
    return MethodSummary(**values | other)


def page_of(lines: list[Any], failed: int = 0) -> str:
    recipe = parse({"task": "bbc"})
    targets = dict.fromkeys((one.task for one in lines), 1.0)
    return render(Comparison(lines, targets), [recipe], "evatune compare x", "do this", failed)


def verdict(lines: list[Any], failed: int = 0) -> str:
    text = page_of(lines, failed)
    return text.partition('<p class="verdict">')[2].partition("</p>")[0]


def test_wins_are_counted_only_where_several_seeds_can_tell() -> None:
    for scores, counted in (([0.5, 0.6], True), ([0.5], False)):
        text = page_of([line("bbc", method, scores) for method in ("lora", "eva")])
        assert ("tasks eva won / tied / lost" in text) == counted


def test_the_verdict_tells_a_win_from_scatter() -> None:
    lora = line("bbc", "lora", [0.5, 0.51, 0.52])
    apart = verdict([lora, line("bbc", "eva", [0.6, 0.61, 0.621])])
    assert apart.startswith("eva is 10.0 points above lora in score, 95 % interval [+")
    assert apart.endswith("more than the seeds scatter.")
    tie = verdict([lora, line("bbc", "eva", [0.4, 0.52, 0.62])])
    assert tie.endswith("the interval holds 0, so this is a tie.")
    best = verdict([lora, *(line("bbc", name, [0.6, 0.61, 0.621]) for name in ("dora", "mica"))])
    assert "more than the seeds scatter; as the best of 2, p = " in best
    single = verdict([line("bbc", "lora", [0.5]), line("bbc", "eva", [0.6])], failed=2)
    assert single.endswith("with one seed: no evidence of a difference; 2 runs failed.")
    assert verdict([lora]).startswith("There is nothing to compare")


def test_the_page_has_curves_and_tables_of_all_methods_and_tasks() -> None:
    lines = [
        line(task, method, [0.5, 0.6]) for task in ("bbc", "movie") for method in ("lora", "eva")
    ]
    lines.append(line("bbc", "eva", [0.1, 0.2], 1e-2, best=False))
    text = page_of(lines)
    page = Document(text)
    assert "lora, eva on 2 tasks" in page.text
    assert "mean over 2 tasks" in page.text
    assert specs(text)["loss"]["usermeta"]["panels"] == 2
    assert "Test loss" in page.text
    assert "Evaluation loss" not in page.text
    names = ["methods", "differences", "rates"]
    assert [name for name in names if f'data-name="{name}"' in text] == names
    assert page.text.index("do this") < page.text.index("Made by: evatune compare x")
