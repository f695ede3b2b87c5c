"""`evatune train`."""

from __future__ import annotations

from pathlib import Path

from evatune.utils.lock import lock_folder
from tests.conftest import Command, refused
from tests.finetune.helpers import SMALL


def test_the_main_run_on_minilm_writes_what_it_says(command: Command, tmp_path: Path) -> None:
    settings = ["data.train=64", "data.test=32", "training.steps=6", "training.eval_every=6"]
    found = command("train", "understanding-bbc", *settings, "--out", tmp_path / "run")
    assert found.status == 0, found.err
    assert "eva on bbc: score" in found.out
    for name in (
        "adapter",
        "calibration.safetensors",
        "metrics.jsonl",
        "report.html",
    ):
        assert (tmp_path / "run" / name).exists()
        assert name in found.out
    card = (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert "base_model: sentence-transformers/all-MiniLM-L6-v2" in card
    assert "fine-tuned by the method `eva`" in card


def test_mistakes_have_one_sentence_and_status_2(command: Command, tmp_path: Path) -> None:
    for arguments, text in (
        (["understanding-bbc", "method=best"], "method is 'best'; choose one of lora"),
        (["understanding-bbc", "task=nothing"], "tasks of language understanding are movie"),
        (["understanding-bbc", "domain=cooking"], "domain is 'cooking'"),
        (["understanding-bbc", "data.train=99999"], "has 2124 examples"),
        (["understanding-bbc", "model=./nowhere"], "model './nowhere' does not exist"),
        (
            ["understanding-bbc", "training.schedule=jumpy"],
            "training.schedule is 'jumpy': choose one of linear",
        ),
        (["understanding-bbc", "adapter.targets=nothing"], "match no layer of this model"),
        (["understanding-bbc", f"seed={2**40}"], "seed is 1099511627776"),
    ):
        refused(command("train", *arguments, "--out", tmp_path / "run"), text, folder=tmp_path)


def test_a_folder_is_for_one_process_at_a_time(
    bert_folder: Path,
    tmp_path: Path,
    command: Command,
) -> None:
    settings = [*SMALL, f"model={bert_folder}"]
    folder = tmp_path / "run"
    with lock_folder(folder):
        for name, method in (("train", ["method=head"]), ("compare", ["--methods", "head"])):
            answer = command(name, "understanding-bbc", *settings, *method, "--out", folder)
            refused(answer, "in use by another evatune train, compare or evaluate")
        assert [path.name for path in folder.iterdir()] == [".evatune.lock"]
    assert list(tmp_path.iterdir()) == []
