"""Lightning's callback, in real fits."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import evatune
from evatune.errors import AdapterError, DataError
from evatune.trainers.lightning import EvaCallback
from tests.helpers import lora_layers, tiny_bert, tokens

torch.set_num_threads(1)

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{text}")
    for text in (
        "The 'train_dataloader' does not have many workers",
        "Checkpoint directory",
        "GPU available but not used",
        ".*isinstance\\(treespec, LeafSpec\\).* is deprecated",
        "Starting from v1.9.0",
    )
]


class Classifier(pl.LightningModule):
    """A BERT with an adapter and tuples for batches."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.model = get_peft_model(
            tiny_bert("classification").train(),
            LoraConfig(
                **({"r": 4, "target_modules": "all-linear", "task_type": "SEQ_CLS"} | options)
            ),
        )

    def training_step(self, batch: Any, index: int) -> Tensor:
        ids, labels = batch
        loss = self.model(input_ids=ids, labels=labels).loss
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


class Data(pl.LightningDataModule):
    """Makes its data in `setup`."""

    def setup(self, stage: str) -> None:
        ids = torch.cat([batch["input_ids"] for batch in tokens(8)])
        self.data = TensorDataset(ids, torch.arange(len(ids)) % 2)

    def train_dataloader(self) -> Any:
        return DataLoader(self.data, 4, shuffle=True)


def forward(model: nn.Module, batch: Any) -> Any:
    return model(input_ids=batch[0])


def trainer(folder: Path, *callbacks: Any, **options: Any) -> pl.Trainer:
    settings = {"max_epochs": 1, "logger": False, "enable_checkpointing": False} | options
    return pl.Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=folder,
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        **settings,
    )


class AtTheEnd(pl.Callback):
    def on_fit_start(self, trainer: Any, module: Any) -> None:
        self.start = {name: p.detach().clone() for name, p in module.named_parameters()}

    def on_train_end(self, trainer: Any, module: Any) -> None:
        self.held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}


def test_the_adapter_that_is_trained_is_the_one_that_eva_started(tmp_path: Path) -> None:
    pl.seed_everything(0, verbose=False)
    module, eva, end = (
        Classifier(),
        EvaCallback(forward=forward, rho=2.0, scale="matched"),
        AtTheEnd(),
    )
    trainer(tmp_path, eva, end).fit(module, datamodule=Data())
    assert eva.calibration is not None
    plan = eva.calibration.allocate()
    layers = lora_layers(module.model)
    assert {name: layer.r["default"] for name, layer in layers.items()} == {
        n: r for n, r in plan.ranks.items() if r
    }
    assert len(set(plan.ranks.values())) > 1
    for name, layer in layers.items():
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert {id(a), id(b)} <= end.held
        assert b.any()
        path = next(path for path, p in module.named_parameters() if p is a)
        start, v = end.start[path], eva.calibration.spectra[name].directions[: len(a)]
        assert torch.allclose(start / start.norm(dim=1, keepdim=True), v, atol=1e-5)
        assert not end.start[path.replace("lora_A", "lora_B")].any()
    module.model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(tiny_bert("classification"), str(tmp_path / "adapter"))
    with torch.no_grad():
        batch = tokens()[0]
        assert torch.allclose(
            loaded.eval()(**batch).logits, module.model.eval()(**batch).logits, atol=1e-6
        )


class Dicts(Classifier):
    """The default call, `model(**batch)`; a transformers model after `add_adapter`, deep inside;
    data of its own."""

    def __init__(self) -> None:
        pl.LightningModule.__init__(self)
        inner = tiny_bert("classification").train()
        inner.add_adapter(LoraConfig(r=4, target_modules=["query", "value"]), adapter_name="mine")
        self.parts = nn.ModuleDict({"encoder": nn.Sequential(inner)})

    def training_step(self, batch: Any, index: int) -> Tensor:
        return self.parts["encoder"][0](**batch).loss

    def train_dataloader(self) -> Any:
        return DataLoader(
            [batch | {"labels": torch.arange(4) % 2} for batch in tokens(8)], batch_size=None
        )


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_transformers_model_with_an_adapter_of_another_name(
    tmp_path: Path, precision: str
) -> None:
    module, eva = Dicts(), EvaCallback(adapter_name="mine")
    trainer(tmp_path, eva, precision=precision).fit(module)
    layers = lora_layers(module, "mine")
    assert sum(layer.r["mine"] for layer in layers.values()) == 4 * 4
    assert all(layer.lora_B["mine"].weight.any() for layer in layers.values())
    assert eva.calibration is not None
    assert eva.calibration.batches == 8


@pytest.mark.parametrize("objective", ["activations", "gradients"])
def test_the_callers_functions_run_in_the_trainers_precision(
    tmp_path: Path, objective: Any
) -> None:
    in_bfloat16: list[bool] = []

    def call(model: nn.Module, batch: Any) -> Any:
        in_bfloat16.append(torch.is_autocast_enabled("cpu"))
        output = model(input_ids=batch[0], labels=batch[1])
        return output.loss if objective == "gradients" else output

    name = "loss" if objective == "gradients" else "forward"
    config = evatune.CalibrationConfig(objective=objective)
    eva = EvaCallback(config=config, **{name: call})
    trainer(tmp_path, eva, precision="bf16-mixed").fit(Classifier(), datamodule=Data())
    assert in_bfloat16
    assert all(in_bfloat16)


def test_batches_given_take_the_place_of_the_loaders(tmp_path: Path) -> None:
    eva = EvaCallback(batches=tokens(5))
    given = DataLoader(
        TensorDataset(torch.ones(4, 12, dtype=torch.long), torch.zeros(4, dtype=torch.long)), 4
    )
    trainer(tmp_path, eva).fit(Classifier(), train_dataloaders=given)
    assert eva.calibration is not None
    assert eva.calibration.batches == 5


def test_training_sees_the_batches_that_it_would_have_seen(tmp_path: Path) -> None:
    def order(*callbacks: Any) -> list[Tensor]:
        ids: list[Tensor] = []

        class Seen(pl.Callback):
            def on_train_batch_start(
                self, trainer: Any, module: Any, batch: Any, index: int
            ) -> None:
                ids.append(batch[0])

        pl.seed_everything(0, verbose=False)
        trainer(tmp_path, *callbacks, Seen()).fit(Classifier(), datamodule=Data())
        return ids

    plain, ours = order(), order(EvaCallback(forward=forward))
    assert len(plain) == len(ours) == 8
    assert all(torch.equal(a, b) for a, b in zip(plain, ours, strict=True))


def test_the_loggers_get_the_summary(tmp_path: Path) -> None:
    logger, eva = CSVLogger(tmp_path), EvaCallback(forward=forward)
    trainer(tmp_path, eva, logger=logger).fit(Classifier(), datamodule=Data())
    header, first, *_ = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    found = dict(zip(header.split(","), first.split(","), strict=True))
    assert eva.calibration is not None
    assert (found["step"], found["evatune/batches"]) == ("0", str(eva.calibration.batches))
    assert found["evatune/ranks"] == str(4 * 13)
    assert "train_loss" in header


def test_a_run_goes_on_from_its_checkpoint_and_a_second_fit_keeps_what_was_learnt(
    tmp_path: Path,
) -> None:
    module, eva = Classifier(), EvaCallback(forward=forward)
    run = trainer(tmp_path, eva)
    run.fit(module, datamodule=Data())
    run.save_checkpoint(tmp_path / "run.ckpt")
    learnt = {name: p.detach().clone() for name, p in module.named_parameters()}
    first = eva.calibration
    run.fit(module, datamodule=Data())  # no epoch is left, so nothing changes
    assert eva.calibration is first
    assert all(torch.equal(p, learnt[name]) for name, p in module.named_parameters())

    again = Classifier()
    trainer(tmp_path, EvaCallback(first), max_epochs=1).fit(
        again, datamodule=Data(), ckpt_path=tmp_path / "run.ckpt"
    )
    assert learnt.keys() == dict(again.named_parameters()).keys()
    assert all(torch.equal(p, learnt[name]) for name, p in again.named_parameters())


def test_only_a_fit_initializes(tmp_path: Path) -> None:
    eva = EvaCallback(forward=forward)
    eva.setup(trainer(tmp_path), Classifier(), "test")
    assert eva.calibration is None


# -- what is refused -------------------------------------------------------------------------------


class Bare(Classifier):
    def __init__(self) -> None:
        pl.LightningModule.__init__(self)
        self.model = tiny_bert("classification")


class Two(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.teacher = get_peft_model(tiny_bert(), LoraConfig(r=2, target_modules=["query"]))


class OwnSetup(Classifier):
    def setup(self, stage: str) -> None:
        self.data = [1]

    def train_dataloader(self) -> Any:
        return self.data


@pytest.mark.parametrize(
    ("module", "error", "text"),
    [
        (
            Bare,
            AdapterError,
            r"Bare holds no model with an adapter when setup begins; build one in its __init__",
        ),
        (Two, AdapterError, r"Two holds several models with an adapter \(model, teacher\)"),
    ],
)
def test_a_module_without_one_adapted_model_is_refused(
    tmp_path: Path, module: Any, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        trainer(tmp_path, EvaCallback(forward=forward)).fit(module(), datamodule=Data())


def test_data_that_the_modules_own_setup_makes_come_too_late_and_the_error_says_so(
    tmp_path: Path,
) -> None:
    with pytest.raises(AttributeError, match="data") as caught:
        trainer(tmp_path, EvaCallback(forward=forward)).fit(OwnSetup())
    assert any(
        "before the LightningModule's own setup()" in note for note in caught.value.__notes__
    )


def test_several_processes_need_one_calibration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(tmp_path)
    monkeypatch.setattr(type(run), "world_size", property(lambda self: 2))
    with pytest.raises(DataError, match=r"this run has 2.*Calibration\.load"):
        EvaCallback(forward=forward).setup(run, Classifier(), "fit")
    calibration = evatune.calibrate(
        tiny_bert("classification"), tokens(8), evatune.CalibrationConfig(rank=4)
    )
    alike = [Classifier(), Classifier()]
    for module in alike:
        EvaCallback(calibration).setup(run, module, "fit")
    ours, theirs = (module.state_dict() for module in alike)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if "lora_" in name)


@pytest.fixture
def without_lightning(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The callback's module as it is where only `pytorch_lightning` is installed."""
    module = sys.modules["evatune.trainers.lightning"]
    monkeypatch.setitem(sys.modules, "lightning", None)
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    monkeypatch.delitem(sys.modules, "evatune.trainers.lightning")
    yield importlib.import_module("evatune.trainers.lightning")
    sys.modules["evatune.trainers"].lightning = module  # type: ignore[attr-defined]


def test_the_older_name_of_the_package_does_as_well(without_lightning: Any) -> None:
    import pytorch_lightning

    assert issubclass(without_lightning.EvaCallback, pytorch_lightning.Callback)
