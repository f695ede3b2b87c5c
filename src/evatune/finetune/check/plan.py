"""Plan of what a recipe reads: which of it is at hand, and how much would be downloaded."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import huggingface_hub
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from evatune.errors import DataError
from evatune.finetune.recipe import Recipe
from evatune.finetune.tasks import DataSource, Domain, find_domain
from evatune.finetune.tasks.base import UNTRAINED
from evatune.loading.cache import download_path
from evatune.loading.demo import model_id
from evatune.loading.hub import TIMEOUT, cache_only, hub_is_reachable, require_path

State = Literal["at hand", "to download", "unknown"]

_WEIGHTS = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)")
_BESIDE_WEIGHTS = re.compile(r"[\w.-]+\.(json|txt|model|jinja)")
_NOT_READ = re.compile(r"(?i)(readme|license|notice|use_policy)\b.*|training_args.*|trainer_.*")
_DATA = re.compile(r".+\.(parquet|jsonl?|csv|tsv|txt|arrow|zip|gz|tar|zst)")
_CACHED_WEIGHTS = (
    *("model.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json"),
)


@dataclass(frozen=True)
class Need:
    """A thing that a recipe reads.

    Attributes:
        what: model, data or chat template. source: hub id, path, or file of the package index.
        state: "unknown" is what is not at hand, where the hub does not say more of it.
        files, size: of what would be downloaded, size in bytes; None where that is not known.
    """

    what: str
    source: str
    state: State
    files: int | None = None
    size: int | None = None


@dataclass(frozen=True)
class Plan:
    """All that a recipe reads, and whether the hub can be asked for what is not at hand.

    Attributes:
        reachable: None where nobody had to ask.
    """

    needs: list[Need]
    reachable: bool | None

    @property
    def data(self) -> list[Need]:
        """All but the model."""
        return [need for need in self.needs if need.what != "model"]


def plan_of(recipe: Recipe) -> Plan:
    """Return what a recipe reads.

    The hub is asked only where something is not at hand, and gets some seconds for an answer.

    Raises DataError for a path that does not exist, and for what the hub does not have or does not
    let this user have.
    """
    domain = find_domain(recipe.domain)
    hub = _Hub()
    needs = [_model(domain, recipe, hub), *_data(domain, recipe, hub)]
    return Plan(needs, hub.reachable)


class _Hub:
    """The model hub, which is asked once whether it answers."""

    def __init__(self) -> None:
        self.reachable: bool | None = None

    def files(self, what: str, source: str, *, data: bool) -> list[Any] | None:
        """Return the files of a repository; None where the hub does not answer.

        Raises DataError for one that is not there, or that is not for this user.
        """
        if self.reachable is None:
            self.reachable = hub_is_reachable()
        if not self.reachable:
            return None
        kind = "dataset" if data else "model"
        ask = huggingface_hub.dataset_info if data else huggingface_hub.model_info
        try:
            info = ask(source, files_metadata=True, timeout=TIMEOUT)
            if info.gated:
                huggingface_hub.auth_check(source, repo_type=kind)
        except GatedRepoError as error:
            page = f"{huggingface_hub.constants.ENDPOINT}/{'datasets/' if data else ''}{source}"
            raise DataError(
                f"{what} {source!r} is gated, and this user has no access; ask for it at {page},"
                " then log in with `hf auth login` or set HF_TOKEN"
            ) from error
        except RepositoryNotFoundError as error:
            raise DataError(
                f"the hub has no {kind} {source!r} that this user may read; check the name, or set"
                " HF_TOKEN if it is private"
            ) from error
        except Exception:  # of many kinds, by the HTTP client: no answer in time, or none of sense
            return None
        return list(info.siblings or [])


def _model(domain: Domain, recipe: Recipe, hub: _Hub) -> Need:
    source = domain.models.source(recipe)
    require_path(source, "model")
    if recipe.model == "demo":
        return Need("model", f"demo ({model_id(source) or Path(source).name})", "at hand")
    if Path(source).exists():
        _require_weights(Path(source))
        shown = UNTRAINED if Path(source).name == UNTRAINED else str(source)
        return Need("model", shown, "at hand")
    if _is_cached(str(source), _CACHED_WEIGHTS):
        return Need("model", str(source), "at hand")
    return _need("model", str(source), hub.files("model", str(source), data=False), _read_of_model)


def _require_weights(folder: Path) -> None:
    """Raise a DataError for a folder without weights, which no trial on a stand-in would miss."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    if not any(_WEIGHTS.fullmatch(name) for name in names):
        raise DataError(
            f"model {str(folder)!r} holds no weights (model.safetensors, or its parts); give the"
            " folder that from_pretrained loads, or a hub id"
        )


def _data(domain: Domain, recipe: Recipe, hub: _Hub) -> Iterator[Need]:
    for source in domain.sources(recipe):
        yield _data_need(source, hub)
    template = recipe.data.chat_template
    if template is not None:
        yield _template(template, hub)


def _data_need(source: DataSource, hub: _Hub) -> Need:
    if source.name is None:
        (file,) = source.files
        state: State = "at hand" if download_path(file).is_file() else "to download"
        return Need("data", file, state, 1)
    require_path(source.name, "data.source")
    if Path(source.name).exists():
        return Need("data", source.name, "at hand")
    if source.files:
        return _files(source.name, source.files, hub)
    if all(_is_cached_data(source.name, subset) for subset in source.subsets):
        return Need("data", source.name, "at hand")
    files = hub.files("data", source.name, data=True)
    return _need("data", source.name, files, lambda listed: _read_of_data(listed, source.subsets))


def _files(name: str, wanted: Sequence[str], hub: _Hub) -> Need:
    """Return the need of some files, in any folders of a repository of data or of a model."""
    for kind in ("dataset", "model"):
        folder = _cached_folder(name, kind)
        if folder is not None and all(next(folder.rglob(file), None) for file in wanted):
            return Need("data", name, "at hand")
    try:
        files = hub.files("data", name, data=True)
    except DataError:
        files = hub.files("data", name, data=False)
    return _need(
        "data",
        name,
        files,
        lambda listed: [file for file in listed if Path(file.rfilename).name in wanted],
    )


def _cached_folder(name: str, kind: str) -> Path | None:
    """Return the folder of a repository in the hub's cache; None where it has nothing of it."""
    try:
        folder = huggingface_hub.snapshot_download(name, repo_type=kind, local_files_only=True)
    except (OSError, ValueError):
        return None
    return Path(folder)


def _template(source: str, hub: _Hub) -> Need:
    """Return the need of a chat template: a file's, or a tokenizer's."""
    names = ("tokenizer_config.json",)
    if Path(source).exists() or _is_cached(source, names):
        return Need("chat template", source, "at hand")
    files = hub.files("chat template", source, data=False)
    return _need("chat template", source, files, _read_of_tokenizer)


def _need(
    what: str, source: str, files: list[Any] | None, read: Callable[[list[Any]], list[Any]]
) -> Need:
    if files is None:
        return Need(what, source, "unknown")
    fetched = read(files)
    sizes = [file.size for file in fetched]
    size = None if None in sizes or not sizes else sum(sizes)
    return Need(what, source, "to download", len(fetched), size)


def _read_of_model(files: Iterable[Any]) -> list[Any]:
    """Return the files that `from_pretrained` reads: one form of the weights, and what is small."""
    files = list(files)
    weights = [file for file in files if _WEIGHTS.fullmatch(file.rfilename)]
    safe = [file for file in weights if file.rfilename.endswith(".safetensors")]
    return [*(safe or weights), *_read_of_tokenizer(files)]


def _read_of_tokenizer(files: Iterable[Any]) -> list[Any]:
    beside_weights = [file for file in files if _BESIDE_WEIGHTS.fullmatch(file.rfilename)]
    return [file for file in beside_weights if not _NOT_READ.fullmatch(file.rfilename)]


def _read_of_data(files: Iterable[Any], subsets: Iterable[str | None]) -> list[Any]:
    """Return the data files of subsets, which have a folder each; all, where they have none."""
    data = [file for file in files if _DATA.fullmatch(file.rfilename)]
    folders = tuple(f"{subset}/" for subset in subsets if subset)
    return [file for file in data if file.rfilename.startswith(folders)] or data


def _is_cached(source: str, files: Iterable[str]) -> bool:
    """Return whether the hub's cache has one of these files of a model."""
    return any(
        isinstance(huggingface_hub.try_to_load_from_cache(source, name), str) for name in files
    )


def _is_cached_data(source: str, subset: str | None) -> bool:
    try:
        with cache_only(True):
            datasets.load_dataset_builder(source, subset)
    except Exception:  # of many kinds, all of which mean that it would have to be fetched
        return False
    return True
