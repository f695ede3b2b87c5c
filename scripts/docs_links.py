"""Hooks of mkdocs: links from docs/ to other files of the repository, which the site lacks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[1]
_LINK = re.compile(r"\]\(((?:\.\./)+[^)#\s]+)(#[^)\s]*)?\)")


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """Lead links that leave docs/ to the repository; one to no file stays, and is reported."""
    folder = Path(page.file.abs_src_path).parent

    def moved(match: re.Match[str]) -> str:
        target, anchor = (folder / match[1]).resolve(), match[2] or ""
        inside = target.is_relative_to(config.docs_dir)
        if inside or not target.is_relative_to(_ROOT) or not target.exists():
            return match[0]
        kind = "tree" if target.is_dir() else "blob"
        return f"]({config.repo_url}/{kind}/main/{target.relative_to(_ROOT).as_posix()}{anchor})"

    return _LINK.sub(moved, markdown)
