"""When the default rule stops, what it estimates and what is true, beside PEFT's EVA.

    python benchmarks/stop.py [--streams news tweets …] [--output benchmarks/results/stop.json]
                              [--peft-seconds 1500]

Streams: MiniLM on five corpora, few texts a batch, texts sorted by topic, and Llamas with random
weights on word-like frequencies, one of LLM width and one on texts that repeat single rare words.
All linear layers (of MiniLM: of its encoder), r = 16, ρ = 2. Each is measured against exact second
moments of held-out batches, collected here in float64 without evatune. Correctness is asserted
first. All times of a stream are of one run; only their ratios mean anything. The output file is
written after each stream, and streams that it has are left out; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import bisect
import itertools
import json
import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from init import machine
from peft import EvaConfig
from peft.tuners.lora import get_eva_state_dict
from peft.tuners.lora.eva import SVDHook
from scale import TARGETS, adapted, bare, llama, timed
from torch import Tensor, nn

import evatune
from evatune.calibration.convergence import is_refresh

RANK, RHO, LENGTH, MOST = 16, 2.0, 128, 64
Batches = list[dict[str, Tensor]]


# -- streams ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stream:
    """A model with the batches that it is calibrated on, and mixed ones that nothing else sees."""

    name: str  # of the model, as in `scale.TARGETS`
    model: nn.Module
    seen: Batches
    held: Batches
    sorted: bool = False  # what comes first is not what comes later


def corpus(name: str, texts_per_batch: int = 16) -> Stream:
    """MiniLM on shuffled texts; no more than 128 batches of either kind."""
    texts = _texts(name)
    random.Random(0).shuffle(texts)
    held = min(len(texts) // 2, 128 * 16)
    seen = texts[held : held + 128 * texts_per_batch]
    return Stream("minilm", *_minilm(seen, texts[:held], texts_per_batch))


def by_topic(batches_per_topic: int) -> Stream:
    """MiniLM on news, so many batches of each topic in turn."""
    from evatune.loading.corpora import bbc

    pool: dict[int, list[str]] = {}
    shuffled = list(zip(*bbc(), strict=True))
    random.Random(0).shuffle(shuffled)
    for text, topic in shuffled[1024:]:
        pool.setdefault(topic, []).append(text)
    seen: list[str] = []
    size = 16 * batches_per_topic
    while all(len(texts) >= size for texts in pool.values()):
        for topic in sorted(pool):
            seen += pool[topic][:size]
            del pool[topic][:size]
    held = [text for text, _ in shuffled[:1024]]
    return Stream("minilm", *_minilm(seen, held, 16), sorted=True)


def random_llama(
    hidden: int, length: int, held: int, *, bursts: bool = False, layers: int = 2
) -> Stream:
    """A Llama with random weights on words as frequent as in texts, four texts a batch.

    With bursts a single rare word takes a share of each text, most often small and sometimes all.
    """
    ids = _words(4 * (MOST + held), length, bursts=bursts).view(MOST + held, 4, length)
    batches = [{"input_ids": part} for part in ids]
    model = llama(hidden, layers)
    return Stream("llm", model, batches[:MOST], batches[MOST:])


STREAMS: dict[str, Callable[[], Stream]] = {
    "news": partial(corpus, "news"),
    "movies": partial(corpus, "movie"),
    "products": partial(corpus, "amazon"),
    "tweets": partial(corpus, "tweet"),
    "editorials": partial(corpus, "nyt"),
    "tweets, 2 a batch": partial(corpus, "tweet", 2),
    "news, 2 a batch": partial(corpus, "news", 2),
    "news by topic, 3 batches each": partial(by_topic, 3),
    "Llama, bursts": partial(random_llama, 256, 128, 512, bursts=True),
    "Llama, width 256": partial(random_llama, 256, 128, 512),
    "Llama, width 2048": partial(random_llama, 2048, 512, 64),
}
# not in the figures over all streams: no rule can know of topics that have not come yet
UNKNOWABLE: dict[str, Callable[[], Stream]] = {
    "news by topic, 12 batches each": partial(by_topic, 12)
}
TINY: dict[str, Callable[[], Stream]] = {
    "tiny": partial(random_llama, 64, 32, 64, bursts=False, layers=1)
}


def _texts(name: str) -> list[str]:
    from evatune.loading.corpora import bbc, ratings

    return bbc()[0] if name == "news" else [text for text, _ in ratings(name)]


def _minilm(
    seen: Sequence[str], held: Sequence[str], texts_per_batch: int
) -> tuple[nn.Module, Batches, Batches]:
    from evatune.loading.demo import demo_model
    from evatune.loading.models import load_model
    from evatune.loading.texts import truncate_texts

    loaded = load_model(demo_model(), device="cpu")

    def batches(texts: Sequence[str], size: int) -> Batches:
        parts = [texts[start : start + size] for start in range(0, len(texts) - size + 1, size)]
        return [
            dict(
                loaded.tokenizer(
                    truncate_texts(part, loaded.tokenizer, LENGTH),
                    truncation=True,
                    max_length=LENGTH,
                    padding=True,
                    return_tensors="pt",
                )
            )
            for part in parts
        ]

    return loaded.model, batches(seen, texts_per_batch), batches(held, 16)


def _words(texts: int, length: int, *, bursts: bool, vocabulary: int = 8192) -> Tensor:
    """(texts, length) ids whose frequencies fall like those of words."""
    generator = torch.Generator().manual_seed(0)
    frequencies = 1.0 / torch.arange(1, vocabulary + 1)
    ids = torch.multinomial(frequencies, texts * length, replacement=True, generator=generator)
    ids = ids.view(texts, length)
    if not bursts:
        return ids
    rare = torch.randint(vocabulary // 2, vocabulary, (texts, 1), generator=generator)
    share = 0.05 * (1.5 * torch.randn(texts, 1, generator=generator)).exp()
    return torch.where(torch.rand(texts, length, generator=generator) < share, rare, ids)


# -- truth -----------------------------------------------------------------------------------------


class Truth:
    """Second moments of layers' inputs on the held-out batches, in float64.

    Their own best directions capture more of them than the best ones of all data would. By the law
    of `estimated_missed`, what directions of so many texts seem to miss is too much by the share
    texts / held texts of it.
    """

    def __init__(self, stream: Stream, inputs: Mapping[str, str]) -> None:
        self._inputs = inputs  # layer → the first layer with the same input
        self.rows = 0
        self.texts = sum(len(batch["input_ids"]) for batch in stream.held)
        moments: dict[str, Tensor] = {}
        sums: dict[str, Tensor] = {}
        mask = torch.ones(0, dtype=torch.bool)

        def add(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                x = args[0][mask]
                moments[name] = moments.get(name, 0) + (x.T @ x).double()
                sums[name] = sums.get(name, 0) + x.double().sum(0)

            return hook

        handles = [
            stream.model.get_submodule(name).register_forward_pre_hook(add(name))
            for name in dict.fromkeys(inputs.values())
        ]
        for batch in stream.held:
            mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
            self.rows += int(mask.sum())
            bare(stream.model, [batch])
        for handle in handles:
            handle.remove()
        self._moments = {False: {name: moment / self.rows for name, moment in moments.items()}}
        self._moments[True] = {
            name: moment - torch.outer(sums[name], sums[name]) / self.rows**2
            for name, moment in self._moments[False].items()
        }
        self._energies = {
            center: {
                name: torch.linalg.eigvalsh(moment).flip(0)[: int(RANK * RHO)]
                for name, moment in moments.items()
            }
            for center, moments in self._moments.items()
        }

    def share(self, name: str, directions: Tensor, *, center: bool) -> float:
        """Return the energy in directions (r, d), as a share of what the best r hold."""
        key = self._inputs[name]
        v, moment = directions.double(), self._moments[center][key]
        return float(((v @ moment) * v).sum() / self._energies[center][key][: len(v)].sum())

    def shares(self, directions: Mapping[str, Tensor], *, center: bool) -> dict[str, float]:
        """Return `share` of every layer that has directions."""
        return {
            name: self.share(name, v, center=center) for name, v in directions.items() if len(v)
        }


def leading(calibration: evatune.Calibration, ranks: Mapping[str, int]) -> dict[str, Tensor]:
    return {
        name: calibration.spectra[name].directions[:rank] for name, rank in ranks.items() if rank
    }


def check(stream: Stream) -> dict[str, str]:
    """Unchanged output and exact budget, else nothing is measured; the inputs that layers share."""
    ours = adapted(stream.name, stream.model)
    batches = stream.seen[:4]
    calibration = evatune.initialize(ours, batches)
    with torch.no_grad():
        before, after = (
            model(**batches[0]).last_hidden_state for model in (stream.model, ours.eval())
        )
    assert torch.allclose(before, after, atol=1e-4), "initialization changed the output"
    plan = calibration.allocate()
    assert plan.spent == plan.limit
    first: dict[int | None, str] = {}
    for name, layer in calibration.layers.items():
        first.setdefault(layer.input, name)
    return {name: first[layer.input] for name, layer in calibration.layers.items()}


# -- what is measured ------------------------------------------------------------------------------


def measure(stream: Stream, peft_seconds: float) -> dict[str, Any]:
    """All figures of a stream."""
    truth = Truth(stream, check(stream))
    targets = TARGETS[stream.name]
    seconds, calibration = timed(
        lambda: evatune.calibrate(stream.model, stream.seen, targets=targets)
    )
    ranks = calibration.allocate().ranks
    shares = truth.shares(leading(calibration, ranks), center=False)
    assert max(shares.values()) < 1 + 1e-6, "more than the optimum was captured"
    captured = sum(ranks[name] * share for name, share in shares.items()) / sum(ranks.values())
    texts = sum(len(batch["input_ids"]) for batch in stream.seen[: calibration.batches])
    missed = (1 - captured) / (1 + texts / truth.texts)
    estimate = calibration.estimated_missed
    found = {
        "batches": calibration.batches,
        "seconds": seconds,
        "texts": texts,
        "held_texts": truth.texts,
        "statuses": _counts([str(status) for status in calibration.status.values()]),
        "captured": captured,
        "captured_worst": min(shares.values()),
        "missed": missed,
        "estimated_missed": estimate,
        "estimate_over_truth": estimate / missed if estimate else None,
    }
    found |= _beside_peft(stream, truth, peft_seconds)
    to_peft = found["seconds_to_peft"]
    return found | {
        "whole_faster": found["peft_seconds"] / seconds,
        "faster_to_peft": found["peft_seconds"] / to_peft if to_peft else None,
    }


def _counts(values: Sequence[str]) -> dict[str, int]:
    return {value: values.count(value) for value in dict.fromkeys(values)}


class Bounded:
    """A loader for PEFT without an end, that tells PEFT after a while that it has converged."""

    def __init__(self, model: nn.Module, batches: Batches, seconds: float) -> None:
        self._model, self._batches, self._seconds = model, batches, seconds
        self._start = time.perf_counter()
        self.read, self.stopped = 0, False

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for batch in itertools.cycle(self._batches):
            if time.perf_counter() - self._start > self._seconds:
                self._call_it_converged()
            self.read += 1
            yield dict(batch)

    def _call_it_converged(self) -> None:
        """Have every sketch that PEFT still feeds find that its components have converged."""
        self.stopped = True
        for module in self._model.modules():
            for hook in module._forward_hooks.values():
                if isinstance(hook, SVDHook):
                    hook.sim_thresh = -2.0  # a cosine is above it


def _beside_peft(stream: Stream, truth: Truth, peft_seconds: float) -> dict[str, Any]:
    """PEFT's whole initialization, and how long ours takes to directions as good as its."""
    theirs = adapted(
        stream.name, stream.model, init_lora_weights="eva", eva_config=EvaConfig(rho=RHO)
    )
    loader = Bounded(theirs, stream.seen, peft_seconds)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seconds, state = timed(lambda: get_eva_state_dict(theirs, loader, show_progress_bar=False))
    directions = {name.removeprefix("base_model.model."): v for name, v in state.items()}
    ranks = {name: len(v) for name, v in directions.items()}
    goal = statistics.fmean(truth.shares(directions, center=True).values())
    found = {
        "peft_seconds": seconds,
        "peft_batches": loader.read,
        "peft_finished": not loader.stopped,
        "peft_captured_centered": goal,
        "peft_captured": statistics.fmean(truth.shares(directions, center=False).values()),
    }
    return found | _time_to(stream, truth, ranks, goal)


def _time_to(stream: Stream, truth: Truth, ranks: Mapping[str, int], goal: float) -> dict[str, Any]:
    """The time in which `center=True` reaches as much centered energy at the same ranks.

    At the end of a refresh, found by bisection, as what is captured grows with the batches.
    """
    counts = [count for count in range(1, len(stream.seen) + 1) if is_refresh(count)]
    found: dict[int, tuple[float, float]] = {}

    def quality(count: int) -> float:
        config = evatune.CalibrationConfig(tolerance=0, max_batches=count, center=True)
        batches = stream.seen[:count]
        seconds, calibration = timed(
            lambda: evatune.calibrate(stream.model, batches, config, targets=TARGETS[stream.name])
        )
        shares = truth.shares(leading(calibration, ranks), center=True)
        found[count] = sum(shares.values()) / len(ranks), seconds
        return found[count][0]

    place = bisect.bisect_left(counts, goal, key=quality)
    if place == len(counts):
        best = max(captured for captured, _ in found.values())
        return {"batches_to_peft": None, "seconds_to_peft": None, "captured_then": best}
    captured, seconds = found[counts[place]]
    return {
        "batches_to_peft": counts[place],
        "seconds_to_peft": seconds,
        "captured_then": captured,
    }


# -- what comes of it ------------------------------------------------------------------------------


def summary(streams: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Figures over all streams in which the rule can know what it needs."""
    known = [found for name, found in streams.items() if name not in UNKNOWABLE]
    faster = [found["faster_to_peft"] for found in known]
    ratios = [found["estimate_over_truth"] for found in known if found["estimate_over_truth"]]
    return {
        "least_captured": min(found["captured"] for found in known),
        "estimate_over_truth": [min(ratios), max(ratios)] if ratios else None,
        "median_faster_to_peft": statistics.median(factor or 0 for factor in faster),
        "least_faster_to_peft": min(factor or 0 for factor in faster),
        "median_whole_faster": statistics.median(found["whole_faster"] for found in known),
    }


def table(streams: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown, a line per stream."""
    lines = [
        "| stream | batches | of the optimum | missed: estimate, truth | PEFT: batches | of the"
        " optimum, centered | whole time over ours | batches of ours to that | times faster |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, one in streams.items():
        estimate, to_peft = one["estimated_missed"], one["batches_to_peft"]
        cells = (
            name,
            str(one["batches"]),
            f"{one['captured']:.4f}",
            f"{'–' if estimate is None else f'{estimate:.2%}'}, {one['missed']:.2%}",
            f"{one['peft_batches']}{'' if one['peft_finished'] else ', stopped there'}",
            f"{one['peft_captured_centered']:.4f}",
            f"{one['whole_faster']:.1f}",
            str(to_peft or f"more ({one['captured_then']:.4f})"),
            f"{one['faster_to_peft']:.1f}" if to_peft else "–",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    every = STREAMS | UNKNOWABLE | TINY
    parser.add_argument(
        "--streams",
        nargs="+",
        choices=every,
        default=[*STREAMS, *UNKNOWABLE],
        metavar="NAME",
        help=f"of {'; '.join(every)}; default: all but tiny",
    )
    parser.add_argument(
        "--output", type=Path, help="JSON file to complete, written stream by stream"
    )
    parser.add_argument("--peft-seconds", type=float, default=1500, help="bound on PEFT's time")
    options = parser.parse_args()
    known = options.output and options.output.exists()
    found = json.loads(options.output.read_text(encoding="utf-8")) if known else {"streams": {}}
    found["machine"] = machine()
    for name in options.streams:
        if name in found["streams"]:
            continue
        found["streams"][name] = measure(every[name](), options.peft_seconds)
        found["summary"] = summary(found["streams"])
        print(json.dumps({name: found["streams"][name]}), flush=True)
        if options.output:
            options.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(table(found["streams"]))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
