"""Models and data of `evatune init`: which are read, and what bad ones get."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from scipy.io import wavfile

from evatune.loading.assets import asset
from tests.conftest import Command, refused, save_model, sentences


def data_file(folder: Path, kind: str) -> Path:
    rows = {"text": sentences(), "label": ["yes"] * 64}
    path = folder / f"data.{kind}"
    data = datasets.Dataset.from_dict(rows)
    {"jsonl": data.to_json, "csv": data.to_csv, "parquet": data.to_parquet}[kind](path)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_tables_of_each_kind_are_read(init: Command, tmp_path: Path, work: Path, kind: str) -> None:
    datasets.disable_progress_bars()
    assert init(data=data_file(tmp_path, kind), max_batches=2).status == 0
    assert json.loads((work / "out" / "run.json").read_text())["settings"]["texts"] == 64


def test_a_folder_holds_a_document_per_text_file(init: Command, tmp_path: Path, work: Path) -> None:
    for number, text in enumerate(sentences(32)):
        place = tmp_path / "documents" / f"topic{number % 2}" / f"{number}.txt"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text.replace(" ", "\n"))
    assert init(data=tmp_path / "documents", max_batches=2).status == 0
    assert json.loads((work / "out" / "run.json").read_text())["settings"]["texts"] == 32


def test_the_text_column_can_be_named(init: Command, tmp_path: Path) -> None:
    path = tmp_path / "two.csv"
    path.write_text("question,answer\n" + "".join(f"{text},{text}\n" for text in sentences(32)))
    assert init(data=path, text_column="answer", max_batches=2).status == 0


def rows_file(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_of_chats_the_answers_tokens_count(
    init: Command, llama_folder: Path, tmp_path: Path, work: Path
) -> None:
    chats = [
        {
            "conversations": [
                {"from": "human", "value": text},
                {"from": "gpt", "value": "w1 w2 w3"},
            ]
        }
        for text in sentences(16)
    ]
    path = rows_file(tmp_path / "chats.jsonl", chats)
    options = {"model": llama_folder, "data": path, "rank": 2, "rho": 1, "targets": "q_proj"}
    refused(init(**options), "no chat template; give --chat-template a Jinja file", folder=work)
    (tmp_path / "chat.jinja").write_text(
        "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"
    )
    answer = init(**options, chat_template=tmp_path / "chat.jinja", json=True)
    assert answer.status == 0, answer.err
    facts = json.loads(answer.out)
    said = "16 chats in column conversations, read by the chat template; only the assistant's"
    assert said in facts["settings"]["recognized"]
    assert facts["config"]["labels_only"] is True
    # the position before each token of an answer
    assert {layer["rows"] for layer in facts["layers"]} == {16 * 3}


def test_a_classifier_gets_a_head_for_the_classes_of_its_data(
    init: Command, tmp_path: Path, work: Path
) -> None:
    rows = [
        {"review": text, "label": "abc"[number % 3]} for number, text in enumerate(sentences(24))
    ]
    path = rows_file(tmp_path / "reviews.jsonl", rows)
    options = {"data": path, "task": "sequence-classification", "max_batches": 2}
    answer = init(**options, targets="query", objective="gradients", rank=2)
    assert answer.status == 0, answer.err
    assert "24 texts in review, of 3 classes in column label" in answer.out
    head = load_file(work / "out" / "adapter_model.safetensors")
    assert [len(weight) for name, weight in head.items() if "classifier" in name] == [3, 3]
    rows_file(path, [{"review": "w1", "label": "a"}] * 4)
    refused(init(**options, overwrite=True), "holds one class only", left=frozenset({"out"}))


def test_images_are_calibrated_on_by_a_model_of_images(
    command: Command, tmp_path: Path, work: Path
) -> None:
    source = np.random.default_rng(0)
    for kind in ("cat", "dog"):
        (tmp_path / "photos" / kind).mkdir(parents=True)
        for number in range(6):
            pixels = source.integers(0, 255, (40, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / kind / f"{number}.png")
    options = ["--images", tmp_path / "photos", "--rank", 2, "--batch-size", 4, "--out", "out"]
    answer = command("init", *options, "--max-batches", 2)
    assert answer.status == 0, answer.err
    assert "12 images in column image, of 2 classes in column label" in answer.out
    config = json.loads((work / "out" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["classifier"]
    assert "classifier" in str(list(load_file(work / "out" / "adapter_model.safetensors")))
    (tmp_path / "photos" / "dog" / "9.png").write_bytes(b"\x89PNG")
    broken = command("init", *options[:-1], "again", "--max-batches", 6)
    assert broken.status == 2
    assert "9.png' cannot be read as an image (its format is not known); mend it" in broken.err


def test_sounds_are_calibrated_on_at_the_rate_that_the_model_listens_at(
    command: Command, tmp_path: Path, work: Path
) -> None:
    config = transformers.Wav2Vec2Config(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        conv_dim=(8, 8),
        conv_kernel=(10, 8),
        conv_stride=(10, 8),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        classifier_proj_size=8,
        vocab_size=8,
    )
    folder = tmp_path / "listens"
    transformers.Wav2Vec2ForSequenceClassification(config).save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor(sampling_rate=16000).save_pretrained(folder)
    source = np.random.default_rng(0)
    for kind in ("high", "low"):
        (tmp_path / "sounds" / kind).mkdir(parents=True)
        for number in range(4):
            wave = source.integers(-3000, 3000, (800, 2), dtype=np.int16)  # 0.1 s of two channels
            wavfile.write(tmp_path / "sounds" / kind / f"{number}.wav", 8000, wave)
    options = ["--model", folder, "--audio", tmp_path / "sounds", "--rank", 2, "--rho", 1]
    answer = command("init", *options, "--targets", "q_proj", "--out", "out", "--json")
    assert answer.status == 0, answer.err
    facts = json.loads(answer.out)
    about = f"{tmp_path / 'sounds'}: 8 audio in column audio, of 2 classes in column label"
    assert facts["settings"]["recognized"] == about
    # 0.1 s at 16 kHz are 1600 samples, of which the convolutions make 160 and then 20
    assert {layer["rows"] for layer in facts["layers"]} == {8 * 20}
    (tmp_path / "sounds" / "low" / "._9.wav").write_bytes(b"what a Mac keeps beside a file")
    split = command("init", *options, "--split", "test", "--out", "again")
    refused(
        split, "--split is 'test', and a folder of audio has no splits", left=frozenset({"out"})
    )
    (tmp_path / "sounds" / "low" / "9.wav").write_bytes(b"RIFF")
    again = command("init", *options, "--targets", "q_proj", "--out", "again")
    refused(again, "9.wav' cannot be read as a sound", "soundfile", left=frozenset({"out"}))


def test_a_model_and_data_of_other_kinds_are_refused(
    init: Command, text_file: Path, work: Path, tmp_path: Path
) -> None:
    (tmp_path / "photos").mkdir()
    refused(init(model=asset("vit-glyphs")), "is no model of texts", "--images", folder=work)
    refused(init(data=None, images=tmp_path / "photos", model=None), "images", folder=work)
    refused(init(images=tmp_path / "photos"), "--data and --images were both given", folder=work)
    cut = init(data=None, images=tmp_path / "photos", model=None, max_length=8)
    refused(cut, "--max-length is for texts, and --images reads none", folder=work)
    refused(init(objective="gradients"), "--objective needs a loss", "causal-lm", folder=work)


@pytest.mark.parametrize(
    ("option", "parts"),
    [
        ({"rank": 0}, ["rank is 0", "at least 1"]),
        ({"rank": "many"}, ["--rank", "evatune init --help"]),
        (
            {"rank": 40},
            ["budget of 520 ranks", "encoder.layer.0.attention.self.query (", "Lower rank"],
        ),
        ({"rho": 0.5}, ["rho is 0.5", "at least 1"]),
        ({"rho": "nan"}, ["rho is nan"]),
        ({"rho": "inf"}, ["rho is inf"]),
        ({"alpha": 0}, ["alpha is 0", "above 0"]),
        ({"alpha": "nan"}, ["alpha is nan"]),
        ({"metric": "best"}, ["metric", "'best'", "ratio, raw, max, sum"]),
        ({"budget": "euros"}, ["budget", "'euros'", "ranks, parameters"]),
        ({"scale": "big"}, ["scale", "'big'", "paper, whiten, matched"]),
        ({"sketch": "pencil"}, ["sketch", "'pencil'", "nystrom, exact, incremental"]),
        ({"task": "poetry"}, ["task", "'poetry'", "causal-lm", "feature-extraction"]),
        ({"task": "seq2seq-lm"}, ["BertConfig", "another task"]),
        ({"device": "abacus"}, ["device 'abacus'", "cpu"]),
        ({"device": "meta"}, ["device 'meta'", "cpu"]),
        ({"dtype": "int8"}, ["dtype", "'int8'", "bfloat16"]),
        ({"targets": "nothing"}, ["targets ['nothing']", "dense, key, query, value", "all-linear"]),
        ({"targets": "("}, ["targets '('", "regular expression"]),
        ({"targets": "LayerNorm"}, ["embeddings.LayerNorm (LayerNorm)", "Name the linear layers"]),
        ({"exclude_modules": "nothing"}, ["exclude_modules ['nothing']", "attention.self.query"]),
        ({"exclude_modules": ".*"}, ["exclude_modules '.*'", "attention.self.query"]),
        ({"batch_size": 0}, ["batch_size is 0", "at least 1"]),
        ({"max_length": 0}, ["max_length is 0", "at least 1"]),
        ({"max_batches": 0}, ["max_batches is 0", "at least 1"]),
        ({"tolerance": 2}, ["tolerance is 2", "[0, 1)"]),
        ({"seed": -1}, ["seed is -1", "at least 0"]),
        ({"split": "test"}, ["texts.txt' has no split 'test'; choose one of train\n"]),
        (
            {"task": "image-classification"},
            ["feature-extraction, or give --images, which image-classification is for"],
        ),
        ({"task": "ctc"}, ["or give --audio, which ctc is for"]),
        ({"text_column": "body"}, ["no column 'body'", "text"]),
        ({"columns": "a,b,c,d"}, ["--columns names 4 columns", "instruction, input and output"]),
        ({"chat_template": "no.jinja"}, ["chat template 'no.jinja' does not exist", "Jinja"]),
        ({"data": "missing.csv"}, ["data 'missing.csv' does not exist"]),
        ({"data": "./missing"}, ["data './missing' does not exist"]),
        ({"model": "./missing"}, ["model './missing' does not exist", "hub id"]),
        ({"out": "/dev/null/out"}, ["'/dev/null/out' cannot be written", "--out"]),
        ({"no_such_option": True}, ["--no-such-option", "evatune init --help"]),
    ],
    ids=lambda value: (
        " ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else ""
    ),
)
def test_a_bad_option_is_named_with_what_is_allowed(
    init: Command, work: Path, option: dict[str, Any], parts: list[str]
) -> None:
    refused(init(**option), *parts, folder=work)


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("empty.txt", b"", ["empty.txt' is empty", "at least one text"]),
        ("blank.txt", b"\n\n  \n\t\n", ["blank.txt' holds no text", "give data"]),
        ("blank.csv", b"text,label\n,1\n , 2\n", ["blank.csv' holds no text", "'text'"]),
        ("two.csv", b"a,b\nx,y\n", ["2 columns of strings (a, b)", "--columns"]),
        ("numbers.csv", b"a,b\n1,2\n", ["none of the columns of", "(a, b) holds texts"]),
        ("torn.jsonl", b'{"text": "a"}\n{"text"', ["torn.jsonl'", "JSON"]),
        ("quote.csv", b'text,b\n"a,2\n3,4\n', ["quote.csv'", "EOF inside string"]),
        ("fake.parquet", b"PAR1 but not really", ["fake.parquet'", "Parquet"]),
        ("picture.png", b"\x89PNG", ["picture.png' is of a kind that is not read", ".jsonl"]),
        (
            "short.txt",
            b"w1 w2 w3\n",
            ["too_few_rows", "(3 rows for 8 components)", "give more data"],
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_data_are_named_with_what_to_try(
    init: Command, work: Path, tmp_path: Path, name: str, content: bytes, parts: list[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    refused(init(data=tmp_path / name), *parts, folder=work)


def test_a_folder_without_a_file_to_read_is_refused(
    init: Command, work: Path, tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "picture.png").write_bytes(b"\x89PNG")
    refused(init(data=tmp_path / "data"), "holds no file that ends in .txt", folder=work)


def test_a_folder_of_mixed_kinds_is_refused(init: Command, work: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_text("a")
    (tmp_path / "data" / "b.csv").write_text("text\nb\n")
    refused(init(data=tmp_path / "data"), "mixes kinds of files (.csv, .txt)", folder=work)


@pytest.mark.parametrize(
    ("option", "instead"),
    [
        ({"data": "nobody/nothing"}, "JSON Lines"),
        ({"model": "nobody/nothing"}, "config.json"),
        ({"model": "no"}, "config.json"),
    ],
)
def test_a_hub_that_does_not_answer_is_given_up_soon(
    init: Command, work: Path, no_network: None, option: dict[str, str], instead: str
) -> None:
    started = time.monotonic()
    answer = init(**option)
    assert time.monotonic() - started < 15
    refused(answer, repr(*option.values()), "the model hub cannot be reached", instead, folder=work)


def test_a_model_folder_without_weights_is_refused(
    init: Command, work: Path, bert_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(bert_folder, tmp_path / "bert")
    (tmp_path / "bert" / "model.safetensors").unlink()
    refused(init(model=tmp_path / "bert"), str(tmp_path / "bert"), "weights", folder=work)


def test_torn_weights_are_refused(
    init: Command, work: Path, bert_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(bert_folder, tmp_path / "bert")
    weights = tmp_path / "bert" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    refused(init(model=tmp_path / "bert"), str(tmp_path / "bert"), folder=work)


def test_a_model_folder_without_tokenizer_is_refused(
    init: Command, work: Path, bert_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(bert_folder, tmp_path / "bert", ignore=shutil.ignore_patterns("token*"))
    refused(init(model=tmp_path / "bert"), str(tmp_path / "bert"), "no tokenizer", folder=work)


def test_a_file_as_model_is_refused(init: Command, work: Path, text_file: Path) -> None:
    refused(init(model=text_file), "is a file", "config.json", folder=work)


def test_nan_in_the_model_names_layer_and_batch(
    init: Command, work: Path, bert_folder: Path, tmp_path: Path
) -> None:
    model = transformers.AutoModel.from_pretrained(bert_folder)
    with torch.no_grad():
        model.encoder.layer[1].intermediate.dense.weight[0, 0] = torch.nan
    save_model(model, tmp_path / "nan")
    refused(
        init(model=tmp_path / "nan"),
        "encoder.layer.1.output.dense (first in batch 1)",
        "NaN or Inf",
        folder=work,
    )


def test_a_tokenizer_of_another_model_is_refused(
    init: Command, work: Path, bert_folder: Path, tmp_path: Path
) -> None:
    model = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=10,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=64,
        )
    )
    folder = save_model(model, tmp_path / "small")
    refused(
        init(model=folder),
        "running the model on the data failed (IndexError",
        "tokenizer that fits",
        folder=work,
    )
