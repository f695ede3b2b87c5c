"""Kill a command before every call of the system that changes something on the disk.

    python tests/kills.py FOLDER

After each kill, what was there is whole-old or whole-new, the next command succeeds and nothing
else is left. It is a script of its own, because what it forks a thousand times must not be large.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evatune.utils import system
from evatune.utils.atomic import write_text
from evatune.utils.mark import MARK, require_unchanged_folder
from evatune.utils.outputs import claimed_file, claimed_folder


@dataclass(frozen=True)
class Job:
    """Something that is written, over and over."""

    write: Callable[[Path, str], None]
    read: Callable[[Path], str | None]  # None: absent; anything but what was written: torn
    first: bool = False  # nothing is there before
    in_one_step: bool = True


def jobs() -> dict[str, Job]:
    def folder(out: Path, text: str) -> None:
        with claimed_folder(out, overwrite=True) as output, output.whole() as made:
            (made / "sub").mkdir()
            for name in ("a", "b", "sub/c"):
                (made / name).write_text(text)

    def file(out: Path, text: str) -> None:
        with claimed_file(out, True, lambda _: True) as output, output.whole() as made:
            made.write_text(text)

    def removed(out: Path, text: str) -> None:
        if text == "old":
            file(out, text)
        else:
            with claimed_file(out, True, lambda _: True) as output:
                output.remove()

    def read_folder(out: Path) -> str | None:
        if not out.exists():
            return None
        names = {path.relative_to(out).as_posix() for path in out.rglob("*")}
        texts = {(out / name).read_text() for name in ("a", "b", "sub/c")}
        require_unchanged_folder(out, out)
        return (
            texts.pop() if len(texts) == 1 and names == {"a", "b", "sub", "sub/c", MARK} else "torn"
        )

    def read_file(out: Path) -> str | None:
        return out.read_text() if out.exists() else None

    return {
        "folder": Job(folder, read_folder),
        "first folder": Job(folder, read_folder, first=True),
        "folder in two steps": Job(folder, read_folder, in_one_step=False),
        "file": Job(file, read_file),
        "file in two steps": Job(file, read_file, in_one_step=False),
        "text": Job(write_text, read_file),
        "removal": Job(removed, read_file),
    }


def changes(event: str, arguments: tuple[Any, ...]) -> bool:
    """Return whether Python is about to change something on the disk."""
    if event == "open":
        return bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    return event in (
        "os.mkdir",
        "os.rename",
        "os.remove",
        "os.rmdir",
        "os.chmod",
        "os.utime",
        "os.truncate",
    )


def kill_at(moment: int, work: Callable[[], None]) -> bool:
    """Run `work` in a child that is killed at this moment; False if it ended before."""
    child = os.fork()
    if child == 0:
        count = 0

        def step() -> None:
            nonlocal count
            count += 1
            if count == moment:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(lambda event, arguments: step() if changes(event, arguments) else None)
        work()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return True
    assert status == 0, "the child failed"
    return False


def kill_everywhere(job: Job, folder: Path) -> int:
    """Return at how many moments the job was killed."""
    folder.mkdir()
    out = folder / "out"
    exchange = system._renameat2

    def begin() -> str | None:
        if job.first:
            system.remove(out)
        else:
            job.write(out, "old")
        return job.read(out)

    job.write(out, "new")
    new = job.read(out)
    moment = 0
    while True:
        old = begin()
        if not job.in_one_step:
            system._renameat2 = lambda *_: False
        if not kill_at(moment + 1, lambda: job.write(out, "new")):
            break
        moment += 1
        if not job.in_one_step and job.read(out) is None:
            with claimed_folder(out, overwrite=True):
                pass  # a command that fails repairs as well
        assert job.read(out) in (old, new), (moment, job.read(out))
        job.write(out, "new")
        assert job.read(out) == new, moment
        assert {path.name for path in folder.iterdir()} <= {"out"}, (
            moment,
            list(folder.rglob("*")),
        )
        system._renameat2 = exchange
    system._renameat2 = exchange
    return moment


def main(folder: Path) -> None:
    os.fsync = lambda _: None  # a kill is no power failure
    assert "torch" not in sys.modules
    for name, job in jobs().items():
        print(kill_everywhere(job, folder / name), name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
