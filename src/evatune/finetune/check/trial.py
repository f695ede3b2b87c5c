"""A trial: a recipe from end to end, on a few examples and a small stand-in of its model."""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from accelerate.utils import extract_model_from_parallel
from torch import Tensor

from evatune.choices import IGNORED
from evatune.errors import AdapterError, DataError, EvatuneError
from evatune.finetune.check.stand_in import write_stand_in
from evatune.finetune.methods import find_method
from evatune.finetune.recipe import Recipe
from evatune.finetune.run import run
from evatune.finetune.tasks import Task, find_domain
from evatune.finetune.tasks.quantization import keep_trainable, quantized
from evatune.loading.hub import reading
from evatune.utils.text import first_line

STEPS = 2
"""Of a trial."""
_EXAMPLES = 8  # of each part
_BATCH, _RANK = 2, 2  # at most
_WINDOW = 64  # tokens of a text with a label per token: logits of large vocabularies take memory
INSTEAD = "a local folder with config.json, weights and what prepares its inputs"


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Result of a trial.

    Attributes:
        task: with a few examples of each part, and the stand-in. stand_in: False for the model
            itself.
        result: of its run, as `run` returns it. seconds: that it all took.
        difference: between the outputs of the model that was trained and of what was saved, read
            anew, by norm; None where nothing is saved.
    """

    task: Task
    stand_in: bool
    result: dict[str, Any]
    seconds: float
    difference: float | None


def try_recipe(recipe: Recipe) -> Trial:
    """Return what a trial of the recipe shows: data, training, evaluation, saving and reading.

    Every label is looked at, and a few examples are trained on. A bundled model is itself; any
    other gives its configuration, and what prepares its inputs. Nothing of it stays on disk.

    Raises what `run` does; AdapterError where what was saved computes something else.
    """
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch, _quiet():
        folder = Path(scratch)
        small = _small(recipe)
        if recipe.model != "demo":
            _write_model(recipe, folder / "model")
            small = replace(small, model=str(folder / "model"))
        transformers.set_seed(recipe.seed)
        task = find_domain(recipe.domain).prepare(small, _EXAMPLES)
        examples = {part: _windows(getattr(task, part)) for part in ("train", "validation", "test")}
        with _explained(recipe):
            result = run(small, folder / "run", quiet=True, task=replace(task, **examples))
            difference = _difference(small, task, folder / "run")
    return Trial(
        task=task,
        stand_in=recipe.model != "demo",
        result=result,
        seconds=time.perf_counter() - start,
        difference=difference,
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence warnings that are about the small number of steps and examples."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _explained(recipe: Recipe) -> Iterator[None]:
    """Turn what a stand-in's own class raises into a sentence."""
    try:
        yield
    except (EvatuneError, OSError):
        raise
    except Exception as error:  # of many kinds: sizes that do not fit, or what the run would meet
        if recipe.model == "demo":
            raise
        raise DataError(
            f"two steps on a small stand-in of {recipe.model!r} ended in {type(error).__name__}:"
            f" {first_line(error)} Run them on the model itself with `evatune train` and"
            " training.steps=2 to see whether that is the stand-in's fault"
        ) from error


def _small(recipe: Recipe) -> Recipe:
    """Return the recipe with two steps of small batches; what it asks of data stays."""
    training = replace(
        recipe.training,
        steps=STEPS,
        batch_size=min(recipe.training.batch_size, _BATCH),
        accumulate=min(recipe.training.accumulate, 2),
        log_every=1,
        eval_every=STEPS,
        save_every=STEPS,
        report_to=[],
        sharding="none",
    )
    adapter = replace(recipe.adapter, rank=min(recipe.adapter.rank, _RANK))
    return replace(recipe, training=training, adapter=adapter)


def _write_model(recipe: Recipe, folder: Path) -> None:
    """Write a stand-in of the recipe's model, with what prepares its inputs."""
    models = find_domain(recipe.domain).models
    source, trust = models.source(recipe), recipe.trust_remote_code
    with reading(source, "a model", INSTEAD):
        write_stand_in(source, models.loader, folder, trust)
        if models.processor is not None:
            kind = getattr(transformers, models.processor)
            kind.from_pretrained(source, trust_remote_code=trust).save_pretrained(folder)


def _windows(examples: Any) -> Any:
    """Return texts with a label per token cut to those up to the last one that has a loss."""
    if not isinstance(examples, datasets.Dataset) or not len(examples):
        return examples
    if not isinstance(examples[0].get("labels"), list):
        return examples
    rows = []
    for row in examples:
        counted = [position for position, label in enumerate(row["labels"]) if label != IGNORED]
        end = counted[-1] + 1 if counted else len(row["labels"])
        rows.append({key: value[max(0, end - _WINDOW) : end] for key, value in row.items()})
    return datasets.Dataset.from_list(rows)


@torch.no_grad()
def _difference(recipe: Recipe, task: Task, folder: Path) -> float | None:
    """Return by how much what was saved differs in its outputs, relative to these; None if nothing.

    Raises AdapterError for a difference beyond rounding.
    """
    method = find_method(recipe.method)
    if not method.trains:
        return None
    # Trainer wraps the forward pass of the model that it trains in its precision.
    trained = extract_model_from_parallel(task.model, keep_fp32_wrapper=False).eval()
    read = method.load(_fresh(recipe, trained), folder / method.saved_as)
    read = read.to(trained.device).eval()
    batch = task.collator([task.test[i] for i in range(min(_BATCH, len(task.test)))])
    inputs = {key: value.to(trained.device) for key, value in batch.items()}
    expected, reread = _outputs(trained(**inputs)), _outputs(read(**inputs))
    difference = float((reread - expected).norm() / expected.norm())
    allowed = torch.finfo(trained.dtype).eps ** 0.5  # half of the digits, as sums in 16 bits need
    if not difference <= allowed:
        raise AdapterError(
            f"what method {recipe.method!r} saved in the trial computes something else when it is"
            f" read anew: its outputs differ by {difference:.1%}; choose another method, and please"
            " report this"
        )
    return difference


def _fresh(recipe: Recipe, trained: Any) -> Any:
    """Return the model before training as anybody would load it, with as many classes."""
    models, trust = find_domain(recipe.domain).models, recipe.trust_remote_code
    source = models.source(recipe)
    config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=trust)
    if models.new_head:
        config.num_labels = trained.config.num_labels
    model = type(trained).from_pretrained(
        source,
        config=config,
        dtype=trained.dtype,
        ignore_mismatched_sizes=True,
        **quantized(recipe),
    )
    keep_trainable(model)  # as the run's was
    return model


def _outputs(output: Any) -> Tensor:
    outputs = output.action_preds if hasattr(output, "action_preds") else output.logits
    return outputs.float().flatten()  # type: ignore[no-any-return]
