"""Decision Transformers on Meta-World: data, rows, the judge, runs."""

from __future__ import annotations

import importlib.util
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel
from PIL import Image

from evatune.errors import ConfigError, DataError, EvatuneError
from evatune.finetune.compare import grid
from evatune.finetune.metrics import read_metrics
from evatune.finetune.recipe import Recipe, load, ours
from evatune.finetune.run import run
from evatune.finetune.summary import summarize
from evatune.finetune.tasks import rl

if importlib.util.find_spec("metaworld") is None:
    pytest.skip("robot tasks need the rl extra", allow_module_level=True)
torch.set_num_threads(1)

# Where MuJoCo cannot draw, its half-made objects complain when they are collected.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <function"
    " (GLContext|Renderer).__del__:pytest.PytestUnraisableExceptionWarning"
)

SMALL = [
    "data.train=2",
    "data.test=1",
    "data.max_length=4",
    "data.episodes=2",
    "training.steps=4",
    "training.batch_size=8",
    "training.log_every=1",
    "training.eval_every=2",
    "adapter.rank=2",
]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EVATUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = transformers.DecisionTransformerConfig(
        state_dim=39,
        act_dim=4,
        hidden_size=32,
        n_layer=2,
        n_head=2,
        max_ep_len=16,
        n_positions=48,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    folder = tmp_path_factory.mktemp("models") / "dt"
    transformers.DecisionTransformerModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    rl.simulator()
    import mujoco

    def refuse(*_: Any) -> None:
        raise RuntimeError("no driver")

    monkeypatch.setattr(mujoco, "Renderer", refuse)


def small(model: Path | str, *more: str) -> Recipe:
    return load("rl-faucet-close", [*SMALL, f"model={model}", *more])


def planted(*lengths: int) -> dict[str, torch.Tensor]:
    """Episodes in which every number occurs once."""
    steps = sum(lengths)
    sizes = {"states": 39, "actions": 4, "labels": 4}
    values = {
        key: torch.arange(steps * d, dtype=torch.float32).reshape(steps, d) + 1
        for key, d in sizes.items()
    }
    return values | {"lengths": torch.tensor(lengths)}


def batch_of(windows: rl.Windows, *steps: int) -> dict[str, torch.Tensor]:
    return dict(transformers.default_data_collator([windows[step] for step in steps]))


def with_rubbish(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    padding = batch["attention_mask"] == 0
    changed = {key: batch[key].clone() for key in ("states", "actions", "labels", "returns_to_go")}
    for value in changed.values():
        value[padding] = 5.0
    return batch | changed


def test_a_window_ends_at_its_step_and_stays_within_its_episode() -> None:
    episodes = planted(3, 6)
    windows = rl.Windows(episodes, 4)
    assert len(windows) == 9
    for first, length in ((0, 3), (3, 6)):
        for step in range(first, first + length):
            real = min(step - first + 1, 4)
            window = windows[step]
            assert window["attention_mask"].tolist() == [0] * (4 - real) + [1] * real
            for key in ("states", "actions", "labels"):
                assert torch.equal(
                    window[key][4 - real :], episodes[key][step + 1 - real : step + 1]
                )
                assert not window[key][: 4 - real].any()


def test_rows_are_the_three_tokens_of_every_step_that_is_no_padding() -> None:
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]])
    for tokens in (3, 1):
        x = torch.randn(3, 4 * tokens, 5)
        kept = [
            x[b, tokens * t + i]
            for b in range(3)
            for t in range(4)
            for i in range(tokens)
            if mask[b, t]
        ]
        assert torch.equal(rl.rows(x, {"attention_mask": mask}, "layer"), torch.stack(kept))


def test_what_padding_holds_reaches_no_row_no_prediction_and_no_loss(small_folder: Path) -> None:
    model = rl.Imitator.from_pretrained(small_folder).eval()
    inputs: dict[str, torch.Tensor] = {}
    layers = {
        name: module for name, module in model.named_modules() if type(module).__name__ == "Conv1D"
    }
    for name, module in layers.items():
        module.register_forward_pre_hook(
            lambda _, args, name=name: inputs.update({name: args[0].detach()})
        )
    episodes = planted(6)
    batch = batch_of(
        rl.Windows(episodes | {k: v / v.max() for k, v in episodes.items() if k != "lengths"}, 4),
        0,
        1,
        5,
    )
    found = []
    with torch.no_grad():
        for one in (batch, with_rubbish(batch)):
            output = model(**one)
            chosen = {name: rl.rows(x, one, name) for name, x in inputs.items()}
            found.append(
                (
                    output.loss,
                    output.action_preds[one["attention_mask"].bool()],
                    chosen,
                    dict(inputs),
                )
            )
    (loss, actions, chosen, everything), (loss_2, actions_2, chosen_2, everything_2) = found
    torch.testing.assert_close(loss, loss_2)
    torch.testing.assert_close(actions, actions_2)
    assert len(layers) == 8
    for name in layers:
        assert len(chosen[name]) == 3 * int(batch["attention_mask"].sum())
        torch.testing.assert_close(chosen[name], chosen_2[name])
    assert not torch.allclose(
        everything["encoder.h.0.attn.c_attn"], everything_2["encoder.h.0.attn.c_attn"]
    )


def test_the_loss_is_the_squared_error_over_real_steps(small_folder: Path) -> None:
    model = rl.Imitator.from_pretrained(small_folder).eval()
    batch = batch_of(rl.Windows(planted(6), 4), 0, 2, 5)
    output = model(**batch)
    squares = [
        (output.action_preds[b, t] - batch["labels"][b, t]).square()
        for b in range(3)
        for t in range(4)
        if batch["attention_mask"][b, t]
    ]
    torch.testing.assert_close(output.loss, torch.stack(squares).mean())
    assert model(**{key: value for key, value in batch.items() if key != "labels"}).loss is None


def test_a_seed_is_a_goal_and_purposes_share_none() -> None:
    first: list[bytes] = []
    for seed in (0, 0, 1, 2, 3):
        env = rl.environment("push", seed)
        state, _ = env.reset()
        first.append(state.tobytes())
        env.close()
    assert first[0] == first[1]
    assert len(set(first)) == 4
    seeds = [
        {rl._seed(purpose, number) for number in range(100)}
        for purpose in (rl.TRAIN, rl.TEST, rl.JUDGE)
    ]
    assert len(set.union(*seeds)) == 300


def test_demonstrations_are_successes_with_the_experts_own_actions_as_labels() -> None:
    found = rl.demonstrations("faucet-close", rl.TRAIN, 2)
    assert (
        found["lengths"].sum()
        == len(found["states"])
        == len(found["actions"])
        == len(found["labels"])
    )
    assert len(found["lengths"]) == 2
    assert (found["lengths"] < 200).all()
    noise = found["actions"] - found["labels"]
    assert 0 < noise.std() < 0.3
    assert found["labels"].abs().max() <= 1
    env = rl.environment("faucet-close", rl._seed(rl.TRAIN, 0))
    state, _ = env.reset()
    infos = []
    for expected, action in zip(
        found["states"], found["actions"][: found["lengths"][0]], strict=False
    ):
        np.testing.assert_allclose(state, expected, atol=1e-5)
        state, _, _, _, info = env.step(action.numpy())
        infos.append(info["success"])
    env.close()
    assert infos[-1]
    assert not any(infos[:-1])


class Expert(torch.nn.Module):
    """The scripted expert in the place of a model."""

    def __init__(self, task: str, sign: float = 1.0) -> None:
        super().__init__()
        import metaworld.policies

        self.policy, self.sign = metaworld.policies.ENV_POLICY_MAP[f"{task}-v3"](), sign
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, states: torch.Tensor, **_: Any) -> Any:
        chosen = [
            self.policy.get_action(state.numpy().astype(np.float64)) for state in states[:, -1]
        ]
        return SimpleNamespace(
            action_preds=self.sign * torch.tensor(np.stack(chosen), dtype=torch.float32)[:, None]
        )


# the experts ask for more than the simulator takes
@pytest.mark.filterwarnings("ignore:Constant:UserWarning")
@pytest.mark.parametrize(("sign", "score"), [(1, 1.0), (-1, 0.0)])
def test_the_judge_lets_an_expert_succeed_and_its_opposite_fail(sign: int, score: float) -> None:
    found = rl.evaluate(
        Expert("faucet-close", sign), None, task="faucet-close", episodes=3, length=4
    )
    assert found["score"] == score
    assert (found["steps"] < 100) == (score == 1)


@pytest.mark.usefixtures("no_drawing")
def test_where_mujoco_cannot_draw_the_judge_says_so_and_goes_on(
    small_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        found = rl.evaluate(
            rl.Imitator.from_pretrained(small_folder).eval(),
            tmp_path,
            task="push",
            episodes=1,
            length=4,
        )
    assert found["steps"] == 200
    assert "MuJoCo cannot draw here (no driver)" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_judged_in_the_simulator_and_filmed(small_folder: Path, tmp_path: Path) -> None:
    result = run(small(small_folder, "method=eva"), tmp_path / "run", quiet=True)
    assert 0 <= result["score"] <= 1
    assert result["measures"].keys() == {"return", "steps"}
    assert (tmp_path / "run" / "calibration.safetensors").exists()
    film = tmp_path / "run" / "episode.gif"
    if not film.exists():
        pytest.skip("MuJoCo cannot draw here, so there is no episode.gif")
    with Image.open(film) as image:
        assert image.n_frames > 5
        low, high = image.convert("L").getextrema()
    assert high > low + 50


@pytest.mark.usefixtures("no_drawing")  # which takes most of the time
def test_equal_seeds_give_equal_runs_and_eva_starts_where_lora_starts(
    small_folder: Path, tmp_path: Path
) -> None:
    def of(name: str, method: str) -> tuple[dict[str, Any], list[float]]:
        result = run(small(small_folder, f"method={method}"), tmp_path / name, quiet=True)
        return result, [
            line["eval_loss"] for line in read_metrics(tmp_path / name) if "eval_loss" in line
        ]

    (first, losses), (second, again), (_, lora) = of("a", "eva"), of("b", "eva"), of("c", "lora")
    assert losses == again
    assert losses[0] == pytest.approx(lora[0], abs=1e-6)
    assert losses[-1] != lora[-1]
    for key in ("score", "eval_loss", "measures"):
        assert first[key] == second[key]


@pytest.mark.usefixtures("no_drawing")  # which takes most of the time
@pytest.mark.parametrize("method", ["lora", "eva", "pissa"])
def test_a_saved_adapter_gives_its_loss_on_the_plain_model_by_plain_peft(
    method: str, small_folder: Path, tmp_path: Path
) -> None:
    recipe = small(
        small_folder, f"method={method}", "training.learning_rate=0.01", "data.episodes=1"
    )
    result = run(recipe, tmp_path / "run", quiet=True)
    base = transformers.DecisionTransformerModel.from_pretrained(small_folder)
    model = PeftModel.from_pretrained(base, str(tmp_path / "run" / "adapter")).eval()
    test = rl.prepare(recipe).test
    squares, count = 0.0, 0
    # as Trainer does: the mean over batches, weighted by their windows
    for start in range(0, len(test), 32):
        batch = batch_of(test, *range(start, min(start + 32, len(test))))
        labels = batch.pop("labels")
        real = batch["attention_mask"].bool()
        with torch.no_grad():
            error = (model(**batch).action_preds - labels)[real].square().mean().item()
        squares, count = squares + error * len(real), count + len(real)
    assert squares / count == pytest.approx(result["eval_loss"], abs=1e-5)


@pytest.mark.usefixtures("no_drawing")  # which takes most of the time
def test_the_method_head_trains_the_action_layer_and_saves_an_ordinary_model(
    small_folder: Path, tmp_path: Path
) -> None:
    result = run(
        small(small_folder, "method=head", "data.episodes=1"), tmp_path / "run", quiet=True
    )
    assert result["trainable_parameters"] == 32 * 4 + 4
    before = transformers.AutoModel.from_pretrained(small_folder).state_dict()
    after = transformers.AutoModel.from_pretrained(tmp_path / "run" / "model")
    assert type(after) is transformers.DecisionTransformerModel
    changed = {
        key for key, value in after.state_dict().items() if not torch.equal(value, before[key])
    }
    assert changed == {"predict_action.0.weight", "predict_action.0.bias"}


@pytest.mark.usefixtures("no_drawing")  # which takes most of the time
def test_a_comparison_takes_a_score_that_is_known_at_the_end_only(
    small_folder: Path, tmp_path: Path
) -> None:
    cells = grid([small(small_folder, "data.episodes=1")], ["untouched", "lora"], [0], [], tmp_path)
    for cell in cells:
        run(cell.recipe, cell.folder, quiet=True)
    lines = {line.method: line for line in summarize(cells).lines}
    assert [point[2] for point in lines["lora"].curve] == [None, None, lines["lora"].score.mean]
    assert [point[2] for point in lines["untouched"].curve] == [lines["untouched"].score.mean]
    json.dumps([line.curve for line in lines.values()], allow_nan=False)


def test_there_is_a_recipe_for_every_task() -> None:
    found = [load(name) for name in ours() if name.startswith("rl-")]
    assert {recipe.task for recipe in found} == set(rl.TASKS)
    assert all(recipe.domain == "rl" for recipe in found)


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("task=juggle", "task is 'juggle'; tasks of reinforcement learning are hammer, push-wall"),
        ("data.episodes=0", "data.episodes is 0: input should be greater than or equal to 1"),
        ("data.max_length=17", "data.max_length is 17 steps, but this model sees 16 at most"),
        ("model=./nowhere", "model './nowhere' does not exist"),
        ("adapter.targets=[q_proj]", "match no layer of this model"),
        ("method=olora", "method 'olora' is not right on GPT-2's Conv1D layers"),
    ],
)
def test_a_mistake_has_one_sentence_and_leaves_no_folder(
    override: str, text: str, small_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(EvatuneError, match=text):
        run(small(small_folder, override), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_another_kind_of_model_is_refused(bert_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError,
        match="no Decision Transformer with state_dim 39 and act_dim 4 \\(it is bert with",
    ):
        run(small(bert_folder), tmp_path / "run", quiet=True)


def test_without_meta_world_the_extra_is_named(
    small_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "metaworld", None)
    with pytest.raises(DataError, match="pip install 'evatune\\[rl\\]'"):
        run(small(small_folder), tmp_path / "run", quiet=True)
