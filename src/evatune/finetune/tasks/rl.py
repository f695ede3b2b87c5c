"""Reinforcement learning: robot tasks of Meta-World, a Decision Transformer, and the share of
episodes that succeed.

Scripted experts show the task in a few episodes; the model imitates them, and is judged in the
simulator on goals that no demonstration had. A seed of an environment is a goal (or the place of an
object): episodes with equal seeds have equal goals, and demonstrations to train on, demonstrations
to evaluate on and judged episodes never share a seed.
"""

from __future__ import annotations

import ctypes.util
import logging
import os
import sys
import warnings
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor
from torch.nn.functional import mse_loss, pad
from transformers.models.decision_transformer.modeling_decision_transformer import (
    DecisionTransformerOutput,
)

from evatune.errors import ConfigError, DataError
from evatune.finetune.recipe import Recipe
from evatune.finetune.tasks.task import Task
from evatune.loading.assets import asset, built
from evatune.loading.text import reading, require_path
from evatune.utils.atomic import atomic_file

# CW10 of Continual World (Wołczyk et al. 2021).
TASKS = (
    "hammer",
    "push-wall",
    "faucet-close",
    "push-back",
    "stick-pull",
    "handle-press-side",
    "push",
    "shelf-place",
    "window-close",
    "peg-unplug-side",
)
STATES, ACTIONS = 39, 4
TRAIN, TEST, JUDGE = range(3)  # who an episode is for; a seed belongs to one of them
_STEPS = 200  # of an episode at most; experts need 40 to 140
_NOISE = 0.2
_RETURN = 1.0  # what demonstrations reach: see `Windows`
_FRAME_EVERY = 8  # simulator steps, of which a second has 80
_FRAME = (180, 240)  # pixels
_log = logging.getLogger(__name__)


@dataclass
class ImitationOutput(DecisionTransformerOutput):  # type: ignore[misc]
    """A Decision Transformer's output, and the loss."""

    loss: Tensor | None = None


class Imitator(transformers.DecisionTransformerModel):  # type: ignore[misc]
    """transformers' Decision Transformer with a loss; its folder is an ordinary one of that
    model."""

    def forward(
        self,
        states: Tensor,  # (B, T, 39)
        actions: Tensor,  # (B, T, 4), as they were taken
        returns_to_go: Tensor,  # (B, T, 1)
        timesteps: Tensor,  # (B, T)
        attention_mask: Tensor,  # (B, T), 0 for padding
        labels: Tensor | None = None,  # (B, T, 4), actions to imitate
    ) -> ImitationOutput:
        """With labels, the loss is the mean squared error over the actions of all steps that are no
        padding."""
        output = super().forward(
            states=states,
            actions=actions,
            returns_to_go=returns_to_go,
            timesteps=timesteps,
            attention_mask=attention_mask,
            return_dict=True,
        )
        real = attention_mask.bool()
        loss = None if labels is None else mse_loss(output.action_preds[real], labels[real])
        return ImitationOutput(**output, loss=loss)


class Windows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """For each step of each episode, the steps up to it: at most `length`, padded on the left.

    The return is 1 for a success and 0 otherwise, undiscounted, and demonstrations are successes:
    all of their returns to go are 1, and so is the return that the policy is asked for. The
    simulator's shaped reward would not do, because a slow success collects more of it than a fast
    one. Time steps count within the window, since the expert looks at the state only and an episode
    may last longer than any demonstration.
    """

    def __init__(self, episodes: dict[str, Tensor], length: int) -> None:
        self.episodes, self.length = episodes, length
        lengths = episodes["lengths"]
        # step → its episode's first
        self.first = (lengths.cumsum(0) - lengths).repeat_interleave(lengths).tolist()

    def __len__(self) -> int:
        return len(self.first)

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        start = max(self.first[step], step + 1 - self.length)
        window = {
            key: self.episodes[key][start : step + 1] for key in ("states", "actions", "labels")
        }
        return window_of(window, self.length)


def window_of(steps: dict[str, Tensor], length: int) -> dict[str, Tensor]:
    """What the model is called with, from tensors (…, t, d), t ≤ length: (…, length, d)."""
    example = steps["states"]
    missing = length - example.shape[-2]
    mask = pad(torch.ones(example.shape[:-1], dtype=torch.long, device="cpu"), (missing, 0))
    return {key: pad(value, (0, 0, missing, 0)) for key, value in steps.items()} | {
        "returns_to_go": torch.full((*mask.shape, 1), _RETURN, dtype=torch.float32, device="cpu"),
        "timesteps": (
            torch.arange(length, dtype=torch.long, device="cpu").expand(mask.shape).clone()
        ),
        "attention_mask": mask,
    }


def prepare(recipe: Recipe) -> Task:
    """Load everything a run needs; `data.train` and `data.test` count episodes, `data.max_length`
    steps of a window.

    Raises ConfigError for an unknown task or a model that does not fit, DataError where Meta-World
    is missing.
    """
    data = recipe.data
    if recipe.task not in TASKS:
        raise ConfigError(
            f"task is {recipe.task!r}; tasks of reinforcement learning are {', '.join(TASKS)}"
        )
    simulator()
    source = asset("dt-metaworld") if recipe.model == "demo" else recipe.model
    require_path(source, "model")
    with reading(source, "a Decision Transformer", "a local folder with config.json and weights"):
        config = transformers.AutoConfig.from_pretrained(
            source, trust_remote_code=recipe.trust_remote_code
        )
        sizes = [getattr(config, name, None) for name in ("state_dim", "act_dim")]
        if sizes == [STATES, ACTIONS]:
            model = Imitator.from_pretrained(source, dtype=torch.float32)
    if sizes != [STATES, ACTIONS]:
        raise ConfigError(
            f"model {str(source)!r} is no Decision Transformer with state_dim {STATES} and act_dim"
            f" {ACTIONS} (it is {config.model_type} with {sizes[0]} and {sizes[1]}); name another,"
            " or demo"
        )
    longest = min(config.max_ep_len, config.n_positions // 3)
    if data.max_length > longest:
        raise ConfigError(
            f"data.max_length is {data.max_length} steps, but this model sees {longest} at most;"
            " lower it"
        )
    return Task(
        model=model,
        train=Windows(demonstrations(recipe.task, TRAIN, data.train), data.max_length),
        test=Windows(demonstrations(recipe.task, TEST, data.test), data.max_length),
        collator=transformers.default_data_collator,
        head=["predict_action"],
        new_head=False,
        task_type=None,
        evaluate=partial(
            evaluate, task=recipe.task, episodes=data.episodes, length=data.max_length
        ),
        rows=rows,
    )


def rows(activation: Tensor, batch: Any, name: str) -> Tensor:
    """(n, d) rows of an activation that belong to no padding.

    Inside, a time step is three tokens (return, state, action) in a row: (B, 3T, d). The layers
    around have one: (B, T, d).
    """
    mask = batch["attention_mask"].bool()
    return activation[mask.repeat_interleave(activation.shape[1] // mask.shape[1], dim=1)]


def demonstrations(task: str, purpose: int, count: int) -> dict[str, Tensor]:
    """Successful episodes of the task's scripted expert, up to the first step that succeeds; built
    once and kept.

    Noise in the actions taken leads to states from which the expert recovers; the labels are
    without it (Laskey et al. 2017, DART).

    Args:
        purpose: TRAIN or TEST.

    Returns:
        states (steps, 39), actions (steps, 4), labels (steps, 4), lengths (episodes,).
    """
    library = simulator()
    settings = {"version": 1, "task": task, "purpose": purpose, "count": count, "noise": _NOISE}

    def build() -> dict[str, Tensor]:
        found: list[dict[str, np.ndarray]] = []
        number = 0
        while len(found) < count:
            if number > 10 * count + 100:
                raise DataError(
                    f"the expert of task {task!r} succeeds too seldom: {len(found)} of {number}"
                    " episodes"
                )
            episode = _expert_episode(library, task, _seed(purpose, number))
            number += 1
            if episode is not None:
                found.append(episode)
        whole = {key: torch.from_numpy(np.concatenate([e[key] for e in found])) for key in found[0]}
        lengths = torch.tensor([len(e["states"]) for e in found], dtype=torch.long, device="cpu")
        return whole | {"lengths": lengths}

    return built(f"metaworld-{task}", settings, build)


def _seed(purpose: int, number: int) -> int:
    return 3 * number + purpose


def _expert_episode(library: Any, task: str, seed: int) -> dict[str, np.ndarray] | None:
    policy, noise = library.policies.ENV_POLICY_MAP[f"{task}-v3"](), np.random.default_rng(seed)
    steps: dict[str, list[np.ndarray]] = {"states": [], "actions": [], "labels": []}
    with closing(environment(task, seed)) as env:
        state, _ = env.reset()
        for _ in range(_STEPS):
            with warnings.catch_warnings():
                # of actions beyond ±1
                warnings.filterwarnings("ignore", message="Constant", category=UserWarning)
                label = np.clip(policy.get_action(state), -1, 1)
            action = np.clip(label + noise.normal(0, _NOISE, ACTIONS), -1, 1)
            for key, value in zip(steps, (state, action, label), strict=True):
                steps[key].append(value.astype(np.float32))
            state, _, _, _, info = env.step(action.astype(np.float32))
            if info["success"]:
                return {key: np.stack(values) for key, values in steps.items()}
    return None


def simulator() -> Any:
    """The package metaworld. Raises DataError where it is missing."""
    headless = sys.platform == "linux" and not os.environ.get("DISPLAY")
    if headless and ctypes.util.find_library("EGL"):
        # read when mujoco is imported; its own default needs a display
        os.environ.setdefault("MUJOCO_GL", "egl")
    try:
        import metaworld
        import metaworld.policies
    except ImportError as error:
        raise DataError(
            f"robot tasks need Meta-World, which cannot be imported ({error}); install it with: pip"
            " install 'evatune[rl]'"
        ) from error
    return metaworld


def environment(task: str, seed: int) -> Any:
    """The simulator of a task, with the goal that belongs to the seed and is part of the state; to
    be closed."""
    return simulator().env_dict.ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE[f"{task}-v3-goal-observable"](
        seed=seed
    )


@torch.no_grad()
def evaluate(
    model: Any, folder: Path | None, *, task: str, episodes: int, length: int
) -> dict[str, float]:
    """Play episodes with goals that no demonstration has; the first becomes `episode.gif`, where
    MuJoCo can draw.

    All episodes advance together, so that a step costs one forward pass. An episode ends with its
    first success.

    Args:
        folder: where the GIF goes; None for no GIF. length: steps that the model looks back.

    Returns:
        score: share of the episodes that succeed within 200 steps. return: the simulator's reward,
            summed over an
        episode and averaged. steps: mean length.
    """
    device = next(model.parameters()).device
    with ExitStack() as stack:
        envs = [
            stack.enter_context(closing(environment(task, _seed(JUDGE, i))))
            for i in range(episodes)
        ]
        film = stack.enter_context(closing(_Film(envs[0]))) if folder else None
        # (E, t, 39)
        states = torch.from_numpy(np.stack([env.reset()[0] for env in envs])).float()[:, None]
        # the last one, still to come, is hidden from its own prediction
        actions = states.new_zeros(episodes, 1, ACTIONS)
        lengths, returns, success = (
            np.zeros(episodes),
            np.zeros(episodes),
            np.zeros(episodes, dtype=bool),
        )
        for step in range(_STEPS):
            batch = window_of({"states": states, "actions": actions}, length)
            chosen = (
                model(**{key: value.to(device) for key, value in batch.items()})
                .action_preds[:, -1]
                .float()
                .cpu()
            )
            actions[:, -1] = chosen.clamp(-1, 1)
            now = states[:, -1].clone()
            for i in (~success).nonzero()[0]:
                state, reward, _, _, info = envs[i].step(actions[i, -1].numpy())
                now[i] = torch.from_numpy(state)
                returns[i] += reward
                lengths[i] += 1
                success[i] = bool(info["success"])
                if i == 0 and film and (step % _FRAME_EVERY == 0 or success[0]):
                    film.shoot()
            if success.all():
                break
            states = torch.cat([states, now[:, None]], 1)[:, -length:]
            actions = torch.cat([actions, torch.zeros_like(actions[:, :1])], 1)[:, -length:]
        if film and folder:
            film.save(folder / "episode.gif")
    return {
        "score": float(success.mean()),
        "return": float(returns.mean()),
        "steps": float(lengths.mean()),
    }


class _Film:
    """Frames of an environment; none where MuJoCo cannot draw, which is no reason for a run to
    fail."""

    def __init__(self, env: Any) -> None:
        self.env, self.frames, self.renderer = env, list[Image.Image](), None
        try:
            import mujoco

            # without a GPU, smooth edges and shadows cost more than the policy
            env.model.vis.quality.offsamples = 0
            renderer = mujoco.Renderer(env.model, *_FRAME)
            renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
            renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
            self.renderer = renderer
        # of many kinds: no driver, no display, a library that is missing
        except Exception as error:
            _log.warning(
                "no episode.gif: MuJoCo cannot draw here (%s); set MUJOCO_GL to egl or osmesa",
                error,
            )

    def shoot(self) -> None:
        if self.renderer is not None:
            self.renderer.update_scene(self.env.data, camera="corner2")
            # this camera, which sees best, hangs upside down
            upright = self.renderer.render()[::-1, ::-1]
            self.frames.append(Image.fromarray(np.ascontiguousarray(upright)))

    def save(self, path: Path) -> None:
        if self.frames:
            first, *others = self.frames
            with atomic_file(path) as temporary:
                first.save(
                    temporary,
                    format="GIF",
                    save_all=True,
                    append_images=others,
                    duration=1000 * _FRAME_EVERY // 80,
                    loop=0,
                )

    def close(self) -> None:
        if self.renderer is not None:
            self.renderer.close()
