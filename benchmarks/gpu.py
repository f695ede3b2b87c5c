"""What an initialization costs on a GPU, beside the bare forward passes and PEFT's EVA.

    python benchmarks/gpu.py [--models llama-4 llama-32 dinov2-giant roberta-large] [--tiny]
                             [--output benchmarks/results/gpu.json]

One command, about five minutes on one GPU, no downloads: models of known shapes with random weights
in bfloat16 (Llama-3.1-8B with four of its layers and, where memory allows, all 32; DINOv2-giant;
RoBERTa-large), all linear layers, r = 16, ρ = 2. Correctness is asserted first, on the model's own
activations, by moments in float64 that are computed here without evatune. Then three paths take
turns with the bare forward passes: rows of 16 bits on tensor cores, which is what evatune does;
rows cast to float32 and multiplied in TF32; and in full float32. Only ratios of one run mean
anything. `--tiny` runs everything on a CPU in seconds, and its times mean nothing. The last line is
one JSON object.
"""

from __future__ import annotations

import argparse
import gc
import json
import signal
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import peft
import torch
import transformers
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import get_eva_state_dict
from torch import Tensor, nn

import evatune
from evatune.sketch.products import takes_16_bits

RANK, RHO = 16, 2.0
PATHS = ("tensor cores", "TF32", "float32")
_BATCHES = {"llama-4": 16, "llama-32": 8, "dinov2-giant": 16, "roberta-large": 16}
MODELS = tuple(_BATCHES)


class Setting:
    """Where everything runs, and at which sizes."""

    def __init__(self, tiny: bool) -> None:
        self.tiny = tiny
        self.device = torch.device("cpu" if tiny else "cuda")
        self.repeats = 1 if tiny else 3
        self.peft_seconds = 0.5 if tiny else 40

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def timed(self, work: Callable[[], Any]) -> tuple[float, Any]:
        self.wait()
        start = time.perf_counter()
        result = work()
        self.wait()
        return time.perf_counter() - start, result

    def peak(self, work: Callable[[], Any]) -> int:
        """Bytes that `work` takes at its peak, beyond those that were taken before."""
        if self.device.type != "cuda":
            work()
            return 0
        gc.collect()  # of what earlier runs left
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before


# -- models and batches ----------------------------------------------------------------------------


def load(name: str, setting: Setting) -> tuple[nn.Module, list[Any]]:
    """A model with random weights in bfloat16, and batches for it, on the device."""
    model_class, config, options = _architecture(name, setting.tiny)
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with setting.device:
            model = model_class(config, **options).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(default)
    count = 4 if setting.tiny else _BATCHES[name]
    shape: tuple[int, ...]
    if name == "dinov2-giant":
        shape = (2, 3, 28, 28) if setting.tiny else (32, 3, 224, 224)
        batches = [{"pixel_values": images} for images in _images(count, shape, setting.device)]
    else:
        usual = (4, 2048) if "llama" in name else (32, 256)
        shape = (2, 32) if setting.tiny else usual
        batches = [{"input_ids": ids} for ids in _words(count, shape, config.vocab_size, setting)]
    return model, batches


def _architecture(name: str, tiny: bool) -> tuple[Any, Any, dict[str, Any]]:
    if name == "dinov2-giant":
        sizes = (
            {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
            if tiny
            else {"hidden_size": 1536, "num_hidden_layers": 40, "num_attention_heads": 24}
        )
        config = transformers.Dinov2Config(
            patch_size=14, image_size=28 if tiny else 224, use_swiglu_ffn=True, **sizes
        )
        return transformers.Dinov2Model, config, {}
    if name == "roberta-large":
        sizes = (
            {
                "hidden_size": 48,
                "intermediate_size": 96,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "vocab_size": 500,
            }
            if tiny
            else {
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "vocab_size": 50265,
            }
        )
        config = transformers.RobertaConfig(max_position_embeddings=514, **sizes)
        return transformers.RobertaModel, config, {"add_pooling_layer": False}
    sizes = (
        {
            "hidden_size": 64,
            "intermediate_size": 160,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "vocab_size": 500,
        }
        if tiny
        else {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
        }
    )
    layers = int(name.split("-")[1])
    config = transformers.LlamaConfig(
        num_hidden_layers=2 if tiny else layers, use_cache=False, **sizes
    )
    return transformers.LlamaModel, config, {}


def _words(
    count: int, shape: tuple[int, ...], vocabulary: int, setting: Setting
) -> Iterator[Tensor]:
    """Token ids whose frequencies fall like those of words."""
    generator = torch.Generator().manual_seed(0)
    frequencies = 1.0 / torch.arange(1, vocabulary + 1)
    for _ in range(count):
        ids = torch.multinomial(
            frequencies, shape[0] * shape[1], replacement=True, generator=generator
        )
        yield ids.view(shape).to(setting.device)


def _images(count: int, shape: tuple[int, ...], device: torch.device) -> Iterator[Tensor]:
    """Smooth noise, whose patches are alike as those of photographs are."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        coarse = torch.randn(*shape[:2], shape[2] // 7, shape[3] // 7, generator=generator)
        images = nn.functional.interpolate(coarse, size=shape[2:], mode="bilinear")
        yield images.to(device, torch.bfloat16)


def adapted(model: nn.Module, **options: Any) -> PeftModel:
    settings = {"r": RANK, "target_modules": "all-linear"} | options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(model, LoraConfig(**settings))


def bare(model: nn.Module, batches: list[Any]) -> None:
    with torch.no_grad():
        for batch in batches:
            model(**batch)


def calibrate(model: nn.Module, batches: list[Any]) -> evatune.Calibration:
    """Run every batch."""
    config = evatune.CalibrationConfig(
        rank=RANK, rho=RHO, tolerance=0, max_batches=len(batches), distributed=False
    )
    return evatune.calibrate(model, batches, config)


@contextmanager
def along(path: str) -> Iterator[None]:
    """Compute the products of rows of 16 bits in this way."""
    with ExitStack() as stack:
        # "tensor cores" of a CPU are emulated
        uncast = mock.patch("evatune.sketch.nystrom.takes_16_bits")
        stack.enter_context(uncast).return_value = path == "tensor cores"
        if path == "TF32":
            stack.enter_context(mock.patch("evatune.modeling.state._ieee_products", _tf32))
        yield


@contextmanager
def _tf32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


# -- correctness -----------------------------------------------------------------------------------


def check(model: nn.Module, batches: list[Any]) -> dict[str, dict[str, float]]:
    """Compare every path with float64 on the same rows; raise if evatune's own is off.

    Returns, by path, the largest relative error of a layer's total energy and of its 16 leading
    energies, and the smallest share of what the best 16 directions capture.
    """
    found: dict[str, dict[str, float]] = {}
    for path in PATHS:
        with along(path):
            calibration = calibrate(model, batches)
        names = _some_layers(model, calibration)
        worst = {"total_energy": 0.0, "energies": 0.0, "captured": 1.0}
        for name, moment in _moments(model, batches, names):
            spectrum = calibration.spectra[name]
            directions = spectrum.directions[:RANK].to(moment)
            energies = ((directions @ moment) * directions).sum(1)
            known = spectrum.energies[:RANK].to(moment)
            total = float(moment.trace())
            worst["total_energy"] = max(
                worst["total_energy"], abs(spectrum.total_energy / total - 1)
            )
            error = float(((known - energies).abs() / energies).max())
            worst["energies"] = max(worst["energies"], error)
            share = float(energies.sum()) / _best(moment)
            worst["captured"] = min(worst["captured"], share)
        found[path] = worst
    ours = found["tensor cores"]
    assert ours["total_energy"] < 1e-5, ours
    assert ours["energies"] < 1e-3 + found["float32"]["energies"], found
    assert ours["captured"] > found["float32"]["captured"] - 1e-4, found
    return found


def _some_layers(model: nn.Module, calibration: evatune.Calibration) -> list[str]:
    """Three linear layers: of the first block, the middle and the last."""
    names = [n for n in calibration.layers if isinstance(model.get_submodule(n), nn.Linear)]
    inputs = {calibration.layers[name].input: name for name in names}
    own = list(inputs.values())
    return sorted({own[0], own[len(own) // 2], own[-1]}, key=own.index)


def _moments(
    model: nn.Module, batches: list[Any], names: list[str]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the mean second moment (d, d) in float64 of what each layer is given."""
    for name in names:
        sums: list[Tensor] = []
        rows = 0

        def add(module: nn.Module, args: tuple[Tensor, ...], sums: list[Tensor] = sums) -> None:
            nonlocal rows
            x = args[0].flatten(0, -2).double()
            rows += len(x)
            sums[:] = [x.T @ x + sums[0]] if sums else [x.T @ x]

        handle = model.get_submodule(name).register_forward_pre_hook(add)
        bare(model, batches)
        handle.remove()
        yield name, sums[0] / rows


def _best(moment: Tensor) -> float:
    """The most energy that any 16 directions have: block power steps from a random start."""
    generator = torch.Generator().manual_seed(1)
    width = min(4 * RANK, len(moment))
    basis = torch.randn(len(moment), width, generator=generator, dtype=torch.float64).to(moment)
    for _ in range(30):
        basis = torch.linalg.qr(moment @ basis)[0]
    return float(torch.linalg.eigvalsh(basis.T @ moment @ basis)[-RANK:].sum())


# -- time and memory -------------------------------------------------------------------------------


def over_forward(model: nn.Module, batches: list[Any], setting: Setting) -> dict[str, Any]:
    """Medians of calibrate over bare forward passes, by path; and the seconds of both."""
    seconds: dict[str, list[float]] = {path: [] for path in ("forward", *PATHS)}
    for _ in range(setting.repeats):
        seconds["forward"].append(setting.timed(lambda: bare(model, batches))[0])
        for path in PATHS:
            with along(path):
                seconds[path].append(setting.timed(lambda: calibrate(model, batches))[0])
    ratios = {
        path: [a / b for a, b in zip(seconds[path], seconds["forward"], strict=True)]
        for path in PATHS
    }
    return {
        "batches": len(batches),
        "seconds": {path: statistics.median(times) for path, times in seconds.items()},
        "over_forward": {path: statistics.median(values) for path, values in ratios.items()},
        "range": {path: [min(values), max(values)] for path, values in ratios.items()},
    }


def memory(model: nn.Module, batches: list[Any], setting: Setting) -> dict[str, float]:
    """Peak memory beyond the model's own, in bytes."""
    weights = sum(p.nbytes for p in model.parameters())
    forward = setting.peak(lambda: bare(model, batches))
    ours = setting.peak(lambda: calibrate(model, batches))
    return {
        "model": weights,
        "forward": forward,
        "calibrate": ours,
        "extra_share": (ours - forward) / weights,
    }


class Enough(Exception):
    """PEFT had its time."""


class Counting:
    """A loader for PEFT that counts the batches read."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches, self.read = batches, 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            self.read += 1
            yield dict(batch)


def against_peft(model: nn.Module, batches: list[Any], setting: Setting) -> dict[str, Any]:
    """Both whole initializations by their own stop rules, PEFT's for a bounded time at least.

    The batches come again and again for PEFT, which needs more of them.
    """
    ours = adapted(model)
    seconds = [setting.timed(lambda: evatune.initialize(ours, batches))[0] for _ in range(2)]
    calibration = evatune.initialize(ours, batches)
    model = ours.unload()
    theirs = adapted(model, init_lora_weights="eva", eva_config=EvaConfig(rho=RHO))
    loader = Counting(batches * 16)

    def enough(*_: object) -> None:
        raise Enough

    def run() -> bool:
        # between two layers too: a batch of PEFT's takes a minute at LLM width
        before = signal.signal(signal.SIGALRM, enough)
        signal.setitimer(signal.ITIMER_REAL, setting.peft_seconds)
        try:
            with warnings.catch_warnings(), suppress(Enough):
                warnings.simplefilter("ignore")
                get_eva_state_dict(theirs, loader, show_progress_bar=False)
                return True
            return False
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    peft_seconds, finished = setting.timed(run)
    theirs.unload()
    return {
        "evatune_seconds": seconds[-1],
        "evatune_first_seconds": seconds[0],
        "evatune_batches": calibration.batches,
        "peft_seconds": peft_seconds,
        "peft_batches": loader.read,
        "peft_finished": finished,
        "ratio": peft_seconds / seconds[-1],
    }


# -- the whole -------------------------------------------------------------------------------------


def measure(name: str, setting: Setting) -> dict[str, Any]:
    """Everything about one model."""
    model, batches = load(name, setting)
    bare(model, batches[:2])
    found: dict[str, Any] = {"accuracy": check(model, batches[:2])}
    print(name, "correct; measuring", json.dumps(found["accuracy"]), flush=True)
    found |= over_forward(model, batches, setting)
    print(name, json.dumps(found["over_forward"]), json.dumps(found["seconds"]), flush=True)
    found["memory"] = memory(model, batches, setting)
    if name in ("llama-4", "roberta-large"):
        found["peft"] = against_peft(model, batches, setting)
        print(name, json.dumps(found["peft"]), flush=True)
    return found


def enough_memory(name: str, setting: Setting) -> bool:
    """Whether the model fits, with its activations, into what is free."""
    if setting.tiny or name != "llama-32":
        return True
    return torch.cuda.mem_get_info()[0] > 24e9


def table(found: dict[str, Any]) -> str:
    rows = [
        "| figure | reach | " + " | ".join(found["models"]) + " |",
        "|---" * (2 + len(found["models"])) + "|",
    ]

    def row(figure: str, reach: str, cell: Callable[[dict[str, Any]], str]) -> None:
        cells = (cell(one) for one in found["models"].values())
        rows.append(f"| {figure} | {reach} | " + " | ".join(cells) + " |")

    for path in PATHS:
        over = f"calibrate over bare forward passes, {path}"
        reach = "≤ 1.05" if path == "tensor cores" else ""
        row(over, reach, lambda one, path=path: f"{one['over_forward'][path]:.3f}")  # type: ignore[misc]
    row(
        "extra peak memory, share of the model's bytes",
        "≤ 1 %",
        lambda one: f"{100 * one['memory']['extra_share']:.1f} %",
    )
    row(
        "largest error of an energy after two batches, float32's / ours",
        "equal to 1e-3",
        lambda one: (
            f"{one['accuracy']['float32']['energies']:.4f}"
            f" / {one['accuracy']['tensor cores']['energies']:.4f}"
        ),
    )
    row("whole initialization, PEFT's time over ours", "≥ 30", _against)
    return "\n".join(rows)


def _against(one: dict[str, Any]) -> str:
    if "peft" not in one:
        return ""
    more = "" if one["peft"]["peft_finished"] else "> "
    return f"{more}{one['peft']['ratio']:.0f}"


def machine(setting: Setting) -> dict[str, str]:
    card = "CPU, tiny sizes" if setting.tiny else torch.cuda.get_device_name()
    return {
        "card": card,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--tiny", action="store_true", help="tiny sizes on a CPU")
    parser.add_argument("--output", type=Path, help="also write the JSON object to this file")
    options = parser.parse_args()
    if not options.tiny and not torch.cuda.is_available():
        parser.error("there is no GPU that torch can use; --tiny runs on a CPU")
    setting = Setting(options.tiny)
    if not options.tiny and not takes_16_bits(setting.device):
        parser.error("this GPU, or this version of torch, has no products of 16 bits in float32")
    found: dict[str, Any] = {"machine": machine(setting), "models": {}}
    for name in options.models:
        if not enough_memory(name, setting):
            print(name, "does not fit into this GPU's free memory: left out", flush=True)
            continue
        found["models"][name] = measure(name, setting)
        if options.output:
            options.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        if setting.device.type == "cuda":
            torch.cuda.empty_cache()
    print(table(found))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
