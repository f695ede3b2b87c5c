"""From an adapter whose ranks differ to what servers read: one rank for all layers, or no adapter
at all.

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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict
from safetensors.torch import save_file, storage_ptr
from torch import Tensor, nn

from evatune.adapters.initialize import lora_config
from evatune.adapters.saved import (
    layer_names,
    layer_scale,
    read_config,
    read_weights,
    require_quick_patterns,
    require_ranks,
)
from evatune.errors import AdapterError, RecordError
from evatune.finetune.methods import lora_layers
from evatune.utils.markup import markdown_code
from evatune.utils.outputs import claimed_folder, require_apart
from evatune.version import __version__

RECORD = "export.json"

_PREFIX = "base_model.model."
# "….lora_A.weight" or "….lora_embedding_A": the first dimension of A and the second of B is the
# rank.
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
# these leave the base weights alone
_STARTS = (True, False, "gaussian", "orthogonal", "mica", "eva")


@dataclass(frozen=True)
class Uniform:
    """What `export_uniform` wrote."""

    rank: int
    alpha: float
    layers: int  # with an adapter
    zeros: tuple[str, ...]  # layers that got an adapter of zeros
    rescaled: tuple[str, ...]  # layers whose scale was another one, and is folded into B


def export_uniform(
    adapter: str | Path | PeftModel,
    out: str | Path,
    *,
    adapter_name: str = "default",
    overwrite: bool = False,
) -> Uniform:
    """Write a LoRA adapter with one rank and one α that means exactly the same, for servers without
    rank patterns.

    A gets rows of zeros and B columns of zeros up to the largest rank R. α/R is the scale of most
    layers; where a layer's is another, the quotient goes into B, which is then float32. rsLoRA
    becomes plain α/R. Where a layer has no adapter but its neighbours do (q_proj beside k_proj and
    v_proj) and the same layer of another block has one, it gets zeros: SGLang stacks neighbours and
    needs all of them. `modules_to_save` and other trained tensors stay as they are.

    Args:
        adapter: a folder that `save_pretrained` wrote, or a `PeftModel`.
        out: folder to write; it is whole or absent.
        adapter_name: which adapter of a `PeftModel`.
        overwrite: replace an `out` that evatune wrote.

    Raises:
        AdapterError: DoRA or another variant that servers do not have; an initialisation that
            changed the base weights.
        RecordError: a damaged folder, or an adapter that is not LoRA. ConfigError: `out` cannot be
            written.
    """
    require_apart(out, adapter=None if isinstance(adapter, PeftModel) else adapter)
    with claimed_folder(out, overwrite) as output:
        state, config = _read(adapter, adapter_name)
        state, uniform = _pad(state, config)
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
        state = _read_weights(Path(adapter))
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
    about = (
        f"LoRA adapter for {markdown_code(base or 'its base model')}: rank {uniform.rank} and scale"
        f" {uniform.alpha:g}/{uniform.rank} in every layer. Exported by evatune from an adapter"
        " whose ranks may differ; the update of the weights is the same.\n\nvLLM needs a"
        f" `--max-lora-rank` of at least {uniform.rank}."
    )
    write_card(folder, about, base, library="peft")
    write_record(folder, {"format": "uniform", "rank": uniform.rank, "alpha": uniform.alpha})


def merge(base: nn.Module, adapter: str | Path) -> nn.Module:
    """The base model with a saved adapter added into its weights, in place; checked for NaN and Inf
    by PEFT.

    Weights that several layers share come apart where the adapter belongs to one of these layers
    only.

    Raises RecordError for an adapter that is damaged, not LoRA, or not of this base model;
    AdapterError where PEFT's sum is not what the adapter computes.
    """
    return _merged(_adapted(base, Path(adapter)), Path(adapter))


def write_merged(base: Any, adapter: Path, folder: Path, batch: dict[str, Tensor]) -> str | None:
    """Write a transformers model with a saved adapter added in, and compare what was written with
    it.

    Args:
        base: of no use afterwards.
        batch: keywords of the forward pass by which the two are compared.

    Returns:
        Why they could not be compared; None if they were.

    Raises:
        AdapterError: the model, loaded again, computes something else. All else as for `merge`.
    """
    model = _adapted(base, adapter)
    expected, unchecked = None, None
    try:
        expected = _output(model, batch)
    except Exception as error:  # whatever a model raises that wants more than tokens
        unchecked = f"{type(base).__name__} does not run on tokens alone: {_brief(error)}"
    merged: Any = _merged(model, adapter)
    try:
        merged.save_pretrained(folder)
        merged.to("meta")  # there need not be memory for two
        again, found = type(merged).from_pretrained(
            folder, dtype="auto", output_loading_info=True, trust_remote_code=False
        )
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        raise _another_model(f"cannot be saved and loaded ({_brief(error)})") from error
    lost = sorted({*found["missing_keys"], *found["mismatched_keys"]})
    if lost:
        raise _another_model(f"has no weights for {lost[0]} when it is loaded again")
    if expected is not None:
        off = float((_output(again.eval(), batch) - expected).norm() / expected.norm())
        allowed = torch.finfo(base.dtype).eps ** 0.5  # half of the digits, as sums in 16 bits need
        if not off <= allowed:
            raise _another_model(f"is off by {off:.1%} in its outputs, more than {allowed:.1%}")
    return unchecked


def _another_model(how: str) -> AdapterError:
    return AdapterError(
        f"the merged model {how}, so nothing was written; serve the adapter beside its base model"
    )


@torch.no_grad()
def _output(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The logits or hidden states of a transformers model, (…) float64."""
    found: Tensor = model(**batch)[0]
    return found.double()


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _adapted(base: nn.Module, adapter: Path) -> PeftModel:
    """The base model with the saved adapter beside its weights."""
    config = read_config(adapter)
    state = _read_weights(adapter)
    require_quick_patterns(adapter, config, [name for name, _ in base.named_modules()])
    with _refusing(base, adapter), warnings.catch_warnings():
        _extend(base, state)
        warnings.filterwarnings("error", ".*missing adapter keys", UserWarning)
        # Its advice is followed: weights that are tied come apart.
        warnings.filterwarnings("ignore", "Model (has|with) `tie_word_embeddings", UserWarning)
        # Whatever ranks the config names, memory goes to what the file holds; but PEFT would leave
        # copies of whole layers without values.
        model = PeftModel.from_pretrained(
            base,
            str(adapter),
            config=config,
            low_cpu_mem_usage=not config.layer_replication,
        )
        return model.eval()


def _extend(base: Any, state: Mapping[str, Tensor]) -> None:
    """Give a transformers model as many tokens as the embedding has that was saved beside the
    adapter."""
    if not hasattr(base, "get_input_embeddings"):
        return
    embedding = base.get_input_embeddings()
    name = next((name for name, module in base.named_modules() if module is embedding), None)
    saved = state.get(f"{_PREFIX}{name}.weight")
    if saved is None or saved.shape == embedding.weight.shape:
        return
    # else it is another model's, as PEFT will say
    if saved.shape[1:] == embedding.weight.shape[1:]:
        base.resize_token_embeddings(len(saved), mean_resizing=False)


def _merged(model: PeftModel, adapter: Path) -> nn.Module:
    """The base model inside with the adapter's updates in its weights."""
    _require_mergeable(model)
    base = model.get_base_model()
    tied = dict(getattr(base, "all_tied_weights_keys", None) or {})
    with _refusing(base, adapter), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Input and output embeddings are no longer", UserWarning)
        _part_from_others(model)
        merged: nn.Module = model.merge_and_unload(safe_merge=True)
        _part_all(merged, tied)
    return merged


@contextmanager
def _refusing(base: nn.Module, adapter: Path) -> Iterator[None]:
    """Turn what PEFT raises into a RecordError."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError, UserWarning) as error:
        raise RecordError(
            f"adapter {str(adapter)!r} cannot be merged into {type(base).__name__} "
            f"({_brief(error)}); give the model it was trained on"
        ) from error


def _part_from_others(model: nn.Module) -> None:
    """Give each adapted layer a copy of a weight that another layer has too and the sum would
    change."""
    users = Counter(storage_ptr(p) for _, p in model.named_parameters(remove_duplicate=False))
    for layer in lora_layers(model).values():
        own = layer.base_layer
        shared = any(users[storage_ptr(parameter)] > 1 for parameter in own.parameters())
        if shared and not isinstance(own, LoraLayer):  # which wraps another parameter of the layer
            layer.base_layer = copy.deepcopy(own)


def _part_all(model: nn.Module, tied: Mapping[str, str]) -> None:
    """Leave no weight shared but those that the model's config ties, if all of these are tied
    still.

    Args:
        tied: name of a parameter → the one that it was before the merge, as the config said.
    """
    parameter = model.get_parameter
    if any(storage_ptr(parameter(a)) != storage_ptr(parameter(b)) for a, b in tied.items()):
        tied = {}
        for config in _tying_configs(model):
            config.tie_word_embeddings = False
    kept = {storage_ptr(parameter(name)) for name in tied}
    seen: set[int] = set()
    for module in model.modules():
        for name, shared in module.named_parameters(recurse=False):
            place = storage_ptr(shared)
            if place in seen - kept:
                own = nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad)
                setattr(module, name, own)
            seen.add(place)


def _tying_configs(model: nn.Module) -> Iterator[Any]:
    """The configs of a transformers model and of its parts that say that embeddings are tied."""
    outer = [module.config for module in model.modules() if hasattr(module, "config")]
    inner = [
        getattr(each, name, None) for each in outer for name in getattr(each, "sub_configs", ())
    ]
    return (each for each in (*outer, *inner) if getattr(each, "tie_word_embeddings", False))


def _require_mergeable(model: PeftModel) -> None:
    """Raise an AdapterError for weights that cannot hold what the adapter adds.

    A convolution's A fills with zeros and has no dilation, so no weight of one that does otherwise
    holds BA.
    """
    if getattr(model.get_base_model(), "is_quantized", False):
        raise AdapterError(
            "the base model's weights are quantized, and a sum rounded to so few bits would lose"
            " what was learned; name the model that it was quantized from with --model, or serve"
            " the adapter beside its base model"
        )
    for path, layer in lora_layers(model).items():
        base = layer.get_base_layer()
        if isinstance(base, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and (
            base.padding_mode != "zeros" or max(base.dilation) > 1
        ):
            raise AdapterError(
                f"{path} ({base}) cannot be merged with its adapter, which pads with zeros and has"
                " no dilation; keep the adapter beside the model, or leave such layers out of the"
                " targets"
            )


def head_size(adapter: str | Path) -> int | None:
    """How many labels a classification head that was trained beside the adapter has; None where
    there is none."""
    heads = [
        value
        for key, value in _read_weights(Path(adapter)).items()
        if re.search(r"\.(score|classifier|classifier\.out_proj)\.weight$", key) and value.ndim == 2
    ]
    return heads[0].shape[0] if heads else None


def write_card(folder: Path, about: str, base: str | None, library: str) -> None:
    """A model card, as hubs read it."""
    facts = ({"base_model": base} if base else {}) | {"library_name": library, "tags": ["lora"]}
    head = yaml.safe_dump(facts, sort_keys=False, allow_unicode=True)
    (folder / "README.md").write_text(f"---\n{head}---\n\n{about}\n", encoding="utf-8")


def write_record(folder: Path, facts: dict[str, Any]) -> None:
    """Write what an export is."""
    (folder / RECORD).write_text(
        json.dumps(facts | {"evatune": __version__}, indent=2) + "\n", encoding="utf-8"
    )


def _read_weights(folder: Path) -> dict[str, Tensor]:
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        raise RecordError(
            f"folder {str(folder)!r} holds no {SAFETENSORS_WEIGHTS_NAME}; give one that"
            " save_pretrained wrote (pickled adapter_model.bin is not read: load and save it with"
            " PEFT)"
        )
    return read_weights(path)


def _require_plain(config: LoraConfig) -> None:
    found = [name for name in _VARIANTS if getattr(config, name, None)]
    if found:
        raise AdapterError(
            f"the adapter is more than s·BAx ({found[0]} is set), which servers do not compute;"
            " merge it into the base model instead: --format merged"
        )
    start = config.init_lora_weights
    if start not in _STARTS:
        raise AdapterError(
            f"the adapter was initialised with {start!r}, which changes the base weights, so it"
            " does not fit the original ones; save it with"
            " path_initial_model_for_weight_conversion first"
        )


def _layers(state: dict[str, Tensor]) -> list[str]:
    """Names of the layers that have matrices, without PEFT's prefix, in order."""
    names = (
        match["layer"].removeprefix(_PREFIX) for key in state if (match := _KEY.fullmatch(key))
    )
    return list(dict.fromkeys(names))


def _pad(state: dict[str, Tensor], config: LoraConfig) -> tuple[dict[str, Tensor], Uniform]:
    """The same adapter at one rank and one scale."""
    ranks: dict[str, int] = {}
    for key, value in state.items():
        match = _KEY.fullmatch(key)
        if match is None:
            if ".lora_" in key:
                raise AdapterError(
                    f"{key} belongs to no plain LoRA layer; merge the adapter instead: --format"
                    " merged"
                )
        else:
            rank = value.shape[_rank_dimension(match)] if value.ndim > 1 else 0
            grouped = (
                match["part"] == "B" and value.ndim > 2 and rank < ranks.get(match["layer"], rank)
            )
            if grouped or ".base_layer" in match["layer"]:
                projection = "projection of nn.MultiheadAttention"
                raise AdapterError(
                    f"{match['layer'].removeprefix(_PREFIX)} is a"
                    f" {'convolution with groups' if grouped else projection}, whose adapter no"
                    " server reads; serve it with PEFT, or leave such layers out of the targets"
                )
            if not rank or ranks.setdefault(match["layer"], rank) != rank:
                raise RecordError(
                    f"the matrices of {match['layer']} do not fit each other; save the adapter"
                    " again"
                )
    whole = Counter(match["layer"] for key in state if (match := _KEY.fullmatch(key)))
    if not ranks or set(whole.values()) != {2}:
        unsupported = next((layer for layer, count in whole.items() if count != 2), None)
        raise RecordError(
            f"the adapter lacks A or B of {unsupported or 'every layer'}; save it again"
        )
    scales = {
        layer: layer_scale(config, layer.removeprefix(_PREFIX), rank)[1]
        for layer, rank in ranks.items()
    }
    r = max(ranks.values())
    _require_moderate(state, r)
    alpha = _number(r * Counter(scales.values()).most_common(1)[0][0])
    quotients = {layer: scale / (alpha / r) for layer, scale in scales.items()}
    rescaled = [layer for layer, quotient in quotients.items() if abs(quotient - 1) > 1e-12]

    padded = {}
    for key, value in state.items():
        match = _KEY.fullmatch(key)
        if match is not None:
            dim = _rank_dimension(match)
            if dim == 1 and match["layer"] in rescaled:
                # in 16 bits it would no longer be the same
                value = (value.double() * quotients[match["layer"]]).float()
            value = _grown(value, r, dim)
        padded[key] = value.detach().cpu().contiguous()
    zeros = _neighbours(padded)
    names = [name.removeprefix(_PREFIX) for name in rescaled]
    return padded | zeros, Uniform(r, alpha, len(ranks), tuple(_layers(zeros)), tuple(names))


def _require_moderate(state: dict[str, Tensor], r: int) -> None:
    """Raise a RecordError where one layer's rank would make the padded adapter many times as
    large."""
    size = grown = 0
    for key, value in state.items():
        match = _KEY.fullmatch(key)
        if match is not None:
            size += value.numel()
            grown += value.numel() // value.shape[_rank_dimension(match)] * r
    times = grown / size
    if times > _MOST_GROWTH:
        raise RecordError(
            f"at rank {r}, its largest, the adapter would be {times:.0f} times as large, and "
            f"{_MOST_GROWTH} times is the most; save it again if that rank is wrong, or merge it: "
            "--format merged"
        )


def _rank_dimension(match: re.Match[str]) -> int:
    return 0 if "A" in (match["part"], match["table"]) else 1


def _grown(matrix: Tensor, size: int, dim: int) -> Tensor:
    """The matrix with zeros appended along `dim` up to `size`."""
    shape = list(matrix.shape)
    shape[dim] = size - shape[dim]
    return torch.cat([matrix, matrix.new_zeros(shape)], dim)


def _neighbours(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Zeros for layers without an adapter whose neighbours have one, as the same layer of other
    blocks shows.

    Neighbours are children of one module; the same module of another block differs in numbers only.
    Where shapes vary from block to block, nothing tells what is right here, and nothing is added.
    """
    weights = {key: value for key, value in state.items() if _KEY.fullmatch(key)}
    parents: dict[str, set[str]] = {}  # "….layers.*.self_attn" → where it occurs with an adapter
    # the same → what follows it in keys → its tensors
    children: dict[str, dict[str, list[Tensor]]] = {}
    for key, value in weights.items():
        match = _KEY.fullmatch(key)
        assert match is not None
        parent = match["layer"].rpartition(".")[0]
        kind = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", parent)
        parents.setdefault(kind, set()).add(parent)
        children.setdefault(kind, {}).setdefault(key.removeprefix(parent), []).append(value)
    return {
        parent + end: torch.zeros_like(values[0])
        for kind, ends in children.items()
        for parent in sorted(parents[kind])
        for end, values in ends.items()
        if parent + end not in state and len({value.shape for value in values}) == 1
    }


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


def _number(value: float) -> float:
    """A whole number as one, up to the rounding of a quotient and a product."""
    return (
        round(value)
        if abs(value - round(value)) < 1e-9 * max(1.0, abs(value)) and round(value)
        else value
    )
