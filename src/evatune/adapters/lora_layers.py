"""PEFT's LoRA layers by kind: what each sees, where its A and B are, and which EVA cannot start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper
from torch import Tensor, nn

from evatune.capture import TargetLayer
from evatune.capture.input_views import ConvPatches, DenseRows, OneHotRows
from evatune.capture.layer_types import (
    conv_target_layer,
    parameter_target_layers,
    target_layers_of,
)
from evatune.errors import AdapterError
from evatune.layers import LayerSpec
from evatune.modeling.wrappers import base_name, peft_name, without_wrappers

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class LoraTarget:
    """A LoRA layer of the adapter and where it hangs: what PEFT gives one rank and one α."""

    name: str  # that PEFT's patterns match: of the base module, or of the parameter
    # one, but for attention (its two projections) and stacked weights (the experts)
    target_layers: tuple[TargetLayer, ...]
    layer: LoraLayer
    path: str  # in the wrapped model

    @property
    def is_linear(self) -> bool:
        """True for PEFT's usual layer: one A of (rank, in) and one B of (out, rank)."""
        return (
            len(self.target_layers) == 1
            and self.target_layers[0].input_view == DenseRows()
            and not self.is_parameter
        )

    @property
    def is_parameter(self) -> bool:
        """True where PEFT lists it under `target_parameters`."""
        return isinstance(self.layer, ParamWrapper)


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """Return the adapted layers by the names that PEFT's patterns match."""
    return {
        peft_name(path): module
        for path, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def find_lora_targets(
    model: nn.Module, adapter_name: str
) -> tuple[list[LoraTarget], dict[str, LoraLayer]]:
    """Return the adapter's LoRA layers in model order, and by path those that EVA cannot start.

    Tied layers (`tied_layers`) are in neither: their weights are those of the embedding's adapter.
    """
    tied = tied_layers(model, adapter_name).values()
    lora_targets: list[LoraTarget] = []
    unsupported: dict[str, LoraLayer] = {}
    inside: tuple[str, ...] = ()  # attention, whose output projection has a LoRA layer of its own
    for path, layer in model.named_modules():
        if not isinstance(layer, LoraLayer) or adapter_name not in layer.r:
            continue
        if layer in tied or path.startswith(inside):
            continue
        if isinstance(layer, MultiheadAttention):
            inside = (*inside, f"{path}.")
        # One wrapper inside another: several parameters of a module are adapted, or layers in it.
        name = without_wrappers(path)
        target_layers = _target_layers(base_name(name), layer, adapter_name)
        if target_layers:
            known = f"{name}.{layer.parameter_name}" if isinstance(layer, ParamWrapper) else name
            lora_targets.append(LoraTarget(peft_name(known), tuple(target_layers), layer, path))
        else:
            unsupported[path] = layer
    if not lora_targets and not unsupported:
        raise AdapterError(f"adapter {adapter_name!r} has no LoRA layer in this model")
    return lora_targets, unsupported


def tied_layers(model: nn.Module, adapter_name: str) -> dict[str, LoraLayer]:
    """Return, by PEFT's names, the layers whose A and B are the embedding's B and A, transposed.

    That is what `ensure_weight_tying` is for where the model's embeddings are tied.
    """
    config = model.peft_config[adapter_name]  # type: ignore[index]
    targets = tuple(f".{target}" for target in getattr(config, "target_modules_to_tie", None) or ())
    if not targets:
        return {}
    tied: dict[str, LoraLayer] = {}
    for path, module in model.named_modules():
        carries = isinstance(module, LoraLayer) and adapter_name in module.r
        if carries and f".{path}".endswith(targets):
            tied[peft_name(path)] = module
    return tied


def describe(path: str, layer: LoraLayer) -> str:
    """Return name and kind of a layer that is not supported, and why where its kind is."""
    base = layer.get_base_layer()
    why = ""
    if isinstance(base, _CONVS):
        why = ", whose dilation PEFT's A does not have, so that PEFT cannot run it"
    return f"{peft_name(path)} ({type(base).__name__}{why})"


def lora_matrix_pairs(
    layer: LoraLayer, adapter_name: str
) -> list[tuple[nn.Parameter, nn.Parameter, nn.Parameter | None]]:
    """Return A, B and B's bias of every pair of the layer."""
    if adapter_name in layer.lora_embedding_A:
        return [(layer.lora_embedding_A[adapter_name], layer.lora_embedding_B[adapter_name], None)]
    b = layer.lora_B[adapter_name]
    pair = (layer.lora_A[adapter_name].weight, b.weight, b.bias)
    if isinstance(layer, MultiheadAttention):
        return [pair, *lora_matrix_pairs(layer.base_layer.out_proj, adapter_name)]
    return [pair]


def matrices_of(lora_target: LoraTarget, rows: Mapping[str, Tensor]) -> list[Tensor]:
    """Return the A of every pair of a layer, from the `rows` (rank, in) of its target layers.

    Of a convolution with groups, each group of outputs sees an equal share of A's rows; they are
    dealt out in turn, so that no group gets the leading directions alone.
    """
    blocks = [rows[target_layer.name] for target_layer in lora_target.target_layers]
    if lora_target.is_parameter:
        return [torch.cat(blocks)]  # PEFT stacks the experts
    input_view = lora_target.target_layers[0].input_view
    if isinstance(input_view, ConvPatches):
        groups = lora_target.target_layers[0].spec.groups
        order = [j for group in range(groups) for j in range(group, len(blocks[0]), groups)]
        return [blocks[0][order].reshape(len(order), -1, *input_view.kernel)]
    return blocks


def _target_layers(name: str, layer: LoraLayer, adapter_name: str) -> list[TargetLayer]:
    """Return what the layer's A is multiplied with; nothing where EVA does not know it."""
    base = layer.get_base_layer()
    if isinstance(layer, ParamWrapper):
        return parameter_target_layers(f"{name}.{layer.parameter_name}", base)
    if isinstance(layer, MultiheadAttention):
        return target_layers_of(name, base)
    if adapter_name in layer.lora_embedding_A:
        padding = getattr(base, "padding_idx", None)
        vocabulary = layer.lora_embedding_A[adapter_name].shape[1]
        width = layer.lora_embedding_B[adapter_name].shape[0]
        return [TargetLayer(LayerSpec(name, vocabulary, width), base, OneHotRows(padding))]
    a = dict(layer.lora_A.items()).get(adapter_name)
    if isinstance(base, _CONVS) and isinstance(a, _CONVS):
        # A has the layer's kernel, stride and padding, but fills with zeros and has no dilation:
        # its rows are the patches that A itself will see.
        seen = ConvPatches.of(a)
        spans = [(k - 1) * d for k, d in zip(base.kernel_size, base.dilation, strict=True)]
        same = base.padding == "same" or spans == [k - 1 for k in base.kernel_size]
        return [conv_target_layer(name, base, seen)] if same else []
    if isinstance(a, nn.Linear):  # of any base, quantized or not: A says how wide its input is
        out_features = layer.lora_B[adapter_name].out_features
        return [TargetLayer(LayerSpec(name, a.in_features, out_features), base)]
    return []
