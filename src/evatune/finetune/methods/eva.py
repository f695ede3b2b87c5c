"""EVA, its variants, and the controls of its two claims: the directions and the ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from evatune.adapters.lora_layers import lora_layers
from evatune.api import calibrate
from evatune.calibration import Calibration, CalibrationConfig
from evatune.finetune.methods.base import EvaOptions, Lora, Preparation, rows_of_a
from evatune.scaling import default_rows, orthogonal_rows, seeded_generator
from evatune.sketch.spectrum import Spectrum

_MINOR_BATCHES, _MINOR_EXAMPLES = 16, 16


@dataclass(frozen=True)
class Eva(Lora):
    """LoRA that `evatune.initialize` starts.

    Attributes:
        initialize_options: of `evatune.initialize`, beside the run's.
    """

    initialize_options: EvaOptions = field(default_factory=EvaOptions, kw_only=True)

    starts_as_calibrated: ClassVar[bool] = True
    own_settings: ClassVar[tuple[str, ...]] = ("adapter.rho", "adapter.scale", "adapter.budget")

    def prepare(self, model: Any, preparation: Preparation) -> Calibration | None:
        return preparation.initialize(**self.options_of_run(preparation))

    def options_of_run(self, preparation: Preparation) -> EvaOptions:
        """Return the options of `evatune.initialize`: the run's, or the method's own."""
        return preparation.options | self.initialize_options

    def scale(self, usual: str) -> str | None:
        return self.initialize_options.get("scale", usual)


@dataclass(frozen=True)
class OtherData(Eva):
    """EVA on the data of another task: the control of whether a task's own data matter."""

    starts_as_calibrated: ClassVar[bool] = False

    def prepare(self, model: Any, preparation: Preparation) -> Calibration | None:
        return preparation.initialize_elsewhere(**self.options_of_run(preparation))


@dataclass(frozen=True)
class RanksOnly(Eva):
    """EVA's ranks with PEFT's random A: the control of the directions."""

    starts_as_calibrated: ClassVar[bool] = False
    linear_only: ClassVar[bool] = True

    def prepare(self, model: Any, preparation: Preparation) -> Calibration | None:
        calibration = super().prepare(model, preparation)
        _redraw(model, preparation.seed)
        return calibration


@dataclass(frozen=True)
class RandomDirections(Eva):
    """EVA's ranks and the length of its first step, in random directions: what is left is theirs.

    Rows of A are orthogonal and of one length, at which E‖Ax‖² of every layer is what EVA has.
    """

    starts_as_calibrated: ClassVar[bool] = False
    linear_only: ClassVar[bool] = True

    @torch.no_grad()
    def prepare(self, model: Any, preparation: Preparation) -> Calibration | None:
        calibration = super().prepare(model, preparation)
        assert calibration is not None
        generator = seeded_generator(preparation.seed)
        for path, a in rows_of_a(model).items():
            length = _length_of_equal_energy(a, calibration.spectra[path])
            a.copy_(orthogonal_rows(a.shape, length, generator))
        return calibration


def _length_of_equal_energy(a: Tensor, spectrum: Spectrum) -> float:
    """Return the length of random rows, as many as A's, whose E‖Ax‖² is that of EVA's A (r, d)."""
    moments = spectrum.second_moments[: len(a)].double()
    squares = a[: len(moments)].double().cpu().square().sum(dim=1)
    of_random = len(a) * spectrum.total_second_moment / a.shape[1]
    return math.sqrt(float((squares * moments).sum()) / of_random)


@dataclass(frozen=True)
class MinorDirections(Lora):
    """Uniform ranks and the directions with least energy: the control of EVA's claim."""

    linear_only: ClassVar[bool] = True

    @torch.no_grad()
    def prepare(self, model: Any, preparation: Preparation) -> Calibration | None:
        layers = lora_layers(model)
        config = CalibrationConfig(
            rank=next(iter(layers.values())).r["default"],
            rho=1,
            sketch="exact",
            max_batches=_MINOR_BATCHES,
            components=max(layer.in_features for layer in layers.values()),
            tolerance=0,
        )
        batches = preparation.batches(_MINOR_EXAMPLES)
        calibration = calibrate(
            model, batches, config, rows=preparation.rows, progress=preparation.progress
        )
        for path, a in rows_of_a(model).items():
            a.copy_(calibration.spectra[path].directions[-len(a) :])
        return calibration


@torch.no_grad()
def _redraw(model: nn.Module, seed: int) -> None:
    """Give every layer PEFT's default A, at the rank that it has."""
    generator = seeded_generator(seed)
    for a in rows_of_a(model).values():
        a.copy_(default_rows(a.shape, generator))


_EVA = Eva(
    "eva",
    about="A on the inputs' leading directions, ranks by what they explain",
    source="Paischer et al. 2024",
    role="eva",
)

METHODS = (
    _EVA,
    # The directions alone: every layer keeps its rank.
    replace(
        _EVA,
        name="eva-rho1",
        about="EVA with the same rank everywhere",
        initialize_options={"rho": 1},
    ),
    replace(_EVA, name="eva-dora", about="EVA with DoRA", options={"use_dora": True}),
    replace(
        _EVA,
        name="eva-whiten",
        about="EVA with rows of A that whiten",
        initialize_options={"scale": "whiten"},
    ),
    replace(
        _EVA,
        name="eva-paper",
        about="EVA with unit rows of A, as in the paper",
        initialize_options={"scale": "paper"},
    ),
    replace(
        _EVA,
        name="eva-paper-rho1",
        about="eva-paper with the same rank everywhere",
        initialize_options={"scale": "paper", "rho": 1},
    ),
    # The covariance's directions, without that of the mean, which is most of the leading one.
    replace(
        _EVA,
        name="eva-centered",
        about="EVA by the covariance of the inputs",
        initialize_options={"scale": "matched", "config": CalibrationConfig(center=True)},
    ),
    replace(
        _EVA,
        name="eva-paper-centered",
        about="eva-centered with unit rows of A",
        initialize_options={"scale": "paper", "config": CalibrationConfig(center=True)},
    ),
    # The directions in which the loss has gradients, where LoRA's own learning rate fits.
    replace(
        _EVA,
        name="eva-gradients",
        about="EVA by the directions of the gradients",
        initialize_options={"scale": "matched", "config": CalibrationConfig(objective="gradients")},
    ),
    replace(
        _EVA,
        name="eva-regression",
        about="EVA by the regression of gradients on inputs",
        initialize_options={
            "scale": "whiten-matched",
            "config": CalibrationConfig(objective="regression"),
        },
    ),
    # Its A is PEFT's in the end, which has the length of these rows.
    RanksOnly(
        "lora-redist",
        about="control: EVA's ranks, random A",
        role="control",
        initialize_options={"scale": "matched"},
    ),
    RandomDirections(
        "eva-paper-random",
        about="control: eva-paper-centered's ranks and first step, random directions",
        role="control",
        initialize_options={"scale": "paper", "config": CalibrationConfig(center=True)},
    ),
    MinorDirections(
        "eva-minor",
        least_width=1,
        about="control: directions with the least energy",
        role="control",
    ),
    OtherData("eva-shuffled", about="control: EVA on the data of another task", role="control"),
)
