"""Recipes: every setting of a fine-tuning run, with default and help, and YAML files of them."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import re
import shlex
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, Strict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError

from evatune.choices import DEFAULT_RHO, DEFAULT_SCALE, SCALES
from evatune.errors import ConfigError
from evatune.finetune.recipe_keys import RecipeKey, keys_of, nearest_key
from evatune.schemas import Damage, shown, telling
from evatune.schemas.text import parse_yaml, read_text
from evatune.utils.names import name_problem


def _require_name(name: str) -> str:
    problem = name_problem(name)
    if problem is not None:
        raise PydanticCustomError("file_name", problem)
    return name


Name = Annotated[str, AfterValidator(_require_name)]  # what becomes part of a path


def _one_of(choices: tuple[str, ...]) -> AfterValidator:
    """Return what refuses any other text."""

    def require(text: str) -> str:
        if text not in choices:
            raise PydanticCustomError("choice", f"choose one of {', '.join(choices)}")
        return text

    return AfterValidator(require)


Scale = Annotated[str, _one_of(SCALES)]
REFERENCE = "lora"  # the method that others are held against
_RECIPES = files("evatune.finetune").joinpath("recipes")
_NAME_LINE = re.compile(r"^--- # (.+)\n", re.MULTILINE)
_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
_Flag = Annotated[bool, Strict()]
_Whole = Annotated[int, Strict()]
_Real = Annotated[float, Strict(), Field(le=1e9)]
_Text = Annotated[str, Field(max_length=4096)]
_Texts = Annotated[list[_Text], Field(max_length=10_000)]
_SUFFIXES = (".yaml", ".yml", ".json", "")  # of recipes
_LATER = {
    "data": ("chat_template", "metric", "more_test_splits"),
    "adapter": ("bias", "quantize"),
    "training": ("gradient_checkpointing", "sharding", "floor", "max_grad_norm"),
}
_MISTAKES_TOLD = 10
TO_FLOOR = "cosine_with_min_lr"  # the schedule that `training.floor` is for
# Schedules of transformers that need no settings but those of a recipe.
SCHEDULES = (
    "linear",
    "cosine",
    TO_FLOOR,
    "constant",
    "constant_with_warmup",
    "polynomial",
    "inverse_sqrt",
)
OWN_TASK = (
    "own"  # in recipes that wait for the user's data, and the beginning of such a task's name
)
HUB = "hub"  # as data.source: a task's own data on the hub
_WITH_METRICS = "understanding"
SUCCESS = "success"  # the one metric of rl
_OWN_DATA, _SIZES = "data.source", ("train", "validation", "test")
_TASK_BYTES = 80  # of the part of a task's name that comes from a file's
_MOST = 10**9  # of steps and examples
_MOST_EVALUATED = 2**13  # tokens at once, unless a batch of training has more
_MOST_AT_ONCE = 2**20  # tokens of a text, examples of a batch
_FEWEST_TOKENS = 4  # of a text: two words and what a tokenizer puts around them


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class DataOptions:
    """The examples to train and to evaluate on."""

    train: _Whole = Field(
        default=1000,
        ge=0,
        le=_MOST,
        description=(
            "examples to train on, drawn with the seed 0 whatever the run's seed is; 0, the default"
            " with data.source: all that the other parts leave"
        ),
    )
    validation: _Whole = Field(
        default=0,
        ge=0,
        le=_MOST,
        description=(
            "examples to evaluate on while training and to choose settings by, in neither of the"
            " other parts; 0: the test examples are evaluated while training, but a tenth of the"
            " data, at most 500, where data.train is 0"
        ),
    )
    test: _Whole = Field(
        default=500,
        ge=0,
        le=_MOST,
        description=(
            "examples to evaluate on, none of them trained on; 0, the default with data.source: a"
            " tenth of the data and at most 500"
        ),
    )
    max_length: _Whole = Field(
        default=48,
        ge=1,
        le=_MOST_AT_ONCE,
        description="tokens per text, at least 4, the rest is cut off; rl: steps the policy sees",
    )
    source: _Text | None = Field(
        default=None, description="hub id, file or folder of the user's own data"
    )
    subset: _Text | None = Field(
        default=None, description="configuration of a hub data set, such as sst2 of nyu-mll/glue"
    )
    train_split: _Text = Field(default="train", description="split of data.source to train on")
    test_split: _Text | None = Field(
        default=None, description="split to evaluate on; default: unseen examples of train_split"
    )
    columns: _Texts = Field(
        default_factory=list,
        description=(
            "columns of data.source: text, or a pair of texts; generation: of chats, or prompt and"
            " completion, or instruction, input and output; images: the image. Default: recognized"
        ),
    )
    chat_template: _Text | None = Field(
        default=None,
        description=(
            "template for chats: a Jinja file, or a model that has one; default: the tokenizer's"
        ),
    )
    label_column: _Text = Field(
        default="label", description="column of data.source that holds the classes"
    )
    metric: Literal["accuracy", "f1", "matthews", "pearson", "spearman", "success"] = Field(
        default="accuracy",
        description=(
            "understanding: what the score is; for pearson and spearman labels are numbers, which"
            " the model predicts by their squared error; rl: success, the share of the episodes"
            " that succeed, in place of how soon they do"
        ),
    )
    more_test_splits: _Texts = Field(
        default_factory=list,
        description="understanding: other splits that a finished run is tested on as well",
    )
    episodes: _Whole = Field(
        default=20, ge=1, le=_MOST, description="rl: episodes in the simulator"
    )

    @property
    def has_validation(self) -> bool:
        """True if there are examples to choose settings by."""
        return self.validation > 0 or self.train == 0


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class AdapterOptions:
    """The adapter, for the methods that have one."""

    rank: _Whole = Field(
        default=8, ge=1, le=2**16, description="ranks per layer, before any redistribution"
    )
    alpha: _Real = Field(default=8, gt=0, description="LoRA's alpha; default: the rank")
    scale: Scale = Field(
        default=DEFAULT_SCALE,
        description="EVA: length of the rows of A",
        json_schema_extra={"enum": list(SCALES)},
    )
    rho: _Real = Field(
        default=int(DEFAULT_RHO),  # recipes write 2, not 2.0
        ge=1,
        description="EVA: no layer gets more than rho times rank; 1 is no redistribution",
    )
    budget: Literal["ranks", "parameters"] = Field(
        default="ranks", description="EVA: what redistribution keeps within that of uniform ranks"
    )
    targets: _Text | _Texts = Field(default="all-linear", description="layers, as PEFT names them")
    bias: Literal["none", "all", "lora_only"] = Field(
        default="none", description="biases that are trained, as PEFT names them"
    )
    quantize: Literal["none", "nf4"] = Field(
        default="none",
        description="the frozen weights below the adapter; nf4: of 4 bits, by bitsandbytes (QLoRA)",
    )


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class TrainingOptions:
    """Optimization: AdamW, by transformers' Trainer."""

    learning_rate: _Real = Field(default=1e-3, gt=0, description="largest learning rate")
    steps: _Whole = Field(default=60, ge=1, le=_MOST, description="optimizer steps")
    batch_size: _Whole = Field(
        default=16,
        ge=1,
        le=_MOST_AT_ONCE,
        description="examples per batch, of all processes together",
    )
    accumulate: _Whole = Field(
        default=1, ge=1, le=_MOST_AT_ONCE, description="batches whose gradients make one step"
    )
    precision: Literal["float32", "bf16", "fp16"] = Field(
        default="float32", description="mixed precision, or none"
    )
    gradient_checkpointing: _Flag = Field(
        default=False,
        description="compute activations again for the gradient in place of keeping them",
    )
    sharding: Literal["none", "fsdp2", "zero3"] = Field(
        default="none",
        description=(
            "what processes share besides the batches: all weights, by torch's FSDP2 or DeepSpeed's"
            " ZeRO-3; after the start, which each has whole"
        ),
    )
    warmup: _Real = Field(
        default=0.06, ge=0, lt=1, description="share of the steps in which the learning rate rises"
    )
    schedule: Annotated[_Text, _one_of(SCHEDULES)] = Field(
        default="linear",
        description="learning rate after warm-up, as transformers names it",
        json_schema_extra={"enum": list(SCHEDULES)},
    )
    floor: _Real = Field(
        default=0.0,
        ge=0,
        le=1,
        description=f"{TO_FLOOR}: share of the learning rate that it falls to",
    )
    max_grad_norm: _Real = Field(
        default=1.0, ge=0, description="norm that longer gradients are cut to; 0: none are"
    )
    weight_decay: _Real = Field(default=0.0, ge=0, description="AdamW's weight decay")
    lora_plus_ratio: _Real = Field(
        default=16.0, gt=0, description="loraplus: learning rate of B over that of A"
    )
    log_every: _Whole = Field(
        default=5, ge=1, le=_MOST, description="steps between lines of metrics"
    )
    eval_every: _Whole = Field(default=20, ge=1, le=_MOST, description="steps between evaluations")
    save_every: _Whole = Field(
        default=20,
        ge=1,
        le=_MOST,
        description="steps between checkpoints that a killed run resumes from",
    )
    report_to: _Texts = Field(
        default_factory=list, description="trackers, as transformers names them"
    )


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Recipe:
    """One fine-tuning run."""

    domain: Name = Field(default="understanding", description="what kind of task it is")
    task: Name = Field(description="which task of the domain")
    model: _Text = Field(
        default="demo",
        description=(
            "hub id or local folder; demo: the small model of the domain; untrained, of rl: a new"
            " one of the paper's size"
        ),
    )
    method: Name = Field(default="eva", description="what is trained and how it starts")
    trust_remote_code: _Flag = Field(
        default=False,
        description=(
            "run Python code that comes with the model; the command line alone can allow it"
        ),
    )
    seed: _Whole = Field(
        default=0,
        ge=0,
        lt=2**32,
        description="of new weights, of the order of examples and of dropout",
    )
    data: DataOptions = DataOptions()
    adapter: AdapterOptions = AdapterOptions()
    training: TrainingOptions = TrainingOptions()

    @property
    def evaluation_batch(self) -> int:
        """The examples that are evaluated at once: four batches, as there is nothing to learn.

        Fewer where texts are long, whose logits of a large vocabulary would fill a device.
        """
        batch = self.training.batch_size
        return min(4 * batch, max(batch, _MOST_EVALUATED // self.data.max_length))


def ours() -> list[str]:
    """Return the names of the recipes that come with evatune."""
    return sorted(_our_texts())


@cache
def _our_texts() -> Mapping[str, str]:
    """Return name → YAML text of the recipes that come with evatune.

    A file holds those of a family, each below a line `--- # NAME`; or one, whose name is its own.
    """
    texts: dict[str, str] = {}
    for file in _RECIPES.iterdir():
        if file.name.endswith(".yaml"):
            alone, *several = _NAME_LINE.split(file.read_text(encoding="utf-8"))
            if alone:
                texts[file.name.removesuffix(".yaml")] = alone
            texts |= zip(several[::2], several[1::2], strict=True)
    return texts


def expand(sources: Iterable[str]) -> list[str]:
    """Return recipes and files, with patterns such as "images-*" replaced by names of ours.

    Raises ConfigError for a pattern that fits none.
    """
    expanded: list[str] = []
    for source in sources:
        is_pattern = any(sign in source for sign in "*?[")
        names = fnmatch.filter(ours(), source) if is_pattern else [source]
        if not names:
            raise ConfigError(f"no recipe of ours fits {source!r}; ours are {', '.join(ours())}")
        expanded += names
    if not expanded:
        raise ConfigError(f"name at least one recipe; ours are {', '.join(ours())}")
    return list(dict.fromkeys(expanded))


def text_of(source: str) -> str:
    """Return the YAML text behind a name of ours or a path. ConfigError if there is none."""
    if source in _our_texts():
        return _our_texts()[source]
    path = Path(source)
    if path.is_dir() or (path.is_file() and path.suffix.lower() not in _SUFFIXES):
        raise ConfigError(f"{source!r} is no recipe, which is a YAML file; {_for_data(source)}")
    if path.is_file():
        with telling(source, "give a YAML file; `evatune recipes show` shows one", ConfigError):
            return read_text(path)
    near = difflib.get_close_matches(source, ours(), n=1, cutoff=0.4)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ConfigError(f"there is no recipe or file {source!r}; {hint}ours are {', '.join(ours())}")


def _for_data(source: str) -> str:
    name = f"{OWN_TASK}-generation"
    return f"if it is data to train on: {name} data.source={shlex.quote(source)}"


def load(source: str, overrides: Iterable[str] = ()) -> Recipe:
    """Return a recipe of ours or of the user's, with overrides.

    Args:
        overrides: `key=value`, such as `training.learning_rate=3e-4`.

    Raises ConfigError that lists every mistake at once, each with the nearest valid key.
    """
    text = text_of(source)
    with telling(source, "`evatune recipes show` shows a recipe", ConfigError):
        raw = parse_yaml(text)
    if not isinstance(raw, dict):
        raise ConfigError(
            f"recipe {source!r} holds {type(raw).__name__}, not keys with values; `evatune recipes"
            f" show` shows one; {_for_data(source)}"
        )
    if raw.get("trust_remote_code"):
        raise ConfigError(
            f"recipe {source!r} allows code of others to run (trust_remote_code), which only the"
            " command line can: leave the key out, and give --trust-remote-code if you trust the"
            " model's code"
        )
    tree: dict[str, Any] = raw
    settings = []
    for override in overrides:
        key, sign, value = override.partition("=")
        if not sign or not key:
            raise ConfigError(f"{override!r} is not key=value, such as training.steps=100")
        settings.append((key, value))
    if _OWN_DATA in dict(settings):
        _leave_own_task(tree)
    for key, value in settings:
        _put(tree, key, value)
    return parse(tree, source)


def parse(tree: Mapping[str, Any], source: str = "recipe") -> Recipe:
    """Return a recipe from a tree of plain values; see `load` for errors."""
    tree = _with_own_data(_with_alpha(_with_numbers(tree)))
    try:
        recipe = TypeAdapter(Recipe).validate_python(tree)
    except ValidationError as error:
        mistakes = [
            _explain(".".join(map(str, item["loc"])), item)
            for item in error.errors()[:_MISTAKES_TOLD]
        ]
        count = "1 mistake" if error.error_count() == 1 else f"{error.error_count()} mistakes"
        more = "; …" if error.error_count() > len(mistakes) else ""
        raise ConfigError(f"{source} has {count}: {'; '.join(mistakes)}{more}") from error
    mistake = _between_keys(recipe)
    if mistake is not None:
        raise ConfigError(f"{source} has 1 mistake: {mistake}")
    return recipe


def _between_keys(recipe: Recipe) -> str | None:
    """Return what is wrong with a value in the company of others; None where nothing is."""
    data, usual = recipe.data, DataOptions()
    for key in ("metric", "more_test_splits"):
        value = getattr(data, key)
        domain = "rl" if value == SUCCESS else _WITH_METRICS
        if value != getattr(usual, key) and recipe.domain != domain:
            return (
                f"data.{key} is for the domain {domain}, and this is {recipe.domain}; leave it out"
            )
    for name in ("train", "test"):
        if data.source is None and getattr(data, name) == 0:
            return f"data.{name} is 0, which is for data.source; give at least 1"
    training = recipe.training
    if training.floor and training.schedule != TO_FLOOR:
        return (
            f"training.floor is for training.schedule={TO_FLOOR}, and this is"
            f" {training.schedule}; leave one of them out"
        )
    if recipe.domain != "rl" and data.max_length < _FEWEST_TOKENS:
        return (
            f"data.max_length is {data.max_length}, but texts need at least {_FEWEST_TOKENS} tokens"
        )
    return None


def as_tree(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe as plain values, as YAML and JSON hold them.

    What came later than the first runs, whom the tree identifies, is no part of it by default.
    """
    tree = dataclasses.asdict(recipe)
    if not recipe.trust_remote_code:
        del tree["trust_remote_code"]
    for path, default in _left_out().items():
        part, _, key = path.rpartition(".")
        if part and tree[part][key] == default:
            del tree[part][key]
    return tree


def all_settings(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe's settings by path, with the defaults that `as_tree` leaves out."""
    return _left_out() | flat(tree)


@cache
def _left_out() -> dict[str, Any]:
    """Return path → default of the settings that `as_tree` leaves out where they have it."""
    usual = {"data": DataOptions(), "adapter": AdapterOptions(), "training": TrainingOptions()}
    later = {
        f"{part}.{key}": getattr(usual[part], key) for part, keys in _LATER.items() for key in keys
    }
    return {"trust_remote_code": False} | later


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a tree with the path of each value as its key: {"training.steps": 60, …}."""
    values: dict[str, Any] = {}
    for key, value in tree.items():
        values |= (
            flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return values


def recipe_keys() -> list[RecipeKey]:
    """Return every key that a recipe may have."""
    return list(keys_of(Recipe))


def _put(tree: dict[str, Any], key: str, text: str) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        inner = tree.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise ConfigError(
                f"{key!r} cannot be set: {parent!r} is a value and has no keys below it"
            )
        tree = inner
    try:
        tree[last] = parse_yaml(text)
    except Damage:
        tree[last] = text


def _with_numbers(value: Any) -> Any:
    """Return the tree with numbers where YAML reads text or a fraction.

    It reads 1e-3, without a point, as text; and 1e3 steps are a whole number of them.
    """
    if isinstance(value, Mapping):
        return {key: _with_numbers(inner) for key, inner in value.items()}
    if isinstance(value, str) and "e" in value.lower():
        with suppress(ValueError):
            value = float(value)
    if isinstance(value, float) and value.is_integer() and abs(value) <= 2**53:
        return int(value)
    return value


def _with_alpha(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the tree with an alpha as large as the rank, where it has a rank alone."""
    adapter = tree.get("adapter")
    if not isinstance(adapter, Mapping) or "alpha" in adapter or "rank" not in adapter:
        return tree
    rank = adapter["rank"]
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        return tree  # which is told as a mistake of the rank
    return {**tree, "adapter": {**adapter, "alpha": rank}}


def _leave_own_task(tree: dict[str, Any]) -> None:
    """Take out of a recipe for data of ours what is about them, so that the user's data decide."""
    data = tree.get("data")
    if isinstance(data, dict) and data.get("source") is not None:
        return  # a recipe for such data: another copy of them
    tree.pop("task", None)
    if isinstance(data, dict):
        for size in _SIZES:
            data.pop(size, None)


def _with_own_data(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the tree with a task's name and sizes, where data of the user's are to imply them."""
    data = tree.get("data")
    if not isinstance(data, Mapping) or not isinstance(data.get("source"), str):
        return tree
    stem = Path(data["source"]).stem
    name = "".join(sign if sign.isprintable() else "_" for sign in stem) or "data"
    implied = {"task": f"{OWN_TASK}-{name.encode()[:_TASK_BYTES].decode(errors='ignore')}"}
    return {**implied, **tree, "data": {**dict.fromkeys(_SIZES, 0), **data}}


def _explain(key: str, item: Mapping[str, Any]) -> str:
    """Return what is wrong with a key, from pydantic's account of it."""
    if item["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        nearest = nearest_key(key, [each.name for each in recipe_keys()])
        return f"unknown key {shown(key)}" + (f" (nearest: {nearest})" if nearest else "")
    if item["type"] in ("missing", "missing_argument"):
        return f"key {shown(key)} is missing"
    return f"{key} is {shown(item['input'])}: {item['msg'][0].lower()}{item['msg'][1:]}"
