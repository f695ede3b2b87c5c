"""Whatever torch is set to around a call, what is ours comes out the same."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import evatune
from evatune import CalibrationConfig
from evatune.adapters.compat import initialize_lora_eva_weights
from evatune.errors import AdapterError
from evatune.sketch import SKETCHES
from tests.helpers import Toy, inputs, matrices

SOURCE = Path(evatune.__file__).parent
# Functions that make a tensor of nothing but sizes and numbers.
FACTORIES = {
    "arange",
    "as_tensor",
    "asarray",
    "empty",
    "eye",
    "full",
    "linspace",
    "logspace",
    "normal",
    "ones",
    "rand",
    "randint",
    "randn",
    "randperm",
    "range",
    "scalar_tensor",
    "sparse_coo_tensor",
    "tensor",
    "tril_indices",
    "triu_indices",
    "zeros",
}


def calls_without_dtype_and_device(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        owner, name = ast.unparse(node.func.value), node.func.attr
        given = {keyword.arg for keyword in node.keywords}
        where = f"{path.relative_to(SOURCE)}:{node.lineno} {owner}.{name}"
        if owner == "torch" and name in FACTORIES and not given >= {"dtype", "device"}:
            yield where
        if (owner, name) == ("torch", "Generator") and not node.args and "device" not in given:
            yield where


def test_every_tensor_that_we_make_has_its_dtype_and_device_written_out() -> None:
    found = [
        call
        for path in sorted(SOURCE.rglob("*.py"))
        for call in calls_without_dtype_and_device(path)
    ]
    assert not found, "\n".join(found)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def fast_products() -> Iterator[None]:
    torch.set_float32_matmul_precision("medium")
    try:
        yield
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


STATES: dict[str, Callable[[], Any]] = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float16": lambda: default_dtype(torch.float16),
    # meta: a stand-in for an accelerator, since what is made there has no values
    "default device": default_device,
    "device context": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "deterministic": deterministic,
    "anomaly": lambda: torch.autograd.set_detect_anomaly(True),
    "fast products": fast_products,
    "forked generators": lambda: torch.random.fork_rng(devices=[]),
}


class Words(nn.Module):
    """An embedding, two layers and a convolution, none of which makes a tensor of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.conv(self.embedding(ids).transpose(1, 2)).transpose(1, 2)
        return x + self.down(torch.relu(self.up(x)))


def adapted(model: nn.Module, **options: Any) -> PeftModel:
    return get_peft_model(
        model, LoraConfig(r=4, target_modules=["up", "down", "embedding", "conv", "q"], **options)
    )


def outcome(
    sketch: str = "nystrom", **options: Any
) -> Callable[[], tuple[dict[str, Tensor], PeftModel]]:
    """What initializes a model that is built beforehand, and returns every A and direction."""
    torch.manual_seed(0)
    words = sketch == "nystrom"
    model = adapted(Words() if words else Toy())
    ids = torch.randint(0, 20, (6, 4, 16), generator=torch.Generator().manual_seed(0))
    batches = list(ids) if words else inputs()
    config = CalibrationConfig(rank=4, sketch=sketch, center=not words)

    def run() -> tuple[dict[str, Tensor], PeftModel]:
        found = evatune.initialize(model, batches, config=config, **options)
        merged = evatune.Calibration.merge([found, found])
        known = {
            f"{name} directions": spectrum.directions for name, spectrum in merged.spectra.items()
        }
        known |= {
            f"{name} variances": spectrum.variances for name, spectrum in found.spectra.items()
        }
        return known | {f"{name} A": a for name, a in matrices(model, "A").items()}, model

    return run


@pytest.fixture(scope="module")
def usual() -> dict[str, dict[str, Tensor]]:
    return {sketch: outcome(sketch, scale="matched")()[0] for sketch in SKETCHES}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("sketch", SKETCHES)
def test_the_result_is_the_same_bit_for_bit_in_every_state_of_torch(
    state: str, sketch: str, usual: dict[str, dict[str, Tensor]]
) -> None:
    run = outcome(sketch, scale="matched")
    with STATES[state]():
        found, model = run()
    assert found.keys() == usual[sketch].keys()
    for name, value in usual[sketch].items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name
    for name, parameter in model.named_parameters():
        assert not parameter.is_inference(), name
        assert parameter.dtype == torch.float32, name
        assert parameter.device.type == "cpu", name
        assert parameter.requires_grad == ("lora_" in name), name


def test_under_autocast_only_the_models_own_numbers_are_of_16_bits(
    usual: dict[str, dict[str, Tensor]],
) -> None:
    """The first layer's input is the batch, so its result is the same bit for bit; others are to
    bfloat16's rounding."""
    run = outcome("exact", scale="matched")
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = run()
    for name in ("blocks.0.q directions", "blocks.0.q variances"):
        assert torch.equal(found[name], usual["exact"][name])
    for name in (name for name in found if name.endswith("variances")):
        assert torch.allclose(found[name][:4], usual["exact"][name][:4], rtol=0.03)


def test_batches_made_in_inference_mode_can_be_written_to_by_the_model() -> None:
    with torch.inference_mode():
        batches = inputs()
    calibration = evatune.calibrate(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(16, 4)), batches)
    assert calibration.spectra["1"].rows == 6 * 64


@pytest.mark.parametrize("base", [True, False])
def test_a_model_or_adapter_made_in_inference_mode_is_refused_since_it_cannot_be_trained(
    base: bool,
) -> None:
    with torch.inference_mode() if base else nullcontext():
        model: nn.Module = Toy()
    with torch.inference_mode():
        model = adapted(model, init_lora_weights="eva", eva_config=EvaConfig())
    for door in (evatune.initialize, initialize_lora_eva_weights):
        with pytest.raises(
            AdapterError, match=r"blocks\.0\..* was made under torch.inference_mode\(\)"
        ):
            door(model, inputs())


@pytest.mark.parametrize("state", ["float64", "bfloat16", "default device", "inference mode"])
def test_layers_that_pefts_way_finds_nothing_for_start_as_usual_in_every_state(state: str) -> None:
    model = adapted(Toy(), init_lora_weights="eva", eva_config=EvaConfig())
    layers = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
    directions = {layers[0]: torch.linalg.qr(torch.randn(16, 2))[0].T.contiguous()}
    with ExitStack() as stack:
        stack.enter_context(STATES[state]())
        stack.enter_context(pytest.warns(UserWarning, match="not found in the eva"))
        initialize_lora_eva_weights(model, eva_state_dict=directions)
    for name, parameter in model.named_parameters():
        assert (parameter.dtype, parameter.device.type) == (torch.float32, "cpu"), name
        assert "lora_A" not in name or parameter.any(), name
