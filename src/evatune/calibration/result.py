"""The result of a calibration: its data, and what is done with it."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from evatune.calibration.data import CalibrationData
from evatune.calibration.file import load_calibration, save_calibration
from evatune.calibration.merge import merge_calibrations
from evatune.calibration.status import Status
from evatune.choices import (
    DEFAULT_SCALE,
    SCALES,
    Budget,
    Metric,
    Scale,
    is_number,
    require_choice,
)
from evatune.errors import ConfigError, LayerError
from evatune.ranks.allocation import Candidate, RankPlan, allocate
from evatune.scaling import step_ratio
from evatune.utils.shown import Shown
from evatune.utils.text import shortened


@dataclass(frozen=True)
class Calibration(CalibrationData, Shown):
    """Spectra and statuses of layers, by their names in the base model, in model order."""

    def allocate(
        self,
        rank: int | None = None,
        rho: float | None = None,
        budget: Budget | None = None,
        metric: Metric | None = None,
        min_rank: int = 0,
    ) -> RankPlan:
        """Redistribute a rank budget; see `evatune.ranks.allocate`.

        Defaults come from `config`, caps and floors from `layers`.
        """
        defaults = self.config.redistribution
        return allocate(
            {
                name: Candidate(layer.spec, self.spectra[name])
                for name, layer in self.layers.items()
            },
            rank=defaults.rank if rank is None else rank,
            rho=defaults.rho if rho is None else rho,
            budget=defaults.budget if budget is None else budget,
            metric=defaults.metric if metric is None else metric,
            min_rank=min_rank,
            caps={name: layer.cap for name, layer in self.layers.items() if layer.cap is not None},
            floors={name: layer.floor for name, layer in self.layers.items() if layer.floor},
        )

    @classmethod
    def merge(cls, shards: Sequence[Calibration]) -> Calibration:
        """Join calibrations of the same model, each made apart on a shard of the data.

        Rows, batches, means and total energies are exactly those of one pass. Directions and
        energies are those of what the records keep, so that energy outside a shard's own directions
        may be lost: per row never more than the mean of the shards' `tail_energy`, weighted by
        their rows. More `components` lose less, and nothing is lost where each shard's directions
        hold all of its data. `evatune merge` prints bounds; `evatune.calibration.merge` derives
        them.

        Args:
            shards: two or more, of the same layers, with the same settings but for `max_batches`,
                `seed`, `distributed` and `rendezvous_timeout`. Their order changes rounding only.

        Returns:
            A new calibration. Its certificates are what the directions of one half of the shards
            capture of the other half's rows, by what the records keep of them: low where shards
            differ or drop much, not high. A layer is `non_finite` if it is so in one shard, as in
            one pass. Otherwise what the shards know is joined, its rows are judged as those of one
            pass, and the layer is as settled as in its least settled shard; a shard that has no
            usable result for it counts as `data_exhausted`. `first_bad_batch` counts through the
            shards in the order given. What is missed is not estimated.

        Raises:
            ConfigError: fewer than two, or one that does not fit the first; the message names the
                difference.

        Cost: per distinct input O(d·(m·k)²) for m shards, m·k ≤ d.
        """
        return merge_calibrations(shards)

    def captured(self, ranks: Mapping[str, int]) -> dict[str, float]:
        """Return the share of fresh rows' energy inside each layer's directions, as its rank is.

        Layers without a rank, a certificate or a finite share are left out. A ConfigError names one
        that the calibration does not have.
        """
        shares: dict[str, float] = {}
        for name, rank in ranks.items():
            if name not in self.spectra:
                raise ConfigError(
                    f"the calibration has no layer {name!r}; it has {shortened(list(self.spectra))}"
                )
            certificate = self.spectra[name].certificate
            share = certificate.captured(rank) if rank and certificate else math.nan
            if math.isfinite(share):
                shares[name] = share
        return shares

    def step_ratios(
        self, scale: Scale = DEFAULT_SCALE, plan: RankPlan | None = None
    ) -> dict[str, float]:
        """Return κ of each layer with a rank: how much more B's first steps do there than LoRA's.

        The layer at its rank is compared with LoRA at the rank that it would have without
        redistribution, and at the same α/r, which `evatune.initialize` keeps in every layer (unless
        the adapter's `EvaConfig.adjust_scaling_factors` is off: then κ is to be multiplied by that
        rank over the layer's own). For the formula see `evatune.scaling.step_ratio`.

        Args:
            scale: as for `evatune.initialize`.
            plan: where the ranks come from. Default: `allocate()`.

        Raises:
            ConfigError: a scale that does not exist. BudgetError: as for `allocate`.
        """
        require_choice("scale", scale, SCALES)
        plan = plan or self.allocate()
        ratios: dict[str, float] = {}
        for name, rank in plan.ranks.items():
            uniform_rank = self.layers[name].uniform_rank(plan.rank)
            ratio = step_ratio(self.spectra[name], rank, scale, uniform_rank) if rank else math.nan
            if ratio > 0:  # and no NaN
                ratios[name] = ratio
        return ratios

    def learning_rate(self, lora_rate: float, scale: Scale = DEFAULT_SCALE) -> float:
        """Return the learning rate at which an adapter of this `scale` starts as LoRA at its own.

        It is `lora_rate` over the median κ of `step_ratios`: there B's first steps under Adam
        change the layers' outputs as much as they do from PEFT's default start at `lora_rate`, at
        the same α/r. So it carries a rate over that suits LoRA, and knows nothing of better ones.

        Args:
            lora_rate: above 0.
            scale: as for `evatune.initialize`.

        Raises:
            ConfigError: a rate or a scale that is none. BudgetError: as for `allocate`.
        """
        if not is_number(lora_rate) or not 0 < lora_rate < math.inf:
            raise ConfigError(
                f"lora_rate is {lora_rate!r}; it must be a number above 0, such as 2e-4"
            )
        return lora_rate / median(self.step_ratios(scale).values())

    def require_usable(self) -> None:
        """Raise a LayerError that lists, with advice, all layers without a usable result."""
        failed: dict[Status, list[str]] = {}
        for name, status in self.status.items():
            if not status.usable:
                failed.setdefault(status, []).append(self._explained(name))
        if not failed:
            return
        lines = [
            f"{status}: {shortened(names)}; {status.advice}" for status, names in failed.items()
        ]
        total = sum(map(len, failed.values()))
        raise LayerError(
            f"{total} of {len(self.status)} layers cannot be initialized: " + ". ".join(lines)
        )

    def __repr__(self) -> str:
        """Return one line: what was calibrated, on how much, and how it ended."""
        statuses = Counter(str(status) for status in self.status.values())
        ended = ", ".join(f"{count} {status}" for status, count in statuses.most_common())
        inputs = {layer.input for layer in self.layers.values()} - {None}
        return (
            f"<Calibration of {self.model or 'a model'}: {len(self.layers)} layers with"
            f" {len(inputs)} inputs, {self.batches} batches; {ended}>"
        )

    def _explained(self, name: str) -> str:
        """Return a layer's name with what is known of why its result is not usable."""
        spectrum, layer = self.spectra[name], self.layers[name]
        if self.status[name] is Status.NON_FINITE:
            where = "" if layer.bad_process is None else f" on process {layer.bad_process}"
            return f"{name} (first in batch {layer.first_bad_batch}{where})"
        if self.status[name] is Status.TOO_FEW_ROWS:
            needed = min(self.config.n_components, layer.spec.max_rank)
            return f"{name} ({spectrum.rows} rows for {needed} components)"
        return name

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file under a temporary name, then rename it: it is whole or absent.

        It carries a checksum over all of its contents. Missing folders are made.
        """
        save_calibration(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """Read a file that `save` wrote; nothing is unpickled.

        Raises RecordError for anything else, and for what contradicts itself: directions that are
        not orthonormal, energies that rise or exceed their total, certificates that rest on more
        rows than there were, statuses that do not fit.
        """
        return load_calibration(path, cls)
