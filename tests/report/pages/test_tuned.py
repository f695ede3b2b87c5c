"""The page of a tuned comparison."""

from __future__ import annotations

from evatune.finetune.comparison.tuned_summary import summarize
from evatune.report.pages.tuned import render
from tests.report.pages.helpers import Document, specs
from tests.tuned_lines import tuned_lines


def test_the_page_begins_with_the_verdict_and_has_every_group() -> None:
    lines = tuned_lines(("images", "rl"), ("digits", "fonts"), ("lora", "eva", "pissa"))
    text = render(summarize(lines), "evatune compare x --tune")
    page = Document(text)
    assert text.partition('class="verdict">')[2].startswith("Win: eva is 1.9 points above lora")
    assert "evatune train images-digits method=eva training.learning_rate=" in page.text
    assert "train with eva at" in page.text
    assert specs(text)["scores"]["usermeta"]["panels"] == 4
    assert specs(text).keys() >= {"scores", "loss"}
    assert all(
        f"{domain}: {kind}" in page.text
        for domain in ("images", "rl")
        for kind in ("methods", "cells")
    )
    assert page.text.endswith("evatune compare x --tune")


def test_without_the_default_the_page_begins_with_the_papers_settings() -> None:
    lines = tuned_lines(methods=("lora", "eva-paper-centered"), tasks=("digits", "fonts"))
    text = render(summarize(lines), "evatune compare x --tune")
    verdict = text.partition('class="verdict">')[2]
    assert verdict.startswith("Win: eva-paper-centered is 3.3 points above lora")
    assert "method=eva-paper-centered" in Document(text).text
