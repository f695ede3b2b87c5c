"""Small models with tokenizers, and texts, as folders and files; and the command line in this
process."""

from __future__ import annotations

import random
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from evatune.cli import main

# Inherited by processes that tests start and interrupt. A shell that starts pytest in the
# background lets it ignore interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let what libraries say of each other's versions and of a card be no failure there."""
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.filterwarnings("default"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip the tests that are marked `gpu` where there is none; from here, as one line of all."""
    if item.get_closest_marker("gpu") and not has_gpu():
        pytest.skip("there is no GPU here: `make gpu`, on a machine with one, runs these tests")


def tiny_tokenizer(**options: Any) -> Any:
    """A word is a token: "w0" … "w57", 1 for anything else, 0 for padding."""
    import tokenizers
    import transformers

    words = ["[PAD]", "[UNK]", *(f"w{i}" for i in range(58))]
    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]")
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]"} | options
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **names)


def save_model(model: Any, folder: Path, **tokenizer: Any) -> Path:
    from transformers.utils import logging

    logging.disable_progress_bar()
    model.save_pretrained(folder)
    tiny_tokenizer(**tokenizer).save_pretrained(folder)
    return folder


def sentences(count: int = 64, words: int = 20) -> list[str]:
    source = random.Random(0)
    return [" ".join(f"w{source.randrange(58)}" for _ in range(words)) for _ in range(count)]


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=60,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    return save_model(transformers.BertModel(config), tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=60,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    return save_model(
        transformers.LlamaForCausalLM(config), tmp_path_factory.mktemp("models") / "llama"
    )


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "texts.txt"
    path.write_text("\n".join(sentences()) + "\n")
    return path


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of hosts lead nowhere, whatever the machine that runs the tests can reach."""
    import socket

    def refuse(*_: Any, **__: Any) -> Any:
        raise socket.gaierror("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@dataclass(frozen=True)
class Answer:
    status: int
    out: str
    err: str


Command = Callable[..., Answer]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs the command line in this process."""

    def run(*arguments: Any) -> Answer:
        monkeypatch.setattr(sys, "argv", ["evatune", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return Answer(int(ended.value.code or 0), out, err)

    return run


def refused(
    answer: Answer, *parts: str, folder: Path | None = None, left: frozenset[str] = frozenset()
) -> None:
    """Status 2, one line on stderr with these parts in it, nothing on stdout, nothing left
    behind."""
    assert answer.status == 2, answer
    assert re.fullmatch(r"evatune: [^\n]+\n", answer.err), answer.err
    assert "Traceback" not in answer.err
    assert answer.out == ""
    for part in parts:
        assert part in answer.err, (part, answer.err)
    if folder is not None:
        assert {path.name for path in folder.iterdir()} == left


@pytest.fixture(scope="session")
def written(bert_folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that `evatune init` wrote."""
    import datasets

    out = tmp_path_factory.mktemp("written") / "out"
    arguments = [
        "--model",
        str(bert_folder),
        "--data",
        str(text_file),
        "--rank",
        "4",
        "--seed",
        "3",
        "--scale",
        "paper",
        "--out",
        str(out),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        patch.setattr(sys, "argv", ["evatune", "init", *arguments, "--json"])
        with pytest.raises(SystemExit):
            main()
    return out
