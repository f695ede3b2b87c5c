"""Real texts with labels that need no hub."""

from __future__ import annotations

import io
import tarfile

from evatune.loading.assets import downloaded
from evatune.loading.text import demo_data

SENTIMENT = {  # corpus → file in the archive
    "movie": "movieReviewSnippets_GroundTruth.txt",
    "amazon": "amazonReviewSnippets_GroundTruth.txt",
    "tweet": "tweets_GroundTruth.txt",
    "nyt": "nytEditorialSnippets_GroundTruth.txt",
}
_ARCHIVE = "vaderSentiment-3.3.2.tar.gz"
_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
_INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
_NEUTRAL = 0.3  # ratings closer to zero than this have no clear sign


def bbc() -> tuple[list[str], list[int]]:
    """News articles and the number of their topic, 0 to 4 in alphabetical order."""
    root = demo_data()
    topics = sorted(path.name for path in root.iterdir() if path.is_dir())
    texts, labels = [], []
    for number, topic in enumerate(topics):
        for path in sorted((root / topic).glob("*.txt")):
            texts.append(path.read_text(encoding="utf-8", errors="replace"))
            labels.append(number)
    return texts, labels


def sentiment(corpus: str) -> tuple[list[str], list[int]]:
    """Snippets whose mean rating by people lies in −4 … 4, and its sign; the unclear ones are left
    out."""
    texts, labels = [], []
    for text, rating in ratings(corpus):
        if abs(rating) >= _NEUTRAL:
            texts.append(text)
            labels.append(int(rating > 0))
    return texts, labels


def ratings(corpus: str) -> list[tuple[str, float]]:
    """Snippets of a corpus with their mean rating. DataError if they cannot be downloaded."""
    archive = downloaded("vaderSentiment", _ARCHIVE, _SHA256, "the sentiment data")
    with tarfile.open(archive) as outer:
        inner = outer.extractfile(_INNER)
        assert inner is not None  # the archive's hash is known
        packed = io.BytesIO(inner.read())
    with tarfile.open(fileobj=packed) as files:
        member = next(
            m
            for m in files.getmembers()
            if m.name.endswith(f"/{SENTIMENT[corpus]}") and "/._" not in m.name
        )
        opened = files.extractfile(member)
        assert opened is not None
        lines = [
            line.split("\t")
            for line in opened.read().decode("utf-8", errors="replace").splitlines()
        ]
    return [("\t".join(parts[2:]).strip(), float(parts[1])) for parts in lines if len(parts) >= 3]
