"""Files from a package index, forged ones among them."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from evatune.errors import DataError
from evatune.loading import cache
from evatune.loading import package_index as index

NAME = "some_thing-1.0.tar.gz"


class Silent(SimpleHTTPRequestHandler):
    asked: list[str] = []  # noqa: RUF012

    def log_message(self, *_: object) -> None:
        self.asked.append(self.headers.get("Authorization", ""))


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve a folder on the loopback address; its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Silent, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def archive(marker: Path) -> bytes:
    """A source distribution whose setup.py leaves a mark when it is run, and whose member climbs
    out."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name in ("some_thing-1.0/setup.py", "../climbed.py"):
            code = f"open({str(marker)!r}, 'w').close()\n".encode()
            member = tarfile.TarInfo(name)
            member.size = len(code)
            tar.addfile(member, io.BytesIO(code))
    return buffer.getvalue()


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An index of one project; pip's own files and variables say nothing."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("EVATUNE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "index" / "some-thing"
    folder.mkdir(parents=True)
    (folder / NAME).write_bytes(archive(tmp_path / "ran"))
    (folder / "index.html").write_text(
        f'<a href="other-1.0.tar.gz">other</a> <a href="{NAME}#sha256=0">{NAME}</a>'
    )
    return folder


def test_nothing_of_a_forged_archive_runs_or_stays(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(page.parent) as address:
        monkeypatch.setenv("PIP_INDEX_URL", f"http://{address}")
        with pytest.raises(
            DataError,
            match=r"the thing .*SHA-256 differs.* nothing was kept or run.* put the file at",
        ):
            cache.download_once("Some_Thing", NAME, "0" * 64, "the thing")
    assert {path.name for path in tmp_path.iterdir()} == {"index"}


def test_a_file_is_fetched_once_from_the_first_index_whose_bytes_are_right(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = tmp_path / "right" / "some-thing"
    right.mkdir(parents=True)
    (right / NAME).write_bytes(b"the right one")
    (right / "index.html").write_text(f'<a href="../some-thing/{NAME}">{NAME}</a>')
    digest = hashlib.sha256(b"the right one").hexdigest()
    with served(page.parent) as address:
        monkeypatch.setenv("PIP_INDEX_URL", f"http://me:pass%20word@{address}/")
        monkeypatch.setenv(
            "PIP_EXTRA_INDEX_URL", f"file://{tmp_path}/nowhere file://{tmp_path}/right"
        )
        found = cache.download_once("some.thing", NAME, digest, "the thing")
    assert Silent.asked[-1] == "Basic bWU6cGFzcyB3b3Jk"
    monkeypatch.setattr(cache, "fetch", None)
    assert cache.download_once("some.thing", NAME, digest, "the thing") == found
    assert found.read_bytes() == b"the right one"
    assert [path.name for path in found.parent.iterdir()] == [NAME]


def test_what_cannot_be_had_is_said_in_a_sentence(
    page: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = hashlib.sha256((page / NAME).read_bytes()).hexdigest()
    monkeypatch.setattr(index, "_LARGEST", 100)
    with served(page.parent) as address:
        for url, reason in (
            ("http://127.0.0.1:9", "refused"),
            (f"http://{address}/none", "404"),
            (f"http://{address}", "more than"),
            ("ftp://127.0.0.1", "'ftp' is not read"),
        ):
            monkeypatch.setattr(index, "_pip_settings", lambda url=url: {"index-url": url})
            with pytest.raises(DataError, match=f"could not be downloaded.*{reason}"):
                cache.download_once("some-thing", NAME, digest, "the thing")
    monkeypatch.setattr(index, "_pip_settings", lambda: {"no-index": "1"})
    with pytest.raises(DataError, match="no package index that pip is configured for"):
        cache.download_once("some-thing", NAME, digest, "the thing")
