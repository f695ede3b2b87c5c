"""Files that are read: what is damaged or contradicts itself is refused in one sentence, before it
does anything."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import random
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import evatune
from evatune import Calibration, CalibrationConfig
from evatune.adapters.export import export_uniform
from evatune.adapters.saved import adapter_rows
from evatune.calibration.checkpoint import Checkpoint
from evatune.calibration.result import CalibratedLayer
from evatune.errors import ConfigError, RecordError
from evatune.finetune.compare import Run
from evatune.finetune.metrics import read_metrics
from evatune.finetune.recipe import load
from evatune.finetune.resuming import newest_whole
from evatune.finetune.run import run
from evatune.finetune.summary import summarize
from evatune.layers import LayerSpec
from evatune.ranks.allocation import RankPlan
from evatune.schemas import Damage, record
from evatune.schemas.tensors import read_header, read_tensors
from evatune.schemas.text import parse_json, parse_yaml
from tests.conftest import Command, refused
from tests.helpers import Toy, inputs

DATA = Path(__file__).parents[1] / "data"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        name, Path(__file__).parents[2] / "scripts" / f"{name}.py"
    )
    assert spec is not None
    assert spec.loader is not None
    # dataclasses look themselves up there
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


fuzz = script("fuzz")


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    return evatune.calibrate(Toy(), inputs(), CalibrationConfig(rank=4))


def contents(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    header = json.loads(path.read_bytes()[8:][: int.from_bytes(path.read_bytes()[:8], "little")])
    return load_file(path), json.loads(header["__metadata__"]["record"])


def load_changed(calibration: Calibration, folder: Path, change: Any) -> Calibration:
    """The calibration as a file of the format without a checksum, changed before it is read
    again."""
    path = folder / "c.safetensors"
    calibration.save(path)
    tensors, tree = contents(path)
    change(tensors, tree)
    save_file(
        tensors, path, metadata={"format": "evatune-calibration-1", "record": json.dumps(tree)}
    )
    return Calibration.load(path)


# -- calibrations ----------------------------------------------------------------------------------


def test_files_of_the_first_format_are_read() -> None:
    unsupported = Calibration.load(DATA / "calibration-1.safetensors")
    assert list(unsupported.status.values()) == [
        "data_exhausted",
        "no_signal",
        "non_finite",
        "too_few_rows",
        "never_called",
    ]
    assert unsupported.layers["nan"].first_bad_batch == 3
    centered = Calibration.load(DATA / "calibration-1-centered.safetensors")
    assert centered.config.center
    assert set(centered.allocate().ranks) == set(centered.layers)


def test_what_is_saved_and_unchanged_is_read(calibration: Calibration, tmp_path: Path) -> None:
    assert load_changed(calibration, tmp_path, lambda *_: None).layers == calibration.layers


FACTS: list[tuple[str, Any]] = [
    ("batches", -5),
    ("batches", 1.5),
    ("batches", "4"),
    ("batches", None),
    ("batches", 10**20),
    ("batches", True),
    ("processes", 0),
    ("processes", "2"),
    ("bytes_sent", -1),
    ("versions", ["x"]),
    ("model", 5),
    ("surprise", 1),
    ("inputs.0.total_energy", -1.0),
    ("inputs.0.total_energy", float("nan")),
    ("inputs.0.total_energy", 1e-9),
    ("inputs.0.rows", 0),
    ("inputs.0.rows", 2.5),
    ("inputs.0.fresh_rows", 10**6),
    ("inputs.0.fresh_rows", None),
    ("inputs.0.fresh_total_energy", 1e-9),
    ("inputs.0.fresh_total_energy", 1e9),
    ("inputs.0.more", 1),
    ("inputs.7", {"total_energy": 1.0, "rows": 3}),
    ("config.rank", 0),
    ("config.rank", "4"),
    ("config.seed", 2**63),
    ("config.sketch", "best"),
    ("config.tolerance", float("inf")),
    ("config.components", 1),
    ("layers.blocks/0/q.in_features", 8),
    ("layers.blocks/0/q.in_features", 10**12),
    ("layers.blocks/0/q.out_features", 0),
    ("layers.blocks/0/q.input", 77),
    ("layers.blocks/0/q.input", None),
    ("layers.blocks/0/q.status", "fine"),
    ("layers.blocks/0/q.status", "never_called"),
    ("layers.blocks/0/q.first_bad_batch", 2),
    ("layers.blocks/0/q.bad_process", 0),
    ("layers.blocks/0/q.groups", 0),
    ("layers.blocks/0/q.cap", 1.5),
    ("layers.blocks/0/q.unit", None),
]


@pytest.mark.parametrize(("key", "value"), FACTS, ids=[f"{key}={value}" for key, value in FACTS])
def test_a_record_that_contradicts_itself_is_refused(
    key: str, value: Any, calibration: Calibration, tmp_path: Path
) -> None:
    def change(_: Any, tree: dict[str, Any]) -> None:
        *parents, last = (part.replace("/", ".") for part in key.split("."))
        for parent in parents:
            tree = tree[parent]
        tree[last] = value

    with pytest.raises(
        RecordError, match=r"c\.safetensors.* its record is damaged: it [^\n]+; give the"
    ):
        load_changed(calibration, tmp_path, change)


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("energies", lambda x: -x, "energies are negative or rise"),
        ("energies", lambda x: x.flip(0), "energies are negative or rise"),
        ("energies", lambda x: x * 1.5, "energies are more than the total"),
        ("energies", lambda x: x.half(), "of another type"),
        ("energies", lambda x: x[:-1], "do not fit each other"),
        ("directions", lambda x: x * 1.01, "not orthonormal"),
        ("directions", lambda x: x[[0, *range(len(x) - 1)]], "not orthonormal"),
        ("directions", lambda x: x * float("nan"), "NaN"),
        ("directions", lambda x: torch.zeros(10**9, 0), "do not fit each other"),
        ("mean", lambda x: x + 10, "the mean has more energy"),
        ("fresh_energies", lambda x: x * 3, "more than the total"),
        ("fresh_energies", lambda x: torch.cat([x, x, x, x]), "an energy per component"),
        ("more", lambda x: torch.zeros(3), "what the tensor '0.more' is"),
    ],
)
def test_tensors_that_no_sketch_could_have_found_are_refused(
    name: str, change: Any, reason: str, calibration: Calibration, tmp_path: Path
) -> None:
    def edit(tensors: dict[str, torch.Tensor], _: Any) -> None:
        key = f"0.{name}"
        tensors[key] = change(tensors.get(key)).contiguous()

    with pytest.raises(RecordError, match=reason):
        load_changed(calibration, tmp_path, edit)


@pytest.mark.parametrize("sketch", ["nystrom", "exact", "incremental"])
@pytest.mark.parametrize("center", [False, True])
def test_steep_spectra_beside_a_large_mean_contradict_nothing(sketch: str, center: bool) -> None:
    batches = [x * 0.1 ** torch.arange(16) + torch.eye(16)[0] * 1e4 for x in inputs(8)]
    found = evatune.calibrate(
        Toy(), batches, CalibrationConfig(rank=4, sketch=sketch, center=center, tolerance=0)
    )
    for name, spectrum in found.spectra.items():
        assert list(spectrum.contradictions(found.config.kept)) == [], name


@pytest.mark.parametrize("kind", ["calibration", "checkpoint"])
def test_no_flipped_bit_passes(kind: str, calibration: Calibration, tmp_path: Path) -> None:
    path, source = tmp_path / "file", random.Random(0)
    if kind == "calibration":
        calibration.save(path)
    else:
        evatune.calibrate(
            Toy(), inputs(), CalibrationConfig(rank=4), checkpoint=Checkpoint(path, every=1)
        )
    good = path.read_bytes()
    for _ in range(120):
        place = source.randrange(8 * len(good))
        raw = bytearray(good)
        raw[place // 8] ^= 1 << place % 8
        path.write_bytes(raw)
        with pytest.raises(RecordError, match=r"damaged|does not fit|format|read at most"):
            (
                Calibration.load(path)
                if kind == "calibration"
                else Checkpoint(path, resume=True).read({})
            )


def test_a_checksum_cannot_be_left_out(calibration: Calibration, tmp_path: Path) -> None:
    calibration.save(tmp_path / "c")
    tensors, tree = contents(tmp_path / "c")
    for metadata in (
        {"format": "evatune-calibration-2"},
        {"format": "evatune-calibration-1", "sha256": "0" * 64},
    ):
        save_file(tensors, tmp_path / "c", metadata=metadata | {"record": json.dumps(tree)})
        with pytest.raises(RecordError, match="damaged"):
            Calibration.load(tmp_path / "c")


def test_the_schemas_know_every_field_that_is_written() -> None:
    def fields(kind: type) -> set[str]:
        return {field.name for field in dataclasses.fields(kind)}

    layer = fields(CalibratedLayer) | fields(LayerSpec) | {"status"}
    assert record.LayerRecord.model_fields.keys() == layer - {"spec", "name"}
    assert record.PlanRecord.model_fields.keys() == fields(RankPlan)


# -- containers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"shape": [10**12]}, "not its size"),
        ({"shape": [2**40, 2**40]}, "not its size"),
        ({"shape": [-4]}, "greater than or equal to 0"),
        ({"shape": [4.0]}, "valid integer"),
        ({"data_offsets": [0, 10**13]}, "not its size"),
        ({"data_offsets": [16, 0]}, "not its size"),
        ({"dtype": "F64"}, "not its size"),
        ({"dtype": "Q1"}, "names the type 'Q1'"),
        ({"more": 1}, "unknown"),
    ],
)
def test_a_header_is_held_against_the_file_before_anything_is_allocated(
    entry: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    header = json.dumps(
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} | entry}
    ).encode()
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    for read in (read_header, read_tensors):
        with pytest.raises(Damage, match=reason):
            read(tmp_path / "x")


@pytest.mark.parametrize(
    "text",
    [
        "[" * 10_000,
        '{"a":' * 5000 + "1" + "}" * 5000,
        "[" * 40 + "]" * 40,
        "1" * 4301,
        "1." + "3" * 5000,
        '{"a": 1, "a": 2}',
        '{"a": {"b": 1, "b": 1}}',
        "",
        "{",
        "{} {}",
    ],
)
def test_json_without_bounds_is_refused(text: str) -> None:
    with pytest.raises(Damage, match=r"^holds [^\n]{1,200}$"):
        parse_json(text)


LAUGHS = "a: &a [x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "text",
    [
        LAUGHS,
        "a: &a [*a]",
        "a: !!binary aGk=",
        "a: !!python/object/apply:os.getcwd []",
        "a: 1\na: 2",
        "[" * 10_000,
        "- " * 3000,
        "a: " + "1" * 5000,
        "a: " + "x" * 70_000,
        "1: a",
        "? [a]\n: b",
        "a: 2020-13-45",
        "a: [",
        "--- a\n--- b",
    ],
)
def test_yaml_that_json_could_not_say_is_refused(text: str) -> None:
    begun = time.monotonic()
    with pytest.raises(Damage, match=r"^(is|holds) [^\n]{1,400}$"):
        parse_yaml(text)
    assert time.monotonic() - begun < 5


# -- adapters --------------------------------------------------------------------------------------


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    targets = ["q", "k", "down"]
    config = LoraConfig(
        r=4, target_modules=targets, rank_pattern={r".*\.q": 2}, alpha_pattern={"blocks.0.k": 3}
    )
    get_peft_model(Toy(), config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_ordinary_patterns_keep_the_meaning_that_peft_gives_them(adapter: Path) -> None:
    found = {
        row["layer"]: (row["rank"], row["alpha"])
        for row in adapter_rows(adapter / "adapter_model.safetensors")
    }
    assert (found["blocks.0.q"], found["blocks.0.k"], found["blocks.1.k"]) == (
        (2, 8),
        (4, 3),
        (4, 8),
    )
    change_config(adapter, rank_pattern={r"(?:.*\.)?(blocks\.[01]\.q|nothing|more)+": 2})
    assert adapter_rows(adapter / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        *(({"r": r}, "'r' is") for r in (0, -1, "4", None, [], True, 1.5)),
        ({"lora_alpha": 0}, "'lora_alpha'"),
        ({"lora_alpha": float("nan")}, "'lora_alpha'"),
        ({"use_rslora": "no"}, "'use_rslora'"),
        ({"rank_pattern": {"q": 0}}, "rank_pattern.q"),
        ({"rank_pattern": [1]}, "rank_pattern"),
        ({"alpha_pattern": {"q": "8"}}, "alpha_pattern.q"),
        ({"bias": "some"}, "'bias'"),
        ({"r": 7}, "says 7"),
        ({"rank_pattern": {"[": 2}}, "no regular expression"),
        ({"rank_patern": {}}, "'rank_patern'"),
        ({"eva_config": 5}, "is damaged"),
        ({"target_modules": 5}, "target_modules"),
    ],
)
def test_what_a_config_cannot_mean_is_refused_by_inspect_and_export(
    changes: dict[str, Any], part: str, adapter: Path, command: Command
) -> None:
    change_config(adapter, **changes)
    refused(command("inspect", adapter), part)
    refused(
        command("export", adapter, "-o", adapter.parent / "out"),
        part,
        folder=adapter.parent,
        left=frozenset({"adapter"}),
    )


@pytest.mark.parametrize(
    "pattern", ["(.*)*b", "(a|a|[a-z.0-9_]+)+!", ".*.*.*.*.*.*.*.*.*.*.*.*.*!"]
)
def test_a_pattern_that_never_ends_is_refused(
    pattern: str, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evatune.schemas.adapter._TRIAL_SECONDS", 0.5)
    state = load_file(adapter / "adapter_model.safetensors")
    long = {
        key.replace("blocks", "blocks_of_a_model_with_a_rather_long_name"): value
        for key, value in state.items()
    }
    save_file(long, adapter / "adapter_model.safetensors")
    change_config(adapter, rank_pattern={"q": 2}, alpha_pattern={pattern: 4})
    for read in (
        lambda: adapter_rows(adapter / "adapter_model.safetensors"),
        lambda: export_uniform(adapter, adapter / "out"),
    ):
        with pytest.raises(
            RecordError, match=r"cannot be matched .* within 0\.5 s.*write the names"
        ):
            read()


@pytest.mark.parametrize("how", ["no bytes", "no B", "vector", "whole numbers", "giant"])
def test_matrices_that_are_none_are_refused(how: str, adapter: Path, command: Command) -> None:
    path = adapter / "adapter_model.safetensors"
    state = load_file(path)
    a = next(key for key in state if "0.k.lora_A" in key)
    if how == "no bytes":
        state |= {a: torch.zeros(10**9, 0), a.replace("_A", "_B"): torch.zeros(0, 10**9)}
    elif how == "no B":
        del state[a.replace("_A", "_B")]
    elif how == "giant":
        state |= {a: torch.ones(5000, 1), a.replace("_A", "_B"): torch.ones(1, 5000)}
        change_config(adapter, rank_pattern={r".*\.q": 2, "0.k": 5000})
    else:
        state[a] = torch.ones(4) if how == "vector" else torch.ones(4, 16, dtype=torch.int64)
    save_file(state, path)
    refused(
        command("export", adapter, "-o", adapter.parent / "out"),
        folder=adapter.parent,
        left=frozenset({"adapter"}),
    )


# -- recipes and runs ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "override",
    [
        "training.learning_rate=.inf",
        "training.learning_rate=.nan",
        "training.steps=true",
        "training.steps=1e18",
        "training.steps=2.5",
        "adapter.rank=1e9",
        "adapter.alpha=.inf",
        "seed=true",
        "data.train=-1",
        "training.warmup=.nan",
        "task=5",
        "data.columns=[1]",
    ],
)
def test_settings_out_of_bounds_are_refused(override: str) -> None:
    with pytest.raises(ConfigError, match=f"{override.partition('=')[0]}[^\n]* is "):
        load("understanding-bbc", [override])


def test_whole_numbers_may_be_written_with_an_exponent() -> None:
    assert (
        load("understanding-bbc", ["data.train=1e3", "training.learning_rate=1"]).data.train == 1000
    )


def finished(folder: Path) -> Path:
    folder.mkdir()
    fuzz.write_run(folder, "result.json")
    return folder


@pytest.mark.parametrize(
    "damage", ["", "{", "null", '{"score": 0.5}', "[" * 10_000, '{"score": "high"}']
)
def test_a_damaged_result_is_told_and_does_not_end_a_comparison(
    damage: str, tmp_path: Path
) -> None:
    recipe = load("understanding-bbc")
    cells = [Run(recipe, finished(tmp_path / "good")), Run(recipe, finished(tmp_path / "bad"))]
    (tmp_path / "bad" / "result.json").write_text(damage)
    assert [cell.done for cell in cells] == [True, False]
    assert [line.seeds for line in summarize(cells).lines] == [1]
    with pytest.raises(
        RecordError, match=r"bad/result\.json.*remove it, and the run is done again"
    ):
        run(recipe, tmp_path / "bad")


def test_runs_that_diverged_are_compared(tmp_path: Path) -> None:
    cells = [Run(load("understanding-bbc"), finished(tmp_path / name)) for name in "ab"]
    path = tmp_path / "a" / "result.json"
    path.write_text(
        json.dumps(
            json.loads(path.read_text()) | {"eval_loss": float("nan"), "score": float("inf")}
        )
    )
    (line,) = summarize(cells).lines
    assert line.seeds == 2
    assert line.eval_loss.mean != line.eval_loss.mean


@pytest.mark.parametrize(
    "damage",
    ['{"step": "1"}', '{"step": 1, "loss": "low"}', "nonsense", '{"step": 1, "step": 2}', "\xff"],
)
def test_damaged_lines_of_metrics_are_left_out_and_said(damage: str, tmp_path: Path) -> None:
    path = finished(tmp_path / "run") / "metrics.jsonl"
    good = path.read_text().splitlines()
    path.write_bytes("\n".join([good[0], damage, *good[1:], '{"step": 9, "lo']).encode("latin-1"))
    with pytest.warns(UserWarning, match=r"line 2 of .*metrics\.jsonl' is left out") as said:
        lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    assert len(said) == 1  # half a line at the end is a killed run's


@pytest.mark.parametrize(
    "damage", ["[", '{"task": 5}', "null", '{"task": "bbc", "tsk": 1}', '{"task": 1, "task": 2}']
)
def test_a_damaged_recipe_of_a_run_is_told(damage: str, tmp_path: Path) -> None:
    (finished(tmp_path / "run") / "recipe.json").write_text(damage)
    with pytest.raises(ConfigError, match=r"recipe\.json.*cannot go on"):
        run(load("understanding-bbc"), tmp_path / "run")


def test_a_run_without_a_permission_is_another_than_one_with_it(tmp_path: Path) -> None:
    recipe = dataclasses.replace(load("understanding-bbc"), trust_remote_code=True)
    with pytest.raises(ConfigError, match="they differ in trust_remote_code"):
        run(recipe, finished(tmp_path / "run"))


@pytest.mark.parametrize(
    "file",
    [
        "trainer_state.json",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "adapter_model.safetensors",
    ],
)
@pytest.mark.parametrize("damage", ["absent", "empty", "cut", "flipped"])
def test_a_damaged_checkpoint_of_trainer_is_told_and_passed_over(
    file: str, damage: str, tmp_path: Path
) -> None:
    older, newer = fuzz.write_trainer_state(tmp_path), tmp_path / "checkpoint-12"
    assert newest_whole(tmp_path) == older
    older.rename(newer)
    state = newer / "trainer_state.json"
    state.write_text(state.read_text().replace('"global_step": 4', '"global_step": 12'))
    older = fuzz.write_trainer_state(tmp_path)
    assert newest_whole(tmp_path) == newer
    path = newer / file
    raw = path.read_bytes()
    if damage == "absent":
        path.unlink()
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "cut":
        path.write_bytes(raw[:-5])
    else:
        middle = len(raw) // 2 if path.suffix in (".pt", ".pth") else 3
        path.write_bytes(raw[:middle] + bytes([raw[middle] ^ 64]) + raw[middle + 1 :])
    with pytest.warns(
        UserWarning, match=r"checkpoint-12' cannot be gone on from: it (holds|lacks|does not fit)"
    ):
        assert newest_whole(tmp_path) == older
    assert not newer.exists()  # so that it fails once only


# -- all kinds -------------------------------------------------------------------------------------


def test_mutated_files_end_in_one_sentence(tmp_path: Path) -> None:
    for name, kind in fuzz.LAYER_TYPES.items():
        if not name.startswith("data"):
            for seed in range(6):
                folder = tmp_path / f"{name}-{seed}"
                folder.mkdir()
                assert fuzz.outcome(kind, seed, folder) in ("accepted", "refused"), (name, seed)
