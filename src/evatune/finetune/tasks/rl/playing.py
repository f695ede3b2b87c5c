"""Episodes that the policy plays, and the film of the first one."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from evatune.finetune.tasks.base import Part
from evatune.finetune.tasks.rl.policy import padded_window
from evatune.finetune.tasks.rl.simulator import (
    ACTIONS,
    MAX_STEPS,
    PLAY,
    VALIDATION_PLAY,
    Episode,
    Simulator,
    seed_for,
)
from evatune.utils.atomic import atomic_file

_FRAME_EVERY = 8  # simulator steps, of which a second has 80
_FRAME = (180, 240)  # pixels
_log = logging.getLogger(__name__)


@torch.no_grad()
def play(
    model: Any,
    part: Part,
    folder: Path | None,
    *,
    tasks: Sequence[str],
    episodes: int,
    length: int,
    by_success: bool = False,
) -> dict[str, float]:
    """Play episodes with goals that no demonstration has, the tasks in turn.

    The first becomes `episode.gif`, where MuJoCo can draw. All episodes advance together, so that a
    step costs one forward pass. An episode ends with its first success.

    Args:
        part: whose goals they have.
        folder: where the GIF goes; None for no GIF.
        length: steps that the model looks back.
        by_success: whether an episode scores 1 for a success, however late.

    Returns:
        score: share of the 200 steps that are left at the first success, 0 without one, averaged;
            with `by_success` the same as success. score_error: its standard error over the
            episodes. success: share of the episodes that succeed. steps: mean length.
    """
    purpose = VALIDATION_PLAY if part == "validation" else PLAY
    with ExitStack() as stack:
        simulators = [stack.enter_context(closing(Simulator(task))) for task in tasks]
        played = [
            simulators[number % len(tasks)].episode(seed_for(purpose, number))
            for number in range(episodes)
        ]
        film = stack.enter_context(closing(_Film(played[0].env))) if folder else None
        lengths = np.zeros(episodes, dtype=int)
        success = np.zeros(episodes, dtype=bool)
        states = _states(played)[:, None]  # (E, t, 39)
        # the last one, still to come, is hidden from its own prediction
        actions = states.new_zeros(episodes, 1, ACTIONS)
        for step in range(MAX_STEPS):
            playing = (~success).nonzero()[0]
            actions[playing, -1] = _choose(model, states[playing], actions[playing], length)
            commands = actions[:, -1].numpy()
            for i in playing:
                played[i].step(commands[i])
                if i == 0 and film and (step % _FRAME_EVERY == 0 or played[0].success):
                    film.shoot()
            lengths[playing] += 1
            success = np.array([episode.success for episode in played])
            if success.all():
                break
            states = torch.cat([states, _states(played)[:, None]], 1)[:, -length:]
            actions = torch.cat([actions, torch.zeros_like(actions[:, :1])], 1)[:, -length:]
        if film and folder:
            film.save(folder / "episode.gif")
    scores = success * (1.0 if by_success else 1 - lengths / MAX_STEPS)
    return {
        "score": float(scores.mean()),
        "score_error": float(scores.std(ddof=min(1, episodes - 1)) / np.sqrt(episodes)),
        "success": float(success.mean()),
        "steps": float(lengths.mean()),
    }


def _states(played: Sequence[Episode]) -> Tensor:
    return torch.from_numpy(np.stack([episode.state for episode in played])).float()


def _choose(model: Any, states: Tensor, actions: Tensor, length: int) -> Tensor:
    """Return the policy's next action in every episode, (E, 4)."""
    device = next(model.parameters()).device
    batch = padded_window({"states": states, "actions": actions}, length)
    output = model(**{key: value.to(device) for key, value in batch.items()})
    chosen: Tensor = output.action_preds[:, -1].float().cpu()
    return chosen.clamp(-1, 1)


class _Film:
    """Frames of an environment.

    There are none where MuJoCo cannot draw, which is no reason for a run to fail.
    """

    def __init__(self, env: Any) -> None:
        self.env = env
        self.frames: list[Image.Image] = []
        self.renderer: Any = None
        try:
            self.renderer = _renderer(env)
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
        if not self.frames:
            return
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


def _renderer(env: Any) -> Any:
    import mujoco

    # without a GPU, smooth edges and shadows cost more than the policy
    env.model.vis.quality.offsamples = 0
    renderer = mujoco.Renderer(env.model, *_FRAME)
    renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
    renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
    return renderer
