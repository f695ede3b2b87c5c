"""Code of the standard library."""

from __future__ import annotations

import torch

from evatune.finetune.tasks.generation import code

torch.set_num_threads(1)


def test_code_of_one_module_is_in_one_part() -> None:
    modules = [module for module in code._functions() if not code.held_out(module)]
    assert modules == []
