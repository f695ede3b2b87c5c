"""PEFT's ways to name layers in a `LoraConfig`: patterns of ranks and α, and targets."""

from __future__ import annotations

import re
from collections.abc import Iterable, Set
from typing import Any

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists


def pattern_of(values: dict[str, Any], default: Any) -> dict[str, Any]:
    """Return a PEFT pattern that gives each layer its value, with as few entries as that takes.

    PEFT takes the first key that a layer's name ends in, and saves them sorted. So a name in which
    another one ends stands for itself alone, whatever the order.
    """

    def key_of(name: str) -> str:
        ends_another = any(other != name and _ends(other, name) for other in values)
        return f"^{_escaped(name)}" if ends_another else _escaped(name)

    return {key_of(name): value for name, value in values.items() if value != default}


def set_targets(lora: LoraConfig, names: Set[str], wanted: Set[str]) -> None:
    """Set `target_modules` so that of the modules `names` those `wanted` match and no other.

    What can stay stays as the user wrote it, with all other filters. PEFT saves embeddings that are
    named by endings such as "embed_tokens", and adds up adapters only if all have lists, or none.
    """
    matched = _matched(lora, names)
    if matched == wanted:
        return
    dropped = matched - wanted
    if not wanted:
        lora.target_modules = set()
    elif isinstance(lora.target_modules, str):
        lora.target_modules = f"(?!(?:{_any_of(dropped)})$)(?:{lora.target_modules})"
    else:
        lora.target_modules = set(targets_for(lora.target_modules or (), sorted(wanted), dropped))
    if _matched(lora, names) != wanted:
        # A name that must not match ends in one that must: only whole names tell them apart.
        lora.target_modules = _any_of(wanted)
        lora.layers_to_transform = lora.layers_pattern = None


def targets_for(targets: Iterable[str], wanted: list[str], dropped: Set[str]) -> list[str]:
    """Return targets that end each name in `wanted` and none in `dropped`, the given ones first.

    A name that none of the given targets ends stands for itself. They come in the order of
    `wanted`: that of PEFT's wrappers, where a module has several adapted parameters.
    """
    usable = [target for target in targets if not any(_ends(name, target) for name in dropped)]
    matching = [next((target for target in usable if _ends(name, target)), name) for name in wanted]
    return list(dict.fromkeys([*matching, *usable]))


def _escaped(name: str) -> str:
    """Return the name as a pattern; dots match themselves, and stay as readers know them."""
    return re.escape(name).replace(r"\.", ".").replace(r"\-", "-")


def _matched(lora: LoraConfig, names: Set[str]) -> set[str]:
    """Return the names that PEFT would put the adapter on."""
    return {name for name in names if check_target_module_exists(lora, name)}


def _any_of(names: Set[str]) -> str:
    """Return a regular expression for these whole names."""
    return "|".join(re.escape(name) for name in sorted(names))


def _ends(name: str, target: str) -> bool:
    """Return whether a name is a target, or ends in it after a dot."""
    return f".{name}".endswith(f".{target}")
