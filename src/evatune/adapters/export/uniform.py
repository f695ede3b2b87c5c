"""The format "uniform": one rank and one α for all layers, and the same update of the weights.

Most runtimes know one α and one rank. vLLM (before it read patterns) and SGLang take
`lora_alpha / r` of the config and do not read, or refuse, `rank_pattern` and `alpha_pattern`;
llama.cpp takes `lora_alpha / (rank of the layer's matrices)`; Axolotl's merge refuses patterns even
if empty. With one rank R for all layers, one α and neither pattern nor rsLoRA these are all the
same.
"""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from evatune.adapters.adapter import lora_config
from evatune.adapters.export.files import read_adapter_weights, write_card, write_record
from evatune.adapters.export.request import Exported, ExportRequest
from evatune.adapters.saved import (
    layer_names,
    layer_scale,
    read_config,
    require_quick_patterns,
    require_ranks,
)
from evatune.adapters.variants import PLAIN_STARTS
from evatune.errors import AdapterError, RecordError
from evatune.layers import PEFT_PREFIX
from evatune.utils.markup import markdown_code
from evatune.utils.names import short_name
from evatune.utils.outputs import claimed_folder, require_apart

# "….lora_A.weight" or "….lora_embedding_A"; the rank is the first dimension of A, the second of B.
_KEY = re.compile(r"(?P<layer>.+)\.lora_(?:(?P<part>[AB])\.weight|embedding_(?P<table>[AB]))")

# Each adds something to s·BAx, or changes what A, B or the layers mean.
_VARIANTS = (
    "use_dora",
    "lora_bias",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "monteclora_config",
    "target_parameters",
    "layer_replication",
)

_MOST_GROWTH = 64  # evatune's own adapters grow by rho


@dataclass(frozen=True)
class Uniform:
    """The result of `export_uniform`."""

    rank: int
    alpha: float
    layers: int  # with an adapter
    zeros: tuple[str, ...]  # layers that got an adapter of zeros
    rescaled: tuple[str, ...]  # layers whose scale was another one, and is folded into B


def write(request: ExportRequest) -> Exported:
    """Write the adapter at one rank and one scale."""
    uniform = export_uniform(request.adapter, request.out, overwrite=request.overwrite)
    summary = f"rank {uniform.rank}, alpha {uniform.alpha:g}, {uniform.layers} layers"
    if uniform.zeros:
        summary += f", {len(uniform.zeros)} filled with zeros beside their neighbors"
    if uniform.rescaled:
        summary += f", {len(uniform.rescaled)} with their scale in B"
    return Exported(summary, asdict(uniform))


def export_uniform(
    adapter: str | Path | PeftModel,
    out: str | Path,
    *,
    adapter_name: str = "default",
    overwrite: bool = False,
) -> Uniform:
    """Write the same LoRA adapter with one rank and one α, for servers without rank patterns.

    A gets rows of zeros and B columns of zeros up to the largest rank R. α/R is the scale of most
    layers; where a layer's is another, the quotient goes into B, which is then float32. rsLoRA
    becomes plain α/R. Where a layer has no adapter but its neighbors do (q_proj beside k_proj and
    v_proj) and the same layer of another block has one, it gets zeros: SGLang stacks neighbors and
    needs all of them. A folder does not tell whether a block has that layer at all, a `PeftModel`
    does. `modules_to_save` and other trained tensors stay as they are.

    Args:
        adapter: a folder that `save_pretrained` wrote, or a `PeftModel`.
        out: folder to write; it is whole or absent.
        adapter_name: which adapter of a `PeftModel`.
        overwrite: replace an `out` that evatune wrote.

    Raises:
        AdapterError: DoRA or another variant that servers do not have; an initialization that
            changed the base weights.
        RecordError: a damaged folder, or an adapter that is not LoRA. ConfigError: `out` cannot be
            written.
    """
    require_apart(out, adapter=None if isinstance(adapter, PeftModel) else adapter)
    with claimed_folder(out, overwrite) as output:
        state, config = _read(adapter, adapter_name)
        modules = None if isinstance(adapter, (str, Path)) else set(dict(adapter.named_modules()))
        state, uniform = _pad(state, config, modules)
        with output.whole() as folder:
            _write(folder, state, config, uniform)
    return uniform


def _read(
    adapter: str | Path | PeftModel, adapter_name: str
) -> tuple[dict[str, Tensor], LoraConfig]:
    """Return matrices and config of a plain LoRA adapter."""
    if isinstance(adapter, (str, Path)):
        config = read_config(Path(adapter))
        _require_plain(config)
        state = read_adapter_weights(Path(adapter))
        require_quick_patterns(Path(adapter), config, layer_names(state))
        require_ranks(Path(adapter) / SAFETENSORS_WEIGHTS_NAME, state, config)
    else:
        config = lora_config(adapter, adapter_name)
        _require_plain(config)
        with warnings.catch_warnings():  # that it adds embeddings which the adapter targets
            warnings.filterwarnings(
                "ignore", message="Setting `save_embedding_layers`", category=UserWarning
            )
            state = get_peft_model_state_dict(adapter, adapter_name=adapter_name)
    return state, config


def _write(folder: Path, state: dict[str, Tensor], config: LoraConfig, uniform: Uniform) -> None:
    save_file(state, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    _write_config(folder, config, uniform, _layers(state))
    base = config.base_model_name_or_path
    name = markdown_code(short_name(base or "its base model"))
    about = (
        f"LoRA adapter for {name}: rank {uniform.rank} and scale {uniform.alpha:g}/{uniform.rank}"
        " in every layer. Exported by evatune from an adapter whose ranks may differ; the update"
        " of the weights is the same.\n\n"
        f"vLLM needs a `--max-lora-rank` of at least {uniform.rank}."
    )
    write_card(folder, about, base, library="peft")
    write_record(folder, {"format": "uniform", "rank": uniform.rank, "alpha": uniform.alpha})


def _require_plain(config: LoraConfig) -> None:
    variants = [name for name in _VARIANTS if getattr(config, name, None)]
    if variants:
        raise AdapterError(
            f"the adapter is more than s·BAx ({variants[0]} is set), which servers do not compute;"
            " merge it into the base model instead: --format merged"
        )
    start = config.init_lora_weights
    if start not in (*PLAIN_STARTS, "mica"):
        raise AdapterError(
            f"the adapter was initialized with {start!r}, which changes the base weights, so it"
            " does not fit the original ones; save it with"
            " path_initial_model_for_weight_conversion first"
        )


def _layers(state: dict[str, Tensor]) -> list[str]:
    """Return the names of the layers that have matrices, without PEFT's prefix, in order."""
    names = (match["layer"].removeprefix(PEFT_PREFIX) for _, match in _lora_keys(state))
    return list(dict.fromkeys(names))


def _lora_keys(state: dict[str, Tensor]) -> Iterator[tuple[str, re.Match[str]]]:
    """Yield the keys of A and B, and their match with _KEY."""
    for key in state:
        match = _KEY.fullmatch(key)
        if match is not None:
            yield key, match


def _pad(
    state: dict[str, Tensor], config: LoraConfig, modules: set[str] | None
) -> tuple[dict[str, Tensor], Uniform]:
    """Return the same adapter at one rank and one scale.

    Args:
        modules: names of those that the model has; None where it is not known.
    """
    ranks = _ranks(state)
    scales = {
        layer: layer_scale(config, layer.removeprefix(PEFT_PREFIX), rank)[1]
        for layer, rank in ranks.items()
    }
    r = max(ranks.values())
    _require_moderate(state, r)
    most_common_scale, _ = Counter(scales.values()).most_common(1)[0]
    alpha = _rounded(r * most_common_scale)
    quotients = {layer: scale / (alpha / r) for layer, scale in scales.items()}
    rescaled = [layer for layer, quotient in quotients.items() if abs(quotient - 1) > 1e-12]

    matches = dict(_lora_keys(state))
    padded = {}
    for key, value in state.items():
        if key in matches:
            layer, dim = matches[key]["layer"], _rank_dimension(matches[key])
            if dim == 1 and layer in rescaled:
                # in 16 bits it would no longer be the same
                value = (value.double() * quotients[layer]).float()
            value = _zero_padded(value, r, dim)
        padded[key] = value.detach().cpu().contiguous()
    zeros = {
        key: value
        for key, value in _zeros_for_neighbors(padded).items()
        if modules is None or key.partition(".lora_")[0] in modules
    }
    return padded | zeros, Uniform(
        rank=r,
        alpha=alpha,
        layers=len(ranks),
        zeros=tuple(_layers(zeros)),
        rescaled=tuple(layer.removeprefix(PEFT_PREFIX) for layer in rescaled),
    )


def _ranks(state: dict[str, Tensor]) -> dict[str, int]:
    """Return the rank of each layer, and raise for what is not a pair of plain LoRA matrices."""
    matches = dict(_lora_keys(state))
    for key in state:
        if ".lora_" in key and key not in matches:
            raise AdapterError(
                f"{key} belongs to no plain LoRA layer; merge the adapter instead: --format merged"
            )
    ranks: dict[str, int] = {}
    for key, match in matches.items():
        layer, value = match["layer"], state[key]
        rank = value.shape[_rank_dimension(match)] if value.ndim > 1 else 0
        _require_served(match, value.ndim, rank, ranks.get(layer, rank))
        if not rank or ranks.setdefault(layer, rank) != rank:
            raise RecordError(
                f"the matrices of {layer} do not fit each other; save the adapter again"
            )
    counts = Counter(match["layer"] for match in matches.values())
    incomplete = [layer for layer, count in counts.items() if count != 2]
    if not ranks or incomplete:
        lacking = incomplete[0] if incomplete else "every layer"
        raise RecordError(f"the adapter lacks A or B of {lacking}; save it again")
    return ranks


def _require_served(match: re.Match[str], dimensions: int, rank: int, rank_of_a: int) -> None:
    """Raise an AdapterError for a matrix of a layer whose adapter no server reads."""
    if match["part"] == "B" and dimensions > 2 and rank < rank_of_a:
        kind = "a convolution with groups"
    elif ".base_layer" in match["layer"]:
        kind = "a projection of nn.MultiheadAttention"
    else:
        return
    raise AdapterError(
        f"{match['layer'].removeprefix(PEFT_PREFIX)} is {kind}, whose adapter no server reads;"
        " serve it with PEFT, or leave such layers out of the targets"
    )


def _require_moderate(state: dict[str, Tensor], r: int) -> None:
    """Raise a RecordError where one layer's rank would make the adapter many times as large."""
    size = padded_size = 0
    for key, match in _lora_keys(state):
        value = state[key]
        size += value.numel()
        padded_size += value.numel() // value.shape[_rank_dimension(match)] * r
    times = padded_size / size
    if times > _MOST_GROWTH:
        raise RecordError(
            f"at rank {r}, its largest, the adapter would be {times:.0f} times as large, and "
            f"{_MOST_GROWTH} times is the most; save it again if that rank is wrong, or merge it: "
            "--format merged"
        )


def _rank_dimension(match: re.Match[str]) -> int:
    return 0 if "A" in (match["part"], match["table"]) else 1


def _zero_padded(matrix: Tensor, size: int, dim: int) -> Tensor:
    """Return the matrix with zeros appended along `dim` up to `size`."""
    shape = list(matrix.shape)
    shape[dim] = size - shape[dim]
    return torch.cat([matrix, matrix.new_zeros(shape)], dim)


def _zeros_for_neighbors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return zeros for layers without an adapter whose neighbors have one, as other blocks show.

    Neighbors are children of one module; the same module of another block differs in numbers only.
    Where shapes vary from block to block, nothing tells what is right here, and nothing is added.
    """
    # "….layers.*.self_attn" → the modules of that name which have an adapter
    parents: dict[str, set[str]] = {}
    # the same → what follows the module's name in keys → its tensors
    children: dict[str, dict[str, list[Tensor]]] = {}
    for key, match in _lora_keys(state):
        parent = match["layer"].rpartition(".")[0]
        pattern = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", parent)
        parents.setdefault(pattern, set()).add(parent)
        ends = children.setdefault(pattern, {})
        ends.setdefault(key.removeprefix(parent), []).append(state[key])
    zeros: dict[str, Tensor] = {}
    for pattern, ends in children.items():
        uniform = {end: tensors[0] for end, tensors in ends.items() if _have_one_shape(tensors)}
        for parent in sorted(parents[pattern]):
            for end, like in uniform.items():
                if parent + end not in state:
                    zeros[parent + end] = torch.zeros_like(like)
    return zeros


def _have_one_shape(tensors: list[Tensor]) -> bool:
    return len({tensor.shape for tensor in tensors}) == 1


def _write_config(folder: Path, config: LoraConfig, uniform: Uniform, layers: list[str]) -> None:
    plain = copy.copy(config)
    plain.r, plain.lora_alpha = uniform.rank, uniform.alpha
    plain.use_rslora, plain.init_lora_weights, plain.eva_config = False, True, None
    # Whole names: a server reads their endings, and PEFT touches no layer that has no matrices
    # here.
    plain.target_modules = layers
    plain.exclude_modules = plain.layers_to_transform = plain.layers_pattern = None
    plain.inference_mode = True
    plain.save_pretrained(folder)
    path = folder / CONFIG_NAME
    facts = json.loads(path.read_text(encoding="utf-8"))
    # Axolotl refuses to merge where the names occur at all
    del facts["rank_pattern"], facts["alpha_pattern"]
    path.write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _rounded(value: float) -> float:
    """Return a whole number as one, up to the rounding of a quotient and a product."""
    whole = round(value)
    is_whole = abs(value - whole) < 1e-9 * max(1.0, abs(value))
    return whole if whole and is_whole else value
