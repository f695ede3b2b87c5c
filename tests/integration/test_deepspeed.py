"""Models in the shards of DeepSpeed ZeRO-3, on two gloo processes and the CPU."""

from __future__ import annotations

import importlib.util
import os
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2Model

import evatune
from evatune import CalibrationConfig
from evatune.capture import find_target_layers
from tests.processes import ALL, ZERO_3, error_of, facts, same, spawn, toy, wide

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"
)


def adapted() -> Any:
    return get_peft_model(toy(), LoraConfig(r=4, target_modules="all-linear"))


def engine(model: nn.Module, stage: int = 3) -> Any:
    import deepspeed

    settings = ZERO_3 | {"zero_optimization": ZERO_3["zero_optimization"] | {"stage": stage}}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]


def work(rank: int, folder: str) -> None:
    """What each of two processes does, and keeps."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "DS_ACCELERATOR": "cpu",
    }
    import deepspeed

    # or it compiles an operator of its own for messages on a CPU
    deepspeed.ops.__compatible_ops__.clear()
    deepspeed.init_distributed("gloo", verbose=False)
    data = wide()[rank::2][: 3 if rank else 8]
    found = evatune.calibrate(engine(toy()), data, ALL)

    fresh = adapted()
    evatune.initialize(fresh, found)
    training = engine(fresh)
    training.eval()
    with torch.no_grad():
        moved = (training(wide()[0]) - toy().eval()(wide()[0])).abs().max()
    training.train()
    losses = []
    for _ in range(3):
        loss = training(wide()[0]).square().mean()
        losses.append(loss.detach())
        training.backward(loss)
        training.step()

    refused = []
    for stage, rho in ((3, None), (3, 1.0), (2, 1.0)):
        spoken_for = engine(adapted(), stage)
        refused.append(error_of(partial(evatune.initialize, spoken_for, data, config=ALL, rho=rho)))
    refused.append(error_of(lambda: evatune.initialize(engine(adapted()).module, data, config=ALL)))
    with deepspeed.zero.Init(config_dict_or_path=ZERO_3):
        early = toy()
    refused.append(error_of(lambda: evatune.calibrate(early, data, ALL)))
    gpt2 = GPT2Model(GPT2Config(vocab_size=60, n_embd=32, n_layer=1, n_head=2, n_positions=32))
    transposed = evatune.calibrate(engine(gpt2), [{"input_ids": torch.arange(32)[None]}], ALL)
    torch.save(
        {
            "transposed": {name: layer.in_features for name, layer in transposed.layers.items()},
            "found": facts(found),
            "again": facts(evatune.calibrate(engine(toy()).module, data, ALL)),
            "stage2": facts(evatune.calibrate(engine(toy(), 2), data, ALL)),
            "moved": moved,
            "losses": losses,
            "refused": refused,
        },
        f"{folder}/{rank}.pt",
    )
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("deepspeed")
    assert spawn(work, folder) == [0, 0]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def test_a_sharded_model_is_calibrated_in_step_on_uneven_data(both: list[dict[str, Any]]) -> None:
    found = both[0]["found"]
    assert found["batches"] == 8 + 3
    assert same(found, both[1]["found"])
    assert same(found, both[0]["again"])  # the engine's module in place of the engine
    assert same(found, both[0]["stage2"])
    left, right = wide()[0::2], wide()[1::2][:3]
    data = [batch for pair in zip(left, right, strict=False) for batch in pair] + left[3:]
    whole = evatune.calibrate(toy(), data, CalibrationConfig(rank=4, max_batches=16, tolerance=0))
    assert found["layers"].keys() == whole.layers.keys()
    for name, (_, energies, _, rows, total, _) in found["layers"].items():
        assert rows == 11 * 128
        assert total == pytest.approx(whole.spectra[name].total_energy, rel=1e-5)
        assert torch.allclose(energies[:4], whole.spectra[name].energies[:4], rtol=0.02)


def test_layers_whose_size_only_the_weight_tells_are_known_in_shards(
    both: list[dict[str, Any]],
) -> None:
    plain = GPT2Model(GPT2Config(vocab_size=60, n_embd=32, n_layer=1, n_head=2, n_positions=32))
    assert both[0]["transposed"] == {
        site.name: site.in_features for site in find_target_layers(plain)
    }


def test_an_adapter_initialized_before_the_engine_leaves_the_output_and_trains(
    both: list[dict[str, Any]],
) -> None:
    for found in both:
        assert found["moved"] <= 1e-5
        assert found["losses"][0] > found["losses"][1] > found["losses"][2]


def test_what_an_engine_holds_already_is_refused_with_the_way_out(
    both: list[dict[str, Any]],
) -> None:
    for found in both:
        *inside, module, early = found["refused"]
        for kind, message in inside:
            assert kind == "AdapterError"
            assert "the model is inside DeepSpeedEngine already" in message
            assert "before the model is wrapped" in message
            assert "rho=1" not in message
        assert "the model is in shards already" in module[1]
        assert early[0] == "AdapterError"
        assert "zero.Init" in early[1]
        assert "deepspeed.initialize first" in early[1]
