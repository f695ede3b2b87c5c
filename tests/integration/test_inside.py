"""Adapters that sit deeper: in a module of the user's own, and in the models of
sentence-transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import evatune
from evatune.errors import AdapterError, DataError
from tests.conftest import sentences
from tests.helpers import Toy, inputs, lora_layers, tiny_bert, tokens

torch.set_num_threads(1)

LORA = {"r": 4, "target_modules": ["query", "value"]}


class Scaled(nn.Module):
    """Changes the batch before its adapted model sees it, and drops some of it while training."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.dropout, self.parts = nn.Dropout(0.5), nn.ModuleDict({"toy": inner})
        self.head = nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.parts["toy"](3 * self.dropout(x)))


def toy() -> PeftModel:
    return get_peft_model(Toy(), LoraConfig(r=4, target_modules=["q", "up"]))


def same(ours: evatune.Calibration, theirs: evatune.Calibration) -> bool:
    return list(ours.spectra) == list(theirs.spectra) and all(
        torch.equal(ours.spectra[name].directions, theirs.spectra[name].directions)
        for name in ours.spectra
    )


def test_batches_run_through_the_outer_module_and_names_are_those_of_the_adapted_model() -> None:
    model, direct = Scaled(toy()).train(), toy()
    config = evatune.CalibrationConfig(rank=4)
    expected = evatune.initialize(direct, [3 * x for x in inputs()], config=config)
    alone = evatune.calibrate(model, inputs(), config)
    found = evatune.initialize(model, inputs(), config=config)
    assert same(found, expected)
    assert same(alone, expected)
    assert found.model == alone.model == expected.model == "Toy"
    assert found.layers == expected.layers
    assert model.training
    ours, theirs = lora_layers(model.parts["toy"]), lora_layers(direct)
    assert all(
        torch.equal(ours[n].lora_A["default"].weight, theirs[n].lora_A["default"].weight)
        for n in theirs
    )
    again = Scaled(toy())
    evatune.initialize(again, found)
    assert all(
        torch.equal(p, q)
        for p, q in zip(again.parts.parameters(), model.parts.parameters(), strict=True)
    )


def test_a_forward_of_the_callers_gets_the_module_that_the_caller_gave() -> None:
    model = Scaled(toy())
    seen = []

    def forward(given: nn.Module, batch: Tensor) -> Tensor:
        seen.append(given)
        return given(batch)

    evatune.initialize(nn.DataParallel(model), inputs(2), forward=forward, rho=1)
    assert {id(given) for given in seen} == {id(model)}


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        (
            {"teacher": toy(), "student": toy()},
            r"several models with an adapter \(teacher, student\).*for each",
        ),
        ({"one": Toy()}, r"carries no adapter; build one first: get_peft_model"),
    ],
    ids=["several", "none"],
)
def test_no_adapted_model_and_several_are_told_apart(
    parts: dict[str, nn.Module], text: str
) -> None:
    with pytest.raises(AdapterError, match=text):
        evatune.initialize(nn.ModuleDict(parts), inputs())


# -- sentence-transformers -------------------------------------------------------------------------


@pytest.fixture
def encoder(bert_folder: Path) -> Any:
    library = pytest.importorskip("sentence_transformers")
    model = library.SentenceTransformer(str(bert_folder), device="cpu")
    model.add_adapter(LoraConfig(**LORA))
    return model


def test_what_a_sentence_transformer_takes_is_a_batch(encoder: Any) -> None:
    texts = sentences(8, words=5) + sentences(8, words=11)
    batches = [encoder.preprocess(texts[start::4]) for start in range(4)]
    found = evatune.initialize(encoder, batches, scale="paper")
    # and no padding
    assert {spectrum.rows for spectrum in found.spectra.values()} == {8 * 5 + 8 * 11}
    assert set(found.spectra) == {
        f"encoder.layer.{i}.attention.self.{part}" for i in (0, 1) for part in ("query", "value")
    }
    assert found.model.startswith("BertModel")
    layers = lora_layers(encoder)
    for name, spectrum in found.spectra.items():
        a = layers[f"0.model.{name}"].lora_A["default"].weight
        assert torch.equal(a, spectrum.directions[: len(a)])


def test_the_trainer_of_sentence_transformers_counts_the_tokens_of_every_column(
    encoder: Any, tmp_path: Path
) -> None:
    import sentence_transformers as library
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    columns = {"anchor": sentences(16, words=5), "positive": sentences(16, words=7)}
    arguments = library.SentenceTransformerTrainingArguments(
        str(tmp_path),
        max_steps=1,
        use_cpu=True,
        report_to=[],
        per_device_train_batch_size=4,
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    loss = MultipleNegativesRankingLoss(encoder)
    trainer = library.SentenceTransformerTrainer(
        model=encoder, args=arguments, train_dataset=datasets.Dataset.from_dict(columns), loss=loss
    )
    found = evatune.initialize(trainer, config=evatune.CalibrationConfig(tolerance=0))
    assert found.batches == 2 * 4
    assert {spectrum.rows for spectrum in found.spectra.values()} == {16 * (5 + 7)}
    trainer.train()
    assert all(layer.lora_B["default"].weight.any() for layer in lora_layers(encoder).values())


def test_a_cross_encoder_and_its_trainer(bert_folder: Path, tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    losses = pytest.importorskip("sentence_transformers.cross_encoder.losses")
    model = library.CrossEncoder(str(bert_folder), device="cpu", num_labels=1)
    model.add_adapter(LoraConfig(**LORA))
    columns = {
        "query": sentences(8, words=3),
        "answer": sentences(8, words=4),
        "label": [0.0, 1.0] * 4,
    }
    arguments = library.CrossEncoderTrainingArguments(
        str(tmp_path), use_cpu=True, report_to=[], save_strategy="no"
    )
    trainer = library.CrossEncoderTrainer(
        model=model,
        args=arguments,
        train_dataset=datasets.Dataset.from_dict(columns),
        loss=losses.BinaryCrossEntropyLoss(model),
    )
    with pytest.raises(
        DataError, match=r"CrossEncoderTrainer are texts.*model\.preprocess\(pairs\)"
    ):
        evatune.initialize(trainer)
    pairs = list(zip(columns["query"], columns["answer"], strict=True))
    found = evatune.initialize(model, [model.preprocess(pairs[:4]), model.preprocess(pairs[4:])])
    assert {spectrum.rows for spectrum in found.spectra.values()} == {8 * 7}


def test_a_dict_goes_to_a_forward_of_named_arguments_as_keywords() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = get_peft_model(tiny_bert(), LoraConfig(**LORA))

        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
            return self.bert(input_ids=input_ids, attention_mask=attention_mask)

    direct = get_peft_model(tiny_bert(), LoraConfig(**LORA))
    assert same(
        evatune.initialize(Named(), tokens(padded=True)),
        evatune.initialize(direct, tokens(padded=True)),
    )
