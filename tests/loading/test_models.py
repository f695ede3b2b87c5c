"""Text models and their tokenizers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from evatune.errors import ConfigError
from evatune.loading import models
from tests.conftest import save_model


def test_the_checkpoint_says_what_its_task_is(bert_folder: Path, llama_folder: Path) -> None:
    assert models.load_model(bert_folder, device="cpu").task == "feature-extraction"
    llama = models.load_model(llama_folder, device="cpu")
    assert (llama.task, llama.peft_task) == ("causal-lm", "CAUSAL_LM")
    assert type(llama.model).__name__ == "LlamaForCausalLM"
    assert llama.model.config.use_cache is False
    assert not llama.model.training
    assert llama.fresh == ()


@pytest.mark.parametrize(
    ("architecture", "task"),
    [
        ("GPT2LMHeadModel", "causal-lm"),
        ("T5ForConditionalGeneration", "seq2seq-lm"),
        ("Gemma3ForConditionalGeneration", "causal-lm"),  # of images and text, a decoder
        ("BertForMaskedLM", "masked-lm"),
        ("BertForSequenceClassification", "sequence-classification"),
        ("BertForTokenClassification", "token-classification"),
        ("BertModel", "feature-extraction"),
        (None, "feature-extraction"),
    ],
)
def test_tasks_by_architecture(architecture: str | None, task: str) -> None:
    config = transformers.BertConfig(architectures=[architecture] if architecture else None)
    config.is_encoder_decoder = task == "seq2seq-lm"
    assert models._task_of(config) == task


def test_weights_that_the_checkpoint_lacks_are_listed(bert_folder: Path) -> None:
    loaded = models.load_model(bert_folder, "sequence-classification", "cpu")
    assert loaded.fresh == ("classifier.bias", "classifier.weight")
    assert loaded.peft_task == "SEQ_CLS"


def test_a_dtype_can_be_chosen(bert_folder: Path) -> None:
    assert (
        models.load_model(bert_folder, device="cpu", dtype="bfloat16").model.dtype == torch.bfloat16
    )


def test_a_tokenizer_without_padding_gets_some(bert_folder: Path, tmp_path: Path) -> None:
    model = transformers.AutoModel.from_pretrained(bert_folder)
    end = models.load_model(
        save_model(model, tmp_path / "a", pad_token=None, eos_token="w5"), device="cpu"
    ).tokenizer
    none = models.load_model(
        save_model(model, tmp_path / "b", pad_token=None), device="cpu"
    ).tokenizer
    assert end.pad_token == "w5"
    assert none.pad_token_id == 0
    assert none(["w1", "w1 w2"], padding=True, return_tensors="pt")["attention_mask"].sum() == 3


def test_a_classifier_that_reads_the_last_token_knows_the_padding(
    llama_folder: Path, tmp_path: Path
) -> None:
    model = transformers.AutoModel.from_pretrained(llama_folder)
    folder = save_model(model, tmp_path / "a", pad_token=None, eos_token="w5")
    loaded = models.load_model(folder, "sequence-classification", "cpu")
    texts = ["w1 w2", "w1"]
    together = loaded.model(**loaded.tokenizer(texts, padding=True, return_tensors="pt")).logits
    for text, row in zip(texts, together, strict=True):
        alone = loaded.model(**loaded.tokenizer([text], return_tensors="pt")).logits[0]
        assert torch.allclose(row, alone, atol=1e-5)


def test_texts_are_never_longer_than_the_models_positions(bert_folder: Path) -> None:
    tokenizer = models.load_model(bert_folder, device="cpu").tokenizer
    assert tokenizer.model_max_length == 64


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"task": "x"}, "task is 'x'"),
        ({"dtype": "float"}, "dtype is 'float'"),
        ({"device": "x"}, "device 'x'"),
        ({"device": "meta"}, "device 'meta'"),
    ],
)
def test_options_of_a_model_are_checked_before_it_is_loaded(
    options: dict[str, str], part: str
) -> None:
    with pytest.raises(ConfigError, match=part):
        models.require_loadable("some/model", **options)


def test_only_sequence_to_sequence_models_need_a_forward_of_their_own() -> None:
    assert models.forward_for("causal-lm") is None
    assert models.forward_for("seq2seq-lm") is not None
