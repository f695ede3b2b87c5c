"""One LoRA adapter of a model: its config, its layers, and the ranks that these must or may get."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils.other import EMBEDDING_LAYER_NAMES, get_pattern_key
from torch import Tensor, nn

from evatune.adapters.lora_layers import (
    LoraTarget,
    find_lora_targets,
    lora_matrix_pairs,
    tied_layers,
)
from evatune.capture import TargetLayer
from evatune.errors import AdapterError
from evatune.modeling.wrappers import adapted_inside, peft_name


@dataclass(frozen=True)
class LoraAdapter:
    """A LoRA adapter of a model, and the layers that carry it.

    Attributes:
        model: the model that PEFT adapted, without wrappers around it.
        name: of the adapter.
        config: the adapter's.
        targets: layers that EVA initializes, in model order.
        others: adapted layers that keep rank and α, by the names that PEFT's patterns match.
    """

    model: nn.Module
    name: str
    config: LoraConfig
    targets: list[LoraTarget]
    others: Mapping[str, LoraLayer]

    @classmethod
    def find(cls, model: nn.Module, name: str) -> LoraAdapter:
        """Return the adapter `name` of a model; an AdapterError if there is none."""
        config = lora_config(model, name)
        targets, unsupported = find_lora_targets(model, name)
        others = {peft_name(path): layer for path, layer in unsupported.items()}
        return cls(model, name, config, targets, others)

    @property
    def target_layers(self) -> list[TargetLayer]:
        """Every layer whose input decides on an A, in model order."""
        layers: list[TargetLayer] = []
        for target in self.targets:
            layers.extend(target.target_layers)
        return layers

    @property
    def tied(self) -> dict[str, LoraLayer]:
        """Layers whose A and B are transposes of the embedding's; see `tied_layers`."""
        return tied_layers(self.model, self.name)

    def pattern_ranks(self) -> dict[str, int]:
        """Return the ranks that the config's `rank_pattern` gives, by layer."""
        patterns = self.config.rank_pattern.keys()
        ranks = {}
        for target in self.targets:
            if get_pattern_key(patterns, target.name) in patterns:
                for target_layer in target.target_layers:
                    ranks[target_layer.name] = target.layer.r[self.name]
        return ranks

    def least_ranks(self) -> dict[str, int]:
        """Return a rank of one for each embedding whose adapter others depend on.

        PEFT saves the base weights of an embedding that `target_modules` names, rows of new tokens
        among them, only while it carries the adapter. And layers may be tied to its adapter.
        """
        needed = self._named_embeddings()
        if self.tied:
            needed.append(self._input_embedding())
        return {layer.name: 1 for target in needed for layer in target.target_layers}

    def require_fresh(self) -> None:
        """Raise an AdapterError for an adapter that is not at its start, which is BA = 0."""
        for target in self.targets:
            # a bias of B may be random before training, as PEFT draws it
            for a, b, _ in lora_matrix_pairs(target.layer, self.name):
                # B = 0 as a rule, but A = 0 of embeddings
                if a.device.type != "meta" and _has_nonzero(b) and _has_nonzero(a):
                    raise AdapterError(
                        f"adapter {self.name!r} is already trained or was initialized with B ≠ 0"
                        f" (for example {target.name}); initialize a fresh one, with"
                        " init_lora_weights=True or 'eva', or start this one over with"
                        " overwrite=True"
                    )

    def _named_embeddings(self) -> list[LoraTarget]:
        modules = self.config.target_modules
        is_named = isinstance(modules, str) or any(
            name in EMBEDDING_LAYER_NAMES for name in modules or ()
        )
        if not is_named:
            return []
        return [
            target
            for target in self.targets
            if target.name.rpartition(".")[2] in EMBEDDING_LAYER_NAMES
        ]

    def _input_embedding(self) -> LoraTarget:
        """Return the target of the input embedding, which others are tied to; or raise."""
        embedding = self.model.get_input_embeddings()  # type: ignore[operator]
        for target in self.targets:
            if target.layer is embedding:
                return target
        raise AdapterError(
            "ensure_weight_tying is set, and the input embedding carries no adapter to tie others"
            " to; add it to target_modules, or set ensure_weight_tying=False"
        )


def lora_config(model: nn.Module, adapter_name: str) -> LoraConfig:
    """Return the adapter's config; an AdapterError unless it is there and is plain LoRA."""
    inside = adapted_inside(model)
    if len(inside) > 1:
        raise AdapterError(
            f"{type(model).__name__} holds several models with an adapter ({', '.join(inside)}),"
            " and one is started at a time; call evatune.initialize(model, batches) for each,"
            " before optimizers are built"
        )
    configs: Any = getattr(model, "peft_config", None)
    if not isinstance(configs, dict) or not configs:
        raise AdapterError(
            f"{type(model).__name__} carries no adapter; build one first: get_peft_model(model,"
            " LoraConfig(r=16, target_modules='all-linear'))"
        )
    if adapter_name not in configs:
        raise AdapterError(
            f"there is no adapter {adapter_name!r}; this model has {', '.join(map(repr, configs))}"
        )
    config = configs[adapter_name]
    if not isinstance(config, LoraConfig) or type(config).__name__ != "LoraConfig":
        raise AdapterError(
            f"adapter {adapter_name!r} is of type {type(config).__name__}; EVA initializes LoRA"
            " adapters only"
        )
    return config


def _has_nonzero(parameter: Tensor) -> bool:
    """Return whether a value is not zero, on any process that holds a part of the parameter."""
    whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
    return bool(whole.any())
