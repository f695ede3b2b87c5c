"""A card names its base model, whatever that is called."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from evatune.adapters.export.files import write_card
from evatune.utils.markup import markdown_code


@pytest.mark.parametrize(
    "base", ["x: [y]", 'a"\n---\nevil: "1', "#no", "- item", "\udce9", "plain/name", "null", "`b`"]
)
def test_a_card_names_its_base_whatever_it_is_called(tmp_path: Path, base: str) -> None:
    write_card(tmp_path, f"An adapter for {markdown_code(base)}.", base, library="peft")
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert yaml.safe_load(card.split("\n---\n")[0].removeprefix("---\n")) == {
        "base_model": base,
        "library_name": "peft",
        "tags": ["lora"],
    }
    assert len(card.rpartition("\n---\n")[2].strip().splitlines()) == 1
