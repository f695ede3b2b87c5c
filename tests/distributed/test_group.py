"""Several processes calibrate together: two of them, over gloo, on one machine."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import evatune
from evatune import Calibration, CalibrationConfig, Status
from evatune.distributed import sketches as joint
from evatune.errors import AdapterError, ConfigError, LayerError, ProcessError
from evatune.sketch.spectrum import captured_energy
from tests.helpers import Block, Toy, inputs

torch.set_num_threads(1)

ALL = CalibrationConfig(rank=4, max_batches=16, tolerance=0)
SETTINGS = {
    "nystrom": ALL,
    "centred": CalibrationConfig(rank=4, max_batches=16, tolerance=0, center=True),
    "exact": CalibrationConfig(rank=4, max_batches=16, tolerance=0, sketch="exact"),
}


def wide(count: int = 16) -> list[Tensor]:
    return inputs(count, rows=128, d=64)


def toy() -> Toy:
    return Toy(64)


class Routed(nn.Module):
    """Even batches go through one layer, odd ones through the other; both feed a common one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.even, self.odd, self.common = (
            nn.Linear(16, 16),
            nn.Linear(16, 16),
            nn.Linear(16, 16),
        )
        self.beside = nn.Linear(16, 16)

    def forward(self, x: Tensor, number: int) -> Tensor:
        expert = self.odd if number % 2 else self.even
        y = expert(x)
        # Only in odd batches do these two have the same input.
        return self.common(x) + self.beside(x if number % 2 else y)


def routed() -> list[tuple[Tensor, int]]:
    return [(x, number) for number, x in enumerate(inputs(8))]


# -- what each process does; every function runs on both -------------------------------------------


def work(rank: int, folder: str) -> None:
    """Run every scenario and keep what it returns."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        torch.save(
            {name: scenario(rank) for name, scenario in SCENARIOS.items()}, f"{folder}/{rank}.pt"
        )
        dist.barrier()
    finally:
        dist.destroy_process_group()


def facts(calibration: Calibration) -> dict[str, Any]:
    return {
        "layers": {
            name: [
                s.directions,
                s.energies,
                s.mean,
                s.rows,
                s.total_energy,
                s.certificate and s.certificate.captured(),
            ]
            for name, s in calibration.spectra.items()
        },
        "status": {name: str(status) for name, status in calibration.status.items()},
        "inputs": {name: layer.input for name, layer in calibration.layers.items()},
        "bad": {
            name: [layer.first_bad_batch, layer.bad_process]
            for name, layer in calibration.layers.items()
        },
        "batches": calibration.batches,
        "processes": calibration.processes,
        "bytes": calibration.bytes_sent,
        "ranks": (
            calibration.allocate().ranks
            if all(status.usable for status in calibration.status.values())
            else None
        ),
    }


def error_of(work: Callable[[], Any]) -> list[str]:
    with pytest.raises(Exception) as caught:  # noqa: PT011 - the test looks at what it was
        work()
    return [caught.type.__name__, str(caught.value)]


def together(kind: str) -> Callable[[int], Any]:
    return lambda rank: facts(evatune.calibrate(toy(), wide()[rank::2], SETTINGS[kind]))


def alone(rank: int) -> Any:
    config = CalibrationConfig(rank=4, max_batches=16, tolerance=0, distributed=False)
    return facts(evatune.calibrate(toy(), wide()[rank::2], config))


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
    import evatune.adapters.initialize as writer

    original = writer.write_rows
    if rank == 1:
        writer.write_rows = _no_space
    try:
        model = get_peft_model(toy(), LoraConfig(r=4, target_modules=["q"]))
        return error_of(lambda: evatune.initialize(model, wide()[rank::2], config=ALL))
    finally:
        writer.write_rows = original


def _no_space(*_: Any, **__: Any) -> None:
    raise MemoryError("no space left")


def rows_come_late(rank: int) -> Any:
    """In the first turn no process has a row that counts."""
    data = wide()
    return facts(
        evatune.calibrate(toy(), data[rank::2], ALL, targets=["q", "down"], rows=_not_of(data[:2]))
    )


def _not_of(empty: list[Tensor]) -> Callable[[Tensor, Any, str], Tensor]:
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
    evatune.initialize(model, wide()[rank::2], config=ALL, rho=1.0)
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
    evatune.initialize(fresh, calibration)
    # In place, where the adapter is sharded already.
    adapted = get_peft_model(toy(), LoraConfig(r=4, target_modules="all-linear"))
    before = toy()(wide()[0])
    shard(adapted, adapted.base_model.model.blocks)
    refused = error_of(lambda: evatune.initialize(adapted, data, config=ALL))
    evatune.initialize(adapted, data, config=ALL, rho=1.0)
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


def spawn(target: Callable[[int, str], None], folder: Path, count: int = 2) -> list[int | None]:
    """Exit codes of `count` processes."""
    context = torch.multiprocessing.get_context("spawn")
    processes = [context.Process(target=target, args=(rank, str(folder))) for rank in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=240)
        if process.is_alive():
            process.kill()
    return [process.exitcode for process in processes]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("processes")
    assert spawn(work, folder) == [0, 0]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


# -- what must have come out -----------------------------------------------------------------------


def same(a: Any, b: Any) -> bool:
    """Whether nested values are equal, tensors bit for bit."""
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a if key != "bytes")
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@pytest.mark.parametrize(
    "name", [*SETTINGS, "uneven", "more_processes_than_batches", "default_stop", "experts"]
)
def test_both_processes_end_with_the_same_record_bit_for_bit(
    both: list[dict[str, Any]], name: str
) -> None:
    assert same(both[0][name], both[1][name])
    assert both[0][name]["processes"] == 2


@pytest.mark.parametrize("kind", SETTINGS)
def test_they_find_what_one_process_finds_on_the_same_batches(
    both: list[dict[str, Any]], kind: str
) -> None:
    seen: dict[str, list[Tensor]] = {}
    model = toy().eval()
    names = list(both[0][kind]["layers"])
    for name in names:

        def hook(module: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
            seen.setdefault(name, []).append(args[0].detach().flatten(0, 1))

        model.get_submodule(name).register_forward_pre_hook(hook)
    for batch in wide():
        model(batch)
    one = evatune.calibrate(toy(), wide(), SETTINGS[kind])
    for name in names:
        directions, energies, mean, rows, total, certificate = both[0][kind]["layers"][name]
        spectrum = one.spectra[name]
        x = torch.cat(seen[name])
        x = x - x.mean(0) if kind == "centred" else x
        # The stated tolerance: of the energy that one process captures, two lose less than a
        # thousandth.
        ours, theirs = captured_energy(directions, x), captured_energy(spectrum.directions, x)
        assert ours > theirs * (1 - (1e-6 if kind == "exact" else 1e-3)), name
        assert energies.sum() > spectrum.energies.sum() * (1 - 1e-2)
        assert rows == spectrum.rows == 16 * 128
        assert total == pytest.approx(spectrum.total_energy, rel=1e-6)
        assert torch.allclose(mean, spectrum.mean, atol=1e-5)
        assert certificate == pytest.approx(spectrum.certificate.captured(), abs=0.02)
    assert both[0][kind]["batches"] == one.batches == 16
    assert both[0][kind]["status"] == one.status
    assert both[0][kind]["inputs"] == {name: layer.input for name, layer in one.layers.items()}


def test_without_distributed_each_works_for_itself(both: list[dict[str, Any]]) -> None:
    own = evatune.calibrate(
        toy(),
        wide()[1::2],
        CalibrationConfig(rank=4, max_batches=16, tolerance=0, distributed=False),
    )
    assert same(both[1]["alone"], facts(own))
    assert both[0]["alone"]["bytes"] == 0


def test_a_process_whose_data_ends_first_waits_for_the_others(both: list[dict[str, Any]]) -> None:
    found = both[0]["uneven"]
    assert found["batches"] == 9
    assert {layer[3] for layer in found["layers"].values()} == {9 * 128}
    assert set(found["status"].values()) == {Status.DATA_EXHAUSTED}


def test_data_that_only_some_have_more_of_is_not_exhausted(both: list[dict[str, Any]]) -> None:
    found = both[0]["one_much_shorter"]
    assert found["batches"] == 8 + 1  # eight turns for two processes
    assert set(found["status"].values()) == {Status.MAX_BATCHES}


def test_layers_whose_first_rows_come_late_have_one_basis_too(both: list[dict[str, Any]]) -> None:
    assert same(both[0]["rows_come_late"], both[1]["rows_come_late"])
    one = evatune.calibrate(toy(), wide(), ALL, targets=["q", "down"], rows=_not_of(wide()[:2]))
    for name, (_, energies, _, rows, total, certificate) in both[0]["rows_come_late"][
        "layers"
    ].items():
        spectrum = one.spectra[name]
        assert rows == spectrum.rows == 14 * 128
        assert total == pytest.approx(spectrum.total_energy, rel=1e-6)
        assert energies.sum() > spectrum.energies.sum() * (1 - 1e-2)
        assert certificate == pytest.approx(spectrum.certificate.captured(), abs=0.02)


def test_every_process_has_a_turn_whatever_max_batches(both: list[dict[str, Any]]) -> None:
    assert both[0]["more_processes_than_batches"]["batches"] == 2


def test_all_stop_together_when_the_directions_have_settled(both: list[dict[str, Any]]) -> None:
    found = both[0]["default_stop"]
    assert found["batches"] in (4, 8, 16, 32)
    assert Status.CONVERGED in found["status"].values()


def test_layers_that_only_one_process_calls_are_everywhere_in_the_end(
    both: list[dict[str, Any]],
) -> None:
    found = both[0]["experts"]
    rows = {name: layer[3] for name, layer in found["layers"].items()}
    assert rows == {"even": 4 * 64, "odd": 4 * 64, "common": 8 * 64, "beside": 8 * 64}
    assert len(set(found["inputs"].values())) == 4  # equal on one process, but not on the other
    one = evatune.calibrate(Routed(), routed(), CalibrationConfig(rank=2, tolerance=0))
    for name, (_, energies, _, _, total, _) in found["layers"].items():
        assert total == pytest.approx(one.spectra[name].total_energy, rel=1e-6)
        assert torch.allclose(energies, one.spectra[name].energies, rtol=0.02)


def test_a_nan_is_named_with_its_layer_batch_and_process_on_every_process(
    both: list[dict[str, Any]],
) -> None:
    for found in both:
        assert found["bad_rows"]["found"]["status"]["blocks.0.q"] == Status.NON_FINITE
        assert found["bad_rows"]["found"]["bad"]["blocks.0.q"] == [6, 1]
        kind, message = found["bad_rows"]["error"]
        assert kind == LayerError.__name__
        assert "blocks.0.q (first in batch 6 on process 1)" in message


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("other_seed", "config seed is 0 on process 0 and 1 on process 1"),
        ("other_targets", "only process 0 has layers blocks.0.down"),
        ("other_weights", "weights blocks.1.down.weight is "),
        ("other_model", "model is Sequential on process 0 and Toy on process 1"),
    ],
)
def test_different_work_is_refused_on_every_process(
    both: list[dict[str, Any]], name: str, says: str
) -> None:
    for found in both:
        kind, message = found[name]
        assert kind == ProcessError.__name__
        assert says in message


def test_a_process_without_data_is_named_on_every_process(both: list[dict[str, Any]]) -> None:
    for found in both:
        assert found["no_data"][0] == "DataError"
        assert "process 1 of 2 got not one batch" in found["no_data"][1]
        assert found["no_data_at_all"][0] == "NoBatchError"
        assert "not one batch came" in found["no_data_at_all"][1]


def test_the_error_of_one_process_is_told_to_the_others(both: list[dict[str, Any]]) -> None:
    assert both[1]["failing_model"] == ["ArithmeticError", "of all things"]
    kind, message = both[0]["failing_model"]
    assert kind == ProcessError.__name__
    assert "process 1 of 2 stopped, and so do all: ArithmeticError: of all things" in message
    assert both[1]["failing_at_the_end"] == ["MemoryError", "no space left"]
    assert "process 1 of 2 stopped, and so do all: MemoryError" in both[0]["failing_at_the_end"][1]
    assert both[1]["no_such_target"][0] == "TargetError"
    assert (
        "process 1 of 2 stopped, and so do all: TargetError: targets ['nothing']"
        in both[0]["no_such_target"][1]
    )


def test_what_does_not_add_up_is_refused(both: list[dict[str, Any]]) -> None:
    assert both[0]["incremental"][0] == ConfigError.__name__
    assert "Calibration.merge" in both[0]["incremental"][1]


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


def test_fsdp1_is_calibrated_like_fsdp2_and_not_written_to(both: list[dict[str, Any]]) -> None:
    for process in both:
        for found in process["in_fsdp1"]["found"]:
            assert same(found, both[0]["sharded"]["found"])
        for message in process["in_fsdp1"]["refused"]:
            assert "in shards already" in message
            assert "rho=1" not in message


def dying(rank: int, folder: str) -> None:
    """Process 1 of three vanishes in its third batch; the others must say so, and soon."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=3)

    def forward(model: nn.Module, batch: Tensor) -> Tensor:
        if rank == 1 and torch.equal(batch, wide()[7]):
            os.kill(os.getpid(), signal.SIGKILL)
        return model(batch)

    try:
        evatune.calibrate(toy(), wide()[rank::3], ALL, forward=forward)
    except ProcessError as error:
        Path(folder, f"{rank}.txt").write_text(str(error))
    os._exit(0)  # without the orderly end, for which the lost one would be needed


def test_a_process_that_dies_is_named_by_the_others(tmp_path: Path) -> None:
    assert spawn(dying, tmp_path, 3) == [0, -signal.SIGKILL, 0]
    for rank in (0, 2):
        assert "lost process 1 of 3" in (tmp_path / f"{rank}.txt").read_text()


def failing_between(rank: int, folder: str) -> None:
    """Process 1 fails between two messages of an exchange, where it has no turn to say so, and
    lives on."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    if rank == 1:
        joint.refresh_all = _no_space
    said = error_of(lambda: evatune.calibrate(toy(), wide()[rank::2], ALL))
    Path(folder, f"{rank}.txt").write_text(": ".join(said))
    end = time.monotonic() + 60
    while not Path(folder, "0.txt").exists() and time.monotonic() < end:
        time.sleep(0.1)
    # Without the orderly end, for which both would be needed; 1 if process 0 would have waited for
    # the end of this one.
    os._exit(0 if Path(folder, "0.txt").exists() else 1)


def test_a_failure_between_two_messages_ends_all(tmp_path: Path) -> None:
    assert spawn(failing_between, tmp_path) == [0, 0]
    assert (tmp_path / "1.txt").read_text() == "MemoryError: no space left"
    said = (tmp_path / "0.txt").read_text()
    assert said.startswith("ProcessError")
    assert "stopped in the middle of a message" in said or "lost process 1 of 2" in said


def absent(rank: int, folder: str) -> None:
    """Process 1 works alone at first and then comes; process 2 never does."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=3)
    if rank == 1:
        evatune.calibrate(toy(), wide(4), CalibrationConfig(rank=4, tolerance=0, distributed=False))
    if rank < 2:
        said = error_of(
            lambda: evatune.calibrate(toy(), wide(), replace(ALL, rendezvous_timeout=3))
        )
        Path(folder, f"{rank}.txt").write_text(": ".join(said))
    end = time.monotonic() + 60
    while len(list(Path(folder).glob("?.txt"))) < 2 and time.monotonic() < end:
        time.sleep(0.1)
    os._exit(0)


def test_processes_that_never_come_are_named_after_the_seconds_that_the_option_gives(
    tmp_path: Path,
) -> None:
    assert spawn(absent, tmp_path, 3) == [0, 0, 0]
    for rank in (0, 1):
        said = (tmp_path / f"{rank}.txt").read_text()
        assert said.startswith(
            "ProcessError: process 2 of 3 did not come to calibrate within 3 seconds; call"
            " evatune on"
        )
        assert "rendezvous_timeout" in said


@pytest.mark.parametrize("seconds", [0, -1.0, float("inf"), float("nan"), "10", True])
def test_a_time_to_come_is_a_finite_number_of_seconds(seconds: Any) -> None:
    with pytest.raises(ConfigError, match="rendezvous_timeout"):
        CalibrationConfig(rendezvous_timeout=seconds)
