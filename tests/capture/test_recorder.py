"""Which modules, which rows, who shares an input; and the model as it was."""

from __future__ import annotations

import random
from collections import UserDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import BatchEncoding, GPT2Config, GPT2LMHeadModel

import evatune
from evatune.calibration.loop import Progress
from evatune.capture import RowSelector, find_target_layers
from evatune.capture.row_selection import label_mask, token_mask
from evatune.errors import DataError, TargetError
from tests.helpers import Toy, inputs, tiny_bert, tiny_llama, tokens

torch.set_num_threads(1)
EXACT = evatune.CalibrationConfig(rank=4, sketch="exact", tolerance=0)


def second_moment(rows: Tensor) -> Tensor:
    rows = rows.double().reshape(-1, rows.shape[-1])
    return torch.linalg.eigvalsh(rows.T @ rows / len(rows)).flip(0)


# -- targets ---------------------------------------------------------------------------------------


def names(model: nn.Module, targets: Any) -> list[str]:
    return [target_layer.name for target_layer in find_target_layers(model, targets)]


# torch.compile imports what torch itself has deprecated
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_all_linear_leaves_out_the_output_embedding_as_peft_does() -> None:
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    for build in (tiny_llama, tiny_bert):
        adapted = get_peft_model(build(), LoraConfig(target_modules="all-linear"))
        theirs = [
            n.removeprefix("base_model.model.")
            for n, m in adapted.named_modules()
            if isinstance(m, LoraLayer)
        ]
        assert names(build(), "all-linear") == theirs


def test_targets_are_suffixes_names_or_a_regular_expression() -> None:
    toy = Toy()
    assert names(toy, ["q"]) == ["blocks.0.q", "blocks.1.q"]
    assert names(toy, ["blocks.1.q", "down"]) == ["blocks.0.down", "blocks.1.q", "blocks.1.down"]
    assert names(toy, r".*\.0\.(q|v)") == ["blocks.0.q", "blocks.0.v"]
    assert len(names(toy, None)) == 10


def test_a_target_that_matches_nothing_says_what_would() -> None:
    with pytest.raises(
        TargetError, match=r"\['query'\] match no layer.*end in: down, k, q, up, v.*all-linear"
    ):
        find_target_layers(Toy(), ["query"])
    with pytest.raises(TargetError, match="not a regular expression"):
        find_target_layers(Toy(), "(")
    with pytest.raises(TargetError, match="no linear layer at all"):
        find_target_layers(nn.Sequential(nn.ReLU()), "all-linear")


def test_a_target_of_an_unsupported_kind_is_named() -> None:
    with pytest.raises(TargetError, match=r"conv \(ConvTranspose1d\).*exclude_modules"):
        find_target_layers(nn.ModuleDict({"conv": nn.ConvTranspose1d(2, 2, 1)}), ["conv"])


def test_gpt2_conv1d_is_a_linear_layer_with_its_weight_transposed() -> None:
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=60, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    ).eval()
    target_layers = {
        target_layer.name: target_layer for target_layer in find_target_layers(model, "all-linear")
    }
    assert (
        target_layers["transformer.h.0.attn.c_attn"].in_features,
        target_layers["transformer.h.0.attn.c_attn"].out_features,
    ) == (16, 48)
    calibration = evatune.calibrate(model, tokens(), EXACT)
    assert calibration.spectra["transformer.h.0.mlp.c_proj"].directions.shape == (8, 64)


# -- rows ------------------------------------------------------------------------------------------


def test_padding_is_left_out() -> None:
    seen: list[Tensor] = []
    model = tiny_bert()
    batches = tokens(padded=True)
    hook = model.encoder.layer[1].output.dense.register_forward_pre_hook(
        lambda m, a: seen.append(a[0].clone())
    )
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    hook.remove()
    rows = torch.cat([x[b["attention_mask"].bool()] for x, b in zip(seen, batches, strict=True)])
    spectrum = evatune.calibrate(model, batches, EXACT).spectra["encoder.layer.1.output.dense"]
    assert spectrum.rows == len(rows)
    assert torch.allclose(spectrum.energies.double(), second_moment(rows)[:8], rtol=1e-4)


@pytest.mark.parametrize(
    "form", ["long", "bool", "float", "4d-bool", "4d-additive", "4d-causal", "3d", "query-free"]
)
def test_every_form_of_attention_mask_means_the_same(form: str) -> None:
    real = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]]).bool()
    square = real[:, None, :].expand(2, 4, 4)
    mask = {
        "long": real.long(),
        "bool": real,
        "float": real.float(),
        "4d-bool": square[:, None],
        "4d-additive": torch.where(square, 0.0, torch.finfo(torch.float32).min)[:, None],
        "4d-causal": torch.where(square & torch.ones(4, 4).tril().bool(), 0.0, float("-inf"))[
            :, None
        ],
        "3d": square.long(),
        "query-free": real[:, None, None, :],
    }[form]
    found = token_mask(mask)
    assert found is not None
    assert torch.equal(found, real)


def test_an_additive_mask_that_masks_nothing_keeps_every_token() -> None:
    assert token_mask(torch.zeros(2, 1, 3, 3)).all()  # type: ignore[union-attr]


def test_labels_choose_the_positions_that_predict_them() -> None:
    labels = torch.tensor([[-100, -100, 7, 8], [-100, 5, -100, 6]])
    assert label_mask(labels, -100, shift=False).tolist() == [
        [False, False, True, True],
        [False, True, False, True],
    ]
    assert label_mask(labels, -100, shift=True).tolist() == [
        [False, True, True, False],
        [True, False, True, False],
    ]


def test_labels_only_shifts_for_a_causal_model_and_not_for_an_encoder() -> None:
    config = evatune.CalibrationConfig(rank=2, sketch="exact", tolerance=0, labels_only=True)
    batches = []
    for batch in tokens(padded=True):
        labels = torch.where(batch["attention_mask"].bool(), batch["input_ids"], -100)
        labels[:, :4] = -100
        batches.append({**batch, "labels": labels})
    shifted = evatune.calibrate(tiny_llama(), batches, config)
    wanted = sum(
        int((label_mask(b["labels"], -100, True) & b["attention_mask"].bool()).sum())
        for b in batches
    )
    assert {s.rows for s in shifted.spectra.values()} == {wanted}
    plain = evatune.calibrate(
        tiny_bert(),
        batches,
        config,
        forward=lambda m, b: m(b["input_ids"], b["attention_mask"]),
        targets=["intermediate.dense"],
    )
    assert next(iter(plain.spectra.values())).rows == sum(
        int((b["labels"] != -100).sum()) for b in batches
    )


def test_labels_only_without_token_labels_says_so() -> None:
    batches = [{"x": x, "labels": torch.zeros(4)} for x in inputs()]
    with pytest.raises(DataError, match=r"labels_only needs token labels.*\(4,\)"):
        evatune.calibrate(Toy(), batches, evatune.CalibrationConfig(labels_only=True))


def test_pooled_rows_and_flattened_rows_follow_their_shape() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    selector = RowSelector(mask.bool())
    assert selector.rows(torch.zeros(2, 3, 5))[1].tolist() == [0, 1, 3]  # type: ignore[union-attr]
    assert selector.rows(torch.zeros(6, 5))[1].tolist() == [0, 1, 3]  # type: ignore[union-attr]
    assert selector.rows(torch.zeros(2, 5))[1] is None
    assert selector.rows(torch.zeros(2, 3, 2, 5))[1].tolist() == [0, 1, 2, 3, 6, 7]  # type: ignore[union-attr]
    assert selector.rows(torch.zeros(2, 7, 5))[1] is None


# -- batches ---------------------------------------------------------------------------------------


@dataclass
class Batch:
    x: Tensor
    attention_mask: Tensor


def as_kind(kind: str, xs: list[Tensor]) -> Any:
    full = [torch.ones(4, x.shape[1]) for x in xs]
    return {
        "tensors": lambda: xs,
        "tuples": lambda: [(x,) for x in xs],
        "lists": lambda: [[x] for x in xs],
        "dicts": lambda: [{"x": x} for x in xs],
        "BatchEncoding": lambda: [
            BatchEncoding({"x": x, "attention_mask": m}) for x, m in zip(xs, full, strict=True)
        ],
        "UserDict": lambda: [UserDict({"x": x}) for x in xs],
        "dataclass": lambda: [Batch(x, m) for x, m in zip(xs, full, strict=True)],
        "generator": lambda: (x for x in xs),
        "iterator": lambda: iter(xs),
        "DataLoader": lambda: torch.utils.data.DataLoader(torch.cat(xs), batch_size=4),
    }[kind]()


@pytest.mark.parametrize(
    "kind",
    [
        "tuples",
        "lists",
        "dicts",
        "BatchEncoding",
        "UserDict",
        "dataclass",
        "generator",
        "iterator",
        "DataLoader",
    ],
)
def test_batches_of_every_kind_give_the_same(kind: str) -> None:
    xs = inputs()
    expected = evatune.calibrate(Toy(), xs, EXACT)
    found = evatune.calibrate(Toy(), as_kind(kind, xs), EXACT)
    for name, spectrum in expected.spectra.items():
        assert torch.equal(found.spectra[name].energies, spectrum.energies)


def test_each_batch_is_read_once_and_no_more_than_max_batches() -> None:
    read = []

    def stream() -> Iterator[Tensor]:
        for number, x in enumerate(inputs(50)):
            read.append(number)
            yield x

    config = evatune.CalibrationConfig(rank=4, max_batches=5, tolerance=0)
    calibration = evatune.calibrate(Toy(), stream(), config)
    assert read == [0, 1, 2, 3, 4]
    assert calibration.batches == 5


@pytest.mark.parametrize(
    ("batches", "text"),
    [
        ([], "not one batch came"),
        (iter(()), "not one batch came"),
        (torch.zeros(2, 3, 16), "a single Tensor"),
        ({"x": torch.zeros(2, 3, 16)}, "a single dict"),
        (None, "NoneType, which cannot be iterated over"),
        (3, "int, which cannot be iterated over"),
    ],
)
def test_what_is_not_batches_is_refused_in_one_sentence(batches: Any, text: str) -> None:
    with pytest.raises(DataError, match=text):
        evatune.calibrate(Toy(), batches)


def test_a_batch_the_model_does_not_take_gets_a_hint() -> None:
    with pytest.raises(TypeError) as caught:
        evatune.calibrate(Toy(), [{"pixels": torch.zeros(1)}])
    assert "pass forward=lambda model, batch" in caught.value.__notes__[0]


def test_forward_and_rows_replace_the_defaults() -> None:
    xs = inputs()
    asked: set[str] = set()

    def rows(activation: Tensor, batch: Any, name: str) -> Tensor:
        asked.add(name)
        return (
            activation[:, 0] if name.endswith("q") else activation.reshape(-1, activation.shape[-1])
        )

    found = evatune.calibrate(
        Toy(),
        [{"image": x} for x in xs],
        EXACT,
        forward=lambda m, b: m(b["image"]),
        rows=rows,
        targets=["q", "k"],
    )
    assert asked == {"blocks.0.q", "blocks.0.k", "blocks.1.q", "blocks.1.k"}
    assert found.spectra["blocks.0.q"].rows == 4 * len(xs)
    assert found.spectra["blocks.0.k"].rows == 64 * len(xs)
    assert torch.allclose(
        found.spectra["blocks.0.q"].energies.double(),
        second_moment(torch.cat(xs)[:, 0])[:8],
        rtol=1e-4,
    )


def test_rows_of_a_wrong_shape_name_the_layer() -> None:
    with pytest.raises(DataError, match=r"'blocks.0.q'\) returned shape \(4, 16, 16\)"):
        evatune.calibrate(Toy(), inputs(), rows=lambda activation, batch, name: activation)


# -- sharing ---------------------------------------------------------------------------------------


class Scripted(nn.Module):
    """Calls layers a, b and c as the batch says: a list of (layer, index of tensor)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, calls: list[tuple[str, int]], *tensors: Tensor) -> None:
        for layer, index in calls:
            getattr(self, layer)(tensors[index])


def run_script(
    *forwards: list[tuple[str, int]], seed: int = 0
) -> tuple[evatune.Calibration, dict[str, Tensor]]:
    """Calibrate on scripted forwards; also the rows each layer truly saw."""
    generator = torch.Generator().manual_seed(seed)
    truth: dict[str, list[Tensor]] = {"a": [], "b": [], "c": []}
    batches = []
    for calls in forwards:
        tensors = [torch.randn(20, 8, generator=generator) * (i + 1) for i in range(4)]
        for layer, index in calls:
            truth[layer].append(tensors[index])
        batches.append((calls, *tensors))
    config = evatune.CalibrationConfig(components=4, tolerance=0)
    calibration = evatune.calibrate(Scripted(), batches, config)
    return calibration, {
        name: torch.cat(rows) if rows else torch.zeros(0, 8) for name, rows in truth.items()
    }


SAME = [("a", 0), ("b", 0), ("c", 0)]


@pytest.mark.parametrize(
    "forwards",
    [
        pytest.param([SAME] * 4, id="always the same"),
        pytest.param([SAME, SAME, [("a", 0), ("b", 1), ("c", 0)], SAME], id="b strays once"),
        pytest.param(
            [SAME, [("a", 0), ("b", 1), ("c", 1)], SAME, SAME, SAME], id="b and c stray together"
        ),
        pytest.param([SAME, [("a", 0), ("c", 0)], SAME], id="b is left out once"),
        pytest.param([[("a", 0)], SAME, SAME], id="b and c come late"),
        pytest.param(
            [[("b", 0), ("b", 1), ("a", 0), ("a", 1), ("c", 0)], SAME],
            id="several calls per forward",
        ),
        pytest.param(
            [SAME, [("a", 0), ("a", 1), ("b", 0), ("c", 1), ("c", 0)], SAME],
            id="the second call differs",
        ),
        pytest.param(
            [SAME, [("a", 0), ("a", 1), ("a", 2)], [("b", 0), ("b", 1)], SAME],
            id="whole forwards apart",
        ),
        pytest.param([[("a", 0), ("b", 1)], SAME, SAME], id="different at first, the same later"),
        pytest.param(
            [SAME, [("b", 0), ("a", 0), ("c", 3)], [("c", 1), ("a", 1), ("b", 2)]],
            id="another order",
        ),
    ],
)
def test_each_layer_gets_exactly_its_own_rows(forwards: list[list[tuple[str, int]]]) -> None:
    calibration, truth = run_script(*forwards)
    for name, rows in truth.items():
        spectrum = calibration.spectra[name]
        assert spectrum.rows == len(rows)
        assert torch.allclose(spectrum.energies.double(), second_moment(rows)[:4], rtol=1e-3)


def test_layers_with_one_input_share_one_sketch_until_they_part() -> None:
    together, _ = run_script(SAME, SAME)
    assert len({layer.input for layer in together.layers.values()}) == 1
    apart, _ = run_script(SAME, [("a", 0), ("b", 1), ("c", 0)])
    assert apart.layers["a"].input == apart.layers["c"].input != apart.layers["b"].input


def test_layers_of_a_real_model_share_what_they_should() -> None:
    calibration = evatune.calibrate(tiny_llama(), tokens(), EXACT)
    by_input: dict[int | None, list[str]] = {}
    for name, layer in calibration.layers.items():
        by_input.setdefault(layer.input, []).append(name.rsplit(".", 1)[1])
    assert sorted(map(tuple, by_input.values())) == sorted(
        2 * [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)]
    )


def test_all_linear_leaves_out_the_output_embedding_be_it_compiled_or_trained() -> None:
    compiled, trained = tiny_llama(), tiny_llama()
    compiled.lm_head = torch.compile(compiled.lm_head, backend="eager")
    trained = get_peft_model(
        trained, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    )
    plain = {target_layer.name for target_layer in find_target_layers(tiny_llama(), "all-linear")}
    for model in (compiled, trained):
        assert {
            target_layer.name for target_layer in find_target_layers(model, "all-linear")
        } == plain


class Overwrites(nn.Module):
    """Hands one tensor to two layers, as it is or an alias that counts its own writes, but writes
    to it in between."""

    def __init__(self, aliases: bool) -> None:
        super().__init__()
        self.aliases = aliases
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> None:
        x = x.clone()
        self.a(x.data if self.aliases else x)
        x.mul_(3)
        self.b(x.data if self.aliases else x)


@pytest.mark.parametrize("aliases", [False, True])
def test_a_tensor_written_to_between_two_layers_is_two_inputs(aliases: bool) -> None:
    xs = [torch.randn(30, 8) for _ in range(3)]
    calibration = evatune.calibrate(
        Overwrites(aliases), xs, evatune.CalibrationConfig(components=4, tolerance=0)
    )
    a, b = calibration.spectra["a"], calibration.spectra["b"]
    assert b.total_energy == pytest.approx(9 * a.total_energy, rel=1e-4)


# -- as found --------------------------------------------------------------------------------------


class Failing(Toy):
    """Raises in the middle of its third forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(
        self, x: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        self.calls += 1
        x = self.blocks[0](x)
        if self.calls == 3:
            raise RuntimeError("the model broke")
        return self.blocks[1](x)


def state_of(model: nn.Module) -> list[Any]:
    return [
        (
            name,
            module.training,
            len(module._forward_pre_hooks),
            len(module._forward_hooks),
            [
                (n, p.requires_grad, p.grad is None)
                for n, p in module.named_parameters(recurse=False)
            ],
        )
        for name, module in model.named_modules()
    ]


@pytest.mark.parametrize("model", [Toy, Failing])
def test_model_batches_and_random_states_come_back_as_they_were(model: type[Toy]) -> None:
    net = model()
    net.train()
    net.blocks[0].eval()
    net.blocks[1].q.weight.requires_grad_(False)
    net(inputs()[0]).sum().backward()
    net.blocks[0].q.register_forward_pre_hook(lambda module, args: None)
    xs = inputs()
    batches = [{"x": x, "attention_mask": torch.ones(4, x.shape[1])} for x in xs]
    copies = [{key: value.clone() for key, value in batch.items()} for batch in batches]
    before = state_of(net)
    weights = {name: p.clone() for name, p in net.named_parameters()}
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    expected = (torch.rand(1), random.random(), np.random.rand())
    torch.manual_seed(5), random.seed(5), np.random.seed(5)

    def noisy() -> Iterator[dict[str, Tensor]]:
        for batch in batches:
            torch.rand(3), random.random(), np.random.rand()
            yield batch

    if model is Failing:
        with pytest.raises(RuntimeError, match="the model broke"):
            evatune.calibrate(net, noisy(), EXACT)
    else:
        evatune.calibrate(net, noisy(), EXACT)
    assert state_of(net) == before
    assert (torch.rand(1), random.random(), np.random.rand()) == expected
    assert all(torch.equal(p, weights[name]) for name, p in net.named_parameters())
    for batch, copy in zip(batches, copies, strict=True):
        assert batch.keys() == copy.keys()
        assert all(torch.equal(batch[key], copy[key]) for key in copy)


def test_an_exception_in_the_data_leaves_the_model_alone() -> None:
    net = Toy().train()
    before = state_of(net)

    def broken() -> Iterator[Tensor]:
        yield from inputs(2)
        raise OSError("disk on fire")

    with pytest.raises(OSError, match="disk on fire"):
        evatune.calibrate(net, broken())
    assert state_of(net) == before


class Parting(nn.Module):
    """a and b start with one input and part; c comes later with that same input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        first, second, third = x.split(40)
        self.a(first)
        self.b(first)
        self.a(second)
        self.b(third)
        return self.c(first)


def test_a_layer_that_comes_after_its_group_has_parted_gets_its_own_rows() -> None:
    rows = (
        torch.randn(120, 8, generator=torch.Generator().manual_seed(0))
        * torch.arange(1, 121)[:, None]
    )
    calibration = evatune.calibrate(Parting(), [rows], EXACT)
    for name, own in {
        "a": rows[:80],
        "b": torch.cat([rows[:40], rows[80:]]),
        "c": rows[:40],
    }.items():
        assert calibration.spectra[name].rows == len(own)
        assert calibration.spectra[name].total_energy == pytest.approx(
            float(own.square().sum(1).mean()), rel=1e-5
        )


@pytest.mark.parametrize("sketch", ["nystrom", "exact", "incremental"])
def test_a_first_batch_without_rows_is_no_obstacle_when_centring(sketch: str) -> None:
    batches = [torch.zeros(0, 8), *torch.randn(4, 120, 8).unbind()]
    config = evatune.CalibrationConfig(rank=2, sketch=sketch, center=True, tolerance=0)
    assert evatune.calibrate(Parting(), batches[1:], config, targets=["c"]).status["c"].usable
    assert (
        evatune.calibrate(nn.Sequential(nn.Linear(8, 8)), batches, config).spectra["0"].rows == 480
    )


def test_a_forward_pass_in_inference_mode_is_fine_and_sees_writes_in_place() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            h = x + 0
            self.a(h)
            h.mul_(3)
            return self.b(h)

    batches = [torch.randn(50, 8, generator=torch.Generator().manual_seed(1)) for _ in range(3)]
    calibration = evatune.calibrate(
        InPlace(), batches, EXACT, forward=torch.inference_mode()(lambda m, x: m(x))
    )
    energies = {name: spectrum.total_energy for name, spectrum in calibration.spectra.items()}
    assert energies["b"] == pytest.approx(9 * energies["a"], rel=1e-5)


def test_torchs_own_transformer_layers_are_not_passed_by() -> None:
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 4, 24, batch_first=True), 2, enable_nested_tensor=True
    ).eval()
    mask = torch.zeros(4, 10, dtype=torch.bool)
    mask[:, 7:] = True
    batch = {"src": torch.randn(4, 10, 16), "src_key_padding_mask": mask}
    before = torch.backends.mha.get_fastpath_enabled()
    calibration = evatune.calibrate(model, [batch] * 4, EXACT, targets=["linear1", "linear2"])
    assert all(status.usable for status in calibration.status.values())
    assert torch.backends.mha.get_fastpath_enabled() == before


# torch.compile imports what torch itself has deprecated
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_names_of_a_compiled_model_are_those_of_the_model() -> None:
    assert names(torch.compile(Toy()), None) == names(Toy(), None)


def test_rows_are_handed_the_kind_of_batch_that_was_given() -> None:
    batch = BatchEncoding(tokens(1)[0])
    kinds: list[type] = []

    def rows(x: Tensor, given: Any, name: str) -> Tensor:
        kinds.append(type(given))
        return x[given.attention_mask.bool()] if x.ndim == 3 else x

    evatune.calibrate(tiny_bert(), [batch] * 2, EXACT, rows=rows)
    assert set(kinds) == {BatchEncoding}


def test_a_module_that_is_trained_in_full_keeps_its_name_and_its_original_is_watched() -> None:
    from peft import LoraConfig, get_peft_model

    options = {"target_modules": ["query"], "task_type": "SEQ_CLS"}
    model = get_peft_model(tiny_bert("classification"), LoraConfig(r=2, **options))
    assert names(model, "all-linear") == names(tiny_bert("classification"), "all-linear")
    assert names(model, None) == [
        name for name in names(model, "all-linear") if name.endswith("query")
    ]
    calibration = evatune.calibrate(model, tokens(8), EXACT, targets=["classifier"])
    assert calibration.status["classifier"].usable


# -- forward passes that are not ours --------------------------------------------------------------


def test_forward_passes_of_others_are_not_counted() -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules="all-linear")).train()
    prompts = [batch["input_ids"] for batch in tokens(4)]
    seen: list[tuple[bool, bool, bool, int]] = []

    def note(*_: Any) -> None:
        layer = model.base_model.model.model.layers[0].mlp.up_proj
        hooks = len(layer.base_layer._forward_pre_hooks)
        seen.append((model.training, torch.is_grad_enabled(), layer._disable_adapters, hooks))

    def on_policy() -> Iterator[dict[str, Tensor]]:
        for ids in prompts:
            note()
            made = model.generate(input_ids=ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
            model(input_ids=made).logits.sum().backward()  # nothing forbids it
            yield {"input_ids": ids}

    def progress(now: Progress) -> None:
        note()
        model(prompts[0])

    calibration = evatune.calibrate(model, on_policy(), EXACT, progress=progress)
    assert {spectrum.rows for spectrum in calibration.spectra.values()} == {4 * 4 * 12}
    # As the caller's: with adapters, in training, recording gradients, without a hook.
    assert set(seen) == {(True, True, False, 0)}


def test_a_pass_of_others_between_two_of_ours_does_not_end_early() -> None:
    model, ends = tiny_llama(), []
    model.lm_head.register_forward_pre_hook(lambda module, args: ends.append(len(args[0])))

    def stream() -> Iterator[dict[str, Tensor]]:
        for batch in tokens(5):
            model(batch["input_ids"][:2])
            yield batch

    evatune.calibrate(model, stream(), EXACT)
    assert ends == [2, 4, 2, 2, 2, 2]  # our passes end at the last watched layer, but for the first


def test_a_generator_that_fails_or_changes_modes_leaves_the_model_as_it_was() -> None:
    net = Toy().train()
    before = state_of(net)

    def broken() -> Iterator[Tensor]:
        for x in inputs(2):
            net.eval()
            net(x)
            yield x
        raise OSError("disk on fire")

    with pytest.raises(OSError, match="disk on fire"):
        evatune.calibrate(net, broken(), EXACT)
    assert state_of(net) == before
