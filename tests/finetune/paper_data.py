"""Stand-ins of what the paper's runs read: data with the columns, splits and types, and models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from PIL import Image

from evatune.finetune.check.stand_in import shrunk
from evatune.finetune.recipe_files import load
from evatune.finetune.tasks.generation import mathematics
from evatune.finetune.tasks.generation.question_sets import SETS
from evatune.finetune.tasks.images.vtab import VTAB
from tests.conftest import save_model, tiny_tokenizer


def rows(name: str, count: int = 6) -> list[dict[str, Any]]:
    """Rows with the columns and label types of one of the sets."""
    if name == "boolq":
        return [
            {"question": f"is w{n} so", "passage": f"w{n} w2", "idx": n, "label": n % 2}
            for n in range(count)
        ]
    if name == "piqa":
        return [
            {"goal": f"w{n}", "sol1": "w1", "sol2": "w2 w3", "label": n % 2} for n in range(count)
        ]
    if name == "siqa":
        answers = {"answerA": "w1", "answerB": "w2", "answerC": "w3"}
        return [
            {"context": f"w{n}", "question": "w4", **answers, "label": str(1 + n % 3)}
            for n in range(count)
        ]
    if name == "hellaswag":
        endings = ["w1", "w2", "w3", "w4"]
        return [
            {"activity_label": "w5", "ctx": f"w{n}", "endings": endings, "label": str(n % 4)}
            for n in range(count)
        ]
    if name == "winogrande":
        return [
            {"sentence": f"w{n} _ w2", "option1": "w3", "option2": "w4", "answer": str(1 + n % 2)}
            for n in range(count)
        ]
    asked = "question_stem" if name == "openbookqa" else "question"
    choices = {"text": ["w1", "w2", "w3"], "label": ["A", "B", "C"]}
    return [{asked: f"w{n}", "choices": choices, "answerKey": "ABC"[n % 3]} for n in range(count)]


def save_set(folder: Path, name: str, parts: dict[str, list[dict[str, Any]]]) -> None:
    one = SETS[name]
    save_rows(folder / one.source / (one.subset or ""), parts)


def save_rows(place: Path, parts: dict[str, list[dict[str, Any]]]) -> None:
    """Write the rows of each split as `datasets` saves them."""
    place.mkdir(parents=True, exist_ok=True)
    tables = {part: datasets.Dataset.from_list(some) for part, some in parts.items()}
    datasets.DatasetDict(tables).save_to_disk(place)


# -- GLUE ------------------------------------------------------------------------------------------


def save_glue(folder: Path, name: str) -> Path:
    """Data with the columns, splits and label types of one of GLUE's sets."""
    columns = load(f"paper-glue-{name}").data.columns
    classes = {"mnli": 3, "stsb": 0}.get(name, 2)

    def table(count: int) -> datasets.Dataset:
        rows: dict[str, Any] = {
            column: [f"w{n} w{n % 7} w{i}" for n in range(count)]
            for i, column in enumerate(columns)
        }
        labels = [n % (classes or 6) for n in range(count)]
        feature: Any = datasets.Value("float32")
        if classes:
            feature = datasets.ClassLabel(num_classes=classes)
        rows |= {"label": labels, "idx": list(range(count))}
        text = dict.fromkeys(columns, datasets.Value("string"))
        features = datasets.Features(text | {"label": feature, "idx": datasets.Value("int32")})
        return datasets.Dataset.from_dict(rows, features=features)

    tests = ["validation_matched", "validation_mismatched"] if name == "mnli" else ["validation"]
    parts = {"train": table(24), **{test: table(12) for test in tests}}
    datasets.DatasetDict(parts).save_to_disk(folder / name)
    return folder / name


# -- VTAB-1K ---------------------------------------------------------------------------------------


def save_vtab(folder: Path, name: str, test: int) -> None:
    """One task of the bundle, whose lists name a few images over and over.

    Args:
        test: length of the list to be tested on.
    """
    task = VTAB[name]
    place = folder / task.folder / "images" / "all"
    place.mkdir(parents=True)
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 255, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{number}.png")
    sizes = {"train800": 800, "val200": 200, "train800val200": 1000, "test": test}
    for part, count in sizes.items():
        write_list(folder / task.folder, part, count, task.classes)


def write_list(folder: Path, part: str, count: int, classes: int) -> None:
    lines = [f"images/all/{number % 4}.png {number % classes}\n" for number in range(count)]
    (folder / f"{part}.txt").write_text("".join(lines))


# -- mathematics -----------------------------------------------------------------------------------


def save_split(place: Path, split: str, rows: list[dict[str, Any]]) -> None:
    datasets.DatasetDict({split: datasets.Dataset.from_list(rows)}).save_to_disk(place)


def save_mathematics(folder: Path) -> Path:
    """MetaMathQA, GSM8K and MATH in a few rows."""
    learned = [
        {"query": f"w{n}", "response": f"w3 w{n} The answer is: {n}", "type": "GSM_SV"}
        for n in range(24)
    ]
    save_split(folder / "meta-math" / "MetaMathQA", "train", learned)
    asked = [{"question": f"w{n}", "answer": f"w2 <<1+1=2>> w3\n#### {n}"} for n in range(4)]
    save_split(folder / "openai" / "gsm8k" / "main", "test", asked)
    for subject in mathematics._SUBJECTS:
        solved = {"problem": "w1", "solution": "So $w2$ is $\\boxed{\\frac{1}{2}}$.", "level": "1"}
        save_split(folder / "EleutherAI" / "hendrycks_math" / subject, "test", [solved])
    return folder


# -- Meta-World ------------------------------------------------------------------------------------


def save_episodes(folder: Path, task: str) -> None:
    """Four recorded episodes of a task, a file each."""
    place = folder / f"{task}-v2"
    place.mkdir(parents=True)
    for number in range(4):
        length = 5 + number
        states = np.zeros((length, 39), np.float32)
        actions = np.zeros((length, 4), np.float32)
        rewards = np.full(length, 1.0, np.float32)
        np.savez(place / f"{number}.npz", states=states, actions=actions, rewards=rewards)


# -- models ----------------------------------------------------------------------------------------


def _configs() -> dict[str, Callable[[], tuple[type, Any]]]:
    """Name → class and configuration of a model of the paper, with a small vocabulary."""
    few = {"vocab_size": 60}
    return {
        "roberta": lambda: (
            transformers.RobertaModel,
            transformers.RobertaConfig(
                **few,
                hidden_size=1024,
                num_hidden_layers=24,
                num_attention_heads=16,
                intermediate_size=4096,
                max_position_embeddings=66,
                pad_token_id=tiny_tokenizer().pad_token_id,
            ),
        ),
        # disentangled attention, with one set of projections for both
        "deberta": lambda: (
            transformers.DebertaV2Model,
            transformers.DebertaV2Config(
                **few,
                hidden_size=768,
                num_hidden_layers=12,
                num_attention_heads=12,
                intermediate_size=3072,
                pad_token_id=tiny_tokenizer().pad_token_id,
                relative_attention=True,
                position_buckets=8,
                share_att_key=True,
                pos_att_type=["p2c", "c2p"],
                position_biased_input=False,
                type_vocab_size=0,
            ),
        ),
        # soft-capping, and one weight for input and output
        "gemma2": lambda: (
            transformers.Gemma2ForCausalLM,
            transformers.Gemma2Config(
                **few,
                hidden_size=3584,
                intermediate_size=14336,
                num_hidden_layers=42,
                num_attention_heads=16,
                num_key_value_heads=8,
                head_dim=256,
            ),
        ),
        # keys in groups
        "llama3": lambda: (
            transformers.LlamaForCausalLM,
            transformers.LlamaConfig(
                **few,
                hidden_size=4096,
                intermediate_size=14336,
                num_hidden_layers=32,
                num_attention_heads=32,
                num_key_value_heads=8,
            ),
        ),
    }


def save_stand_in(name: str, folder: Path) -> Path:
    """A small model like one of the paper's, with a tokenizer or an image processor."""
    torch.manual_seed(0)
    if name == "dinov2":
        return _save_dinov2(folder)
    kind, config = _configs()[name]()
    return save_model(kind(shrunk(config)), folder)


def _save_dinov2(folder: Path) -> Path:
    """DINOv2-g is the one whose layers have a gate; a patch here is an image, for speed."""
    config = transformers.Dinov2Config(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        mlp_ratio=2,
        use_swiglu_ffn=True,
        image_size=56,
        patch_size=56,
    )
    transformers.Dinov2Model(config).save_pretrained(folder)
    processor = transformers.BitImageProcessorPil(
        size={"shortest_edge": 64}, crop_size={"height": 56, "width": 56}
    )
    processor.save_pretrained(folder)
    return folder
