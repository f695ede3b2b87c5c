"""Calls as tasks of Ray, answered like those of `workers`."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable
from itertools import count
from typing import Any

from evatune.finetune.comparison.workers import Answer, Call
from evatune.utils.extras import extras


def run_calls_on_ray(
    function: Callable[..., Any],
    calls: Iterable[Call | None],
    workers: int,
) -> Generator[Answer]:
    """Yield an answer to each call, in the order in which they end.

    Each call has one CPU, one thread of OpenMP, and a GPU where Ray has any. When the iterator is
    closed, the other calls are cancelled.

    Args:
        function: raises nothing.
        calls: taken until None comes, and again after every answer; see `run_calls`.
        workers: CPUs of a Ray that is started here: where RAY_ADDRESS names no cluster.

    Raises:
        MissingExtraError: Ray is not installed.
    """
    cluster = _cluster_options(workers)
    if cluster:
        # Read when Ray is imported: as on a Mac, it then listens on the loopback address alone.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    with extras("executor 'ray'"):
        import ray
    started_here = not ray.is_initialized()
    numbers: dict[Any, int] = {}  # future → number of the call
    try:
        if started_here:
            ray.init(
                log_to_driver=False, include_dashboard=False, configure_logging=False, **cluster
            )
        environment = {"env_vars": {"OMP_NUM_THREADS": "1"}}
        gpus = 1 if ray.cluster_resources().get("GPU") else 0
        task = ray.remote(num_cpus=1, num_gpus=gpus, runtime_env=environment)(function)
        waiting, counted = iter(calls), count()
        while True:
            while (call := next(waiting, None)) is not None:
                numbers[task.remote(*call)] = next(counted)
            if not numbers:
                return
            (done,), _ = ray.wait(list(numbers), num_returns=1)
            number = numbers.pop(done)
            try:
                answer = Answer(number, ray.get(done))
            except ray.exceptions.RayError:
                answer = Answer(number, died=True)
            yield answer
    finally:
        for future in numbers:
            ray.cancel(future, force=True)
        if started_here:
            ray.shutdown()


def _cluster_options(workers: int) -> dict[str, Any]:
    """Return the options of a Ray that is started here; none where RAY_ADDRESS names a cluster."""
    if os.environ.get("RAY_ADDRESS", "") in ("", "local"):
        return {"address": "local", "num_cpus": max(1, workers)}
    return {}
