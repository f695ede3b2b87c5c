"""Starts that move a part of the base weights into the adapter: A and B, and W − scale·BA where W
was.

A start works on a `PeftModel` with a fresh LoRA adapter. PEFT's own ones are run by PEFT; here is
what feeds them.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraGAConfig, LoraLayer, preprocess_loraga
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.utils import (
    SAFETENSORS_WEIGHTS_NAME,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from evatune.errors import ConfigError
from evatune.modeling.forward import call_model
from evatune.modeling.state import evaluation_state
from evatune.modeling.wrappers import peft_name
from evatune.utils.files import claimed_folder

# examples per batch → one pass over the training data, on the model's device
Batches = Callable[[int], Iterable[Any]]
WeightInit = Callable[[Any, Batches], None]

# What PEFT's documentation of each method uses.
_CORDA_EXAMPLES = 256
_LORA_GA_BATCHES, _LORA_GA_EXAMPLES = 64, 2


def begin(model: Any, start: WeightInit, batches: Batches, seed: int, folder: Path) -> None:
    """Apply a start and keep the adapter as it then is in `folder`; where it is there already, take
    that one.

    So a run that goes on has the base weights it had before, without a second pass over the data.
    The random number generators, modes and gradients of the model are left as they were.

    Raises:
        ConfigError: a layer that the training data never reaches.
    """
    if folder.exists():
        set_peft_model_state_dict(model, load_file(folder / SAFETENSORS_WEIGHTS_NAME))
        for layer in lora_layers(model).values():
            subtract_from_base(layer)
        return
    with evaluation_state(model):
        torch.manual_seed(seed)
        start(model, batches)
    with claimed_folder(folder, overwrite=False) as output, output.whole() as temporary:
        model.save_pretrained(temporary)


def save_for_base(model: Any, folder: Path, start: Path) -> None:
    """Write the adapter such that it fits the base weights as they were: BA − B₀A₀, of twice the
    rank.

    Args:
        start: the folder of `begin`, which holds A₀ and B₀.
    """
    model.save_pretrained(folder, path_initial_model_for_weight_conversion=str(start))
    # PEFT's conversion writes the LoRA matrices alone; the head that was trained beside them
    # belongs there too.
    path = folder / SAFETENSORS_WEIGHTS_NAME
    whole = {
        key: value.contiguous() for key, value in get_peft_model_state_dict(model).items()
    } | load_file(path)
    save_file(whole, path, metadata={"format": "pt"})


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """The adapted layers by the names that PEFT's patterns match."""
    return {
        peft_name(path): module
        for path, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


@torch.no_grad()
def subtract_from_base(layer: LoraLayer) -> None:
    """W − scale·BA for W, in place, so that the layer gives what W alone gave."""
    layer.get_base_layer().weight.sub_(layer.get_delta_weight("default"))


def pissa(model: Any, batches: Batches) -> None:
    """The largest singular triplets of W. Meng et al. 2024, arXiv 2404.02948."""
    _by_peft(model, _config(model, init_lora_weights="pissa"))


def olora(model: Any, batches: Batches) -> None:
    """The first columns and rows of W's QR decomposition. Büyükakyüz 2024, arXiv 2406.01775."""
    _by_peft(model, _config(model, init_lora_weights="olora"))


def corda(model: Any, batches: Batches) -> None:
    """The largest singular triplets of W·C, C the second moments of the layer's input
    (instruction-previewed mode).

    C is of 256 training examples, or all if there are fewer. Yang et al. 2024, arXiv 2406.05223.
    """
    config = _config(model, init_lora_weights="corda", corda_config=CordaConfig())
    layers = {name: layer.get_base_layer() for name, layer in lora_layers(model).items()}

    def run() -> None:
        with _rows_of_one_sample(layers) as shapes:
            # one by one: PEFT scales each by its largest value
            for batch in islice(batches(1), _CORDA_EXAMPLES):
                call_model(model, batch)
        _require_all("corda", layers.keys() - shapes.keys())

    preprocess_corda(model, config, run)
    _by_peft(model, config)


def lora_ga(model: Any, batches: Batches) -> None:
    """The leading singular vectors of the loss's gradient by W: the first r to A, the next r to B.

    The gradient is the mean over 64 batches of 2 training examples, or over one pass if that is
    less. Wang et al. 2024, arXiv 2407.05000.
    """
    config = _config(model, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())
    weights: dict[str, Tensor] = {
        name: layer.get_base_layer().weight for name, layer in lora_layers(model).items()
    }

    def run() -> None:
        sums: dict[str, Tensor] = {}
        for batch in islice(batches(_LORA_GA_EXAMPLES), _LORA_GA_BATCHES):
            output = call_model(model, batch)
            (output["loss"] if isinstance(output, Mapping) else output[0]).backward()
            for name, weight in weights.items():
                if weight.grad is not None:
                    # In float32: a sum of 64 in 16 bits would lose the small ones.
                    sums[name] = sums[name] + weight.grad if name in sums else weight.grad.float()
                    weight.grad = None
        _require_all("lora-ga", weights.keys() - sums.keys())
        for name, weight in weights.items():
            # where PEFT reads it, and divides it by the number of batches
            weight.grad = sums[name].to(weight.dtype)

    with warnings.catch_warnings():
        # The first layers of a frozen model: their inputs have no gradient, and PEFT counts their
        # outputs' as well.
        warnings.filterwarnings(
            "ignore", message="Full backward hook is firing", category=UserWarning
        )
        preprocess_loraga(model, config, run)
    _by_peft(model, config)


def _config(model: Any, **options: Any) -> LoraConfig:
    """The adapter's config with other options, for PEFT's functions; its targets are the base
    layers by their names.

    Those functions do not know "all-linear".
    """
    config = copy.copy(model.peft_config["default"])
    paths = [path for path, module in model.named_modules() if isinstance(module, LoraLayer)]
    config.target_modules = "|".join(re.escape(f"{path}.base_layer") for path in paths)
    for name, value in options.items():
        setattr(config, name, value)
    return config


def _by_peft(model: Any, config: LoraConfig) -> None:
    """Have PEFT initialise every layer anew, as the config says."""
    for layer in lora_layers(model).values():
        # get_peft_model may have chosen float32 above a 16-bit base
        dtype = layer.lora_A["default"].weight.dtype
        layer.update_layer(
            "default", r=layer.r["default"], lora_alpha=layer.lora_alpha["default"], config=config
        )
        layer.lora_A["default"].to(dtype)
        layer.lora_B["default"].to(dtype)


@contextmanager
def _rows_of_one_sample(layers: Mapping[str, nn.Module]) -> Iterator[Mapping[str, torch.Size]]:
    """Let every input arrive as (1, rows, d), the one shape that PEFT's covariance is right for.

    A pooler's input is (1, d), of which PEFT would make a number instead of a matrix. Gives the
    shapes of the rows of the layers that were called.
    """
    shapes: dict[str, torch.Size] = {}

    def flatten(name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            shapes[name] = inputs[0].shape[:-1]
            return inputs[0].flatten(0, -2)[None], *inputs[1:]

        return hook

    def restore(name: str) -> Callable[..., Any]:
        return lambda module, inputs, output: output.reshape(*shapes[name], -1)

    handles = []
    for name, layer in layers.items():
        handles += [
            layer.register_forward_pre_hook(flatten(name)),
            layer.register_forward_hook(restore(name)),
        ]
    try:
        yield shapes
    finally:
        for handle in handles:
            handle.remove()


def _require_all(method: str, missing: set[str]) -> None:
    if missing:
        some = ", ".join(sorted(missing)[:5])
        raise ConfigError(
            f"method {method!r} learns nothing about {some}{' …' if len(missing) > 5 else ''}: the"
            " training data does not reach them; leave them out of adapter.targets"
        )
