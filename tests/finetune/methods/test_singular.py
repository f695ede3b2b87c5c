"""Singular triplets."""

from __future__ import annotations

import torch

from evatune.finetune.methods.singular import leading_triplets, minor_triplets


def test_triplets_are_those_of_an_exact_svd_with_the_signs_of_its_rows() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(12, 7)
    u, values, vt = leading_triplets(matrix, 7, width=100, iterations=4)
    assert torch.allclose(u * values @ vt, matrix, atol=1e-5)
    assert torch.allclose(values, torch.linalg.svdvals(matrix), atol=1e-5)
    assert (vt.gather(1, vt.abs().argmax(1, keepdim=True)) > 0).all()


def test_minor_triplets_are_the_last_of_an_exact_svd() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(12, 7)
    u, values, vt = minor_triplets(matrix, 3)
    rest = matrix - u * values @ vt
    assert torch.allclose(values, torch.linalg.svdvals(matrix)[-3:], atol=1e-5)
    assert torch.allclose(torch.linalg.svdvals(rest)[:4], torch.linalg.svdvals(matrix)[:4])
    assert (vt.gather(1, vt.abs().argmax(1, keepdim=True)) > 0).all()
