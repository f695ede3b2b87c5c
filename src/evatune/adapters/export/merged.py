"""The format "merged": the base model with the adapter added into its weights."""

from __future__ import annotations

import copy
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import storage_ptr
from torch import Tensor, nn

from evatune.adapters.export.files import read_adapter_weights, write_card, write_record
from evatune.adapters.export.request import Exported, ExportRequest
from evatune.adapters.lora_layers import lora_layers
from evatune.adapters.saved import read_config, require_quick_patterns
from evatune.errors import AdapterError, DataError, RecordError
from evatune.layers import PEFT_PREFIX
from evatune.loading import models
from evatune.utils.markup import markdown_code
from evatune.utils.names import short_name
from evatune.utils.outputs import claimed_folder, require_apart
from evatune.utils.text import one_line

_HEAD = re.compile(r"\.(score|classifier|(classifier|classification_head)\.out_proj)\.weight$")


def write(request: ExportRequest) -> Exported:
    """Write the base model with the adapter added in, and its tokenizer."""
    adapter = request.adapter
    config = read_config(adapter)
    source = request.model or config.base_model_name_or_path
    if not source:
        raise DataError(
            f"adapter {str(adapter)!r} does not say what its base model is; name it with --model"
        )
    require_apart(request.out, adapter=adapter, model=source)
    with claimed_folder(request.out, request.overwrite) as output:
        base = _load_base_model(request, source, config)
        tokenizer = models.adapter_tokenizer(adapter, request.trust_remote_code) or base.tokenizer
        batch = models.sample_batch(base)
        with output.whole() as folder:
            unchecked = write_merged(base.model, adapter, folder, batch)
            tokenizer.save_pretrained(folder)
            about = (
                f"{markdown_code(short_name(source))} with a LoRA adapter merged into its weights."
            )
            write_card(folder, about, source, library="transformers")
            write_record(
                folder, {"format": "merged", "base_model": source, "adapter": str(adapter)}
            )
    summary = f"{source} with the adapter added in"
    if unchecked:
        summary += f", not checked ({unchecked})"
    return Exported(summary, {"model": source, "task": base.task, "unchecked": unchecked})


def _load_base_model(request: ExportRequest, source: str, config: LoraConfig) -> models.TextModel:
    labels = head_size(request.adapter)
    options: dict[str, Any] = {} if labels is None else {"num_labels": labels}
    tasks = {peft_task: name for name, (_, peft_task) in models.TASKS.items() if peft_task}
    task = tasks.get(config.task_type, "auto")
    try:
        models.require_loadable(source, task)
        return models.read_model(
            source, task, trust_remote_code=request.trust_remote_code, **options
        )
    except DataError as error:
        raise DataError(
            f"base model of {str(request.adapter)!r}: {error}; --model names another place"
        ) from error


def write_merged(base: Any, adapter: Path, folder: Path, batch: dict[str, Tensor]) -> str | None:
    """Write a transformers model with a saved adapter added in, and check what was written.

    Args:
        base: of no use afterwards.
        batch: keywords of the forward pass by which the two are compared.

    Returns:
        Why they could not be compared; None if they were.

    Raises:
        RecordError: the adapter is damaged, not LoRA, or not of this base model.
        AdapterError: the weights cannot hold the sum, or the model, loaded again, computes
            something else.
    """
    model = load_adapter(base, adapter)
    expected, unchecked = None, None
    try:
        expected = _output(model, batch)
    except Exception as error:  # whatever a model raises that wants more than tokens
        unchecked = f"{type(base).__name__} does not run on tokens alone: {one_line(error)}"
    reloaded = _save_and_reload(merge(model, adapter), folder)
    if expected is not None:
        difference = _output(reloaded.eval(), batch) - expected
        relative = float(difference.norm() / expected.norm())
        allowed = torch.finfo(base.dtype).eps ** 0.5  # half of the digits, as sums in 16 bits need
        if not relative <= allowed:
            raise _merge_error(f"is off by {relative:.1%} in its outputs, more than {allowed:.1%}")
    return unchecked


def _save_and_reload(merged: Any, folder: Path) -> Any:
    """Write a transformers model and return it as it is loaded again, with all of its weights."""
    try:
        merged.save_pretrained(folder)
        merged.to("meta")  # there need not be memory for two
        reloaded, loading = type(merged).from_pretrained(
            folder, dtype="auto", output_loading_info=True, trust_remote_code=False
        )
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        raise _merge_error(f"cannot be saved and loaded ({one_line(error)})") from error
    lost = sorted({*loading["missing_keys"], *loading["mismatched_keys"]})
    if lost:
        raise _merge_error(f"has no weights for {lost[0]} when it is loaded again")
    return reloaded


def _merge_error(how: str) -> AdapterError:
    return AdapterError(
        f"the merged model {how}, so nothing was written; serve the adapter beside its base model"
    )


@torch.no_grad()
def _output(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the logits or hidden states of a transformers model, (…) float64."""
    first: Tensor = model(**batch)[0]
    return first.double()


def load_adapter(base: nn.Module, adapter: Path) -> PeftModel:
    """Return the base model with the saved adapter beside its weights."""
    config = read_config(adapter)
    state = read_adapter_weights(adapter)
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
    """Give a transformers model as many tokens as the embedding saved beside the adapter has."""
    if not hasattr(base, "get_input_embeddings"):
        return
    embedding = base.get_input_embeddings()
    name = next((name for name, module in base.named_modules() if module is embedding), None)
    saved = state.get(f"{PEFT_PREFIX}{name}.weight")
    if saved is None or saved.shape == embedding.weight.shape:
        return
    # else it is another model's, as PEFT will say
    if saved.shape[1:] == embedding.weight.shape[1:]:
        base.resize_token_embeddings(len(saved), mean_resizing=False)


def merge(model: PeftModel, adapter: Path) -> nn.Module:
    """Return the base model inside, with the adapter's updates in its weights.

    PEFT checks the sums for NaN and Inf. Weights that several layers share come apart where the
    adapter belongs to one of these layers only.
    """
    _require_mergeable(model)
    base = model.get_base_model()
    tied = dict(getattr(base, "all_tied_weights_keys", None) or {})
    with _refusing(base, adapter), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Input and output embeddings are no longer", UserWarning)
        _copy_shared_weights(model)
        merged: nn.Module = model.merge_and_unload(safe_merge=True)
        _untie(merged, tied)
    return merged


@contextmanager
def _refusing(base: nn.Module, adapter: Path) -> Iterator[None]:
    """Turn what PEFT raises into a RecordError."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError, UserWarning) as error:
        raise RecordError(
            f"adapter {str(adapter)!r} cannot be merged into {type(base).__name__} "
            f"({one_line(error)}); give the model it was trained on"
        ) from error


def _copy_shared_weights(model: nn.Module) -> None:
    """Give each adapted layer a weight of its own where another layer would change with it."""
    users = Counter(storage_ptr(p) for _, p in model.named_parameters(remove_duplicate=False))
    for layer in lora_layers(model).values():
        base_layer = layer.base_layer
        is_shared = any(users[storage_ptr(parameter)] > 1 for parameter in base_layer.parameters())
        # A LoRA layer inside wraps another parameter of the same layer.
        if is_shared and not isinstance(base_layer, LoraLayer):
            layer.base_layer = copy.deepcopy(base_layer)


def _untie(model: nn.Module, tied: Mapping[str, str]) -> None:
    """Copy every shared weight but those that the model's config ties.

    Where one of these has come apart, the config says so from then on, and none stays shared.

    Args:
        tied: name of a parameter → the one that it was before the merge, as the config said.
    """
    parameter = model.get_parameter
    if any(storage_ptr(parameter(a)) != storage_ptr(parameter(b)) for a, b in tied.items()):
        tied = {}
        for config in _tying_configs(model):
            config.tie_word_embeddings = False
    still_tied = {storage_ptr(parameter(name)) for name in tied}
    seen: set[int] = set()
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            storage = storage_ptr(weight)
            if storage in seen - still_tied:
                copied = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
                setattr(module, name, copied)
            seen.add(storage)


def _tying_configs(model: nn.Module) -> Iterator[Any]:
    """Yield the configs, of a transformers model and in it, that say that embeddings are tied."""
    for module in model.modules():
        outer = getattr(module, "config", None)
        inner = [getattr(outer, name, None) for name in getattr(outer, "sub_configs", ())]
        for config in (outer, *inner):
            if getattr(config, "tie_word_embeddings", False):
                yield config


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
        if not isinstance(base, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            continue
        if base.padding_mode != "zeros" or max(base.dilation) > 1:
            raise AdapterError(
                f"{path} ({base}) cannot be merged with its adapter, which pads with zeros and has"
                " no dilation; keep the adapter beside the model, or leave such layers out of the"
                " targets"
            )


def head_size(adapter: str | Path) -> int | None:
    """Return the number of labels of the classification head that was trained beside the adapter.

    None where there is no head.
    """
    for key, value in read_adapter_weights(Path(adapter)).items():
        if _HEAD.search(key) and value.ndim == 2:
            return value.shape[0]
    return None
