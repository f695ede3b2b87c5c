"""The two public functions: their signatures, their documentation and what wrong calls get."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

import evatune
from evatune import CalibrationConfig
from evatune.errors import AdapterError, ConfigError, DataError, TargetError
from tests.helpers import Toy, inputs, lora

NEEDED = inspect.Parameter.empty
SIGNATURES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "calibrate": (
        {"model": NEEDED, "batches": NEEDED, "config": None},
        {
            "targets": None,
            "forward": None,
            "rows": None,
            "loss": None,
            "progress": "auto",
            "checkpoint": None,
        },
    ),
    "initialize": (
        {"model": NEEDED, "batches": None},
        {
            "rank": None,
            "rho": None,
            "budget": None,
            "metric": None,
            "scale": None,
            "config": None,
            "forward": None,
            "rows": None,
            "loss": None,
            "adapter_name": "default",
            "overwrite": False,
            "progress": "auto",
            "checkpoint": None,
            "on_unsupported": "error",
        },
    ),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_names_order_and_defaults_of_the_parameters_are_these(name: str) -> None:
    by_place, by_name = SIGNATURES[name]
    found = inspect.signature(getattr(evatune, name)).parameters.values()
    assert [
        (p.name, p.default) for p in found if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    ] == list(by_place.items())
    assert [(p.name, p.default) for p in found if p.kind is inspect.Parameter.KEYWORD_ONLY] == list(
        by_name.items()
    )


@pytest.mark.parametrize("name", SIGNATURES)
def test_the_docstring_explains_every_parameter_and_no_other(name: str) -> None:
    text = inspect.getdoc(getattr(evatune, name)) or ""
    entries = re.findall(r"^    (\w+(?:, \w+)*): ", text.split("Args:\n")[1], re.MULTILINE)
    errors = {kind for kind in evatune.errors.__dict__ if kind.endswith("Error")}
    named = [part for entry in entries for part in entry.split(", ") if part not in errors]
    parameters = inspect.signature(getattr(evatune, name)).parameters
    assert sorted(named) == sorted(parameters)


def trainer() -> Any:
    """What passes for a Trainer until its data is asked for."""
    return SimpleNamespace(get_train_dataloader=list)


Call = Callable[[], Any]
WRONG: list[tuple[Call, type[Exception], str]] = [
    (lambda: evatune.calibrate(Toy(), []), DataError, "batches is empty"),
    (lambda: evatune.calibrate(Toy(), 3), DataError, "cannot be iterated over"),  # type: ignore[arg-type]
    (lambda: evatune.calibrate(Toy(), inputs(), targets="nothing"), TargetError, "match no layer"),
    (
        lambda: evatune.calibrate(Toy(), inputs(), forward=lambda model: None),  # type: ignore
        ConfigError,
        "forward",
    ),
    (
        lambda: evatune.calibrate(Toy(), inputs(), rows=lambda x: x),  # type: ignore
        ConfigError,
        "rows",
    ),
    (lambda: evatune.initialize(lora(Toy())), DataError, "needs batches.*or a Calibration"),
    (lambda: evatune.initialize(trainer(), inputs()), DataError, "leave out the second argument"),
    (lambda: evatune.initialize(Toy(), inputs()), AdapterError, "adapter"),
    (
        lambda: evatune.initialize(lora(Toy()), inputs(), adapter_name="other"),
        AdapterError,
        "'other'.*'?default",
    ),
    (lambda: evatune.initialize(lora(Toy()), inputs(), rank=0), ConfigError, "rank is 0"),
    (lambda: evatune.initialize(lora(Toy()), inputs(), scale="big"), ConfigError, "scale is 'big'"),
    (
        lambda: evatune.initialize(lora(Toy()), inputs(), config=CalibrationConfig(), budget="x"),
        ConfigError,
        "budget is 'x'",
    ),
]


@pytest.mark.parametrize(("call", "error", "text"), WRONG, ids=[text for _, _, text in WRONG])
def test_a_wrong_call_ends_in_one_sentence(call: Call, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text) as caught:
        call()
    message = str(caught.value)
    assert isinstance(caught.value, evatune.EvatuneError)
    assert "\n" not in message
    assert not message.endswith(".")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"config": {"center": True}},
            r"config is \{'center': True\}, a dict; give an evatune.Cal",
        ),
        ({"forward": 3}, "forward is 3; give a function"),
        ({"rows": "all"}, "rows is 'all'; give a function"),
        ({"loss": 3}, "loss is 3; give a function"),
        ({"checkpoint": "x"}, r"checkpoint is 'x'; give an evatune.calibration.Checkpoint"),
        ({"targets": 3}, "targets is 3; give 'all-linear', a list of names"),
        ({"targets": [3]}, r"targets is \[3\]; give 'all-linear'"),
    ],
)
def test_options_of_the_wrong_kind_are_named(options: dict[str, Any], text: str) -> None:
    with pytest.raises(evatune.EvatuneError, match=text):
        evatune.calibrate(Toy(), inputs(), progress=None, **options)


def test_what_is_no_model_is_named() -> None:
    text = r"the model is 'gpt2', a str; give a torch\.nn\.Module"
    for door in (evatune.calibrate, evatune.initialize):
        with pytest.raises(evatune.EvatuneError, match=text):
            door("gpt2", inputs())  # type: ignore[operator]
    trainer = type("Trainer", (), {"get_train_dataloader": None})()
    with pytest.raises(evatune.EvatuneError, match=r"is a Trainer; call evatune.initialize"):
        evatune.calibrate(trainer, inputs())


def test_a_layer_that_a_calibration_does_not_have_is_named() -> None:
    calibration = evatune.calibrate(Toy(), inputs(), progress=None)
    with pytest.raises(evatune.EvatuneError, match="has no layer 'zz'; it has "):
        calibration.captured({"zz": 4})
