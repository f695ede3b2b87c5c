"""Outputs are claimed at the start and written at the end; what came meanwhile is not lost."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from evatune.errors import ConfigError
from evatune.utils.outputs import claimed_file
from tests.helpers import texts_below, tree, write_folder


@pytest.mark.parametrize("before", ["nothing", "ours"])
@pytest.mark.parametrize("comes", ["folder", "file", "link"])
def test_what_comes_to_out_while_a_command_runs_stays_and_the_result_lies_beside_it(
    before: str, comes: str
) -> None:
    if before == "ours":
        write_folder("out", "old")

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
        write_folder("out", "new", overwrite=before == "ours", meanwhile=come)
    assert {"out", "out.new"} == set(os.listdir()) - {"moved"}
    assert (
        Path("out").is_symlink()
        or texts_below("out") == set()
        or Path("out").read_text() == "years"
    )
    assert texts_below("out.new") == {"new"}
    Path("out").rename("elsewhere")
    Path("out.new").rename("out")
    write_folder("out", "newer")  # what lay aside is as much ours as any


@pytest.mark.parametrize("change", ["add", "edit", "nested", "empty"])
def test_what_is_put_into_ours_while_a_command_runs_stays(change: str) -> None:
    write_folder("out", "old")
    changed = {"add": "out/thesis", "edit": "out/a", "nested": "out/sub/c", "empty": "out/folder"}[
        change
    ]
    before: dict[str, str | None] = {}

    def put() -> None:
        Path(changed).mkdir() if change == "empty" else Path(changed).write_text("OLD")
        before.update(tree("out"))

    with pytest.raises(ConfigError, match="left alone"):
        write_folder("out", "new", meanwhile=put)
    assert tree("out") == before
    assert set(os.listdir()) == {"out", "out.new"}


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
