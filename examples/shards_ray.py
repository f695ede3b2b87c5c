"""Map and reduce: two workers calibrate MiniLM on their own shard of BBC news, and the records are
joined.

    pip install 'evatune[demo,ray]'
    python examples/shards_ray.py

The map step is a plain function from a shard of the data to a file, so Slurm, Kubernetes or a shell
loop do as well as Ray; the reduce step needs the files only, and is also
`evatune merge shards/shard-*.safetensors -o all.safetensors`. What it leaves starts an adapter:
`evatune.initialize(peft_model, Calibration.load("shards/calibration.safetensors"))`.

On a cluster, three things change. `ray.init` finds it by the address in RAY_ADDRESS, and two lines
go away: `num_cpus=WORKERS`, and the one above `import ray`, which keeps a Ray on this machine from
listening to others. `--out` names a folder that every machine can write to. With GPUs,
`@ray.remote(num_gpus=1)` and `load_model(..., device="cuda")`. Shards need not be equal: the
records know how many rows they rest on.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

# As on a Mac: Ray listens on the loopback address only.
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")

import ray

WORKERS = 2
BATCH, LENGTH = 16, 128


@ray.remote(num_cpus=1, runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}})
def calibrate_shard(shard: int, batches: int, out: Path) -> Path:
    """Calibrate on every WORKERS-th text from number `shard` on, and save."""
    # Imports and the model belong to the worker: what travels to it is three small arguments.
    import evatune
    from evatune.loading.batches import TextBatches
    from evatune.loading.demo import demo_data, demo_model
    from evatune.loading.models import load_model
    from evatune.loading.texts import load_texts

    texts = load_texts(demo_data()).shard(WORKERS, shard, contiguous=False)
    loaded = load_model(demo_model(), device="cpu")
    # One seed for all: shards whose sketches start alike differ by their data only.
    config = evatune.CalibrationConfig(rank=16, rho=2.0, max_batches=batches, seed=0)
    calibration = evatune.calibrate(
        loaded.model, TextBatches(loaded.tokenizer, texts, BATCH, LENGTH, 0), config
    )
    path = out / f"shard-{shard}.safetensors"
    calibration.save(path)
    return path


def main() -> None:
    """Map, then reduce."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batches", type=int, default=8, help="forward passes per worker at most")
    parser.add_argument("--out", type=Path, default=Path("shards"), help="folder for the records")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)

    ray.init(num_cpus=WORKERS, include_dashboard=False, log_to_driver=False)
    try:
        shards = [calibrate_shard.remote(shard, arguments.batches, out) for shard in range(WORKERS)]
        paths = ray.get(shards)
    finally:
        ray.shutdown()

    from evatune import Calibration

    merged = Calibration.merge([Calibration.load(path) for path in paths])
    merged.save(out / "calibration.safetensors")
    plan = merged.allocate()
    rows = max(spectrum.rows for spectrum in merged.spectra.values())
    print(
        f"{len(paths)} shards, {merged.batches} batches, {rows:,} rows, {sum(plan.ranks.values())}"
        f" ranks: {out}"
    )


if __name__ == "__main__":
    main()
