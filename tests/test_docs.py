"""The documentation is true: its Python runs, its commands parse, its links lead somewhere.

A block that cannot run here stands after a line `<!-- not run: reason -->`. On every page `model`,
`tokenizer`, `dataset` and `batches` stand for the reader's own, as the pages say, and the models of
a hub for a small one.
"""

from __future__ import annotations

import json
import re
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import evatune
from evatune.choices import SCALES
from evatune.cli.app import app
from evatune.finetune.methods import METHODS
from evatune.finetune.recipe_files import load
from evatune.loading.assets import asset

ROOT = Path(__file__).parents[1]
HUB = "meta-llama/Llama-3.2-1B"
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md"))
)
NOTEBOOK = ROOT / "docs" / "notebooks" / "quickstart.ipynb"
_BLOCK = re.compile(
    r"^(?P<indent>[ ]*)(?P<skip><!-- not run: [^\n]+ -->\n+[ ]*)?"
    r"```(?P<language>\w+)[^\n]*\n(?P<code>.*?)^[ ]*```",
    re.DOTALL | re.MULTILINE,
)
_OURS = re.compile(r"https://(?:github|raw\.githubusercontent)\.com/evatune/evatune/(?:\w+/)?main/")
_LINK = re.compile(r"(?:\]\(|src=\")([^)\"#\s]+)")
_MESSAGE = re.compile(r"\*\*(?:Warning: )?\"(.+?)\"\*\*", re.DOTALL)


def blocks(page: str, *languages: str) -> Iterator[str]:
    """The page's blocks in these languages that are to be run."""
    for match in _BLOCK.finditer((ROOT / page).read_text()):
        if match["language"] in languages and not match["skip"]:
            yield textwrap.dedent(match["code"])


@pytest.fixture(scope="module")
def hub_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that stands for a model of the hub: a Llama of two layers with a tokenizer."""
    folder = tmp_path_factory.mktemp("docs") / "llama"
    tokenizer = AutoTokenizer.from_pretrained(asset("llama-small"))
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def names(folder: Path) -> dict[str, Any]:
    """What the pages take for granted."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [f"{n} plus {m} is {n + m}, and that is {n}" for n in range(8) for m in range(4)]
    batches = []
    for first in range(0, len(texts), 4):
        batch = tokenizer(texts[first : first + 4], padding=True, return_tensors="pt")
        batches.append({**batch, "labels": batch["input_ids"]})
    base = LlamaForCausalLM.from_pretrained(folder)
    lora = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    return {
        "__name__": "page",
        "torch": torch,
        "evatune": evatune,
        "tokenizer": tokenizer,
        "batches": batches,
        "dataset": [{"input_ids": row, "labels": row} for row in tokenizer(texts)["input_ids"]],
        "model": get_peft_model(base, lora),
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", [page for page in PAGES if list(blocks(page, "python"))])
def test_python_blocks_run(
    page: str, hub_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my.txt").write_text("".join(f"{n} plus {n} is {2 * n}\n" for n in range(16)))
    scope = names(hub_model)
    for number, block in enumerate(blocks(page, "python"), 1):
        code = block.replace(HUB, str(hub_model))
        exec(compile(code, f"{page}, block {number}", "exec"), scope)


def commands(page: str) -> Iterator[list[str]]:
    """The commands of evatune in the page's blocks, word for word."""
    for block in blocks(page, "sh", "bash", "console"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["evatune"]:
                yield words[1:]


def test_commands_parse() -> None:
    root = typer.main.get_command(app)
    wrong = []
    for page in PAGES:
        for words in commands(page):
            try:
                parse(root, words)
            except Exception as error:
                wrong.append(f"{page}: evatune {shlex.join(words)}: {error}")
    assert wrong == []


def parse(command: Any, words: list[str]) -> None:
    """Read the words as the command line does, without running anything."""
    context = command.make_context("evatune", list(words), resilient_parsing=False)
    rest = [*getattr(context, "_protected_args", ()), *context.args]
    if hasattr(command, "commands"):
        parse(command.commands[rest[0]], rest[1:])
    elif command.name == "train":
        load(context.params["recipe"], context.params["overrides"] or [])


def test_links_lead_to_files() -> None:
    """Those of the README are whole addresses, as the package index shows it."""
    for page in [*PAGES, "docs/llms.txt"]:
        for link in _LINK.findall((ROOT / page).read_text()):
            if _OURS.match(link):
                target = ROOT / _OURS.sub("", link)
            elif link.startswith(("http", "mailto:")):
                continue
            else:
                assert page != "README.md", link
                target = (ROOT / page).parent / link
            assert target.exists(), f"{page}: {link}"


def test_messages_are_those_of_the_code() -> None:
    code = "".join(path.read_text() for path in sorted((ROOT / "src").rglob("*.py")))
    code = " ".join(re.sub(r'"\s*\n\s*f?r?"', "", code).split())  # strings in pieces
    page = " ".join((ROOT / "docs/troubleshooting.md").read_text().split())
    parts = [part.strip() for text in _MESSAGE.findall(page) for part in text.split("…")]
    assert [part for part in parts if len(part) > 3 and part not in code] == []


@pytest.mark.parametrize(
    ("page", "names"),
    [
        ("docs/recipes.md", list(METHODS)),
        ("docs/troubleshooting.md", [str(status) for status in evatune.Status]),
        ("docs/settings.md", list(SCALES)),
    ],
)
def test_tables_name_all(page: str, names: list[str]) -> None:
    text = (ROOT / page).read_text()
    assert [name for name in names if f"`{name}`" not in text and f'`"{name}"`' not in text] == []


@pytest.mark.filterwarnings("ignore")
def test_notebook_runs_and_keeps_its_outputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert not any(out["output_type"] == "error" for cell in code for out in cell["outputs"])
    scope: dict[str, Any] = {"__name__": "notebook", "display": print}
    for number, cell in enumerate(code, 1):
        source = "".join(cell["source"]).replace("max_steps=120", "max_steps=2")
        exec(compile(source, f"{NOTEBOOK.name}, cell {number}", "exec"), scope)
