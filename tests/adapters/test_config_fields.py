"""What PEFT decides from each field of a LoraConfig comes out as with plain LoRA."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.config import (
    ArrowConfig,
    BdLoraConfig,
    KasaConfig,
    MontecloraConfig,
    VeloraConfig,
)
from peft.tuners.lora.variants import DoraLinearVariant
from safetensors.torch import load_file
from torch import Tensor, nn

import evatune
from evatune.adapters.compat import get_eva_state_dict, initialize_lora_eva_weights
from evatune.adapters.saved import adapter_rows
from evatune.errors import AdapterError, DataError
from tests.helpers import round_trip, tokens

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings(
    "ignore:Setting `save_embedding_layers`",
    "ignore:Model has `tie_word_embeddings=True`",
    "ignore:Adapter 'default'.*LoRA tensor",  # PEFT takes a bias of B for a shard
    "ignore:The following .*_pattern keys.*experts",  # and looks for parameters among modules
)

GONE = "model.layers.0.self_attn.q_proj"
SIZES: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def llama(**options: Any) -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES | options)).eval()


def tied_llama() -> Any:
    return llama(tie_word_embeddings=True)


def biased_llama() -> Any:
    return llama(attention_bias=True)


def mixtral() -> Any:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**SIZES, num_local_experts=2, num_experts_per_tok=1)
    return transformers.MixtralForCausalLM(config).eval()


class Gated(nn.Module):
    """A layer inside a module that has stacked weights of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(16, 16)
        self.experts = nn.Parameter(torch.randn(2, 16, 16) / 4)

    def forward(self, x: Tensor) -> Tensor:
        products = [x @ self.experts[0].T, x @ self.experts[1].T]
        return torch.stack(products).sum(0) * self.gate(x).tanh()


class Odd(nn.Module):
    """Layers named as no regular expression would be written."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(60, 16)
        self.layers = nn.ModuleDict({name: nn.Linear(16, 16) for name in ("a+b", "a+b+", "c(d")})
        self.layers["gated"] = Gated()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Any:
        x = self.table(input_ids)
        for layer in self.layers.values():
            x = x + layer(x).tanh()
        return transformers.modeling_outputs.CausalLMOutput(logits=x)


def with_new_tokens(model: Any) -> Any:
    """The user gives rows of the embedding that no token had so far to new ones."""
    with torch.no_grad():
        model.get_input_embeddings().weight[55:] = 0.3
    return model


def adapted(model: Any, **options: Any) -> PeftModel:
    usual = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"}
    return get_peft_model(model, LoraConfig(**usual | options))


def redistributed(model: Any, *gone: str) -> evatune.Calibration:
    """Initialize from a calibration by which layers `gone` are worth nothing, others more or
    less."""
    found = evatune.calibrate(model, tokens(4), evatune.CalibrationConfig(components=8))
    spectra = {}
    for place, (name, spectrum) in enumerate(found.spectra.items()):
        factor = 1e6 if name.startswith(gone) else 1 + place % 3
        spectra[name] = replace(spectrum, total_energy=spectrum.total_energy * factor)
    return evatune.initialize(model, replace(found, spectra=spectra))


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    return {
        path.removeprefix("base_model.model."): layer
        for path, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def train(model: nn.Module) -> None:
    """Every parameter that trains, moved at random."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)


def logits(model: nn.Module) -> Tensor:
    ids = torch.cat([tokens()[0]["input_ids"], torch.arange(48, 60)[None]])
    return model.eval()(input_ids=ids).logits.detach()


def beside_lora(folder: Path, gone: list[str]) -> set[str]:
    """Names of what was saved besides A and B, but in the layers `gone`."""
    without = tuple(f"base_model.model.{name}." for name in gone)
    keys = load_file(folder / "adapter_model.safetensors").keys()
    beside = {key for key in keys if ".lora_" not in key}
    return {key for key in beside if not (without and key.startswith(without))}


@dataclass(frozen=True)
class Case:
    options: dict[str, Any]
    build: Callable[[], Any] = llama
    change: Callable[[Any], Any] = lambda model: model
    gone: str = GONE
    # Fields, or parts of them, that must be there afterwards.
    keeps: dict[str, Any] = field(default_factory=dict)


LIST = ["q_proj", "v_proj"]
REGEX = r"model\..*\.(q_proj|v_proj)|.*embed_tokens"
CASES = {
    "list": Case({"target_modules": LIST}),
    "an ending of which no layer is gone": Case(
        {"target_modules": ["v_proj", "layers.0.self_attn.q_proj"]},
        keeps={"target_modules": {"v_proj"}},
    ),
    "regular expression": Case({"target_modules": r".*\.(q_proj|v_proj)"}),
    "all-linear": Case({"target_modules": "all-linear"}),
    "layers_to_transform": Case(
        {
            "target_modules": ["q_proj", "v_proj"],
            "layers_to_transform": [1],
            "layers_pattern": "layers",
        },
        gone="model.layers.1.self_attn.q_proj",
        keeps={"layers_to_transform": [1], "layers_pattern": "layers"},
    ),
    "exclude_modules": Case(
        {"target_modules": LIST, "exclude_modules": ["layers.1.self_attn.v_proj"]},
        keeps={"exclude_modules": {"layers.1.self_attn.v_proj"}},
    ),
    "exclude_modules by regular expression": Case(
        {"target_modules": r".*_proj", "exclude_modules": r".*\.1\..*"},
        keeps={"exclude_modules": r".*\.1\..*"},
    ),
    "rank_pattern and alpha_pattern": Case(
        {
            "target_modules": LIST,
            "rank_pattern": {"v_proj": 2},
            "alpha_pattern": {r"layers\.1\..*": 3},
        }
    ),
    "rsLoRA": Case({"target_modules": LIST, "use_rslora": True}),
    "bias of all": Case({"target_modules": LIST, "bias": "all"}, build=biased_llama),
    "bias of adapted layers": Case(
        {"target_modules": LIST, "bias": "lora_only"}, build=biased_llama
    ),
    "modules_to_save": Case({"target_modules": LIST, "modules_to_save": ["lm_head"]}),
    "embeddings in modules_to_save": Case(
        {"target_modules": LIST, "modules_to_save": ["embed_tokens", "lm_head"]}
    ),
    "trainable_token_indices": Case({"target_modules": LIST, "trainable_token_indices": [56, 57]}),
    "trainable_token_indices, tied": Case(
        {"target_modules": LIST, "trainable_token_indices": [56]}, build=tied_llama
    ),
    "embedding": Case(
        {"target_modules": ["q_proj", "embed_tokens"]},
        change=with_new_tokens,
        keeps={"target_modules": {"embed_tokens", "model.layers.1.self_attn.q_proj"}},
    ),
    "embedding worth nothing": Case(
        {"target_modules": ["q_proj", "embed_tokens"]},
        change=with_new_tokens,
        gone="model.embed_tokens",
    ),
    "embedding by regular expression": Case({"target_modules": REGEX}, change=with_new_tokens),
    "head worth nothing": Case(
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
        change=with_new_tokens,
        gone="lm_head",
    ),
    "tied adapters": Case(
        {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
        build=tied_llama,
    ),
    "tied adapters, worth nothing": Case(
        {"target_modules": ["q_proj", "lm_head"], "ensure_weight_tying": True, "use_rslora": True},
        build=tied_llama,
        gone="model.embed_tokens",
    ),
    "tied adapters by regular expression": Case(
        {"target_modules": REGEX, "ensure_weight_tying": True}, build=tied_llama
    ),
    "tied modules_to_save": Case(
        {
            "target_modules": ["q_proj"],
            "modules_to_save": ["embed_tokens"],
            "ensure_weight_tying": True,
        },
        build=tied_llama,
    ),
    "layer_replication": Case({"target_modules": LIST, "layer_replication": [[0, 2], [1, 2]]}),
    "names that patterns would misread": Case(
        {"target_modules": ["a+b", "a+b+", "c(d"], "task_type": None},
        build=lambda: Odd(),
        gone="layers.c(d",
    ),
    "a layer inside a module with an adapted parameter": Case(
        {
            "target_modules": ["gate", "a+b"],
            "target_parameters": ["gated.experts"],
            "task_type": None,
        },
        build=lambda: Odd(),
        gone="layers.a+b",
    ),
    "target_parameters": Case(
        {"target_modules": ["q_proj"], "target_parameters": EXPERTS},
        build=mixtral,
        keeps={"target_parameters": EXPERTS[::-1]},  # the last one that PEFT wraps is the outermost
    ),
    "target_parameters, one worth nothing": Case(
        {"target_modules": [], "target_parameters": EXPERTS},
        build=mixtral,
        gone="model.layers.0.mlp.experts.down_proj",
    ),
    "DoRA": Case({"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}),
    "bias of B": Case({"target_modules": LIST, "lora_bias": True}, build=biased_llama),
    "VeLoRA": Case({"target_modules": LIST, "velora_config": VeloraConfig(num_groups=4)}),
    "MonteCLoRA": Case(
        {
            "target_modules": LIST,
            "monteclora_config": MontecloraConfig(num_samples=2, buffer_size=4),
        }
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_what_is_saved_trained_and_loaded_is_what_it_is_with_plain_lora(
    case: Case, tmp_path: Path
) -> None:
    plain, model = (
        adapted(case.change(case.build()), **copy.deepcopy(case.options)) for _ in range(2)
    )
    before = logits(model)
    ranks = redistributed(model, case.gone).allocate().ranks
    assert len(set(ranks.values())) > 1
    assert torch.allclose(logits(model), before, atol=1e-5)
    config = model.peft_config["default"]
    for name, value in case.keeps.items():
        now = getattr(config, name)
        assert now == value or value < now
    assert type(config.target_modules) is type(plain.peft_config["default"].target_modules)

    train(model)
    want = logits(model)
    for peft_model, folder in ((model, tmp_path / "eva"), (plain, tmp_path / "plain")):
        peft_model.save_pretrained(folder)
    gone = [name for name, rank in ranks.items() if not rank]
    assert beside_lora(tmp_path / "eva", gone) == beside_lora(tmp_path / "plain", gone)
    loaded = PeftModel.from_pretrained(case.build(), str(tmp_path / "eva"), is_trainable=True)
    assert trained(loaded) == trained(model)
    assert torch.allclose(logits(loaded), want, atol=1e-5)


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


@pytest.mark.parametrize("gone", ["model.embed_tokens", "lm_head"])
def test_new_rows_of_a_resized_vocabulary_are_saved_whatever_gets_no_rank(
    gone: str, tmp_path: Path
) -> None:
    llama().save_pretrained(tmp_path / "base")

    def resized(seed: int) -> Any:
        torch.manual_seed(seed)
        model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
        model.resize_token_embeddings(64, mean_resizing=False)
        return model

    model = adapted(resized(1), target_modules=["q_proj", "model.embed_tokens", "model.lm_head"])
    redistributed(model, gone)
    train(model)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(resized(2), str(tmp_path / "adapter"))
    assert torch.equal(logits(loaded), logits(model))


def test_what_transformers_saves_it_loads(tmp_path: Path) -> None:
    model, loaded = llama(), llama()
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    redistributed(model, GONE)
    train(model)
    model.save_pretrained(tmp_path)
    loaded.load_adapter(str(tmp_path))
    assert torch.equal(logits(loaded), logits(model))


def test_the_one_rank_of_an_embedding_is_part_of_the_record(tmp_path: Path) -> None:
    model = adapted(llama(), target_modules=["q_proj", "embed_tokens"])
    calibration = evatune.initialize(model, tokens(4))
    assert calibration.allocate().ranks["model.embed_tokens"] == 1
    calibration.save(tmp_path / "calibration.safetensors")
    again = evatune.Calibration.load(tmp_path / "calibration.safetensors")
    assert again.allocate() == calibration.allocate()


# -- the caller's config ---------------------------------------------------------------------------


def by_initialize(model: PeftModel, adapter_name: str = "default") -> None:
    evatune.initialize(model, tokens(4), adapter_name=adapter_name)


def by_compat(model: PeftModel, adapter_name: str = "default") -> None:
    initialize_lora_eva_weights(
        model, tokens(4), adapter_name=adapter_name, show_progress_bar=False
    )


@pytest.mark.parametrize(
    ("initialize", "start"), [(by_initialize, True), (by_initialize, "eva"), (by_compat, "eva")]
)
def test_a_config_that_two_models_share_is_as_it_was(
    initialize: Any, start: Any, tmp_path: Path
) -> None:
    eva = EvaConfig(rho=3.0) if start == "eva" else None
    shared = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=start, eva_config=eva
    )
    models = [get_peft_model(llama(), shared) for _ in range(2)]
    before = copy.deepcopy(shared)
    initialize(models[0])
    assert shared == before
    assert models[1].peft_config["default"] is shared
    initialize(models[1])
    assert shared == before
    assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in models), strict=True))
    for place, model in enumerate(models):
        train(model)
        model.save_pretrained(tmp_path / str(place))
        assert torch.equal(
            logits(PeftModel.from_pretrained(llama(), str(tmp_path / str(place)))), logits(model)
        )


def test_a_second_adapter_of_the_same_config_is_not_touched(tmp_path: Path) -> None:
    shared = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(llama(), shared)
    model.add_adapter("ref", shared)
    redistributed(model, GONE)
    assert model.peft_config["ref"] is shared
    assert {layer.r["ref"] for layer in lora_layers(model).values()} == {4}
    model.add_adapter("third", shared)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), str(tmp_path))
    for name in ("ref", "third"):
        loaded.load_adapter(str(tmp_path / name), name)
        assert {layer.r[name] for layer in lora_layers(loaded).values()} == {4}


def test_nothing_inside_the_new_config_is_the_callers() -> None:
    pattern, excluded = {"v_proj": 2}, {"layers.1.self_attn.v_proj"}
    shared = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], rank_pattern=pattern, exclude_modules=excluded
    )
    model = llama()
    model.add_adapter(shared)  # transformers' own door keeps the config in a place of its own
    evatune.initialize(model, tokens(4))
    own = model.peft_config["default"]
    assert own is not shared
    assert (shared.rank_pattern, shared.exclude_modules) == (
        {"v_proj": 2},
        {"layers.1.self_attn.v_proj"},
    )
    assert own.exclude_modules is not shared.exclude_modules
    assert own.runtime_config is not shared.runtime_config


# -- adapters that are added up, and others beside -------------------------------------------------


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], r".*\.(q_proj|v_proj)"])
def test_adapters_add_up_where_one_of_them_lacks_a_layer(targets: Any) -> None:
    model = adapted(llama(), target_modules=targets)
    model.add_adapter("other", LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    redistributed(model, GONE)
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum", combination_type="cat")
    model.set_adapter("other")
    alone = logits(model)
    model.set_adapter("sum")  # B of "default" is 0
    assert torch.allclose(logits(model), alone, atol=1e-5)


def test_another_adapter_on_the_same_parameters_can_be_added() -> None:
    model = adapted(mixtral(), target_modules=[], target_parameters=EXPERTS)
    redistributed(model)
    model.add_adapter("other", LoraConfig(r=4, target_modules=[], target_parameters=EXPERTS))
    assert model.peft_config["default"].rank_pattern


def test_inspect_names_parameters_that_the_config_gives_by_their_ending(tmp_path: Path) -> None:
    keys = [name.rpartition(".")[2] for name in EXPERTS]
    model = adapted(mixtral(), target_modules=[], target_parameters=keys)
    ranks = redistributed(model).allocate().ranks
    model.save_pretrained(tmp_path)
    rows = adapter_rows(tmp_path / "adapter_model.safetensors")
    assert {row["layer"]: row["rank"] for row in rows} == {
        name.rpartition(".")[0]: rank for name, rank in ranks.items()
    }


# -- tied adapters ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rho", [1.0, 2.0])
# in 16 bits PEFT's own are apart
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("meta", [False, True])
def test_adapters_of_tied_layers_are_one_set_of_weights(
    rho: float, dtype: torch.dtype, meta: bool
) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], ensure_weight_tying=True)
    model = get_peft_model(tied_llama().to(dtype), config, low_cpu_mem_usage=meta)
    layers = lora_layers(model)
    table, head = layers["model.embed_tokens"], layers["lm_head"]
    evatune.initialize(model, tokens(4), rho=rho)
    a, b = table.lora_embedding_A["default"], table.lora_embedding_B["default"]
    assert set(a.unique().tolist()) == {0.0, 1.0}
    assert head.r["default"] == table.r["default"] == len(a)
    assert head.scaling["default"] == table.scaling["default"]
    for _ in range(2):
        assert torch.equal(head.lora_A["default"].weight, b.T)
        assert torch.equal(head.lora_B["default"].weight, a.T)
        with torch.no_grad():
            head.lora_A["default"].weight.add_(1.0)
            table.lora_embedding_A["default"].add_(1.0)


def test_pefts_names_leave_tied_adapters_tied() -> None:
    options: dict[str, Any] = {
        "ensure_weight_tying": True,
        "init_lora_weights": "eva",
        "eva_config": EvaConfig(),
    }
    model = adapted(tied_llama(), target_modules=["q_proj", "embed_tokens"], **options)
    with pytest.warns(UserWarning, match="not found in the eva state_dict: model.embed_tokens"):
        by_compat(model)
    layers = lora_layers(model)
    b = layers["model.embed_tokens"].lora_embedding_B["default"]
    assert layers["lm_head"].lora_A["default"].weight.data_ptr() == b.data_ptr()


# -- variants --------------------------------------------------------------------------------------


class SomethingNew(DoraLinearVariant):
    """A variant of a PEFT that is to come."""


def of_something_new() -> PeftModel:
    model = adapted(llama(), target_modules=["q_proj"])
    lora_layers(model)[GONE].lora_variant["default"] = SomethingNew()
    return model


def unbuilt(option: str, value: Any) -> Callable[[], PeftModel]:
    """With an option that PEFT takes on other layers, or together with other adapters only."""

    def build() -> PeftModel:
        model = adapted(llama(), target_modules=["q_proj"])
        setattr(model.peft_config["default"], option, value)
        return model

    return build


def of(**options: Any) -> Callable[[], PeftModel]:
    return lambda: adapted(llama(), target_modules=["q_proj"], **options)


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (of(init_lora_weights="mica"), "MiCA.*freezes B"),
        (of(init_lora_weights="pissa"), "'pissa', which changes the base weights"),
        (of(kasa_config=KasaConfig()), "kasa_config set.*takes singular values off"),
        (
            of(use_bdlora=BdLoraConfig(target_modules_bd_a=["q_proj"], nblocks=2)),
            "use_bdlora set.*block-diagonal",
        ),
        (unbuilt("arrow_config", ArrowConfig()), "arrow_config set.*routes"),
        (unbuilt("use_qalora", True), "use_qalora set.*group means"),
        (of_something_new, f"SomethingNew, for example at {GONE}"),
    ],
)
def test_variants_that_do_not_fit_are_refused_by_name(
    build: Callable[[], PeftModel], text: str
) -> None:
    model = build()
    before = parameters(model)
    for options in ({}, {"overwrite": True}):
        with pytest.raises(AdapterError, match=text):
            evatune.initialize(model, tokens(4), **options)
    model.peft_config["default"].eva_config = EvaConfig()
    with pytest.raises(AdapterError, match=text):
        get_eva_state_dict(model, tokens(4), show_progress_bar=False)
    assert all(torch.equal(value, before[name]) for name, value in parameters(model).items())


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_dora_fits_convolutions(dimensions: int, tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
        return nn.Sequential(conv(3, 8, 2), nn.Tanh(), conv(8, 8, 2))

    batches = [torch.randn(4, 3, *[5] * dimensions) for _ in range(4)]
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2"], use_dora=True)
    round_trip(build, lora, batches, tmp_path)


INVOCATION = [58, 59]


def invoking(count: int = 4) -> list[dict[str, Tensor]]:
    """Batches whose texts have the invocation at different places, twice, or not at all."""
    batches = tokens(count, padded=True)
    for batch in batches:
        batch["input_ids"].clamp_(max=57)
        for row, places in enumerate(([4], [], [0], [2, 7])):
            for place in places:
                batch["input_ids"][row, place : place + 2] = torch.tensor(INVOCATION)
    return batches


def after_invocation(x: Tensor, batch: dict[str, Tensor], name: str) -> Tensor:
    kept = torch.zeros(4, 12, dtype=torch.bool)
    kept[0, 4:], kept[2, 0:], kept[3, 7:] = True, True, True
    return x[kept & batch["attention_mask"].bool()]


@pytest.mark.filterwarnings("ignore:Cannot calculate aLoRA offsets")
def test_of_activated_lora_the_rows_from_the_invocation_on_count(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "target_modules": ["q_proj", "v_proj"],
        "alora_invocation_tokens": INVOCATION,
    }
    model, other = adapted(llama(), **options), adapted(llama(), **options)
    found = evatune.initialize(model, invoking())
    chosen = evatune.initialize(other, invoking(), rows=after_invocation)
    assert found.spectra[GONE].rows == chosen.spectra[GONE].rows == 4 * (3 + 3 + 5)
    assert all(
        torch.allclose(a, b, atol=1e-5)
        for a, b in zip(model.parameters(), other.parameters(), strict=True)
    )
    train(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), str(tmp_path)).eval()
    batch = invoking()[0]
    assert torch.allclose(loaded(**batch).logits, model.eval()(**batch).logits, atol=1e-5)


def test_activated_lora_needs_its_tokens_in_the_data() -> None:
    model = adapted(llama(), target_modules=["q_proj"], alora_invocation_tokens=[1, 2])
    with pytest.raises(DataError, match=r"alora_invocation_tokens=\[1, 2\].*occur in no batch"):
        evatune.initialize(model, tokens(4))
    embedded = [{"inputs_embeds": torch.randn(2, 5, 16)}]
    with pytest.raises(DataError, match="no input_ids"):
        evatune.initialize(model, embedded)
