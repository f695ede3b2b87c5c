"""Real texts with labels that need no hub."""

from __future__ import annotations

import io
import tarfile

from evatune.loading.cache import download_once
from evatune.loading.demo import demo_data

SENTIMENT = {  # corpus → file in the archive
    "movie": "movieReviewSnippets_GroundTruth.txt",
    "amazon": "amazonReviewSnippets_GroundTruth.txt",
    "tweet": "tweets_GroundTruth.txt",
    "nyt": "nytEditorialSnippets_GroundTruth.txt",
}
ARCHIVE = "vaderSentiment-3.3.2.tar.gz"
"""The file of the package index that they come from."""
_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
_INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
_NEUTRAL = 0.3  # ratings closer to zero than this have no clear sign


def bbc() -> tuple[list[str], list[int]]:
    """Return news articles and the number of their topic, 0 to 4 in alphabetical order."""
    root = demo_data()
    topics = sorted(path.name for path in root.iterdir() if path.is_dir())
    texts, labels = [], []
    for number, topic in enumerate(topics):
        for path in sorted((root / topic).glob("*.txt")):
            texts.append(path.read_text(encoding="utf-8", errors="replace"))
            labels.append(number)
    return texts, labels


def sentiment(corpus: str) -> tuple[list[str], list[int]]:
    """Return snippets and the sign of their rating, 0 or 1, without those that are unclear."""
    texts, labels = [], []
    for text, rating in ratings(corpus):
        if abs(rating) >= _NEUTRAL:
            texts.append(text)
            labels.append(int(rating > 0))
    return texts, labels


def ratings(corpus: str) -> list[tuple[str, float]]:
    """Return a corpus's snippets with their mean rating by people, −4 to 4.

    Raises DataError if they cannot be downloaded.
    """
    archive = download_once("vaderSentiment", ARCHIVE, _SHA256, "the sentiment data")
    with tarfile.open(archive) as outer:
        inner = outer.extractfile(_INNER)
        assert inner is not None  # the archive's hash is known
        packed = io.BytesIO(inner.read())
    with tarfile.open(fileobj=packed) as files:
        member = next(member for member in files.getmembers() if _holds(member.name, corpus))
        table = files.extractfile(member)
        assert table is not None
        text = table.read().decode("utf-8", errors="replace")
    rows = [line.split("\t") for line in text.splitlines()]
    return [("\t".join(row[2:]).strip(), float(row[1])) for row in rows if len(row) >= 3]


def _holds(name: str, corpus: str) -> bool:
    """Return whether a member of the archive is the corpus, and not what a Mac left beside it."""
    return name.endswith(f"/{SENTIMENT[corpus]}") and "/._" not in name
