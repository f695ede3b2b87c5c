"""What an initialization costs at scale: time, memory, growth and processes, beside PEFT's EVA.

    python benchmarks/scale.py [overhead] [peft] [memory] [growth] [processes] [traffic]
                               [--output benchmarks/results/scale.json] [--page docs/performance.md]

Two models: MiniLM on BBC news, 16 × 128 tokens a batch, and a Llama of LLM width (hidden 2048, FFN
5632, two layers, random weights, no output embedding) on 4 × 512 tokens; all linear layers (of
MiniLM: of its encoder), r = 16, ρ = 2, float32. Correctness is asserted first, by singular values
that are found here without evatune. All times of one part are of one run; only their ratios mean
anything. Parts that are not named keep what the output file says of them. The last line is one JSON
object.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import get_eva_state_dict
from torch import Tensor, nn

import evatune
from evatune.modeling.forward import call_model

RANK, RHO, BATCHES = 16, 2.0, 16
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
PARTS = ("overhead", "peft", "memory", "growth", "processes", "traffic")
MODELS = ("llm", "minilm")
# PEFT's EVA fails on MiniLM's pooler, alone (its input is not contiguous) and on two processes (it
# is not 3-D).
TARGETS = {"llm": "all-linear", "minilm": r"encoder\..*\.(query|key|value|dense)"}


# -- models and data -------------------------------------------------------------------------------


def llama(hidden: int = 2048, layers: int = 2, ffn: int | None = None) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=8192,
        hidden_size=hidden,
        intermediate_size=ffn or hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 64),
        num_key_value_heads=max(1, hidden // 64),
        use_cache=False,
    )
    model: nn.Module = transformers.LlamaModel(config).eval()
    return model


def tokens(
    count: int, texts: int = 4, length: int = 512, vocabulary: int = 8192
) -> list[dict[str, Tensor]]:
    """Batches of token ids whose frequencies fall like those of words."""
    generator = torch.Generator().manual_seed(0)
    frequencies = 1.0 / torch.arange(1, vocabulary + 1)
    ids = torch.multinomial(
        frequencies, count * texts * length, replacement=True, generator=generator
    )
    return [{"input_ids": part} for part in ids.view(count, texts, length)]


def load(name: str, count: int) -> tuple[nn.Module, list[Any]]:
    """A model and batches for it."""
    if name == "llm":
        return llama(), tokens(count)
    from evatune.loading.batches import TextBatches
    from evatune.loading.demo import demo_data, demo_model
    from evatune.loading.models import load_model
    from evatune.loading.texts import load_texts

    loaded = load_model(demo_model(), device="cpu")
    return (
        loaded.model,
        list(TextBatches(loaded.tokenizer, load_texts(demo_data()), 16, 128, seed=0))[:count],
    )


def adapted(name: str, model: nn.Module, **options: Any) -> PeftModel:
    settings = {"r": RANK, "lora_alpha": 1, "target_modules": TARGETS[name]} | options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(copy.deepcopy(model), LoraConfig(**settings))


def bare(model: nn.Module, batches: list[Any]) -> None:
    with torch.no_grad():
        for batch in batches:
            model(**batch)


def all_of(count: int, **options: Any) -> evatune.CalibrationConfig:
    """Settings that run every batch."""
    return evatune.CalibrationConfig(tolerance=0, max_batches=count, **options)


# -- correctness -----------------------------------------------------------------------------------


def check(name: str, model: nn.Module, seen: list[Any], fresh: list[Any]) -> float:
    """Unchanged output, exact budget, total energies, near-optimal directions; else no timing at
    all.

    Returns the least share, over layers, of what the best 16 directions of the rows of `seen`
    capture of those of `fresh`.
    """
    ours = adapted(name, model)
    calibration = evatune.initialize(ours, seen, config=all_of(len(seen)))
    with torch.no_grad():
        before, after = (m(**seen[0]).last_hidden_state for m in (model, ours.eval()))
    assert torch.allclose(before, after, atol=1e-4), "initialization changed the output"
    plan = calibration.allocate()
    assert plan.spent == plan.limit
    # one layer of those that share one
    inputs = {layer.input: name for name, layer in calibration.layers.items()}
    shares = []
    for layer in inputs.values():
        x, spectrum = _rows(model, seen, layer), calibration.spectra[layer]
        total = float(x.double().square().sum()) / len(x)
        assert abs(spectrum.total_energy / total - 1) < 1e-5, layer
        best = torch.svd_lowrank(x, q=2 * RANK, niter=8)[2][:, :RANK]
        y = _rows(model, fresh, layer)
        there, here = (
            float((y @ v).double().square().sum()) for v in (best, spectrum.directions[:RANK].T)
        )
        shares.append(here / there)
        assert shares[-1] > 0.98, (layer, shares[-1])
    return min(shares)


def _rows(model: nn.Module, batches: list[Any], name: str) -> Tensor:
    """(n, d) inputs of a layer, without padding."""
    kept: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda module, args: kept.append(args[0])
    )
    bare(model, batches)
    handle.remove()
    masks = [
        batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool() for batch in batches
    ]
    return torch.cat([x[mask] for x, mask in zip(kept, masks, strict=True)])


# -- time ------------------------------------------------------------------------------------------


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def over_forward(
    model: nn.Module,
    batches: list[Any],
    repeats: int,
    *,
    whole: bool,
    targets: str = "all-linear",
    **options: Any,
) -> dict[str, float]:
    """`calibrate` over bare forward passes of the same batches, the two taking turns.

    Args:
        whole: have `calibrate` run its forward passes to their end too, and not stop them at the
            last watched layer.
    """
    config = all_of(len(batches), **options)
    forward = call_model if whole else None
    bare(model, batches[:1])
    evatune.calibrate(model, batches[:1], config, targets=targets)
    pairs = [
        (
            timed(lambda: bare(model, batches))[0],
            timed(
                lambda: evatune.calibrate(model, batches, config, forward=forward, targets=targets)
            )[0],
        )
        for _ in range(repeats)
    ]
    ratios = sorted(ours / forward for forward, ours in pairs)
    return {
        "ratio": statistics.median(ratios),
        "least": ratios[0],
        "most": ratios[-1],
        "best_of_each": min(ours for _, ours in pairs) / min(forward for forward, _ in pairs),
        "forward_seconds": statistics.median(forward for forward, _ in pairs),
    }


def overhead() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in MODELS:
        repeats, count = (3, BATCHES // 2) if name == "llm" else (9, BATCHES)
        model, batches = load(name, count)
        least = check(name, model, batches[:4], batches[4:8])
        ways = {
            f"{name}{end}": over_forward(
                model, batches, repeats, whole=bool(end), targets=TARGETS[name]
            )
            for end in ("", "_whole")
        }
        found |= ways | {f"{name}_least_captured": least}
        print("calibrate over forward", json.dumps(ways), flush=True)
    return found


class Enough(Exception):
    """PEFT's initialization is stopped."""


class Counting:
    """A loader for PEFT, without an end of its own; PEFT reads until it has converged, or has read
    `most` batches."""

    def __init__(self, batches: list[Any], most: float = math.inf) -> None:
        self.batches, self.most, self.read = batches, most, 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        for batch in itertools.cycle(self.batches):
            if self.read >= self.most:
                raise Enough
            self.read += 1
            yield dict(batch)


def peft() -> dict[str, Any]:
    """Both whole initializations on the same batches, each to its own stop; PEFT's at most to 22
    times our time."""
    return {name: _both(name, *load(name, count)) for name, count in (("llm", 32), ("minilm", 128))}


def _both(name: str, model: nn.Module, batches: list[Any]) -> dict[str, Any]:
    check(name, model, batches[:4], batches[4:8])
    ours = []
    for _ in range(3):
        fresh = adapted(name, model)
        seconds, calibration = timed(lambda fresh=fresh: evatune.initialize(fresh, batches))  # type: ignore[misc]
        ours.append(seconds)
    print(name, "ours", json.dumps({"seconds": ours, "batches": calibration.batches}), flush=True)
    theirs, loader = (
        adapted(name, model, init_lora_weights="eva", eva_config=EvaConfig(rho=RHO)),
        Counting(batches),
    )
    seconds, finished = timed(lambda: _peft_on(theirs, loader, 22 * statistics.median(ours)))
    found = {
        "evatune_seconds": statistics.median(ours),
        "evatune_batches": calibration.batches,
        "peft_seconds": seconds,
        "peft_batches": loader.read,
        "peft_finished": finished,
        "ratio": seconds / statistics.median(ours),
    }
    print(name, "PEFT's EVA over ours", json.dumps(found), flush=True)
    return found


def _peft_on(model: nn.Module, loader: Counting, limit: float = 0) -> bool:
    """PEFT's initialization; false if the loader, or an alarm after `limit` seconds, stopped it."""

    def enough(*_: object) -> None:
        raise Enough

    # between two layers too: a batch of PEFT's takes minutes at LLM width
    signal.signal(signal.SIGALRM, enough)
    signal.setitimer(signal.ITIMER_REAL, limit)
    with warnings.catch_warnings(), suppress(Enough):
        warnings.simplefilter("ignore")
        get_eva_state_dict(model, loader, show_progress_bar=False)
        signal.setitimer(signal.ITIMER_REAL, 0)
        return True
    return False


# -- memory ----------------------------------------------------------------------------------------


def memory() -> dict[str, Any]:
    """Peak resident memory of forward passes, of ours and of PEFT's, each in a process of its own.

    Every large allocation is mapped by itself there, so that the peak has no freed memory in it
    that the allocator kept; and each has done its work on a small model before, so that the code of
    the libraries it calls is not counted.
    """
    mapped = {"MALLOC_MMAP_THRESHOLD_": "131072"}
    peaks = {who: _alone("peak", who, environment=mapped) for who in ("bare", "evatune", "peft")}
    size = peaks["bare"]["model"]
    extra = {who: peaks[who]["peak"] - peaks["bare"]["peak"] for who in ("evatune", "peft")}
    found = {"model_bytes": size, "bare_peak_bytes": peaks["bare"]["peak"]}
    for who, more in extra.items():
        found |= {f"{who}_extra_bytes": more, f"{who}_share": more / size}
    print("extra peak memory", json.dumps(found), flush=True)
    return found


def peak(who: str) -> dict[str, int]:
    """Run one of them on four batches and say how much memory there was at most."""
    more = {"init_lora_weights": "eva", "eva_config": EvaConfig(rho=RHO)} if who == "peft" else {}
    every: dict[str, Callable[[nn.Module, list[Any]], Any]] = {
        "bare": bare,
        "evatune": lambda model, batches: evatune.calibrate(model, batches, all_of(len(batches))),
        # the first is read twice
        "peft": lambda model, batches: _peft_on(model, Counting(batches, len(batches) + 1)),
    }
    work = every[who]
    work(adapted("llm", llama(64), **more), tokens(4, length=128))
    base, batches = load("llm", 4)
    model = adapted("llm", base, **more)  # the same model for all three
    del base
    with model.disable_adapter():
        bare(model, batches[:1])
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of building the model
    with model.disable_adapter() if who == "bare" else nullcontext():
        work(model, batches)
    size = sum(p.nbytes for p in model.parameters())
    status = Path("/proc/self/status").read_text()
    most = (
        int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
        * 1024
    )
    return {"peak": most, "model": size}


def _alone(part: str, *arguments: str, environment: dict[str, str] | None = None) -> Any:
    """One part of this script in a process of its own; its last line is its answer."""
    command = [sys.executable, __file__, "--alone", part, *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | (environment or {})
    )
    return json.loads(done.stdout.splitlines()[-1])


# -- growth ----------------------------------------------------------------------------------------


def growth() -> dict[str, Any]:
    """Each of four sizes over a factor of eight, with the others as they are; and the exponent of
    its effect.

    Forward passes run to their end here, so that what is left out of few layers does not pass for
    growth.

    Base: hidden 512, two layers, 4 × 256 tokens a batch, eight batches, r = 16. Best of five each.
    """

    def model_and_batches(
        hidden: int = 512, layers: int = 2, length: int = 256
    ) -> tuple[nn.Module, list[Any]]:
        return llama(hidden, layers), tokens(BATCHES // 2, 4, length)

    sweeps: dict[str, list[tuple[int, Callable[[], Any], dict[str, Any]]]] = {
        "tokens": [
            (n, partial(model_and_batches, length=n // 4), {}) for n in (512, 1024, 2048, 4096)
        ],
        "layers": [(n, partial(model_and_batches, layers=n), {}) for n in (1, 2, 4, 8)],
        "width": [(n, partial(model_and_batches, hidden=n), {}) for n in (256, 512, 1024, 2048)],
        "rank": [(n, model_and_batches, {"rank": n}) for n in (4, 8, 16, 32)],
    }
    found: dict[str, Any] = {}
    for sweep, points in sweeps.items():
        ratios = []
        for _, make, options in points:
            model, batches = make()
            ratios.append(over_forward(model, batches, 5, whole=True, **options)["best_of_each"])
        sizes = [size for size, *_ in points]
        found[sweep] = {"sizes": sizes, "ratios": ratios, "exponent": _slope(sizes, ratios)}
        print("growth with", sweep, json.dumps(found[sweep]), flush=True)
    return found


def _slope(sizes: list[int], ratios: list[float]) -> float:
    """p of the fitted ratio ∝ size^p."""
    x, y = [math.log(size) for size in sizes], [math.log(ratio) for ratio in ratios]
    return statistics.linear_regression(x, y).slope


# -- processes -------------------------------------------------------------------------------------


def processes() -> dict[str, Any]:
    """Two processes of one thread each beside one, on the same batches."""
    found: dict[str, Any] = {}
    for name in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            alone = _alone("joint", name, "0", "1", folder, environment=ONE_THREAD)
            pair = _two_processes("joint", name, folder)
        assert pair["batches"] == alone["batches"]
        assert pair["energy"] > 0.999 * alone["energy"], (pair, alone)
        found[name] = {
            "one_seconds": alone["seconds"],
            "two_seconds": pair["seconds"],
            "throughput": alone["seconds"] / pair["seconds"],
            "bytes_sent": pair["bytes"],
            "energy_over_one_process": pair["energy"] / alone["energy"],
        }
        print("two processes", name, json.dumps(found[name]), flush=True)
    return found


def traffic() -> dict[str, Any]:
    """The bytes that each of two processes sends in a whole initialization, beside those that PEFT
    gathers."""
    with tempfile.TemporaryDirectory() as folder:
        ours = _two_processes("whole", "minilm", folder)
    with tempfile.TemporaryDirectory() as folder:
        theirs = _two_processes("gathering", "minilm", folder)
    found = {
        "evatune": ours["bytes"],
        "evatune_batches": ours["batches"],
        "peft": theirs["bytes"],
        "peft_batches": theirs["batches"],
        "share": ours["bytes"] / theirs["bytes"],
    }
    print("bytes", json.dumps(found), flush=True)
    return found


def _two_processes(part: str, name: str, folder: str) -> Any:
    """The answer of process 0 of two."""
    command = [sys.executable, __file__, "--alone", part, name]
    runs = [
        subprocess.Popen(
            [*command, str(rank), "2", folder],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | ONE_THREAD,
        )
        for rank in (0, 1)
    ]
    outputs = [run.communicate()[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    return json.loads(outputs[0].splitlines()[-1])


def _meet(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    if size > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size
        )


def joint(name: str, rank: str, size: str, folder: str) -> dict[str, Any]:
    """Calibrate this process's share of the batches, from the moment on that all are ready."""
    _meet(int(rank), int(size), folder)
    model, batches = load(name, BATCHES)
    mine = batches[int(rank) :: int(size)]
    bare(model, mine[:1])
    if int(size) > 1:
        dist.barrier()
    seconds, calibration = timed(
        lambda: evatune.calibrate(model, mine, all_of(BATCHES), targets=TARGETS[name])
    )
    shares = [float(s.energies[:RANK].sum()) / s.total_energy for s in calibration.spectra.values()]
    return {
        "seconds": seconds,
        "batches": calibration.batches,
        "bytes": calibration.bytes_sent,
        "energy": statistics.fmean(shares),
    }


def whole(name: str, rank: str, size: str, folder: str) -> dict[str, Any]:
    """A whole initialization with the defaults, and the bytes that this process sends in it."""
    _meet(int(rank), int(size), folder)
    model, batches = load(name, 128)
    calibration = evatune.initialize(adapted(name, model), batches[int(rank) :: int(size)])
    return {"bytes": calibration.bytes_sent, "batches": calibration.batches}


def gathering(name: str, rank: str, size: str, folder: str) -> dict[str, Any]:
    """PEFT's whole initialization, and the bytes that this process hands to all_gather in it."""
    _meet(int(rank), int(size), folder)
    model, batches = load(name, 128)
    sent, gather = 0, dist.all_gather

    def counted(out: list[Tensor], x: Tensor, *arguments: Any, **options: Any) -> Any:
        nonlocal sent
        sent += x.nbytes
        return gather(out, x, *arguments, **options)

    dist.all_gather = counted  # type: ignore[assignment]
    loader = Counting(batches[int(rank) :: int(size)])
    assert _peft_on(
        adapted(name, model, init_lora_weights="eva", eva_config=EvaConfig(rho=RHO)), loader
    )
    return {"bytes": sent, "batches": loader.read}


# -- what comes of it ------------------------------------------------------------------------------


def table(found: dict[str, Any]) -> str:
    """Markdown; parts that have not been run yet are left out."""
    rows: list[tuple[str, str, str]] = []
    if one := found.get("overhead"):
        rows += [
            ("`calibrate` over bare forward passes, LLM width", "≤ 1.06", _ratio(one["llm"])),
            ("the same, with forward passes run to their end", "", _ratio(one["llm_whole"])),
            ("the same, MiniLM", "≤ 1.10", _ratio(one["minilm"])),
            ("the same, with forward passes run to their end", "", _ratio(one["minilm_whole"])),
        ]
    if one := found.get("peft"):
        rows += [
            (
                "whole initialization, PEFT's time over ours, LLM width",
                "≥ 20",
                _against(one["llm"]),
            ),
            ("the same, MiniLM", "≥ 15", _against(one["minilm"])),
        ]
    if one := found.get("memory"):
        figure = "extra peak memory over the bare forward, share of the model's bytes, LLM width"
        rows.append(
            (
                figure,
                "≤ 5 %",
                f"{100 * one['evatune_share']:.1f} % (PEFT: {100 * one['peft_share']:.1f} %)",
            )
        )
    for sweep, one in found.get("growth", {}).items():
        sizes, figures = (
            ", ".join(values)
            for values in (map(str, one["sizes"]), [f"{r:.3f}" for r in one["ratios"]])
        )
        figures += f"; ∝ size^{one['exponent']:+.3f}"
        rows.append((f"time over forward, {sweep}: {sizes}", "flat or falling", figures))
    if one := found.get("processes"):
        rows += [
            (
                "throughput of two processes over one, LLM width",
                "≥ 1.7",
                f"{one['llm']['throughput']:.2f}",
            ),
            ("the same, MiniLM", "≥ 1.7", f"{one['minilm']['throughput']:.2f}"),
        ]
    if one := found.get("traffic"):
        figures = (
            f"{100 * one['share']:.2f} % ({one['evatune'] / 1e6:.0f} MB;"
            f" {one['peft'] / 1e6:.0f} MB)"
        )
        rows.append(
            ("bytes sent per process and whole run over PEFT's gathering, MiniLM", "≤ 1 %", figures)
        )
    return "\n".join(
        [
            "| figure | reach | measured |",
            "|---|---|---|",
            *(f"| {' | '.join(row)} |" for row in rows),
        ]
    )


def _ratio(one: dict[str, float]) -> str:
    return f"{one['ratio']:.3f} ({one['least']:.3f} to {one['most']:.3f})"


def _against(one: dict[str, Any]) -> str:
    more, end = ("", "") if one["peft_finished"] else ("> ", ", stopped there")
    return (
        f"{more}{one['ratio']:.1f} ({one['evatune_seconds']:.1f} s, {one['evatune_batches']}"
        f" batches; {one['peft_seconds']:.0f} s, {one['peft_batches']}{end})"
    )


def plot(found: dict[str, Any], path: Path) -> None:
    """Time over forward as each size grows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for sweep, one in found["growth"].items():
        steps = [size / one["sizes"][0] for size in one["sizes"]]
        axes.plot(
            steps,
            one["ratios"],
            marker="o",
            label=f"{sweep} ({one['sizes'][0]} to {one['sizes'][-1]})",
        )
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xticks([1, 2, 4, 8], ["1×", "2×", "4×", "8×"])
    axes.set_xlabel("size, as a multiple of the smallest")
    axes.set_ylabel("calibrate over bare forward passes")
    axes.legend(title="what grows")
    figure.savefig(path, format="svg")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--output", type=Path, help="JSON file to read, bring up to date and write")
    parser.add_argument(
        "--page",
        type=Path,
        help="Markdown file whose table, between its marks, and plot are replaced",
    )
    parser.add_argument("--alone", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        part, *arguments = options.alone
        print(json.dumps(globals()[part](*arguments)))
        return
    from init import machine

    unknown = set(options.parts) - set(PARTS)
    if unknown:
        parser.error(f"there is no part {', '.join(unknown)}; choose of {', '.join(PARTS)}")
    known = options.output and options.output.exists()
    found = json.loads(options.output.read_text(encoding="utf-8")) if known else {}
    found["machine"] = machine()
    for part in options.parts or PARTS:
        found[part] = globals()[part]()
        if options.output:
            options.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(table(found))
    if options.page:
        text = options.page.read_text(encoding="utf-8")
        before, rest = text.split("<!-- table -->\n")
        after = rest.split("<!-- end of table -->\n")[1]
        page = f"{before}<!-- table -->\n{table(found)}\n<!-- end of table -->\n{after}"
        options.page.write_text(page, encoding="utf-8")
        if "growth" in found:
            plot(found, options.page.with_suffix(".svg"))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
