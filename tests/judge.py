"""Plain PEFT as the judge of an adapter: same output at the start, a step that helps, a folder that
loads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

import evatune

Build = Callable[[], nn.Module]


def result(model: nn.Module, batch: Any) -> Tensor:
    out = model(**batch) if isinstance(batch, dict) else model(batch)
    for name in ("logits", "action_preds", "last_hidden_state"):
        out = getattr(out, name, out)
    return out


def matrices(model: nn.Module, part: str) -> dict[str, Tensor]:
    """Copies of all A or all B by the name of the layer or parameter, flattened to two
    dimensions."""
    found = {}
    for path, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            name = path.removeprefix("base_model.model.").replace(".base_layer", "")
            name = f"{name}.{layer.parameter_name}" if hasattr(layer, "parameter_name") else name
            weights = getattr(layer, f"lora_{part}"), getattr(layer, f"lora_embedding_{part}")
            weight = weights[0]["default"].weight if len(weights[0]) else weights[1]["default"]
            found[name] = weight.detach().flatten(1).clone()
    return found


def round_trip(
    build: Build,
    lora: LoraConfig,
    batches: list[Any],
    folder: Path,
    *,
    meta: bool = False,
    **options: Any,
) -> tuple[evatune.Calibration, dict[str, Tensor]]:
    """Initialise; the output is what it was, a step lowers the loss, and plain PEFT loads what was
    saved.

    Gives the calibration and every A as it was initialised.
    """
    torch.manual_seed(0)
    before = result(build().eval(), batches[0]).detach()
    model = get_peft_model(build(), lora, low_cpu_mem_usage=meta)
    calibration = evatune.initialize(model, batches, **options)
    model.eval()
    assert torch.allclose(result(model, batches[0]), before, atol=1e-5)
    start = matrices(model, "A")
    assert not any(b.any() for b in matrices(model, "B").values())

    aim = before + torch.randn(before.shape, generator=torch.Generator().manual_seed(1))
    trained = [p for p in model.parameters() if p.requires_grad]
    loss = (result(model, batches[0]) - aim).square().mean()
    loss.backward()
    slope = sum(float(p.grad.square().sum()) for p in trained if p.grad is not None)
    with torch.no_grad():
        for parameter in trained:
            if parameter.grad is not None:
                # 0.2 per cent less, if the loss were a plane
                parameter -= 0.002 * loss / slope * parameter.grad
        assert (result(model, batches[0]) - aim).square().mean() < loss

    with torch.no_grad():  # far enough from the start for a difference to show
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_embedding_B" in name:
                parameter.add_(
                    torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)),
                    alpha=0.1,
                )
    far = result(model, batches[0]).detach()
    assert not torch.allclose(far, before, atol=1e-3)
    model.save_pretrained(folder)
    again = PeftModel.from_pretrained(build(), str(folder)).eval()
    assert torch.allclose(result(again, batches[0]), far, atol=1e-5)
    return calibration, start
