"""Fine-tuning by recipes: runs, methods, resuming, comparing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from evatune.errors import BudgetError, ConfigError, DataError
from evatune.finetune.compare import grid, run_all
from evatune.finetune.methods import METHODS
from evatune.finetune.methods.eva import Eva, MinorDirections
from evatune.finetune.metrics import METRICS, read_metrics
from evatune.finetune.recipe import Recipe, load
from evatune.finetune.run import run
from evatune.finetune.run_folder import RECIPE, RESULT
from evatune.finetune.summary import summarize
from evatune.finetune.tasks import understanding
from evatune.loading import assets as store
from evatune.loading import corpora
from evatune.utils.lock import held
from tests.conftest import Command, refused

torch.set_num_threads(1)

SMALL = [
    "data.train=48",
    "data.test=24",
    "training.steps=6",
    "training.batch_size=8",
    "training.log_every=1",
    "training.eval_every=3",
    "training.save_every=2",
    "adapter.rank=4",
]


# To the tiny tokenizer every text is one unknown word over and over: the input of the pooler has
# one direction, which is too few where every layer must keep its rank.
MORE = {"eva-rho1": ["adapter.targets=[query,key,value]"]}


def small(model: Path | str, *more: str) -> Recipe:
    return load("understanding-bbc", [*SMALL, f"model={model}", *more])


def evatune(*arguments: Any, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "evatune", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, env=environment, check=False
    )


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_and_reports(method: str, bert_folder: Path, tmp_path: Path) -> None:
    result = run(
        small(bert_folder, f"method={method}", *MORE.get(method, [])), tmp_path / "run", quiet=True
    )
    assert 0 <= result["score"] <= 1
    assert (result["trainable_parameters"] > 0) == (method != "untouched")
    lines = read_metrics(tmp_path / "run")
    if method == "untouched":
        return
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 3, 6]
    if METHODS[method].saved_as == "adapter":
        assert (
            all({"grad_norm_A"} <= line.keys() for line in lines if "loss" in line)
            or method == "adalora"
        )
    assert (tmp_path / "run" / "calibration.safetensors").exists() == (
        isinstance(METHODS[method], (Eva, MinorDirections))
    )


@pytest.mark.parametrize(
    "method", ["lora", "pissa", "olora", "milora", "corda", "lora-ga", "mica", "eva", "eva-dora"]
)
def test_a_saved_adapter_gives_its_score_on_the_untouched_base_model(
    method: str, bert_folder: Path, tmp_path: Path
) -> None:
    result = run(
        small(bert_folder, f"method={method}", "training.learning_rate=0.01"),
        tmp_path / "run",
        quiet=True,
    )
    base = AutoModelForSequenceClassification.from_pretrained(bert_folder, num_labels=5)
    model = PeftModel.from_pretrained(base, str(tmp_path / "run" / "adapter")).eval()
    task = understanding.prepare(small(bert_folder))
    batch = task.collator(list(task.test))
    with torch.no_grad():
        loss = float(model(**batch).loss)
    assert loss == pytest.approx(result["eval_loss"], abs=1e-4)


def test_only_the_head_learns_with_head_and_all_with_full(
    bert_folder: Path, tmp_path: Path
) -> None:
    head = run(small(bert_folder, "method=head"), tmp_path / "head", quiet=True)
    full = run(small(bert_folder, "method=full"), tmp_path / "full", quiet=True)
    assert head["trainable_parameters"] == 32 * 5 + 5
    total = sum(
        p.numel()
        for p in AutoModelForSequenceClassification.from_pretrained(
            bert_folder, num_labels=5
        ).parameters()
    )
    assert full["trainable_parameters"] == total


def test_the_ranks_of_lora_redist_are_evas_and_its_directions_are_not(
    bert_folder: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    for method in ("eva", "lora-redist"):
        run(
            small(bert_folder, f"method={method}", "training.learning_rate=1e-9"),
            tmp_path / method,
            quiet=True,
        )
    ours, random = (
        load_file(tmp_path / m / "adapter" / "adapter_model.safetensors")
        for m in ("eva", "lora-redist")
    )
    a = [key for key in ours if "lora_A" in key]
    assert {key: ours[key].shape for key in a} == {key: random[key].shape for key in a}
    assert not any(torch.allclose(ours[key], random[key]) for key in a)


def test_equal_seeds_give_equal_runs(bert_folder: Path, tmp_path: Path) -> None:
    first, second = (run(small(bert_folder), tmp_path / name, quiet=True) for name in ("a", "b"))
    assert first["eval_loss"] == second["eval_loss"]


def test_a_finished_run_is_read_and_not_run_again(bert_folder: Path, tmp_path: Path) -> None:
    first = run(small(bert_folder), tmp_path / "run", quiet=True)
    written = (tmp_path / "run" / RESULT).stat().st_mtime_ns
    assert run(small(bert_folder), tmp_path / "run", quiet=True) == first
    assert (tmp_path / "run" / RESULT).stat().st_mtime_ns == written


def test_a_folder_with_another_run_is_left_alone(bert_folder: Path, tmp_path: Path) -> None:
    run(small(bert_folder, "method=head"), tmp_path / "run", quiet=True)
    with pytest.raises(ConfigError, match="other settings \\(they differ in method\\)"):
        run(small(bert_folder, "method=lora"), tmp_path / "run", quiet=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(ConfigError, match="holds no run of evatune"):
        run(small(bert_folder), tmp_path / "mine", quiet=True)


def test_one_of_several_processes_is_refused(
    bert_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        ConfigError, match="this is one of 2 processes, and evatune train is for one"
    ):
        run(small(bert_folder), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", ["lora", "eva", "lora-ga"])
def test_a_killed_run_resumes_and_ends_like_one_that_was_not(
    method: str, bert_folder: Path, tmp_path: Path
) -> None:
    recipe = small(bert_folder, f"method={method}", "training.steps=12")
    whole = run(recipe, tmp_path / "whole", quiet=True)
    settings = [*SMALL, f"model={bert_folder}", f"method={method}", "training.steps=12"]
    out = tmp_path / "killed"
    command = [
        sys.executable,
        "-m",
        "evatune",
        "train",
        "understanding-bbc",
        *settings,
        "--out",
        str(out),
        "--json",
    ]
    process = subprocess.Popen(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while (
        not (out / "checkpoints" / "checkpoint-4" / "trainer_state.json").exists()
        and time.monotonic() < deadline
    ):
        assert process.poll() is None or (out / RESULT).exists()
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    resumed = run(recipe, out, quiet=True)
    assert resumed["eval_loss"] == pytest.approx(whole["eval_loss"], abs=1e-6)
    losses = [
        [line["loss"] for line in read_metrics(folder) if "loss" in line]
        for folder in (tmp_path / "whole", out)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert evaluations(out) == pytest.approx(evaluations(tmp_path / "whole"), abs=1e-6)


def evaluations(folder: Path) -> dict[int, float]:
    """Step → evaluation loss; each step is evaluated once."""
    lines = [line for line in read_metrics(folder) if "eval_loss" in line]
    found = {line["step"]: line["eval_loss"] for line in lines}
    assert len(found) == len(lines)
    return found


def test_a_run_killed_before_its_first_checkpoint_begins_anew(
    bert_folder: Path,
    tmp_path: Path,
) -> None:
    recipe = small(bert_folder)
    run(recipe, tmp_path / "whole", quiet=True)
    killed = tmp_path / "killed"
    killed.mkdir()
    shutil.copy(tmp_path / "whole" / RECIPE, killed)
    lines = (tmp_path / "whole" / METRICS).read_text().splitlines(keepends=True)
    (killed / METRICS).write_text("".join(lines[:2]))
    run(recipe, killed, quiet=True)
    assert len(read_metrics(killed)) == len(lines)
    assert evaluations(killed) == evaluations(tmp_path / "whole")


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        (["method=eva-rho1"], BudgetError),  # the pooler has one direction, see MORE
        (["training.report_to=[nothing]"], ConfigError),
        (["method=pissa"], KeyboardInterrupt),
    ],
)
def test_a_run_that_ends_before_it_trains_leaves_the_folder_free(
    settings: list[str],
    error: type[BaseException],
    bert_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if error is KeyboardInterrupt:  # when the method has changed the weights, and written how
        monkeypatch.setattr(transformers.Trainer, "train", interrupted)
    with pytest.raises(error):
        run(small(bert_folder, *settings), tmp_path / "run", quiet=True)
    assert list(tmp_path.iterdir()) == []


def interrupted(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_a_folder_is_for_one_process_at_a_time(
    bert_folder: Path,
    tmp_path: Path,
    command: Command,
) -> None:
    settings = [*SMALL, f"model={bert_folder}", "method=head"]
    folder = tmp_path / "run"
    with held(folder):
        for name in ("train", "compare"):
            answer = command(name, "understanding-bbc", *settings, "--out", folder)
            refused(answer, "in use by another evatune train or compare")
        assert [path.name for path in folder.iterdir()] == [".evatune.lock"]
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_free_when_its_holder_was_killed(tmp_path: Path) -> None:
    code = f"""if True:
        import time
        from pathlib import Path
        from evatune.tasks.lock import held
        with held(Path({str(tmp_path / "run")!r})):
            print("held", flush=True)
            time.sleep(600)
    """
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match="in use"), held(tmp_path / "run"):
            pass
        holder.kill()
    with held(tmp_path / "run"):
        (tmp_path / "run" / "result").write_text("")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["result"]


def test_mistakes_have_one_sentence_and_status_2(command: Command, tmp_path: Path) -> None:
    for arguments, text in (
        (["understanding-bbc", "method=best"], "method is 'best'; choose one of lora"),
        (["understanding-bbc", "task=nothing"], "tasks of language understanding are movie"),
        (["understanding-bbc", "domain=cooking"], "domain is 'cooking'"),
        (["understanding-bbc", "data.train=99999"], "has 2124 examples"),
        (["understanding-bbc", "model=./nowhere"], "model './nowhere' does not exist"),
        (
            ["understanding-bbc", "training.schedule=jumpy"],
            "training.schedule is 'jumpy'; choose one of linear",
        ),
        (["understanding-bbc", "adapter.targets=nothing"], "match no layer of this model"),
        (["understanding-bbc", f"seed={2**40}"], "seed is 1099511627776"),
    ):
        refused(command("train", *arguments, "--out", tmp_path / "run"), text, folder=tmp_path)


def test_a_comparison_keeps_what_is_done_and_goes_on(bert_folder: Path, tmp_path: Path) -> None:
    recipe = small(bert_folder, "training.steps=4")
    runs = grid([recipe], ["head", "eva"], [0, 1], [1e-2], tmp_path)
    assert len(runs) == 4
    run(runs[0].recipe, runs[0].folder, quiet=True)
    before = (runs[0].folder / RESULT).stat().st_mtime_ns
    told: list[Any] = []
    assert run_all(runs, 2, lambda run_, problem: told.append((run_.folder.name, problem))) == {}
    assert len(told) == 4
    assert (runs[0].folder / RESULT).stat().st_mtime_ns == before
    found = summarize(runs)
    assert {line.method: line.seeds for line in found.lines} == {"head": 2, "eva": 2}
    heads = [
        json.loads((run_.folder / RESULT).read_text())["eval_loss"]
        for run_ in runs
        if run_.recipe.method == "head"
    ]
    assert found.targets == {"bbc": max(heads)}
    assert next(line.steps_to_target for line in found.lines if line.method == "head") is not None
    assert all(line.score.deviation is not None and line.best for line in found.lines)
    assert found.averages().keys() == {"head", "eva"}


def test_a_failing_cell_does_not_end_the_others(bert_folder: Path, tmp_path: Path) -> None:
    recipe = small(bert_folder, "training.steps=4")
    runs = grid([recipe], ["head"], [0, 1], [], tmp_path)
    runs[0].folder.mkdir(parents=True)
    (runs[0].folder / "foreign").write_text("")
    failed = run_all(runs, 2, lambda *_: None)
    assert list(failed) == [runs[0].folder]
    assert "holds no run of evatune" in failed[runs[0].folder]
    assert runs[1].done


def test_an_interrupted_comparison_stops_at_once_and_goes_on(
    bert_folder: Path, tmp_path: Path
) -> None:
    import psutil

    out = tmp_path / "c"
    settings = [
        *SMALL,
        f"model={bert_folder}",
        "training.steps=10000",
        "--methods",
        "lora",
        "--seeds",
        "0,1,2",
    ]
    command = [
        sys.executable,
        "-m",
        "evatune",
        "compare",
        "understanding-bbc",
        *settings,
        "--workers",
        "1",
        "--out",
        str(out),
    ]
    process = subprocess.Popen(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not list(out.glob("cells/*/metrics.jsonl")) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.1)
    workers = psutil.Process(process.pid).children(recursive=True)
    assert workers
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=20)
    _, alive = psutil.wait_procs(workers, timeout=5)
    assert alive == []
    assert process.returncode == 130
    assert printed == ""
    assert "Traceback" not in errors
    assert errors.splitlines()[-1].startswith("evatune: interrupted; train and compare go on")
    (run_,) = (out / "cells").iterdir()  # the other two have not begun
    assert (run_ / METRICS).exists()
    assert not (out / ".evatune.lock").exists()


def test_ray_runs_the_same_cells(bert_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="the extra ray is not installed")
    recipe = small(bert_folder, "training.steps=2", "training.eval_every=2")
    runs = grid([recipe], ["head"], [0, 1], [], tmp_path)
    runs[1].folder.mkdir(parents=True)
    (runs[1].folder / "foreign").write_text("")
    told: list[Path] = []
    failed = run_all(runs, 1, lambda run_, _: told.append(run_.folder), "ray")
    assert sorted(told) == sorted(run_.folder for run_ in runs)
    assert runs[0].done
    assert "holds no run of evatune" in failed[runs[1].folder]
    again = run(runs[0].recipe, tmp_path / "here", quiet=True)
    assert summarize(runs).lines[0].eval_loss.mean == pytest.approx(again["eval_loss"], abs=1e-6)


def test_executors_are_named_and_ray_names_its_extra(
    bert_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = grid([small(bert_folder)], ["head"], [0], [], tmp_path)
    with pytest.raises(ConfigError, match="executor is 'slurm'; choose one of process, ray"):
        run_all(runs, 1, lambda *_: None, "slurm")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'evatune\[ray\]'"):
        run_all(runs, 1, lambda *_: None, "ray")


def test_the_command_compares_and_shows(bert_folder: Path, tmp_path: Path) -> None:
    found = evatune(
        "compare",
        "understanding-bbc",
        *SMALL,
        "training.steps=4",
        f"model={bert_folder}",
        "--methods",
        "lora,eva",
        "--seeds",
        "0",
        "--lrs",
        "1e-3,1e-2",
        "--out",
        tmp_path / "c",
        "--workers",
        "2",
        "--json",
    )
    assert found.returncode == 0, found.stderr
    facts = json.loads(found.stdout)
    assert len(facts["lines"]) == 4
    assert facts["failed"] == {}
    assert facts["averages"].keys() == {"lora", "eva"}
    table = (tmp_path / "c" / "comparison.md").read_text()
    assert table.count("| bbc |") == 4
    assert "`evatune compare understanding-bbc" in table
    assert (tmp_path / "c" / "curves.png").stat().st_size > 1000


def test_the_main_run_on_minilm_writes_what_it_says(tmp_path: Path) -> None:
    settings = ["data.train=64", "data.test=32", "training.steps=6", "training.eval_every=6"]
    found = evatune("train", "understanding-bbc", *settings, "--out", tmp_path / "run")
    assert found.returncode == 0, found.stderr
    assert "eva on bbc: score" in found.stdout
    for name in (
        "adapter",
        "calibration.safetensors",
        "curves.png",
        "metrics.jsonl",
        "ranks.png",
        "report.html",
    ):
        assert (tmp_path / "run" / name).exists()
        assert name in found.stdout


@pytest.mark.parametrize("columns", [["text"], ["text", "other"]])
def test_texts_of_the_user_are_read(columns: list[str], bert_folder: Path, tmp_path: Path) -> None:
    rows = [
        {"text": f"w{i} w2", "other": "w3", "label": "yes" if i % 2 else "no"} for i in range(40)
    ]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = [
        "task=mine",
        f"data.source={tmp_path / 'mine.jsonl'}",
        f"data.columns={columns}",
        "data.train=24",
        "data.test=16",
    ]
    task = understanding.prepare(small(bert_folder, *own))
    assert len(task.train) == 24
    assert set(task.train["labels"]) == {0, 1}
    assert set(map(len, task.train["input_ids"])) == {1 + len(columns)}


@pytest.mark.parametrize(
    ("label", "more", "text"),
    [
        (7, [], "holds the label 7; its 2 classes must be names, or numbers from 0 to 1"),
        (1, ["data.label_column=class"], "has no column 'class'; it has text, label"),
        (1, ["data.columns=[words]"], "has no column 'words'; it has text, label"),
        (1, ["data.train_split=first"], "first"),
    ],
)
def test_mistakes_in_data_of_the_user_name_the_column(
    label: int, more: list[str], text: str, bert_folder: Path, tmp_path: Path
) -> None:
    rows = [{"text": "w1 w2", "label": label if i % 2 else 0} for i in range(40)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=text):
        understanding.prepare(
            small(
                bert_folder,
                "task=mine",
                f"data.source={tmp_path / 'mine.jsonl'}",
                "data.train=24",
                "data.test=16",
                *more,
            )
        )


def test_sentiment_has_both_labels_and_no_neutral_text() -> None:
    texts, labels = corpora.sentiment("tweet")
    assert len(texts) == len(labels) > 3000
    assert 0.2 < sum(labels) / len(labels) < 0.8


def test_built_data_is_read_again_and_rebuilt_when_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVATUNE_CACHE", str(tmp_path))
    calls: list[int] = []

    def build() -> dict[str, torch.Tensor]:
        calls.append(1)
        return {"x": torch.arange(6).reshape(2, 3)}

    for _ in range(2):
        assert store.built("thing", {"version": 1}, build)["x"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert len(calls) == 1
    store.built("thing", {"version": 2}, build)
    assert len(calls) == 2
    for path in tmp_path.iterdir():
        raw = bytearray(path.read_bytes())
        raw[-1] ^= 1
        path.write_bytes(raw)
    store.built("thing", {"version": 1}, build)
    assert len(calls) == 3
