"""Adapters on every type of layer: initialized, saved, exported and merged, through plain PEFT."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import evatune
from evatune.adapters.compat import initialize_lora_eva_weights
from evatune.adapters.export import export_uniform
from evatune.errors import AdapterError, ConfigError, TargetError
from evatune.finetune.methods import METHODS, AdapterSetup
from evatune.finetune.recipe import AdapterOptions
from tests.adapters.helpers import merge_adapter
from tests.helpers import matrices, result, round_trip
from tests.layer_models import (
    CONVS,
    RUN_BY_PEFT,
    Attends,
    Mixture,
    Words,
    best,
    images,
    patches,
    routed,
    sequences,
    texts,
)
from tests.sketches import captured_energy

torch.set_num_threads(1)


# PEFT looks for the patterns of parameters among modules only when it warns; it does honour them.
pytestmark = pytest.mark.filterwarnings(
    "ignore:The following (rank|alpha)_pattern keys did not match any targeted module"
)


@pytest.mark.parametrize("kind", RUN_BY_PEFT)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
def test_a_convolution_through_plain_peft(kind: str, tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(3)
        return nn.Sequential(CONVS[kind](), nn.Tanh())

    xs = images(build()[0])  # type: ignore[index]
    config = LoraConfig(r=4, target_modules=["0"])
    exact = evatune.CalibrationConfig(sketch="exact", tolerance=0)
    calibration, start = round_trip(build, config, xs, tmp_path, rho=1, config=exact)
    a = start["0"]
    assert calibration.layers["0"].in_features == a.shape[1]
    seen_by_a = (
        get_peft_model(build(), LoraConfig(r=4, target_modules=["0"]))
        .base_model.model[0]
        .lora_A["default"]
    )
    # zeros around, and no dilation, whatever the layer has
    rows = torch.cat([patches(seen_by_a, x) for x in xs])
    assert torch.allclose(a @ a.T, torch.eye(4), atol=1e-5)
    assert captured_energy(a, rows) == pytest.approx(best(rows, 4), rel=1e-4)


def test_groups_of_outputs_share_the_leading_directions_evenly_and_ranks_are_multiples() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.grouped, self.plain = nn.Conv2d(4, 8, 3, groups=2, padding=1), nn.Conv2d(8, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.plain(torch.tanh(self.grouped(x)))

    xs = images(Net().grouped)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(Net(), LoraConfig(r=4, target_modules=["grouped", "plain"]))
    calibration = evatune.initialize(model, xs, scale="paper")
    ranks = calibration.allocate().ranks
    assert sum(ranks.values()) == 8
    assert ranks["grouped"] % 2 == 0 < ranks["grouped"]
    directions, half = calibration.spectra["grouped"].directions, ranks["grouped"] // 2
    a = matrices(model, "A")["grouped"]
    assert torch.equal(a[:half], directions[: 2 * half : 2])
    assert torch.equal(a[half:], directions[1 : 2 * half : 2])
    assert calibration.allocate(budget="parameters").uniform_parameters == 4 * (36 + 8 // 2) + 4 * (
        72 + 8
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"init_lora_weights": "eva", "eva_config": EvaConfig(rho=1.5)},
    ],
    ids=["lora", "rslora", "dora", "eva"],
)
@pytest.mark.parametrize("meta", [False, True])
def test_an_embedding_through_plain_peft(
    options: dict[str, Any], meta: bool, tmp_path: Path
) -> None:
    config = LoraConfig(r=3, target_modules=["table", "head"], **options)
    calibration, start = round_trip(Words, config, texts(), tmp_path, meta=meta)
    rank = calibration.allocate().ranks["table"]
    assert torch.equal(start["table"], calibration.spectra["table"].directions[:rank])


def test_a_trained_embedding_is_not_overwritten() -> None:
    model = get_peft_model(Words(), LoraConfig(r=2, target_modules=["table"]))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(**texts()[0]).sum().backward()
    optimizer.step()
    with pytest.raises(evatune.EvatuneError, match=r"already trained.*table"):
        evatune.initialize(model, texts())


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("meta", [False, True])
def test_attention_through_plain_peft(batch_first: bool, meta: bool, tmp_path: Path) -> None:
    config = LoraConfig(r=3, target_modules=["attn", "head"])
    build = lambda: Attends(batch_first)  # noqa: E731
    calibration, start = round_trip(build, config, sequences(), tmp_path, meta=meta)
    ranks = calibration.allocate().ranks
    assert ranks["attn"] == ranks["attn.out_proj"]
    assert sum(ranks.values()) <= 9
    for name in ("attn", "attn.out_proj"):
        assert torch.equal(start[name], calibration.spectra[name].directions[: ranks["attn"]])


class Louder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.loud = Attends(), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.loud(1e4 * x)


def test_attention_of_rank_zero_is_plain_again() -> None:
    model = get_peft_model(Louder(), LoraConfig(r=3, target_modules=["attn", "loud"]))
    ranks = evatune.initialize(model, sequences(), rho=4, metric="raw").allocate().ranks
    assert ranks == {"inner.attn": 0, "inner.attn.out_proj": 0, "loud": 9}
    inner = model.base_model.model.inner
    assert type(inner.attn) is nn.MultiheadAttention
    assert not any("lora" in name for name, _ in inner.named_modules())


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize("keys", [["up"], ["up", "down"]])
def test_stacked_experts_through_plain_peft(
    transposed: bool, meta: bool, keys: list[str], tmp_path: Path
) -> None:
    config = LoraConfig(
        r=2, target_modules=["head"], target_parameters=[f"experts.{key}" for key in keys]
    )
    calibration, start = round_trip(
        lambda: Mixture(transposed), config, routed(), tmp_path, meta=meta
    )
    ranks = calibration.allocate().ranks
    assert sum(ranks.values()) <= 2 * (4 * len(keys) + 1)
    for key in keys:
        assert len({ranks[f"experts.{key}.{e}"] for e in range(4)}) == 1
        for expert, own in enumerate(start[f"experts.{key}"].chunk(4)[:3]):
            assert torch.equal(
                own, calibration.spectra[f"experts.{key}.{expert}"].directions[: len(own)]
            )


def test_a_stacked_weight_of_rank_zero_carries_no_adapter(tmp_path: Path) -> None:
    def build() -> nn.Module:
        model = Mixture()
        with torch.no_grad():
            model.experts.up.mul_(1e-3)  # so that the inputs of `down` are poor
        return model

    config = LoraConfig(r=2, target_modules=[], target_parameters=["experts.up", "experts.down"])
    calibration, _ = round_trip(build, config, routed(), tmp_path, rho=2, metric="raw")
    assert {calibration.allocate().ranks[f"experts.down.{e}"] for e in range(4)} == {0}
    saved = LoraConfig.from_pretrained(str(tmp_path))
    assert saved.target_parameters == ["experts.up"]


class Mixed(nn.Module):
    """Of three adapted layers, PEFT runs two; the third is never reached."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wide = nn.Conv1d(8, 8, 3, dilation=2)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


@pytest.mark.parametrize("meta", [False, True])
def test_layers_that_are_not_supported_are_named_or_left_as_peft_made_them(
    meta: bool, tmp_path: Path
) -> None:
    xs = list(
        torch.randn(4, 30, 8, generator=torch.Generator().manual_seed(0)) * 0.7 ** torch.arange(8)
    )
    lora = LoraConfig(r=2, target_modules=["wide", "first", "second"])
    model = get_peft_model(Mixed(), lora, low_cpu_mem_usage=meta)
    refused = (
        r"wide \(Conv1d, whose dilation PEFT's A does not"
        r" have.*exclude_modules.*on_unsupported='skip'"
    )
    with pytest.raises(TargetError, match=refused):
        evatune.initialize(model, xs)
    before = None if meta else matrices(model, "A")["wide"]
    with pytest.warns(UserWarning, match=r"start as PEFT initialized them: wide \(Conv1d"):
        calibration = evatune.initialize(model, xs, on_unsupported="skip")
    assert set(calibration.allocate().ranks) == {"first", "second"}
    after = matrices(model, "A")["wide"]
    assert after.any() if before is None else torch.equal(before, after)
    assert not matrices(model, "B")["wide"].any()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(Mixed(), str(tmp_path))
    assert torch.equal(matrices(again, "A")["wide"], after)
    assert torch.allclose(again(xs[0]), model(xs[0]))
    with pytest.raises(ConfigError, match="on_unsupported is 'ignore'"):
        evatune.initialize(model, xs, on_unsupported="ignore")
    alone = get_peft_model(Mixed(), LoraConfig(r=2, target_modules=["wide"]))
    with pytest.raises(TargetError, match="wide"):
        evatune.initialize(alone, xs, on_unsupported="skip")  # there would be nothing left to do


def adapted(method: str, model: nn.Module, targets: list[str]) -> Any:
    setup = AdapterSetup(
        adapter=AdapterOptions(rank=2, alpha=2, targets=targets),
        task_type=None,
        head=[],
        new_head=False,
        steps=1,
    )
    return METHODS[method].adapt(model, setup)


def test_dora_where_peft_has_none_names_the_layers() -> None:
    with pytest.raises(
        ConfigError,
        match=r"'dora' cannot run.*MultiheadAttention does not support DoRA.*at attn;.*choose lora",
    ):
        adapted("dora", Attends(), ["attn"])


def test_methods_for_linear_layers_say_so() -> None:
    with pytest.raises(
        ConfigError,
        match=r"'eva-minor' is defined for linear layers, and table \(Embedding\) is none",
    ):
        adapted("eva-minor", Words(), ["table", "head"])
    adapted("eva", Words(), ["table", "head"])


@pytest.mark.parametrize("kind", ["2d", "3d"])
def test_a_convolutions_adapter_is_exported_at_one_rank(kind: str, tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        conv = CONVS[kind]()
        return nn.Sequential(conv, nn.Tanh(), type(conv)(8, 4, 1))

    xs = images(build()[0])  # type: ignore[index]
    model = get_peft_model(build(), LoraConfig(r=2, target_modules=["0", "2"]))
    evatune.initialize(model, xs)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    export_uniform(model, tmp_path / "out")
    loaded = PeftModel.from_pretrained(build(), str(tmp_path / "out"))
    assert torch.allclose(loaded(xs[0]), model(xs[0]), rtol=1e-4, atol=1e-4)


def test_what_no_server_reads_is_not_exported(tmp_path: Path) -> None:
    grouped = nn.Sequential(nn.Conv1d(4, 8, 3, groups=2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(grouped, LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(
        AdapterError, match="0 is a convolution with groups, whose adapter no server reads"
    ):
        export_uniform(model, tmp_path / "out")
    model = get_peft_model(Attends(), LoraConfig(r=2, target_modules=["attn"]))
    with pytest.raises(
        AdapterError,
        match=r"out_proj is a projection of nn.MultiheadAttention, whose adapter no server",
    ):
        export_uniform(model, tmp_path / "out")


# A pads with zeros and has no dilation.
UNMERGED = ("2d same with dilation", "2d circular", "2d reflect", "2d replicate, same")


# which PEFT refuses itself
@pytest.mark.parametrize("kind", [kind for kind in RUN_BY_PEFT if kind != "2d groups"])
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_a_convolution_is_merged_where_the_sum_of_the_weights_is_what_the_adapter_computes(
    kind: str, tmp_path: Path
) -> None:
    def build() -> nn.Module:
        torch.manual_seed(3)
        return nn.Sequential(CONVS[kind]())

    model = get_peft_model(build(), LoraConfig(r=2, target_modules=["0"]))
    with torch.no_grad():
        model.base_model.model[0].lora_B["default"].weight.normal_()
    model.save_pretrained(tmp_path)
    x = images(build()[0])[0]  # type: ignore[index]
    if kind not in UNMERGED:
        assert torch.allclose(merge_adapter(build(), tmp_path)(x), model(x), rtol=1e-4, atol=1e-4)
    else:
        with pytest.raises(AdapterError, match=r"0 \(Conv2d\(.*cannot be merged"):
            merge_adapter(build(), tmp_path)


@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize(
    ("build", "batches", "options", "other"),
    [
        (Words, texts, {"target_modules": ["table", "head"]}, "table"),
        (Attends, sequences, {"target_modules": ["attn", "head"]}, "attn"),
        (
            Mixture,
            routed,
            {"target_modules": ["head"], "target_parameters": ["experts.up"]},
            "experts.up",
        ),
    ],
)
def test_pefts_own_functions_start_what_peft_does_not_know_as_peft_does(
    build: Any, batches: Any, options: Any, other: str, meta: bool, tmp_path: Path
) -> None:
    before = result(build(), batches()[0])
    lora = LoraConfig(r=3, init_lora_weights="eva", eva_config=EvaConfig(rho=1.0), **options)
    model = get_peft_model(build(), lora, low_cpu_mem_usage=meta)
    with pytest.warns(UserWarning, match=rf"not found in the eva state_dict: {re.escape(other)}"):
        initialize_lora_eva_weights(model, batches(), show_progress_bar=False)
    assert torch.allclose(result(model, batches()[0]), before, atol=1e-5)
    assert torch.allclose(
        matrices(model, "A")["head"] @ matrices(model, "A")["head"].T, torch.eye(3), atol=1e-5
    )
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build(), str(tmp_path))
    assert all(
        torch.equal(a, matrices(model, "A")[name]) for name, a in matrices(again, "A").items()
    )
    assert matrices(again, "A").keys() == matrices(model, "A").keys()
