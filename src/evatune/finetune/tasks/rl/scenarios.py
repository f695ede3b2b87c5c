"""The tasks of this domain: which of Meta-World's one policy learns together."""

from __future__ import annotations

from evatune.finetune.tasks.rl.simulator import CW10, MT40

# Of those that the checkpoint has not seen, four each. On them full fine-tuning is better than
# LoRA of rank 1, and that than the head alone; on the sliding plates, say, all methods are alike.
SCENARIOS: dict[str, tuple[str, ...]] = {task: (task,) for task in CW10} | {
    "cw10": CW10,
    "mt40": MT40,
    "doors": ("door-lock", "door-open", "disassemble", "pick-out-of-hole"),
    "placing": ("assembly", "basketball", "bin-picking", "box-close"),
    "tools": ("hammer", "stick-pull", "shelf-place", "peg-unplug-side"),
    "walls": ("push-wall", "pick-place-wall", "button-press-wall", "button-press-topdown-wall"),
}
TASKS = tuple(SCENARIOS)
