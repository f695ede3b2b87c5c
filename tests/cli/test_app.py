"""The command line as a whole: version, help, misspelled calls, and what it can show."""

from __future__ import annotations

import errno
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest

import evatune
from evatune.utils.markup import printable
from tests.conftest import Command, refused, sentences
from tests.helpers import ESCAPE


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
        (["paint"], "no command 'paint' (did you mean 'init' or 'train'?);"),
        (["zzz"], "no command 'zzz'; evatune --help lists the commands\n"),
        (
            ["initt"],
            "no command 'initt' (did you mean 'init'?); evatune --help lists the commands\n",
        ),
        (["recipes", "shw"], "(did you mean 'show'?); evatune recipes --help lists the commands\n"),
        (["inspect"], "file"),
        (["init", "extra"], "extra"),
        (["--frobnicate"], "--frobnicate"),
    ],
)
def test_a_misspelled_call_gets_one_line(command: Command, arguments: list[str], part: str) -> None:
    refused(command(*arguments), part, "--help")


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "a.bin"),
            "cannot read or write 'a.bin' (No space left on device); make room or rights, then run",
        ),
        (OSError("no image"), "cannot read or write (no image); see to that, then run"),
    ],
)
def test_room_and_rights_are_advised_where_they_help(
    command: Command, monkeypatch: pytest.MonkeyPatch, error: OSError, sentence: str
) -> None:
    def failing(_: str) -> None:
        raise error

    monkeypatch.setattr("evatune.finetune.recipe_files.load", failing)
    refused(command("recipes", "show", "images-digits"), sentence)


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


def test_what_a_user_writes_reaches_no_terminal_as_a_command(
    command: Command, bert_folder: Path, tmp_path: Path
) -> None:
    place = tmp_path / f"a[{ESCAPE}"
    place.mkdir()
    data = place / "b].txt"  # "[/b]" closes a style that was never opened
    data.write_text("\n".join(sentences(32)))
    out = tmp_path / f"o[{ESCAPE}" / "o]"
    answer = command(
        "init",
        "--model",
        bert_folder,
        "--data",
        data,
        "--rank",
        2,
        "--max-batches",
        1,
        "--out",
        out,
    )
    assert answer.status == 0, answer
    assert "\x1b" not in answer.out + answer.err
    assert f"o[{printable(ESCAPE)}/o]" in answer.out
    refused(
        command("init", "--model", bert_folder, "--data", data, "--rank", 2, "--targets", ESCAPE),
        printable(ESCAPE),
    )
    refused(command("recipes", "ls", f"[/b]{ESCAPE}\nmore"), "[/b]", printable(ESCAPE))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            ["train", "x", "--method", "eva"],
            "no option --method; give a setting of the recipe as method=…, without dashes;"
            " evatune train --help lists the options",
        ),
        (
            ["train", "x", "--lr=1e-3"],
            "no option --lr; give a setting of the recipe as training.learning_rate=…, without",
        ),
        (["compare", "x", "--method", "eva"], "no option --method (did you mean --methods?);"),
        (["compare", "x", "--seed", "3"], "no option --seed (did you mean --seeds?);"),
        (["compare", "x", "--steps", "3"], "no option --steps; give a setting of the recipe as"),
        (["init", "--modl", "x"], "no option --modl (did you mean --model?); evatune init --help"),
    ],
)
def test_an_option_that_is_none_gets_the_right_hint(
    command: Command, arguments: list[str], text: str
) -> None:
    refused(command(*arguments), text)


@pytest.mark.parametrize("name", ["init", "inspect", "merge", "train", "compare", "export"])
def test_short_options_are_the_usual_ones(command: Command, name: str) -> None:
    answer = command(name, "-h")
    assert answer.status == 0
    assert answer.out == command(name, "--help").out
    assert name == "inspect" or re.search(r"--out +-o", answer.out)


def test_the_shell_completes_names_of_recipes(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("_EVATUNE_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "evatune train images-d")
    monkeypatch.setenv("COMP_CWORD", "2")
    assert command().out.split() == ["images-digits"]


@pytest.mark.parametrize("name", ["inspect", "recipes"])
def test_a_pipe_and_no_color_get_plain_text(
    command: Command, written: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    arguments = ["inspect", written] if name == "inspect" else ["recipes", "ls"]
    assert "\x1b" not in command(*arguments).out
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    monkeypatch.setenv("NO_COLOR", "1")
    assert not re.search(r"\x1b\[[\d;]*3\d", command(*arguments).out)
