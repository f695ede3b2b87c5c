"""Writing into PEFT's LoRA layers; plain PEFT's own loader is the judge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import evatune
from evatune.adapters.scale import scaled_rows
from evatune.errors import AdapterError, ConfigError, LayerError, TargetError
from tests.helpers import (
    Toy,
    lora,
    lora_layers,
    output,
    tiny_bert,
    tiny_llama,
    tokens,
    train_a_little,
)

torch.set_num_threads(1)


@pytest.mark.parametrize("build", [tiny_bert, tiny_llama])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"init_lora_weights": "eva", "eva_config": EvaConfig(rho=2.0)},
    ],
    ids=["lora", "rslora", "dora", "eva"],
)
@pytest.mark.parametrize("meta", [False, True], ids=["", "low_cpu_mem_usage"])
def test_round_trip_through_plain_peft(
    tmp_path: Path, build: Any, options: dict[str, Any], meta: bool
) -> None:
    batch = tokens()[0]
    before = output(build(), batch)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | options
    model = get_peft_model(build(), LoraConfig(**settings), low_cpu_mem_usage=meta)
    calibration = evatune.initialize(model, tokens(8))
    assert torch.allclose(output(model, batch), before, atol=1e-5)

    plan = calibration.allocate()
    layers = lora_layers(model)
    assert {name: layer.r["default"] for name, layer in layers.items()} == {
        n: r for n, r in plan.ranks.items() if r
    }
    scale = 8 / 4**0.5 if options.get("use_rslora") else 8 / 4
    for name, layer in layers.items():
        assert layer.scaling["default"] == pytest.approx(scale)
        assert torch.equal(
            layer.lora_A["default"].weight, calibration.spectra[name].directions[: plan.ranks[name]]
        )
        assert not layer.lora_B["default"].weight.any()
        assert layer.lora_A["default"].weight.requires_grad

    losses = train_a_little(model, batch)
    assert losses[-1] < losses[0]
    trained = output(model, batch)
    assert not torch.allclose(trained, before, atol=1e-4)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build(), str(tmp_path))
    assert torch.allclose(output(again, batch), trained, atol=1e-6)
    assert {name: layer.r["default"] for name, layer in lora_layers(again).items()} == {
        n: r for n, r in plan.ranks.items() if r
    }


def test_the_bare_model_and_the_peft_model_give_the_same_calibration() -> None:
    config = evatune.CalibrationConfig(rank=4)
    bare = evatune.calibrate(tiny_bert(), tokens(8), config)
    adapted = lora(tiny_bert())
    through = evatune.calibrate(adapted, tokens(8), config)
    written = evatune.initialize(adapted, tokens(8), config=config)
    for other in (through, written):
        assert list(other.spectra) == list(bare.spectra)
        for name, spectrum in bare.spectra.items():
            assert torch.equal(other.spectra[name].directions, spectrum.directions)
            assert torch.equal(other.spectra[name].energies, spectrum.energies)


def test_another_adapter_is_not_touched(tmp_path: Path) -> None:
    batch = tokens()[0]
    model = lora(tiny_bert())
    model.add_adapter("other", LoraConfig(r=2, target_modules=["query", "value", "dense"]))
    model.set_adapter("other")
    train_a_little(model, batch)
    expected = output(model, batch)
    weights = {n: p.clone() for n, p in model.named_parameters() if ".other." in n}
    model.set_adapter("default")
    # raw: the rich inputs take it all
    spread = evatune.CalibrationConfig(rank=4, rho=4.0, metric="raw")
    calibration = evatune.initialize(model, tokens(8), config=spread)
    assert 0 in calibration.allocate().ranks.values()

    assert {n for n, _ in model.named_parameters() if ".other." in n} == set(weights)
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters() if n in weights)
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".other." in n)
    # only "default" is active
    assert torch.allclose(output(model, batch), output(tiny_bert(), batch), atol=1e-5)
    model.set_adapter("other")
    assert torch.allclose(output(model, batch), expected, atol=1e-6)
    model.save_pretrained(tmp_path)
    model.set_adapter("default")
    train_a_little(model, batch)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_bert(), str(tmp_path))
    assert torch.allclose(output(loaded, batch), output(model, batch), atol=1e-6)


def test_layers_of_rank_zero_carry_no_adapter_and_load_without_one(tmp_path: Path) -> None:
    model = lora(tiny_bert())
    calibration = evatune.initialize(model, tokens(8), rho=4, metric="raw")
    ranks = calibration.allocate().ranks
    assert 0 in ranks.values()
    assert set(lora_layers(model)) == {name for name, rank in ranks.items() if rank}
    train_a_little(model, tokens()[0])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_bert(), str(tmp_path))
    assert set(lora_layers(loaded)) == set(lora_layers(model))
    assert torch.allclose(output(loaded, tokens()[0]), output(model, tokens()[0]), atol=1e-6)


class Nested(nn.Module):
    """Layer names that end in one another: "x.a" and "y.x.a"."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.x = nn.ModuleDict({"a": nn.Linear(8, 8)})
        self.y = nn.ModuleDict({"x": nn.ModuleDict({"a": nn.Linear(8, 8)})})
        self.other = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        strong = self.x["a"](torch.nn.functional.normalize(x, dim=-1) * x[..., :1])
        return self.other(x) + strong + self.y["x"]["a"](0.01 * x)


def test_names_that_end_in_one_another_are_told_apart(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    xs = [torch.randn(50, 8, generator=generator) * 0.5 ** torch.arange(8) for _ in range(8)]
    model = get_peft_model(Nested(), LoraConfig(r=2, target_modules="all-linear"))
    ranks = evatune.initialize(model, xs, rho=4, metric="raw").allocate().ranks
    assert ranks["x.a"] > 0
    assert ranks["y.x.a"] == 0
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B["default"].weight.normal_()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Nested(), str(tmp_path))
    assert set(lora_layers(loaded)) == {name for name, rank in ranks.items() if rank}
    with torch.no_grad():
        assert torch.allclose(loaded.eval()(xs[0]), model.eval()(xs[0]), atol=1e-6)


def test_adapter_weights_keep_the_precision_peft_chose() -> None:
    model = lora(tiny_bert().to(torch.bfloat16))
    kinds = {layer.lora_A["default"].weight.dtype for layer in lora_layers(model).values()}
    evatune.initialize(model, tokens(8))
    for layer in lora_layers(model).values():
        assert {layer.lora_A["default"].weight.dtype, layer.lora_B["default"].weight.dtype} == kinds


def test_a_transformers_model_with_add_adapter_works_too() -> None:
    model = tiny_bert()
    model.add_adapter(LoraConfig(r=4, target_modules=["query", "value"]), adapter_name="default")
    calibration = evatune.initialize(model, tokens(8))
    assert sum(calibration.allocate().ranks.values()) == 4 * 4


def test_gpt2_round_trip(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    def build() -> Any:
        torch.manual_seed(0)
        return GPT2LMHeadModel(
            GPT2Config(vocab_size=60, n_embd=16, n_layer=2, n_head=2, n_positions=32)
        ).eval()

    model = get_peft_model(
        build(), LoraConfig(r=4, target_modules="all-linear", fan_in_fan_out=True)
    )
    evatune.initialize(model, tokens(8))
    train_a_little(model, tokens()[0])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(), str(tmp_path))
    assert torch.allclose(output(loaded, tokens()[0]), output(model, tokens()[0]), atol=1e-6)


def test_rank_given_to_initialize_replaces_the_one_of_the_config() -> None:
    model = lora(tiny_bert(), lora_alpha=8)
    calibration = evatune.initialize(model, tokens(8), rank=2, rho=1)
    assert set(calibration.allocate().ranks.values()) == {2}
    layer = next(iter(lora_layers(model).values()))
    assert layer.scaling["default"] == 8 / 2
    assert model.peft_config["default"].r == 2


def test_adjust_scaling_factors_off_leaves_alpha_alone() -> None:
    eva = EvaConfig(rho=2.0, adjust_scaling_factors=False)
    model = lora(tiny_bert(), init_lora_weights="eva", eva_config=eva)
    evatune.initialize(model, tokens(8))
    assert {layer.lora_alpha["default"] for layer in lora_layers(model).values()} == {8}


# -- scales ----------------------------------------------------------------------------------------


def rows_of(model: nn.Module, batches: list[dict[str, Tensor]], name: str) -> Tensor:
    seen: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(
        lambda m, a: seen.append(a[0].flatten(0, 1))
    )
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    hook.remove()
    return torch.cat(seen).double()


@pytest.mark.parametrize("center", [False, True])
class TestScales:
    name = "encoder.layer.1.output.dense"

    def setting(self, center: bool) -> tuple[evatune.Spectrum, Tensor]:
        config = evatune.CalibrationConfig(rank=4, center=center, sketch="exact", tolerance=0)
        return evatune.calibrate(tiny_bert(), tokens(8), config).spectra[self.name], rows_of(
            tiny_bert(), tokens(8), self.name
        )

    def test_paper_rows_are_orthonormal(self, center: bool) -> None:
        a = scaled_rows(self.setting(center)[0], 5, "paper")
        assert torch.allclose(a @ a.T, torch.eye(5), atol=1e-5)

    def test_whitened_components_have_unit_variance_over_tokens(self, center: bool) -> None:
        spectrum, rows = self.setting(center)
        components = rows @ scaled_rows(spectrum, 5, "whiten").double().T
        assert torch.allclose(
            components.var(0, correction=0), torch.ones(5, dtype=torch.float64), rtol=1e-3
        )

    def test_matched_rows_see_the_energy_that_pefts_default_rows_see(self, center: bool) -> None:
        spectrum, rows = self.setting(center)
        ours = (rows @ scaled_rows(spectrum, 5, "matched").double().T).square().sum(1).mean()
        torch.manual_seed(0)
        theirs = []
        for _ in range(300):
            # what PEFT draws: kaiming uniform, a = √5
            a = nn.Linear(rows.shape[1], 5, bias=False).weight
            theirs.append((rows @ a.detach().double().T).square().sum(1).mean())
        assert float(ours) == pytest.approx(float(torch.stack(theirs).mean()), rel=0.1)
        expected = 5 / (3 * rows.shape[1]) * float(rows.square().sum(1).mean())
        assert float(ours) == pytest.approx(expected, rel=1e-3)

    def test_nothing_shared_is_scaled_twice(self, center: bool) -> None:
        model = lora(tiny_bert())
        config = evatune.CalibrationConfig(rank=4, center=center)
        calibration = evatune.initialize(model, tokens(8), scale="whiten", rho=1, config=config)
        layers = lora_layers(model)
        q, k, v = (
            layers[f"encoder.layer.0.attention.self.{part}"].lora_A["default"].weight
            for part in ("query", "key", "value")
        )
        assert torch.equal(q, k)
        assert torch.equal(k, v)
        spectrum = calibration.spectra["encoder.layer.0.attention.self.query"]
        assert torch.allclose(
            spectrum.directions @ spectrum.directions.T,
            torch.eye(len(spectrum.directions)),
            atol=1e-5,
        )


def test_whitening_a_constant_direction_stays_finite() -> None:
    x = torch.randn(400, 8) * torch.tensor([0.0, 1, 1, 1, 1, 1, 1, 1]) + torch.eye(8)[0] * 3
    spectrum = evatune.calibrate(
        nn.Sequential(nn.Linear(8, 8)), [x], evatune.CalibrationConfig(components=4)
    ).spectra["0"]
    a = scaled_rows(spectrum, 4, "whiten")
    assert a.isfinite().all()
    assert float(a[0].norm()) <= 1.01 / (1e-3 * 3)


# -- what is refused -------------------------------------------------------------------------------


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda m: evatune.initialize(m), evatune.EvatuneError, "needs batches"),
        (
            lambda m: evatune.initialize(m, tokens(), adapter_name="x"),
            AdapterError,
            "no adapter 'x'.*'default'",
        ),
        (
            lambda m: evatune.initialize(m, tokens(), scale="big"),
            ConfigError,
            "paper, whiten, matched",
        ),
        (lambda m: evatune.initialize(m, tokens(), rank=0), ConfigError, "rank is 0"),
        (lambda m: evatune.initialize(m, tokens(), rho=0.5), ConfigError, "rho is 0.5"),
        (
            lambda m: evatune.initialize(m, tokens(), rank=20, rho=1),
            evatune.EvatuneError,
            "cannot be",
        ),
        (lambda m: evatune.initialize(m, []), evatune.EvatuneError, "empty"),
        (
            lambda m: evatune.initialize(
                m, [{key: value[:1, :3] for key, value in tokens()[0].items()}]
            ),
            LayerError,
            "3 rows for 8 components.*more data, or lower rank",
        ),
    ],
)
def test_bad_calls_say_what_to_do_and_leave_the_model_alone(
    call: Any, error: type[Exception], text: str
) -> None:
    model = lora(tiny_bert())
    before, config = snapshot(model), str(model.peft_config)
    with pytest.raises(error, match=text):
        call(model)
    assert str(model.peft_config) == config
    after = snapshot(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_nan_in_one_layer_names_the_layer_and_the_batch() -> None:
    model = lora(tiny_bert(), target_modules=["query"])
    with torch.no_grad():
        model.base_model.model.encoder.layer[0].output.dense.weight[0, 0] = float("nan")
    with pytest.raises(
        LayerError, match=r"encoder\.layer\.1\.attention\.self\.query \(first in batch 1\).*float32"
    ):
        evatune.initialize(model, tokens())


def test_a_model_without_an_adapter_is_told_how_to_get_one() -> None:
    with pytest.raises(AdapterError, match=r"Toy carries no adapter.*get_peft_model"):
        evatune.initialize(Toy(), [torch.zeros(1)])


def test_a_trained_adapter_is_not_overwritten() -> None:
    model = lora(tiny_bert())
    train_a_little(model, tokens()[0])
    with pytest.raises(AdapterError, match="already trained"):
        evatune.initialize(model, tokens())


def test_a_merged_adapter_is_refused() -> None:
    model = lora(tiny_bert())
    model.merge_adapter()
    with pytest.raises(AdapterError, match="unmerge_adapter"):
        evatune.initialize(model, tokens())


def test_an_adapter_that_is_not_lora_is_refused() -> None:
    from peft import IA3Config

    model = get_peft_model(tiny_bert(), IA3Config(target_modules=["query"], feedforward_modules=[]))
    with pytest.raises(AdapterError, match="IA3Config; EVA initializes LoRA"):
        evatune.initialize(model, tokens())


def test_an_adapted_layer_of_another_kind_is_named() -> None:
    model = lora(
        nn.ModuleDict({"lin": nn.Linear(4, 4), "conv": nn.Conv1d(2, 2, 3, dilation=2)}),
        target_modules=["lin", "conv"],
    )
    with pytest.raises(
        TargetError, match=r"conv \(Conv1d, whose dilation.*exclude_modules.*on_unsupported='skip'"
    ):
        evatune.initialize(model, tokens())


def test_random_numbers_are_where_they_were() -> None:
    model = lora(tiny_bert())
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    evatune.initialize(model, tokens(8))
    assert torch.rand(1) == expected


def test_a_config_without_rank_leaves_rank_and_rho_to_the_adapter() -> None:
    model = lora(tiny_bert(), eva_config=EvaConfig(rho=1.0), init_lora_weights="eva", r=3)
    calibration = evatune.initialize(
        model, tokens(8), config=evatune.CalibrationConfig(center=True)
    )
    assert (calibration.config.rank, calibration.config.rho) == (3, 1.0)
    assert set(calibration.allocate().ranks.values()) == {3}


@pytest.mark.parametrize("rslora", [False, True])
def test_a_second_call_leaves_the_scale_as_it_is(rslora: bool) -> None:
    model = lora(tiny_bert(), use_rslora=rslora)
    for _ in range(3):
        evatune.initialize(model, tokens(8), rank=4)
    scales = [layer.scaling["default"] for layer in lora_layers(model).values()]
    assert scales == pytest.approx([8 / 4**0.5 if rslora else 8 / 4] * len(scales))


def test_layers_whose_names_end_in_one_another_keep_their_own_ranks(tmp_path: Path) -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.lin, self.other = nn.Linear(16, 16), nn.Linear(16, 16)
            self.block = nn.ModuleDict({"lin": nn.Linear(16, 16)})

        def forward(self, x: Tensor) -> Tensor:
            return self.other(torch.relu(self.block["lin"](torch.tanh(self.lin(x)))))

    generator = torch.Generator().manual_seed(0)
    for decay in (0.5, 0.7, 0.9):
        batches = [
            torch.randn(40, 16, generator=generator) * decay ** torch.arange(16) for _ in range(4)
        ]
        model = lora(Nested(), target_modules=["lin", "other"])
        calibration = evatune.initialize(model, batches)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(Nested(), str(tmp_path))
        ranks = calibration.allocate().ranks
        assert {name: layer.r["default"] for name, layer in lora_layers(loaded).items()} == {
            n: r for n, r in ranks.items() if r
        }
        assert all(
            layer.scaling["default"] == pytest.approx(2) for layer in lora_layers(loaded).values()
        )
        assert torch.allclose(loaded(batches[0]), model(batches[0]), atol=1e-6)


def test_a_bias_of_b_starts_at_zero_too() -> None:
    batch = tokens()[0]
    before = output(tiny_bert(), batch)
    model = lora(tiny_bert(), lora_bias=True)
    evatune.initialize(model, tokens(8))
    assert torch.allclose(output(model, batch), before, atol=1e-5)


def test_frozen_parameters_of_other_adapters_stay_frozen() -> None:
    model = lora(tiny_bert())
    model.add_adapter("b", LoraConfig(r=4, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".b." in name)
    evatune.initialize(model, tokens(8), adapter_name="b")
    assert all(
        parameter.requires_grad == (".b." in name) for name, parameter in model.named_parameters()
    )


def test_magnitudes_of_dora_keep_their_dtype() -> None:
    model = lora(tiny_bert().to(torch.bfloat16), use_dora=True)
    before = {name: p.dtype for name, p in model.named_parameters() if "magnitude" in name}
    evatune.initialize(model, tokens(8))
    after = {name: p.dtype for name, p in model.named_parameters() if "magnitude" in name}
    assert after.items() <= before.items()


def test_the_adapters_wish_for_whitening_is_granted() -> None:
    model = lora(tiny_bert(), init_lora_weights="eva", eva_config=EvaConfig(whiten=True))
    calibration = evatune.initialize(model, tokens(8))
    for name, layer in lora_layers(model).items():
        a = layer.lora_A["default"].weight
        assert torch.allclose(
            a, scaled_rows(calibration.spectra[name], len(a), "whiten"), rtol=1e-4, atol=1e-6
        )
