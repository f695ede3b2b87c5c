"""The product of many rows of 16 bits with a few vectors of 32, on tensor cores and to 32 bits."""

from __future__ import annotations

import torch
from torch import Tensor

# Into how many numbers of 16 bits one of 32 bits is split. They hold 16 bits of its significand in
# bfloat16, and 22 in float16.
_TERMS = 2


def takes_16_bits(device: torch.device) -> bool:
    """Return whether `thin_product` is faster on this device for rows of 16 bits uncast."""
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and hasattr(torch.ops.aten.mm, "dtype")  # torch < 2.8
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def thin_product(a: Tensor, b: Tensor) -> Tensor:
    """(n, m) float32, a·b, both float32 or one of them of 16 bits.

    A product of two numbers of 16 bits has at most 22 bits, and a float32 holds it exactly. So
    tensor cores, which add such products up in float32, lose nothing but the rounding of the sums.
    The float32 side is split into two numbers of 16 bits, whose sum is it but for 2⁻¹⁷ of each
    number, rounded either way: over many rows, or columns, that is averaged out to less than
    float32's own rounding of the sums. Both multiply in one go, so that the side of 16 bits is read
    once; where the other has few vectors, the time of that reading is the time of the product.
    Nothing of the size of the 16-bit side is converted or copied.

    float16 has too few exponents for that. There, the vectors of the float32 side are brought to
    the top of its range by powers of two, and what is below 2⁻³⁸ of the largest is rounded off.
    """
    if a.dtype == b.dtype:
        return a @ b
    if a.dtype == torch.float32:
        terms, back = _split(a, b.dtype)  # (t, n, k)
        products = _multiply(terms.flatten(0, 1), b)
        return _rescaled(products.view(len(terms), len(a), b.shape[1]).sum(0), back)
    terms, back = _split(b.T, a.dtype)  # (t, m, k)
    products = _multiply(a, terms.flatten(0, 1).T)
    summed = products.view(len(a), len(terms), b.shape[1]).sum(1)
    return _rescaled(summed, None if back is None else back.T)


def _multiply(a: Tensor, b: Tensor) -> Tensor:
    """Return the float32 product of two matrices of 16 bits."""
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _split(vectors: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Return terms (t, n, k) whose sum, times a factor (n, 1) if there is one, is `vectors`."""
    back = None
    if dtype == torch.float16 and vectors.numel():
        _, exponent = torch.frexp(vectors.abs().amax(1, keepdim=True))
        power = (exponent - 15).clamp(-126, 126).to(vectors.dtype)
        vectors, back = vectors * torch.exp2(-power), torch.exp2(power)
    terms = vectors.new_empty(_TERMS, *vectors.shape, dtype=dtype)
    rest = vectors
    for number, term in enumerate(terms):
        term.copy_(rest)
        if number + 1 < len(terms):
            rest = rest - term
    return terms, back


def _rescaled(values: Tensor, back: Tensor | None) -> Tensor:
    return values if back is None else values * back
