"""A plain LoRA adapter around a model, by PEFT."""

from __future__ import annotations

import warnings
from collections.abc import Collection

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from evatune.capture import find_target_layers
from evatune.errors import TargetError
from evatune.utils.text import first_line

Names = str | list[str]


def add_lora(
    model: nn.Module,
    *,
    rank: int,
    alpha: float,
    targets: Names,
    exclude: Names | None = None,
    task_type: str | None = None,
    head: Collection[str] = (),
) -> PeftModel:
    """Return a PEFT model around `model`, with a LoRA adapter.

    PEFT's own errors do not say which names would match; ours do.

    Args:
        head: modules that are trained in full, and saved with the adapter.
    """
    find_target_layers(model, targets)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=targets,
        exclude_modules=exclude,
        task_type=task_type,
        modules_to_save=list(head) or None,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*no modules were excluded", category=UserWarning)
        try:
            return get_peft_model(model, config)
        except (ValueError, UserWarning) as error:
            if exclude is None:
                raise TargetError(
                    f"PEFT takes no adapter of rank {rank} there ({first_line(error)});"
                    " choose another rank, or other targets"
                ) from error
            target_layers = find_target_layers(model, targets)
            names = ", ".join(layer.name for layer in target_layers[:3])
            raise TargetError(
                f"exclude_modules {exclude!r} leaves out none of the targeted layers, or"
                f" all of them; they are {names}, …; name some of them by their endings, or by a"
                " regular expression for whole names"
            ) from error
