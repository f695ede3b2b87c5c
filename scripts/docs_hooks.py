"""Hooks of mkdocs: links from docs/ to other files of the repository, and the commands' options."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[1]
_LINK = re.compile(r"\]\(((?:\.\./)+[^)#\s]+)(#[^)\s]*)?\)")
_COMMANDS = "<!-- commands -->"


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """Lead links that leave docs/ to the repository, and fill in the options of the commands.

    A link to no file stays as it is, and mkdocs reports it.
    """
    folder = Path(page.file.abs_src_path).parent

    def moved(match: re.Match[str]) -> str:
        target, anchor = (folder / match[1]).resolve(), match[2] or ""
        inside = target.is_relative_to(config.docs_dir)
        if inside or not target.is_relative_to(_ROOT) or not target.exists():
            return match[0]
        kind = "tree" if target.is_dir() else "blob"
        return f"]({config.repo_url}/{kind}/main/{target.relative_to(_ROOT).as_posix()}{anchor})"

    if _COMMANDS in markdown:
        markdown = markdown.replace(_COMMANDS, "\n".join(_commands()))
    return _LINK.sub(moved, markdown)


def _commands() -> Iterator[str]:
    """Yield a section per command, as the command line itself describes it."""
    import typer.main

    from evatune.cli.app import app

    root: Any = typer.main.get_command(app)
    for name, command in root.commands.items():
        yield from _section(f"evatune {name}", command)
        for inner, subcommand in getattr(command, "commands", {}).items():
            yield from _section(f"evatune {name} {inner}", subcommand)


def _section(name: str, command: Any) -> Iterator[str]:
    yield from (f"### {name}", "", _in_a_cell(command.help or ""), "")
    if getattr(command, "commands", None):
        return
    yield from ("| option | | default |", "|---|---|---|")
    for parameter in command.params:
        if parameter.name == "help":
            continue
        is_option = parameter.param_type_name == "option"
        names = ", ".join(parameter.opts) if is_option else f"{parameter.name.upper()} (argument)"
        default = parameter.default
        given = "" if default is None or default is False or callable(default) else f"`{default}`"
        yield f"| `{names}` | {_in_a_cell(parameter.help or '')} | {given} |"
    yield ""


def _in_a_cell(text: str) -> str:
    return " ".join(text.replace("\f", " ").split()).replace("|", r"\|")
