"""Names: one path that is checked and written, and names that are long."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from evatune.utils.atomic import write_text
from evatune.utils.names import hub_id, short_name, stays_below
from evatune.utils.outputs import claimed_folder
from tests.helpers import texts_below, write_folder


def test_a_way_through_folders_that_do_not_exist_writes_where_it_leads_and_makes_no_more() -> None:
    write_folder("new/../out", "text")
    assert os.listdir() == ["out"]
    with claimed_folder("new/../other", overwrite=False) as output:
        assert output.shown == Path("other").absolute()
    assert os.listdir() == ["out"]


def test_a_link_at_out_is_followed_and_stays_a_link() -> None:
    write_folder("real", "old")
    Path("link").symlink_to("real")
    write_folder("link", "new")
    assert Path("link").is_symlink()
    assert texts_below("real") == {"new"}
    Path("dangling").symlink_to("later")
    write_folder("dangling", "text", overwrite=False)
    assert texts_below("later") == {"text"}


def test_a_relative_path_is_that_of_the_start_wherever_one_goes(work: Path, tmp_path: Path) -> None:
    with claimed_folder("out", overwrite=False) as output:
        os.chdir(tmp_path)
        with output.whole() as made:
            (made / "a").write_text("text")
    assert os.listdir(work) == ["out"]


@pytest.mark.parametrize("length", [240, 246, 247, 255])
def test_names_as_long_as_the_system_allows_are_written(length: int) -> None:
    name = "é" * (length // 2) + "x" * (length % 2)
    write_folder(name, "old")
    write_folder(name, "new")
    write_text(Path(f"{name[:-1]}y"), "text")
    assert len(os.listdir()) == 2


def test_a_hub_id_is_told_from_a_path() -> None:
    Path("org").mkdir()
    Path("org/local").touch()
    cached = "/x/hub/models--org--name/snapshots/0a1b/"
    for source, known in (
        ("org/name", "org/name"),
        ("bert-base-uncased", "bert-base-uncased"),
        (cached, "org/name"),
        ("org/local", None),
        ("./org/name", None),
        ("/home/me/model", None),
        ("a/b/c", None),
        ("BBC news", None),
        ("", None),
    ):
        assert hub_id(source) == known
    assert short_name("/home/me/model") == "model"
    assert short_name(cached) == "org/name"


@pytest.mark.parametrize(
    ("name", "stays"),
    [
        ("a/b.npz", True),
        ("./a", True),
        ("..", False),
        ("a/../b", False),
        ("/a", False),
        ("", False),
    ],
)
def test_a_name_in_an_archive_stays_below_or_leads_out(name: str, stays: bool) -> None:
    assert stays_below(name) == stays
