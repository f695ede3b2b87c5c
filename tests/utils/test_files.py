"""Outputs are whole, in the one place that was judged, and nobody else's files are lost."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import save_file

from evatune.calibration.checkpoint import Checkpoint
from evatune.errors import ConfigError
from evatune.finetune.compare import grid
from evatune.finetune.recipe import load
from evatune.finetune.run import run
from evatune.finetune.tasks.user_data import split
from evatune.loading.texts import TextBatches, load_texts
from evatune.report.runs import run_plot
from evatune.utils import files
from evatune.utils.files import MARK, atomic_file, claimed_file, claimed_folder, write_text, writing
from tests.conftest import Command, refused, tiny_tokenizer
from tests.finetune.test_run import small

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def write(
    out: str | Path, text: str, overwrite: bool = True, meanwhile: Callable[[], None] = lambda: None
) -> None:
    with claimed_folder(out, overwrite) as output, output.whole() as made:
        meanwhile()
        (made / "sub").mkdir()
        for name in ("a", "sub/b"):
            (made / name).write_text(text)


def tree(folder: Path | str = ".") -> dict[str, str | None]:
    """Return every path below, hidden ones as well, with its text."""
    return {
        path.relative_to(folder).as_posix(): path.read_text() if path.is_file() else None
        for path in sorted(Path(folder).rglob("*"))
    }


def texts(folder: Path | str) -> set[str | None]:
    return {text for name, text in tree(folder).items() if text is not None and name != MARK}


@pytest.fixture
def precious(work: Path) -> None:
    """A folder of the user's."""
    (work / "precious").mkdir()
    (work / "precious" / "thesis.tex").write_text("years")


# -- killed ----------------------------------------------------------------------------------------


def test_killed_at_any_moment_a_command_leaves_the_old_or_the_new_and_the_next_one_succeeds(
    tmp_path: Path,
) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "kills.py"), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    kills = {
        name: int(count)
        for count, _, name in (line.partition(" ") for line in done.stdout.splitlines())
    }
    assert len(kills) == 7
    assert min(kills.values()) > 15, kills


@pytest.mark.parametrize(
    "left", [{}, {"lock": b""}, {"mark": b""}, {"mark": b'{"form', "lock": b""}]
)
def test_what_a_command_killed_at_its_very_start_left_is_cleared(left: dict[str, bytes]) -> None:
    Path(".out.evatune").mkdir()
    for name, content in left.items():
        (Path(".out.evatune") / name).write_bytes(content)
    write("out", "new", overwrite=False)
    assert os.listdir() == ["out"]


def test_half_a_journal_means_that_nothing_was_exchanged() -> None:
    write("out", "old")
    with claimed_folder("out", overwrite=True) as output:
        made = output._stage.making
        (made / "a").write_text("half")
        (made.parent / "journal").write_text('[{"": [1')
        output._stage.clear()
    assert texts("out") == {"old"}
    assert os.listdir() == ["out"]


# -- one path, judged and written as one -----------------------------------------------------------


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


def test_a_way_through_folders_that_do_not_exist_writes_where_it_leads_and_makes_no_more() -> None:
    write("new/../out", "text")
    assert os.listdir() == ["out"]
    with claimed_folder("new/../other", overwrite=False) as output:
        assert output.shown == Path("other").absolute()
    assert os.listdir() == ["out"]


def test_a_link_at_out_is_followed_and_stays_a_link() -> None:
    write("real", "old")
    Path("link").symlink_to("real")
    write("link", "new")
    assert Path("link").is_symlink()
    assert texts("real") == {"new"}
    Path("dangling").symlink_to("later")
    write("dangling", "text", overwrite=False)
    assert texts("later") == {"text"}


def test_a_relative_path_is_that_of_the_start_wherever_one_goes(work: Path, tmp_path: Path) -> None:
    with claimed_folder("out", overwrite=False) as output:
        os.chdir(tmp_path)
        with output.whole() as made:
            (made / "a").write_text("text")
    assert os.listdir(work) == ["out"]


# -- judged at the start, written at the end -------------------------------------------------------


@pytest.mark.parametrize("before", ["nothing", "ours"])
@pytest.mark.parametrize("comes", ["folder", "file", "link"])
def test_what_comes_to_out_while_a_command_runs_stays_and_the_result_lies_beside_it(
    before: str, comes: str
) -> None:
    if before == "ours":
        write("out", "old")

    def come() -> None:
        if before == "ours":
            Path("out").rename("moved")
        if comes == "folder":
            Path("out").mkdir()
        elif comes == "file":
            Path("out").write_text("years")
        else:
            Path("out").symlink_to("elsewhere")

    with pytest.raises(
        ConfigError, match=r"has come there, or has changed, .* the new one is '.*out\.new'"
    ):
        write("out", "new", overwrite=before == "ours", meanwhile=come)
    assert {"out", "out.new"} == set(os.listdir()) - {"moved"}
    assert Path("out").is_symlink() or texts("out") == set() or Path("out").read_text() == "years"
    assert texts("out.new") == {"new"}
    Path("out").rename("elsewhere")
    Path("out.new").rename("out")
    write("out", "newer")  # what lay aside is as much ours as any


@pytest.mark.parametrize("change", ["add", "edit", "nested", "empty"])
def test_what_is_put_into_ours_while_a_command_runs_stays(change: str) -> None:
    write("out", "old")
    changed = {"add": "out/thesis", "edit": "out/a", "nested": "out/sub/c", "empty": "out/folder"}[
        change
    ]
    before: dict[str, str | None] = {}

    def put() -> None:
        Path(changed).mkdir() if change == "empty" else Path(changed).write_text("OLD")
        before.update(tree("out"))

    with pytest.raises(ConfigError, match="left alone"):
        write("out", "new", meanwhile=put)
    assert tree("out") == before
    assert set(os.listdir()) == {"out", "out.new"}


def test_what_changes_in_the_very_moment_of_the_exchange_comes_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write("out", "old")
    exchange = files._renameat2
    moments = iter([lambda: Path("out/thesis").write_text("years")])

    def late(path: Path, target: Path, flags: int) -> bool:
        if flags == files._EXCHANGE:
            next(moments, lambda: 0)()
        return exchange(path, target, flags)

    monkeypatch.setattr(files, "_renameat2", late)
    with pytest.raises(ConfigError, match="left alone"):
        write("out", "new")
    assert texts("out") == {"old", "years"}
    assert texts("out.new") == {"new"}


def test_a_failing_exchange_keeps_the_old_in_place_and_the_new_beside_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write("out", "old")
    exchange = files._renameat2

    def fail(path: Path, target: Path, flags: int) -> bool:
        if flags == files._EXCHANGE:
            raise OSError(errno.EIO, "Input/output error")
        return exchange(path, target, flags)

    monkeypatch.setattr(files, "_renameat2", fail)
    with pytest.raises(ConfigError, match=r"Input/output error.*out\.new"):
        write("out", "new")
    assert texts("out") == {"old"}
    assert set(os.listdir()) == {"out", "out.new"}


def test_init_leaves_what_came_to_out_while_it_ran(
    command: Command,
    bert_folder: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    from evatune.report import page

    render = page.render

    def late(*arguments: Any) -> str:
        Path("out").mkdir()
        Path("out/thesis.tex").write_text("years")
        return render(*arguments)

    monkeypatch.setattr(page, "render", late)
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


def test_of_two_processes_one_writes_and_the_other_is_refused(work: Path) -> None:
    code = (
        "import sys, time; from tests.kills import light_files; files = light_files()\n"
        "with files.claimed_folder(sys.argv[1], True) as output, output.whole() as made:\n"
        "    (made / 'a').write_text('text'); time.sleep(1)\n"
    )
    run = [sys.executable, "-c", code, str(work / "out")]
    both = [subprocess.Popen(run, cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = {process.communicate(timeout=60)[1][-200:] for process in both}
    assert sorted(process.returncode for process in both) == [0, 1], errors
    assert any("another evatune command is writing" in error for error in errors)
    assert texts("out") == {"text"}


# -- ours by a list with content -------------------------------------------------------------------


def forged(folder: Path, **changes: Any) -> None:
    record = json.loads((folder / MARK).read_text()) | changes
    (folder / MARK).write_text(json.dumps(record))


@pytest.mark.parametrize(
    "change",
    [
        "add",
        "edit",
        "same size",
        "nested",
        "empty folder",
        "link for file",
        "link for folder",
        "no list",
        "list is a link",
        "other format",
        "deep list",
        "list of names",
    ],
)
def test_a_folder_is_replaced_only_if_it_holds_what_the_list_says(change: str, work: Path) -> None:
    write("out", "old")
    out = work / "out"
    if change == "add":
        (out / "calibration.safetensors").write_text("years")
    elif change in ("edit", "same size"):
        (out / "a").write_text("OLD" if change == "same size" else "years")
    elif change == "nested":
        (out / "sub" / "thesis").write_text("years")
    elif change == "empty folder":
        (out / "sub" / "folder").mkdir()
    elif change == "link for file":
        (out / "a").rename(work / "a")
        (out / "a").symlink_to(work / "a")
    elif change == "link for folder":
        (out / "sub").rename(work / "sub")
        (out / "sub").symlink_to(work / "sub")
    elif change == "no list":
        (out / MARK).unlink()
        (out / "export.json").write_text(json.dumps({"files": os.listdir(out)}))
    elif change == "list is a link":
        (out / MARK).rename(work / "list")
        (out / MARK).symlink_to(work / "list")
    elif change == "other format":
        forged(out, format="evatune-output-0")
    elif change == "deep list":
        (out / MARK).write_text("[" * 100_000)
    else:
        forged(out, files=["a", "sub/b"])
    before = tree()
    with (
        pytest.raises(ConfigError, match="--overwrite leaves it alone"),
        claimed_folder("out", overwrite=True),
    ):
        pass
    assert tree() == before


def test_a_folder_from_which_the_user_took_a_file_is_replaced() -> None:
    write("out", "old")
    Path("out/a").unlink()
    write("out", "new")
    assert texts("out") == {"new"}


@pytest.mark.parametrize("content", ["folder", "making", "lock", "mark", "link"])
def test_a_folder_of_the_users_at_the_temporary_name_is_in_the_way_and_stays(
    content: str, work: Path
) -> None:
    stage = work / ".out.evatune"
    if content == "link":
        (work / "mine").mkdir()
        stage.symlink_to("mine")
    else:
        stage.mkdir()
        (stage / ("thesis" if content == "folder" else content)).write_text("years")
    before = tree()
    with pytest.raises(ConfigError, match="is in the way"):
        write("out", "new")
    with pytest.raises(ConfigError, match="is in the way"):
        write_text(Path("out"), "new")
    assert tree() == before


def test_a_file_is_replaced_only_if_it_is_ours_and_still_the_same() -> None:
    Path("out").write_text("ours")
    with (
        pytest.raises(ConfigError, match="exists; name another"),
        claimed_file("out", False, lambda _: True),
    ):
        pass
    with (
        pytest.raises(ConfigError, match="was not written by evatune"),
        claimed_file("out", True, lambda _: False),
    ):
        pass

    def change() -> None:
        with (
            claimed_file("out", True, lambda path: path.read_text() == "ours") as output,
            output.whole() as made,
        ):
            made.write_text("new")
            Path("out").write_text("years")

    with pytest.raises(ConfigError, match=r"left alone\); the new one is .*out\.new"):
        change()
    assert tree() == {"out": "years", "out.new": "new"}


# -- checkpoints -----------------------------------------------------------------------------------


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


def test_a_checkpoint_that_became_another_file_is_not_removed(tmp_path: Path) -> None:
    point = Checkpoint(tmp_path / "point")
    point.write({"a": torch.zeros(2)}, {})
    before = files._entries(point.path)
    with claimed_file(point.path, True, lambda _: True) as output:
        point.path.write_text("years")
        assert files._entries(point.path) != before
        output.remove()
    assert point.path.read_text() == "years"


# -- names -----------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("length", [240, 246, 247, 255])
def test_names_as_long_as_the_system_allows_are_written(length: int) -> None:
    name = "é" * (length // 2) + "x" * (length % 2)
    write(name, "old")
    write(name, "new")
    write_text(Path(f"{name[:-1]}y"), "text")
    assert len(os.listdir()) == 2


def test_longer_names_are_refused_before_the_work(command: Command) -> None:
    options = ["--model", "x", "--data", "y"]
    refused(command("init", *options, "--out", "x" * 256), "File name too long", folder=Path())
    refused(
        command("init", *options, "--out", "x" * 250, "--checkpoint-every", 2),
        "File name too long",
        folder=Path(),
    )
    refused(command("merge", "a", "b", "-o", "x" * 256), "File name too long", folder=Path())


# -- files beside the users' -----------------------------------------------------------------------


def test_a_plot_follows_no_link_that_lies_ready(work: Path) -> None:
    Path("thesis").write_text("years")
    for name in (".curves.png", "curves.png"):
        Path(name).symlink_to("thesis")
    run_plot([{"step": 1, "loss": 1.0}], work / "curves.png")
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
        split(recipe, ["text"], [], "x")
    assert {path: path.stat().st_mtime_ns for path in work.rglob("*")} == before


# -- no room ---------------------------------------------------------------------------------------


@contextmanager
def no_room(size: int = 600) -> Iterator[None]:
    """Let no file grow beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def of_safetensors(path: Path) -> None:
    save_file({"a": torch.zeros(1000)}, path)


def of_torch(path: Path) -> None:
    torch.save({"a": torch.zeros(1000)}, path)


def of_tokenizers(path: Path) -> None:
    words = {f"w{i}": i for i in range(1000)}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0")).save(str(path))


def of_python(path: Path) -> None:
    path.write_bytes(bytes(4000))


@pytest.mark.parametrize("writer", [of_safetensors, of_torch, of_tokenizers, of_python])
def test_without_room_the_last_output_stays_and_one_sentence_says_so(writer: Any) -> None:
    write("out", "old")
    Path("file").write_text("old")
    Path("text").write_text("old")
    before = tree()
    for attempt in (claimed_folder("out", True), claimed_file("file", True, lambda _: True)):
        with (
            no_room(),
            pytest.raises(ConfigError, match=r"cannot be written .*; name another"),
            attempt as output,
            output.whole() as made,
        ):
            writer(made / "a" if made.is_dir() else made)
    with (
        no_room(),
        pytest.raises(ConfigError, match="cannot be written"),
        atomic_file(Path("text")) as made,
    ):
        writer(made)
    assert tree() == before


def test_what_fails_for_another_reason_is_not_called_a_full_disk() -> None:
    with pytest.raises(RuntimeError, match="a shape"), writing("out"):
        raise RuntimeError("a shape")


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

    recipe = small(bert_folder, "method=lora")
    with monkeypatch.context() as patch:
        patch.setattr(transformers.Trainer, "_save_checkpoint", full)
        with pytest.raises(ConfigError, match=r"checkpoints' cannot be written .*; make room"):
            run(recipe, work / "run", quiet=True)
    with pytest.warns(
        UserWarning, match=r"checkpoint-2' cannot be gone on from: it lacks trainer_state\.json"
    ):
        assert run(recipe, work / "run", quiet=True)["steps"] == 6
