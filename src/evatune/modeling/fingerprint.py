"""Computes a checksum per weight, by which two processes or runs tell that models are the same."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from evatune.modeling.sharding import is_sharded_parameter
from evatune.modeling.wrappers import base_modules, base_name

_SAMPLES = 1024  # values of a weight that are hashed in their order


def fingerprint(model: nn.Module) -> dict[str, str]:
    """Return a hash by name for every parameter and buffer of the base model.

    Adapters are left out, as a calibration sees nothing of them. A hash covers shape, dtype, the
    sum of all bytes taken as 64-bit integers, and about a thousand values at equal distances, in
    their order. So one changed value shows, and values that trade places do where a sample meets
    them. Of weights on the meta device (offloaded ones) shape and dtype alone count, and of shards
    only that they are some: what is elsewhere is not fetched.

    Cost: one read of the weights where they are, at the speed of memory: on one CPU core about
    three seconds for the 14 GB of a model with 7 billion parameters in 16 bits; no copy, but of
    weights that are not contiguous.
    """
    hashes: dict[str, str] = {}
    for name, module in base_modules(model):
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                hashes[base_name(f"{name}.{key}".lstrip("."))] = _hash(tensor)
    return hashes


def _hash(tensor: Tensor) -> str:
    if is_sharded_parameter(tensor):
        return "in shards"
    digest = hashlib.sha256(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
    if tensor.device.type != "meta":
        for plain in _plain(tensor):
            digest.update(f"{_sum(plain)}".encode())
            digest.update(_sample(plain))
    return digest.hexdigest()[:16]


def _plain(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the parts of a quantized or sparse tensor, or the tensor itself, as (n,)."""
    if hasattr(tensor, "__tensor_flatten__"):
        for key in tensor.__tensor_flatten__()[0]:
            yield from _plain(getattr(tensor, key))
    elif tensor.layout != torch.strided:
        for part in _sparse_parts(tensor.detach()):
            yield from _plain(part)
    else:
        plain = tensor.detach().as_subclass(Tensor).resolve_conj().resolve_neg()
        yield plain.contiguous().reshape(-1)


def _sparse_parts(tensor: Tensor) -> tuple[Tensor, ...]:
    """Return the indices and values of a tensor in one of torch's sparse layouts."""
    if tensor.layout == torch.sparse_coo:
        tensor = tensor.coalesce()
        return tensor.indices(), tensor.values()
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return tensor.crow_indices(), tensor.col_indices(), tensor.values()
    return tensor.ccol_indices(), tensor.row_indices(), tensor.values()


def _sum(flat: Tensor) -> int:
    """Return the sum of all bytes (n,) as 64-bit integers, modulo 2 to the power 64.

    The last few count one by one.
    """
    octets = flat.view(torch.uint8)
    # wider integers have to begin at a multiple of 8
    if octets.storage_offset() % 8:
        octets = octets.clone()
    end = len(octets) // 8 * 8
    integers = octets[:end].view(torch.int64)
    return int(integers.sum()) + int(octets[end:].sum())


def _sample(flat: Tensor) -> bytes:
    """Return the bytes of values at equal distances."""
    step = max(1, len(flat) // _SAMPLES)
    picked = flat[::step].cpu().contiguous()
    return bytes(picked.view(torch.uint8).tolist())
