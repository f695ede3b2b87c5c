"""Text models with their tokenizers, from a hub id or a local folder."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from evatune.errors import ConfigError, DataError
from evatune.loading.hub import reading, require_path
from evatune.utils.text import first_line

TASKS: dict[str, tuple[str, str]] = {  # name → transformers' auto class, PEFT's task type
    "causal-lm": ("AutoModelForCausalLM", "CAUSAL_LM"),
    "seq2seq-lm": ("AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM"),
    "masked-lm": ("AutoModelForMaskedLM", ""),
    "sequence-classification": ("AutoModelForSequenceClassification", "SEQ_CLS"),
    "token-classification": ("AutoModelForTokenClassification", "TOKEN_CLS"),
    "feature-extraction": ("AutoModel", "FEATURE_EXTRACTION"),
}
_TASK_OF_SUFFIX = {  # ending of the architecture's name → task; any other is feature extraction
    "ForCausalLM": "causal-lm",
    "LMHeadModel": "causal-lm",
    "ForConditionalGeneration": "seq2seq-lm",
    "ForMaskedLM": "masked-lm",
    "ForSequenceClassification": "sequence-classification",
    "ForTokenClassification": "token-classification",
    "ForImageClassification": "image-classification",
    "ForAudioClassification": "audio-classification",
    "ForCTC": "ctc",
}


@dataclass(frozen=True)
class Medium:
    """Images or audio: a kind of input other than text.

    Attributes:
        name: for messages, and of the option that gives it.
        tasks: name → transformers' auto class. PEFT has no task type for them: that for feature
            extraction wants tokens.
        processor: transformers' auto class for what prepares the model's inputs.
        classifies: the task that has classes.
    """

    name: str
    tasks: Mapping[str, str]
    processor: str
    classifies: str


IMAGES = Medium(
    "images",
    {
        "image-classification": "AutoModelForImageClassification",
        "feature-extraction": "AutoModel",
    },
    "AutoImageProcessor",
    "image-classification",
)
AUDIO = Medium(
    "audio",
    {
        "audio-classification": "AutoModelForAudioClassification",
        "ctc": "AutoModelForCTC",
        "feature-extraction": "AutoModel",
    },
    "AutoFeatureExtractor",
    "audio-classification",
)
_MEDIA_FOLDER = "a local folder with config.json, weights and preprocessor_config.json"
_SAMPLE_TOKENS = 32
DTYPES = ("auto", "float32", "bfloat16", "float16")


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


@dataclass(frozen=True)
class MediaModel:
    """A model of images or audio ready to run, what prepares its inputs, and its task."""

    model: nn.Module
    processor: Any
    task: str
    fresh: tuple[str, ...] = ()


def require_loadable(
    source: str | Path,
    task: str = "auto",
    device: str = "auto",
    dtype: str = "auto",
    tasks: Collection[str] = TASKS,
) -> None:
    """Raise at once, before anything is loaded, for what `load_model` could not use."""
    if task != "auto" and task not in tasks:
        raise ConfigError(
            f"task is {task!r}; choose one of auto, {', '.join(tasks)}{_option_for(task)}"
        )
    if dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}; choose one of {', '.join(DTYPES)}")
    _usable_device(device)
    require_path(source, "model")
    if Path(source).is_file():
        raise DataError(
            f"model {str(source)!r} is a file; give a hub id, or the folder that holds config.json,"
            " weights and tokenizer"
        )


def _option_for(task: str) -> str:
    """Return which option of `evatune init` reads what a task is for; nothing for no such task."""
    options = {name: f"--{medium.name}" for medium in (AUDIO, IMAGES) for name in medium.tasks}
    option = (options | dict.fromkeys(TASKS, "--data")).get(task)
    return "" if option is None else f", or give {option}, which {task} is for"


def load_model(
    source: str | Path,
    task: str = "auto",
    device: str = "auto",
    dtype: str = "auto",
    *,
    trust_remote_code: bool = False,
    **options: Any,
) -> TextModel:
    """Load a hub id or a local folder.

    Args:
        source: hub id or folder. task: a key of `TASKS`, or "auto": what the checkpoint says it is.
        device: "auto" (an accelerator where there is one), or a torch device. dtype: "auto" (the
            checkpoint's), "float32", "bfloat16" or "float16".
        trust_remote_code: run Python code that comes with the model.
        options: of transformers' `from_pretrained`, such as `num_labels`.

    Raises:
        DataError: nothing loadable there. ConfigError: unknown task, device or dtype.
    """
    require_loadable(source, task, device, dtype)
    loaded = read_model(source, task, dtype, trust_remote_code=trust_remote_code, **options)
    make_ready(loaded.model, loaded.tokenizer)
    _place(loaded.model, device)
    return loaded


def media_task(
    source: str | Path, medium: Medium, task: str = "auto", trust_remote_code: bool = False
) -> str:
    """Return what a model of images or audio is loaded as. DataError for one of something else."""
    if task == "auto":
        with reading(source, f"a model of {medium.name}", _MEDIA_FOLDER):
            task = task_of(source, trust_remote_code)
    if medium is AUDIO and task == "sequence-classification":
        task = medium.classifies  # as transformers names classifiers of speech
    if task not in medium.tasks:
        raise DataError(
            f"{str(source)!r} is no model of {medium.name} ({task}); give it texts with --data, or"
            " name another --model"
        )
    return task


def load_media_model(
    source: str | Path,
    medium: Medium,
    task: str,
    device: str = "auto",
    dtype: str = "auto",
    *,
    trust_remote_code: bool = False,
    **options: Any,
) -> MediaModel:
    """Load a model of images or audio by hub id or from a folder; see `load_model`."""
    with reading(source, f"a model of {medium.name}", _MEDIA_FOLDER):
        processor = getattr(transformers, medium.processor).from_pretrained(
            source, trust_remote_code=trust_remote_code
        )
        model, info = _from_pretrained(
            medium.tasks[task], source, dtype, trust_remote_code, options
        )
    _place(model, device)
    return MediaModel(model.eval(), processor, task, _fresh(info))


def task_of(source: str | Path, trust_remote_code: bool = False) -> str:
    """Return the task of a checkpoint by its architecture; errors are those of transformers."""
    return _task_of(
        transformers.AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    )


def tokenizer_of(source: str | Path, trust_remote_code: bool = False) -> Any:
    """Return a checkpoint's tokenizer; errors are those of transformers."""
    return transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)


def _place(model: nn.Module, device: str) -> None:
    """Move a model to a device. ConfigError where it does not fit."""
    try:
        model.to(_usable_device(device))
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"the model does not fit on device {device!r} ({first_line(error)}); try cpu"
        ) from error


def _from_pretrained(
    loader: str,
    source: str | Path,
    dtype: str,
    trust_remote_code: bool,
    options: Mapping[str, Any],
) -> tuple[Any, Any]:
    """Return a model by one of transformers' auto classes, and what was missing in its weights."""
    model_and_info: tuple[Any, Any] = getattr(transformers, loader).from_pretrained(
        source,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        output_loading_info=True,
        **options,
    )
    return model_and_info


def _fresh(info: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of weights that are random, since the checkpoint lacks them."""
    # of another shape than the checkpoint's: (name, shape there, shape here)
    replaced = [entry[0] for entry in info.get("mismatched_keys") or ()]
    return tuple(sorted({*info["missing_keys"], *replaced}))


def read_model(
    source: str | Path,
    task: str = "auto",
    dtype: str = "auto",
    *,
    trust_remote_code: bool = False,
    **options: Any,
) -> TextModel:
    """Return model, config and tokenizer as they are saved, on the CPU.

    This is `load_model` without its checks and changes. `options` go to transformers'
    `from_pretrained`.
    """
    another_task = "" if task == "auto" else ", or another task"
    instead = f"a local folder with config.json, weights and tokenizer{another_task}"
    with reading(source, "a model and tokenizer", instead):
        task = task_of(source, trust_remote_code) if task == "auto" else task
        require_texts(source, task)
        model, info = _from_pretrained(TASKS[task][0], source, dtype, trust_remote_code, options)
        tokenizer = tokenizer_of(source, trust_remote_code)
    # what transformers makes up where there is none
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise DataError(
            f"{str(source)!r} holds a model but no tokenizer; put tokenizer.json beside its"
            " config.json"
        )
    return TextModel(model.eval(), tokenizer, task, _fresh(info))


def require_texts(source: str | Path, task: str) -> None:
    """Raise a DataError for a checkpoint whose task, by its architecture, is none of texts."""
    if task not in TASKS:
        raise DataError(
            f"{str(source)!r} is no model of texts ({task}); give it images with --images or sounds"
            " with --audio, a folder or a hub id"
        )


def adapter_tokenizer(adapter: Path, trust_remote_code: bool = False) -> Any:
    """Return the tokenizer beside an adapter, with the tokens added for it; None without one."""
    if not (adapter / "tokenizer_config.json").exists():
        return None
    with reading(adapter, "a tokenizer", "a folder whose tokenizer is whole, or none"):
        return transformers.AutoTokenizer.from_pretrained(
            adapter, trust_remote_code=trust_remote_code
        )


def sample_batch(loaded: TextModel) -> dict[str, Tensor]:
    """Return one row of random ordinary tokens, for a forward pass of any text model."""
    config: Any = loaded.model.config
    tokenizer = loaded.tokenizer
    text_config = config.get_text_config()
    vocabulary = getattr(text_config, "vocab_size", None) or len(tokenizer)
    positions = getattr(text_config, "max_position_embeddings", None) or _SAMPLE_TOKENS
    usable = range(min(len(tokenizer), vocabulary))
    ordinary = sorted(set(usable) - set(tokenizer.all_special_ids))
    drawn = random.Random(0).choices(ordinary, k=min(_SAMPLE_TOKENS, positions))
    ids = torch.tensor([drawn], dtype=torch.int64, device="cpu")
    if tokenizer.eos_token_id is not None:
        ids[:, -1] = tokenizer.eos_token_id  # where some classifiers look
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if getattr(config, "is_encoder_decoder", False):
        batch["decoder_input_ids"] = ids
    return batch


def make_ready(model: Any, tokenizer: Any) -> None:
    """Set a padding token and the longest text that the model can read, and keep no cache."""
    if tokenizer.pad_token is None:
        # Any token will do: the attention mask leaves it out.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    text_config = model.config.get_text_config()
    # Where classifiers that read the last token look for the end of a text.
    text_config.pad_token_id = tokenizer.pad_token_id
    positions = getattr(text_config, "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:
        tokenizer.model_max_length = min(tokenizer.model_max_length, positions)
    if hasattr(model.config, "use_cache"):
        # calibration never looks back, and a cache would cost memory
        model.config.use_cache = False


def forward_for(task: str) -> Callable[[nn.Module, Any], Any] | None:
    """Return the forward function of a task; None where the default call will do.

    A sequence-to-sequence model also reads its targets, which are the text itself where a batch has
    no labels.
    """
    if task != "seq2seq-lm":
        return None

    def forward(model: nn.Module, batch: Any) -> Any:
        device = next(model.parameters()).device
        inputs = {key: value.to(device) for key, value in batch.items()}
        return model(**{"labels": inputs["input_ids"], **inputs})

    return forward


def _task_of(config: Any) -> str:
    """Return the task of a checkpoint by the name of its architecture."""
    architectures = getattr(config, "architectures", None) or [""]
    endings = (suffix for suffix in _TASK_OF_SUFFIX if architectures[0].endswith(suffix))
    task = _TASK_OF_SUFFIX.get(next(endings, ""), "feature-extraction")
    # Models of images and text are called like T5, and continue texts as a decoder does.
    if task == "seq2seq-lm" and not getattr(config, "is_encoder_decoder", False):
        return "causal-lm"
    return task


def _usable_device(device: str) -> torch.device:
    """Return a device by its name; ConfigError for one that cannot be used."""
    if device == "auto":
        return default_device()
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


def default_device() -> torch.device:
    """Return the accelerator where there is one, else the CPU."""
    if not torch.accelerator.is_available():
        return torch.device("cpu")
    return torch.accelerator.current_accelerator() or torch.device("cpu")
