"""Methods that move a part of the base weights into the adapter: W − scale·BA takes the place of W.

Each works on a `PeftModel` with a fresh LoRA adapter. PEFT's own are run by PEFT; here is what
feeds them.
"""

from __future__ import annotations

import copy
import re
from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils import (
    SAFETENSORS_WEIGHTS_NAME,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from evatune.adapters.lora_layers import lora_layers
from evatune.calibration import Calibration
from evatune.finetune.methods.base import Batches, Lora, Preparation
from evatune.modeling.state import evaluation_state
from evatune.utils.outputs import claimed_folder


@dataclass(frozen=True)
class WeightInit(Lora):
    """LoRA whose A and B start as a part of the base weights, which then lack it."""

    fits_quantized: ClassVar[bool] = False
    fits_shards: ClassVar[bool] = False
    linear_only: ClassVar[bool] = True

    @abstractmethod
    def apply(self, model: Any, batches: Batches) -> None:
        """Write A and B into every layer, and subtract their product from its base weight."""

    def prepare(self, model: Any, preparation: Preparation) -> Calibration | None:
        """Apply the start and keep the adapter as it then is; where it is kept already, take that.

        So a run that goes on has the base weights it had before, without a second pass over the
        data. The random number generators, modes and gradients are left as they were.

        Raises:
            ConfigError: a layer that the training data never reaches.
        """
        folder = preparation.initial_adapter
        if folder.exists():
            set_peft_model_state_dict(model, load_file(folder / SAFETENSORS_WEIGHTS_NAME))
            for layer in lora_layers(model).values():
                subtract_from_base(layer)
            return None
        with evaluation_state(model):
            torch.manual_seed(preparation.seed)
            self.apply(model, preparation.batches)
        # A killed run must not leave half of it.
        with claimed_folder(folder, overwrite=False) as output, output.whole() as temporary:
            model.save_pretrained(temporary)
        return None

    def save(
        self,
        model: Any,
        folder: Path,
        initial_adapter: Path,
        weights: dict[str, Tensor] | None = None,
    ) -> None:
        """Write the adapter such that it fits the original base: BA − B₀A₀, twice the rank.

        Args:
            initial_adapter: the folder of `prepare`, which holds A₀ and B₀.
        """
        model.save_pretrained(folder, path_initial_model_for_weight_conversion=str(initial_adapter))
        # PEFT's conversion writes the LoRA matrices alone, without a head trained beside them.
        path = folder / SAFETENSORS_WEIGHTS_NAME
        state = get_peft_model_state_dict(model)
        whole = {key: value.contiguous() for key, value in state.items()} | load_file(path)
        save_file(whole, path, metadata={"format": "pt"})


@torch.no_grad()
def subtract_from_base(layer: LoraLayer) -> None:
    """Put W − scale·BA for W, in place, so that the layer gives what W alone gave."""
    layer.get_base_layer().weight.sub_(layer.get_delta_weight("default"))


def peft_config(model: Any, **options: Any) -> LoraConfig:
    """Return a copy of the adapter's config with other options, for PEFT's functions.

    Those functions do not know "all-linear": targets are the base layers by their names.
    """
    config = copy.copy(model.peft_config["default"])
    modules = model.named_modules()
    paths = [path for path, module in modules if isinstance(module, LoraLayer)]
    config.target_modules = "|".join(re.escape(f"{path}.base_layer") for path in paths)
    for name, value in options.items():
        setattr(config, name, value)
    return config


def initialize_by_peft(model: Any, config: LoraConfig) -> None:
    """Have PEFT initialize every layer anew, as the config says."""
    for layer in lora_layers(model).values():
        # get_peft_model may have chosen float32 above a 16-bit base.
        dtype = layer.lora_A["default"].weight.dtype
        alpha = layer.lora_alpha["default"]
        layer.update_layer("default", r=layer.r["default"], lora_alpha=alpha, config=config)
        layer.lora_A["default"].to(dtype)
        layer.lora_B["default"].to(dtype)
