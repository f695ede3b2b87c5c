"""Seeded mutations of every kind of file that evatune reads.

    python scripts/fuzz.py              # 40 cases of each kind
    python scripts/fuzz.py --cases 400 --seed 1

Each case is read in a process of its own, with limits for time and memory. It must end in one
sentence (an EvatuneError of one line) or be read to its end; a traceback, a crash or no end is a
fault, and status 1.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import evatune
from evatune.adapters.export import export_uniform
from evatune.adapters.saved import adapter_rows
from evatune.calibration.checkpoint import Checkpoint
from evatune.finetune.comparison.grid import Run
from evatune.finetune.comparison.summary import summarize
from evatune.finetune.metrics import METRICS, read_metrics
from evatune.finetune.recipe_files import load
from evatune.finetune.recipe_tree import as_tree
from evatune.finetune.resuming import newest_whole
from evatune.finetune.run_folder import RECIPE, RESULT, read_result, require_own_run
from evatune.loading.texts import load_texts

SECONDS = 20.0
MEMORY = 3 << 30  # bytes beyond what the process has already

Mutation = Callable[[random.Random, Path], None]


@dataclass(frozen=True)
class FileKind:
    """A kind of file: how to write a good one into a folder, how evatune reads it, and what is done
    to it."""

    write: Callable[[Path], Path]
    read: Callable[[Path], object]
    mutations: tuple[Mutation, ...]


# -- mutations -------------------------------------------------------------------------------------


def flip_bits(source: random.Random, path: Path) -> None:
    raw = bytearray(path.read_bytes())
    for _ in range(source.choice([1, 1, 1, 8])):
        place = source.randrange(8 * len(raw))
        raw[place // 8] ^= 1 << place % 8
    path.write_bytes(raw)


def truncate(source: random.Random, path: Path) -> None:
    raw = path.read_bytes()
    path.write_bytes(raw[: source.choice([0, 1, 7, 8, 9, source.randrange(len(raw))])])


def shuffle_bytes(source: random.Random, path: Path) -> None:
    raw = path.read_bytes()
    first, last = sorted(source.randrange(len(raw) + 1) for _ in range(2))
    middle = source.choice([b"", b"\0" * (last - first), raw[first:last] * 2, source.randbytes(16)])
    path.write_bytes(raw[:first] + middle + raw[last:])


POISON: tuple[Any, ...] = (
    None,
    True,
    False,
    -1,
    0,
    1,
    -5,
    1.5,
    10**20,
    2**63,
    10**9,
    -(10**30),
    1e308,
    -1e308,
    1e-320,
    "4",
    "",
    "x" * 5000,
    "\u202e\x1b[31m",
    "a\nb",
    "{}",
    "(a+)+$",
    "(((((",
    ".*.*.*.*.*.*.*x",
    [],
    [[]],
    [1, 2],
    ["q", 5],
    {},
    {"a": {}},
    {"(x+x+)+y": 4},
    float("nan"),
    float("inf"),
)


def poison_value(source: random.Random, tree: Any) -> Any:
    """Return a copy in which one value is replaced, removed, doubled or renamed."""
    tree = copy.deepcopy(tree)
    places = list(_places(tree))
    if not places:
        return source.choice(POISON)
    parent, key = source.choice(places)
    deed = source.randrange(5)
    if deed == 0:
        del parent[key]
    elif deed == 1 and isinstance(parent, dict):
        parent[source.choice(["", "constructor", "a.b", str(key).upper(), "r" * 3000])] = (
            parent.pop(key)
        )
    elif deed == 2 and isinstance(parent, list):
        parent.insert(key, parent[key])
    elif deed == 3 and isinstance(parent[key], (int, float)):
        parent[key] = parent[key] * source.choice([-1, 2, 1e6, 0.5]) + source.choice([0, 1])
    else:
        parent[key] = copy.deepcopy(source.choice(POISON))
    return tree


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    children: Iterable[tuple[Any, Any]] = ()
    if isinstance(tree, dict):
        children = tree.items()
    elif isinstance(tree, list):
        children = enumerate(tree)
    for key, child in list(children):
        yield tree, key
        yield from _places(child)


def poison_text(source: random.Random, content: str) -> str:
    """Return a text of JSON or YAML that no value has."""
    bombs = (
        "[" * 10_000,
        "[" * 10_000 + "]" * 10_000,
        '{"a":' * 5000 + "1" + "}" * 5000,
        "9" * 4301,
        "-" + "1" * 5000,
        "1e999999",
        "1" * 30 + "." + "2" * 3000,
        "null",
        '"\\ud800"',
        "[]",
        "{}",
        '{"a": 1, "a": 2}',
        "\ufeff" + content,
        content * 2,
        content.replace(":", "", 1),
        content.replace('"', "'"),
        content.replace(": ", ": " + "9" * 5000, 1),
        "{" + content.strip().lstrip("{").split(",")[0] + "," + content.strip().lstrip("{"),
    )
    return source.choice(bombs)


def edit_json(source: random.Random, path: Path) -> None:
    tree = json.loads(path.read_text())
    for _ in range(source.choice([1, 1, 2])):
        tree = poison_value(source, tree)
    path.write_text(json.dumps(tree))


def bomb_text(source: random.Random, path: Path) -> None:
    path.write_text(poison_text(source, path.read_text()))


def edit_line(source: random.Random, path: Path) -> None:
    lines = path.read_text().splitlines()
    place = source.randrange(len(lines))
    if source.random() < 0.5:
        lines[place] = json.dumps(poison_value(source, json.loads(lines[place])))
    else:
        lines[place] = poison_text(source, lines[place])
    path.write_text("\n".join(lines) + source.choice(["", "\n"]))


def bomb_yaml(source: random.Random, path: Path) -> None:
    letters = "bcdefghijk"
    laughs = "a: &a [x, x]\n" + "".join(
        f"{y}: &{y} [{', '.join(['*' + x] * 9)}]\n"
        for x, y in zip("a" + letters, letters, strict=False)
    )
    bombs = (
        laughs,
        "a: &a [*a]",
        "task: &t\n  x: *t",
        "task: !!binary aGVsbG8=",
        "task: !!python/object/apply:os.getcwd []",
        "task: !!set {a, b}",
        "task: 2020-13-45",
        "task: a\ntask: b",
        "? [a]\n: b",
        "training: {learning_rate: .inf}",
        "training: {steps: true}",
        "training: {steps: 1e18}",
        "adapter: {rank: 1e9}",
        "<<: {task: x}",
        "- " * 3000,
        "? " * 3000,
        "task: " + "[" * 5000,
        "task: " + "1" * 5000,
        "task: 0x" + "f" * 5000,
        "task: 1:" * 900,
        "a\0b",
        "",
        "task: bbc\n" * 3000,
        "\n".join(f"k{i}: {i}" for i in range(3000)),
        "%YAML 9.9\n---\ntask: x",
        "--- a\n--- b",
    )
    path.write_text(source.choice(bombs))


def edit_yaml(source: random.Random, path: Path) -> None:
    tree = poison_value(source, as_tree(load(str(path))))
    path.write_text(json.dumps(tree))  # which is YAML as well


def edit_header(source: random.Random, path: Path) -> None:
    """Change what the header of a safetensors file declares, and leave the tensors."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    names = [name for name in header if name != "__metadata__"]
    entry = header[source.choice(names)]
    deed = source.randrange(7)
    if deed == 0:
        entry["shape"] = source.choice(
            [[10**12], [10**9, 0], [0, 10**9], [2**40, 2**40], [-1, -4], [1.5], []]
        )
    elif deed == 1:
        entry["data_offsets"] = source.choice([[0, 10**13], [5, 1], [0, 0], [-8, 8], [0]])
    elif deed == 2:
        entry["dtype"] = source.choice(["F64", "I8", "BOOL", "F4", "", 5])
    elif deed == 3:
        header = poison_value(source, header)
    elif deed == 4:
        name = source.choice(names)
        header[name + ".x"] = {
            "dtype": "F32",
            "shape": [10**9, 0],
            "data_offsets": header[name]["data_offsets"][:1] * 2,
        }
    new = json.dumps(header).encode()
    if deed == 5:
        new = poison_text(source, json.dumps(header)).encode("utf-8", "surrogatepass")
    size = source.choice([2**63, 2**64 - 1, len(raw) * 2, 10**8]) if deed == 6 else len(new)
    path.write_bytes(size.to_bytes(8, "little") + new + raw[8 + length :])


def edit_record(source: random.Random, path: Path) -> None:
    """Change a calibration's record or tensors, and write it as the format that has no checksum."""
    raw = path.read_bytes()
    metadata = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
    record, tensors = json.loads(metadata["record"]), load_file(path)
    if source.random() < 0.7:
        content = json.dumps(poison_value(source, record))
        content = poison_text(source, content) if source.random() < 0.2 else content
    else:
        content = metadata["record"]
        edit_tensor(source, tensors)
    save_file(tensors, path, metadata={"format": "evatune-calibration-1", "record": content})


def edit_weights(source: random.Random, path: Path) -> None:
    tensors = load_file(path)
    edit_tensor(source, tensors)
    save_file(tensors, path)


def edit_tensor(source: random.Random, tensors: dict[str, torch.Tensor]) -> None:
    name = source.choice(sorted(tensors))
    tensor = tensors[name]
    change: Callable[[], torch.Tensor] = source.choice(
        [
            lambda: tensor * 1e30,
            lambda: -tensor,
            lambda: tensor * float("nan"),
            lambda: tensor + 0.5,
            lambda: tensor.double(),
            lambda: tensor.to(torch.int64),
            lambda: tensor[:1],
            lambda: tensor[:0],
            lambda: tensor[None],
            lambda: tensor.flatten(),
            lambda: torch.zeros(0, 5),
            lambda: torch.zeros(10**9, 0),
            lambda: tensor.flip(0),
            lambda: torch.zeros_like(tensor),
            lambda: torch.cat([tensor, tensor]),
            lambda: tensor.to(torch.float8_e4m3fn),
            lambda: torch.tensor(1.0),
            lambda: tensor.expand(3, *tensor.shape),
        ]
    )
    tensors[name] = change().contiguous()
    if source.random() < 0.2:
        del tensors[source.choice(sorted(tensors))]
    if source.random() < 0.2:
        tensors[name.replace("0", "7").replace("lora", "lara") + ".x"] = torch.zeros(3)


def break_one_of(source: random.Random, folder: Path) -> None:
    path = source.choice(sorted(folder.iterdir()))
    deed = source.randrange(4)
    if deed == 0:
        path.unlink()
    elif deed == 1:
        path.write_bytes(b"")
    elif deed == 2 and path.suffix == ".json":
        edit_json(source, path)
    else:
        source.choice([flip_bits, truncate, shuffle_bytes])(source, path)


# -- the kinds -------------------------------------------------------------------------------------

RAW: tuple[Mutation, ...] = (flip_bits, truncate, shuffle_bytes)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))


def batches(count: int = 6) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(32, 16, generator=generator) for _ in range(count)]


def calibrate(**options: Any) -> evatune.Calibration:
    config = evatune.CalibrationConfig(rank=4, tolerance=0)
    return evatune.calibrate(model(), batches(), config, targets="all-linear", **options)


def write_calibration(folder: Path) -> Path:
    calibrate().save(folder / "calibration.safetensors")
    return folder / "calibration.safetensors"


def read_calibration(path: Path) -> None:
    calibration = evatune.Calibration.load(path)
    calibration.allocate()
    evatune.Calibration.merge([calibration, calibration])


def write_checkpoint(folder: Path) -> Path:
    calibrate(checkpoint=Checkpoint(folder / "checkpoint", every=1))
    return folder / "checkpoint"


def write_adapter(folder: Path, name: str) -> Path:
    config = LoraConfig(
        r=4, target_modules=["0", "2"], rank_pattern={"0": 2}, alpha_pattern={"0": 4}
    )
    get_peft_model(model(), config).save_pretrained(folder)
    return folder / name


def read_adapter(path: Path) -> None:
    adapter_rows(path.parent / "adapter_model.safetensors")
    export_uniform(path.parent, path.parent / "out")


def write_recipe(folder: Path) -> Path:
    (folder / "recipe.yaml").write_text(json.dumps(as_tree(load("understanding-bbc"))))
    return folder / "recipe.yaml"


def write_run(folder: Path, name: str) -> Path:
    result = {
        "score": 0.5,
        "eval_loss": 1.0,
        "measures": {"accuracy": 0.5},
        "trainable_parameters": 10,
        "first_gradient_b": 0.1,
        "init_seconds": 0.1,
        "train_seconds": 1.0,
        "resumed": False,
        "steps": 4,
        "peak_memory_bytes": 1000,
        "versions": {"torch": "2.6"},
    }
    (folder / RESULT).write_text(json.dumps(result))
    (folder / RECIPE).write_text(json.dumps(as_tree(load("understanding-bbc"))))
    lines = [
        {"step": step, "seconds": 0.5, "loss": 1.0, "eval_loss": 1.0 / (step + 1)}
        for step in range(5)
    ]
    (folder / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / name


def read_run(path: Path) -> None:
    recipe = load("understanding-bbc")
    require_own_run(path.parent, as_tree(recipe))
    read_metrics(path.parent)
    summarize([Run(recipe, path.parent)])  # which goes on without those that are damaged
    read_result(path.parent)


def write_trainer_state(folder: Path) -> Path:
    path = folder / "checkpoint-4"
    path.mkdir()
    (path / "trainer_state.json").write_text(
        json.dumps({"global_step": 4, "log_history": [{"loss": 1.0}], "epoch": 0.5})
    )
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"state": {0: torch.zeros(40)}, "name": name}, path / name)
    save_file({"a": torch.zeros(4, 4)}, path / "adapter_model.safetensors")
    return path


def write_texts(folder: Path, ending: str) -> Path:
    path = folder / f"data.{ending}"
    rows = [f"text number {number}" for number in range(20)]
    if ending == "jsonl":
        path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    else:
        path.write_text(
            "".join(f"{row}\n" for row in (["text", *rows] if ending == "csv" else rows))
        )
    return path


def read_texts(path: Path) -> None:
    len(load_texts(path))


FILE_KINDS: dict[str, FileKind] = {
    "calibration": FileKind(write_calibration, read_calibration, (*RAW, edit_header)),
    "calibration, old format": FileKind(write_calibration, read_calibration, (edit_record,)),
    "checkpoint": FileKind(
        write_checkpoint,
        lambda path: calibrate(checkpoint=Checkpoint(path, resume=True)),
        (*RAW, edit_header),
    ),
    "adapter config": FileKind(
        partial(write_adapter, name="adapter_config.json"),
        read_adapter,
        (*RAW, edit_json, edit_json, bomb_text),
    ),
    "adapter weights": FileKind(
        partial(write_adapter, name="adapter_model.safetensors"),
        read_adapter,
        (*RAW, edit_header, edit_weights),
    ),
    "recipe": FileKind(
        write_recipe, lambda path: load(str(path)), (*RAW, edit_yaml, bomb_yaml, bomb_text)
    ),
    RECIPE: FileKind(partial(write_run, name=RECIPE), read_run, (*RAW, edit_json, bomb_text)),
    RESULT: FileKind(partial(write_run, name=RESULT), read_run, (*RAW, edit_json, bomb_text)),
    METRICS: FileKind(partial(write_run, name=METRICS), read_run, (*RAW, edit_line, edit_line)),
    "Trainer's checkpoint": FileKind(
        write_trainer_state, lambda path: newest_whole(path.parent), (break_one_of,)
    ),
    "data, jsonl": FileKind(
        partial(write_texts, ending="jsonl"), read_texts, (*RAW, edit_line, bomb_text)
    ),
    "data, csv": FileKind(partial(write_texts, ending="csv"), read_texts, (*RAW, bomb_text)),
    "data, txt": FileKind(partial(write_texts, ending="txt"), read_texts, RAW),
}


# -- a case ----------------------------------------------------------------------------------------


class _NoEnd(BaseException):
    pass


def outcome(kind: FileKind, seed: int, folder: Path) -> str:
    """Mutate a good file and read it: "accepted", "refused", or what is a fault: "traceback" or "no
    end".

    What is passed over with a warning that says why counts as refused.
    """
    source = random.Random(seed)
    path = kind.write(folder)
    mutation = source.choice(kind.mutations)
    mutation(source, path)
    try:
        with _deadline(SECONDS), warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            kind.read(path)
    except evatune.EvatuneError as error:
        message = str(error)
        if "\n" in message or len(message) > 4000:
            print(
                f"seed {seed}, {mutation.__name__}: no single sentence: {message[:300]!r}",
                file=sys.stderr,
            )
            return "traceback"
        return "refused"
    except _NoEnd:
        print(f"seed {seed}, {mutation.__name__}: no end", file=sys.stderr)
        return "no end"
    except Exception:
        print(f"seed {seed}, {mutation.__name__}:", file=sys.stderr)
        traceback.print_exc()
        return "traceback"
    passed_over = any(
        " is left out: " in str(one.message) or " cannot be gone on from: " in str(one.message)
        for one in said
    )
    return "refused" if passed_over else "accepted"


@contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise _NoEnd

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


OUTCOMES = ("accepted", "refused", "traceback", "no end", "crash")


def in_child(kind: FileKind, seed: int) -> str:
    """`outcome` in a process of its own, which neither a crash nor code that hears no signal can
    take along."""
    folder = Path(tempfile.mkdtemp(prefix="evatune-fuzz-"))
    child = os.fork()
    if child == 0:
        status = len(OUTCOMES)
        try:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
            status = OUTCOMES.index(outcome(kind, seed, folder))
        finally:
            sys.stderr.flush()
            os._exit(status)
    try:
        end = time.monotonic() + 2 * SECONDS
        while time.monotonic() < end:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                code = os.waitstatus_to_exitcode(status)
                return OUTCOMES[code] if 0 <= code < len(OUTCOMES) else "crash"
            time.sleep(0.002)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return "no end"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=40, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="a part of the names of the kinds to try")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| kind | " + " | ".join(OUTCOMES) + " |\n|---|" + "---:|" * len(OUTCOMES))
    totals: Counter[str] = Counter()
    for name, kind in FILE_KINDS.items():
        if options.only not in name:
            continue
        seeds = range(options.seed * options.cases, (options.seed + 1) * options.cases)
        counts = Counter(in_child(kind, seed) for seed in seeds)
        totals += counts
        print(f"| {name} | " + " | ".join(str(counts[end]) for end in OUTCOMES) + " |", flush=True)
    print("| all | " + " | ".join(str(totals[end]) for end in OUTCOMES) + " |")
    sys.exit(any(totals[end] for end in ("traceback", "no end", "crash")))


if __name__ == "__main__":
    main()
