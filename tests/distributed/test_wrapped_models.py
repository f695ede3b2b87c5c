"""Two processes calibrate models inside DDP, and models in the shards of FSDP."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel

import evatune
from evatune import CalibrationConfig
from evatune.errors import AdapterError
from tests.processes import same, toy, wide


def test_inside_ddp_the_names_are_the_models_and_fixed_ranks_are_written(
    both: list[dict[str, Any]],
) -> None:
    found = [one["in_ddp"] for one in both]
    assert same(found[0]["found"], found[1]["found"])
    assert same(found[0]["found"], both[0]["nystrom"])
    assert same(found[0]["weights"], found[1]["weights"])
    assert same(found[0]["gradients"], found[1]["gradients"])
    assert found[0]["name"] == PeftModel.__name__
    assert found[0]["refused"][0] == AdapterError.__name__
    for message in found[0]["refused"][1::2]:
        assert "inside DistributedDataParallel" in message
    for name, a in found[0]["weights"].items():
        if "lora_A" in name:
            assert torch.allclose(a @ a.T, torch.eye(4), atol=1e-5)


def test_a_model_in_shards_runs_in_step_and_its_adapter_is_written_on_every_process(
    both: list[dict[str, Any]],
) -> None:
    found = [one["sharded"] for one in both]
    assert found[0]["found"]["batches"] == 8 + 3
    assert same(found[0]["found"], found[1]["found"])
    assert same(found[0]["weights"], found[1]["weights"])
    assert same(found[0]["fresh"], found[1]["fresh"])
    config = CalibrationConfig(rank=4, max_batches=16, tolerance=0, distributed=False)
    left, right = wide()[0::2], wide()[1::2][:3]
    data = [batch for pair in zip(left, right, strict=False) for batch in pair] + left[3:]
    whole = evatune.calibrate(toy(), data, config)
    for name, (_, energies, _, rows, total, _) in found[0]["found"]["layers"].items():
        assert rows == 11 * 128
        assert total == pytest.approx(whole.spectra[name].total_energy, rel=1e-5)
        assert torch.allclose(energies[:4], whole.spectra[name].energies[:4], rtol=0.02)
    for name, a in found[0]["weights"].items():
        if "lora_A" in name:
            assert torch.allclose(a @ a.T, torch.eye(4), atol=1e-5)
    assert all(total > 0 for total in found[0]["gradients"])
    assert found[0]["moved"] <= 1e-5 * found[0]["scale"]
    assert "sharded" in found[0]["refused"][1]


def test_layers_in_parts_are_refused(both: list[dict[str, Any]]) -> None:
    for process in both:
        kind, message = process["split_by_tensor_parallelism"]
        assert kind == "AdapterError"
        assert message.startswith("blocks.0.up.weight is split by tensor parallelism")


def test_fsdp1_is_calibrated_like_fsdp2_and_not_written_to(both: list[dict[str, Any]]) -> None:
    for process in both:
        for found in process["in_fsdp1"]["found"]:
            assert same(found, both[0]["sharded"]["found"])
        for message in process["in_fsdp1"]["refused"]:
            assert "in shards already" in message
            assert "rho=1" not in message
