"""How the code reads, in figures: `python scripts/style.py [FOLDER]` prints them beside what they
should reach.

Line length and density, length of functions, number of parameters, import circles, openings of
docstrings, and modules without tests of their own name. Reads the source only; imports nothing of
it.
"""

from __future__ import annotations

import ast
import io
import re
import statistics
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = "evatune"
LINE_LENGTH = 100
LONG_BODY = 60
# The public door and the command line take what users may say; everything below them takes objects.
MANY_PARAMETERS_ALLOWED = ("api.py", "initialize.py", "cli/", "adapters/compat.py")
# Words that say nothing, and shapes, such as "(k, d) rows" or "F (l, d)"; single letters may name.
UNINFORMATIVE_OPENING = re.compile(r"(What|Whether|Where|Who|Whom|Whose)\b|(\w\S? )?\(")
LAYOUT = (
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
    tokenize.ENCODING,
)
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Source:
    """One module of the package."""

    path: Path  # relative to the package
    text: str
    tree: ast.Module

    @property
    def module(self) -> str:
        parts = [PACKAGE, *self.path.with_suffix("").parts]
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def read(package: Path) -> list[Source]:
    files = sorted(package.rglob("*.py"))
    texts = [file.read_text(encoding="utf-8") for file in files]
    return [
        Source(file.relative_to(package), text, ast.parse(text))
        for file, text in zip(files, texts, strict=True)
    ]


def long_lines(sources: list[Source]) -> tuple[int, int]:
    """(lines over the limit, lines)."""
    lines = [line for source in sources for line in source.text.splitlines()]
    return sum(len(line) > LINE_LENGTH for line in lines), len(lines)


def tokens_per_line(source: Source) -> float | None:
    """Mean number of tokens on a line that holds code; docstrings are not code."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings: set[int] = set()
    for node in ast.walk(source.tree):
        if isinstance(node, documented) and ast.get_docstring(node) is not None:
            docstrings.update(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    per_line: dict[int, int] = {}
    for token in tokenize.generate_tokens(io.StringIO(source.text).readline):
        if token.type not in LAYOUT and token.start[0] not in docstrings:
            per_line[token.start[0]] = per_line.get(token.start[0], 0) + 1
    return statistics.mean(per_line.values()) if per_line else None


def functions(source: Source) -> Iterator[Function]:
    for node in ast.walk(source.tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def body_lines(function: Function) -> int:
    """Lines of a function below its signature and docstring."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return (function.end_lineno or 0) - body[0].lineno + 1 if body else 0


def parameters(function: Function) -> int:
    given = function.args
    names = [argument.arg for argument in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    receivers = names[:1] in (["self"], ["cls"])
    return len(names) - receivers + (given.vararg is not None) + (given.kwarg is not None)


def imports(source: Source, modules: set[str]) -> set[str]:
    """Modules of the package that this one imports, wherever the import stands."""
    found: set[str] = set()
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            found.update(name if name in modules else node.module for name in whole)
    return (found & modules) - {source.module}


def circles(sources: list[Source]) -> list[list[str]]:
    """Groups of modules that import each other, by Tarjan's strongly connected components."""
    modules = {source.module for source in sources}
    edges = {source.module: sorted(imports(source, modules)) for source in sources}
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        order[module] = lowest[module] = len(order)
        stack.append(module)
        for other in edges[module]:
            if other not in order:
                visit(other)
                lowest[module] = min(lowest[module], lowest[other])
            elif other in stack:
                lowest[module] = min(lowest[module], order[other])
        if lowest[module] == order[module]:
            component = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(component) > 1:
                found.append(sorted(component))

    for module in edges:
        if module not in order:
            visit(module)
    return found


def docstrings(sources: list[Source]) -> list[str]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = (node for source in sources for node in ast.walk(source.tree))
    texts = (ast.get_docstring(node) for node in nodes if isinstance(node, documented))
    return [text for text in texts if text]


def untested(sources: list[Source], tests: Path) -> list[str]:
    """Modules without a test module that carries their name."""
    names = {file.stem.removeprefix("test_") for file in tests.rglob("test_*.py")}
    own = [source for source in sources if not source.path.stem.startswith("__")]
    return [str(source.path) for source in own if source.path.stem not in names]


def main() -> None:
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT
    sources = read(root / "src" / PACKAGE)
    over, lines = long_lines(sources)
    density = [mean for source in sources if (mean := tokens_per_line(source)) is not None]
    all_functions = [(source, function) for source in sources for function in functions(source)]
    long = [(source, f) for source, f in all_functions if body_lines(f) > LONG_BODY]
    below = [
        (parameters(function), f"{source.path}:{function.name}")
        for source, function in all_functions
        if not str(source.path).startswith(MANY_PARAMETERS_ALLOWED)
    ]
    texts = docstrings(sources)
    opening = [text for text in texts if UNINFORMATIVE_OPENING.match(text)]
    top = [source for source in sources if len(source.path.parts) == 1]
    top = [source for source in top if not source.path.stem.startswith("__")]
    without = untested(sources, root / "tests")
    most, where = max(below)
    rows = [
        (f"lines over {LINE_LENGTH} characters", f"{over / lines:.1%} ({over})", "0"),
        ("tokens per code line, median file", f"{statistics.median(density):.1f}", "8.5 or less"),
        (f"function bodies over {LONG_BODY} lines", f"{len(long) / len(all_functions):.1%}", "1 %"),
        ("most parameters below the door", f"{most} ({where})", "8 or less"),
        ("import circles", str(len(circles(sources))), "0"),
        ("modules at the top of the package", str(len(top)), "6 or less"),
        ("docstrings that open with What, (k, d), …", f"{len(opening) / len(texts):.1%}", "1 %"),
        ("modules without tests of their name", str(len(without)), "3 or fewer"),
    ]
    for name, now, reach in rows:
        print(f"{name:44} {now:44} reach {reach}")
    for source, function in long:
        print(f"  long: {source.path}:{function.name}, {body_lines(function)} lines")
    for circle in circles(sources):
        print(f"  circle: {', '.join(circle)}")
    print(f"  without tests of their name: {', '.join(without) or 'none'}")


if __name__ == "__main__":
    main()
