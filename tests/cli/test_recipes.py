"""`evatune recipes`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from evatune.finetune.recipe_files import bundled_recipes, load, text_of
from evatune.finetune.recipe_keys import recipe_keys
from evatune.finetune.recipe_tree import as_tree
from tests.conftest import Command, refused


def test_recipes_are_listed_each_with_what_it_is(command: Command) -> None:
    lines = command("recipes", "ls").out.splitlines()
    assert [line.split()[0] for line in lines] == list(bundled_recipes())
    assert all(len(line.split()) > 2 for line in lines)
    facts = json.loads(command("recipes", "ls", "--json").out)["recipes"]
    assert [fact["name"] for fact in facts] == list(bundled_recipes())
    assert {"domain", "task", "model", "about"} < facts[0].keys()


def test_a_recipe_is_shown_with_every_key_that_it_may_have(command: Command) -> None:
    shown = command("recipes", "show", "understanding-bbc").out
    assert shown.startswith(text_of("understanding-bbc").rstrip())
    for key in recipe_keys():
        assert f"# {key.name} = " in shown
        assert f"#     {key.meaning}\n#     {key.kind}; " in shown
    facts = json.loads(command("recipes", "show", "understanding-bbc", "--json").out)
    assert facts["recipe"] == as_tree(load("understanding-bbc"))
    assert [fact["name"] for fact in facts["keys"]] == [key.name for key in recipe_keys()]


def test_a_key_that_a_recipe_leaves_out_is_shown_at_its_default(command: Command) -> None:
    shown = command("recipes", "show", "images-triangle").out
    assert "# training.max_grad_norm = 1" in shown
    assert "# training.floor = 0" in shown
    assert "# adapter.bias = none" in shown
    assert "# adapter.quantize = none" in shown
    assert "# data.more_test_splits = []" in shown
    facts = json.loads(command("recipes", "show", "images-triangle", "--json").out)["keys"]
    values = {fact["name"]: fact["value"] for fact in facts}
    assert values["data.metric"] == "accuracy"
    assert values["trust_remote_code"] is False


def test_a_recipe_is_copied_as_it_is_and_onto_nothing(command: Command, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    assert command("recipes", "cp", "understanding-bbc", file).out == f"{file}\n"
    assert file.read_text() == text_of("understanding-bbc")
    refused(command("recipes", "cp", "understanding-movie", file), "exists; name another")
    assert file.read_text() == text_of("understanding-bbc")
    refused(
        command("recipes", "cp", "understanding-bbc", tmp_path / "no" / "a.yaml"),
        "make it first",
        folder=tmp_path,
        left=frozenset({"mine.yaml"}),
    )


def test_a_recipe_is_checked_and_said_to_be_ready(
    command: Command, llama_folder: Path, tmp_path: Path
) -> None:
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(f'{{"prompt": "w{n}", "completion": "w1"}}\n' for n in range(40)))
    settings = [f"model={llama_folder}", f"data.source={data}", "method=lora"]
    shown = command("recipes", "check", "own-generation", *settings)
    assert shown.status == 0, shown.err
    for part in (
        "at hand",
        "Parameters: ",
        "Memory: tensors take about ",
        "Time: about ",
        "Data: ",
        "what was saved gives the same outputs when it is read again",
        f"Ready: evatune train own-generation model={llama_folder}",
    ):
        assert part in shown.out
    facts = json.loads(command("recipes", "check", "own-generation", *settings, "--json").out)
    assert (facts["ready"], facts["missing"], facts["hub_reachable"]) == (True, [], None)
    assert facts["trial"]["stand_in"]
    assert facts["memory_bytes"]["peak"] > facts["memory_bytes"]["weights"]
    assert [path.name for path in tmp_path.iterdir()] == ["texts.jsonl"]


@pytest.mark.usefixtures("no_network")
def test_without_the_hub_a_check_says_what_it_could_not_try(command: Command) -> None:
    shown = command("recipes", "check", "paper-glue-rte")
    assert shown.status == 0, shown.err
    assert "its size is unknown, since the hub does not answer" in shown.out
    assert "for want of FacebookAI/roberta-large, nyu-mll/glue. --download" in shown.out
    assert "once the hub can be reached" in shown.out
    facts = json.loads(command("recipes", "check", "paper-glue-rte", "--json").out)
    assert (facts["ready"], facts["hub_reachable"], facts["trial"]) == (False, False, None)
    refused(
        command("recipes", "check", "paper-glue-rte", "--download"),
        "cannot load a model from 'FacebookAI/roberta-large'",
        "the model hub cannot be reached",
    )


def test_mistakes_that_a_check_finds_have_one_sentence_and_status_2(
    command: Command, bert_folder: Path, tmp_path: Path
) -> None:
    data = tmp_path / "texts.csv"
    data.write_text("words,kind\n" + "w1,a\nw2,b\n" * 10)
    own = [f"model={bert_folder}", f"data.source={data}"]
    for arguments, text in (
        (["paper-glue"], "there is no recipe or file 'paper-glue'; did you mean paper-glue-"),
        (["own-generation", "lr=1"], "unknown key 'lr' (nearest: training.learning_rate)"),
        (["own-understanding", *own], "'label'"),
        (["own-understanding"], "recipes for your own data need them"),
        (["generation-clock", "adapter.targets=nothing"], "match no layer of this model"),
    ):
        refused(command("recipes", "check", *arguments), text)
