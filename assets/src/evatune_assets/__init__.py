"""Checkpoints of evatune's recipes: a folder each, which `evatune.loading.assets` finds."""
