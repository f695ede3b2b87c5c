"""Recorded episodes: a stand-in for the authors' archives, and the paper's runs on it in small."""

from __future__ import annotations

import io
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel

from evatune.errors import ConfigError, DataError, EvatuneError
from evatune.finetune.recipe import DataOptions
from evatune.finetune.recipe_files import bundled_recipes, load
from evatune.finetune.run import run
from evatune.finetune.tasks.rl import archives, domain, playing
from evatune.finetune.tasks.rl.archives import recorded
from evatune.finetune.tasks.rl.policy import PolicySize, Windows
from evatune.finetune.tasks.rl.scenarios import SCENARIOS
from evatune.finetune.tasks.rl.simulator import CW10, MT40, load_metaworld

torch.set_num_threads(1)
# Where MuJoCo cannot draw, its half-made objects complain when they are collected.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <function"
    " (GLContext|Renderer).__del__:pytest.PytestUnraisableExceptionWarning"
)

TASKS = ("faucet-close", "reach", "window-open")
LENGTHS = (6, 5, 8, 7)
SIZES = ["data.train=2", "data.validation=1", "data.test=1", "data.max_length=4"]


def episode(number: int) -> dict[str, np.ndarray]:
    """An episode whose states and actions begin with its number, and whose reward grows by it."""
    random = np.random.default_rng(number)
    length = LENGTHS[number]
    states = random.normal(size=(length, 39)).astype(np.float32)
    actions = random.uniform(-1, 1, (length, 4)).astype(np.float32)
    states[:, 0], actions[:, 0] = number, number / 10
    rewards = np.full(length, number / length, np.float32)
    returns = rewards[::-1].cumsum()[::-1]
    return {
        "states": states,
        "actions": actions,
        "rewards": rewards,
        "returns_to_go": returns,
        "dones": np.array(True),
    }


def saved(**values: Any) -> bytes:
    stream = io.BytesIO()
    np.savez_compressed(stream, **values)
    return stream.getvalue()


def pack(path: Path, contents: dict[str, bytes], **others: Any) -> None:
    """Write a tar.gz of files and, for each of the others, of an empty member of this type."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as opened:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            opened.addfile(member, io.BytesIO(content))
        for name, kind in others.items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            opened.addfile(member)


def contents(task: str) -> dict[str, bytes]:
    episodes = {f"{task}-v2/{n}.npz": saved(**episode(n)) for n in reversed(range(4))}
    return {f"{task}-v2/episode_lengths.json": b"{}", **episodes}


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tar.gz for one task, a folder for one, and a table for one."""
    folder = tmp_path_factory.mktemp("copies")
    packed, unpacked, table = TASKS
    pack(folder / "2M_separate" / f"{packed}-v2.tar.gz", contents(packed))
    for name, content in contents(unpacked).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    episodes = [episode(number) for number in range(4)]
    flat = {
        "observations": np.concatenate([one["states"] for one in episodes])[:, None],
        "actions": np.concatenate([one["actions"] for one in episodes])[:, None],
        "rewards": np.concatenate([one["rewards"] for one in episodes])[:, None],
        "dones": np.zeros((sum(LENGTHS), 1), np.float32),
    }
    flat["dones"][np.cumsum(LENGTHS) - 1] = 1
    unfinished = {key: np.concatenate([value, 0 * value[:3]]) for key, value in flat.items()}
    (folder / "2M").mkdir()
    (folder / "2M" / f"{table}-v2.npz").write_bytes(saved(**unfinished))
    return folder


@pytest.fixture
def short_episodes(no_drawing: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(playing, "MAX_STEPS", 5)


def options(source: Path | str, **sizes: int) -> DataOptions:
    return DataOptions(source=str(source), **{"train": 2, "validation": 1, "test": 1, **sizes})


@pytest.mark.parametrize("task", TASKS)
def test_each_form_gives_the_same_episodes_none_of_them_in_two_parts(
    task: str, copies: Path
) -> None:
    parts = recorded(task, options(copies), 1)
    seen: list[int] = []
    best = max(parts.train["states"][:, 0]).item()
    for part in vars(parts).values():
        for own in part["states"].split(part["lengths"].tolist()):
            number = int(own[0, 0])
            seen.append(number)
            torch.testing.assert_close(own, torch.from_numpy(episode(number)["states"]))
        numbers = part["states"][:, :1]
        torch.testing.assert_close(part["actions"][:, :1], numbers / 10)
        assert torch.equal(part["labels"], part["actions"])
        torch.testing.assert_close(part["returns_to_go"], (numbers / best).clamp(max=1))
    assert sorted(seen) == [0, 1, 2, 3]
    tests = [recorded(one, options(copies), 1).test["states"] for one in TASKS]
    assert all(torch.equal(test, tests[0]) for test in tests)


def test_sizes_are_of_all_tasks_together_and_those_left_open_are_the_rest(copies: Path) -> None:
    parts = recorded("reach", options(copies, train=4, validation=0, test=2), 2)
    assert [len(part["lengths"]) for part in vars(parts).values()] == [2, 0, 1]
    rest = recorded("reach", options(copies, train=0, validation=1), 1)
    assert [len(part["lengths"]) for part in vars(rest).values()] == [2, 1, 1]


def test_a_window_has_the_returns_to_go_of_its_episode(copies: Path) -> None:
    part = recorded("reach", options(copies), 1).train
    windows = Windows(part, 4)
    for step in range(len(windows)):
        window = windows[step]
        real = window["attention_mask"].bool()
        shares = window["returns_to_go"][real]
        assert torch.equal(shares, part["returns_to_go"][step].expand(len(shares), 1))


@pytest.mark.parametrize("offered", [".tar.gz", ".npz"])
def test_of_the_hub_only_the_tasks_own_file_is_asked_for(
    offered: str, copies: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []
    task = {".tar.gz": TASKS[0], ".npz": TASKS[2]}[offered]

    def download(repository: str, *, repo_type: str, allow_patterns: list[str]) -> str:
        assert (repository, repo_type) == ("ml-jku/meta-world", "dataset")
        asked.append(allow_patterns)
        return str(copies if allow_patterns[0].endswith(offered) else tmp_path / "absent")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr("evatune.loading.hub.hub_is_reachable", lambda: True)
    assert len(recorded(task, options("hub"), 1).train["lengths"]) == 2
    assert asked[0] == [
        f"{task}-v2.tar.gz",
        f"*/{task}-v2.tar.gz",
        f"{task}.tar.gz",
        f"*/{task}.tar.gz",
    ]
    assert len(asked) == [".tar.gz", ".npz"].index(offered) + 1


def test_the_papers_tasks_are_metaworlds_fifty() -> None:
    names = {name.removesuffix("-v3") for name in load_metaworld().env_dict.ALL_V3_ENVIRONMENTS}
    assert names == set(MT40) | set(CW10)
    assert len(names) == len(MT40) + len(CW10) == 50
    recipes = [name for name in bundled_recipes() if name.startswith("paper-cw10-")]
    assert {load(name).task for name in recipes} == set(CW10)
    assert {f"paper-cw10-{load(name).task}" for name in recipes} == set(recipes)


@pytest.mark.usefixtures("short_episodes")
def test_the_papers_runs_pre_train_and_fine_tune_and_plain_peft_loads_the_adapter(
    copies: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = PolicySize(width=16, layers=1, heads=2, steps=4, dropout=0.2)
    monkeypatch.setattr(domain, "_PAPER", size)
    monkeypatch.setitem(SCENARIOS, "mt40", TASKS[1:])
    two_steps = [
        "training.steps=2",
        "training.eval_every=2",
        "training.batch_size=4",
        "training.warmup=0",
        f"data.source={copies}",
        "data.max_length=4",
        "data.episodes=2",
    ]
    sizes = ["data.train=4", "data.validation=2", "data.test=2"]
    trained = run(load("paper-mt40", [*two_steps, *sizes]), tmp_path / "mt40", quiet=True)
    assert (trained["score_name"], trained["scored"]) == ("share of the episodes that succeed", 2)
    assert trained["score"] == trained["measures"]["success"] == 0
    model = tmp_path / "mt40" / "model"
    here = [f"model={model}", "adapter.rank=2", "method=eva", *SIZES]
    recipe = load("paper-cw10-faucet-close", [*two_steps, *here])
    result = run(recipe, tmp_path / "run", quiet=True)
    assert result["validation"]["loss"] > 0
    base = transformers.DecisionTransformerModel.from_pretrained(model)
    assert base.config.resid_pdrop == 0.2
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "run" / "adapter")).eval()
    prepared = domain.prepare(recipe)
    batch = prepared.collator([prepared.test[place] for place in range(len(prepared.test))])
    labels = batch.pop("labels")
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        loss = (loaded(**batch).action_preds - labels)[real].square().mean().item()
    assert loss == pytest.approx(result["eval_loss"], abs=1e-5)


def bad(name: str, content: bytes) -> Callable[[Path], None]:
    """Return what packs the task's episodes with this content for one of them."""
    return lambda path: pack(path, {**contents("push"), f"push-v2/{name}": content})


def without(key: str) -> bytes:
    return saved(**{name: value for name, value in episode(0).items() if name != key})


@pytest.mark.parametrize(
    ("write", "text"),
    [
        (lambda path: None, r"has no push-v2\.tar\.gz, no folder push-v2 and no file push-v2\.npz"),
        (bad("../../0.npz", b""), r"holds 'push-v2/\.\./\.\./0\.npz', which leads out"),
        (lambda path: pack(path, {"/0.npz": b""}), "holds '/0.npz', which leads out"),
        (lambda path: pack(path, contents("push"), link=tarfile.SYMTYPE), "a link or a device"),
        (lambda path: pack(path, contents("push"), node=tarfile.CHRTYPE), "a link or a device"),
        (lambda path: path.write_bytes(b"\x1f\x8b but no more"), "is no whole tar.gz"),
        (lambda path: pack(path, {"push-v2/a.json": b""}), r"no episode, which is a file \.npz"),
        (lambda path: pack(path, {"a.hdf5": b""}), r"episodes such as 'a\.hdf5', and \.npz alone"),
        (lambda path: pack(path, {"a.pkl": pickle.dumps({})}), r"episodes such as 'a\.pkl', and"),
        (bad("0.npz", b"PK"), r"'push-v2/0\.npz' of .* is no whole npz file"),
        (bad("0.npz", without("rewards")), "has no array 'rewards'; it holds states.npy, actions"),
        (
            bad("0.npz", saved(**episode(0) | {"actions": np.zeros((6, 5))})),
            r"actions of .* is float64 of shape \(6, 5\); numbers of shape \(T, 4\) belong there",
        ),
        (
            bad("0.npz", saved(**episode(0) | {"rewards": np.zeros(5)})),
            "has 6 states, 6 actions and 5 rewards; one of each for every step",
        ),
        (
            bad("0.npz", saved(**episode(0) | {"states": np.array([{}] * 6)})),
            "states of .* is pickled, and nothing is unpickled here",
        ),
        (
            lambda path: pack(path, {f"{n}.npz": saved(**episode(0)) for n in range(4)}),
            "no episode of task 'push' in .* has a reward above 0",
        ),
    ],
)
def test_an_archive_that_is_not_what_it_should_be_is_refused(
    write: Callable[[Path], None], text: str, tmp_path: Path
) -> None:
    write(tmp_path / "push-v2.tar.gz")
    with pytest.raises(DataError, match=text):
        recorded("push", options(tmp_path), 1)


def test_a_file_too_large_for_an_episode_and_too_many_files_are_refused(
    copies: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "_MOST_BYTES", 100)
    for task in TASKS[:2]:
        with pytest.raises(DataError, match="has 0 MiB, which is no single episode"):
            recorded(task, options(copies), 1)
    monkeypatch.setattr(archives, "_MOST_FILES", 3)
    with pytest.raises(DataError, match="holds more than 3 files"):
        recorded(TASKS[0], options(copies), 1)


def test_a_table_in_which_no_episode_ends_is_refused(tmp_path: Path) -> None:
    (tmp_path / "push-v2.npz").write_bytes(saved(dones=np.zeros(9)))
    with pytest.raises(DataError, match="no episode ends in"):
        recorded("push", options(tmp_path), 1)


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        (["data.train=3"], ConfigError, "ask for 5 episodes of task 'faucet-close', and .* has 4"),
        (["data.source=./nowhere"], DataError, r"data\.source '\./nowhere' is no folder; give hub"),
        (["data.max_length=17"], ConfigError, "this model sees 16 at most"),
        (["model=runs/nothing/model"], DataError, "model 'runs/nothing/model' does not exist"),
        (["domain=images"], ConfigError, r"data\.metric is for the domain rl, and this is images"),
        (["data.metric=f1"], ConfigError, r"data\.metric is for the domain understanding"),
    ],
)
def test_a_mistake_has_one_sentence_and_leaves_no_folder(
    settings: list[str],
    error: type[EvatuneError],
    text: str,
    copies: Path,
    small_folder: Path,
    tmp_path: Path,
) -> None:
    here = [f"data.source={copies}", f"model={small_folder}", *SIZES]
    with pytest.raises(error, match=text):
        run(load("paper-cw10-faucet-close", [*here, *settings]), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()
