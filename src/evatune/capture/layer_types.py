"""The kinds of layer an adapter can sit on, in one table: how wide each is, and what its rows are.

| kind | its rows |
|---|---|
| linear layers, GPT-2's Conv1D, quantised linears | the vectors of the input |
| convolutions | the patches that the kernel is laid on, (channels · kernel) numbers each |
| embeddings | one-hot vectors of the tokens, of which only the counts are kept |
| nn.MultiheadAttention | what `in_proj` is multiplied with, and what `out_proj` is |
| a parameter of its own, such as the fused weights of experts | what it, or each expert, is
multiplied with |

A new kind is one entry of `LAYER_TYPES`, and a view if its rows are none of these.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from evatune.capture.row_selection import RowSelector
from evatune.layers import LayerSpec
from evatune.modeling.sharding import whole_shape

# Patches overlap: all of an image's at once take up to Π kernel / Π stride times the memory of the
# image.
_PIECE_BYTES = 16 << 20


Piece = tuple[Tensor, Tensor | None]  # rows, and which of them to take (None: all)


@dataclass(frozen=True)
class DenseRows:
    """The last dimension of the input is a row."""

    def whole(self, x: Tensor) -> Tensor:
        """What a `rows` function is handed."""
        return x

    def places(self, x: Tensor) -> torch.Size | None:
        """The leading dimensions of an activation, by which a mask knows its rows; None where no
        mask of tokens can."""
        return x.shape[:-1]

    def pieces(self, x: Tensor, selector: RowSelector) -> Iterator[Piece]:
        """The rows of one activation that count, in pieces of bounded size where they are not there
        already."""
        yield selector.rows(x)


@dataclass(frozen=True)
class OneHotRows(DenseRows):
    """The input holds token ids, and a row is the one-hot vector of a token."""

    padding: int | None = None  # a token whose embedding is never trained, and which is left out

    def places(self, x: Tensor) -> torch.Size:
        return x.shape

    def pieces(self, x: Tensor, selector: RowSelector) -> Iterator[Piece]:
        flat, index = x.flatten(), selector.chosen(x.shape)
        flat = flat if index is None else flat[index.to(x.device)]
        yield flat if self.padding is None else flat[flat != self.padding], None


@dataclass(frozen=True)
class ConvPatches(DenseRows):
    """A row is what a convolution's kernel covers at one position, ordered as its weight: channel,
    then kernel.

    Attributes:
        kernel, stride, dilation: per spatial dimension. padding: (before, after) per spatial
            dimension.
        mode: how the padding is filled, in the words of `torch.nn.functional.pad`.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    mode: str

    @classmethod
    def of(cls, conv: nn.Module) -> ConvPatches:
        """Those of an `nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d`."""
        kernel: Any = conv.kernel_size
        dilation: Any = conv.dilation
        padding: Any = conv.padding
        if isinstance(padding, str):
            spare = [0] * len(kernel)
            if padding == "same":
                spare = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
            # of an odd number, the end gets the larger half
            sides = tuple((n // 2, n - n // 2) for n in spare)
        else:
            sides = tuple((n, n) for n in padding)
        mode = "constant" if conv.padding_mode == "zeros" else str(conv.padding_mode)
        stride: Any = conv.stride
        return cls(kernel, stride, sides, dilation, mode)

    def whole(self, x: Tensor) -> Tensor:
        """(batch, positions, channels · kernel), a copy."""
        windows = self._windows(x)
        return windows.reshape(len(windows), -1, self._width(windows))

    def pieces(self, x: Tensor, selector: RowSelector) -> Iterator[Piece]:
        windows = self._windows(x)
        samples, lines = windows.shape[:2]
        places = self.places(x)
        index = None if places is None else selector.chosen(places)
        index = None if index is None else index.to(x.device)
        line = windows[:1, :1].numel()
        # lines of positions per piece
        fit = max(1, _PIECE_BYTES // max(1, line * x.element_size()))
        some, sublayer = max(1, fit // max(1, lines)), min(fit, max(1, lines))
        # once even for no rows, so that a digest has its shapes
        for sample in range(0, max(1, samples), some):
            for first in range(0, max(1, lines), sublayer):
                piece = windows[sample : sample + some, first : first + sublayer]
                flat = piece.reshape(-1, self._width(windows))
                if index is None:
                    yield flat, None
                else:
                    start = sample * lines + first
                    yield flat, index[(index >= start) & (index < start + len(flat))] - start

    def places(self, x: Tensor) -> torch.Size | None:
        """A mask of tokens speaks about a sequence, and about the patch at a token's own
        position."""
        if len(self.kernel) != 1:
            return None
        span = self.dilation[0] * (self.kernel[0] - 1) + 1
        lines = (x.shape[-1] + sum(self.padding[0]) - span) // self.stride[0] + 1
        return torch.Size([1 if x.ndim == 2 else len(x), lines])

    def _windows(self, x: Tensor) -> Tensor:
        """(batch, positions…, channels, kernel…), a view of the padded input."""
        n = len(self.kernel)
        x = x[None] if x.ndim == n + 1 else x
        if any(before or after for before, after in self.padding):
            x = nn.functional.pad(
                x, [side for both in reversed(self.padding) for side in both], mode=self.mode
            )
        for dim in range(n):
            span = self.dilation[dim] * (self.kernel[dim] - 1) + 1
            x = x.unfold(2 + dim, span, self.stride[dim])[..., :: self.dilation[dim]]
        return x.permute(0, *range(2, 2 + n), 1, *range(2 + n, 2 + 2 * n))

    def _width(self, windows: Tensor) -> int:
        return math.prod(windows.shape[1 + len(self.kernel) :])


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
    input_view: DenseRows = DenseRows()
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


@dataclass(frozen=True)
class LayerType:
    """A type of layer that can be calibrated.

    Attributes:
        name: in messages.
        matches: tells a module of this type.
        target_layers: from the name and the module to what is watched of it.
        is_linear: whether the target "all-linear" includes it.
    """

    name: str
    matches: Callable[[nn.Module], bool]
    target_layers: Callable[[str, nn.Module], list[TargetLayer]]
    is_linear: bool = False


def layer_type_of(module: nn.Module) -> LayerType | None:
    """Return the type of a layer; None where it is of no type that is supported."""
    return next((one for one in LAYER_TYPES if one.matches(module)), None)


def target_layers_of(name: str, module: nn.Module) -> list[TargetLayer]:
    """Return what is watched of a layer; nothing where its type is not supported."""
    layer_type = layer_type_of(module)
    return [] if layer_type is None else layer_type.target_layers(name, module)


def is_linear(module: nn.Module) -> bool:
    """Return whether "all-linear" includes this layer."""
    layer_type = layer_type_of(module)
    return layer_type is not None and layer_type.is_linear


def sequences_of(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[[Tensor], Tensor]:
    """What puts the rows that a parameter of `module` is multiplied with into (batch, tokens, d),
    where they can be.

    `nn.MultiheadAttention` has them one after another with time first, whatever it is called with.
    """
    if not isinstance(module, nn.MultiheadAttention):
        return lambda rows: rows
    query = args[0] if args else kwargs["query"]
    batch = 1 if query.ndim == 2 else query.shape[0 if module.batch_first else 1]
    return lambda rows: rows.reshape(-1, batch, rows.shape[-1]).transpose(0, 1)


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
        "nn.MultiheadAttention with query, key and value of one width", _is_attention, _attention
    ),
]
