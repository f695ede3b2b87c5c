"""Forward passes with hooks keep a GPU busy: nothing between their start and end waits for it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from evatune.capture import InputRecorder, Masks, SharedInputs, find_target_layers, selector_for
from evatune.modeling.state import as_base
from evatune.sketch import TOKEN_COUNTS, Sketch, SketchSettings, make_sketch, refresh_all
from tests.gpu.helpers import words
from tests.helpers import tiny_bert, tiny_llama

pytestmark = pytest.mark.gpu


class Layers(nn.Module):
    """A layer of each type, none of which reads a value by itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(60, 16)
        self.up, self.down = nn.Linear(16, 48), Conv1D(16, 48)
        self.conv = nn.Conv1d(16, 16, 3, padding=1)
        self.attn = nn.MultiheadAttention(16, 2, batch_first=True)
        self.picture = nn.Conv2d(1, 4, 2, stride=2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.table(input_ids)
        x = x + self.down(torch.tanh(self.up(x)))
        x = x + self.conv(x.transpose(1, 2)).transpose(1, 2)
        x = x + self.attn(x, x, x, need_weights=False)[0]
        return self.picture(x[:, None])


TARGETS = ["table", "up", "down", "conv", "attn", "picture"]


def recorded(
    model: nn.Module, targets: Any, kind: str, center: bool = False
) -> tuple[SharedInputs, Callable[[dict[str, Tensor], Any], None]]:
    """Sketches of the layers, and what runs the model on a batch inside a context of one's own."""
    target_layers = find_target_layers(model, targets)

    def build(target_layer: Any, device: torch.device) -> Sketch:
        chosen = TOKEN_COUNTS if target_layer.input_view.is_tokens else kind
        settings = SketchSettings(target_layer.in_features, 8, center=center, device=device)
        return make_sketch(chosen, settings)

    shared_inputs, select = SharedInputs(build), selector_for(model, False, -100)
    recorder = InputRecorder(target_layers, shared_inputs, masks=Masks(model, target_layers))

    def run(batch: dict[str, Tensor], inside: Any) -> None:
        with as_base(model), torch.no_grad(), recorder.watching(batch, select(batch)), inside:
            model(**batch)
            shared_inputs.end_of_forward()

    return shared_inputs, run


@contextmanager
def waiting(mode: str) -> Iterator[None]:
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextmanager
def waits_counted(counts: list[int]) -> Iterator[None]:
    """Append how often the device was waited for while this was open."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with waiting("warn"):
            yield
    counts.append(sum("synchronizing CUDA operation" in str(each.message) for each in caught))


def test_a_wait_is_seen_where_there_is_one(device: torch.device) -> None:
    value, counts = torch.ones((), device=device), []
    with waits_counted(counts):
        float(value)
    assert counts[0] > 0
    with waiting("error"), pytest.raises(RuntimeError, match="synchronizing"):
        float(value)


@pytest.mark.parametrize("kind", ["nystrom", "exact"])
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_layer_waits_for_the_gpu(
    dtype: torch.dtype, padded: bool, center: bool, kind: str, device: torch.device
) -> None:
    """Per batch one mask and one look for NaN may wait; between them, a forward pass with every
    hook must not, once the first has made the sketches."""
    model = Layers().eval().to(device, dtype)
    data = [{key: value.to(device) for key, value in batch.items()} for batch in words()]
    if not padded:
        data = [{"input_ids": batch["input_ids"]} for batch in data]
    shared_inputs, run = recorded(model, TARGETS, kind, center)
    run(data[0], waiting("default"))
    for number, batch in enumerate(data[1:]):
        run(batch, waiting("error"))
        if number == 1:  # there are directions now, whose energy on fresh rows is counted
            refresh_all([group.sketch for group in shared_inputs.groups])
    assert len(shared_inputs.groups) == 7
    assert all(group.sketch.count for group in shared_inputs.groups)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("build", [tiny_bert, tiny_llama])
def test_hooks_wait_no_more_often_than_the_model_itself(
    build: Callable[[], nn.Module], dtype: torch.dtype, device: torch.device
) -> None:
    """Models of transformers look at their mask themselves."""
    model = build().to(device, dtype)
    data = [{key: value.to(device) for key, value in batch.items()} for batch in words()]
    bare: list[int] = []
    hooked: list[int] = []
    with torch.no_grad():
        model(**data[0])
        for batch in data[1:]:
            with waits_counted(bare):
                model(**batch)
    _, run = recorded(model, "all-linear", "nystrom")
    run(data[0], waiting("default"))
    for batch in data[1:]:
        run(batch, waits_counted(hooked))
    assert all(ours <= own for ours, own in zip(hooked, bare, strict=True)), (hooked, bare)
