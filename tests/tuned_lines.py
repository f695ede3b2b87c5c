"""Made-up lines of a tuned comparison, with known differences."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from typing import Any

from evatune.schemas.tuned import RunLine

# How much better than LoRA in score, and how much larger its first step.
METHODS = {
    "head": (-0.2, None), "full": (0.05, None), "lora": (0.0, 1.0), "eva": (0.02, 4.0),
    "lora-orthogonal": (0.005, 2.0), "lora-ga": (0.012, 8.0), "pissa": (-0.01, 3.0),
    "dora": (0.003, 1.0), "loraplus": (0.0, 1.0), "rslora": (0.001, 1.4),
    "lora-fa": (-0.02, 1.0), "eva-fa": (-0.04, 1.0), "lora-redist": (0.002, 1.0),
    "eva-shuffled": (-0.006, 4.0), "eva-paper-centered": (0.03, 4.0),
    "eva-paper-random": (0.02, 4.0),
}  # fmt: skip
FACTOR = 10**0.25
STEPS = 100


def tuned_lines(
    domains: Sequence[str] = ("images",),
    tasks: Sequence[str] = ("digits", "fonts", "counting", "location"),
    methods: Sequence[str] = tuple(METHODS),
    test_seeds: int = 5,
    **settings: Any,
) -> list[RunLine]:
    """Return a whole search: five rates, three tuning seeds at three of them, and test seeds."""
    lines = []
    for domain in domains:
        for task in tasks:
            for method in methods:
                for rate, seed, tested in _runs(method, test_seeds):
                    lines.append(line_of(domain, task, method, rate, seed, tested, **settings))
    return lines


def _runs(method: str, test_seeds: int) -> Iterator[tuple[float, int, bool]]:
    best = 0.01 / (METHODS[method][1] or 1.0)
    for power in range(-2, 3):
        for seed in range(3 if abs(power) < 2 else 1):
            yield best * FACTOR**power, seed, False
    for seed in range(10, 10 + test_seeds):
        yield best, seed, True


def line_of(
    domain: str,
    task: str,
    method: str,
    rate: float,
    seed: int,
    tested: bool,
    diverged: bool = False,
    **settings: Any,
) -> RunLine:
    gain, kappa = METHODS[method]
    noise = random.Random(f"{domain}{task}{seed}{method}").gauss(0, 0.004)
    off = math.log10(rate * (kappa or 1.0) / 0.01)
    level = 0.7 + gain + noise + 0.01 * len(task) - 0.1 * off * off
    speed = 0.05 * math.exp(5 * gain)
    curve = [
        (step, 2.5 * math.exp(-speed * step) + 1 - level, min(1.0, level * step / STEPS))
        for step in range(0, STEPS + 1, 5)
    ]
    layers = [f"encoder.layer.{i}.{kind}" for i in range(6) for kind in ("query", "key", "fc1")]
    ranks = {name: (7 * i) % 5 for i, name in enumerate(layers)} if method == "eva" else None
    measures = {"loss": None, "score": None} if diverged else {"loss": curve[-1][1], "score": level}
    tree = {
        "domain": domain, "task": task, "model": "demo", "method": method, "seed": seed,
        "adapter": {"rank": 2, "rho": 2, **settings},
        "training": {"learning_rate": rate, "steps": STEPS, "lora_plus_ratio": 16.0},
    }  # fmt: skip
    parameters = {"head": 1_000, "full": 1_000_000}.get(method, 50_000) - 2_000 * (method == "eva")
    return RunLine.model_validate(
        {
            "id": f"{domain}-{task}-{method}-{rate}-{seed}-{sorted(settings.items())}",
            "settings": tree, "data": "d", "code": 1, "tested": tested, "curve": curve,
            "validation": measures, "test": measures if tested else None, "diverged": diverged,
            "parameters": parameters, "init_seconds": 0.4, "train_seconds": 9.0,
            "peak_memory_bytes": 500 << 20, "kappa": kappa, "participation": 5.0 + len(task),
            "ranks": ranks,
        }
    )  # fmt: skip
