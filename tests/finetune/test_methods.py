"""Methods of fine-tuning: how each starts, what it leaves alone, and where it says that it cannot
run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from torch import Tensor

from evatune import initialize
from evatune.adapters.lora_layers import lora_layers
from evatune.errors import ConfigError
from evatune.finetune.methods import METHODS, AdapterSetup, Preparation, find_method
from evatune.finetune.methods.weight_init import WeightInit
from evatune.finetune.recipe import load
from evatune.finetune.run import run
from evatune.sketch.spectrum import principal_angles
from evatune.trainers.hf import training_batches
from tests.helpers import tiny_bert, tiny_llama, tokens

torch.set_num_threads(1)

RANK, ALPHA = 4, 8
ADAPTERS = [name for name, method in METHODS.items() if method.saved_as == "adapter"]
STARTS = [name for name, method in METHODS.items() if isinstance(method, WeightInit)]
LAYER_TYPES = ["bert", "llama", "gpt2", "dinov2"]
WHERE = [
    (name, kind)
    for name in STARTS
    for kind in LAYER_TYPES
    if kind != "gpt2" or METHODS[name].conv1d
]


class Case:
    """A tiny model of one kind, with labelled batches."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.targets: str | list[str] = (
            ["c_attn", "c_proj", "c_fc"] if kind == "gpt2" else "all-linear"
        )
        self.task_type = {
            "bert": "SEQ_CLS",
            "llama": "CAUSAL_LM",
            "gpt2": "CAUSAL_LM",
            "dinov2": None,
        }[kind]
        generator = torch.Generator().manual_seed(0)
        classes = torch.tensor([0, 1, 2, 0])
        if kind == "dinov2":
            images = [torch.randn(4, 3, 28, 28, generator=generator) for _ in range(4)]
            self.batches: list[dict[str, Tensor]] = [
                {"pixel_values": x, "labels": classes} for x in images
            ]
        else:
            self.batches = [
                batch | {"labels": classes if kind == "bert" else batch["input_ids"]}
                for batch in tokens(4)
            ]

    def model(self) -> Any:
        torch.manual_seed(0)
        if self.kind == "bert":
            return tiny_bert("classification", num_labels=3)
        if self.kind == "llama":
            return tiny_llama()
        if self.kind == "gpt2":
            config = transformers.GPT2Config(
                vocab_size=60, n_embd=16, n_layer=2, n_head=2, n_positions=64
            )
            return transformers.GPT2LMHeadModel(config).eval()
        config = transformers.Dinov2Config(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
            mlp_ratio=2,
            num_labels=3,
        )
        return transformers.Dinov2ForImageClassification(config).eval()

    def of(self, size: int) -> Iterator[dict[str, Tensor]]:
        whole = {key: torch.cat([batch[key] for batch in self.batches]) for key in self.batches[0]}
        for at in range(0, len(whole["labels"]), size):
            yield {key: value[at : at + size] for key, value in whole.items()}

    def adapted(self, method: str, rank: int = RANK, targets: Any = None) -> Any:
        head = self.kind in ("bert", "dinov2")
        setup = AdapterSetup(
            rank=rank,
            alpha=ALPHA,
            targets=targets or self.targets,
            task_type=self.task_type,
            head=["classifier"] if head else ["lm_head"],
            new_head=head,
            steps=20,
        )
        return METHODS[method].adapt(self.model(), setup)

    def started(self, method: str, start: Path, **options: Any) -> Any:
        model = self.adapted(method, **options)
        return self.prepared(model, method, start)

    def prepared(self, model: Any, method: str, start: Path) -> Any:
        self.prepare(
            model, method, start, lambda **options: initialize(model, self.batches, **options)
        )
        return model.eval()

    def prepare(
        self, model: Any, method: str, start: Path, initialize: Any = None, batches: Any = None
    ) -> None:
        preparation = Preparation(
            initialize=initialize or (lambda **_: None),
            batches=batches or self.of,
            rho=2,
            seed=0,
            initial_adapter=start,
        )
        METHODS[method].prepare(model, preparation)

    @torch.no_grad()
    def logits(self, model: Any) -> Tensor:
        batch = {key: value for key, value in self.batches[0].items() if key != "labels"}
        return model(**batch).logits


@pytest.mark.parametrize("kind", LAYER_TYPES)
@pytest.mark.parametrize("method", ADAPTERS)
def test_before_training_the_output_is_the_base_models(
    method: str, kind: str, tmp_path: Path
) -> None:
    case = Case(kind)
    if kind == "gpt2" and not METHODS[method].conv1d:
        with pytest.raises(
            ConfigError, match=f"method '{method}' is not right on GPT-2's Conv1D layers"
        ):
            case.adapted(method)
        return
    assert torch.allclose(
        case.logits(case.started(method, tmp_path / "start")), case.logits(case.model()), atol=1e-6
    )


@pytest.mark.parametrize(("method", "kind"), WHERE)
def test_a_saved_adapter_fits_the_base_as_it_was(method: str, kind: str, tmp_path: Path) -> None:
    case = Case(kind)
    model = case.started(method, tmp_path / "start")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for batch in case.batches:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = case.logits(model)
    assert not torch.allclose(trained, case.logits(case.model()), atol=1e-4)
    METHODS[method].save(model, tmp_path / "adapter", tmp_path / "start")
    loaded = PeftModel.from_pretrained(case.model(), str(tmp_path / "adapter")).eval()
    assert torch.allclose(case.logits(loaded), trained, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_milora_moves_the_smallest_singular_triplets_into_the_adapter(
    kind: str, tmp_path: Path
) -> None:
    case = Case(kind)
    before = {name: p.detach().clone() for name, p in case.model().named_parameters()}
    for name, layer in lora_layers(case.started("milora", tmp_path / "start")).items():
        whole, base = before[f"{name}.weight"], layer.get_base_layer().weight
        moved = (
            layer.scaling["default"]
            * layer.lora_B["default"].weight
            @ layer.lora_A["default"].weight
        )
        moved = moved.T if kind == "gpt2" else moved
        assert torch.allclose(base + moved, whole, atol=1e-7)
        values = torch.linalg.svdvals(whole.double())
        assert torch.allclose(
            torch.linalg.svdvals(moved.double())[:RANK], values[-RANK:], atol=1e-6
        )
        assert torch.allclose(
            torch.linalg.svdvals(base.double())[:-RANK], values[:-RANK], atol=1e-6
        )


def test_the_directions_of_lora_ga_are_those_of_the_losss_gradient(tmp_path: Path) -> None:
    case = Case("llama")
    model = case.model()
    batches = list(case.of(2))
    for batch in batches:
        (model(**batch).loss / len(batches)).backward()
    for name, layer in lora_layers(case.started("lora-ga", tmp_path / "start")).items():
        u, _, vt = torch.linalg.svd(model.get_submodule(name).weight.grad, full_matrices=False)
        b = torch.nn.functional.normalize(layer.lora_B["default"].weight, dim=0)
        assert principal_angles(layer.lora_A["default"].weight, vt[:RANK]).max() < 0.05
        assert principal_angles(b.T, u[:, RANK : 2 * RANK].T).max() < 0.05


@torch.no_grad()
def test_corda_leaves_less_than_pissa_of_what_a_layer_does_to_its_inputs(tmp_path: Path) -> None:
    case = Case("bert")
    model = case.model()
    corda, pissa = (lora_layers(case.started(name, tmp_path / name)) for name in ("corda", "pissa"))
    inputs: dict[str, list[Tensor]] = {name: [] for name in corda}
    for name, rows in inputs.items():
        model.get_submodule(name).register_forward_hook(
            lambda m, x, y, rows=rows: rows.append(x[0].flatten(0, -2))
        )
    for batch in case.batches:
        model(**batch)
    for name, rows in inputs.items():
        moment = torch.cat(rows).T @ torch.cat(rows)
        left = [(layers[name].get_base_layer().weight @ moment).norm() for layers in (corda, pissa)]
        assert left[0] < left[1], name


@pytest.mark.parametrize(("method", "kind"), WHERE)
def test_a_start_leaves_modes_gradients_and_random_numbers_alone(
    method: str, kind: str, tmp_path: Path
) -> None:
    case = Case(kind)
    model = case.adapted(method)
    model.base_model.train()
    modes = {name: module.training for name, module in model.named_modules()}
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    random = torch.random.get_rng_state()
    case.prepare(model, method, tmp_path / "start")
    assert torch.equal(torch.random.get_rng_state(), random)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trained
    assert all(p.grad is None for p in model.parameters())
    assert not any(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
        for module in model.modules()
    )
    assert not {"eigens", "covariance_matrix", "sample_count", "_peft_loraga_grad"} & {
        key for module in model.modules() for key in vars(module)
    }


@pytest.mark.parametrize(("method", "size", "most"), [("corda", 1, 256), ("lora-ga", 2, 64)])
def test_a_pass_over_data_is_bounded(method: str, size: int, most: int, tmp_path: Path) -> None:
    case = Case("llama")
    model = case.adapted(method, targets=["v_proj"])
    read = []

    def endless(asked: int) -> Iterator[dict[str, Tensor]]:
        while True:
            read.append(asked)
            yield next(case.of(asked))

    case.prepare(model, method, tmp_path / "start", batches=endless)
    assert read == [size] * most


@pytest.mark.parametrize("method", STARTS)
def test_a_start_that_is_there_gives_the_same_base_without_data(
    method: str, tmp_path: Path
) -> None:
    case, other = Case("bert"), Case("bert")
    first = case.started(method, tmp_path / "start")
    other.batches = []
    again = other.prepared(other.adapted(method), method, tmp_path / "start")
    assert first.state_dict().keys() == again.state_dict().keys()
    for name, value in first.state_dict().items():
        assert torch.allclose(value, again.state_dict()[name], atol=1e-7), name


@pytest.mark.parametrize("method", STARTS)
def test_a_16_bit_base_keeps_its_dtype_and_nearly_its_output(method: str, tmp_path: Path) -> None:
    case = Case("llama")
    whole = case.model().to(torch.bfloat16)
    case.model = lambda: whole
    before = case.logits(whole)
    model = case.started(method, tmp_path / "start")
    assert {layer.get_base_layer().weight.dtype for layer in lora_layers(model).values()} == {
        torch.bfloat16
    }
    assert {layer.lora_A["default"].weight.dtype for layer in lora_layers(model).values()} == {
        torch.float32
    }
    assert torch.allclose(case.logits(model), before, atol=0.02)


def test_the_penalty_of_adalora_is_in_the_loss_of_training_and_not_of_evaluation() -> None:
    case = Case("llama")
    model, batch = case.adapted("adalora"), case.batches[0]
    with torch.no_grad():
        plain = case.model()(**batch).loss
        assert torch.allclose(model.eval()(**batch).loss, plain)
        assert model.train()(**batch).loss > plain + 0.1


def test_eva_rho1_gives_every_layer_the_same_rank(tmp_path: Path) -> None:
    layers = lora_layers(Case("bert").started("eva-rho1", tmp_path / "start"))
    assert {layer.r["default"] for layer in layers.values()} == {RANK}


@pytest.mark.parametrize(
    ("method", "rank", "text"),
    [
        (
            "pissa",
            17,
            "needs layers at least 17 wide, and bert.encoder.layer.0.attention.self.query maps "
            "16 to 16",
        ),
        ("milora", 17, "needs layers at least 17 wide"),
        ("lora-ga", 9, "needs layers at least 18 wide"),
        ("mica", 17, "method 'mica' cannot run on this model \\(MiCA requires"),
        ("lora-orthogonal", 3, "rank to be even, got 3"),
    ],
)
def test_a_rank_that_a_method_cannot_have_is_refused(method: str, rank: int, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        Case("bert").adapted(method, rank=rank)


@pytest.mark.parametrize("method", ["corda", "lora-ga"])
def test_a_layer_that_the_data_never_reaches_is_named(method: str, tmp_path: Path) -> None:
    case = Case("llama")
    model = case.model()
    model.model.layers[1].unused = torch.nn.Linear(16, 16)
    case.model = lambda: model
    with pytest.raises(
        ConfigError,
        match=f"'{method}' learns nothing about model.layers.1.unused: the training data",
    ):
        case.started(method, tmp_path / "start")


def test_loftq_is_refused_with_its_reason() -> None:
    with pytest.raises(ConfigError, match="'loftq' starts an adapter from the error of quantizing"):
        find_method("loftq")


def test_a_refused_run_leaves_no_folder(bert_folder: Path, tmp_path: Path) -> None:
    recipe = load(
        "understanding-bbc", [f"model={bert_folder}", "method=lora-ga", "adapter.rank=17"]
    )
    with pytest.raises(ConfigError, match="needs layers at least 34 wide"):
        run(recipe, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_batches_for_a_pass_are_the_trainers_examples_in_the_seeds_order(tmp_path: Path) -> None:
    examples = [{"input_ids": torch.tensor([i]), "labels": torch.tensor(i)} for i in range(10)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), report_to=[], per_device_train_batch_size=4
    )
    trainer = transformers.Trainer(model=tiny_llama(), args=arguments, train_dataset=examples)
    orders = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(orders))
        batches = list(training_batches(trainer, 3, seed))
        assert [len(batch["labels"]) for batch in batches] == [3, 3, 3, 1]
        orders.append(torch.cat([batch["labels"] for batch in batches]).tolist())
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2]) == list(range(10))
    assert trainer.accelerator._dataloaders == []
