"""Small models, data with planted answers, and PEFT's own loader as the judge of what is saved."""

from __future__ import annotations

import io
import resource
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from rich.console import Console
from torch import Tensor, nn

import evatune
from evatune.utils.mark import MARK
from evatune.utils.outputs import claimed_folder

EXACT = evatune.CalibrationConfig(rank=4, sketch="exact", tolerance=0)

ESCAPE = "\x1b[31mred"

NAMES = (
    "a[/b]",
    "[bold]b",
    r"$\frac$",
    "$x$",
    "_under",
    "<script>x",
    ":smile:",
    "c:\\d",
    "中文",
    ESCAPE,
    "new\nline",
    "\udce9",
)


def wide_terminal() -> Console:
    """Return a terminal that keeps what it shows in its `file`."""
    return Console(file=io.StringIO(), width=250, force_terminal=True, color_system=None)


class Block(nn.Module):
    """Query, key and value share an input; the output projection has its own."""

    def __init__(self, d: int = 16, hidden: int = 32) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(d, d), nn.Linear(d, d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, hidden), nn.Linear(hidden, d)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.q(x) * torch.sigmoid(self.k(x)) + self.v(x)
        return x + self.down(torch.relu(self.up(x)))


class Toy(nn.Module):
    """Two blocks. Takes (B, T, d) or keywords, like a model of a library."""

    def __init__(self, d: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block(d), Block(d)])
        self.dropout = nn.Dropout(0.5)

    def forward(
        self, x: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        for block in self.blocks:
            x = self.dropout(block(x))
        return x


def state_of(model: nn.Module) -> list[Any]:
    """Modes, hooks and gradients of a model's modules."""
    return [
        (
            name,
            module.training,
            len(module._forward_pre_hooks),
            len(module._forward_hooks),
            [
                (n, p.requires_grad, p.grad is None)
                for n, p in module.named_parameters(recurse=False)
            ],
        )
        for name, module in model.named_modules()
    ]


def second_moment(rows: Tensor) -> Tensor:
    """Return the eigenvalues of the rows' second moment, largest first, float64."""
    rows = rows.double().reshape(-1, rows.shape[-1])
    return torch.linalg.eigvalsh(rows.T @ rows / len(rows)).flip(0)


def inputs(count: int = 6, rows: int = 64, d: int = 16, seed: int = 0) -> list[Tensor]:
    """Batches (4, rows / 4, d) whose directions differ in energy."""
    generator = torch.Generator().manual_seed(seed)
    scales = 0.8 ** torch.arange(d)
    return [
        (torch.randn(4, rows // 4, d, generator=generator) * scales + 0.3) for _ in range(count)
    ]


def write_folder(
    out: str | Path, text: str, overwrite: bool = True, meanwhile: Callable[[], None] = lambda: None
) -> None:
    with claimed_folder(out, overwrite) as output, output.whole() as made:
        meanwhile()
        (made / "sub").mkdir()
        for name in ("a", "sub/b"):
            (made / name).write_text(text)


def tree(folder: Path | str = ".") -> dict[str, str | None]:
    """Return every path below, hidden ones as well, with its text."""
    return {
        path.relative_to(folder).as_posix(): path.read_text() if path.is_file() else None
        for path in sorted(Path(folder).rglob("*"))
    }


def texts_below(folder: Path | str) -> set[str | None]:
    return {text for name, text in tree(folder).items() if text is not None and name != MARK}


@contextmanager
def no_room(size: int = 600) -> Iterator[None]:
    """Let no file grow beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


TEXT: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
}


def tiny_bert(kind: str = "base", **options: Any) -> Any:
    """A BERT of two small layers with random weights."""
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(**TEXT | options)
    return {
        "base": transformers.BertModel,
        "classification": transformers.BertForSequenceClassification,
    }[kind](config).eval()


def tiny_llama(**options: Any) -> Any:
    """A Llama of two small layers with random weights."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**TEXT | {"num_key_value_heads": 1} | options)
    return transformers.LlamaForCausalLM(config).eval()


def tokens(count: int = 4, seed: int = 0, padded: bool = False) -> list[dict[str, Tensor]]:
    """Batches of (4, 12) token ids; with `padded`, two rows end early."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        ids = torch.randint(3, 60, (4, 12), generator=generator)
        mask = torch.ones_like(ids)
        if padded:
            mask[0, 7:] = 0
            mask[2, 3:] = 0
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


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
    """Initialize; the output is what it was, a step lowers the loss, and plain PEFT loads what was
    saved.

    Gives the calibration and every A as it was initialized, by default the directions themselves.
    """
    torch.manual_seed(0)
    before = result(build().eval(), batches[0]).detach()
    model = get_peft_model(build(), lora, low_cpu_mem_usage=meta)
    calibration = evatune.initialize(model, batches, **{"scale": "paper"} | options)
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


def lora(model: nn.Module, **options: Any) -> PeftModel:
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | options
    return get_peft_model(
        model,
        LoraConfig(**settings),
        **({"low_cpu_mem_usage": True} if options.pop("meta", False) else {}),
    )


def output(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        found = model.eval()(**batch)
    return found.logits if hasattr(found, "logits") else found.last_hidden_state


def lora_layers(model: nn.Module, adapter: str = "default") -> dict[str, LoraLayer]:
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and adapter in module.r
    }


def train_a_little(model: nn.Module, batch: dict[str, Tensor], steps: int = 3) -> list[float]:
    """A few optimizer steps on a made-up regression, so that B ≠ 0."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    torch.manual_seed(1)
    target = torch.randn_like(output(model, batch))
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        found = model(**batch)
        loss = (
            ((found.logits if hasattr(found, "logits") else found.last_hidden_state) - target)
            .square()
            .mean()
        )
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def trained_adapter(model: nn.Module, **options: Any) -> PeftModel:
    """An EVA adapter with ranks that differ, and B ≠ 0."""
    init: dict[str, Any] = {"rho": options.pop("rho", 2.0)} | (
        {"metric": "raw"} if options.pop("raw", False) else {}
    )
    settings = {"r": 4, "lora_alpha": 3, "target_modules": "all-linear"} | options
    adapted = get_peft_model(model, LoraConfig(**settings))
    evatune.initialize(adapted, tokens(8), **init)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in lora_layers(adapted).values():
            b = layer.lora_B["default"].weight
            b.copy_(torch.randn(b.shape, generator=generator) / 5)
    return adapted


def perturbed_adapter(base: nn.Module, **options: Any) -> PeftModel:
    """The model with an adapter of which every trained weight is random."""
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, **options)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(
                    (torch.randn(parameter.shape, generator=generator) / 4).to(parameter.dtype)
                )
    return model


def scalars(folder: Path) -> dict[str, float]:
    """The scalars in TensorBoard's event files: records of length, checksum, message, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for path in folder.rglob("events.out.tfevents.*"):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            found |= {
                value.tag: value.simple_value
                for value in event.summary.value
                if value.HasField("simple_value")
            }
            data = data[12 + length + 4 :]
    return found


def skewed(model: Any) -> Any:
    """Makes some inputs poor, so that some layers lose every rank."""
    with torch.no_grad():
        for layer in model.encoder.layer:
            layer.intermediate.dense.weight[1:] = 0
    return model


class Faulty(nn.Module):
    """A model with a layer for each fate: fine, zero, with NaN, too few rows, never called."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.zero, self.nan, self.few, self.unused = (nn.Linear(8, 8) for _ in range(5))
        self.calls = 0

    def forward(self, x: Tensor) -> None:
        self.calls += 1
        self.fine(x)
        self.zero(x * 0)
        self.nan(x / 0 if self.calls == 3 else x * 1.5)
        if self.calls == 2:
            self.few(x[:1] * 2)


def every_outcome() -> evatune.Calibration:
    """A calibration of layers that ended in all ways."""
    generator = torch.Generator().manual_seed(0)
    xs = [torch.randn(40, 8, generator=generator) for _ in range(6)]
    return evatune.calibrate(Faulty(), xs, evatune.CalibrationConfig(rank=2, tolerance=0))
