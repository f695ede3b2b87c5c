"""The options of `evatune compare`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from evatune.cli.options import TRUST_HELP, argument, option, recipe_names

TEST_SEEDS = "10,11,12,13,14"


@dataclass(frozen=True)
class CompareOptions:
    """Arguments and options of `evatune compare`, in the order in which `--help` lists them."""

    recipes: list[str] = argument(
        help="Recipes of ours, patterns of their names such as 'images-*', or YAML files; with"
        " settings that replace theirs, such as training.steps=100.",
        autocompletion=recipe_names,
    )
    methods: str = option(default="lora,eva", help="Methods, with commas between.")
    seeds: str = option(
        default="0,1,2", help="Seeds, with commas between; with --tune, to tune with."
    )
    lrs: str = option(
        default="", help="Learning rates, with commas between. Default: the recipe's."
    )
    tune: bool = option(
        "--tune",
        default=False,
        help="Search each method's learning rate around the recipe's on validation examples"
        " (data.validation), then test it with other seeds.",
    )
    test_seeds: str | None = option(
        default=None, help=f"With --tune: seeds to test with. Default: {TEST_SEEDS}."
    )
    workers: int | None = option(
        default=None, help="Runs at a time, of one thread each. Default: one per core.", least=1
    )
    executor: str = option(
        default="process", help="process, or ray: a cluster (RAY_ADDRESS), else this machine."
    )
    target_loss: float | None = option(
        default=None,
        help="Evaluation loss to reach. Default: what every seed of the first method reached.",
    )
    trust_remote_code: bool = option("--trust-remote-code", default=False, help=TRUST_HELP)
    out: Path | None = option(
        "--out", "-o", default=None, help="Folder. Default: runs/compare-RECIPE, or -DOMAIN."
    )
    as_json: bool = option("--json", default=False, help="Print one JSON object.")
