"""The types of layer that an adapter can sit on, in one registry: sizes, and how rows are read.

| type | its rows |
|---|---|
| linear layers, GPT-2's Conv1D, quantized linears | the vectors of the input |
| convolutions | the patches that the kernel is laid on, (channels · kernel) numbers each |
| embeddings | one-hot vectors of the tokens, of which only the counts are kept |
| nn.MultiheadAttention | what `in_proj` is multiplied with, and what `out_proj` is |
| a parameter that no layer is called for, such as the stacked weights of experts | what it, or each
expert's slice, is multiplied with |

A new type is one entry of `LAYER_TYPES`, and an input view if its rows are none of these.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from evatune.capture.input_views import ConvPatches, DenseRows, OneHotRows
from evatune.errors import TargetError
from evatune.layers import LayerSpec
from evatune.modeling.sharding import whole_shape

# from (n, d), the rows of a product, to (batch, tokens, d) where they can be told apart
AsSequences = Callable[[Tensor], Tensor]
_LEAVE_OUT = "leave it out of the targets, or with exclude_modules in the LoraConfig"


@dataclass(frozen=True)
class TargetLayer:
    """Something with rows and directions of its own: a layer, or one part of it.

    Attributes:
        module: the plain layer, inside its wrapper if it has one.
        input_view: how its input is read as rows.
        parameter: what is watched are the products with this parameter of the module; empty: the
            module's input is.
        expert: the slice of the parameter, where it stacks the weights of experts.
    """

    spec: LayerSpec
    module: nn.Module
    input_view: DenseRows = field(default_factory=DenseRows)
    parameter: str = ""
    expert: int | None = None

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def in_features(self) -> int:
        return self.spec.in_features

    @property
    def out_features(self) -> int:
        return self.spec.out_features

    def renamed(self, name: str) -> TargetLayer:
        """Return the same layer under another name, as a layer that stands alone."""
        return replace(self, spec=replace(self.spec, name=name, rank_group=""))

    def require_readable(self, x: Tensor) -> None:
        """Raise a TargetError for an input that this layer's view does not read as rows."""
        kind = type(self.module).__name__
        if x.is_nested or x.layout != torch.strided or x.is_complex():
            form = "a nested tensor" if x.is_nested else f"a {x.layout} tensor of {x.dtype}"
            raise TargetError(
                f"{self.name} ({kind}) is called with {form}, and rows of real numbers in a dense"
                f" tensor are needed; {_LEAVE_OUT}"
            )
        if not self.input_view.accepts(x):
            raise TargetError(
                f"{self.name} is an embedding ({kind}) that is called with {x.dtype} numbers and"
                f" not with token ids; {_LEAVE_OUT}"
            )


def first_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return the input of a layer's call: the first argument that is a tensor, or None."""
    tensors = (x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
    return next(tensors, None)


def _as_they_are(rows: Tensor) -> Tensor:
    return rows


def _any_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> AsSequences:
    return _as_they_are


@dataclass(frozen=True)
class LayerType:
    """A type of layer that can be calibrated.

    Attributes:
        name: in messages.
        matches: tells a module of this type.
        target_layers: from the name and the module to what is watched of it.
        is_linear: whether the target "all-linear" includes it.
        sequences: of a type whose parameters are watched: from a call's arguments to how the rows
            that they are multiplied with become (batch, tokens, d).
    """

    name: str
    matches: Callable[[nn.Module], bool]
    target_layers: Callable[[str, nn.Module], list[TargetLayer]]
    is_linear: bool = False
    sequences: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], AsSequences] = _any_call


def layer_type_of(module: nn.Module) -> LayerType | None:
    """Return the type of a layer; None where it is of no type that is supported."""
    return next((kind for kind in LAYER_TYPES if kind.matches(module)), None)


def target_layers_of(name: str, module: nn.Module) -> list[TargetLayer]:
    """Return what is watched of a layer; nothing where its type is not supported."""
    layer_type = layer_type_of(module)
    return [] if layer_type is None else layer_type.target_layers(name, module)


def is_linear(module: nn.Module) -> bool:
    """Return whether "all-linear" includes this layer."""
    layer_type = layer_type_of(module)
    return layer_type is not None and layer_type.is_linear


def sequences_of(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> AsSequences:
    """Return how the rows of products in one call of a module are laid out as sequences."""
    layer_type = layer_type_of(module)
    if layer_type is None:
        return _as_they_are
    return layer_type.sequences(module, args, kwargs)


def parameter_target_layers(name: str, module: nn.Module) -> list[TargetLayer]:
    """Return what is watched of a weight that a module holds and multiplies with itself.

    Args:
        name: of the weight, in the base model. It is of (out, in), or of one such slice per expert.
    """
    parameter = name.rpartition(".")[2]
    shape = whole_shape(module.get_parameter(parameter))
    if len(shape) == 2:
        return [TargetLayer(LayerSpec(name, shape[1], shape[0]), module, parameter=parameter)]
    count, out_features, in_features = shape
    # As PEFT reads it: slices are (out, in), unless the module says that they are transposed.
    if getattr(module, "is_transposed", False):
        in_features, out_features = out_features, in_features
    return [
        TargetLayer(
            LayerSpec(f"{name}.{expert}", in_features, out_features, rank_group=name),
            module,
            parameter=parameter,
            expert=expert,
        )
        for expert in range(count)
    ]


def conv_target_layer(name: str, conv: nn.Module, input_view: ConvPatches) -> TargetLayer:
    """Return what is watched of a convolution.

    PEFT's A takes all channels, also where the convolution has groups: B has the groups instead.
    """
    channels: Any = conv.in_channels
    out_channels: Any = conv.out_channels
    groups: Any = conv.groups
    width = channels * math.prod(input_view.kernel)
    return TargetLayer(LayerSpec(name, width, out_channels, groups), conv, input_view)


def _conv(name: str, module: nn.Module) -> list[TargetLayer]:
    return [conv_target_layer(name, module, ConvPatches.of(module))]


def _embedding(name: str, module: nn.Module) -> list[TargetLayer]:
    assert isinstance(module, nn.Embedding)
    spec = LayerSpec(name, module.num_embeddings, module.embedding_dim)
    return [TargetLayer(spec, module, OneHotRows(module.padding_idx))]


def _attention(name: str, module: nn.Module) -> list[TargetLayer]:
    width: Any = module.embed_dim
    projections = LayerSpec(name, width, 3 * width)
    output = LayerSpec(f"{name}.out_proj", width, width, rank_group=name)
    return [
        TargetLayer(projections, module, parameter="in_proj_weight"),
        TargetLayer(output, module, parameter="out_proj.weight"),
    ]


def _attention_sequences(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> AsSequences:
    """Put the batch first: inside, time is, whatever the module is called with."""
    query = args[0] if args else kwargs["query"]
    batch_dim = 0 if module.batch_first else 1
    batch = 1 if query.ndim == 2 else query.shape[batch_dim]

    def with_batch_first(rows: Tensor) -> Tensor:
        length = rows.shape[:-1].numel() // max(1, batch)
        return rows.reshape(length, batch, rows.shape[-1]).transpose(0, 1)

    return with_batch_first


def _linear(name: str, module: nn.Module) -> list[TargetLayer]:
    sizes = _linear_sizes(module)
    assert sizes is not None
    return [TargetLayer(LayerSpec(name, *sizes), module)]


def _linear_sizes(module: nn.Module) -> tuple[int, int] | None:
    """Return (in, out) of linear layers of every make, whatever the shape of their storage."""
    # By name, as the core does not import transformers, whose Conv1D is a Linear with its weight
    # transposed.
    class_name = type(module).__name__
    if not isinstance(module, nn.Linear) and "Linear" not in class_name and class_name != "Conv1D":
        return None
    # The second: GPTQ's layers. The third: Conv1D's.
    for names in (("in_features", "out_features"), ("infeatures", "outfeatures"), ("nx", "nf")):
        sizes: list[Any] = [getattr(module, name, None) for name in names]
        if all(isinstance(size, int) for size in sizes):
            return sizes[0], sizes[1]
    return None


def _is_linear(module: nn.Module) -> bool:
    return _linear_sizes(module) is not None


def _is_conv(module: nn.Module) -> bool:
    # Subclasses such as transposed convolutions do not derive from these.
    return isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))


def _is_embedding(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding)


def _is_attention(module: nn.Module) -> bool:
    return isinstance(module, nn.MultiheadAttention) and module._qkv_same_embed_dim


# The registry. The first type that matches a module is its type.
LAYER_TYPES: list[LayerType] = [
    LayerType(
        "linear layers (quantized ones and GPT-2's Conv1D too)", _is_linear, _linear, is_linear=True
    ),
    LayerType("convolutions", _is_conv, _conv),
    LayerType("nn.Embedding", _is_embedding, _embedding),
    LayerType(
        "nn.MultiheadAttention with query, key and value of one width",
        _is_attention,
        _attention,
        sequences=_attention_sequences,
    ),
]
