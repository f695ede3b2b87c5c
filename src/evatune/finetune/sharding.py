"""Weights in shards: from the first step on each process holds a part of every weight."""

from __future__ import annotations

from typing import Any

from evatune.errors import ConfigError
from evatune.modeling.sharding import is_sharded
from evatune.utils.launcher import processes

_ZERO_3: dict[str, Any] = {
    "zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True},
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto"},
    "zero_allow_untested_optimizer": True,
}


def sharding_arguments(sharding: str, model: Any) -> dict[str, Any]:
    """Return the options of TrainingArguments for a recipe's `training.sharding`.

    Raises ConfigError where there is one process alone.
    """
    if sharding == "none":
        return {}
    if processes() == 1:
        raise ConfigError(
            f"training.sharding is {sharding!r}, and this is one process; start several by torchrun"
            " or accelerate launch, or leave it out"
        )
    if sharding == "fsdp2":
        units = {"transformer_layer_cls_to_wrap": _units(model)}
        return {
            "fsdp": True,
            "fsdp_config": {"version": 2, "cpu_ram_efficient_loading": False, **units},
        }
    return {"deepspeed": _ZERO_3}


def _units(model: Any) -> list[str]:
    """Return the classes of the modules that FSDP2 gathers one at a time.

    Those that transformers names, but for what holds the input embedding, as in Bert:
    accelerate makes that a unit of its own, and none may be in two.
    """
    embedding = model.get_input_embeddings()
    outer = {
        type(module).__name__
        for module in model.modules()
        if any(inner is embedding for inner in module.modules())
    }
    return sorted(set(model._no_split_modules or ()) - outer)


def whole_weights(trainer: Any) -> dict[str, Any] | None:
    """Return the weights that processes hold in shards, whole on the first.

    Every process must call it. None on the others, and where there are no shards.
    """
    if not is_sharded(trainer.model):
        return None
    weights: dict[str, Any] | None = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    return weights
