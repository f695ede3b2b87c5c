"""`evatune push`, with what stands for the hub."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest

from tests.conftest import Command, refused

Hub = dict[str, Any]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    """What was pushed: repository, whether it is private, and content by name."""
    pushed: Hub = {}

    class Api:
        def create_repo(self, name: str, *, private: bool | None, exist_ok: bool) -> str:
            assert exist_ok
            pushed.update(name=name, private=private)
            return f"https://huggingface.co/{name}"

        def create_commit(self, name: str, operations: list[Any], *, commit_message: str) -> None:
            assert name == pushed["name"]
            assert commit_message
            for one in operations:
                with one.as_file() as file:
                    pushed.setdefault("files", {})[one.path_in_repo] = file.read()

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "token")
    return pushed


def test_push_sends_what_others_need_and_no_path_of_this_machine(
    command: Command, written: Path, hub: Hub, bert_folder: Path
) -> None:
    options = ["--base-model", "org/bert", "--private"]
    answer = command("push", written, "me/mine", *options)
    assert answer.status == 0, answer.err
    assert answer.out.startswith("https://huggingface.co/me/mine  4 files, an adapter for org/bert")
    assert (hub["name"], hub["private"]) == ("me/mine", True)
    files = hub["files"]
    assert files.keys() == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "ranks.png",
    }
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "org/bert"
    assert not any(str(bert_folder).encode() in content for content in files.values())
    card = huggingface_hub.ModelCard(files["README.md"].decode())
    assert card.data.base_model == "org/bert"
    assert 'PeftModel.from_pretrained(base, "me/mine")' in card.text
    assert 'AutoModel.from_pretrained("org/bert")' in card.text
    assert "# eva adapter for org/bert" in card.text
    assert str(bert_folder) in (written / "adapter_config.json").read_text()  # which stays


def test_what_cannot_be_pushed_is_refused_in_one_sentence(
    command: Command, written: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    refused(command("push", written, "mine"), "repository is 'mine'; give an owner and a name")
    refused(command("push", written, "me/mine"), "is no id on the model hub", "--base-model")
    refused(command("push", tmp_path, "me/mine"), "adapter_config.json' does not exist")
    assert hub == {}
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    refused(command("push", tmp_path / "nope", "me/mine"), "nope' is not a folder; give one")
    refused(command("push", written, "me/mine"), "no token", "hf auth login")


def failing(error: Exception) -> Callable[..., Any]:
    def create_repo(*_: Any, **__: Any) -> Any:
        raise error

    return create_repo


def test_a_hub_that_refuses_or_is_away_is_told_in_one_sentence(
    command: Command, written: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    response: Any = SimpleNamespace(status_code=403, headers={}, request=None)
    denied = huggingface_hub.errors.HfHubHTTPError("Forbidden", response=response)
    for error, words in (
        (denied, "does not let this token write to 'me/mine' (status 403)"),
        (ConnectionError("no route"), "cannot be reached (no route)"),
    ):
        monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", failing(error))
        answer = command("push", written, "me/mine", "--base-model", "org/bert")
        refused(answer, words)
