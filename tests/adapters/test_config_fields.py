"""What PEFT decides from each field of a LoraConfig comes out as with plain LoRA."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import (
    MontecloraConfig,
    VeloraConfig,
)
from safetensors.torch import load_file
from torch import Tensor, nn

import evatune
from evatune.adapters.compat import initialize_lora_eva_weights
from evatune.adapters.saved import adapter_rows
from tests.adapters.helpers import GONE, adapted, logits, redistributed, train
from tests.helpers import TEXT, lora_layers, tiny_llama, tokens

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings(
    "ignore:Setting `save_embedding_layers`",
    "ignore:Model has `tie_word_embeddings=True`",
    "ignore:Adapter 'default'.*LoRA tensor",  # PEFT takes a bias of B for a shard
    "ignore:The following .*_pattern keys.*experts",  # and looks for parameters among modules
)

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def tied_llama() -> Any:
    return tiny_llama(tie_word_embeddings=True)


def biased_llama() -> Any:
    return tiny_llama(attention_bias=True)


def mixtral() -> Any:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        **TEXT, num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1
    )
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


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def beside_lora(folder: Path, gone: list[str]) -> set[str]:
    """Names of what was saved besides A and B, but in the layers `gone`."""
    without = tuple(f"base_model.model.{name}." for name in gone)
    keys = load_file(folder / "adapter_model.safetensors").keys()
    beside = {key for key in keys if ".lora_" not in key}
    return {key for key in beside if not (without and key.startswith(without))}


@dataclass(frozen=True)
class Case:
    options: dict[str, Any]
    build: Callable[[], Any] = tiny_llama
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


@pytest.mark.parametrize("gone", ["model.embed_tokens", "lm_head"])
def test_new_rows_of_a_resized_vocabulary_are_saved_whatever_gets_no_rank(
    gone: str, tmp_path: Path
) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")

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
    model, loaded = tiny_llama(), tiny_llama()
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    redistributed(model, GONE)
    train(model)
    model.save_pretrained(tmp_path)
    loaded.load_adapter(str(tmp_path))
    assert torch.equal(logits(loaded), logits(model))


def test_the_one_rank_of_an_embedding_is_part_of_the_record(tmp_path: Path) -> None:
    model = adapted(tiny_llama(), target_modules=["q_proj", "embed_tokens"])
    calibration = evatune.initialize(model, tokens(4))
    assert calibration.allocate().ranks["model.embed_tokens"] == 1
    calibration.save(tmp_path / "calibration.safetensors")
    again = evatune.Calibration.load(tmp_path / "calibration.safetensors")
    assert again.allocate() == calibration.allocate()


# -- adapters that are added up, and others beside -------------------------------------------------


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], r".*\.(q_proj|v_proj)"])
def test_adapters_add_up_where_one_of_them_lacks_a_layer(targets: Any) -> None:
    model = adapted(tiny_llama(), target_modules=targets)
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
    assert {row.layer: row.rank for row in rows} == {
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
    evatune.initialize(model, tokens(4), rho=rho, scale="paper")
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
        initialize_lora_eva_weights(model, tokens(4), show_progress_bar=False)
    layers = lora_layers(model)
    b = layers["model.embed_tokens"].lora_embedding_B["default"]
    assert layers["lm_head"].lora_A["default"].weight.data_ptr() == b.data_ptr()
