"""What each of two processes does; every function runs on both, and gives what tests look at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import evatune
from evatune import CalibrationConfig
from tests.helpers import Block, inputs
from tests.processes import (
    ALL,
    GRADIENTS,
    REGRESSION,
    SETTINGS,
    error_of,
    facts,
    mean_square,
    same,
    toy,
    wide,
)


class Routed(nn.Module):
    """Even batches go through one layer, odd ones through the other; both feed a common one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.even, self.odd, self.common = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.beside = nn.Linear(16, 16)

    def forward(self, x: Tensor, number: int) -> Tensor:
        expert = self.odd if number % 2 else self.even
        y = expert(x)
        # Only in odd batches do these two have the same input.
        return self.common(x) + self.beside(x if number % 2 else y)


def routed() -> list[tuple[Tensor, int]]:
    return [(x, number) for number, x in enumerate(inputs(8))]


def work(rank: int, folder: str) -> None:
    """Run every scenario and keep what it returns."""
    found = {name: scenario(rank) for name, scenario in SCENARIOS.items()}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def together(kind: str) -> Callable[[int], Any]:
    return lambda rank: facts(evatune.calibrate(toy(), wide()[rank::2], SETTINGS[kind]))


def alone(rank: int) -> Any:
    config = CalibrationConfig(rank=4, max_batches=16, tolerance=0, distributed=False)
    return facts(evatune.calibrate(toy(), wide()[rank::2], config))


def gradients(rank: int) -> Any:
    return facts(evatune.calibrate(toy(), wide()[rank::2], GRADIENTS, loss=mean_square))


def regression(rank: int) -> Any:
    return facts(evatune.calibrate(toy(), wide()[rank::2], REGRESSION, loss=mean_square))


def uneven(rank: int) -> Any:
    return facts(evatune.calibrate(toy(), wide()[rank::2][: 2 if rank else 7], ALL))


def more_processes_than_batches(rank: int) -> Any:
    return facts(
        evatune.calibrate(toy(), wide(4)[rank::2], CalibrationConfig(rank=4, max_batches=1))
    )


def default_stop(rank: int) -> Any:
    return facts(
        evatune.calibrate(toy(), wide(64)[rank::2], CalibrationConfig(rank=4, tolerance=0.05))
    )


def experts(rank: int) -> Any:
    return facts(
        evatune.calibrate(Routed(), routed()[rank::2], CalibrationConfig(rank=2, tolerance=0))
    )


def bad_rows(rank: int) -> Any:
    data = wide()[rank::2]
    if rank == 1:
        data[2][1, 3, 5] = float("nan")
    model = toy()
    found = facts(evatune.calibrate(model, data, ALL))
    adapted = get_peft_model(toy(), LoraConfig(r=4, target_modules=["q", "down"]))
    return {
        "found": found,
        "error": error_of(lambda: evatune.initialize(adapted, data, config=ALL)),
    }


def other_seed(rank: int) -> Any:
    return error_of(lambda: evatune.calibrate(toy(), wide(), CalibrationConfig(seed=rank)))


def other_targets(rank: int) -> Any:
    return error_of(
        lambda: evatune.calibrate(toy(), wide(), targets=["q"] if rank else ["q", "down"])
    )


def no_such_target(rank: int) -> Any:
    return error_of(
        lambda: evatune.calibrate(toy(), wide(), targets=["nothing"] if rank else ["q"])
    )


def other_weights(rank: int) -> Any:
    model = toy()
    with torch.no_grad():
        model.blocks[1].down.weight += rank
    return error_of(lambda: evatune.calibrate(model, wide(), ALL))


def other_model(rank: int) -> Any:
    return error_of(
        lambda: evatune.calibrate(toy() if rank else nn.Sequential(nn.Linear(64, 64)), wide(), ALL)
    )


def other_alpha(rank: int) -> Any:
    model = get_peft_model(toy(), LoraConfig(r=4, lora_alpha=8 << rank, target_modules=["q"]))
    return error_of(lambda: evatune.initialize(model, wide()[rank::2], config=ALL))


def split_by_tensor_parallelism(rank: int) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    model = toy()
    mesh = init_device_mesh("cpu", (2,))
    parallelize_module(model.blocks[0], mesh, {"up": ColwiseParallel()})
    return error_of(lambda: evatune.calibrate(model, wide(), ALL, targets=["q"]))


def bound_within_a_step(rank: int) -> Any:
    """The data need both processes for each batch, as accelerate's dispatched ones do."""

    def dispatched() -> Iterator[Tensor]:
        for batch in wide()[rank::2]:
            dist.barrier()
            yield batch

    return facts(evatune.calibrate(toy(), dispatched(), replace(ALL, max_batches=5)))


def no_data(rank: int) -> Any:
    return error_of(lambda: evatune.calibrate(toy(), [] if rank else wide(), ALL))


def no_data_at_all(rank: int) -> Any:
    return error_of(lambda: evatune.calibrate(toy(), [], ALL))


def failing_model(rank: int) -> Any:
    def forward(model: nn.Module, batch: Tensor) -> Tensor:
        if rank == 1 and torch.equal(batch, wide()[5]):
            raise ArithmeticError("of all things")
        return model(batch)

    return error_of(lambda: evatune.calibrate(toy(), wide()[rank::2], ALL, forward=forward))


def failing_at_the_end(rank: int) -> Any:
    """One process fails when all have calibrated; here, at writing."""
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr("evatune.adapters.initialize.write_rows", no_space)
        model = get_peft_model(toy(), LoraConfig(r=4, target_modules=["q"]))
        return error_of(lambda: evatune.initialize(model, wide()[rank::2], config=ALL))


def no_space(*_: Any, **__: Any) -> None:
    raise MemoryError("no space left")


def rows_come_late(rank: int) -> Any:
    """In the first step no process has a row that counts."""
    data = wide()
    return facts(
        evatune.calibrate(
            toy(), data[rank::2], ALL, targets=["q", "down"], rows=rows_outside(data[:2])
        )
    )


def rows_outside(empty: list[Tensor]) -> Callable[[Tensor, Any, str], Tensor]:
    def rows(x: Tensor, batch: Tensor, name: str) -> Tensor:
        flat = x.flatten(0, 1)
        return flat[:0] if any(torch.equal(batch, other) for other in empty) else flat

    return rows


def one_much_shorter(rank: int) -> Any:
    return facts(evatune.calibrate(toy(), wide(20)[rank::2][: 1 if rank else 10], ALL))


def incremental(rank: int) -> Any:
    return error_of(
        lambda: evatune.calibrate(toy(), wide(), CalibrationConfig(sketch="incremental"))
    )


def in_ddp(rank: int) -> Any:
    model = nn.parallel.DistributedDataParallel(
        get_peft_model(toy(), LoraConfig(r=4, target_modules="all-linear"))
    )
    found = facts(evatune.calibrate(model, wide()[rank::2], ALL))
    refused = error_of(lambda: evatune.initialize(model, wide()[rank::2], config=ALL))
    other_rank = error_of(
        lambda: evatune.initialize(model, wide()[rank::2], config=ALL, rho=1.0, rank=2)
    )
    dora = nn.parallel.DistributedDataParallel(
        get_peft_model(toy(), LoraConfig(r=4, target_modules=["q"], use_dora=True))
    )
    with_dora = error_of(lambda: evatune.initialize(dora, wide()[rank::2], config=ALL, rho=1.0))
    refused += [*other_rank, *with_dora]
    evatune.initialize(model, wide()[rank::2], config=ALL, rho=1.0, scale="paper")
    x = wide()[0]
    loss = model(x).square().mean()
    loss.backward()
    weights = {name: p.detach() for name, p in model.named_parameters() if "lora_" in name}
    gradients = {name: p.grad for name, p in model.named_parameters() if "lora_B" in name}
    kind = type(model.module).__name__
    compiled = torch.compile(nn.parallel.DistributedDataParallel(toy()), backend="eager")
    assert same(facts(evatune.calibrate(compiled, wide()[rank::2], ALL)), found)
    return {
        "found": found,
        "refused": refused,
        "weights": weights,
        "gradients": gradients,
        "name": kind,
    }


def sharded(rank: int) -> Any:
    from torch.distributed.fsdp import fully_shard

    def shard(model: nn.Module, blocks: Any) -> nn.Module:
        for block in blocks:
            fully_shard(block)
        return fully_shard(model)

    plain = toy()
    shard(plain, plain.blocks)
    data = wide()[rank::2][: 3 if rank else 8]
    calibration = evatune.calibrate(plain, data, ALL)
    # The usual way on: an adapter on the model before it is sharded.
    fresh = get_peft_model(toy(), LoraConfig(r=4, target_modules="all-linear"))
    evatune.initialize(fresh, calibration, scale="paper")
    # In place, where the adapter is sharded already.
    adapted = get_peft_model(toy(), LoraConfig(r=4, target_modules="all-linear"))
    before = toy()(wide()[0])
    shard(adapted, adapted.base_model.model.blocks)
    refused = error_of(lambda: evatune.initialize(adapted, data, config=ALL))
    evatune.initialize(adapted, data, config=ALL, rho=1.0, scale="paper")
    with torch.no_grad():
        after = adapted.eval()(wide()[0])
    adapted(wide()[0]).square().mean().backward()
    weights = {n: p.full_tensor().detach() for n, p in adapted.named_parameters() if "lora_" in n}
    gradients = [
        p.grad.full_tensor().abs().sum() for n, p in adapted.named_parameters() if "lora_B" in n
    ]
    return {
        "found": facts(calibration),
        "refused": refused,
        "fresh": {name: p.detach() for name, p in fresh.named_parameters() if "lora_" in name},
        "weights": weights,
        "gradients": gradients,
        "moved": (toy().eval()(wide()[0]) - after).abs().max().detach(),
        "scale": before.abs().max().detach(),
    }


def in_fsdp1(rank: int) -> Any:
    """With the parameters as the module has them, which accelerate asks for, and with flat ones."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    def shard(model: nn.Module, as_they_are: bool = True) -> nn.Module:
        policy, cpu = ModuleWrapPolicy({Block}), torch.device("cpu")
        return FullyShardedDataParallel(
            model, auto_wrap_policy=policy, device_id=cpu, use_orig_params=as_they_are
        )

    data = wide()[rank::2][: 3 if rank else 8]
    adapted = shard(get_peft_model(toy(), LoraConfig(r=4, target_modules="all-linear")))
    refused = [
        error_of(partial(evatune.initialize, adapted, data, config=ALL, rho=rho))[1]
        for rho in (None, 1.0)
    ]
    return {
        "found": [
            facts(evatune.calibrate(shard(toy(), each), data, ALL)) for each in (True, False)
        ],
        "refused": refused,
    }


SCENARIOS: dict[str, Callable[[int], Any]] = {
    **{kind: together(kind) for kind in SETTINGS},
    **{
        scenario.__name__: scenario
        for scenario in (
            alone,
            gradients,
            regression,
            uneven,
            more_processes_than_batches,
            default_stop,
            experts,
            bad_rows,
            other_seed,
            other_targets,
            no_such_target,
            other_weights,
            other_model,
            other_alpha,
            split_by_tensor_parallelism,
            bound_within_a_step,
            no_data,
            no_data_at_all,
            failing_model,
            failing_at_the_end,
            rows_come_late,
            one_much_shorter,
            incremental,
            in_ddp,
            sharded,
            in_fsdp1,
        )
    },
}
