"""Names that a terminal, a plot, Markdown or YAML would take for their own signs."""

from __future__ import annotations

from evatune.utils.markup import markdown_code, markdown_text, plot_text, printable


def test_what_stands_for_itself_is_left_alone() -> None:
    name = "encoder.layer.0.attention.self.query of Qwen/Qwen3-0.6B, σ → ρ"
    assert printable(name) == plot_text(name) == markdown_text(name) == name
    assert markdown_code(name) == f"`{name}`"
