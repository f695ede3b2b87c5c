"""The scripts for clusters, with stand-ins for the commands of a cluster."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from evatune.finetune.methods import find_method
from evatune.finetune.recipe_files import expand, load

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "cluster"
SETTINGS = ["method=eva", "training.batch_size=16", "training.accumulate=2"]
ARGUMENTS = ["paper-commonsense", *SETTINGS, "--out", "/shared/run"]


def said_by(script: str, folder: Path, **environment: str) -> list[str]:
    """Return the words with which a script would start its program."""
    for name, does in {
        "torchrun": 'printf "%s\\n" torchrun "$@"',
        "srun": 'shift 2; exec "$@"',  # after the number of processors
        "scontrol": "printf 'node%s\\n' 7 8",
    }.items():
        command = folder / name
        command.write_text(f"#!/bin/sh\n{does}\n")
        command.chmod(0o755)
    done = subprocess.run(
        ["sh", FOLDER / script, *ARGUMENTS],
        env=os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"} | environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return done.stdout.splitlines()


def test_one_machine_starts_a_process_for_each_gpu(tmp_path: Path) -> None:
    expected = ["torchrun", "--standalone", "--nproc-per-node", "4", "-m", "evatune", "train"]
    assert said_by("one_machine.sh", tmp_path, GPUS="4") == [*expected, *ARGUMENTS]


def test_slurm_starts_them_on_all_machines_which_meet_at_the_first(tmp_path: Path) -> None:
    slurm = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "11"}
    words = said_by("slurm.sh", tmp_path, **slurm)
    options = dict(zip(words[1:11:2], words[2:11:2], strict=True))
    assert options == {
        "--nnodes": "2",
        "--nproc-per-node": "8",
        "--rdzv-backend": "c10d",
        "--rdzv-id": "11",
        "--rdzv-endpoint": "node7:29500",
    }
    assert words[11:] == ["-m", "evatune", "train", *ARGUMENTS]
    asked, usual = (load(ARGUMENTS[0], more).training for more in (SETTINGS, []))
    assert asked.batch_size * asked.accumulate == usual.batch_size * usual.accumulate


def test_the_job_for_kubernetes_compares_recipes_that_are_there() -> None:
    job = yaml.safe_load((FOLDER / "ray_job.yaml").read_text())["spec"]
    words = shlex.split(job["entrypoint"])
    assert words[:2] == ["evatune", "compare"]
    assert len(expand([words[2]])) == 19
    for name in words[words.index("--methods") + 1].split(","):
        find_method(name)
    (workers,) = job["rayClusterSpec"]["workerGroupSpecs"]
    (container,) = workers["template"]["spec"]["containers"]
    gpus = int(container["resources"]["limits"]["nvidia.com/gpu"]) * workers["replicas"]
    assert int(words[words.index("--workers") + 1]) == gpus


@pytest.mark.parametrize("name", ["one_machine.sh", "slurm.sh", "ray_job.yaml"])
def test_the_page_has_the_files_as_they_are(name: str) -> None:
    assert (FOLDER / name).read_text() in (ROOT / "docs" / "cluster.md").read_text()
