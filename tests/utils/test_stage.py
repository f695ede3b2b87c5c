"""The stage of an output: what a killed command leaves there, and what is in the way."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from evatune.errors import ConfigError
from evatune.utils.atomic import write_text
from evatune.utils.outputs import claimed_folder
from tests.helpers import texts_below, tree, write_folder

ROOT = Path(__file__).parents[2]


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
    write_folder("out", "new", overwrite=False)
    assert os.listdir() == ["out"]


def test_half_a_file_of_a_library_that_was_killed_is_cleared() -> None:
    Path(".out.evatune").mkdir()
    left = {"mark": b'{"format": "evatune-stage-1"}\n', "making": b"", ".tmpQFElLk": b"half"}
    for name, content in left.items():
        (Path(".out.evatune") / name).write_bytes(content)
    write_folder("out", "new", overwrite=False)
    assert os.listdir() == ["out"]


def test_half_a_journal_means_that_nothing_was_exchanged() -> None:
    write_folder("out", "old")
    with claimed_folder("out", overwrite=True) as output:
        made = output._stage.making
        (made / "a").write_text("half")
        (made.parent / "journal").write_text('[{"": [1')
        output._stage.clear()
    assert texts_below("out") == {"old"}
    assert os.listdir() == ["out"]


def test_of_two_processes_one_writes_and_the_other_is_refused(work: Path) -> None:
    code = (
        "import sys, time; from evatune.utils.outputs import claimed_folder\n"
        "with claimed_folder(sys.argv[1], True) as output, output.whole() as made:\n"
        "    (made / 'a').write_text('text'); time.sleep(1)\n"
    )
    run = [sys.executable, "-c", code, str(work / "out")]
    both = [subprocess.Popen(run, cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = {process.communicate(timeout=60)[1][-200:] for process in both}
    assert sorted(process.returncode for process in both) == [0, 1], errors
    assert any("another evatune command is writing" in error for error in errors)
    assert texts_below("out") == {"text"}


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
        write_folder("out", "new")
    with pytest.raises(ConfigError, match="is in the way"):
        write_text(Path("out"), "new")
    assert tree() == before
