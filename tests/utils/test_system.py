"""Exchanging two names in one step, and what changes in that moment."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from evatune.errors import ConfigError
from evatune.utils import system
from tests.helpers import texts_below, write_folder


def test_the_mask_is_read_without_being_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.umask(0o027)
    try:
        if Path("/proc/self/status").exists():
            monkeypatch.setattr(os, "umask", None)
        assert system.umask() == 0o027
    finally:
        monkeypatch.undo()
        os.umask(before)


def test_what_changes_in_the_very_moment_of_the_exchange_comes_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_folder("out", "old")
    exchange = system._renameat2
    moments = iter([lambda: Path("out/thesis").write_text("years")])

    def late(path: Path, target: Path, flags: int) -> bool:
        if flags == system._EXCHANGE:
            next(moments, lambda: 0)()
        return exchange(path, target, flags)

    monkeypatch.setattr(system, "_renameat2", late)
    with pytest.raises(ConfigError, match="left alone"):
        write_folder("out", "new")
    assert texts_below("out") == {"old", "years"}
    assert texts_below("out.new") == {"new"}


def test_a_failing_exchange_keeps_the_old_in_place_and_the_new_beside_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_folder("out", "old")
    exchange = system._renameat2

    def fail(path: Path, target: Path, flags: int) -> bool:
        if flags == system._EXCHANGE:
            raise OSError(errno.EIO, "Input/output error")
        return exchange(path, target, flags)

    monkeypatch.setattr(system, "_renameat2", fail)
    with pytest.raises(ConfigError, match=r"Input/output error.*out\.new"):
        write_folder("out", "new")
    assert texts_below("out") == {"old"}
    assert set(os.listdir()) == {"out", "out.new"}
