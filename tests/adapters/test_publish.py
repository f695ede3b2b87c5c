"""What goes to the hub with an adapter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from evatune.adapters.publish import base_model_of, published_files, require_repository
from evatune.errors import ConfigError, RecordError
from tests.helpers import lora, tiny_bert


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("publish") / "adapter"
    lora(tiny_bert()).save_pretrained(folder)
    return folder


def test_records_pickles_and_folders_stay_here(adapter: Path) -> None:
    wanted = ["tokenizer.json", "tokenizer_config.json", "ranks.png", "chat_template.jinja"]
    private = ["run.json", "report.html", "training_args.bin", "optimizer.pt", ".env"]
    for name in [*wanted, *private]:
        (adapter / name).write_text("{}")
    (adapter / "tokenizer_folder.json").mkdir()
    found = published_files(adapter, "org/base")
    assert found.keys() == {*wanted, "adapter_model.safetensors", "adapter_config.json"}
    config = found["adapter_config.json"]
    assert isinstance(config, bytes)
    assert json.loads(config)["base_model_name_or_path"] == "org/base"


def test_an_adapter_without_weights_that_others_may_read_is_not_pushed(
    adapter: Path, tmp_path: Path
) -> None:
    for name in ("adapter_config.json", "README.md"):
        (tmp_path / name).write_bytes((adapter / name).read_bytes())
    (tmp_path / "adapter_model.bin").write_bytes(b"pickled")
    with pytest.raises(RecordError, match=r"holds no adapter_model\.safetensors; save"):
        published_files(tmp_path, "org/base")


def test_the_base_is_what_the_user_says_else_the_cards_else_the_configs(adapter: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    for given, of_card, of_config, base in (
        ("a/b", "c/d", "e/f", "a/b"),
        (None, "c/d", "e/f", "c/d"),
        (None, "/home/me/c", "e/f", "e/f"),
        (None, None, "/x/models--org--name/snapshots/0/", "org/name"),
    ):
        text = json.dumps(config | {"base_model_name_or_path": of_config})
        (adapter / "adapter_config.json").write_text(text)
        assert base_model_of(adapter, given, of_card) == base
    with pytest.raises(ConfigError, match=r"'\./here' is no id on the model hub.*--base-model"):
        base_model_of(adapter, "./here", "c/d")
    assert base_model_of(adapter, None, ["c/d", "e/f"]) == "c/d"


@pytest.mark.parametrize("name", ["mine", "a/b/c", "", "me/", "me/a b", "me/..", "me/a--b"])
def test_a_repository_has_an_owner_and_a_name(name: str) -> None:
    with pytest.raises(ConfigError, match="give an owner and a name"):
        require_repository(name)
    require_repository("me/my-adapter_1.0")
