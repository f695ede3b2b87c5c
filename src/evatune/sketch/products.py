"""The product of many rows of 16 bits with a few float32 vectors, on tensor cores."""

from __future__ import annotations

import torch
from torch import Tensor


def takes_16_bits(device: torch.device) -> bool:
    """Return whether `thin_product` is faster on this device for rows of 16 bits uncast."""
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and hasattr(torch.ops.aten.mm, "dtype")  # since torch 2.8
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def thin_product(a: Tensor, b: Tensor) -> Tensor:
    """Return a·b, (n, m) float32, of two float32 matrices or one of them of 16 bits.

    A product of two numbers of 16 bits has at most 22 bits, and a float32 holds it exactly. So
    tensor cores, which add such products up in float32, lose nothing but the rounding of the sums.
    The float32 side is split into two numbers of 16 bits, whose sum is it but for 2⁻¹⁷ of each
    number, rounded either way. That averages out over many rows: a sketch's energies change by
    about 1e-5. Both multiply in one go, so that the side of 16 bits is read once; where the other
    has few vectors, the time of that reading is the time of the product. The 16-bit side is not
    converted, nor copied where one of its strides is 1.

    float16 has too few exponents for that. There, the vectors of the float32 side are brought to
    the top of its range by powers of two, and what is below 2⁻³⁸ of the largest is rounded off.
    """
    if a.dtype == b.dtype:
        return a @ b
    if a.dtype == torch.float32:
        terms, back = _split(a, b.dtype)  # (2, n, k)
        products = _multiply(terms.flatten(0, 1), b)
        return _rescaled(products.view(2, len(a), b.shape[1]).sum(0), back)
    terms, back = _split(b.T, a.dtype)  # (2, m, k)
    products = _multiply(a, terms.flatten(0, 1).T)
    summed = products.view(len(a), 2, b.shape[1]).sum(1)
    return _rescaled(summed, None if back is None else back.T)


def _multiply(a: Tensor, b: Tensor) -> Tensor:
    """Return the float32 product of two matrices of 16 bits."""
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _split(vectors: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Return two terms (2, n, k) whose sum, times a factor (n, 1) if any, is `vectors` (n, k)."""
    back = None
    if dtype == torch.float16 and vectors.numel():
        _, exponent = torch.frexp(vectors.abs().amax(1, keepdim=True))
        power = (exponent - 15).clamp(-126, 126).to(vectors.dtype)
        vectors, back = vectors * torch.exp2(-power), torch.exp2(power)
    high = vectors.to(dtype)
    return torch.stack([high, (vectors - high).to(dtype)]), back


def _rescaled(values: Tensor, back: Tensor | None) -> Tensor:
    return values if back is None else values * back
