"""Export formats: what other programs read in place of an adapter whose ranks differ by layer.

A format is a module with a function `write(request) -> Exported`, and a line in FORMATS.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from evatune.adapters.export.request import Exported, ExportRequest
from evatune.utils.lazy import names_from

if TYPE_CHECKING:
    from evatune.adapters.export.uniform import export_uniform

__all__ = [
    "FORMATS",
    "ExportFormat",
    "ExportRequest",
    "Exported",
    "export_adapter",
    "export_uniform",
]


@dataclass(frozen=True)
class ExportFormat:
    """An export format: what it is, and the module that writes it, loaded when it is used."""

    description: str
    module: str
    loads_base_model: bool = False

    def write(self, request: ExportRequest) -> Exported:
        """Write the adapter in this format."""
        exported: Exported = import_module(self.module).write(request)
        return exported


FORMATS = {
    "uniform": ExportFormat("an adapter of one rank and one alpha", f"{__name__}.uniform"),
    "merged": ExportFormat("the base model with it added in", f"{__name__}.merged", True),
}


def export_adapter(name: str, request: ExportRequest) -> Exported:
    """Write a saved adapter in the format of this name.

    Raises:
        ConfigError: there is no such format, or `out` cannot be written.
        RecordError: `adapter` is not a folder, or does not hold a whole LoRA adapter.
        AdapterError: the format cannot say what the adapter computes.
    """
    from evatune.errors import ConfigError, RecordError

    if name not in FORMATS:
        raise ConfigError(f"format is {name!r}; choose one of {', '.join(FORMATS)}")
    if not request.adapter.is_dir():
        raise RecordError(
            f"adapter {str(request.adapter)!r} is not a folder; give one that evatune or PEFT's"
            " save_pretrained wrote"
        )
    return FORMATS[name].write(request)


# PEFT loads with it.
__getattr__ = names_from(__name__, {"export_uniform": "adapters.export.uniform"})
