"""The options of `evatune.initialize` as one object, and the settings that they resolve to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, TypeVar

from evatune.calibration.config import CalibrationConfig
from evatune.calibration.options import RunOptions
from evatune.choices import Budget, Metric, OnUnsupported, Scale

if TYPE_CHECKING:  # the door makes these objects, and `import evatune` loads no peft
    from peft import EvaConfig, LoraConfig

Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True)
class RankOptions:
    """The caller's word on the redistribution of ranks; None leaves it to config and adapter."""

    rank: int | None = None
    rho: float | None = None
    budget: Budget | None = None
    metric: Metric | None = None

    def resolve(self, config: CalibrationConfig, lora: LoraConfig) -> CalibrationConfig:
        """Return `config` with the caller's word, else its own, else the adapter's."""
        adapter_rho = lora.eva_config.rho if lora.eva_config is not None else None
        return replace(
            config,
            rank=_first_given(self.rank, config.rank, lora.r),
            rho=_first_given(self.rho, config.rho, adapter_rho),
            budget=config.budget if self.budget is None else self.budget,
            metric=config.metric if self.metric is None else self.metric,
        )


@dataclass(frozen=True, kw_only=True)
class InitializeOptions:
    """Options of `evatune.initialize`, all but model and batches; see there."""

    ranks: RankOptions = field(default_factory=RankOptions)
    run: RunOptions = field(default_factory=RunOptions)
    config: CalibrationConfig | None = None
    scale: Scale | None = None
    adapter_name: str = "default"
    overwrite: bool = False
    on_unsupported: OnUnsupported = "error"

    @property
    def keeps_rank_pattern(self) -> bool:
        """True unless a rank is given, which replaces the adapter's r and its `rank_pattern`."""
        in_config = self.config is not None and self.config.rank is not None
        return self.ranks.rank is None and not in_config

    def settings(self, lora: LoraConfig, caps: Mapping[str, int]) -> CalibrationConfig:
        """Return the settings of a calibration for this adapter, with enough components for it.

        What the caller says comes first, then `config`, then the adapter's own config.
        """
        config = self.config or CalibrationConfig()
        asks_for_eva = lora.init_lora_weights == "eva" and lora.eva_config is not None
        if config.labels_only is None and asks_for_eva:
            config = with_label_mask(config, lora.eva_config)
        config = self.ranks.resolve(config, lora)
        needed = needed_components(config, caps)
        if config.components is None and needed > config.n_components:
            return replace(config, components=needed)
        return config


def with_label_mask(config: CalibrationConfig, eva: EvaConfig) -> CalibrationConfig:
    """Return `config` with the choice of tokens that `EvaConfig` makes."""
    labels_only: Literal["auto", False] = "auto" if eva.use_label_mask else False
    return replace(config, labels_only=labels_only, ignore_index=eva.label_mask_value)


def needed_components(config: CalibrationConfig, caps: Mapping[str, int]) -> int:
    """Return how many directions of a layer the redistribution may come to use."""
    return max([replace(config, components=None).n_components, *caps.values()])


def _first_given(*values: Value | None) -> Value | None:
    """Return the first value that is not None."""
    return next((value for value in values if value is not None), None)
