"""Recipes: every setting of a fine-tuning run, with default, bounds and help."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, ConfigDict, Field, Strict
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError

from evatune.choices import DEFAULT_BUDGET, DEFAULT_RHO, DEFAULT_SCALE, Budget, Scale
from evatune.utils.names import name_problem


def _require_name(name: str) -> str:
    problem = name_problem(name)
    if problem is not None:
        raise PydanticCustomError("file_name", problem)
    return name


Name = Annotated[str, AfterValidator(_require_name)]  # what becomes part of a path


REFERENCE = "lora"  # the method that others are held against
_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
_Flag = Annotated[bool, Strict()]
_Whole = Annotated[int, Strict()]
_Real = Annotated[float, Strict(), Field(le=1e9)]
_Text = Annotated[str, Field(max_length=4096)]
_Texts = Annotated[list[_Text], Field(max_length=10_000)]
# Schedules of transformers that need no settings but those of a recipe.
Schedule = Literal[
    "linear",
    "cosine",
    "cosine_with_min_lr",
    "constant",
    "constant_with_warmup",
    "polynomial",
    "inverse_sqrt",
]
COSINE_WITH_MIN_LR: Schedule = "cosine_with_min_lr"  # the one that `training.floor` is for
# In recipes that wait for the user's data, and the beginning of such a task's name.
USER_TASK = "own"
HUB = "hub"  # as data.source: a task's own data on the hub
SUCCESS = "success"  # the one metric of rl
SIZES = ("train", "validation", "test")  # of the parts of the data
_MOST = 10**9  # of steps and examples
_MOST_EVALUATED = 2**13  # tokens at once, unless a batch of training has more
_MOST_AT_ONCE = 2**20  # tokens of a text, examples of a batch


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
    scale: Scale = Field(default=DEFAULT_SCALE, description="EVA: length of the rows of A")
    rho: _Real = Field(
        default=int(DEFAULT_RHO),  # recipes write 2, not 2.0
        ge=1,
        description="EVA: no layer gets more than rho times rank; 1 is no redistribution",
    )
    budget: Budget = Field(
        default=DEFAULT_BUDGET,
        description="EVA: what redistribution keeps within that of uniform ranks",
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
    schedule: Schedule = Field(
        default="linear", description="learning rate after warm-up, as transformers names it"
    )
    floor: _Real = Field(
        default=0.0,
        ge=0,
        le=1,
        description=f"{COSINE_WITH_MIN_LR}: share of the learning rate that it falls to",
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
