"""Initialisation of MiniLM on BBC news: quality, cost and stability, beside PEFT's EVA.

    python benchmarks/init.py [--output benchmarks/results/init.json]

Batches of 16 texts × 128 tokens, the 36 linear layers of the encoder, r = 16, ρ = 2. Correctness is
asserted first, by second moments in float64 that are collected here, without evatune. All times are
of this one run; only their ratios mean anything. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import random
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu import Counting
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer, get_eva_state_dict
from torch import Tensor, nn

import evatune
from evatune.loading.batches import TextBatches
from evatune.loading.demo import demo_data, demo_model
from evatune.loading.models import load_model
from evatune.loading.texts import load_texts
from evatune.sketch import NystromSketch, SketchSettings

RANK, RHO, TIMED_BATCHES, HELD_OUT = 16, 2.0, 16, 16
LAYERS = r"encoder\..*\.(query|key|value|dense)"


class Moments:
    """Float64 truth per layer: Σ xxᵀ, Σ x and the number of rows, from forward passes over some
    batches."""

    def __init__(self, model: nn.Module, batches: list[Any], names: list[str]) -> None:
        self.second: dict[str, Tensor] = {}
        self.first: dict[str, Tensor] = {}
        self.rows = 0
        mask: Tensor | None = None

        def add(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                assert mask is not None
                x = args[0][mask].double()
                self.second[name] = self.second.get(name, 0) + x.T @ x
                self.first[name] = self.first.get(name, 0) + x.sum(0)

            return hook

        # Query, key and value have one input; its moments are collected once and shared.
        own = [name for name in names if not name.endswith((".key", ".value"))]
        handles = [model.get_submodule(name).register_forward_pre_hook(add(name)) for name in own]
        with torch.no_grad():
            for batch in batches:
                mask = batch["attention_mask"].bool()
                self.rows += int(mask.sum())
                model(**batch)
        for handle in handles:
            handle.remove()
        self.names = names

    def of(self, name: str, center: Tensor | None = None) -> Tensor:
        """Mean second moment (d, d) of a layer's input, about `center` if given."""
        key = name.replace(".key", ".query").replace(".value", ".query")
        moment, mean = self.second[key] / self.rows, self.first[key] / self.rows
        if center is None:
            return moment
        return (
            moment
            - torch.outer(mean, center)
            - torch.outer(center, mean)
            + torch.outer(center, center)
        )

    def mean(self, name: str) -> Tensor:
        key = name.replace(".key", ".query").replace(".value", ".query")
        return self.first[key] / self.rows


class Oracle:
    """What the exact eigenvectors of some batches capture on held-out ones, and any other
    directions beside them."""

    def __init__(self, seen: Moments, held: Moments, center: bool) -> None:
        self.vectors: dict[str, Tensor] = {}
        self.held: dict[str, Tensor] = {}
        for name in seen.names:
            middle = seen.mean(name) if center else None
            self.vectors[name] = torch.linalg.eigh(seen.of(name, middle))[1].flip(1).T
            self.held[name] = held.of(name, middle)

    def share(self, name: str, directions: Tensor) -> float:
        """Held-out energy in `directions` (k, d), as a share of what the exact k capture."""
        moment, v = self.held[name], directions.double()
        best = self.vectors[name][: len(v)]
        return float(((v @ moment) * v).sum() / ((best @ moment) * best).sum())

    def shares(self, directions: dict[str, Tensor]) -> dict[str, float]:
        values = [self.share(name, v) for name, v in directions.items() if len(v)]
        return {"mean": statistics.fmean(values), "worst": min(values)}


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def adapted(model: nn.Module, **options: Any) -> PeftModel:
    settings = {"r": RANK, "lora_alpha": 1, "target_modules": LAYERS} | options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(copy.deepcopy(model), LoraConfig(**settings))


def check(model: nn.Module, batches: list[Any]) -> None:
    """Unchanged output, exact budget, orthonormal rows, energies close to the truth; else no timing
    at all."""
    ours = adapted(model)
    calibration = evatune.initialize(ours, batches, scale="paper")
    with torch.no_grad():
        before = model(**batches[0]).last_hidden_state
        after = ours.eval()(**batches[0]).last_hidden_state
    assert torch.allclose(before, after, atol=1e-5), "initialization changed the output"
    plan = calibration.allocate()
    assert plan.spent == plan.limit == RANK * 36
    truth = Moments(model, batches[: calibration.batches], list(calibration.spectra))
    for name, spectrum in calibration.spectra.items():
        v = spectrum.directions
        assert torch.allclose(v @ v.T, torch.eye(len(v)), atol=1e-5), name
        moment, lead = truth.of(name), v[:RANK].double()
        exact = torch.linalg.eigvalsh(moment).flip(0)
        best = float(exact[:RANK].sum())
        assert abs(spectrum.total_energy / float(exact.sum()) - 1) < 1e-5, name
        captured = float(((lead @ moment) * lead).sum())
        assert 0.985 * best < captured < best * (1 + 1e-6), name
        # What a Nyström sketch reports is never above what is there; below it by a few per cent
        # where a spectrum is flat.
        assert 0.94 * best < float(spectrum.energies[:RANK].sum()) < captured * (1 + 1e-5), name
        layer = ours.base_model.model.get_submodule(name)
        if isinstance(layer, LoraLayer):
            assert torch.equal(layer.lora_A["default"].weight, v[: plan.ranks[name]]), name


def quality(model: nn.Module, batches: list[Any], held: Moments) -> dict[str, Any]:
    """Share of the oracle's held-out energy, at the default stop and for r and ρ·r directions."""
    found: dict[str, Any] = {}
    for center in (False, True):
        calibration = evatune.calibrate(
            model, batches, evatune.CalibrationConfig(center=center), targets=LAYERS
        )
        seen = Moments(model, batches[: calibration.batches], list(calibration.spectra))
        oracle = Oracle(seen, held, center)
        key = "centred" if center else "uncentred"
        found[f"batches_{key}"] = calibration.batches
        for k in (RANK, int(RANK * RHO)):
            found[f"captured_{key}_{k}"] = oracle.shares(
                {n: s.directions[:k] for n, s in calibration.spectra.items()}
            )
    return found


def overhead(model: nn.Module, batches: list[Any], repeats: int) -> dict[str, Any]:
    """`calibrate` over bare forward passes of the same batches, the two taking turns."""
    config = evatune.CalibrationConfig(tolerance=0, max_batches=len(batches))

    def bare() -> None:
        with torch.no_grad():
            for batch in batches:
                model(**batch)

    bare()
    evatune.calibrate(model, batches, config, targets=LAYERS)
    pairs = []
    for _ in range(repeats):
        forward = timed(bare)[0]
        ours = timed(lambda: evatune.calibrate(model, batches, config, targets=LAYERS))[0]
        pairs.append((forward, ours))
    ratios = sorted(ours / forward for forward, ours in pairs)
    best = min(ours for _, ours in pairs) / min(forward for forward, _ in pairs)
    return {
        "calibrate_over_forward": statistics.median(ratios),
        "calibrate_over_forward_range": [ratios[0], ratios[-1]],
        "calibrate_over_forward_best_of_each": best,
        "forward_seconds_per_batch": statistics.median(f for f, _ in pairs) / len(batches),
    }


def against_peft(model: nn.Module, batches: list[Any], held: Moments) -> dict[str, Any]:
    """Both whole initializations, until each one's own rule stops it; PEFT's directions beside its
    oracle."""
    times = []
    for _ in range(3):
        ours = adapted(model)
        times.append(timed(lambda ours=ours: evatune.initialize(ours, batches))[0])  # type: ignore[misc]
    config = EvaConfig(rho=RHO)
    theirs = adapted(model, init_lora_weights="eva", eva_config=config)
    loader = Counting(batches)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft_time, state = timed(
            lambda: get_eva_state_dict(theirs, loader, show_progress_bar=False)
        )
    names = {name.removeprefix("base_model.model."): v for name, v in state.items()}
    passes = loader.read  # the first batch is read twice, once to find equal inputs
    seen = Moments(model, batches[: min(passes, len(batches))], list(names))
    return {
        "peft_seconds": peft_time,
        "evatune_seconds": statistics.median(times),
        "peft_over_evatune": peft_time / statistics.median(times),
        "peft_batches": passes,
        "peft_captured_uncentred": Oracle(seen, held, center=False).shares(names),
        "peft_captured_centred": Oracle(seen, held, center=True).shares(names),
    }


def stability(model: nn.Module, batches: list[Any]) -> dict[str, float]:
    """Largest angle between leading, well-separated subspaces after another order and after a
    split.

    The subspace ends, for each layer, at the largest gap among the first r energies. Bases are
    equal when the first batch and the refresh after it are the same; with batches in another order
    they are not.
    """
    names = list(evatune.calibrate(model, batches[:1], targets=LAYERS).spectra)
    truth = Moments(model, batches, names)
    rows: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, args: rows.setdefault(name, []).append(args[0])

    own = list(truth.second)
    handles = [model.get_submodule(name).register_forward_pre_hook(keep(name)) for name in own]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    selected = {
        n: [x[b["attention_mask"].bool()] for x, b in zip(xs, batches, strict=True)]
        for n, xs in rows.items()
    }

    config = evatune.CalibrationConfig(tolerance=0, max_batches=len(batches))
    mixed = random.Random(1).sample(batches, len(batches))
    in_order = evatune.calibrate(model, batches, config, targets=LAYERS)
    shuffled = evatune.calibrate(model, mixed, config, targets=LAYERS)
    worst = dict.fromkeys(
        ("order_equal_bases", "split_equal_bases", "order_other_bases", "split_other_bases"), 0.0
    )
    for name in own:
        energies = torch.linalg.eigvalsh(truth.of(name)).flip(0)[: RANK + 1]
        lead = int((energies[:-1] / energies[1:]).argmax()) + 1
        first, *rest = selected[name]
        sketch_settings = SketchSettings(first.shape[1], int(RANK * RHO))
        start = NystromSketch(sketch_settings)
        start.update(first)
        start.refresh()
        whole, backwards, left = (start.clone() for _ in range(3))
        right = NystromSketch(sketch_settings)
        right.set_basis(start.basis_state())
        for x in rest:
            whole.update(x)
        for x in reversed(rest):
            backwards.update(x)
        for number, x in enumerate(rest):
            (left, right)[number % 2].update(x)
        left.merge(right)
        apart = [NystromSketch(sketch_settings) for _ in range(2)]
        for number, x in enumerate(selected[name]):
            apart[number % 2].update(x)
        apart[0].merge(apart[1])

        def angle(a: Tensor, b: Tensor, lead: int = lead) -> float:
            a, b = a[:lead].double(), b[:lead].double()
            sine = torch.linalg.matrix_norm(a - a @ b.T @ b, 2).clamp(max=1)
            return float(sine.asin())

        base = whole.spectrum().directions
        for key, value in {
            "order_equal_bases": angle(base, backwards.spectrum().directions),
            "split_equal_bases": angle(base, left.spectrum().directions),
            "order_other_bases": angle(
                in_order.spectra[name].directions, shuffled.spectra[name].directions
            ),
            "split_other_bases": angle(base, apart[0].spectrum().directions),
        }.items():
            worst[key] = max(worst[key], value)
    return {f"angle_{key}": value for key, value in worst.items()}


def machine() -> dict[str, Any]:
    from importlib.metadata import version

    model = next(
        (line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")),
        platform.processor(),
    )
    libraries = {name: version(name) for name in ("torch", "transformers", "peft", "evatune")}
    return {
        "processor": model,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
    } | libraries


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def table(results: dict[str, Any]) -> str:
    def pair(key: str) -> str:
        return f"{results[key]['mean']:.4f} / {results[key]['worst']:.4f}"

    lines = [
        (
            "energy on held-out batches over exact eigenvectors', uncentered, mean / worst",
            "≥ 0.998 / 0.99",
            pair(f"captured_uncentred_{RANK}"),
            pair("peft_captured_uncentred"),
        ),
        (
            "the same, centered",
            "≥ 0.998 / 0.99",
            pair(f"captured_centred_{RANK}"),
            pair("peft_captured_centred"),
        ),
        (
            (
                f"calibrate over bare forward passes, median, {results['machine']['threads']}"
                " threads / 1 thread"
            ),
            "≤ 1.15",
            (
                f"{results['calibrate_over_forward']:.3f} /"
                f" {results['calibrate_over_forward_one_thread']:.3f}"
            ),
            "",
        ),
        (
            "batches until the default rule stops (uncentered, centered)",
            "≤ 20",
            f"{results['batches_uncentred']}, {results['batches_centred']}",
            str(results["peft_batches"]),
        ),
        (
            "whole initialization, PEFT's time over ours",
            "≥ 10",
            f"{results['peft_over_evatune']:.1f}",
            "1",
        ),
        (
            "angle after shuffling / splitting, equal bases",
            "≤ 1e-3 rad",
            f"{results['angle_order_equal_bases']:.1e} / {results['angle_split_equal_bases']:.1e}",
            "",
        ),
        (
            "the same, other bases",
            "stated",
            f"{results['angle_order_other_bases']:.1e} / {results['angle_split_other_bases']:.1e}",
            "",
        ),
    ]
    rows = ["| figure | reach | evatune | PEFT |", "|---|---|---|---|"]
    return "\n".join(rows + ["| " + " | ".join(line) + " |" for line in lines])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="also write the JSON object to this file")
    parser.add_argument("--repeats", type=int, default=7, help="of the timed pairs")
    options = parser.parse_args()
    loaded = load_model(demo_model(), device="cpu")
    everything = list(TextBatches(loaded.tokenizer, load_texts(demo_data()), 16, 128, seed=0))
    batches, held_out = everything[:-HELD_OUT], everything[-HELD_OUT:]
    model = loaded.model

    check(model, batches)
    print("correct; measuring", flush=True)
    results: dict[str, Any] = {"machine": machine()}
    results |= overhead(model, batches[:TIMED_BATCHES], options.repeats)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = overhead(model, batches[:TIMED_BATCHES], options.repeats)
    torch.set_num_threads(threads)
    results |= {f"{key}_one_thread": value for key, value in alone.items()}
    held = Moments(
        model, held_out, list(evatune.calibrate(model, batches[:1], targets=LAYERS).spectra)
    )
    results |= quality(model, batches, held)
    results |= stability(model, batches[:TIMED_BATCHES])
    results |= against_peft(model, batches, held)
    print(table(results))
    line = json.dumps(results)
    if options.output:
        options.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(line)


if __name__ == "__main__":
    main()
