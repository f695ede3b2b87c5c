"""The spectra of a run: refreshed on the rows of all processes, and watched for drift."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from evatune.calibration.config import CalibrationConfig
from evatune.calibration.convergence import MIN_BATCHES
from evatune.capture import InputGroup, SharedInputs
from evatune.distributed.group import ProcessGroup
from evatune.distributed.sketches import DistributedSketches
from evatune.sketch import Sketch, refresh_all
from evatune.sketch.spectrum import Spectrum

# Share of the energy by which many fresh rows may fall short of what the rows before them had
# shown, and the number of rows from which on they are many. In mixed streams it is up to 0.06 of
# thousands of rows, up to 0.11 of 250 and 0.14 of 30 (single sentences); where one topic of the
# news turns into another up to 0.2, and where news turn into code up to 0.22.
_DRIFT, _FEW_ROWS = 0.07, 512
# The same for gradients, of whose energy few examples have most: judged where so many batches are
# on either side. In mixed streams it is then up to 0.10 of single texts, up to 0.05 of batches of
# four (with two batches on a side 0.19 and 0.08); where one topic turns into another, up to 0.16.
_DRIFT_OF_GRADIENTS, _BATCHES_OF_GRADIENTS = 0.1, 8


class SketchRefresher:
    """Refreshes all sketches together and keeps their spectra.

    Attributes:
        latest: the spectra of the last refresh.
        drifting: layers whose newest rows, at any refresh, were captured worse than the rows before
            them.
        drifts: whether that was so for any layer at the last refresh.
    """

    def __init__(
        self,
        shared_inputs: SharedInputs,
        config: CalibrationConfig,
        process_group: ProcessGroup,
        names: Sequence[str],
        make_sketch: Callable[[str], Sketch],
    ) -> None:
        self._shared_inputs = shared_inputs
        self._process_group = process_group
        self._n_components = config.n_components
        self._joint = DistributedSketches(process_group, shared_inputs, names, make_sketch)
        self.latest: dict[InputGroup, Spectrum] = {}
        self.drifting: set[str] = set()
        self.drifts = False

    @property
    def rows(self) -> int:
        """The most rows that any layer had seen at the last refresh."""
        return max((spectrum.rows for spectrum in self.latest.values()), default=0)

    def refresh(self, batches: int) -> None:
        """Move every sketch's basis to what the data so far suggests."""
        before = self.latest
        if self._process_group.size > 1:
            self.latest = self._joint.refresh()
        else:
            groups = self._shared_inputs.groups
            spectra = refresh_all([group.sketch for group in groups])
            self.latest = dict(zip(groups, spectra, strict=True))
        self._note_drift(before, self.latest, batches)

    def final_spectra(
        self, groups: Iterable[InputGroup], batches: int
    ) -> dict[InputGroup, Spectrum]:
        """Return the spectra of all rows that came."""
        spectra = {group: self._final_spectrum(group) for group in groups}
        self._note_drift(self.latest, spectra, batches)
        return spectra

    def _final_spectrum(self, group: InputGroup) -> Spectrum:
        """Return the group's spectrum: that of the last refresh, if no row came after it."""
        latest = self.latest.get(group)
        if latest is None:
            return group.sketch.spectrum()
        # several processes end with a refresh
        is_current = self._process_group.size > 1 or latest.rows == group.sketch.count
        return latest if is_current else group.sketch.spectrum()

    def _note_drift(
        self,
        before: Mapping[InputGroup, Spectrum],
        now: Mapping[InputGroup, Spectrum],
        batches: int,
    ) -> None:
        """Remember layers whose newest rows are captured worse than the rows before them were."""
        drifting: set[str] = set()
        for group, spectrum in now.items():
            if group in before and self._fell(before[group], spectrum, batches):
                drifting.update(group.members)
        self.drifts = bool(drifting)
        self.drifting |= drifting

    def _fell(self, before: Spectrum, now: Spectrum, batches: int) -> bool:
        """Return whether less was captured of the newest rows than of those before them.

        Both shares are of directions that were found without these rows. Where data is well mixed
        the share rises or stays, but for chance, which moves it more where there are few rows.
        """
        known, fresh = before.certificate, now.certificate
        if batches <= MIN_BATCHES or not known or not fresh:
            return False
        rows = min(known.rows, fresh.rows)
        if now.inputs is None:
            enough, limit = float(self._n_components), _DRIFT * math.sqrt(1 + _FEW_ROWS / rows)
        else:
            enough, limit = _BATCHES_OF_GRADIENTS * now.rows / batches, _DRIFT_OF_GRADIENTS
        return rows >= enough and known.captured() - fresh.captured() > limit
