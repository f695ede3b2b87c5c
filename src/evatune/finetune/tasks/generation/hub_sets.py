"""Data sets of the hub, or copies of them in a folder, learned together and tested apart."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from evatune.errors import ConfigError, DataError
from evatune.finetune.recipe import HUB, DataOptions
from evatune.finetune.tasks.base import DataSource
from evatune.finetune.tasks.generation.base import Pair
from evatune.finetune.tasks.splits import draw
from evatune.finetune.tasks.user_data import held_out
from evatune.loading.hub import reading
from evatune.loading.tables import load_split

_INSTEAD = "a folder with copies of the sets, as in data.source=FOLDER"
_Read = TypeVar("_Read")


@dataclass(frozen=True)
class HubSets:
    """Questions to train and to validate on, and those of each test by its name."""

    train: list[Pair]
    validation: list[Pair]
    tests: dict[str, list[Pair]]

    def first(self, max_examples: int | None) -> HubSets:
        """Return the first questions of each part and test, or all."""
        tests = {name: pairs[:max_examples] for name, pairs in self.tests.items()}
        return HubSets(self.train[:max_examples], self.validation[:max_examples], tests)


def set_sources(data: DataOptions, sets: Iterable[tuple[str, str | None]]) -> list[DataSource]:
    """Return where sets are, given as id and subset: on the hub, or in the folder of copies."""
    if data.source != HUB:
        return [DataSource(str(data.source))]
    subsets: dict[str, list[str | None]] = {}
    for name, subset in sets:
        subsets.setdefault(name, []).append(subset)
    return [DataSource(name, tuple(of_source)) for name, of_source in subsets.items()]


def drawn_sets(
    data: DataOptions, learned: list[Pair], tests: Mapping[str, list[Pair]], task: str
) -> HubSets:
    """Return as many questions as a recipe wants, drawn with the seed 0.

    Args:
        data: `train` and `validation` count the learned ones; 0 to train on is all that validation
            leaves, which is some of them then. `test` counts those of each test, and 0 is all.

    Raises ConfigError for sizes beyond the data.
    """
    validating = data.validation or (0 if data.train else held_out(len(learned)))
    count = data.train or len(learned) - validating
    if count < 1:
        raise ConfigError(
            f"data.validation is {validating}, and {task!r} has {len(learned)} questions to"
            " train on; lower it"
        )
    parts = draw(len(learned), task, train=count, validation=validating)
    train, validation = ([learned[i] for i in part] for part in parts)
    chosen = {}
    for name, questions in tests.items():
        (places,) = draw(len(questions), name, test=data.test or len(questions))
        chosen[name] = [questions[i] for i in sorted(places)]
    return HubSets(train, validation, chosen)


def read_rows(
    data: DataOptions, name: str, subset: str | None, split: str, read: Callable[[Any], _Read]
) -> list[_Read]:
    """Return what `read` makes of each row of a split.

    Args:
        data: its source is "hub", or a folder with a folder `NAME` or `NAME/SUBSET` for each set,
            as `datasets` saves them.

    Raises DataError for a set that cannot be had, or a row that `read` cannot read.
    """
    source = name
    if data.source != HUB:
        folder = Path(str(data.source), name)
        source = str(folder / subset if subset and (folder / subset).is_dir() else folder)
        if not Path(source).is_dir():
            raise DataError(
                f"there is no folder {source!r}; give data.source={HUB} (evatune evaluate: no"
                " --data), or a folder with copies of the sets by their ids on the hub"
            )
    with reading(source, "data", _INSTEAD):
        rows = load_split(source, split, subset)
    problems = []
    for number, row in enumerate(rows):
        try:
            problems.append(read(row))
        except (KeyError, ValueError, IndexError, TypeError, AttributeError) as error:
            raise DataError(
                f"row {number} of {source!r}, split {split!r}, is no question with its right"
                f" answer ({type(error).__name__}: {error}); get the data set anew"
            ) from error
    return problems
