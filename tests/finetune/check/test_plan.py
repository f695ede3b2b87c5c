"""What a recipe reads, with a hub that is made up."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from evatune.errors import DataError
from evatune.finetune.check import plan as module
from evatune.finetune.check.plan import Need, plan_of
from evatune.finetune.recipe_files import load

MODEL = {
    "model.safetensors": 1000,
    "pytorch_model.bin": 1000,
    "tf_model.h5": 1000,
    "onnx/model.onnx": 1000,
    "config.json": 1,
    "tokenizer.json": 10,
    "merges.txt": 10,
    "README.md": 500,
    "LICENSE.txt": 500,
}
GLUE = {"rte/train-0.parquet": 20, "rte/validation-0.parquet": 4, "mnli/train-0.parquet": 900}


@pytest.fixture(autouse=True)
def _empty_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVATUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "_is_cached_data", lambda *_: False)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: None)


def hub(
    monkeypatch: pytest.MonkeyPatch,
    models: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    reachable: bool = True,
) -> None:
    """Be a hub of these repositories: id → file → bytes, or an error."""

    def asked(answers: dict[str, Any]) -> Any:
        def info(name: str, *, files_metadata: bool, timeout: float) -> Any:
            assert files_metadata
            assert timeout <= 5
            if isinstance(answers[name], Exception):
                raise answers[name]
            files = [SimpleNamespace(rfilename=f, size=s) for f, s in answers[name].items()]
            return SimpleNamespace(siblings=files, gated=False)

        return info

    monkeypatch.setattr(module, "hub_is_reachable", lambda: reachable)
    monkeypatch.setattr(huggingface_hub, "model_info", asked(models or {}))
    monkeypatch.setattr(huggingface_hub, "dataset_info", asked(data or {}))


def refusal(kind: type[Exception]) -> Exception:
    return kind.__new__(kind, "no")


def test_the_files_that_would_be_fetched_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, {"FacebookAI/roberta-large": MODEL}, {"nyu-mll/glue": GLUE})
    found = plan_of(load("paper-glue-rte"))
    assert found.needs == [
        Need("model", "FacebookAI/roberta-large", "to download", 4, 1021),
        Need("data", "nyu-mll/glue", "to download", 2, 24),
    ]
    assert found.reachable


def test_the_sets_of_the_hub_are_named_each_once(monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, reachable=False)
    sets = [need.source for need in plan_of(load("paper-commonsense")).data]
    assert len(sets) == 7  # two of the eight are parts of one
    assert "allenai/ai2_arc" in sets
    learned = [need.source for need in plan_of(load("paper-metamath")).data]
    assert learned == ["meta-math/MetaMathQA", "openai/gsm8k", "EleutherAI/hendrycks_math"]
    chats = plan_of(load("paper-code")).data
    assert [need.what for need in chats] == ["data", "chat template"]


def test_the_archive_is_looked_for_among_data_and_models(monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = {"XiN0919/VTAB-1k": {"vtab-1k.zip": 4_700, "README.md": 1}}
    missing = {"XiN0919/VTAB-1k": refusal(RepositoryNotFoundError)}
    hub(monkeypatch, {"facebook/dinov2-giant": MODEL, **bundle}, missing)
    assert plan_of(load("paper-vtab-dtd")).data == [
        Need("data", "XiN0919/VTAB-1k", "to download", 1, 4_700)
    ]


@pytest.mark.parametrize("reachable", [False, True])
def test_without_an_answer_nothing_is_known_and_nothing_fails(
    reachable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = {"FacebookAI/roberta-large": TimeoutError()}
    hub(monkeypatch, late, {"nyu-mll/glue": TimeoutError()}, reachable)
    found = plan_of(load("paper-glue-rte"))
    assert {(need.state, need.size) for need in found.needs} == {("unknown", None)}


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (
            GatedRepoError,
            r"is gated, and this user has no access; ask for it at https://.*HF_TOKEN",
        ),
        (RepositoryNotFoundError, r"the hub has no model 'google/gemma-2-9b' that this user"),
    ],
)
def test_a_model_that_is_not_for_this_user_is_told(
    kind: type[Exception], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub(monkeypatch, {"google/gemma-2-9b": refusal(kind)})
    with pytest.raises(DataError, match=text):
        plan_of(load("paper-commonsense"))


def test_access_to_a_gated_model_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch)
    gated = SimpleNamespace(siblings=[], gated="manual")
    monkeypatch.setattr(huggingface_hub, "model_info", lambda *_, **__: gated)

    def refuse(source: str, *, repo_type: str) -> None:
        raise refusal(GatedRepoError)

    monkeypatch.setattr(huggingface_hub, "auth_check", refuse)
    with pytest.raises(DataError, match="is gated"):
        plan_of(load("paper-commonsense"))


def test_what_is_here_is_at_hand(
    bert_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "hub_is_reachable", None)  # nobody asks
    (tmp_path / "texts.csv").write_text("text,label\na,b\n")
    own = [f"data.source={tmp_path / 'texts.csv'}", f"model={bert_folder}"]
    found = plan_of(load("own-understanding", own))
    assert [need.state for need in found.needs] == ["at hand", "at hand"]
    assert plan_of(load("generation-clock")).needs[0].source == "demo (llama-small)"
    (reviews,) = plan_of(load("generation-reviews")).data
    assert (reviews.state, reviews.files) == ("to download", 1)


def test_a_folder_without_weights_and_paths_that_lead_nowhere_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for setting, text in (
        (f"model={tmp_path}", "holds no weights"),
        ("model=./nowhere", "model './nowhere' does not exist"),
        ("data.source=nothing.jsonl", r"data\.source 'nothing\.jsonl' does not exist"),
    ):
        with pytest.raises(DataError, match=text):
            plan_of(load("own-generation", ["data.source=nothing.jsonl", setting]))
