"""`evatune export`: what it writes, and what bad input gets."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import IA3Config, LoraConfig, LoraModel, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from evatune.adapters.export import export_uniform
from evatune.adapters.export.files import RECORD
from evatune.errors import AdapterError, ConfigError, RecordError
from evatune.utils.mark import MARK
from tests.conftest import Command, refused
from tests.helpers import (
    output,
    perturbed_adapter,
    tiny_bert,
    tokens,
    train_a_little,
    trained_adapter,
)

torch.set_num_threads(1)

PREFIX = "base_model.model."


@pytest.fixture
def adapter(bert_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a trained adapter of the tiny BERT on disk."""
    monkeypatch.chdir(tmp_path)
    base = transformers.AutoModel.from_pretrained(bert_folder)
    model = trained_adapter(base, task_type="FEATURE_EXTRACTION")
    model.save_pretrained(tmp_path / "adapter")
    return Path("adapter")


def bert_with(adapter: Path, bert_folder: Path) -> Tensor:
    return output(
        PeftModel.from_pretrained(
            transformers.AutoModel.from_pretrained(bert_folder), str(adapter)
        ),
        tokens()[0],
    )


def test_export_uniform_is_the_default(command: Command, adapter: Path, bert_folder: Path) -> None:
    answer = command("export", adapter, "-o", "out")
    assert answer.status == 0, answer.err
    rank = json.loads(Path("out/adapter_config.json").read_text())["r"]
    assert f"rank {rank}, alpha {3 * rank / 4:g}, 13 layers" in answer.out
    assert {path.name for path in Path("out").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        RECORD,
        MARK,
    }
    assert torch.allclose(
        bert_with(Path("out"), bert_folder), bert_with(adapter, bert_folder), atol=1e-6
    )
    assert str(bert_folder) not in Path("out/README.md").read_text()
    facts = json.loads(command("export", adapter, "--out", "again", "--json").out)
    assert (facts["out"], facts["format"], facts["rank"]) == ("again", "uniform", rank)


def test_export_merged_needs_no_peft_afterwards(
    command: Command, adapter: Path, bert_folder: Path
) -> None:
    answer = command("export", adapter, "-o", "out", "--format", "merged")
    assert answer.status == 0, answer.err
    merged = transformers.AutoModel.from_pretrained("out")
    assert torch.allclose(output(merged, tokens()[0]), bert_with(adapter, bert_folder), atol=1e-5)
    assert len(transformers.AutoTokenizer.from_pretrained("out")) == 60
    assert "merged into its weights" in Path("out/README.md").read_text()
    files = json.loads(Path("out", MARK).read_text())["files"]
    assert {*files, MARK} == {path.name for path in Path("out").iterdir()}


def test_options_about_the_base_model_are_refused_where_none_is_loaded(
    command: Command, tmp_path: Path
) -> None:
    for option in (["--model", "x"], ["--trust-remote-code"]):
        answer = command("export", tmp_path, "-o", tmp_path / "out", *option)
        refused(answer, f"{option[0]} is for --format merged, ", "this is uniform; leave it out")


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_tokens_that_were_added_for_the_adapter_are_in_the_merged_model(
    command: Command, llama_folder: Path, tmp_path: Path
) -> None:
    base = transformers.AutoModelForCausalLM.from_pretrained(llama_folder)
    base.resize_token_embeddings(64, mean_resizing=False)
    model = perturbed_adapter(base, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model.save_pretrained(tmp_path / "adapter")
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama_folder)
    tokenizer.add_tokens(["n1", "n2", "n3", "n4"])
    tokenizer.save_pretrained(tmp_path / "adapter")
    answer = command("export", tmp_path / "adapter", "-o", tmp_path / "out", "--format", "merged")
    assert answer.status == 0, answer.err
    batch = {"input_ids": torch.arange(64)[None, 40:]}
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.allclose(output(merged, batch), output(model, batch), atol=1e-6)
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path / "out")) == 64


def test_export_merged_of_a_classifier_brings_its_head(
    command: Command,
    bert_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        bert_folder, num_labels=5
    )
    model = get_peft_model(
        base, LoraConfig(task_type="SEQ_CLS", r=4, use_dora=True, target_modules=["query", "value"])
    )
    train_a_little(model, tokens()[0])
    model.save_pretrained("adapter")
    answer = command("export", "adapter", "-o", "out", "--format", "merged")
    assert answer.status == 0, answer.err
    merged = transformers.AutoModelForSequenceClassification.from_pretrained("out")
    assert torch.allclose(output(merged, tokens()[0]), output(model, tokens()[0]), atol=1e-5)


def break_folder(folder: Path, how: str) -> None:
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    facts, state = json.loads(config.read_text()), load_file(weights)
    if how == "torn":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif how == "no weights":
        weights.unlink()
    elif how == "no config":
        config.unlink()
    elif how == "without B":
        save_file({key: value for key, value in state.items() if "lora_B" not in key}, weights)
    elif how == "shapes":
        save_file(
            {
                key: value[:, :1].contiguous() if "lora_B" in key else value
                for key, value in state.items()
            },
            weights,
        )
    elif how == "magnitudes":
        save_file(state | {f"{PREFIX}a.lora_magnitude_vector": torch.ones(3)}, weights)
    else:
        config.write_text(json.dumps(facts | json.loads(how)))


@pytest.mark.parametrize(
    ("how", "parts"),
    [
        ("torn", ["adapter_model.safetensors' is damaged"]),
        ("no weights", ["holds no adapter_model.safetensors"]),
        ("no config", ["adapter_config.json' does not exist"]),
        ("without B", ["lacks A or B"]),
        ("shapes", ["do not fit each other"]),
        ("magnitudes", ["lora_magnitude_vector", "--format merged"]),
        ('{"peft_type": "IA3"}', ["type 'IA3'", "only LoRA"]),
        ('{"use_dora": true}', ["use_dora", "--format merged"]),
    ],
)
def test_a_damaged_or_other_adapter_is_refused(
    command: Command, adapter: Path, how: str, parts: list[str]
) -> None:
    break_folder(adapter, how)
    refused(
        command("export", adapter, "-o", "out"), *parts, folder=Path(), left=frozenset({"adapter"})
    )


@pytest.mark.parametrize(
    ("how", "parts"),
    [
        ("torn", ["adapter_model.safetensors' is damaged"]),
        ("no config", ["adapter_config.json' does not exist"]),
        ('{"peft_type": "IA3"}', ["type 'IA3'"]),
        ('{"base_model_name_or_path": null}', ["does not say what its base model is", "--model"]),
        (
            '{"base_model_name_or_path": "/no/such/model"}',
            ["'/no/such/model' does not exist", "--model"],
        ),
        ('{"r": 5, "rank_pattern": {}}', ["cannot be merged into BertModel", "size mismatch"]),
    ],
)
def test_what_cannot_be_merged_is_refused(
    command: Command, adapter: Path, how: str, parts: list[str]
) -> None:
    break_folder(adapter, how)
    answer = command("export", adapter, "-o", "out", "--format", "merged")
    refused(answer, *parts, folder=Path(), left=frozenset({"adapter"}))


def test_an_adapter_of_another_model_is_not_merged(
    command: Command, adapter: Path, llama_folder: Path
) -> None:
    answer = command("export", adapter, "-o", "out", "--format", "merged", "--model", llama_folder)
    refused(answer, "cannot be merged into", folder=Path(), left=frozenset({"adapter"}))


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--format", "gguf"], ["'gguf'", "uniform, merged"]),
        (["-o", "adapter", "--overwrite"], ["the adapter itself"]),
        (["-o", "there"], ["exists", "--overwrite"]),
        (["-o", "there", "--overwrite"], ["not written by evatune", "--out"]),
    ],
)
def test_bad_options_of_export_are_refused(
    command: Command, adapter: Path, arguments: list[str], parts: list[str]
) -> None:
    Path("there").mkdir()
    answer = command(
        "export", adapter, *(["-o", "out"] if "-o" not in arguments else []), *arguments
    )
    refused(answer, *parts, folder=Path(), left=frozenset({"adapter", "there"}))


def test_a_missing_adapter_and_a_missing_out_are_refused(command: Command, tmp_path: Path) -> None:
    refused(command("export", tmp_path / "none", "-o", tmp_path / "out"), "is not a folder")
    refused(command("export", tmp_path / "none"), "--out", "--help")


def test_overwrite_replaces_an_export_and_nothing_else(command: Command, adapter: Path) -> None:
    assert command("export", adapter, "-o", "out", "--format", "merged").status == 0
    refused(command("export", adapter, "-o", "out"), "exists", "--overwrite")
    assert command("export", adapter, "-o", "out", "--overwrite").status == 0
    assert not Path("out/model.safetensors").exists()
    Path("out/thesis.tex").write_text("years")
    refused(command("export", adapter, "-o", "out", "--overwrite"), "thesis.tex")
    assert {path.name for path in Path().iterdir()} == {"adapter", "out"}


def test_a_failure_while_writing_leaves_nothing(
    adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("evatune.adapters.export.uniform.write_card", fail)
    with pytest.raises(ConfigError, match="No space left"):
        export_uniform(adapter, "out")
    assert {path.name for path in Path().iterdir()} == {"adapter"}


def test_an_adapter_that_is_not_lora_is_refused_as_a_model_too(tmp_path: Path) -> None:
    model = get_peft_model(tiny_bert(), IA3Config(target_modules=["query"], feedforward_modules=[]))
    with pytest.raises(AdapterError, match="IA3Config"):
        export_uniform(model, tmp_path / "out")
    with pytest.raises(RecordError, match="does not exist"):
        export_uniform(tmp_path / "none", tmp_path / "out")


def test_what_evatune_init_wrote_can_be_exported(
    command: Command, bert_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    first = command(
        "init",
        "--model",
        bert_folder,
        "--data",
        text_file,
        "--rank",
        4,
        "--out",
        tmp_path / "adapter",
    )
    assert first.status == 0, first.err
    for kind in ("uniform", "merged"):
        answer = command("export", tmp_path / "adapter", "-o", tmp_path / kind, "--format", kind)
        assert answer.status == 0, answer.err
    shutil.rmtree(tmp_path / "adapter")
    assert torch.allclose(
        bert_with(tmp_path / "uniform", bert_folder),
        output(transformers.AutoModel.from_pretrained(tmp_path / "merged"), tokens()[0]),
        atol=1e-5,
    )


def test_a_merged_model_that_computes_something_else_is_not_written(
    command: Command, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = LoraModel.merge_and_unload

    def wrong(model: LoraModel, **options: Any) -> nn.Module:
        merged: nn.Module = plain(model, **options)
        with torch.no_grad():
            merged.get_submodule("encoder.layer.1.output.dense").weight.mul_(0.9)
        return merged

    monkeypatch.setattr(LoraModel, "merge_and_unload", wrong)
    answer = command("export", adapter, "-o", "out", "--format", "merged")
    refused(answer, "is off by", "nothing was written", folder=Path(), left=frozenset({"adapter"}))
