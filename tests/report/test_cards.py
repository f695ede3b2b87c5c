"""Model cards: metadata as the hub reads them, and no path of this machine."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest

import evatune
from evatune.errors import RecordError
from evatune.report.cards import CardFacts, card_files, own_card, pushed_card, write_card
from tests.helpers import lora, tiny_llama


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that PEFT wrote, with its empty form of a card."""
    folder = tmp_path_factory.mktemp("card") / "adapter"
    lora(tiny_llama(), task_type="CAUSAL_LM").save_pretrained(folder)
    return folder


def test_the_card_of_init_tells_ranks_energy_and_data(written: Path) -> None:
    card = huggingface_hub.ModelCard.load(written / "README.md")
    facts = card.data.to_dict()
    assert (facts["library_name"], facts["pipeline_tag"]) == ("peft", "feature-extraction")
    assert {"evatune", "eva", "lora"} == set(facts["tags"])
    assert "base_model" not in facts  # a folder, which nobody else has
    assert str(written.parent) not in card.content
    assert "not yet trained (B = 0)" in card.text
    assert "| data fingerprint | `" in card.text
    assert "times a random A of the same ranks" in card.text
    assert "| attention.self.query |" in card.text
    assert "does what 2e-4 does in LoRA" in card.text
    assert (written / "ranks.png").read_bytes().startswith(b"\x89PNG")


def test_a_card_names_the_base_by_its_hub_id_and_says_how_to_serve(
    adapter: Path, tmp_path: Path
) -> None:
    facts = CardFacts(base_model="org/base", data="org/data", fingerprint="ab", method="lora")
    files = card_files(adapter, facts)
    text = files["README.md"].decode()
    card = huggingface_hub.ModelCard(text)
    about = card.data.to_dict()
    assert (about["base_model"], about["base_model_relation"]) == ("org/base", "adapter")
    assert about["datasets"] == ["org/data"]
    assert about["pipeline_tag"] == "text-generation"
    assert 'AutoModelForCausalLM.from_pretrained("org/base")' in text
    assert "vllm serve org/base --enable-lora --max-lora-rank 8" in text
    assert "llama-server" in text


def test_an_empty_form_is_replaced_and_a_written_card_stays(adapter: Path, tmp_path: Path) -> None:
    assert own_card(adapter) is None
    new = pushed_card(adapter, "me/mine", "org/base")
    assert 'from_pretrained(base, "me/mine")' in new["README.md"].decode()
    assert new.keys() == {"README.md", "ranks.png"}
    card = tmp_path / "README.md"
    card.write_text("---\nbase_model: /home/me/base\nlicense: mit\n---\n\n# Mine\n")
    kept = pushed_card(tmp_path, "me/mine", "org/base")["README.md"].decode()
    assert "license: mit" in kept
    assert "# Mine" in kept
    assert "base_model: org/base" in kept
    card.write_text("---\nbase_model: [a/b, c/d]\n---\n\n# A model of your own: set BASE_MODEL\n")
    kept = pushed_card(tmp_path, "me/mine", "org/base")["README.md"].decode()
    assert "base_model:\n- org/base\n- c/d" in kept
    assert "# A model of your own: set BASE_MODEL" in kept
    card.write_text("---\nbase_model: [\n---\n")
    with pytest.raises(RecordError, match="is no model card"):
        own_card(tmp_path)


def test_a_folder_without_an_adapter_gets_no_card(tmp_path: Path) -> None:
    with pytest.raises(evatune.EvatuneError):
        write_card(tmp_path, CardFacts())
    assert list(tmp_path.iterdir()) == []
