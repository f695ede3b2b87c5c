"""The one line for TRL's SFTTrainer: chat template, packing, and which tokens count."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from peft import EvaConfig, LoraConfig, PeftModel
from transformers import PrinterCallback
from trl import SFTConfig, SFTTrainer

import evatune
from evatune.errors import AdapterError
from tests.conftest import sentences, tiny_tokenizer
from tests.helpers import lora_layers, output, tiny_llama, tokens

torch.set_num_threads(1)

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated")

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}w1 {{ m['content'] }} {% else %}w2 {%"
    " generation %}{{ m['content'] }} [PAD] {% endgeneration %}{% endif %}{% endfor %}"
)
ASKED, ANSWERED, CHATS = 6, 4, 32  # words, words, conversations


def tokenizer() -> Any:
    found = tiny_tokenizer(eos_token="[PAD]")
    found.chat_template = TEMPLATE
    return found


def chats() -> datasets.Dataset:
    return datasets.Dataset.from_list(
        [
            {
                "messages": [
                    {"role": "user", "content": " ".join(text.split()[:ASKED])},
                    {"role": "assistant", "content": " ".join(text.split()[-ANSWERED:])},
                ]
            }
            for text in sentences(CHATS)
        ]
    )


def trainer(
    folder: Path, model: Any = None, adapter: dict[str, Any] | None = None, **options: Any
) -> SFTTrainer:
    settings = {
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "max_length": 32,
        "bf16": False,
        "learning_rate": 1e-2,
    }
    found = SFTTrainer(
        model=tiny_llama() if model is None else model,
        args=SFTConfig(
            output_dir=str(folder),
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
            logging_steps=1,
            dataloader_pin_memory=False,
            **(settings | options),
        ),
        train_dataset=chats(),
        processing_class=tokenizer(),
        peft_config=LoraConfig(
            **({"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | (adapter or {}))
        ),
    )
    found.remove_callback(PrinterCallback)
    return found


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"packing": True},
        {"packing": True, "packing_strategy": "wrapped"},
        {"padding_free": True, "max_length": None},
        {"bf16": True},
    ],
    ids=str,
)
def test_one_line_between_the_trainer_and_its_training(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    run = trainer(tmp_path, **options)
    calibration = evatune.initialize(run, scale="paper")
    tokens_in_all = CHATS * (ASKED + ANSWERED + 3)
    assert max(spectrum.rows for spectrum in calibration.spectra.values()) == tokens_in_all
    started = {
        name: layer.lora_A["default"].weight.clone()
        for name, layer in lora_layers(run.model).items()
    }
    for name, a in started.items():
        assert torch.equal(a, calibration.spectra[name].directions[: len(a)])
    run.train()
    assert "evatune/energy" in run.state.log_history[0]
    held = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    for name, layer in lora_layers(run.model).items():
        assert {id(layer.lora_A["default"].weight), id(layer.lora_B["default"].weight)} <= held
        assert layer.lora_B["default"].weight.any()
        assert not torch.equal(layer.lora_A["default"].weight, started[name])
    run.save_model(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "adapter"))
    run.model.__dict__.pop("forward", None)  # accelerate's, which casts to bfloat16
    batch = tokens()[0]
    assert torch.allclose(output(loaded, batch), output(run.model, batch), atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"packing": True}], ids=str)
def test_with_evas_label_mask_the_answers_tokens_count_and_no_others(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    adapter = {"init_lora_weights": "eva", "eva_config": EvaConfig(rho=1.5)}
    run = trainer(tmp_path, adapter=adapter, assistant_only_loss=True, **options)
    calibration = evatune.initialize(run)
    assert calibration.config.labels_only == "auto"
    assert calibration.config.rho == 1.5
    assert {spectrum.rows for spectrum in calibration.spectra.values()} == {CHATS * (ANSWERED + 1)}
    run.train()


def test_a_peft_model_that_comes_with_an_adapter_needs_no_config_of_the_trainers(
    tmp_path: Path,
) -> None:
    from peft import get_peft_model

    model = get_peft_model(
        tiny_llama(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    )
    run = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(tmp_path), use_cpu=True, report_to=[], bf16=False, max_length=32
        ),
        train_dataset=chats(),
        processing_class=tokenizer(),
    )
    calibration = evatune.initialize(run, rho=1)
    assert set(calibration.allocate().ranks.values()) == {2}
    run.create_optimizer()
    with pytest.raises(AdapterError, match=r"already has an optimizer.*before trainer\.train"):
        evatune.initialize(run)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_")
def test_an_adapter_that_the_trainer_clones_as_its_reference_stays_what_it_was(
    tmp_path: Path,
) -> None:
    from peft import get_peft_model
    from trl import DPOConfig, DPOTrainer

    batch = tokens()[0]
    before = output(tiny_llama(), batch)
    words = [text.split() for text in sentences(16, words=12)]
    sides = {"prompt": slice(0, 4), "chosen": slice(4, 7), "rejected": slice(7, 12)}
    rows = [
        {side: "".join(f"{word} " for word in text[part]) for side, part in sides.items()}
        for text in words
    ]
    run = DPOTrainer(
        model=get_peft_model(
            tiny_llama(),
            LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
        ),
        args=DPOConfig(
            str(tmp_path),
            use_cpu=True,
            report_to=[],
            max_steps=1,
            per_device_train_batch_size=4,
            bf16=False,
            disable_tqdm=True,
            save_strategy="no",
            learning_rate=1e-2,
            dataloader_pin_memory=False,
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer(),
    )
    run.remove_callback(PrinterCallback)
    assert list(run.model.peft_config) == ["default", "ref"]
    calibration = evatune.initialize(run, scale="paper")
    for name, layer in lora_layers(run.model).items():
        a = layer.lora_A["default"].weight
        assert torch.equal(a, calibration.spectra[name].directions[: len(a)])
    run.train()
    assert not torch.allclose(output(run.model, batch), before, atol=1e-5)
    run.model.set_adapter("ref")
    assert torch.allclose(output(run.model, batch), before, atol=1e-6)
