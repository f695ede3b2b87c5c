"""The policy: a Decision Transformer with a loss, and the windows of an episode that it sees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn.functional import mse_loss, pad
from transformers.models.decision_transformer.modeling_decision_transformer import (
    DecisionTransformerOutput,
)

from evatune.finetune.tasks.rl.simulator import ACTIONS, STATES

_RETURN = 1.0  # that demonstrations reach: see `Windows`


@dataclass
class ImitationOutput(DecisionTransformerOutput):  # type: ignore[misc]
    """A Decision Transformer's output, and the loss."""

    loss: Tensor | None = None


class Imitator(transformers.DecisionTransformerModel):  # type: ignore[misc]
    """transformers' Decision Transformer with a loss.

    Its folder is an ordinary one of that model.
    """

    def forward(
        self,
        states: Tensor,  # (B, T, 39)
        actions: Tensor,  # (B, T, 4), as they were taken
        returns_to_go: Tensor,  # (B, T, 1)
        timesteps: Tensor,  # (B, T)
        attention_mask: Tensor,  # (B, T), 0 for padding
        labels: Tensor | None = None,  # (B, T, 4), actions to imitate
    ) -> ImitationOutput:
        """Predict the actions; with labels, compute the loss as well.

        It is the mean squared error over the actions of all steps that are no padding.
        """
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


@dataclass(frozen=True)
class PolicySize:
    """The size of a policy, and its dropout, the same everywhere.

    Attributes:
        steps: that it sees at most.
    """

    width: int
    layers: int
    heads: int
    steps: int
    dropout: float = 0.0


def new_policy(size: PolicySize) -> Imitator:
    """Return a policy with random weights, to be trained whole."""
    config = transformers.DecisionTransformerConfig(
        state_dim=STATES,
        act_dim=ACTIONS,
        hidden_size=size.width,
        n_layer=size.layers,
        n_head=size.heads,
        max_ep_len=size.steps,
        n_positions=3 * size.steps,
        activation_function="gelu_new",
        resid_pdrop=size.dropout,
        embd_pdrop=size.dropout,
        attn_pdrop=size.dropout,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    return Imitator(config)


class Windows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """For every so many steps of all episodes, the steps up to one: at most `length`, padded left.

    The return is 1 for a success and 0 otherwise, undiscounted, and demonstrations are successes:
    all of their returns to go are 1, and so is the return that the policy is asked for. The
    simulator's shaped reward would not do, because a slow success collects more of it than a fast
    one. Episodes of other agents bring returns to go of their own, of which 1 is the best. Time
    steps count within the window, since the expert looks at the state only and an episode may last
    longer than any demonstration.
    """

    def __init__(self, episodes: dict[str, Tensor], length: int, every: int = 1) -> None:
        self.episodes = episodes
        self.length = length
        self.every = every
        self.keys = [key for key in episodes if key != "lengths"]
        lengths = episodes["lengths"]
        starts = lengths.cumsum(0) - lengths
        self.first: list[int] = starts.repeat_interleave(lengths).tolist()  # of a step's episode

    def __len__(self) -> int:
        return len(self.first) // self.every

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        step = self.every * (number + 1) - 1
        start = max(self.first[step], step + 1 - self.length)
        steps = {key: self.episodes[key][start : step + 1] for key in self.keys}
        return padded_window(steps, self.length)


def padded_window(steps: dict[str, Tensor], length: int) -> dict[str, Tensor]:
    """Return the model's inputs, from tensors (…, t, d), t ≤ length: (…, length, d).

    Returns to go are those of a success where there are none among them.
    """
    *batch, present, _ = steps["states"].shape
    missing = length - present
    mask = pad(torch.ones((*batch, present), dtype=torch.long, device="cpu"), (missing, 0))
    times = torch.arange(length, dtype=torch.long, device="cpu")
    padded = steps
    if missing:
        padded = {key: pad(value, (0, 0, missing, 0)) for key, value in steps.items()}
    success = torch.full((*mask.shape, 1), _RETURN, dtype=torch.float32, device="cpu")
    return (
        {"returns_to_go": success}
        | padded
        | {
            "timesteps": times.expand(mask.shape).clone(),
            "attention_mask": mask,
        }
    )


def rows_without_padding(activation: Tensor, batch: Any, name: str) -> Tensor:
    """Return the rows (n, d) of an activation that belong to no padding.

    Inside, a time step is three tokens (return, state, action) in a row: (B, 3T, d). The layers
    around have one: (B, T, d).
    """
    mask = batch["attention_mask"].bool()
    tokens_per_step = activation.shape[1] // mask.shape[1]
    return activation[mask.repeat_interleave(tokens_per_step, dim=1)]
