"""The one line for TRL's trainers: chat template, packing, preferences, and which tokens count."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
from peft import EvaConfig, LoraConfig, PeftModel
from transformers import PrinterCallback
from trl import SFTConfig, SFTTrainer

import evatune
from evatune.errors import AdapterError, DataError
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


SIDES = {"prompt": slice(0, 4), "chosen": slice(4, 7), "rejected": slice(7, 12)}
WORDS = {"DPO": 4 + 3 + 4 + 5 + 2, "KTO": 4 + 3 + 4 + 5 + 2, "Reward": 7 + 9 + 2, "GRPO": 4}
EXAMPLES = 16


def preferences() -> datasets.Dataset:
    """Prompts of 4 words with a chosen answer of 3 words and a rejected one of 5."""
    words = [text.split() for text in sentences(EXAMPLES, words=12)]
    return datasets.Dataset.from_list(
        [
            {side: "".join(f"{word} " for word in text[part]) for side, part in SIDES.items()}
            for text in words
        ]
    )


def preference_trainer(kind: str, folder: Path, **adapter: Any) -> Any:
    """A trainer of TRL on preferences, or on rewards of what its model answers."""
    import trl
    from peft import get_peft_model

    more: dict[str, Any] = {}
    arguments: dict[str, Any] = {}
    data = preferences()
    model = tiny_llama()
    if kind == "Reward":
        config = model.config
        config.num_labels, config.pad_token_id = 1, 0
        model = transformers.LlamaForSequenceClassification(config).eval()
    if kind == "GRPO":
        more["reward_funcs"] = lambda completions, **_: [float(i) for i in range(len(completions))]
        arguments |= {"num_generations": 2, "max_completion_length": 3}
        data = data.select_columns(["prompt"])
    lora = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
    task = "SEQ_CLS" if kind == "Reward" else "CAUSAL_LM"
    run = getattr(trl, f"{kind}Trainer")(
        model=get_peft_model(model, LoraConfig(**lora, task_type=task, **adapter)),
        args=getattr(trl, f"{kind}Config")(
            str(folder),
            use_cpu=True,
            report_to=[],
            max_steps=1,
            per_device_train_batch_size=4,
            bf16=False,
            disable_tqdm=True,
            save_strategy="no",
            learning_rate=1e-2,
            dataloader_pin_memory=False,
            **arguments,
        ),
        train_dataset=data,
        processing_class=tokenizer(),
        **more,
    )
    run.remove_callback(PrinterCallback)
    return run


preferring = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_", "ignore:.*experimental")


@preferring
@pytest.mark.parametrize("kind", WORDS)
def test_both_sides_of_a_preference_count_and_prompts_where_answers_are_to_come(
    tmp_path: Path, kind: str
) -> None:
    run = preference_trainer(kind, tmp_path)
    calibration = evatune.initialize(run, scale="paper")
    assert {spectrum.rows for spectrum in calibration.spectra.values()} == {EXAMPLES * WORDS[kind]}
    for name, layer in lora_layers(run.model).items():
        a = layer.lora_A["default"].weight
        assert torch.equal(a, calibration.spectra[name].directions[: len(a)])
    run.train()
    assert all(layer.lora_B["default"].weight.any() for layer in lora_layers(run.model).values())
    if kind == "DPO":  # whose reference, a clone of the adapter as it came, is the base model's
        batch = tokens()[0]
        run.model.set_adapter("ref")
        assert torch.allclose(output(run.model, batch), output(tiny_llama(), batch), atol=1e-6)


@preferring
def test_with_evas_label_mask_completions_count_and_prompts_do_not(tmp_path: Path) -> None:
    run = preference_trainer("DPO", tmp_path, init_lora_weights="eva", eva_config=EvaConfig(rho=1))
    calibration = evatune.initialize(run)
    assert {spectrum.rows for spectrum in calibration.spectra.values()} == {
        EXAMPLES * (WORDS["DPO"] - 2 * 4)
    }


@preferring
def test_prompts_with_images_are_refused_in_one_sentence(tmp_path: Path) -> None:
    run = preference_trainer("GRPO", tmp_path)
    run.train_dataset = run.train_dataset.add_column("image", ["x"] * EXAMPLES)
    with pytest.raises(DataError, match="prompts of GRPOTrainer hold images, which are not read"):
        evatune.initialize(run)
