"""Methods to compare an adapter with: the whole model, the head alone, nothing at all."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from evatune.errors import ConfigError
from evatune.finetune.head import is_in_head
from evatune.finetune.methods.base import AdapterSetup, Method


@dataclass(frozen=True)
class Full(Method):
    """Train every weight."""

    saved_as: ClassVar[str] = "model"
    trains_base: ClassVar[bool] = True
    fits_quantized: ClassVar[bool] = False

    def adapt(self, model: nn.Module, setup: AdapterSetup) -> Any:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self._is_trained(name, setup))
        return model

    def load(self, model: Any, folder: Path) -> Any:
        return type(model).from_pretrained(folder, dtype=model.dtype)

    def _is_trained(self, name: str, setup: AdapterSetup) -> bool:
        return True


@dataclass(frozen=True)
class Head(Full):
    """Train the head alone."""

    def adapt(self, model: nn.Module, setup: AdapterSetup) -> Any:
        adapted = super().adapt(model, setup)
        if not any(parameter.requires_grad for parameter in adapted.parameters()):
            raise ConfigError(
                f"method 'head' finds no weights of its own in {', '.join(setup.head)}, which may "
                "share those of the embeddings; choose lora or full"
            )
        return adapted

    def _is_trained(self, name: str, setup: AdapterSetup) -> bool:
        return is_in_head(name, setup.head)


@dataclass(frozen=True)
class Untouched(Full):
    """Train nothing: what the checkpoint can do."""

    trains: ClassVar[bool] = False
    trains_base: ClassVar[bool] = False
    fits_shards: ClassVar[bool] = False

    def _is_trained(self, name: str, setup: AdapterSetup) -> bool:
        return False

    def save(
        self,
        model: Any,
        folder: Path,
        initial_adapter: Path,
        weights: dict[str, Tensor] | None = None,
    ) -> None:
        """Write nothing: the checkpoint is there already."""

    def load(self, model: Any, folder: Path) -> Any:
        return model


METHODS = (
    Full("full", about="every weight is trained", role="reference"),
    Head("head", about="the head alone is trained", role="reference"),
    Untouched("untouched", about="nothing is trained", role="reference"),
)
