"""An interrupted `evatune init` resumes, and ends the same."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import Command, refused, sentences


@pytest.fixture
def interrupted(init: Command, work: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The checkpoint of a run that ended in its second writing."""
    with monkeypatch.context() as patch:
        interrupt_second_writing(patch)
        assert init(batch_size=8, tolerance=0, checkpoint_every=2).status == 130
    assert [path.name for path in work.iterdir()] == ["out.checkpoint"]
    return work / "out.checkpoint"


def interrupt_second_writing(patch: pytest.MonkeyPatch) -> None:
    from evatune.calibration.checkpoint import Checkpoint

    write, times = Checkpoint.write, 0

    def stop_in_second(self: Checkpoint, *arguments: Any) -> None:
        nonlocal times
        times += 1
        if times == 2:
            raise KeyboardInterrupt
        write(self, *arguments)

    patch.setattr(Checkpoint, "write", stop_in_second)


def test_an_interrupted_init_resumes_and_ends_the_same(
    init: Command, work: Path, interrupted: Path
) -> None:
    resumed = init(batch_size=8, tolerance=0, resume=True)
    assert resumed.status == 0, resumed.err
    assert resumed.err == ""
    assert [path.name for path in work.iterdir()] == ["out"]
    assert init(batch_size=8, tolerance=0, out="whole").status == 0
    for name in ("adapter_model.safetensors", "calibration.safetensors"):
        found, expected = load_file(work / "out" / name), load_file(work / "whole" / name)
        assert found.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[key]) for key, tensor in found.items())


def test_a_checkpoint_that_does_not_fit_is_refused_and_kept(
    init: Command, work: Path, interrupted: Path, tmp_path: Path
) -> None:
    left = frozenset({"out.checkpoint"})
    refused(
        init(batch_size=4, tolerance=0, resume=True),
        "batch_size was 8 and is 4",
        folder=work,
        left=left,
    )
    refused(
        init(batch_size=8, tolerance=0, rank=2, resume=True),
        "config rank was 4 and is 2",
        folder=work,
        left=left,
    )
    others = tmp_path / "others.txt"
    others.write_text("\n".join(sentences(50)) + "\n")
    refused(
        init(batch_size=8, tolerance=0, data=others, resume=True),
        "texts was",
        folder=work,
        left=left,
    )
    interrupted.write_bytes(interrupted.read_bytes()[:-50])
    refused(
        init(batch_size=8, tolerance=0, resume=True),
        "is damaged",
        "--resume",
        folder=work,
        left=left,
    )


def test_another_chat_template_makes_other_texts(
    init: Command, llama_folder: Path, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = {"role": "assistant", "content": "w1 w2 w3"}
    chats = [[{"role": "user", "content": text}, answer] for text in sentences(32)]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    template, other = tmp_path / "chat.jinja", tmp_path / "other.jinja"
    template.write_text("{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}")
    other.write_text("{% for m in messages %}{{ 'w1 ' + m['content'] }}{% endfor %}")
    options = {"model": llama_folder, "data": path, "batch_size": 8, "tolerance": 0}
    interrupt_second_writing(monkeypatch)
    assert init(**options, chat_template=template, checkpoint_every=1).status == 130
    resumed = init(**options, chat_template=other, resume=True)
    refused(resumed, "chat_template was", folder=work, left=frozenset({"out.checkpoint"}))


def test_a_run_from_the_beginning_says_that_it_replaces_a_checkpoint(
    init: Command, work: Path, interrupted: Path
) -> None:
    answer = init(batch_size=8, tolerance=0, checkpoint_every=3)
    assert answer.status == 0
    assert "--resume would go on from it" in answer.err
    assert [path.name for path in work.iterdir()] == ["out"]


def test_nothing_to_resume_is_said(init: Command, work: Path) -> None:
    answer = init(resume=True)
    assert answer.status == 0
    assert "Nothing to resume" in answer.err


def test_checkpoints_come_after_whole_batches(init: Command, work: Path) -> None:
    refused(init(checkpoint_every=0), "checkpoint_every is 0; it must be at least 1", folder=work)


@pytest.mark.parametrize("options", [{"resume": True}, {"checkpoint_every": 2}])
def test_several_processes_keep_no_checkpoint(
    init: Command, work: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    two = SimpleNamespace(rank=0, size=2)
    monkeypatch.setattr("evatune.distributed.launch.launched", lambda: nullcontext(two))
    refused(init(**options), "work with one process only, and 2 are running", folder=work)
