"""Singular triplets of a matrix, with signs by the rule of `fix_signs`."""

from __future__ import annotations

import torch
from torch import Tensor

from evatune.sketch.spectrum import fix_signs


def leading_triplets(
    matrix: Tensor,  # (out, in)
    rank: int,
    *,
    width: int,
    iterations: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return U (out, rank), Σ (rank,) and Vᵀ (rank, in) of the largest singular values, falling.

    By a randomized SVD of `width` columns and so many power iterations, exact where the matrix is
    no wider. Signs are those that make the largest entry of each row of Vᵀ positive.
    """
    u, values, v = torch.svd_lowrank(matrix, q=min(width, *matrix.shape), niter=iterations)
    return _with_signs_fixed(u[:, :rank], values[:rank], v.T[:rank])


def minor_triplets(
    weight: Tensor,  # (out, in)
    rank: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return U (out, r), Σ (r,) and Vᵀ (r, in) of the smallest singular values, falling."""
    u, values, vt = torch.linalg.svd(weight.float(), full_matrices=False)
    return _with_signs_fixed(u[:, -rank:], values[-rank:], vt[-rank:])


def _with_signs_fixed(u: Tensor, values: Tensor, vt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    fixed = fix_signs(vt)
    signs = (fixed * vt).sum(1).sign()  # U must turn with V
    return u * signs, values, fixed
