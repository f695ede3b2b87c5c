"""Outputs of commands are whole, in the place that was checked; nobody else's files are lost."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
from matplotlib.figure import Figure
from safetensors.torch import save_file

from evatune.calibration.checkpoint import Checkpoint
from evatune.errors import ConfigError
from evatune.finetune.comparison.grid import grid
from evatune.finetune.recipe_files import load
from evatune.finetune.run import run
from evatune.finetune.tasks.user_data import load_examples
from evatune.loading.batches import TextBatches
from evatune.loading.texts import load_texts
from evatune.report.plots import save_figure
from evatune.utils import system
from evatune.utils.outputs import claimed_file, claimed_folder
from tests.conftest import Command, refused, tiny_tokenizer
from tests.helpers import no_room, tree


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def precious(work: Path) -> None:
    """A folder of the user's."""
    (work / "precious").mkdir()
    (work / "precious" / "thesis.tex").write_text("years")


@pytest.mark.parametrize(
    "way",
    ["new/../precious", "a/b/../../precious", "link", "up/../precious", "up/../new/../precious"],
)
@pytest.mark.parametrize(
    "command_line",
    [
        "export precious -o {}",
        "export precious -o {} --overwrite",
        "init --model x --data y --out {}",
        "init --model x --data y --overwrite --out {}",
        "merge a b -o {}/thesis.tex",
        "merge a b --overwrite -o {}/thesis.tex",
        "train understanding-bbc --out {}",
        "compare understanding-bbc --out {}",
    ],
)
def test_a_folder_of_the_users_is_refused_however_it_is_named(
    command: Command, precious: None, way: str, command_line: str
) -> None:
    Path("inner").mkdir()
    Path("up").symlink_to("inner")  # whose parent is this folder
    Path("link").symlink_to("precious")
    before = tree()
    refused(command(*command_line.format(way).split()))
    assert tree() == before


def test_init_leaves_what_came_to_out_while_it_ran(
    command: Command,
    bert_folder: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    from evatune.report.pages import calibration

    render = calibration.render

    def late(*arguments: Any) -> str:
        Path("out").mkdir()
        Path("out/thesis.tex").write_text("years")
        return render(*arguments)

    monkeypatch.setattr(calibration, "render", late)
    answer = command(
        "init",
        "--model",
        bert_folder,
        "--data",
        text_file,
        "--max-batches",
        2,
        "--rank",
        4,
        "--out",
        "out",
    )
    refused(
        answer,
        "'out' cannot be replaced",
        "out.new",
        folder=Path(),
        left=frozenset({"out", "out.new"}),
    )
    assert tree("out") == {"thesis.tex": "years"}
    assert Path("out.new/calibration.safetensors").is_file()


def test_a_second_command_on_one_output_is_refused_at_once(command: Command) -> None:
    with claimed_folder("out", overwrite=False):
        for options in (
            "init --model x --data y --out other/../out",
            "export . -o out",
            "merge a b -o out",
        ):
            refused(command(*options.split()), "another evatune command is writing", "out'; wait")
    assert os.listdir() == []


def test_a_checkpoint_leaves_alone_what_is_none(tmp_path: Path) -> None:
    point = Checkpoint(tmp_path / "out.checkpoint")
    beside = tmp_path / ".out.checkpoint.notes"
    beside.write_text("years")
    tensors, record = {"a": torch.zeros(2)}, {"batches": 1}
    point.write(tensors, record)
    point.write(tensors, record)
    for content in (b"years", b""):
        point.path.write_bytes(content)
        for attempt in (
            point.require_own,
            lambda: point.write(tensors, record),
            lambda: point.read({}),
        ):
            with pytest.raises(ConfigError, match="was not written by evatune"):
                attempt()
        assert point.path.read_bytes() == content
    save_file(tensors, point.path)
    with pytest.raises(ConfigError, match="was not written by evatune"):
        point.write(tensors, record)
    point.path.unlink()
    point.write(tensors, record)
    point.remove()
    assert {path.name for path in tmp_path.iterdir()} == {".out.checkpoint.notes", "work"}


def test_a_checkpoint_that_became_another_file_is_not_removed(tmp_path: Path) -> None:
    point = Checkpoint(tmp_path / "point")
    point.write({"a": torch.zeros(2)}, {})
    before = system.entries_of(point.path)
    with claimed_file(point.path, True, lambda _: True) as output:
        point.path.write_text("years")
        assert system.entries_of(point.path) != before
        output.remove()
    assert point.path.read_text() == "years"


def test_init_refuses_before_its_work_a_checkpoint_that_is_none(
    command: Command, work: Path
) -> None:
    Path("out.checkpoint").write_text("years")
    answer = command("init", "--model", "x", "--data", "y", "--out", "out", "--checkpoint-every", 2)
    refused(
        answer,
        "out.checkpoint' exists and was not written by evatune",
        folder=work,
        left=frozenset({"out.checkpoint"}),
    )
    assert Path("out.checkpoint").read_text() == "years"


@pytest.mark.parametrize(
    "name", ["../../x", "/tmp/x", "a/b", "..", ".hidden", "", "a\\b", "a\nb", "a\x1b[1m", "x" * 101]
)
@pytest.mark.parametrize("key", ["task", "domain", "method"])
def test_a_name_of_a_recipe_that_would_lead_elsewhere_is_refused(name: str, key: str) -> None:
    tree = {"domain": "understanding", "task": "bbc"} | {key: name}
    Path("recipe.yaml").write_text(json.dumps(tree))
    with pytest.raises(ConfigError, match=f"{key} is "):
        load("recipe.yaml")


def test_compare_writes_nothing_outside_its_folder(command: Command, work: Path) -> None:
    Path("recipe.yaml").write_text(json.dumps({"task": "../../outside", "data": {"source": "x"}}))
    refused(
        command("compare", "recipe.yaml", "--out", "deep/out"),
        "task is '../../outside'",
        "file's name",
    )
    assert os.listdir() == ["recipe.yaml"]
    cells = grid([load("understanding-bbc")], ["lora"], [0], [], Path("out"))
    assert all(cell.folder.resolve().parent == work / "out" for cell in cells)


def test_longer_names_are_refused_before_the_work(command: Command) -> None:
    options = ["--model", "x", "--data", "y"]
    refused(command("init", *options, "--out", "x" * 256), "File name too long", folder=Path())
    refused(
        command("init", *options, "--out", "x" * 250, "--checkpoint-every", 2),
        "File name too long",
        folder=Path(),
    )
    refused(command("merge", "a", "b", "-o", "x" * 256), "File name too long", folder=Path())


def test_a_plot_follows_no_link_that_lies_ready(work: Path) -> None:
    Path("thesis").write_text("years")
    for name in (".curves.png", "curves.png"):
        Path(name).symlink_to("thesis")
    save_figure(Figure(), work / "curves.png")
    assert Path("thesis").read_text() == "years"
    assert not Path("curves.png").is_symlink()
    assert Path("curves.png").read_bytes().startswith(b"\x89PNG")
    assert len(os.listdir()) == 3


def test_reading_a_saved_data_set_leaves_nothing_in_its_folder(work: Path) -> None:
    rows = {"text": ["w1 w2", "", "w3"] * 4, "label": [0, 1, 0] * 4}
    datasets.Dataset.from_dict(rows).save_to_disk("data")
    datasets.DatasetDict({"train": datasets.Dataset.from_dict(rows)}).save_to_disk("splits")
    before = {path: path.stat().st_mtime_ns for path in work.rglob("*")}
    for folder in ("data", "splits"):
        found = load_texts(work / folder, "text")
        assert len(list(TextBatches(tiny_tokenizer(), found, 4, 8, seed=0))) == 2
        recipe = load(
            "understanding-bbc",
            ["task=mine", f"data.source={work / folder}", "data.train=4", "data.test=2"],
        )
        load_examples(recipe, lambda table: table, [], "x")
    assert {path: path.stat().st_mtime_ns for path in work.rglob("*")} == before


def test_init_export_and_merge_without_room(
    command: Command,
    bert_folder: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    init = [
        "init",
        "--model",
        bert_folder,
        "--data",
        text_file,
        "--max-batches",
        2,
        "--rank",
        4,
        "--batch-size",
        8,
    ]
    assert command(*init, "--out", "adapter", "--seed", 1).status == 0
    assert command(*init, "--out", "other").status == 0
    assert command("export", "adapter", "-o", "out").status == 0
    calibrations = [f"{name}/calibration.safetensors" for name in ("adapter", "other")]
    assert command("merge", *calibrations, "-o", "m").status == 0
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    with no_room(20_000):
        refused(
            command(*init, "--out", "other", "--overwrite"),
            "'other' cannot be written (File too large)",
        )
        refused(
            command(*init, "--out", "other", "--overwrite", "--checkpoint-every", 1),
            "other.checkpoint' cannot be wr",
        )
        refused(
            command("export", "adapter", "-o", "out", "--overwrite"),
            "'out' cannot be written (File too large)",
        )
        merged = ["export", "adapter", "-o", "out", "--overwrite", "--format", "merged"]
        refused(command(*merged), "'out' cannot be written (File too large)")
        refused(
            command("merge", *calibrations, "-o", "m", "--overwrite"),
            "'m' cannot be written (File too large)",
        )
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before


def test_a_training_run_without_room_for_its_checkpoint_goes_on_later(
    bert_folder: Path, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = transformers.Trainer._save_checkpoint

    def full(self: Any, *arguments: Any, **options: Any) -> None:
        with no_room(10_000):
            whole(self, *arguments, **options)

    recipe = load(
        "understanding-bbc",
        [
            f"model={bert_folder}",
            "method=lora",
            "data.train=48",
            "data.test=24",
            "training.steps=6",
            "training.batch_size=8",
            "training.eval_every=3",
            "training.save_every=2",
            "adapter.rank=4",
        ],
    )
    with monkeypatch.context() as patch:
        patch.setattr(transformers.Trainer, "_save_checkpoint", full)
        with pytest.raises(ConfigError, match=r"checkpoints' cannot be written .*; make room"):
            run(recipe, work / "run", quiet=True)
    with pytest.warns(
        UserWarning, match=r"checkpoint-2' cannot be gone on from: it lacks trainer_state\.json"
    ):
        assert run(recipe, work / "run", quiet=True)["steps"] == 6
