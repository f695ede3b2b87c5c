"""Hub ids and paths: what can be reached, and what is said where it cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest

from evatune.errors import DataError
from evatune.loading import hub
from evatune.loading.texts import load_texts
from tests.loading.helpers import write


def test_the_hubs_own_words_are_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: Any, **__: Any) -> None:
        raise datasets.exceptions.DatasetNotFoundError(
            "Dataset 'no/such' doesn't exist on the Hub or cannot be accessed."
        )

    monkeypatch.setattr(hub, "hub_is_reachable", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", absent)
    with pytest.raises(
        DataError, match=r"'no/such': Dataset 'no/such' doesn't exist on the Hub .* Give a hub id"
    ):
        load_texts("no/such")


def test_the_libraries_ask_the_hub_again_after_a_failure(no_network: None) -> None:
    with pytest.raises(DataError, match="hub cannot be reached"):
        load_texts("no/such")
    assert not huggingface_hub.constants.HF_HUB_OFFLINE
    assert not datasets.config.HF_HUB_OFFLINE


def test_what_is_in_the_cache_needs_no_hub(
    no_network: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cached(*_: Any, **__: Any) -> Any:
        assert datasets.config.HF_HUB_OFFLINE
        return datasets.Dataset.from_dict({"text": ["one"]})

    monkeypatch.setattr(datasets, "load_dataset", cached)
    assert len(load_texts("some/data")) == 1


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(13, "Permission denied", "cache/lock"),
        OSError(28, "No space left on device"),
    ],
)
def test_a_cache_that_cannot_be_written_is_not_the_datas_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        if error.filename:
            error.filename = str(tmp_path / error.filename)
        raise datasets.exceptions.DatasetGenerationError("An error occurred") from error

    path = write(tmp_path / "a.txt", "one\n")
    monkeypatch.setattr(datasets.DatasetBuilder, "download_and_prepare", fail)
    with pytest.raises(
        DataError,
        match=f"cache of the Hugging Face libraries cannot be written .*{error.strerror}.*HF_HOME",
    ):
        load_texts(path)


@pytest.mark.parametrize("source", ["a/b/c", "./a", "/a", "~/a", "a.csv", "a.JSONL", "", Path("a")])
def test_what_can_only_be_a_path_must_exist(source: str | Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        hub.require_path(source, "data")


@pytest.mark.parametrize("source", ["name", "owner/name", "owner/name-v1.5"])
def test_what_may_be_a_hub_id_passes(source: str) -> None:
    hub.require_path(source, "model")
