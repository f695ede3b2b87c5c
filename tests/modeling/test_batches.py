"""What is given for batches, and is none: one sentence that says what to do; and what works is let
through."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from datasets import Dataset, DatasetDict
from torch import Tensor, nn
from transformers import BatchEncoding

import evatune
from evatune.errors import ConfigError, DataError
from evatune.modeling.batches import map_tensors, tensors_in
from tests.helpers import EXACT, Toy, inputs, tiny_llama, tokens

torch.set_num_threads(1)


class Pair(NamedTuple):
    x: Tensor
    y: Any


@dataclass(frozen=True)
class Example:
    x: Any
    name: str = "a"


def test_every_container_gives_its_tensors_in_order_and_is_mapped_to_its_own_kind() -> None:
    one, two, three, four = torch.arange(4.0)
    batch = {"a": [one, "text"], "b": Pair(two, Example(three)), "c": UserDict({"d": (four, 1)})}
    assert [int(tensor) for tensor in tensors_in(batch)] == [0, 1, 2, 3]
    mapped = map_tensors(batch, lambda tensor: tensor + 1)
    assert mapped == {
        "a": [one + 1, "text"],
        "b": Pair(two + 1, Example(three + 1)),
        "c": UserDict({"d": (four + 1, 1)}),
    }
    assert batch["b"] == Pair(two, Example(three))


def some_ids() -> list[list[int]]:
    return torch.randint(3, 60, (8, 12), generator=torch.Generator().manual_seed(0)).tolist()


SINGLE = (
    r"each batch is a single example \(input_ids .*DataLoader\(dataset, batch_size=…,"
    r" collate_fn=…\)"
)
TEXT = r"each batch is text .*tokenizer\("
NO_BATCHES: dict[str, tuple[Callable[[], Any], str]] = {
    "rows of tensors": (
        lambda: Dataset.from_dict({"input_ids": some_ids()}).with_format("torch"),
        SINGLE,
    ),
    "rows of lists": (lambda: Dataset.from_dict({"input_ids": some_ids()}), SINGLE),
    "rows of lists beside texts": (
        lambda: [{"text": "a", "input_ids": ids} for ids in some_ids()],
        SINGLE,
    ),
    "rows of texts": (lambda: Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}), TEXT),
    "texts": (lambda: ["a text", "another"], TEXT),
    "batches of texts": (
        lambda: torch.utils.data.DataLoader(["a", "b", "c", "d"], batch_size=2),
        TEXT,
    ),
    "a loader without a collator": (
        lambda: torch.utils.data.DataLoader(
            [{"input_ids": ids} for ids in some_ids()],
            batch_size=4,
            collate_fn=lambda examples: examples,
        ),
        r"each batch is a list of 4 single examples \(dict\).*collat",
    ),
    "an empty text": (
        lambda: [{"input_ids": torch.zeros(1, 0, dtype=torch.long)}],
        r"a batch is empty \(a tensor of shape \(1, 0\)\); leave out .*empty texts",
    ),
    "tokenized without tensors": (
        lambda: [{"input_ids": some_ids()}],
        r"input_ids of each batch is a list of 8 and not a tensor",
    ),
    "encodings": (lambda: [object()], r"each batch is of type object, without a tensor in it"),
    "tensors of one dimension": (lambda: [torch.tensor(ids) for ids in some_ids()], SINGLE),
    "what a policy has made": (
        lambda: [
            {"prompt_ids": torch.tensor(some_ids()), "completion_ids": torch.tensor(some_ids())}
        ],
        r"GRPOTrainer and its like; call evatune.initialize\(trainer\), which reads its prompts",
    ),
    "splits": (lambda: DatasetDict(train=Dataset.from_dict({"a": [1]})), r"batches\['train'\]"),
    "a file's name": (lambda: "data.jsonl", r"batches is a str, 'data.jsonl', which is not opened"),
    "a path": (lambda: Path("data.jsonl"), r"batches is a PosixPath, 'data.jsonl'"),
    "one tokenized batch": (
        lambda: BatchEncoding(tokens(1)[0]),
        "a single BatchEncoding; .*a list with this one batch in it",
    ),
}


@pytest.mark.parametrize("kind", NO_BATCHES)
def test_what_holds_no_batches_is_told_what_to_do_in_one_sentence(kind: str) -> None:
    build, text = NO_BATCHES[kind]
    with pytest.raises(DataError, match=text) as caught:
        evatune.calibrate(tiny_llama(), build())
    assert "\n" not in str(caught.value)
    assert not hasattr(caught.value, "__notes__")


@pytest.mark.parametrize(
    "model", [nn.Sequential(nn.Linear(16, 4)), Toy()], ids=["one argument", "three"]
)
def test_pairs_for_a_model_of_one_argument_are_told_which_forward_to_pass(model: nn.Module) -> None:
    pairs = [(x, torch.zeros(4), None, None) for x in inputs()]
    call = r"model\(batch\[0\]\)" if isinstance(model, nn.Sequential) else r"model\(\*batch\[:3\]\)"
    with pytest.raises(
        DataError, match=rf"each batch is a tuple of 4, .*pass forward=lambda model, batch: {call}"
    ):
        evatune.calibrate(model, pairs)
    calibration = evatune.calibrate(
        model, pairs, EXACT, forward=lambda model, batch: model(batch[0])
    )
    assert all(status.usable for status in calibration.status.values())


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"forward": lambda batch: None},
            r"forward is called as forward\(model, batch\), and what was given takes \(batch\)",
        ),
        (
            {"forward": Toy()},
            r"called as forward\(model, batch\), and a module of type Toy was given",
        ),
        (
            {"rows": lambda activation: activation},
            r"rows is called as rows\(activation, batch, layer_name\)",
        ),
    ],
)
def test_functions_of_too_few_arguments_are_refused_before_a_batch_is_read(
    options: dict[str, Any], text: str
) -> None:
    data = iter(inputs())
    with pytest.raises(ConfigError, match=text):
        evatune.calibrate(Toy(), data, **options)
    assert len(list(data)) == 6


def test_errors_of_the_model_itself_stay_what_they_are() -> None:
    class Broken(Toy):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            raise self.error

    model = Broken()
    for error in (
        ValueError("no such thing"),
        IndexError("far away"),
        RuntimeError("out of memory"),
    ):
        model.error = error
        with pytest.raises(type(error), match=str(error)) as caught:
            evatune.calibrate(model, inputs())
        notes = getattr(caught.value, "__notes__", [])
        assert ["default rule" in note for note in notes[:-1]] == (
            [True] if isinstance(error, ValueError) else []
        )
        assert notes[-1] == "in batch 1 of the calibration"


def test_what_only_looks_like_no_batch_and_works_is_let_through() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.layer = nn.Embedding(9, 8), nn.Linear(8, 8)

        def forward(self, texts: list[str]) -> Tensor:
            return self.layer(self.table(torch.tensor([len(text) for text in texts])))

    calibration = evatune.calibrate(
        Reads(), [{"texts": ["a", "bc"] * 8}] * 4, EXACT, targets=["layer"]
    )
    assert calibration.spectra["layer"].rows == 64
    one_by_one = evatune.calibrate(nn.Sequential(nn.Linear(8, 8)), list(torch.randn(20, 8)), EXACT)
    assert one_by_one.spectra["0"].rows == 20
