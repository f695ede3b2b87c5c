"""Methods of fine-tuning: hooks that a run calls, in the order in which it calls them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, TypedDict, Unpack

from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from evatune.adapters.lora_layers import find_lora_targets, lora_layers
from evatune.calibration import Calibration, CalibrationConfig
from evatune.calibration.progress import ProgressOption
from evatune.capture.recorder import RowsFunction
from evatune.capture.targets import find_target_layers
from evatune.choices import Budget, Scale
from evatune.errors import ConfigError
from evatune.finetune.methods.gradients import mean_gradients
from evatune.finetune.recipe import AdapterOptions, TrainingOptions

# Examples per batch → one pass over the training data, on the model's device.
Batches = Callable[[int], Iterable[Any]]
# In a comparison: what others are held against, EVA itself, what it competes with, and what tells
# why EVA is better or not.
Role = Literal["reference", "eva", "competitor", "control"]

LOWER_THE_RANK = "lower adapter.rank, name other adapter.targets, or choose lora or eva"


class EvaOptions(TypedDict, total=False):
    """Options of `evatune.initialize` that a method may set."""

    rho: float
    budget: Budget
    scale: Scale
    config: CalibrationConfig


class Initialize(Protocol):
    """`evatune.initialize`, bound to a model or trainer."""

    def __call__(self, **options: Unpack[EvaOptions]) -> Calibration: ...


@dataclass(frozen=True, kw_only=True)
class AdapterSetup:
    """The settings of a run's adapter, the same for every method.

    Attributes:
        adapter: the recipe's.
        task_type: PEFT's name of the kind of task; None for a model that it has no name for.
        head: endings of the names of the modules that make up the head.
        new_head: the head is not in the checkpoint, so every method trains it in full.
        steps: optimizer steps to come.
    """

    adapter: AdapterOptions
    task_type: str | None
    head: list[str]
    new_head: bool
    steps: int

    @property
    def lora_options(self) -> dict[str, Any]:
        """The options that PEFT's configurations of every kind of LoRA have in common."""
        return {
            "target_modules": self.adapter.targets,
            "lora_alpha": self.adapter.alpha,
            "bias": self.adapter.bias,
            "modules_to_save": self.head if self.new_head else None,
            "task_type": TaskType(self.task_type) if self.task_type else None,
        }


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """Means that a method has between the building of its adapter and the first step.

    Attributes:
        initialize: `evatune.initialize`, bound to the run's model or trainer.
        initialize_elsewhere: the same with the data of another task.
        batches: training batches of any size, for passes of other kinds.
        options: of `evatune.initialize`, as the recipe has them. seed: of the run.
        initial_adapter: folder in which a method that changes the base weights keeps its adapter
            as it was before training.
        rows: the task's choice of rows. progress: as for `evatune.initialize`.
    """

    initialize: Initialize
    initialize_elsewhere: Initialize
    batches: Batches
    seed: int
    initial_adapter: Path
    options: EvaOptions = field(default_factory=EvaOptions)
    rows: RowsFunction | None = None
    progress: ProgressOption = None


@dataclass(frozen=True)
class Method:
    """A method of fine-tuning: what is trained, and how it starts.

    All else is equal between methods.

    Attributes:
        name: in recipes. about: what it does, in a few words. source: paper and year.
        role: in a comparison.
    """

    name: str
    about: str = field(default="", kw_only=True)
    source: str = field(default="", kw_only=True)
    role: Role = field(default="competitor", kw_only=True)

    # The folder of a run in which the result is saved.
    saved_as: ClassVar[str] = "adapter"
    # False where nothing is trained.
    trains: ClassVar[bool] = True
    # True where the adapter starts as the calibration says, which it does not in controls.
    starts_as_calibrated: ClassVar[bool] = False
    # True where weights of the checkpoint are trained themselves.
    trains_base: ClassVar[bool] = False
    # False where a checkpoint of the middle of a run cannot be loaded.
    resumable: ClassVar[bool] = True
    # False where the base's weights are decomposed, change or have a gradient, which those of 4
    # bits cannot.
    fits_quantized: ClassVar[bool] = True
    # False where the optimizer is the method's own, weights of the base have a gradient or change,
    # or ranks change on the way.
    fits_shards: ClassVar[bool] = True
    # The settings of a recipe that this method heeds and others do not: in a comparison each value
    # makes a method of its own.
    own_settings: ClassVar[tuple[str, ...]] = ()

    def adapt(self, model: nn.Module, setup: AdapterSetup) -> Any:
        """Return the model with what the method trains set up, before any data is seen.

        Raises:
            ConfigError: the method cannot run on these layers or at this rank.
            TargetError: no layer matches.
        """
        raise NotImplementedError

    def prepare(self, model: Any, preparation: Preparation) -> Calibration | None:
        """Start the adapter from data or from the weights."""
        return None

    def scale(self, usual: str) -> str | None:
        """Return the scale of A's rows in a recipe that says `usual`; None where it has none."""
        return None

    def optimizer(self, model: nn.Module, training: TrainingOptions) -> Any:
        """Return the method's own optimizer, or None for the run's usual one."""
        return None

    def after_step(self, model: nn.Module, step: int) -> None:
        """Do what the method does between an optimizer step and the clearing of gradients."""

    def save(
        self,
        model: Any,
        folder: Path,
        initial_adapter: Path,
        weights: dict[str, Tensor] | None = None,
    ) -> None:
        """Write what was trained, such that it fits the original base weights.

        Args:
            initial_adapter: the folder in which the method may have kept the adapter's start.
            weights: the model's by name, where it has shards of them alone.
        """
        model.save_pretrained(folder, state_dict=weights)

    def load(self, model: Any, folder: Path) -> Any:
        """Return the model as `save` wrote it, read by PEFT's own loader.

        Args:
            model: with the weights of the checkpoint; of no other use afterwards.
        """
        return PeftModel.from_pretrained(model, folder)


@dataclass(frozen=True)
class Lora(Method):
    """LoRA as PEFT builds it, with options of `LoraConfig`.

    Attributes:
        options: of `LoraConfig`.
        conv1d: the method is right on GPT-2's Conv1D, whose weight is (in, out).
        least_width: every layer must be at least this many times the rank wide, both in and out.
        frozen: the matrix of each pair that stays as it starts; None where both are trained.
    """

    options: dict[str, Any] = field(default_factory=dict)
    conv1d: bool = field(default=True, kw_only=True)
    least_width: int = field(default=0, kw_only=True)
    frozen: Literal["A", "B"] | None = field(default=None, kw_only=True)

    # True where the method is defined for linear layers alone.
    linear_only: ClassVar[bool] = False

    def adapt(self, model: nn.Module, setup: AdapterSetup) -> Any:
        # Its error says what would match.
        target_layers = find_target_layers(model, setup.adapter.targets)
        with warnings.catch_warnings():
            # PEFT then sets it.
            message = "fan_in_fan_out is set to"
            warnings.filterwarnings("ignore", message=message, category=UserWarning)
            try:
                adapted = get_peft_model(model, self.config(setup))
            except ValueError as error:
                # Weights that PEFT adapts without a layer to call cannot have every LoRA variant.
                groups = [layer.spec.rank_key for layer in target_layers if layer.parameter]
                names = ", ".join(list(dict.fromkeys(groups))[:3])
                where = f" at {names}" if names else ""
                raise ConfigError(
                    f"method {self.name!r} cannot run on this model ({error}){where}; "
                    f"{LOWER_THE_RANK}"
                ) from error
        self._require_fit(adapted)
        return adapted

    def freeze(self, model: nn.Module) -> None:
        """Let the matrices that stay as they start require no gradient."""
        for layer in lora_layers(model).values():
            if self.frozen is not None:
                getattr(layer, f"lora_{self.frozen}")["default"].requires_grad_(False)

    def config(self, setup: AdapterSetup) -> Any:
        """Return PEFT's configuration of the adapter."""
        return LoraConfig(r=setup.adapter.rank, **setup.lora_options, **self.options)

    def gradients(self, model: nn.Module, batches: Iterable[Any]) -> dict[str, Tensor]:
        """Return the mean gradient of the loss by each layer's W, (out, in) float32 on the CPU.

        Raises ConfigError for a layer that the training data never reaches.
        """
        layers = lora_layers(model)
        gradients = mean_gradients(model, layers, batches)
        self.require_reached(layers.keys() - gradients.keys())
        return gradients

    def require_reached(self, missing: Collection[str]) -> None:
        """Raise a ConfigError for layers that the pass over the training data did not reach."""
        if missing:
            names = ", ".join(sorted(missing)[:5])
            raise ConfigError(
                f"method {self.name!r} learns nothing about {names}"
                f"{' …' if len(missing) > 5 else ''}: the training data does not reach them; leave "
                "them out of adapter.targets"
            )

    def _require_fit(self, model: nn.Module) -> None:
        """Raise a ConfigError where the method would fail on a layer, or be another method."""
        layers = lora_layers(model)
        if self.linear_only:
            self._require_linear(model, layers)
        conv1d = [path for path, layer in layers.items() if getattr(layer, "fan_in_fan_out", False)]
        if conv1d and not self.conv1d:
            raise ConfigError(
                f"method {self.name!r} is not right on GPT-2's Conv1D layers, whose weights lie "
                f"transposed (here {conv1d[0]} and others); choose pissa, milora, corda or eva, or "
                "name linear layers as adapter.targets"
            )
        for path, layer in layers.items():
            sizes = (layer.in_features, layer.out_features)
            least = self.least_width * layer.r["default"]
            if min(sizes) < least:
                raise ConfigError(
                    f"method {self.name!r} at adapter.rank {layer.r['default']} needs layers at "
                    f"least {least} wide, and {path} maps {sizes[0]} to {sizes[1]} values; "
                    f"{LOWER_THE_RANK}"
                )

    def _require_linear(self, model: nn.Module, layers: dict[str, LoraLayer]) -> None:
        targets, _ = find_lora_targets(model, "default")
        linear = {target.name for target in targets if target.is_linear}
        for path, layer in layers.items():
            if path not in linear:
                raise ConfigError(
                    f"method {self.name!r} is defined for linear layers, and {path} "
                    f"({type(layer.get_base_layer()).__name__}) is none; name other "
                    "adapter.targets, or choose lora or eva"
                )


def rows_of_a(model: nn.Module) -> dict[str, Tensor]:
    """Return A (r, d) by layer. A layer that was left without a rank has no adapter, and no A."""
    return {
        path: layer.lora_A["default"].weight
        for path, layer in lora_layers(model).items()
        if "default" in layer.lora_A
    }
