"""Every kind of layer a LoRA can sit on: its rows against the exact answer, and its adapter through
plain PEFT."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch._C import _len_torch_dispatch_stack

import evatune
from evatune.adapters.compat import initialize_lora_eva_weights
from evatune.adapters.export import export_uniform, merge
from evatune.adapters.saved import adapter_rows
from evatune.capture import RowSelector, find_target_layers, input_views
from evatune.capture.input_views import ConvPatches
from evatune.errors import AdapterError, ConfigError, DataError, LayerError, TargetError
from evatune.finetune.methods import METHODS, AdapterSetup
from evatune.sketch.spectrum import captured_energy
from tests.helpers import matrices, result, round_trip

torch.set_num_threads(1)
# PEFT looks for the patterns of parameters among modules only when it warns; it does honour them.
pytestmark = pytest.mark.filterwarnings(
    "ignore:The following (rank|alpha)_pattern keys did not match any targeted module"
)
EXACT = evatune.CalibrationConfig(components=6, sketch="exact", tolerance=0)


def moments(rows: Tensor, count: int) -> Tensor:
    """The leading eigenvalues of the rows' second moment, (count,) float64."""
    rows = rows.double()
    return torch.linalg.eigvalsh(rows.T @ rows / len(rows)).flip(0)[:count]


def best(rows: Tensor, count: int) -> float:
    """Share of the rows' energy that the best `count` directions capture."""
    return float(moments(rows, count).sum() / rows.double().square().sum(1).mean())


# -- convolutions ----------------------------------------------------------------------------------

CONVS: dict[str, Callable[[], nn.Module]] = {
    "1d": lambda: nn.Conv1d(3, 8, 3),
    "1d stride and padding": lambda: nn.Conv1d(3, 8, 4, stride=2, padding=1),
    "1d same, even kernel": lambda: nn.Conv1d(3, 8, 4, padding="same"),
    "1d dilation": lambda: nn.Conv1d(3, 8, 3, dilation=2, padding=1),
    "2d": lambda: nn.Conv2d(2, 8, (3, 2), stride=(2, 1), padding=(0, 1)),
    "2d patch embedding": lambda: nn.Conv2d(2, 8, 3, stride=3),
    "2d same with dilation": lambda: nn.Conv2d(2, 8, 3, dilation=2, padding="same"),
    "2d circular": lambda: nn.Conv2d(2, 8, 3, padding=1, padding_mode="circular"),
    "2d reflect": lambda: nn.Conv2d(2, 8, 3, padding=(1, 2), padding_mode="reflect"),
    "2d replicate, same": lambda: nn.Conv2d(2, 8, (3, 4), padding="same", padding_mode="replicate"),
    "2d pointwise": lambda: nn.Conv2d(8, 8, 1),
    "2d groups": lambda: nn.Conv2d(4, 8, 3, groups=2, padding=1),
    "3d": lambda: nn.Conv3d(2, 8, (2, 1, 3), stride=(1, 2, 1), padding=(1, 0, 1)),
}
SIZES = {"1": (12,), "2": (9, 8), "3": (4, 5, 6)}


def images(conv: nn.Module, count: int = 4, seed: int = 0) -> list[Tensor]:
    """Batches whose neighbours are alike, so that directions differ in energy."""
    generator = torch.Generator().manual_seed(seed)
    size = SIZES[type(conv).__name__[4]]
    return [
        torch.randn(5, conv.in_channels, *size, generator=generator).cumsum(-1)  # type: ignore[arg-type]
        for _ in range(count)
    ]


def patches(conv: nn.Module, x: Tensor) -> Tensor:
    """The rows, by torch's own convolution: one output channel per entry of the patch."""
    width = conv.in_channels * conv.weight[0, 0].numel()  # type: ignore[operator, index]
    picker = type(conv)(
        conv.in_channels,
        width,
        conv.kernel_size,
        conv.stride,
        conv.padding,
        conv.dilation,
        bias=False,
        padding_mode=conv.padding_mode,
    )
    with torch.no_grad():
        picker.weight.copy_(torch.eye(width).view_as(picker.weight))
        return picker(x).flatten(2).transpose(1, 2).reshape(-1, width)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("piece", [16 << 20, 500], ids=["whole", "in small pieces"])
@pytest.mark.parametrize("kind", CONVS)
def test_the_rows_of_a_convolution_are_its_patches(
    kind: str, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(input_views, "_PIECE_BYTES", piece)
    conv = CONVS[kind]()
    xs = images(conv)
    rows = torch.cat([patches(conv, x) for x in xs])
    spectrum = evatune.calibrate(nn.Sequential(conv), xs, EXACT, targets=["0"]).spectra["0"]
    assert spectrum.rows == len(rows)
    assert spectrum.total_energy == pytest.approx(float(rows.square().sum(1).mean()), rel=1e-5)
    assert torch.allclose(
        spectrum.energies.double(), moments(rows, len(spectrum.energies)), rtol=1e-4, atol=1e-5
    )
    k = len(spectrum.energies)
    assert captured_energy(spectrum.directions, rows) == pytest.approx(best(rows, k), rel=1e-5)


def test_patches_come_in_pieces_of_bounded_size() -> None:
    input_view = ConvPatches.of(nn.Conv2d(4, 8, 3, padding=1))
    x = torch.randn(2, 4, 300, 200)
    pieces = [rows for rows, _ in input_view.pieces(x, RowSelector(None))]
    assert (
        max(rows.nbytes for rows in pieces)
        <= input_views._PIECE_BYTES
        < sum(rows.nbytes for rows in pieces)
    )
    assert torch.equal(torch.cat(pieces), input_view.all_rows(x).flatten(0, 1))


def test_a_mask_of_tokens_chooses_the_patches_at_their_positions() -> None:
    class Speech(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.halves = (
                nn.Conv1d(3, 4, 3, padding="same"),
                nn.Conv1d(4, 4, 2, stride=2),
            )

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.halves(self.conv(x))

    model, x, mask = Speech(), torch.randn(2, 3, 8), torch.ones(2, 8)
    mask[1, 5:] = 0
    with pytest.warns(
        UserWarning, match=r"no mask fits the rows of these layers.*: halves; .*rows="
    ):
        spectra = evatune.calibrate(
            model, [{"x": x, "attention_mask": mask}], EXACT, targets=["conv", "halves"]
        ).spectra
    rows = patches(model.conv, x)[mask.flatten().bool()]
    assert spectra["conv"].rows == 13
    assert spectra["conv"].total_energy == pytest.approx(
        float(rows.square().sum(1).mean()), rel=1e-5
    )
    assert spectra["halves"].rows == 8  # of another length: the mask does not speak about them


def test_a_regular_expression_takes_no_weight_of_a_convolution_for_experts() -> None:
    target_layers = find_target_layers(nn.ModuleDict({"conv": nn.Conv1d(2, 3, 1)}), r"conv.*")
    assert [target_layer.name for target_layer in target_layers] == ["conv"]


def test_layers_that_read_one_tensor_differently_do_not_share_a_sketch() -> None:
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv1d(6, 4, 3, padding=1), nn.Conv1d(6, 4, 3, padding=1)
            self.strided, self.point, self.lin = (
                nn.Conv1d(6, 4, 3, 2),
                nn.Conv1d(6, 4, 1),
                nn.Linear(6, 4),
            )

        def forward(self, x: Tensor) -> None:
            self.a(x), self.b(x), self.strided(x), self.point(x), self.lin(x)

    layers = evatune.calibrate(Fork(), [torch.randn(4, 6, 6)] * 2, EXACT, targets=r"\w+").layers
    assert layers["a"].input == layers["b"].input
    assert len({layer.input for layer in layers.values()}) == 4


RUN_BY_PEFT = {kind: build for kind, build in CONVS.items() if kind != "1d dilation"}


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
    calibration = evatune.initialize(model, xs)
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


# -- embeddings ------------------------------------------------------------------------------------


class Words(nn.Module):
    def __init__(self, padding: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(12, 8, padding_idx=padding), nn.Linear(8, 4)

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.head(torch.tanh(self.table(ids)))


def texts(count: int = 4) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    weights = 0.7 ** torch.arange(12)
    return [
        {"ids": torch.multinomial(weights, 40, True, generator=generator).view(4, 10)}
        for _ in range(count)
    ]


@pytest.mark.parametrize("sketch", ["nystrom", "exact", "incremental"])
@pytest.mark.parametrize("center", [False, True])
def test_the_directions_of_an_embedding_are_its_most_frequent_tokens(
    sketch: str, center: bool
) -> None:
    config = evatune.CalibrationConfig(components=5, sketch=sketch, tolerance=0, center=center)
    spectrum = evatune.calibrate(Words(), texts(), config, targets=["table"]).spectra["table"]
    counts = torch.bincount(torch.cat([b["ids"].flatten() for b in texts()]), minlength=12)
    frequency = counts.double() / counts.sum()
    first = sorted(range(12), key=lambda token: (-int(counts[token]), token))[:5]
    assert spectrum.rows == 160
    assert torch.equal(spectrum.directions, torch.eye(12)[first])
    assert torch.allclose(spectrum.mean.double(), frequency)
    one_hot = torch.eye(12, dtype=torch.float64)[torch.cat([b["ids"].flatten() for b in texts()])]
    rows = one_hot - one_hot.mean(0) if center else one_hot
    assert spectrum.total_energy == pytest.approx(float(rows.square().sum(1).mean()))
    assert torch.allclose(
        spectrum.energies.double(), (rows @ torch.eye(12).double()[first].T).square().mean(0)
    )
    assert spectrum.certificate is not None
    assert 0 < spectrum.certificate.captured() <= 1


def test_padding_is_no_token() -> None:
    batches = texts()
    for batch in batches:
        batch["attention_mask"] = torch.ones(4, 10)
        batch["attention_mask"][1, 3:] = 0
    masked = evatune.calibrate(Words(), batches, EXACT, targets=["table"]).spectra["table"]
    assert masked.rows == 4 * 33
    spectrum = evatune.calibrate(Words(padding=0), texts(), EXACT, targets=["table"]).spectra[
        "table"
    ]
    assert spectrum.rows == sum(int((b["ids"] != 0).sum()) for b in texts())
    assert spectrum.mean[0] == 0


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
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(**texts()[0]).sum().backward()
    optimiser.step()
    with pytest.raises(evatune.EvatuneError, match=r"already trained.*table"):
        evatune.initialize(model, texts())


def test_counts_of_shards_add_up_and_a_saved_calibration_comes_back(tmp_path: Path) -> None:
    whole = evatune.calibrate(Words(), texts(), EXACT, targets=["table"])
    parts = [
        evatune.calibrate(Words(), texts()[i : i + 2], EXACT, targets=["table"]) for i in (0, 2)
    ]
    merged = evatune.Calibration.merge(parts)
    assert merged.spectra["table"].total_energy == pytest.approx(1)
    assert torch.allclose(merged.spectra["table"].mean, whole.spectra["table"].mean)
    whole.save(tmp_path / "c.safetensors")
    assert torch.equal(
        evatune.Calibration.load(tmp_path / "c.safetensors").spectra["table"].directions,
        whole.spectra["table"].directions,
    )


# -- attention of torch ----------------------------------------------------------------------------


class Attends(nn.Module):
    def __init__(self, batch_first: bool = True, cross: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attn, self.head, self.cross = (
            nn.MultiheadAttention(16, 2, batch_first=batch_first),
            nn.Linear(16, 16),
            cross,
        )

    def forward(
        self, x: Tensor, memory: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> Tensor:
        query = x if self.attn.batch_first else x.transpose(0, 1)
        key = (
            query if memory is None else memory if self.attn.batch_first else memory.transpose(0, 1)
        )
        out = self.attn(query, key, key)[0]
        return self.head(out if self.attn.batch_first else out.transpose(0, 1))


def sequences(cross: bool = False) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    scales = 0.8 ** torch.arange(16)
    batches = []
    for _ in range(4):
        batch = {"x": torch.randn(5, 7, 16, generator=generator) * scales + 0.2}
        if cross:
            batch["memory"] = torch.randn(5, 9, 16, generator=generator) * scales.flip(0)
        batches.append(batch)
    return batches


def what_out_proj_sees(model: Attends, batch: dict[str, Tensor]) -> Tensor:
    """(batch, tokens, d): with the identity for its weight, attention gives what its output
    projection is given."""
    replaced = {"attn.out_proj.weight": torch.eye(16), "attn.out_proj.bias": torch.zeros(16)}
    replaced |= {"head.weight": torch.eye(16), "head.bias": torch.zeros(16)}
    with torch.no_grad():
        found: Tensor = torch.func.functional_call(model, replaced, kwargs=batch)
    return found


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_the_rows_of_both_projections_of_attention(
    batch_first: bool, cross: bool, masked: bool
) -> None:
    model, batches = Attends(batch_first, cross), sequences(cross)
    mask = torch.ones(5, 7)
    if masked:
        mask[2, 4:] = 0
    kept = mask.bool()
    ins = [b["x"][kept] for b in batches] + [b["memory"].flatten(0, 1) for b in batches if cross]
    outs = torch.cat([what_out_proj_sees(model, b)[kept] for b in batches])
    batches = [b | {"attention_mask": mask} for b in batches]
    spectra = evatune.calibrate(model, batches, EXACT, targets=["attn"]).spectra
    assert list(spectra) == ["attn", "attn.out_proj"]
    for name, rows in {"attn": torch.cat(ins), "attn.out_proj": outs}.items():
        assert spectra[name].rows == len(rows)
        assert torch.allclose(spectra[name].energies.double(), moments(rows, 6), rtol=1e-4)


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


# -- experts ---------------------------------------------------------------------------------------


class Experts(nn.Module):
    """Stacked weights, and for each token the experts that the batch names."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.is_transposed = transposed
        generator = torch.Generator().manual_seed(0)
        up, down = (torch.randn(4, *shape, generator=generator) / 3 for shape in ((12, 8), (8, 12)))
        self.up, self.down = (
            nn.Parameter(w.transpose(1, 2).contiguous() if transposed else w) for w in (up, down)
        )

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:  # (n, 8), (n, 2)
        out = torch.zeros_like(x)
        for expert in chosen.unique():
            token = torch.where((chosen == expert).any(1))[0]
            up, down = self.up[expert], self.down[expert]
            if self.is_transposed:
                out.index_add_(0, token, (torch.tanh(x[token] @ up) @ down).to(x.dtype))
            else:
                linear = nn.functional.linear
                out.index_add_(0, token, linear(torch.tanh(linear(x[token], up)), down).to(x.dtype))
        return out


class Mixture(nn.Module):
    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts, self.head = Experts(transposed), nn.Linear(8, 8)

    def forward(self, x: Tensor, chosen: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        found: Tensor = self.head(self.experts(x.flatten(0, 1), chosen.flatten(0, 1)).view(x.shape))
        return found


def routed(count: int = 4, seldom: int = 3) -> list[dict[str, Tensor]]:
    """Tokens that go to experts 0, 1 and 2; a single one of the first batch goes to `seldom`."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for number in range(count):
        x = torch.randn(3, 10, 8, generator=generator) * 0.8 ** torch.arange(8)
        chosen = torch.stack([torch.randperm(3, generator=generator)[:2] for _ in range(30)]).view(
            3, 10, 2
        )
        if number == 0 and seldom < 4:
            chosen[0, 0, 0] = seldom
        mask = torch.ones(3, 10)
        mask[1, 6:] = 0
        batches.append({"x": x, "chosen": chosen, "attention_mask": mask})
    return batches


def rows_of_expert(
    model: Mixture, batches: list[dict[str, Tensor]], expert: int
) -> tuple[Tensor, Tensor]:
    """What its slices of `up` and `down` are multiplied with, padding left out."""
    kept = [b["x"][b["attention_mask"].bool() & (b["chosen"] == expert).any(-1)] for b in batches]
    x = torch.cat(kept)
    up = model.experts.up[expert].detach()
    return x, torch.tanh(x @ (up if model.experts.is_transposed else up.T))


@pytest.mark.parametrize("transposed", [False, True])
def test_each_expert_has_the_rows_routed_to_it(transposed: bool) -> None:
    model, batches = Mixture(transposed), routed()
    config = evatune.CalibrationConfig(components=4, sketch="exact", tolerance=0)
    calibration = evatune.calibrate(model, batches, config, targets=["experts.up", "experts.down"])
    assert list(calibration.spectra) == [
        f"experts.{key}.{e}" for key in ("up", "down") for e in range(4)
    ]
    for expert in range(3):
        for key, rows in zip(("up", "down"), rows_of_expert(model, batches, expert), strict=True):
            spectrum = calibration.spectra[f"experts.{key}.{expert}"]
            assert spectrum.rows == len(rows)
            assert torch.allclose(spectrum.energies.double(), moments(rows, 4), rtol=1e-4)
            assert calibration.status[f"experts.{key}.{expert}"].usable


def test_experts_that_are_multiplied_all_at_once_have_the_rows_that_are_not_zero() -> None:
    class AtOnce(Experts):
        def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
            routed = (chosen[:, None, :] == torch.arange(4)[:, None]).any(-1)  # (n, 4)
            every = x[None] * routed.T[..., None]
            return torch.bmm(torch.tanh(torch.bmm(every, self.up)), self.down).sum(0)

    batches, config = routed(), evatune.CalibrationConfig(components=4, sketch="exact", tolerance=0)
    targets = ["experts.up", "experts.down"]
    model = Mixture(transposed=True)
    one_by_one = evatune.calibrate(model, batches, config, targets=targets)
    model.experts = AtOnce(transposed=True)
    at_once = evatune.calibrate(model, batches, config, targets=targets)
    for name, spectrum in one_by_one.spectra.items():
        assert at_once.spectra[name].rows == spectrum.rows
        assert torch.allclose(
            at_once.spectra[name].energies, spectrum.energies, rtol=1e-4, atol=1e-7
        )


def test_a_stack_of_one_weight_has_all_rows() -> None:
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(1, 6, 8))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight[0])

    x = torch.randn(50, 8)
    spectrum = evatune.calibrate(nn.Sequential(Single()), [x], EXACT, targets=["0.weight"]).spectra[
        "0.weight.0"
    ]
    assert spectrum.rows == 50
    assert torch.allclose(spectrum.energies.double(), moments(x, 6), rtol=1e-4)


def test_an_expert_that_is_seldom_called_says_so_and_starts_from_what_it_saw() -> None:
    model = get_peft_model(
        Mixture(),
        LoraConfig(r=3, target_modules=[], target_parameters=["experts.up", "experts.down"]),
    )
    calibration = evatune.initialize(model, routed())
    for key in ("up", "down"):
        assert calibration.spectra[f"experts.{key}.3"].rows == 1
        assert calibration.status[f"experts.{key}.3"] == "seldom_routed"
        assert "random" in calibration.status[f"experts.{key}.3"].advice
        rank = calibration.allocate().ranks[f"experts.{key}.3"]
        own = matrices(model, "A")[f"experts.{key}"][3 * rank :]
        assert torch.allclose(own @ own.T, torch.eye(rank), atol=1e-5)
        assert torch.equal(own[0], calibration.spectra[f"experts.{key}.3"].directions[0])


@pytest.mark.parametrize("seldom", [3, 9], ids=["once", "never"])
def test_shards_that_route_too_little_together_may_route_enough(
    seldom: int, tmp_path: Path
) -> None:
    config = evatune.CalibrationConfig(components=2, sketch="exact", tolerance=0)
    parts = [
        evatune.calibrate(Mixture(), routed(1, seldom), config, targets=["experts.up"])
        for _ in range(2)
    ]
    parts[0].save(tmp_path / "part.safetensors")
    parts[0] = evatune.Calibration.load(tmp_path / "part.safetensors")
    assert {part.status["experts.up.3"] for part in parts} == {"seldom_routed"}
    merged = evatune.Calibration.merge(parts)
    assert merged.status["experts.up.3"] == ("data_exhausted" if seldom == 3 else "seldom_routed")
    assert merged.layers["experts.up.3"].spec.rank_group == "experts.up"
    assert len(set(merged.allocate(rank=1, rho=2).ranks.values())) == 1


def test_a_parameter_whose_products_never_come_is_an_error() -> None:
    class Unused(Mixture):
        def forward(
            self, x: Tensor, chosen: Tensor, attention_mask: Tensor | None = None
        ) -> Tensor:
            return self.head(x)

    model = get_peft_model(
        Unused(), LoraConfig(r=2, target_modules=["head"], target_parameters=["experts.up"])
    )
    with pytest.raises(LayerError, match=r"never_called: experts\.up\.0"):
        evatune.initialize(model, routed())


def test_a_model_that_fails_inside_its_experts_is_left_as_it_was() -> None:
    class Failing(Experts):
        def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
            super().forward(x, chosen)
            raise RuntimeError("the experts broke")

    model = Mixture()
    model.experts = Failing(transposed=False)
    # as transformers names it
    model.experts.config = SimpleNamespace(_experts_implementation="grouped_mm")
    with pytest.raises(RuntimeError, match="the experts broke"):
        evatune.calibrate(model, routed(), EXACT, targets=["experts.up"])
    assert not _len_torch_dispatch_stack()
    assert not model.experts._forward_pre_hooks
    assert not model.experts._forward_hooks
    assert model.experts.config._experts_implementation == "grouped_mm"


def test_an_expert_that_no_token_reaches_does_not_hold_up_the_rest() -> None:
    config = evatune.CalibrationConfig(rank=2, max_batches=32, tolerance=0.05)
    calibration = evatune.calibrate(
        Mixture(), routed(1, seldom=9) * 32, config, targets=["experts.up", "head"]
    )
    assert calibration.batches < 32
    assert calibration.status["experts.up.3"] == "seldom_routed"


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


def test_experts_that_are_layers_of_their_own_have_their_own_rows_and_statuses() -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(8, 8) for _ in range(4)])

        def forward(self, x: Tensor, chosen: Tensor, attention_mask: Tensor) -> Tensor:
            x, chosen = x.flatten(0, 1), chosen.flatten(0, 1)
            return sum(  # type: ignore[return-value]
                layer(x[(chosen == number).any(1)]).sum()
                for number, layer in enumerate(self.experts)
                if (chosen == number).any()
            )

    with pytest.warns(
        UserWarning,
        match=r"no mask fits the rows of these layers.*: experts.0, experts.1, experts.2; ",
    ):
        calibration = evatune.calibrate(
            Listed(), routed(seldom=9), evatune.CalibrationConfig(components=4, tolerance=0)
        )
    assert calibration.status["experts.3"] == "never_called"
    assert calibration.status["experts.0"].usable
    assert calibration.spectra["experts.0"].rows == sum(
        int((b["chosen"] == 0).any(-1).sum()) for b in routed(seldom=9)
    )


def test_padding_is_left_out_of_experts_rows_under_autocast_and_in_inference_mode_too() -> None:
    batches = routed()
    config = evatune.CalibrationConfig(components=4, sketch="exact", tolerance=0)
    targets = ["experts.up", "experts.down"]
    plain = evatune.calibrate(Mixture(), batches, config, targets=targets).spectra

    def autocast(model: nn.Module, batch: dict[str, Tensor]) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(**batch)

    def inference(model: nn.Module, batch: dict[str, Tensor]) -> None:
        with torch.inference_mode():
            model(**batch)

    for forward in (autocast, inference):
        found = evatune.calibrate(
            Mixture(), batches, config, targets=targets, forward=forward
        ).spectra
        for name, spectrum in plain.items():
            assert found[name].rows == spectrum.rows
            assert found[name].total_energy == pytest.approx(spectrum.total_energy, rel=0.02)


# -- what is asked for by hand, and what is not supported ------------------------------------------


def test_a_rows_function_is_handed_patches_and_ids() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.conv = nn.Embedding(12, 8), nn.Conv1d(8, 4, 3)

        def forward(self, ids: Tensor) -> Tensor:
            return self.conv(self.table(ids).transpose(1, 2))

    shapes = {}

    def rows(activation: Tensor, batch: Any, name: str) -> Tensor:
        shapes[name] = tuple(activation.shape)
        return activation[:2].flatten() if name == "table" else activation[:2].flatten(0, 1)

    calibration = evatune.calibrate(Both(), texts(), EXACT, targets=["table", "conv"], rows=rows)
    assert shapes == {"table": (4, 10), "conv": (4, 8, 24)}
    assert (calibration.spectra["table"].rows, calibration.spectra["conv"].rows) == (4 * 20, 4 * 16)
    with pytest.raises(
        DataError,
        match=r"'table'\) returned shape \(4, 10\); it must return a tensor of shape \(rows,\)",
    ):
        evatune.calibrate(
            Both(),
            texts(),
            EXACT,
            targets=["table"],
            rows=lambda activation, batch, name: activation,
        )


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
    with pytest.warns(UserWarning, match=r"start as PEFT initialised them: wide \(Conv1d"):
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


def test_kinds_that_are_not_supported_are_named_with_those_that_are() -> None:
    model = nn.ModuleDict(
        {"a": nn.Bilinear(2, 2, 2), "b": nn.ConvTranspose2d(2, 2, 1), "c": nn.Linear(2, 2)}
    )
    with pytest.raises(
        TargetError, match=r"a \(Bilinear\), b \(ConvTranspose2d\); supported are .*nn\.Embedding"
    ):
        find_target_layers(model, ["a", "b", "c"])
    split = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2, kdim=4)})
    with pytest.raises(
        TargetError, match=r"attn \(MultiheadAttention\).*query, key and value of one width"
    ):
        find_target_layers(split, ["attn"])


def adapted(method: str, model: nn.Module, targets: list[str]) -> Any:
    setup = AdapterSetup(
        rank=2, alpha=2, targets=targets, task_type=None, head=[], new_head=False, steps=1
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


@pytest.mark.parametrize(
    ("build", "batches", "options"),
    [
        (Words, texts, {"target_modules": ["table", "head"]}),
        (Attends, sequences, {"target_modules": ["attn", "head"]}),
        (
            Mixture,
            routed,
            {"target_modules": ["head"], "target_parameters": ["experts.up", "experts.down"]},
        ),
    ],
)
def test_a_saved_adapter_says_the_rank_and_scale_of_every_kind(
    build: Any, batches: Any, options: Any, tmp_path: Path
) -> None:
    calibration, start = round_trip(
        build, LoraConfig(r=3, lora_alpha=6, **options), batches(), tmp_path
    )
    rows = {row["layer"]: row for row in adapter_rows(tmp_path / "adapter_model.safetensors")}
    ranks = {
        name.removesuffix(".0"): rank
        for name, rank in calibration.allocate().ranks.items()
        if name[-1] not in "123"
    }
    assert {name: row["rank"] for name, row in rows.items()} == {
        name: rank for name, rank in ranks.items() if rank
    }
    assert {row["scale"] for row in rows.values()} == {2}
    assert rows.keys() == start.keys()


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
        assert torch.allclose(merge(build(), tmp_path)(x), model(x), rtol=1e-4, atol=1e-4)
    else:
        with pytest.raises(AdapterError, match=r"0 \(Conv2d\(.*cannot be merged"):
            merge(build(), tmp_path)


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


# -- what an interruption and autocast leave -------------------------------------------------------


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attn = nn.MultiheadAttention(16, 2, batch_first=True)
        self.interrupt = False

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.attn(x, x, x, need_weights=False)[0]
        return out


def test_ctrl_c_inside_attention_leaves_the_model_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, x = Attending(), torch.randn(2, 8, 16)
    before = model(x)

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", interrupted)
        with pytest.raises(KeyboardInterrupt):
            evatune.calibrate(model, [x], targets=["attn"])
    assert torch.equal(model(x), before)
    assert not model.attn._forward_pre_hooks


def test_autocast_around_all_batches_hides_no_product_of_attention() -> None:
    data = [torch.randn(2, 8, 16) for _ in range(4)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = evatune.calibrate(
            Attending(), data, evatune.CalibrationConfig(rank=4, tolerance=0), targets=["attn"]
        )
    assert {spectrum.rows for spectrum in found.spectra.values()} == {4 * 16}
    assert torch.is_autocast_cache_enabled()


def test_attention_named_together_with_its_output_projection_is_one_layer() -> None:
    names = {"attn", "attn.out_proj"}
    assert {
        target_layer.name for target_layer in find_target_layers(Attending(), ["attn", "out_proj"])
    } == names
    assert [
        target_layer.name for target_layer in find_target_layers(Attending(), ["attn", "out_proj"])
    ].count("attn.out_proj") == 1
