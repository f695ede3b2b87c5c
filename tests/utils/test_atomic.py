"""Files are whole or absent when there is no room, and one sentence says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from safetensors.torch import save_file

from evatune.errors import ConfigError
from evatune.utils.atomic import atomic_file, writing
from evatune.utils.outputs import claimed_file, claimed_folder
from tests.helpers import no_room, tree, write_folder


def of_safetensors(path: Path) -> None:
    save_file({"a": torch.zeros(1000)}, path)


def of_torch(path: Path) -> None:
    torch.save({"a": torch.zeros(1000)}, path)


def of_tokenizers(path: Path) -> None:
    words = {f"w{i}": i for i in range(1000)}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0")).save(str(path))


def of_python(path: Path) -> None:
    path.write_bytes(bytes(4000))


@pytest.mark.parametrize("writer", [of_safetensors, of_torch, of_tokenizers, of_python])
def test_without_room_the_last_output_stays_and_one_sentence_says_so(writer: Any) -> None:
    write_folder("out", "old")
    Path("file").write_text("old")
    Path("text").write_text("old")
    before = tree()
    for attempt in (claimed_folder("out", True), claimed_file("file", True, lambda _: True)):
        with (
            no_room(),
            pytest.raises(ConfigError, match=r"cannot be written .*; name another"),
            attempt as output,
            output.whole() as made,
        ):
            writer(made / "a" if made.is_dir() else made)
    with (
        no_room(),
        pytest.raises(ConfigError, match="cannot be written"),
        atomic_file(Path("text")) as made,
    ):
        writer(made)
    assert tree() == before


def test_what_fails_for_another_reason_is_not_called_a_full_disk() -> None:
    with pytest.raises(RuntimeError, match="a shape"), writing("out"):
        raise RuntimeError("a shape")
