"""A card names its base model by the id on the hub, and never by a path."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from evatune.adapters.export.files import write_card
from evatune.utils.markup import markdown_code


@pytest.mark.parametrize(
    ("base", "known"),
    [
        ("plain/name", "plain/name"),
        ("null", "null"),
        ("/home/me/.cache/hub/models--org--name/snapshots/0123/", "org/name"),
        ("/home/me/model", None),
        ("./model", None),
        ("x: [y]", None),
        ('a"\n---\nevil: "1', None),
        ("\udce9", None),
    ],
)
def test_a_card_names_its_base_by_its_id(tmp_path: Path, base: str, known: str | None) -> None:
    write_card(tmp_path, f"An adapter for {markdown_code(base)}.", base, library="peft")
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    facts = yaml.safe_load(card.split("\n---\n")[0].removeprefix("---\n"))
    assert facts.pop("base_model", None) == known
    assert facts == {"library_name": "peft", "tags": ["lora"]}
    assert len(card.rpartition("\n---\n")[2].strip().splitlines()) == 1
