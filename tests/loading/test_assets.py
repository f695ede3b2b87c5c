"""The checkpoints that come with evatune."""

from __future__ import annotations

import torch

from evatune.loading.assets import asset

torch.set_num_threads(1)


def test_the_checkpoint_fits_its_card() -> None:
    import hashlib

    for name in ("llama-small", "vit-glyphs", "dt-metaworld"):
        weights = (asset(name) / "model.safetensors").read_bytes()
        assert len(weights) <= 10_000_000
        assert hashlib.sha256(weights).hexdigest() in (asset(name) / "README.md").read_text(
            encoding="utf-8"
        )
