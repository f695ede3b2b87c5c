"""A finished run on tasks: ours, the user's own, and programs; what is kept and shown of it."""

from __future__ import annotations

import json
import random
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import lm_eval.evaluator
import lm_eval.tasks
import pytest
import torch
import transformers

from evatune.finetune.evaluation import code_sets
from evatune.finetune.evaluation.evaluate import EvaluationOptions, evaluate, load_trained
from evatune.finetune.recipe import Recipe
from evatune.finetune.recipe_files import load
from evatune.finetune.run import run
from evatune.finetune.run_folder import EVALUATION, RECIPE, RESULT, read_evaluation
from evatune.finetune.tasks.generation.question_sets import SETS, question_sets
from evatune.finetune.tasks.generation.scoring import share_chosen
from evatune.utils import extras
from tests.conftest import Command, refused, save_model
from tests.finetune.paper_data import rows, save_rows, save_set

# PEFT's advice on merging, and on lm_head, which the paper adapts and Gemma's embedding shares.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
]
TASK = """
task: mine
dataset_path: json
dataset_kwargs: {data_files: FILE}
test_split: train
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: ["w1", "w2"]
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
"""
PROBLEM = {
    "task_id": "HumanEval/0",
    "prompt": 'def one():\n    """Return 1."""\n',
    "canonical_solution": "    return 1\n",
    "test": "def check(candidate):\n    assert candidate() == 1\n",
    "entry_point": "one",
}


def varied(name: str, count: int) -> list[dict[str, Any]]:
    """Rows of a set in random words, so that answers to them differ."""
    text = json.dumps(rows(name, count))
    source = random.Random(name)
    found: list[dict[str, Any]] = json.loads(
        re.sub(r"\bw\d+", lambda _: f"w{source.randrange(56)}", text)
    )
    return found


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    for name, one in SETS.items():
        save_set(folder, name, {"train": rows(name), one.tested_on: varied(name, 20)})
    save_rows(folder / "openai" / "openai_humaneval", {"test": [PROBLEM] * 3})
    return folder


@pytest.fixture(scope="module")
def trained(copies: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of a tiny Gemma 2 with a token at each end of a sequence."""
    folder = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        vocab_size=60,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        initializer_range=0.4,
    )
    model = transformers.Gemma2ForCausalLM(config)
    save_model(model, folder / "gemma", bos_token="w56", eos_token="w57")
    sizes = ["training.steps=2", "training.eval_every=2", "training.precision=float32"]
    settings = [f"model={folder / 'gemma'}", "data.max_length=32", "adapter.rank=2", *sizes]
    data = [f"data.source={copies}", "data.validation=8", "training.learning_rate=0.1"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT, see above
        run(
            load("paper-commonsense", ["method=lora", *data, *settings]), folder / "run", quiet=True
        )
    return folder / "run"


@pytest.fixture
def finished(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run, to be measured and written into."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave lm-eval's own tasks and its facts about the machine out, which take seconds."""
    whole = lm_eval.tasks.TaskManager

    def manager(include_defaults: bool = True, **options: Any) -> Any:
        return whole(include_defaults=False, **options)

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", manager)
    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda _: None)


@pytest.fixture
def own_tasks(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    asked = [{"question": f"w{n}", "answer": n % 2} for n in range(6)]
    (tmp_path / "mine.json").write_text("".join(json.dumps(one) + "\n" for one in asked))
    (folder / "mine.yaml").write_text(TASK.replace("FILE", str(tmp_path / "mine.json")))
    return folder


def recipe_of(folder: Path) -> Recipe:
    return load(str(folder / RECIPE))


def test_the_eight_sets_are_scored_as_in_training(finished: Path) -> None:
    found = evaluate(finished, EvaluationOptions(batch_size=16))
    shares = {name: found[f"evatune_{name}"]["measures"]["acc"]["score"] for name in SETS}
    measured = json.loads((finished / RESULT).read_text())["measures"]
    assert shares == {name: measured[name] for name in SETS}
    mean = found["evatune_commonsense"]
    assert mean["measures"]["acc"]["score"] == pytest.approx(sum(shares.values()) / 8)
    assert (mean["examples"], found["evatune_boolq"]["examples"]) == (160, 20)
    # and by the adapter: the base model answers otherwise
    recipe = recipe_of(finished)
    base = transformers.AutoModelForCausalLM.from_pretrained(recipe.model)
    _, tokenizer = load_trained(recipe, finished)
    tests = question_sets(recipe.data).tests
    assert shares != {name: share_chosen(base, tokenizer, tests[name], 32) for name in SETS}


def test_tasks_of_ones_own_are_kept_beside_others_and_shown(
    finished: Path, own_tasks: Path, command: Command
) -> None:
    chosen = ["--include-path", own_tasks, "--batch-size", 4]
    printed = command(
        "evaluate", finished, "--tasks", "evatune_piqa,mine", "--limit", 5, *chosen, "--json"
    )
    assert printed.status == 0, printed.err
    tasks = json.loads(printed.out)["tasks"]
    assert tasks.keys() == {"evatune_piqa", "mine"}
    assert (tasks["mine"]["examples"], tasks["mine"]["limit"]) == (5, 5)
    assert tasks["mine"]["versions"].keys() == {"python", "torch", "transformers", "lm_eval"}

    shown = command("evaluate", finished, "--tasks", "mine", *chosen)
    assert re.search(r"mine +acc +\d\.\d{4} +\d\.\d{4} +6 ", shown.out), shown.out
    kept = read_evaluation(finished)
    assert (kept["mine"]["examples"], kept["evatune_piqa"]) == (6, tasks["evatune_piqa"])
    for page in (finished / "report.html", finished / "adapter" / "README.md"):
        assert "Measured on standard tasks" in page.read_text()
        assert "evatune_piqa" in page.read_text()


def test_programs_are_run_with_leave_and_kept(
    finished: Path, copies: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(code_sets, "NEW_TOKENS", 4)
    chosen = ["--tasks", "humaneval", "--data", copies, "--limit", 2, "--json"]
    refused(command("evaluate", finished, *chosen), "give --run-generated-code if they may run")
    assert not (finished / EVALUATION).exists()
    printed = command("evaluate", finished, *chosen, "--run-generated-code")
    found = json.loads(printed.out)["tasks"]["humaneval"]
    assert (found["measures"]["pass@1"]["score"], found["examples"]) == (0, 2)
    lines = (finished / "answers-humaneval.jsonl").read_text().splitlines()
    assert [json.loads(line)["outcome"] for line in lines] != ["passed", "passed"]


def test_what_is_no_finished_run_of_language_generation_is_refused(
    finished: Path, tmp_path: Path, command: Command
) -> None:
    refused(command("evaluate", tmp_path / "nothing"), "holds no run of evatune")
    recipe = json.loads((finished / RECIPE).read_text())
    settings = {**recipe, "domain": "understanding", "task": "bbc"}
    (finished / RECIPE).write_text(json.dumps(settings))
    refused(command("evaluate", finished), "the run is of the domain 'understanding'")
    (finished / RECIPE).write_text(json.dumps({**recipe, "task": "code"}))
    refused(command("evaluate", finished), "name some with --tasks, such as evatune_commonsense")
    (finished / RESULT).unlink()
    refused(command("evaluate", finished), "is not finished; give its `evatune train` command")


def test_tasks_that_cannot_be_had_are_refused(
    finished: Path, own_tasks: Path, tmp_path: Path, command: Command
) -> None:
    unsafe = TASK.replace("mine", "unsafe") + "unsafe_code: true\n"
    (own_tasks / "unsafe.yaml").write_text(unsafe)
    (own_tasks / "whole.yaml").write_text("group: group\ntask: [mine]\n")
    (own_tasks / "group.yaml").write_text("group: both\ntask: [mine, unsafe]\n")
    (own_tasks / "broken.yaml").write_text(TASK.replace("mine", "broken").replace("{{q", "{{ %q"))
    own = ["--include-path", own_tasks]
    for arguments, parts in (
        (["--tasks", "evatune_boolqs"], ["no task 'evatune_boolqs'; did you mean evatune_boolq"]),
        (["--tasks", "human_eval"], ["no task 'human_eval'; did you mean humaneval"]),
        ([*own, "--tasks", "both"], ["task 'unsafe' runs the programs", "--run-generated-code"]),
        ([*own, "--tasks", "broken"], ["cannot load a task from", "broken.yaml"]),
        ([*own, "--tasks", "group,mine"], ["harness refuses these tasks", "Duplicate task 'mine'"]),
        (["--include-path", tmp_path / "no"], ["--include-path", "is no folder"]),
        (["--data", tmp_path / "no"], ["--data", "is no folder"]),
        (["--data", tmp_path], ["there is no folder", "aps/super_glue"]),
    ):
        refused(command("evaluate", finished, *arguments), *parts)
    assert not (finished / EVALUATION).exists()


def test_a_missing_harness_is_named_with_its_extra(
    finished: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = extras.find_spec
    monkeypatch.setattr(
        extras, "find_spec", lambda name: None if name == "lm_eval" else found(name)
    )
    refused(command("evaluate", finished), "pip install 'evatune[eval]'")


def test_a_damaged_file_of_scores_is_named(finished: Path, command: Command) -> None:
    (finished / EVALUATION).write_text('{"tasks": 3}')
    answer = command("evaluate", finished, "--tasks", "evatune_boolq", "--limit", 1)
    assert answer.status == 2
    assert "remove it, and evaluate the run again" in answer.err
