"""Push a saved adapter to the model hub: the files that others need, no path of this machine."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub

from evatune.adapters.saved import read_config
from evatune.errors import ConfigError, RecordError
from evatune.loading.demo import model_id
from evatune.schemas import raise_with_path
from evatune.schemas.text import parse_json, read_text
from evatune.utils.names import ADAPTER_CONFIG, ADAPTER_FILE
from evatune.utils.text import one_line

# What a loader or a reader needs. Records, pages and optimizers hold paths and settings of this
# machine, and some are pickled.
_NEEDED = (
    ADAPTER_FILE,
    "*.png",
    "tokenizer*.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.jinja",
    "preprocessor_config.json",
    "processor_config.json",
)


def require_repository(name: str) -> None:
    """Raise a ConfigError for what cannot be the name of a repository."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name, re.ASCII) or "--" in name or ".." in name:
        raise ConfigError(
            f"repository is {name!r}; give an owner and a name, such as your-name/my-adapter"
        )


def require_token() -> None:
    """Raise a ConfigError where no token of the hub is set."""
    if huggingface_hub.get_token() is None:
        raise ConfigError(
            "no token of the Hugging Face hub is set; run `hf auth login`, or set HF_TOKEN to one"
            " that may write"
        )


def base_model_of(folder: Path, given: str | None, of_card: str | list[str] | None) -> str:
    """Return the hub id of the adapter's base model.

    Args:
        given: by the user. of_card: what the adapter's model card names, of several the first.

    Raises:
        ConfigError: none of them, nor the adapter's config, is a hub id. RecordError: the folder
            holds no LoRA adapter.
    """
    named = read_config(folder).base_model_name_or_path
    first = of_card[:1] if isinstance(of_card, list) else [of_card]
    sources = [given] if given is not None else [*first, named]
    names = (model_id(source) for source in sources if source)
    name = next((name for name in names if name is not None), None)
    if name is not None:
        return name
    raise ConfigError(
        f"the base model {str(given or named)!r} is no id on the model hub, so nobody else could"
        " load the adapter; give the id with --base-model, such as meta-llama/Llama-3.2-1B"
    )


def published_files(folder: Path, base_model: str) -> dict[str, bytes | Path]:
    """Return what is to be pushed, by name: files, and the config with the base model's hub id.

    Raises RecordError for an adapter whose weights are missing, or pickled.
    """
    if not (folder / ADAPTER_FILE).is_file():
        raise RecordError(
            f"{str(folder)!r} holds no {ADAPTER_FILE}; save the adapter again, with save_pretrained"
        )
    files: dict[str, bytes | Path] = {
        path.name: path
        for pattern in _NEEDED
        for path in sorted(folder.glob(pattern))
        if path.is_file()
    }
    with raise_with_path(folder / ADAPTER_CONFIG, "save the adapter again"):
        config = parse_json(read_text(folder / ADAPTER_CONFIG))
    assert isinstance(config, dict)  # as `read_config` found it
    text = json.dumps(config | {"base_model_name_or_path": base_model}, indent=2) + "\n"
    return files | {ADAPTER_CONFIG: text.encode("utf-8")}


def push_files(repository: str, content: Mapping[str, bytes | Path], *, private: bool) -> str:
    """Make the repository where it is missing, commit the files, and return its address.

    Raises ConfigError without a connection, and for what the hub refuses.
    """
    api = huggingface_hub.HfApi()
    operations = list(_operations(content))
    try:
        address = api.create_repo(repository, private=private or None, exist_ok=True)
        api.create_commit(repository, operations, commit_message="Adapter by evatune")
    except huggingface_hub.errors.HfHubHTTPError as error:
        raise ConfigError(_refusal(repository, error)) from error
    # the kinds depend on the HTTP client of this version of huggingface_hub
    except Exception as error:
        raise ConfigError(
            f"cannot push to {repository!r}: the model hub cannot be reached ({one_line(error)});"
            " try again with a connection"
        ) from error
    return str(address)


def _operations(content: Mapping[str, bytes | Path]) -> Iterator[Any]:
    for name, source in content.items():
        yield huggingface_hub.CommitOperationAdd(path_in_repo=name, path_or_fileobj=source)


def _refusal(repository: str, error: Any) -> str:
    status = getattr(error.response, "status_code", None)
    if status in (401, 403):
        return (
            f"the hub does not let this token write to {repository!r} (status {status}); use your"
            " own name or an organization's before the slash, and a token that may write"
        )
    return f"the hub refused the adapter for {repository!r} ({one_line(error)}); try again later"
