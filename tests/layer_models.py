"""Small models with one type of layer each, batches for them, and the exact answer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import evatune

EXACT_6 = evatune.CalibrationConfig(components=6, sketch="exact", tolerance=0)


def moments(rows: Tensor, count: int) -> Tensor:
    """The leading eigenvalues of the rows' second moment, (count,) float64."""
    rows = rows.double()
    return torch.linalg.eigvalsh(rows.T @ rows / len(rows)).flip(0)[:count]


def best(rows: Tensor, count: int) -> float:
    """Share of the rows' energy that the best `count` directions capture."""
    return float(moments(rows, count).sum() / rows.double().square().sum(1).mean())


CONVS: dict[str, Callable[[], nn.Module]] = {
    "1d": lambda: nn.Conv1d(3, 8, 3),
    "1d stride and padding": lambda: nn.Conv1d(3, 8, 4, stride=2, padding=1),
    "1d same, even kernel": lambda: nn.Conv1d(3, 8, 4, padding="same"),
    "1d dilation": lambda: nn.Conv1d(3, 8, 3, dilation=2, padding=1),
    "2d": lambda: nn.Conv2d(2, 8, (3, 2), stride=(2, 1), padding=(0, 1)),
    "2d patch embedding": lambda: nn.Conv2d(2, 8, 3, stride=3),
    "2d same with dilation": lambda: nn.Conv2d(2, 8, 3, dilation=2, padding="same"),
    "2d circular": lambda: nn.Conv2d(2, 8, 3, padding=1, padding_mode="circular"),
    "2d reflect": lambda: nn.Conv2d(2, 8, 3, padding=(1, 2), padding_mode="reflect"),
    "2d replicate, same": lambda: nn.Conv2d(2, 8, (3, 4), padding="same", padding_mode="replicate"),
    "2d pointwise": lambda: nn.Conv2d(8, 8, 1),
    "2d groups": lambda: nn.Conv2d(4, 8, 3, groups=2, padding=1),
    "3d": lambda: nn.Conv3d(2, 8, (2, 1, 3), stride=(1, 2, 1), padding=(1, 0, 1)),
}

SIZES = {"1": (12,), "2": (9, 8), "3": (4, 5, 6)}


def images(conv: nn.Module, count: int = 4, seed: int = 0) -> list[Tensor]:
    """Batches whose neighbors are alike, so that directions differ in energy."""
    generator = torch.Generator().manual_seed(seed)
    size = SIZES[type(conv).__name__[4]]
    return [
        torch.randn(5, conv.in_channels, *size, generator=generator).cumsum(-1)  # type: ignore[arg-type]
        for _ in range(count)
    ]


def patches(conv: nn.Module, x: Tensor) -> Tensor:
    """The rows, by torch's own convolution: one output channel per entry of the patch."""
    width = conv.in_channels * conv.weight[0, 0].numel()  # type: ignore[operator, index]
    picker = type(conv)(
        conv.in_channels,
        width,
        conv.kernel_size,
        conv.stride,
        conv.padding,
        conv.dilation,
        bias=False,
        padding_mode=conv.padding_mode,
    )
    with torch.no_grad():
        picker.weight.copy_(torch.eye(width).view_as(picker.weight))
        return picker(x).flatten(2).transpose(1, 2).reshape(-1, width)


RUN_BY_PEFT = {kind: build for kind, build in CONVS.items() if kind != "1d dilation"}


class Words(nn.Module):
    def __init__(self, padding: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(12, 8, padding_idx=padding), nn.Linear(8, 4)

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.head(torch.tanh(self.table(ids)))


def texts(count: int = 4) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    weights = 0.7 ** torch.arange(12)
    return [
        {"ids": torch.multinomial(weights, 40, True, generator=generator).view(4, 10)}
        for _ in range(count)
    ]


class Attends(nn.Module):
    def __init__(self, batch_first: bool = True, cross: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attn, self.head, self.cross = (
            nn.MultiheadAttention(16, 2, batch_first=batch_first),
            nn.Linear(16, 16),
            cross,
        )

    def forward(
        self, x: Tensor, memory: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> Tensor:
        query = self.as_called(x)
        key = query if memory is None else self.as_called(memory)
        return self.head(self.as_called(self.attn(query, key, key)[0]))

    def as_called(self, x: Tensor) -> Tensor:
        return x if self.attn.batch_first else x.transpose(0, 1)


def sequences(cross: bool = False) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    scales = 0.8 ** torch.arange(16)
    batches = []
    for _ in range(4):
        batch = {"x": torch.randn(5, 7, 16, generator=generator) * scales + 0.2}
        if cross:
            batch["memory"] = torch.randn(5, 9, 16, generator=generator) * scales.flip(0)
        batches.append(batch)
    return batches


class Experts(nn.Module):
    """Stacked weights, and for each token the experts that the batch names."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.is_transposed = transposed
        generator = torch.Generator().manual_seed(0)
        up, down = (torch.randn(4, *shape, generator=generator) / 3 for shape in ((12, 8), (8, 12)))
        self.up, self.down = (
            nn.Parameter(w.transpose(1, 2).contiguous() if transposed else w) for w in (up, down)
        )

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:  # (n, 8), (n, 2)
        out = torch.zeros_like(x)
        for expert in chosen.unique():
            token = torch.where((chosen == expert).any(1))[0]
            up, down = self.up[expert], self.down[expert]
            if self.is_transposed:
                out.index_add_(0, token, (torch.tanh(x[token] @ up) @ down).to(x.dtype))
            else:
                linear = nn.functional.linear
                out.index_add_(0, token, linear(torch.tanh(linear(x[token], up)), down).to(x.dtype))
        return out


class Mixture(nn.Module):
    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts, self.head = Experts(transposed), nn.Linear(8, 8)

    def forward(self, x: Tensor, chosen: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        found: Tensor = self.head(self.experts(x.flatten(0, 1), chosen.flatten(0, 1)).view(x.shape))
        return found


def routed(count: int = 4, seldom: int = 3) -> list[dict[str, Tensor]]:
    """Tokens that go to experts 0, 1 and 2; a single one of the first batch goes to `seldom`."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for number in range(count):
        x = torch.randn(3, 10, 8, generator=generator) * 0.8 ** torch.arange(8)
        chosen = torch.stack([torch.randperm(3, generator=generator)[:2] for _ in range(30)]).view(
            3, 10, 2
        )
        if number == 0 and seldom < 4:
            chosen[0, 0, 0] = seldom
        mask = torch.ones(3, 10)
        mask[1, 6:] = 0
        batches.append({"x": x, "chosen": chosen, "attention_mask": mask})
    return batches
