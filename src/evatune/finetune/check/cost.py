"""Cost of a run: parameters, memory and time, by formulas on the model without its weights."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from evatune.adapters.lora_layers import lora_layers
from evatune.calibration import CalibrationConfig
from evatune.choices import largest_rank
from evatune.errors import ConfigError, TargetError
from evatune.finetune.methods import Method, find_method
from evatune.finetune.methods.base import EvaOptions, Lora
from evatune.finetune.methods.eva import Eva
from evatune.finetune.methods.lora import METHODS as LORA_METHODS
from evatune.finetune.methods.without_adapter import Head
from evatune.finetune.metrics import count_trainable
from evatune.finetune.recipe import Recipe
from evatune.finetune.run import adapter_setup
from evatune.finetune.tasks import ModelKind, Task, find_domain
from evatune.finetune.tasks.base import DTYPES
from evatune.finetune.tasks.images.vtab import VTAB, VTAB_PIXELS
from evatune.finetune.tasks.user_data import MOST_HELD_OUT
from evatune.loading.models import default_device
from evatune.sketch.nystrom import basis_columns

UTILIZATION = 0.4
"""Share of a matrix product's rate that training reaches, as is usual for large models."""
_ADAMW, _GRADIENT, _FLOAT32, _SUMS = 8, 4, 4, 8  # bytes a number
_TOKENS_OF_A_STEP = 3  # of an episode: return, state and action
_OF_A_LAYER = 3  # times its widest matrix: what a recomputed layer keeps
_MEASURED_SECONDS, _MOST_PRODUCTS = 0.3, 50
_OPERATIONS = 2  # a weight, of a token in one pass
_SIDE_CPU, _SIDE_ACCELERATOR = 1024, 8192  # of the square matrices whose product is timed


@dataclass(frozen=True, kw_only=True)
class Size:
    """A model's size, and that of what is trained.

    Attributes:
        parameters, trained: numbers of them; with EVA before redistribution.
        products: weights that a token is multiplied by. quantizable: those of them below adapters
            that may be of 4 bits. widths: of their inputs and outputs, added
            up. widest: the largest such sum.
        kept: widths of the inputs of all layers, added up: what recomputed activations begin with.
        vocabulary: of a language model's output; 0 of others.
        calibrated: input widths of the adapted layers, where EVA's sketches see them.
    """

    parameters: int
    trained: int
    products: int
    quantizable: int
    widths: int
    widest: int
    kept: int
    vocabulary: int
    calibrated: tuple[int, ...]


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a run, by what takes them; and of the device."""

    weights: float
    training: float
    activations: float
    evaluation: float
    calibration: float
    device: float

    @property
    def peak(self) -> float:
        """The most that is needed at once."""
        return self.weights + max(
            self.training + max(self.activations, self.evaluation), self.calibration
        )


@dataclass(frozen=True)
class Time:
    """Floating point operations of a run, and the rate of a matrix product here, per second."""

    operations: float
    rate: float

    @property
    def seconds(self) -> float:
        """Expected of the run."""
        return self.operations / (UTILIZATION * self.rate)


@dataclass(frozen=True)
class Lengths:
    """Tokens of an example: of a usual one, and of the longest that a recipe allows."""

    usual: float
    longest: int


def size_of(recipe: Recipe, config: Any, classes: int | None = None) -> Size:
    """Return the size of a model, built without weights, with the recipe's method on it.

    Args:
        config: transformers' configuration of it.
        classes: that its new head has, if it gets one; default: as the configuration says.

    Raises ConfigError or TargetError where the method cannot run on these layers.
    """
    kind = find_domain(recipe.domain).models
    if classes is not None and kind.new_head:
        config.num_labels = classes
    with torch.device("meta"):
        model = getattr(transformers, kind.loader).from_config(
            config, trust_remote_code=recipe.trust_remote_code
        )
    shapes = list(_products(model))
    total = sum(parameter.numel() for parameter in model.parameters())
    method = find_method(recipe.method)
    adapted = _adapted(recipe, kind, method, model)
    inputs = [layer.in_features for layer in lora_layers(adapted).values()]
    text = config.get_text_config()
    output = getattr(text, "vocab_size", None)
    return Size(
        parameters=total,
        trained=count_trainable(adapted),
        products=sum(rows * columns for rows, columns in shapes),
        quantizable=sum(r * c for r, c in shapes if r != output),
        widths=sum(rows + columns for rows, columns in shapes),
        widest=max((rows + columns for rows, columns in shapes), default=0),
        kept=getattr(text, "hidden_size", 0) * getattr(text, "num_hidden_layers", 0),
        vocabulary=text.vocab_size if kind.task_type == "CAUSAL_LM" else 0,
        calibrated=tuple(inputs) if isinstance(method, Eva) else (),
    )


def lengths_of(recipe: Recipe, config: Any, task: Task | None) -> Lengths | None:
    """Return how many tokens an example has; None where that is not known of an architecture.

    Args:
        task: with some of the examples; without, a usual text is taken for as long as is allowed.
    """
    processor = find_domain(recipe.domain).models.processor
    if processor is None:
        steps = _TOKENS_OF_A_STEP * recipe.data.max_length
        return Lengths(steps, steps)
    if processor == "AutoImageProcessor":
        return _patches(recipe, config)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or 0
    longest = min(recipe.data.max_length, positions) if positions > 0 else recipe.data.max_length
    if task is None:
        return Lengths(longest, longest)
    lengths = [len(row["input_ids"]) for row in task.train]
    return Lengths(sum(lengths) / len(lengths), longest)


def _patches(recipe: Recipe, config: Any) -> Lengths | None:
    patch, side = getattr(config, "patch_size", None), getattr(config, "image_size", None)
    if recipe.task in VTAB:
        side = VTAB_PIXELS
    if not isinstance(patch, int) or not isinstance(side, int):
        return None
    tokens = (side // patch) ** 2 + 1
    return Lengths(tokens, tokens)


def memory_of(recipe: Recipe, size: Size, lengths: Lengths) -> Memory:
    """Return what a run needs at its peak, as one process without shards.

    - weights: parameters · bytes of the type that they are loaded in; of the matrices half a byte
      each with adapter.quantize=nf4, but for those of the output, which are not quantized.
    - training: a gradient and AdamW's two moments, 12 bytes a trained parameter, and 4 for its
      float32 weight unless all are trained, which are counted already.
    - activations of a batch: tokens · (inputs + outputs of all matrices · bytes of the training
      precision + 8 · vocabulary). Of a usual transformer that is the 34 · width a layer of
      Korthikanti et al. 2022 without their term for attention, which kernels do not keep today. The
      logits are copied to float32, and have a gradient. With training.gradient_checkpointing: the
      inputs of all layers, and all of one layer, taken for three times its widest matrix.
    - evaluation of a batch, which may be larger: the widest layer, and the logits twice.
    - calibration: a basis in float32 and sums in float64 of `basis_columns` for each adapted layer,
      and the widest layer's activations. Layers that share an input are counted apart.
    """
    weight = find_domain(recipe.domain).models.dtype(recipe).itemsize
    quantized = size.quantizable if recipe.adapter.quantize != "none" else 0
    number = DTYPES[recipe.training.precision].itemsize
    tokens = recipe.training.batch_size * lengths.longest
    widest = tokens * size.widest * number
    again = recipe.training.gradient_checkpointing and size.kept > 0
    computed = size.kept + _OF_A_LAYER * size.widest if again else size.widths
    adapter_weight = _FLOAT32 if size.trained < size.parameters else 0
    logits = size.vocabulary * (number + _SUMS)
    components = largest_rank(recipe.adapter.rank, _rho(recipe))
    oversampling = CalibrationConfig.oversampling
    entries = sum(w * basis_columns(w, components, oversampling) for w in size.calibrated)
    sketches = entries * (_FLOAT32 + _SUMS)
    return Memory(
        weights=(size.parameters - quantized) * weight + quantized / 2,
        training=size.trained * (adapter_weight + _GRADIENT + _ADAMW),
        activations=tokens * (computed * number + size.vocabulary * _SUMS),
        evaluation=recipe.evaluation_batch * lengths.longest * (size.widest * number + logits),
        calibration=sketches + widest if size.calibrated else 0,
        device=_device_memory(),
    )


def time_of(recipe: Recipe, size: Size, lengths: Lengths) -> Time:
    """Return the operations of a run, and at which rate this machine's device does them.

    A token costs 2 operations a weight in the forward pass, 2 more in the backward pass for what it
    was computed from, and 2 for the weight itself if that is trained: 4 · N · tokens with an
    adapter, 6 with all weights, and 2 more where activations are computed again. An evaluated one
    costs 2. Calibration is no more than a few steps.
    """
    training = recipe.training
    each = _passes(recipe) * _OPERATIONS
    learned = training.steps * training.batch_size * training.accumulate
    counted = each * learned + _OPERATIONS * _evaluated_examples(recipe)
    operations = size.products * lengths.usual * counted
    return Time(operations, measured_rate(recipe.training.precision))


def _passes(recipe: Recipe) -> int:
    """Return the passes through the weights, forward or backward, that a learned token takes."""
    method = find_method(recipe.method)
    if not method.trains:
        return 0
    if isinstance(method, Head):
        return 1
    again = int(recipe.training.gradient_checkpointing)
    return (3 if method.trains_base else 2) + again


def measured_rate(precision: str) -> float:
    """Return the operations per second of a matrix product on this machine's device.

    Args:
        precision: of training, as a recipe names it.
    """
    device = default_device()
    side = _SIDE_CPU if device.type == "cpu" else _SIDE_ACCELERATOR
    matrix = torch.ones(side, side, dtype=DTYPES[precision], device=device)
    float((matrix @ matrix)[0, 0])  # the first one is slow
    start, products = time.perf_counter(), 0
    while products < _MOST_PRODUCTS and time.perf_counter() - start < _MEASURED_SECONDS:
        float((matrix @ matrix)[0, 0])  # waits for the device
        products += 1
    return 2 * side**3 * products / (time.perf_counter() - start)


def _adapted(recipe: Recipe, kind: ModelKind, method: Method, model: Any) -> Any:
    """Return the model with what is trained, in plain LoRA where the method wants real weights."""
    setup = adapter_setup(recipe, kind, kind.head(model))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # which the run itself says
        try:
            adapted = method.adapt(model, setup)
        except (ConfigError, TargetError):
            raise
        except Exception:  # such as a decomposition of weights that are not there
            adapted = LORA_METHODS[0].adapt(model, setup)
    if isinstance(method, Lora):
        method.freeze(adapted)
    return adapted


def _products(model: nn.Module) -> Iterator[tuple[int, int]]:
    """Yield the shapes of the matrices that inputs are multiplied by."""
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim == 2 and not isinstance(module, nn.Embedding):
            yield weight.shape[0], weight.shape[1]


def _rho(recipe: Recipe) -> float:
    method = find_method(recipe.method)
    options = method.initialize_options if isinstance(method, Eva) else EvaOptions()
    return options.get("rho", recipe.adapter.rho)


def _evaluated_examples(recipe: Recipe) -> int:
    """Return how many examples a run evaluates: at the start, at every so many steps, at the end.

    Sizes that are left open are taken for the largest that they may become.
    """
    data, training = recipe.data, recipe.training
    largest = VTAB[recipe.task].test if recipe.task in VTAB else MOST_HELD_OUT
    test = data.test or largest
    validation = data.validation or (largest if data.has_validation else 0)
    meanwhile = 1 + training.steps // training.eval_every
    return meanwhile * validation + test if validation else (1 + meanwhile) * test


def _device_memory() -> float:
    if torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(0).total_memory)
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
