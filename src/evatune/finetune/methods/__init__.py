"""Methods of fine-tuning under one name each. To add one: a file beside these, and a line here."""

from __future__ import annotations

import difflib

from evatune.errors import ConfigError
from evatune.finetune.methods import (
    adalora,
    corda,
    eva,
    lora,
    lora_fa,
    lora_ga,
    lora_one,
    lora_orthogonal,
    loraplus,
    milora,
    peft_starts,
    without_adapter,
)
from evatune.finetune.methods.base import AdapterSetup, Method, Preparation

_FILES = (
    lora,
    peft_starts,
    milora,
    corda,
    lora_ga,
    lora_one,
    adalora,
    loraplus,
    eva,
    lora_orthogonal,
    lora_fa,
    without_adapter,
)
METHODS: dict[str, Method] = {method.name: method for file in _FILES for method in file.METHODS}

# Known by name, and why no run has them.
_REFUSED = {
    "loftq": "starts an adapter from the error of quantizing the base to 4 bits, for which PEFT "
    "needs a GPU; choose lora or eva with adapter.quantize=nf4, or pissa, olora or milora, which "
    "start from the weights too"
}


def find_method(name: str) -> Method:
    """Return a method by its name. ConfigError for one that does not exist or cannot run here."""
    if name in _REFUSED:
        raise ConfigError(f"method {name!r} {_REFUSED[name]}")
    if name not in METHODS:
        near = difflib.get_close_matches(name.replace("_", "-"), METHODS, n=1)
        known = f"choose one of {', '.join(METHODS)}"
        hint = f"did you mean {near[0]}? `evatune methods` lists all" if near else known
        raise ConfigError(f"method is {name!r}; {hint}")
    return METHODS[name]


__all__ = [
    "METHODS",
    "AdapterSetup",
    "Method",
    "Preparation",
    "find_method",
]
