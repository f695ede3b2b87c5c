"""Install the wheels into empty environments, and run every command of the README there.

    python scripts/clean_install.py [--only lowest] [--extras demo] [--torch 2.6.0]

One environment gets the lowest versions that pyproject.toml allows, the other the newest. The
library comes alone first, then extra after extra, each followed by the commands that need it, on
small models and a few examples. torch is that of constraints.txt in both, since other versions are
gigabytes; `--torch` names another. It prints the sizes of the wheels and a table, and ends with
status 1 if a command failed or evatune's own wheel is too large.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
import tomllib
import venv
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
SECONDS = 900  # for one command
LARGEST = 600_000  # bytes of the wheel without the checkpoints, which are twenty times as much
ASSETS = ROOT / "assets"

_TINY = "data.train=16 data.test=8 training.steps=2 training.batch_size=4 training.eval_every=2"
_DATA = "--model MODEL --data my.jsonl --text-column text --rank 4 --batch-size 4 --max-batches 2"
_HELP = ("init", "inspect", "merge", "export", "train", "compare", "recipes")
_METHODS = "--methods lora,pissa,eva --seeds 0 --lrs 1e-3,3e-3"

# Extra → commands that need nothing more than it. The first has none.
COMMANDS: Mapping[str, tuple[str, ...]] = {
    "": ("evatune --version", "evatune --help", "python README.py"),
    "cli": (
        *(f"evatune {name} --help" for name in _HELP),
        f"evatune init {_DATA} --out adapter",
        f"evatune init {_DATA} --checkpoint-every 1 --out other",
        "evatune inspect adapter",
        "evatune merge adapter other -o all.safetensors",
        "evatune export adapter -o served",
        "evatune export adapter -o merged --format merged",
        "evatune recipes ls",
        "evatune recipes show images-digits",
        "evatune recipes cp images-digits mine.yaml",
    ),
    "recipes": (
        f"evatune train images-fonts method=eva seed=0 {_TINY} --out fonts",
        f"evatune train generation-arithmetic method=corda {_TINY} --out arithmetic",
        f"evatune compare 'generation-arith*' {_METHODS} {_TINY} --out compared",
    ),
    "demo": (
        "evatune init --max-batches 2 --out demo",
        f"evatune train understanding-bbc {_TINY} --out bbc",
        "python EXAMPLES/plain_loop.py",
        "python EXAMPLES/add_adapter.py --out added",
        "python EXAMPLES/trainer.py --steps 2 --out trained",
    ),
    "images": (f"evatune train images-digits method=eva seed=0 {_TINY} --out digits",),
    "trl": (
        "python EXAMPLES/sft.py --steps 2 --out sft",
        "python EXAMPLES/dpo.py --steps 2 --out dpo",
    ),
    "lightning": ("python EXAMPLES/lightning_callback.py --steps 2 --out lightning",),
    "ray": (
        "python EXAMPLES/shards_ray.py --batches 1 --out shards",
        f"evatune compare generation-arithmetic --seeds 0 {_TINY} --executor ray --out on-ray",
    ),
    "rl": (f"evatune train rl-push {_TINY} data.episodes=1 --out push",),
}

# What the README's block of Python takes for granted, and its model, for which a small one stands.
_HUB_MODEL = "meta-llama/Llama-3.2-1B"


@dataclass(frozen=True)
class Outcome:
    """What became of one command."""

    environment: str
    command: str
    seconds: float
    problem: str  # the end of its output; empty where it went well

    def __str__(self) -> str:
        ending = "FAILED" if self.problem else "ok"
        return f"{self.environment:7} {ending:6} {self.seconds:5.0f} s  {self.command}"


@dataclass(frozen=True)
class Environment:
    """An environment of its own, beside a folder to work in."""

    name: str
    folder: Path

    @property
    def work(self) -> Path:
        return self.folder / "work"

    @property
    def constraints(self) -> Path:
        return self.folder / "constraints.txt"

    def make(self) -> None:
        venv.create(self.folder / "venv", with_pip=True)
        self.work.mkdir()

    def install(self, wheel: Path, extra: str, versions: Mapping[str, str]) -> Outcome:
        lines = [f"{library}=={version}\n" for library, version in versions.items()]
        self.constraints.write_text("".join(lines))
        what = f"[{extra}]" if extra else ""
        options = f"--quiet --constraint {self.constraints} --find-links {wheel.parent}"
        command = f"pip install {options} '{wheel}{what}'"
        return self.run(command, shown=f"pip install evatune{what}")

    def furnish(self) -> None:
        """Write what the commands take for granted: texts, and the README's Python."""
        texts = [f"{n} plus {n} is {2 * n}" for n in range(64)]
        records = [json.dumps({"text": text}) + "\n" for text in texts]
        (self.work / "my.jsonl").write_text("".join(records))
        (self.work / "my.txt").write_text("\n".join(texts))
        block = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
        assert block is not None
        code = block[1].replace(_HUB_MODEL, "MODEL")
        (self.work / "README.py").write_text(self._filled(code))

    def run(self, command: str, shown: str | None = None) -> Outcome:
        variables = os.environ | {
            "PATH": f"{self.folder / 'venv' / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "EVATUNE_CACHE": str(self.folder / "cache"),
            "PYTHONNOUSERSITE": "1",
        }
        variables.pop("PYTHONPATH", None)
        begun = time.monotonic()
        try:
            done = subprocess.run(
                shlex.split(self._filled(command)),
                cwd=self.work,
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=SECONDS,
                check=False,
            )
            problem = f"status {done.returncode}\n{done.stdout[-2000:]}" if done.returncode else ""
        except subprocess.TimeoutExpired:
            problem = f"not done after {SECONDS} seconds"
        return Outcome(self.name, shown or command, time.monotonic() - begun, problem)

    def _filled(self, text: str) -> str:
        """Return the text with the paths of the examples, and of the small Llama."""
        model = ASSETS / "src" / "evatune_assets" / "llama-small"
        return text.replace("MODEL", str(model)).replace("EXAMPLES", str(ROOT / "examples"))


def main() -> None:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("--only", choices=["lowest", "newest"], help="one of the environments")
    extras = ",".join(filter(None, COMMANDS))
    parser.add_argument("--extras", default=extras, help="default: %(default)s")
    parser.add_argument("--torch", default=pinned("torch"), help="default: %(default)s")
    arguments = parser.parse_args()
    chosen = ["", *filter(None, arguments.extras.split(","))]
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="clean-install-") as name:
        wheel = built(Path(name) / "dist")
        too_large = wheel.stat().st_size > LARGEST
        for path in wheel.parent.iterdir():
            print(f"{path.stat().st_size:>12,} bytes  {path.name}")
        for which in ("lowest", "newest"):
            if arguments.only in (None, which):
                environment = Environment(which, Path(name) / which)
                for outcome in outcomes_in(environment, wheel, chosen, arguments.torch):
                    outcomes.append(outcome)
                    print(outcome, *outcome.problem.splitlines(), sep="\n", flush=True)
    failed = [outcome for outcome in outcomes if outcome.problem]
    print(f"\n{len(failed)} of {len(outcomes)} commands failed", *failed, sep="\n")
    sys.exit(bool(failed) or too_large)


def built(folder: Path) -> Path:
    """Build the wheels of this checkout; return evatune's, beside which that of its assets is."""
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--wheel-dir", str(folder), str(ROOT), str(ASSETS)], check=True)
    (wheel,) = folder.glob("evatune-*.whl")
    return wheel


def outcomes_in(
    environment: Environment,
    wheel: Path,
    extras: Iterable[str],
    torch: str,
) -> Iterator[Outcome]:
    """Yield what became of each installation, and of the commands after it."""
    environment.make()
    versions: dict[str, str] = {}
    for extra in extras:
        if environment.name == "lowest":
            versions |= lowest(extra)  # which may be more than the libraries before it asked for
        installed = environment.install(wheel, extra, versions | {"torch": torch})
        yield installed
        if installed.problem:
            continue
        if not extra:
            environment.furnish()
        for command in COMMANDS[extra]:
            yield environment.run(command)


def lowest(extra: str) -> dict[str, str]:
    """Return the least versions that pyproject.toml names for an extra, or, for "", without one."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = project["optional-dependencies"][extra] if extra else project["dependencies"]
    versions: dict[str, str] = {}
    for text in texts:
        if ours := re.fullmatch(r"evatune\[(\w+)\]", text):
            versions |= lowest(ours[1])
        elif bound := re.match(r"([\w-]+)>=([\w.]+)", text):
            versions[bound[1]] = bound[2]
    return versions


def pinned(library: str) -> str:
    """Return the version in constraints.txt."""
    found = re.search(rf"^{library}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


if __name__ == "__main__":
    main()
