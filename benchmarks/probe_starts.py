"""Whether directions and scale of an adapter's start matter once its learning rate is tuned.

    python benchmarks/probe_starts.py choose [--tasks …]  # which tasks leave room for a start
    python benchmarks/probe_starts.py fixed [--tasks …]   # scales at what users bring
    python benchmarks/probe_starts.py grid [--tasks …] [--starts …] [--ranks 2,8]
    python benchmarks/probe_starts.py report

Every run appends one JSON line to PART.jsonl in the folder of results. A run whose line is there is
not repeated, so that a part can be killed at any time and goes on when it is called again. Rates
are chosen by the loss on validation examples, which are apart from training and test examples, and
the test loss is read at the chosen rate only. All starts keep uniform ranks unless they say
otherwise. A new head is trained at one rate of its own for all starts, but in the part `fixed` at
the user's.
"""

from __future__ import annotations

import argparse
import copy
import math
import random
import statistics
import subprocess
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache, partial
from itertools import chain, product, repeat
from pathlib import Path
from typing import Any

import torch
import transformers
from probe_search import (
    SEEDS,
    STEPS_PER_DECADE,
    append_line,
    best_position,
    diverged,
    key_of,
    losses_of,
    next_try,
    rate_at,
    read_lines,
    select,
)
from probe_tables import choose_table, fixed_tables, report, rooms
from torch import Tensor

import evatune
from evatune.calibration import CalibrationConfig
from evatune.choices import SCALES, Objective
from evatune.errors import ConfigError
from evatune.finetune.methods import METHODS, AdapterSetup, Method, Preparation
from evatune.finetune.recipe import Recipe
from evatune.finetune.recipe_files import load
from evatune.finetune.start_facts import kappas_and_participation
from evatune.finetune.tasks import Task, find_domain
from evatune.finetune.training import build_trainer
from evatune.trainers.hf import training_batches

RESULTS = Path(__file__).parent / "results" / "probe"
PARTS = ("choose", "fixed", "grid")
LORA_POSITION = -8  # 1e-2, where the search for LoRA's rate begins
HEAD_RATE = 5e-3  # of a new head, for all starts: the rate of LoRA in the recipes that have one
NOT_HERE = "not in this version"


# -- tasks -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """How the probe runs a recipe.

    Attributes:
        overrides: of the recipe. Steps are a multiple of `points`.
        validation: how many of the held-out examples (data.test) are; the others are to test on.
        points: evaluations after the one before training; quarter and half are among them.
        users_rank: r in the part `fixed`.
    """

    overrides: list[str]
    validation: int
    points: int = 8
    users_rank: int = 8


def _text(train: int, test: int, batch: int, steps: int) -> Setting:
    return Setting(_sizes(train, 160 + test, batch, steps), validation=160)


def _images(steps: int) -> Setting:
    return Setting(_sizes(3600, 1300, 16, steps), validation=300)


def _sizes(train: int, held_out: int, batch: int, steps: int) -> list[str]:
    sizes = [f"data.train={train}", f"data.test={held_out}"]
    return [*sizes, f"training.batch_size={batch}", f"training.steps={steps}"]


# So that a run takes some ten seconds of one core.
SETTINGS = {
    "generation-arithmetic": _text(train=3200, test=480, batch=8, steps=160),
    "generation-commonsense": _text(train=960, test=160, batch=16, steps=160),
    "generation-reviews": _text(train=1920, test=480, batch=8, steps=120),
    "images-location": _images(steps=200),
    "images-orientation": _images(steps=200),
    "images-counting": _images(steps=200),
    # As a new user would try it: attention's query and value, 80 steps. For the part `fixed` only.
    "understanding-bbc": Setting(
        ["adapter.targets=[query, value]", "data.test=400", "training.steps=80"],
        validation=200,
        points=4,
        users_rank=16,
    ),
}
CANDIDATES = tuple(name for name in SETTINGS if name != "understanding-bbc")


@dataclass(frozen=True)
class Prepared:
    """A task whose examples are encoded once, with what is held out in two parts."""

    recipe: Recipe
    task: Task  # its test part is the validation examples
    test: list[Any]


@cache
def prepare(name: str, seed: int) -> Prepared:
    """Load a task; a new head depends on the seed, as in `evatune train`."""
    recipe = load(name, [*SETTINGS[name].overrides, f"seed={seed}"])
    transformers.set_seed(seed)
    task = find_domain(recipe.domain).prepare(recipe)
    collator = task.collator
    train, held_out = list(task.train), list(task.test)
    if recipe.domain == "images":  # the processor costs as much as the model
        train, held_out = [
            [_one(collator([example])) for example in part] for part in (train, held_out)
        ]
        collator = _stack
    random.Random(0).shuffle(held_out)
    count = SETTINGS[name].validation
    validation, test = _by_length(held_out[:count]), _by_length(held_out[count:])
    task = replace(
        task, train=train, validation=None, test=validation, collator=collator, evaluate=None
    )
    return Prepared(recipe, task, test)


def _one(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: values[0] for key, values in batch.items()}


def _stack(examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.stack([example[key] for example in examples]) for key in examples[0]}


def _by_length(examples: list[Any]) -> list[Any]:
    """Return the examples such that little of a batch is padding."""
    return sorted(examples, key=lambda example: len(example.get("input_ids", ())))


# -- starts ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Start:
    """A method with the options that the probe compares.

    Attributes:
        method: of `evatune.finetune.methods`.
        scale, objective, rho: of EVA.
    """

    method: str
    scale: str | None = None
    objective: Objective | None = None
    rho: float = 1

    @property
    def name(self) -> str:
        """The start in one word, such as eva:matched:gradients."""
        objective = None if self.objective == "activations" else self.objective
        rho = None if self.rho == 1 else f"rho{self.rho:g}"
        return ":".join(part for part in (self.method, self.scale, objective, rho) if part)


_ALL_SCALES = ("paper", "whiten", "matched", "whiten-matched")
STARTS = {
    start.name: start
    for start in (
        Start("lora"),
        *(Start("eva", scale, "activations") for scale in _ALL_SCALES),
        Start("lora-orthogonal"),
        Start("eva", "matched", "gradients"),
        Start("eva", "whiten-matched", "gradients"),
        Start("eva", "whiten-matched", "regression"),
        Start("lora-ga"),
        Start("lora-one"),
        Start("eva", "matched", "activations", rho=2),
        Start("full"),
    )
}


def why_not(start: Start) -> str | None:
    """Return why this version has no such start, or None."""
    if start.scale is not None and start.scale not in SCALES:
        return NOT_HERE
    known = {option.name for option in fields(CalibrationConfig)}
    if start.objective not in (None, "activations"):
        if "objective" not in known:
            return NOT_HERE
        try:
            CalibrationConfig(objective=start.objective)
        except ConfigError:
            return NOT_HERE
    # Without lora-ga-peft beside it, lora-ga is still PEFT's, and lora-orthogonal too.
    former = start.method in ("lora-ga", "lora-orthogonal") and "lora-ga-peft" not in METHODS
    return NOT_HERE if former or start.method not in METHODS else None


def method_of(start: Start) -> Method:
    method = METHODS[start.method]
    if start.method != "eva":
        return method
    options: dict[str, Any] = {"scale": start.scale, "rho": start.rho}
    if start.objective not in (None, "activations"):
        options["config"] = CalibrationConfig(objective=start.objective)
    return replace(method, initialize_options=options)  # type: ignore[call-arg]


# -- one run ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One run. `position` is that of its rate on the grid: rate = 10^(position / 4)."""

    task: str
    start: str
    rank: int
    alpha: float
    rate: float
    seed: int
    tested: bool = True  # whether the test examples are evaluated at the end

    @property
    def key(self) -> tuple[Any, ...]:
        return (self.task, self.start, self.rank, self.alpha, f"{self.rate:.4g}", self.seed)


@dataclass
class _Started:
    """A model at its start, with its Trainer."""

    trainer: Any
    task: Task
    test: list[Any]
    kappa: dict[str, float | None] = field(default_factory=dict)


def start_run(job: Job, folder: Path, head_rate: float | None) -> _Started:
    """Build the model, the Trainer and the start, as `evatune train` does."""
    prepared = prepare(job.task, job.seed)
    start = STARTS[job.start]
    method = method_of(start)
    recipe = _recipe(prepared.recipe, job)
    transformers.set_seed(job.seed)
    task = replace(prepared.task, model=copy.deepcopy(prepared.task.model))
    setup = AdapterSetup(
        adapter=replace(recipe.adapter, rank=job.rank, alpha=job.alpha),
        task_type=task.models.task_type,
        head=task.head,
        new_head=task.models.new_head,
        steps=recipe.training.steps,
    )
    model = method.adapt(task.model, setup)
    trainer = build_trainer(recipe, task, method, model, folder, resumed=False)
    preparation = Preparation(
        initialize=partial(evatune.initialize, trainer, rows=task.rows),
        initialize_elsewhere=partial(evatune.initialize, trainer, rows=task.rows),
        batches=lambda size: training_batches(trainer, size, recipe.seed),
        seed=job.seed,
        initial_adapter=folder / "initial",
        options={"rho": start.rho},
        rows=task.rows,
    )
    method.prepare(trainer.model, preparation)
    started = _Started(trainer, task, prepared.test)
    if start.method != "full":
        started.kappa = measure_start(model, task, job)
    if head_rate is not None and task.models.new_head:
        trainer.optimizer = _with_head_rate(trainer, task.head, head_rate)
    return started


def _recipe(recipe: Recipe, job: Job) -> Recipe:
    """Return the recipe with the job's rate and seed."""
    training = replace(recipe.training, learning_rate=job.rate)
    return replace(recipe, seed=job.seed, training=training)


def _with_head_rate(trainer: Any, head: Sequence[str], rate: float) -> Any:
    """Return Trainer's optimizer, with the head's weights at a rate of their own."""
    kind, options = trainer.get_optimizer_cls_and_kwargs(trainer.args)
    groups: tuple[list[Tensor], list[Tensor]] = ([], [])
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            groups[any(part in name.split(".") for part in head)].append(parameter)
    return kind([{"params": groups[0]}, {"params": groups[1], "lr": rate}], **options)


def measure_start(model: Any, task: Task, job: Job) -> dict[str, float | None]:
    """Return κ and the inputs' participation ratio: the median, least and most over layers."""
    kappas, ratios = kappas_and_participation(model, task, job.rank, job.alpha)
    return {
        "kappa": statistics.median(kappas),
        "kappa_least": min(kappas),
        "kappa_most": max(kappas),
        "participation": statistics.median(ratios),
        "participation_least": min(ratios),
        "participation_most": max(ratios),
    }


def execute(job: Job, head_rate: float | None) -> dict[str, Any]:
    """Train, and return the run's line."""
    begin, begin_cpu = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        started = start_run(job, Path(folder), head_rate)
        ready = time.perf_counter()
        transformers.set_seed(job.seed)  # whatever a start drew, all see the same batches
        trainer = started.trainer
        curve = train(trainer, SETTINGS[job.task].points)
        trained = time.perf_counter()
        test = _measures(trainer.evaluate(started.test)) if job.tested else None
    start = STARTS[job.start]
    return {
        "task": job.task,
        "start": job.start,
        "method": start.method,
        "scale": start.scale,
        "objective": start.objective,
        "rho": start.rho,
        "rank": job.rank,
        "alpha": job.alpha,
        "rate": job.rate,
        "seed": job.seed,
        "parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        **started.kappa,
        "steps": prepare(job.task, job.seed).recipe.training.steps,
        "curve": curve,
        "diverged": diverged(curve),
        "test": test,
        "start_seconds": round(ready - begin, 2),
        "train_seconds": round(trained - ready, 2),
        "seconds": round(time.perf_counter() - begin, 2),
        "cpu_seconds": round(time.process_time() - begin_cpu, 2),
        "commit": commit(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def train(trainer: Any, points: int) -> list[dict[str, Any]]:
    """Train as Trainer does, and return step, loss and score on the validation examples.

    Optimizer, schedule, clipping and the order of batches are Trainer's. Its own loop goes through
    all modules of the model five times a step, which takes a small model longer than the step.
    A run whose loss is no number ends there.
    """
    steps = trainer.args.max_steps
    trainer.create_optimizer_and_scheduler(steps)
    parameters = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    loader = trainer.get_train_dataloader()
    batches = chain.from_iterable(repeat(loader))
    curve = []
    for step in range(steps + 1):
        if step % (steps // points) == 0:
            curve.append({"step": step, **_measures(trainer.evaluate())})
            trainer.model.train()
            if step == steps or curve[-1]["loss"] is None:
                break
        trainer.model(**next(batches)).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, trainer.args.max_grad_norm)
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        trainer.optimizer.zero_grad()
    return curve


def _measures(evaluated: Mapping[str, Any]) -> dict[str, float | None]:
    """Return loss and score; None for what is no number.

    The score is accuracy, or where answers are written the share that is written without a mistake.
    """
    score = "eval_exact_match" if "eval_exact_match" in evaluated else "eval_score"
    return {"loss": _finite(evaluated["eval_loss"]), "score": _finite(evaluated[score])}


def _finite(value: float) -> float | None:
    return round(value, 6) if math.isfinite(value) else None


@cache
def commit() -> str:
    git, folder = ["git", "describe", "--always", "--dirty"], Path(__file__).parent
    return subprocess.run(
        git, cwd=folder, capture_output=True, text=True, check=False
    ).stdout.strip()


# -- the three parts -------------------------------------------------------------------------------


@dataclass
class Book:
    """The lines of one part, and where further ones go."""

    path: Path
    deadline: float = math.inf
    lines: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.lines = read_lines(self.path)

    def run(self, job: Job, head_rate: float | None = HEAD_RATE) -> dict[str, Any]:
        """Return the job's line, from the file or from a run."""
        for line in self.lines:
            if key_of(line) == job.key:
                return line
        if time.monotonic() > self.deadline:
            raise SystemExit(f"time is over; {len(self.lines)} lines in {self.path}")
        line = execute(job, head_rate)
        append_line(self.path, line)
        self.lines.append(line)
        last, seconds = line["curve"][-1], line["seconds"]
        print(*job.key, f"loss {last['loss']} score {last['score']} in {seconds} s", flush=True)
        return line


def choose(book: Book, options: argparse.Namespace) -> None:
    """Run LoRA of the lowest rank and full fine-tuning at rates × 3.16 on every candidate."""
    rank = min(options.ranks)
    for task in options.tasks:
        for start, center in (("lora", LORA_POSITION), ("full", -12)):
            while True:
                losses = losses_of(book.lines, task=task, start=start)
                tried = next_try(losses, center, spread=1, stride=2, seeds=(0,))
                if tried is None:
                    break
                rate = rate_at(tried[0])
                book.run(Job(task, start, rank, rank, rate, tried[1], tested=False))
    print(choose_table(book.lines))


USERS_RATES, USERS_ALPHAS = (5e-5, 1e-4, 2e-4, 5e-4, 1e-3), (1, 2)  # α over r


def fixed(book: Book, options: argparse.Namespace) -> None:
    """Run every scale at the rates and alphas that users bring; the head goes with them."""
    usual = ["lora", *(f"eva:{scale}" for scale in _ALL_SCALES)]
    starts = list(runnable(options.starts or usual))
    rates = sorted(options.rates, reverse=True)
    for seed in SEEDS[: options.seeds]:
        for task in options.tasks:
            rank = SETTINGS[task].users_rank
            for rate, start, times in product(rates, starts, options.alphas):
                job = Job(task, start, rank, rank * times, rate, seed, tested=False)
                book.run(job, head_rate=None)
    print(fixed_tables(book.lines))


def grid(book: Book, options: argparse.Namespace) -> None:
    """Search each start's rate on each task at each rank, then run the other seeds around it."""
    for rank in options.ranks:
        for task in options.tasks:
            for start in runnable(options.starts or [name for name in STARTS if name != "full"]):
                search(book, task, start, rank)


def search(book: Book, task: str, start: str, rank: int) -> None:
    """Run until the start's best rate on the task is found."""
    center: int | None = None
    while True:
        losses = losses_of(book.lines, task=task, start=start, rank=rank)
        if center is None:
            center = _center(book, task, start, rank)
        tried = next_try(losses, center)
        if tried is None:
            return
        book.run(Job(task, start, rank, rank, rate_at(tried[0]), tried[1]))


def _center(book: Book, task: str, start: str, rank: int) -> int:
    """Return the position of LoRA's best rate over κ, by which theory moves it."""
    of_lora = losses_of(book.lines, task=task, start="lora", rank=rank)
    reference = (
        LORA_POSITION if not of_lora or start == "lora" else best_position(of_lora, SEEDS[0])
    )
    if start == "lora":
        return reference
    known = select(book.lines, task=task, start=start, rank=rank, seed=SEEDS[0])
    kappa = known[0]["kappa"] if known else kappa_of(task, start, rank)
    return reference - round(STEPS_PER_DECADE * math.log10(kappa))


def kappa_of(task: str, start: str, rank: int) -> float:
    """Return a start's median κ without a run."""
    job = Job(task, start, rank, rank, 1e-3, SEEDS[0])
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kappa = start_run(job, Path(folder), None).kappa["kappa"]
    assert kappa is not None
    return kappa


def chosen_tasks(options: argparse.Namespace) -> list[str]:
    """Return all candidates to choose from, and afterwards the two with most room and the last."""
    if options.part == "choose":
        return list(CANDIDATES)
    ordered = list(rooms(read_lines(options.results / "choose.jsonl")))
    if len(ordered) < 3:
        raise SystemExit("run the part choose first, or name tasks with --tasks")
    return [*ordered[:2], ordered[-1]]


def runnable(names: Iterable[str]) -> Iterator[str]:
    """Yield the starts that this version has, and say which it has not."""
    for name in names:
        reason = why_not(STARTS[name])
        if reason is None:
            yield name
        else:
            print(f"{name} is left out: {reason}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("part", choices=[*PARTS, "report"])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the lines")
    parser.add_argument(
        "--tasks", type=_words, help="recipes, with commas between; default: by the part choose"
    )
    parser.add_argument("--starts", type=_words, help="starts, with commas between")
    parser.add_argument(
        "--ranks", type=lambda text: [int(part) for part in _words(text)], default=[2, 8]
    )
    parser.add_argument("--seeds", type=int, default=1, help="of the part fixed")
    parser.add_argument(
        "--rates", type=_numbers, default=USERS_RATES, help="of the part fixed, commas between"
    )
    parser.add_argument(
        "--alphas", type=_numbers, default=USERS_ALPHAS, help="of the part fixed, over the rank"
    )
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no run after them")
    options = parser.parse_args()
    if options.part == "report":
        print(report(options.results))
        return
    torch.set_num_threads(1)
    if options.tasks is None:
        options.tasks = chosen_tasks(options)
    book = Book(options.results / f"{options.part}.jsonl", time.monotonic() + 60 * options.minutes)
    {"choose": choose, "fixed": fixed, "grid": grid}[options.part](book, options)


def _numbers(text: str) -> list[float]:
    return [float(part) for part in _words(text)]


def _words(text: str) -> list[str]:
    return text.split(",")


if __name__ == "__main__":
    main()
