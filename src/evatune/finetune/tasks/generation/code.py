"""Bodies of documented functions of Python's standard library."""

from __future__ import annotations

import ast
import random
import sysconfig
import textwrap
import zlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from evatune.finetune.tasks.generation.base import GenerationTask, Pair, Pairs

_NOT_SOURCE = {
    "site-packages",
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "idle_test",
    "turtledemo",
    "__pycache__",
    "encodings",
}
_LONGEST = 240  # characters of a body that is kept


def examples(train: int, test: int) -> Pairs:
    """Return heads of functions and their bodies; no module is in both parts."""
    learned: list[Pair] = []
    tested: list[Pair] = []
    for module, pairs in _functions().items():
        part = tested if zlib.crc32(module.encode()) % 8 == 7 else learned
        part.extend(pairs)
    random.Random(0).shuffle(learned)
    random.Random(0).shuffle(tested)
    prompts = {pair.prompt for pair in learned}
    unseen = [pair for pair in tested if pair.prompt not in prompts]
    return Pairs(learned[:train], unseen[:test])


def held_out(module: str) -> bool:
    """Return whether a top-level module of the standard library is kept for fine-tuning.

    A quarter of them is.
    """
    return zlib.crc32(module.encode()) % 4 == 3


def library() -> Iterator[tuple[str, str]]:
    """Yield the standard library's own modules in a fixed order: top-level name, source."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if not _NOT_SOURCE & set(parts) and not parts[0].startswith(("config-", "_sysconfigdata")):
            yield parts[0].removesuffix(".py"), path.read_text(encoding="utf-8", errors="replace")


@cache
def _functions() -> dict[str, list[Pair]]:
    """Return the documented functions of the held-out modules, by module.

    The prompt is the head and the first line of the docstring, the answer the body's first
    statements.
    """
    functions: dict[str, list[Pair]] = {}
    for module, text in library():
        # Some versions of Python keep datetime's and decimal's code in modules named so, and
        # pre-training saw it elsewhere.
        if not held_out(module) or module.startswith("_py"):
            continue
        lines = text.split("\n")  # not splitlines, which counts form feeds too
        for node in ast.walk(ast.parse(text)):
            pair = _function_pair(node, lines)
            if pair is not None:
                functions.setdefault(module, []).append(pair)
    return functions


def _function_pair(node: ast.AST, lines: list[str]) -> Pair | None:
    """Return a function's prompt and answer; None for one without docstring or short statements."""
    if not isinstance(node, ast.FunctionDef) or len(node.body) < 2:
        return None
    docstring = ast.get_docstring(node)
    if not docstring:
        return None
    # Not ast.get_source_segment, which splits the whole text each time.
    first, *others = [
        "\n".join(lines[statement.lineno - 1 : statement.end_lineno]) for statement in node.body[1:]
    ]
    body = textwrap.dedent(first)
    for statement in others:
        if len(body) + len(statement) > _LONGEST:
            break
        body += "\n" + textwrap.dedent(statement)
    if not body or len(body) > _LONGEST:
        return None
    head = f"def {node.name}({ast.unparse(node.args)}):\n"
    prompt = f'{head}    """{docstring.splitlines()[0]}"""\n'
    return Pair(prompt, textwrap.indent(body, "    "))


TASK = GenerationTask("code", examples)
