"""Texts, models and batches behind the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest
import torch
import transformers

from evatune.errors import ConfigError, DataError
from evatune.tasks import text
from tests.conftest import save_model, sentences, tiny_tokenizer

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def texts_of(source: Path, *arguments: Any, **options: Any) -> list[str]:
    return list(text.load_texts(source, *arguments, **options)["text"])


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# -- texts ------------------------------------------------------------------------------------------------


def test_a_text_file_holds_a_text_per_line_and_blank_lines_do_not_count(tmp_path: Path) -> None:
    assert texts_of(write(tmp_path / "a.txt", "one\n\n  \ntwo\n")) == ["one", "two"]


def test_a_folder_of_text_files_holds_a_text_per_file(tmp_path: Path) -> None:
    write(tmp_path / "d" / "a.txt", "one\nmore")
    write(tmp_path / "d" / "sub" / "b.TXT", "two")
    write(tmp_path / "d" / "notes.md", "not this")
    assert texts_of(tmp_path / "d") == ["one\nmore", "two"]


def test_bytes_that_are_not_utf8_are_replaced(tmp_path: Path) -> None:
    assert texts_of(write(tmp_path / "a.txt", b"caf\xe9\n")) == ["caf�"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", 'text,n\n"one, more",1\ntwo,2\n'),
        ("a.tsv", "text\tn\none, more\t1\ntwo\t2\n"),
        ("a.jsonl", '{"text": "one, more", "n": 1}\n{"text": "two", "n": 2}\n'),
        ("a.json", json.dumps([{"text": "one, more", "n": 1}, {"text": "two", "n": 2}])),
    ],
)
def test_every_kind_of_table_gives_its_texts(tmp_path: Path, name: str, content: str) -> None:
    assert texts_of(write(tmp_path / name, content)) == ["one, more", "two"]


def test_files_of_one_kind_in_a_folder_come_one_after_the_other(tmp_path: Path) -> None:
    write(tmp_path / "d" / "2.jsonl", '{"text": "two"}\n')
    write(tmp_path / "d" / "1.jsonl", '{"text": "one"}\n')
    assert texts_of(tmp_path / "d") == ["one", "two"]


def test_the_only_column_of_strings_is_the_text(tmp_path: Path) -> None:
    assert texts_of(write(tmp_path / "a.csv", "n,body\n1,one\n")) == ["one"]


def test_a_column_called_text_comes_before_others(tmp_path: Path) -> None:
    assert texts_of(write(tmp_path / "a.csv", "body,text\nno,yes\n")) == ["yes"]


def test_a_named_column_comes_before_one_called_text(tmp_path: Path) -> None:
    assert texts_of(write(tmp_path / "a.csv", "body,text\nno,yes\n"), "body") == ["no"]


def test_a_column_of_numbers_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"column 'n' .* does not hold strings; columns that do: text"):
        text.load_texts(write(tmp_path / "a.csv", "text,n\nx,1\n"), "n")


def test_missing_entries_are_left_out(tmp_path: Path) -> None:
    assert texts_of(write(tmp_path / "a.jsonl", '{"text": null}\n{"text": "one"}\n')) == ["one"]


def test_a_part_of_a_file_can_be_named(tmp_path: Path) -> None:
    assert texts_of(write(tmp_path / "a.txt", "one\ntwo\nthree\n"), split="train[:2]") == ["one", "two"]


def test_a_saved_data_set_is_read_with_and_without_splits(tmp_path: Path) -> None:
    one = datasets.Dataset.from_dict({"text": ["one"]})
    one.save_to_disk(tmp_path / "plain")
    datasets.DatasetDict(train=one, test=datasets.Dataset.from_dict({"text": ["two"]})).save_to_disk(tmp_path / "splits")
    assert texts_of(tmp_path / "plain") == ["one"]
    assert texts_of(tmp_path / "splits") == ["one"]
    assert texts_of(tmp_path / "splits", split="test") == ["two"]
    with pytest.raises(DataError, match="no split 'dev'; choose one of train, test"):
        text.load_texts(tmp_path / "splits", split="dev")
    with pytest.raises(DataError, match="no split 'test'; choose one of train"):
        text.load_texts(tmp_path / "plain", split="test")


def test_the_hubs_own_words_are_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: Any, **__: Any) -> None:
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'no/such' doesn't exist on the Hub or cannot be accessed.")

    monkeypatch.setattr(text, "_hub_answers", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", absent)
    with pytest.raises(DataError, match=r"'no/such': Dataset 'no/such' doesn't exist on the Hub .* Give a hub id"):
        text.load_texts("no/such")


def test_the_libraries_ask_the_hub_again_after_a_failure(no_network: None) -> None:
    with pytest.raises(DataError, match="hub cannot be reached"):
        text.load_texts("no/such")
    assert not huggingface_hub.constants.HF_HUB_OFFLINE
    assert not datasets.config.HF_HUB_OFFLINE


def test_what_is_in_the_cache_needs_no_hub(no_network: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def cached(*_: Any, **__: Any) -> Any:
        assert datasets.config.HF_HUB_OFFLINE
        return datasets.Dataset.from_dict({"text": ["one"]})

    monkeypatch.setattr(datasets, "load_dataset", cached)
    assert len(text.load_texts("some/data")) == 1


@pytest.mark.parametrize("source", ["a/b/c", "./a", "/a", "~/a", "a.csv", "a.JSONL", "", Path("a")])
def test_what_can_only_be_a_path_must_exist(source: str | Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        text.require_path(source, "data")


@pytest.mark.parametrize("source", ["name", "owner/name", "owner/name-v1.5"])
def test_what_may_be_a_hub_id_passes(source: str) -> None:
    text.require_path(source, "model")


def test_the_demo_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(DataError, match=r"evatune\[demo\].*--model M --data D"):
        text.demo_model()


# -- batches ----------------------------------------------------------------------------------------------


def some_batches(**options: Any) -> text.TextBatches:
    rows = datasets.Dataset.from_dict({"text": sentences(10)})
    defaults = {"tokenizer": tiny_tokenizer(), "texts": rows, "batch_size": 4, "max_length": 32, "seed": 0}
    return text.TextBatches(**(defaults | options))


def test_batches_are_the_same_each_time_and_hold_every_text_once() -> None:
    batches = some_batches()
    first, second = list(batches), list(batches)
    assert len(batches) == len(first) == 3
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, second, strict=True))
    seen = sorted(tuple(row) for batch in first for row in batch["input_ids"].tolist())
    expected = tiny_tokenizer()(list(batches.texts["text"]))["input_ids"]
    assert seen == sorted(map(tuple, expected))


def test_the_seed_decides_the_order() -> None:
    a, b = (next(iter(some_batches(seed=seed)))["input_ids"] for seed in (0, 1))
    assert not torch.equal(a, b)


def test_long_texts_are_cut_at_the_shorter_limit() -> None:
    assert next(iter(some_batches(max_length=5)))["input_ids"].shape == (4, 5)
    short = some_batches(tokenizer=tiny_tokenizer(model_max_length=7))
    assert next(iter(short))["input_ids"].shape == (4, 7)


@pytest.mark.parametrize("option", [{"batch_size": 0}, {"max_length": 0}, {"seed": -1}, {"seed": 2**63}])
def test_sizes_and_seeds_out_of_range_are_refused(option: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(option))} is "):
        some_batches(**option)


# -- models -----------------------------------------------------------------------------------------------


def test_the_checkpoint_says_what_its_task_is(bert_folder: Path, llama_folder: Path) -> None:
    assert text.load_model(bert_folder, device="cpu").task == "feature-extraction"
    llama = text.load_model(llama_folder, device="cpu")
    assert (llama.task, llama.peft_task) == ("causal-lm", "CAUSAL_LM")
    assert type(llama.model).__name__ == "LlamaForCausalLM"
    assert llama.model.config.use_cache is False
    assert not llama.model.training
    assert llama.fresh == ()


@pytest.mark.parametrize(
    ("architecture", "task"),
    [("GPT2LMHeadModel", "causal-lm"), ("T5ForConditionalGeneration", "seq2seq-lm"), ("BertForMaskedLM", "masked-lm"),
     ("BertForSequenceClassification", "sequence-classification"), ("BertForTokenClassification", "token-classification"),
     ("BertModel", "feature-extraction"), (None, "feature-extraction")],
)  # fmt: skip
def test_tasks_by_architecture(architecture: str | None, task: str) -> None:
    config = transformers.BertConfig(architectures=[architecture] if architecture else None)
    assert text._task_of(config) == task


def test_weights_that_the_checkpoint_lacks_are_listed(bert_folder: Path) -> None:
    loaded = text.load_model(bert_folder, "sequence-classification", "cpu")
    assert loaded.fresh == ("classifier.bias", "classifier.weight")
    assert loaded.peft_task == "SEQ_CLS"


def test_a_dtype_can_be_chosen(bert_folder: Path) -> None:
    assert text.load_model(bert_folder, device="cpu", dtype="bfloat16").model.dtype == torch.bfloat16


def test_a_tokenizer_without_padding_gets_some(bert_folder: Path, tmp_path: Path) -> None:
    model = transformers.AutoModel.from_pretrained(bert_folder)
    end = text.load_model(save_model(model, tmp_path / "a", pad_token=None, eos_token="w5"), device="cpu").tokenizer
    none = text.load_model(save_model(model, tmp_path / "b", pad_token=None), device="cpu").tokenizer
    assert end.pad_token == "w5"
    assert none.pad_token_id == 0
    assert none(["w1", "w1 w2"], padding=True, return_tensors="pt")["attention_mask"].sum() == 3


def test_texts_are_never_longer_than_the_models_positions(bert_folder: Path) -> None:
    tokenizer = text.load_model(bert_folder, device="cpu").tokenizer
    assert tokenizer.model_max_length == 64


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"task": "x"}, "task is 'x'"),
        ({"dtype": "float"}, "dtype is 'float'"),
        ({"device": "x"}, "device 'x'"),
        ({"device": "meta"}, "device 'meta'"),
    ],
)
def test_options_of_a_model_are_checked_before_it_is_loaded(options: dict[str, str], part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        text.require_loadable("some/model", **options)


def test_only_sequence_to_sequence_models_need_a_forward_of_their_own() -> None:
    assert text.forward_for("causal-lm") is None
    assert text.forward_for("seq2seq-lm") is not None
