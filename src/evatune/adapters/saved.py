"""A saved LoRA adapter, read without its model."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evatune.errors import RecordError
from evatune.layers import PEFT_PREFIX
from evatune.scaling import lora_scale
from evatune.schemas import FormatError, raise_with_path, short_repr
from evatune.utils.names import ADAPTER_CONFIG
from evatune.utils.text import one_line

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import Tensor

_MAX_NAME = 1024  # characters
# Of embeddings, A and B are parameters and not layers.
_PAIRS = {".lora_A.weight": ".lora_B.weight", ".lora_embedding_A": ".lora_embedding_B"}


@dataclass(frozen=True)
class AdapterRow:
    """A layer of a saved adapter.

    Attributes:
        layer: its name in the base model.
        scale: the factor of BA.
        parameters: how many A and B hold together.
        a_row_norm: mean length of the rows of A. b_norm: of B as a whole.
    """

    layer: str
    rank: int
    alpha: float
    scale: float
    parameters: int
    a_row_norm: float
    b_norm: float


def is_adapter(file: Path) -> bool:
    """Return whether this is a safetensors file with LoRA matrices in it."""
    from evatune.schemas.tensors import read_header

    try:
        return any(name.endswith(tuple(_PAIRS)) for name in read_header(file).shapes)
    except FormatError:
        return False


def adapter_rows(weights: Path) -> list[AdapterRow]:
    """Return the layers of a saved adapter.

    Raises RecordError for a damaged file, a damaged or absent config beside it, or an adapter that
    is not LoRA.
    """
    config = read_config(weights.parent)
    state = read_weights(weights)
    require_quick_patterns(weights.parent, config, layer_names(state))
    require_ranks(weights, state, config)
    rows = _rows(state, config)
    if not rows:
        raise RecordError(
            f"{str(weights)!r} holds no LoRA matrices; give a file that PEFT's save_pretrained"
            " wrote"
        )
    return rows


def read_config(folder: Path) -> LoraConfig:
    """Return the config of a saved LoRA adapter.

    Raises RecordError for a folder without one, or with one of another kind.
    """
    from peft import LoraConfig

    from evatune.schemas.adapter import require_lora
    from evatune.schemas.text import parse_json, read_text

    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        raise RecordError(
            f"{str(path)!r} does not exist, which says what the adapter's scale is; put it beside"
            " the weights"
        )
    with raise_with_path(path, "save the adapter again, or put its config back"):
        fields = parse_json(read_text(path))
        if not isinstance(fields, dict):
            raise FormatError("is damaged: it does not hold keys with values")
        kind = fields.get("peft_type")
        if kind != "LORA":
            raise RecordError(
                f"{str(folder)!r} holds an adapter of type {short_repr(kind)}; only LoRA is read"
            )
        fields.pop("runtime_config", None)  # which PEFT does not take from files either
        require_lora(fields)
        _require_known_keys(fields)
        try:
            config: LoraConfig = LoraConfig.from_peft_type(**fields)
        except (TypeError, ValueError, AttributeError, KeyError, ImportError) as error:
            raise FormatError(f"is damaged ({type(error).__name__}: {one_line(error)})") from error
    config.rank_pattern = config.rank_pattern or {}
    config.alpha_pattern = config.alpha_pattern or {}
    return config


def _require_known_keys(fields: Mapping[str, Any]) -> None:
    """Raise FormatError for keys that PEFT does not have, unless a newer one wrote them.

    Of those it warns itself.
    """
    import peft
    from packaging.version import InvalidVersion, Version

    unknown = sorted(fields.keys() - {field.name for field in dataclasses.fields(peft.LoraConfig)})
    try:
        is_newer = Version(fields.get("peft_version") or "") > Version(peft.__version__)
    except (InvalidVersion, TypeError):
        is_newer = "peft_version" not in fields  # PEFT did not write it at first
    if unknown and not is_newer:
        raise FormatError(f"holds the key {short_repr(unknown[0])}, which LoraConfig does not have")


def require_ranks(weights: Path, state: Mapping[str, Tensor], config: LoraConfig) -> None:
    """Raise a RecordError where the config gives a layer another rank than its matrices have.

    Stacked experts and the parts of nn.MultiheadAttention, which hang in each other's wrappers, are
    left to PEFT.
    """
    from peft.utils.other import get_pattern_key

    if config.target_parameters:
        return
    pattern = config.rank_pattern
    for key, tensor in state.items():
        end = _end_of_a(key)
        if end is None or ".base_layer" in key:
            continue
        layer = _path(key, end)
        rank = pattern.get(get_pattern_key(pattern.keys(), layer), config.r)
        if rank != len(tensor):
            raise RecordError(
                f"{str(weights)!r} holds matrices of rank {len(tensor)} for {short_repr(layer)},"
                f" and adapter_config.json beside it says {rank}; put the two files of one adapter "
                "together, or save it again"
            )


def require_quick_patterns(folder: Path, config: LoraConfig, names: Iterable[str]) -> None:
    """Raise a RecordError for patterns in a saved config that run for too long on these names."""
    from evatune.schemas.adapter import require_quick

    with raise_with_path(folder / ADAPTER_CONFIG, "write the names of the layers there"):
        require_quick(vars(config), names)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a saved adapter, each of its LoRA matrices with the one it belongs to.

    Raises RecordError for a damaged file.
    """
    from evatune.schemas.tensors import read_tensors

    with raise_with_path(path, "save the adapter again"):
        state = read_tensors(path)
        for name, tensor in state.items():
            _require_matrix(name, tensor, state)
    return state


def _require_matrix(name: str, tensor: Tensor, state: Mapping[str, Tensor]) -> None:
    if len(name) > _MAX_NAME:
        raise FormatError(f"names a tensor in {len(name)} characters, and {_MAX_NAME} are the most")
    if ".lora_" in name and not (tensor.numel() and tensor.is_floating_point()):
        raise FormatError(f"is damaged: {short_repr(name)} holds no numbers")
    end = _end_of_a(name)
    if end is None:
        return
    layer = name.removesuffix(end)
    other = state.get(layer + _PAIRS[end])
    if other is None:
        raise FormatError(f"lacks A or B of {short_repr(layer)}")
    # B of a convolution with groups has a part of the ranks, of one group.
    if min(tensor.ndim, other.ndim) < 2 or len(tensor) % other.shape[1]:
        raise FormatError(f"is damaged: the matrices of {short_repr(layer)} do not fit each other")


def layer_names(state: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the adapted layers as PEFT's patterns are matched with them."""
    names = []
    for key in state:
        end = _end_of_a(key)
        if end is not None:
            names.append(_module_of(_path(key, end)))
    return names


def _path(key: str, end: str) -> str:
    """Return where an adapter's matrix is in the model, wrappers and all."""
    return key.removeprefix(PEFT_PREFIX).removesuffix(end)


def _module_of(path: str) -> str:
    """Return the module of the base model, which may have several wrappers, one in another.

    Attention's output projection, or one of several stacked weights, hangs in the wrapper of its
    layer.
    """
    return path.partition(".base_layer")[0]


def _end_of_a(key: str) -> str | None:
    """Return how the name of a matrix A ends; None for any other tensor."""
    return next((end for end in _PAIRS if key.endswith(end)), None)


def layer_scale(config: LoraConfig, layer: str, rank: int) -> tuple[float, float]:
    """Return (α, scale) of a layer, by its name without PEFT's prefix and its rank."""
    from peft.utils.other import get_pattern_key

    alpha = config.alpha_pattern.get(
        get_pattern_key(config.alpha_pattern.keys(), layer), config.lora_alpha
    )
    return alpha, lora_scale(alpha, rank, config.use_rslora)


def _rows(state: Mapping[str, Tensor], config: LoraConfig) -> list[AdapterRow]:
    rows = []
    pairs = [(key, end) for key in state for end in _PAIRS if key.endswith(end)]
    heights: Counter[str] = Counter()
    for key, end in pairs:
        heights[_module_of(_path(key, end))] += len(state[key])
    stacked = {
        module: _StackedExperts.of(module, height, config) for module, height in heights.items()
    }
    for key, end in pairs:
        path = _path(key, end)
        module = _module_of(path)
        a, b = state[key].float(), state[key.removesuffix(end) + _PAIRS[end]].float()
        layer = path.replace(".base_layer", "")
        name, rank = module, len(a)
        parameter = stacked[module].parameter(len(a), path.count(".base_layer"))
        if parameter is not None:
            name, rank = parameter
            layer = name
        alpha, scale = layer_scale(config, name, rank)
        rows.append(
            AdapterRow(
                layer=layer,
                rank=rank,
                alpha=alpha,
                scale=scale,
                parameters=a.numel() + b.numel(),
                a_row_norm=float(a.flatten(1).norm(dim=1).mean()),
                b_norm=float(b.norm()),
            )
        )
    return rows


@dataclass(frozen=True)
class _StackedExperts:
    """The adapted parameters of one module in which the weights of its experts are stacked.

    A has the experts' rows one after another: of `experts.gate_up_proj` with 8 experts at rank 4
    it has 32 rows. The file does not say how many experts there are. The ranks in the config do,
    since all parameters of a module have equally many: 64 rows at ranks 4 and 4 are 8 experts.

    Attributes:
        ranks: parameter → rank, in the order of the config; empty for any other layer.
        experts: how many there are.
    """

    ranks: Mapping[str, int]
    experts: int

    @classmethod
    def of(cls, module: str, height: int, config: LoraConfig) -> _StackedExperts:
        """Return what the config says of a module, all of whose A have `height` rows together."""
        from peft.utils.other import get_pattern_key

        pattern, ranks = config.rank_pattern, {}
        for target in config.target_parameters or ():
            parent, _, key = target.rpartition(".")
            if not parent or f".{module}".endswith(f".{parent}"):
                name = f"{module}.{key}"
                ranks[name] = int(pattern.get(get_pattern_key(pattern.keys(), name), config.r))
        return cls(ranks, max(1, height // sum(ranks.values())) if ranks else 1)

    def parameter(self, height: int, depth: int) -> tuple[str, int] | None:
        """Return name and rank of the parameter whose A has `height` rows; None if there is none.

        Args:
            depth: how many wrappers are around it. Of equal ranks this decides, since evatune
                lists the parameters of a module from the outermost wrapper to the innermost.
        """
        names = list(self.ranks)
        for name in names[depth:] + names[:depth]:
            if self.ranks[name] * self.experts == height:
                return name, self.ranks[name]
        return None
