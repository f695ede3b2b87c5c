"""Model cards of adapters, as the model hub reads them: metadata, ranks, energy, how to load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from statistics import fmean
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from evatune.adapters.saved import AdapterRow, adapter_rows, read_config
from evatune.calibration.result import Calibration
from evatune.errors import RecordError
from evatune.loading.demo import model_id
from evatune.report.charts import HeatCell, heat_map
from evatune.report.evaluation import HEADINGS, TITLE
from evatune.report.summary import Figures, by_type, mean_or_none
from evatune.report.text import LORA_RATE, percent, rate_text
from evatune.report.vega import picture
from evatune.utils.extras import extras
from evatune.utils.markup import markdown_code, markdown_text
from evatune.utils.names import ADAPTER_FILE, CALIBRATION_FILE, hub_id
from evatune.utils.text import one_line
from evatune.version import __version__

with extras(__name__):
    from yaml import YAMLError

CARD, PICTURE = "README.md", "ranks.png"
# Stand in a card until it is pushed, or its base model is known.
REPOSITORY, _BASE, _UNNAMED = "YOUR-NAME/REPOSITORY", "BASE_MODEL", "a model of your own"
_FOOTER = "Made with evatune "  # below a card that we wrote
_EMPTY_FORM = "[More Information Needed]"  # in what PEFT writes beside every adapter
# PEFT's kind of task → the hub's, and transformers' class
_TASKS = {
    "CAUSAL_LM": ("text-generation", "AutoModelForCausalLM"),
    "SEQ_2_SEQ_LM": (None, "AutoModelForSeq2SeqLM"),
    "SEQ_CLS": ("text-classification", "AutoModelForSequenceClassification"),
    "TOKEN_CLS": ("token-classification", "AutoModelForTokenClassification"),
    "FEATURE_EXTRACTION": ("feature-extraction", "AutoModel"),
}
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM offers


@dataclass(frozen=True)
class CardFacts:
    """The facts that an adapter's own files do not say.

    Attributes:
        base_model: hub id. data: what it was calibrated or trained on; its hub id, or a name.
        fingerprint: of the data. method: of fine-tuning. scale: of the rows of A.
        results: of training, by name. evaluation: lines of cells, as `evaluation_cells` gives them.
    """

    base_model: str | None = None
    data: str | None = None
    fingerprint: str | None = None
    method: str = "eva"
    scale: str | None = None
    results: Mapping[str, str] = field(default_factory=dict)
    evaluation: Sequence[Sequence[str]] = ()


def write_card(folder: Path, facts: CardFacts, calibration: Calibration | None = None) -> None:
    """Write `README.md` and the picture of the ranks beside a saved adapter.

    Raises RecordError for a folder that holds no LoRA adapter, or a damaged one.
    """
    for name, content in card_files(folder, facts, calibration).items():
        (folder / name).write_bytes(content)


def card_files(
    folder: Path, facts: CardFacts, calibration: Calibration | None = None
) -> dict[str, bytes]:
    """Return the model card of a saved adapter and the picture in it, by the names of their files.

    Raises RecordError for a folder that holds no LoRA adapter, or a damaged one.
    """
    rows = sorted(adapter_rows(folder / ADAPTER_FILE), key=_place)
    config = read_config(folder)
    card = _card(rows, config, facts, calibration)
    return {
        CARD: f"{card.content.rstrip()}\n".encode(),
        PICTURE: picture(_rank_map(rows, config.r)),
    }


def _place(row: AdapterRow) -> list[tuple[int, str]]:
    """Return what sorts layers by their names, block 2 before block 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in row.layer.split(".")]


def own_card(folder: Path) -> ModelCard | None:
    """Return the card in an adapter's folder; None where there is none, or PEFT's empty form.

    Raises RecordError for a damaged one.
    """
    path = folder / CARD
    if not path.is_file():
        return None
    try:
        card = ModelCard.load(path)
    except (ValueError, UnicodeDecodeError, YAMLError) as error:
        raise RecordError(
            f"{str(path)!r} is no model card ({one_line(error)}); mend the lines between its first"
            " two ---, or remove it, and a new one is written"
        ) from error
    return None if _EMPTY_FORM in card.text else card


def pushed_card(folder: Path, repository: str, base_model: str) -> dict[str, bytes]:
    """Return the card that goes with an adapter into a repository, by the names of its files.

    It is the folder's own, with the base model's hub id, or a new one.
    """
    card = own_card(folder)
    if card is None:
        record = folder / CALIBRATION_FILE
        calibration = Calibration.load(record) if record.is_file() else None
        files = card_files(folder, CardFacts(base_model=base_model), calibration)
    else:
        named = card.data.get("base_model")
        others = named[1:] if isinstance(named, list) else []
        card.data["base_model"] = [base_model, *others] if others else base_model
        files = {CARD: str(card).encode()}
        if _FOOTER not in card.text:  # the user's own, of whose words nothing is known
            return files
    text = files[CARD].decode("utf-8").replace(REPOSITORY, repository)
    text = text.replace(f"({_BASE})", f'("{base_model}")').replace(_BASE, base_model)
    text = text.replace(_UNNAMED, base_model)
    return files | {CARD: text.encode("utf-8")}


def _card(
    rows: Sequence[AdapterRow],
    config: Any,
    facts: CardFacts,
    calibration: Calibration | None,
) -> ModelCard:
    pipeline, model_class = _TASKS.get(str(config.task_type or ""), (None, "AutoModel"))
    base = facts.base_model or model_id(config.base_model_name_or_path or "")
    metadata = ModelCardData(
        base_model=base,
        base_model_relation="adapter" if base else None,
        library_name="peft",
        pipeline_tag=pipeline,
        datasets=[facts.data] if facts.data and hub_id(facts.data) and "/" in facts.data else None,
        tags=["evatune", "lora", facts.method],
    )
    ranks = [row.rank for row in rows]
    largest = max(ranks)
    card: ModelCard = ModelCard.from_template(
        metadata,
        template_str=files("evatune.report").joinpath("card.md.j2").read_text(encoding="utf-8"),
        title=f"{facts.method} adapter for {markdown_text(base or _UNNAMED)}",
        about=_about(rows, facts, calibration),
        facts=_facts(rows, config, facts, calibration),
        evaluation_title=TITLE,
        evaluation_headings=HEADINGS,
        evaluation=[[markdown_text(cell) for cell in line] for line in facts.evaluation],
        ranks_text=_ranks_text(ranks, config.r),
        headings=_TYPE_HEADINGS,
        rows=_types(rows, calibration),
        picture=PICTURE,
        loading=_loading(base, model_class),
        serving=pipeline == "text-generation",
        largest=largest,
        vllm_rank=next((size for size in _VLLM_RANKS if size >= largest), largest),
        base=base or _BASE,
        repository=REPOSITORY,
        version=__version__,
    )
    return card


def _about(rows: Sequence[AdapterRow], facts: CardFacts, calibration: Calibration | None) -> str:
    trained = any(row.b_norm for row in rows)
    if not trained and calibration is not None:
        return (
            "A LoRA adapter that is initialized and not yet trained (B = 0): the model answers as"
            " its base does. EVA (explained variance adaptation) took A from the leading directions"
            " of what each input carries on the data, and gave ranks to the layers where they"
            " explain most."
        )
    if not trained:
        return "A LoRA adapter that is not trained (B = 0): the model answers as its base does."
    start = " EVA chose its directions and ranks from the data." if calibration is not None else ""
    return f"A LoRA adapter, fine-tuned by the method {markdown_code(facts.method)}.{start}"


def _facts(
    rows: Sequence[AdapterRow],
    config: Any,
    facts: CardFacts,
    calibration: Calibration | None,
) -> dict[str, str]:
    fields = {
        "base model": facts.base_model or model_id(config.base_model_name_or_path or ""),
        "data": facts.data,
        "data fingerprint": facts.fingerprint and f"`{facts.fingerprint}`",
        "method": facts.method,
        "r, α": f"{config.r}, {config.lora_alpha:g}",
        "scale of every layer": ", ".join(f"{value:g}" for value in _scales(rows)),
        "trainable parameters": f"{sum(row.parameters for row in rows):,}",
    }
    if calibration is not None:
        plan = calibration.allocate()
        totals = Figures.of(calibration, plan).totals
        fields["ρ"] = f"{plan.rho:g}"
        fields["calibrated on"] = f"{calibration.batches} batches"
        if totals.captured_mean is not None and totals.random_mean is not None:
            times = totals.captured_mean / totals.random_mean
            fields["energy of unseen rows captured"] = (
                f"{percent(totals.captured_mean)}, {times:.1f} times a random A of the same ranks"
                f" ({percent(totals.random_mean)})"
            )
        steps = totals.step_ratio.get(facts.scale or "")
        if facts.scale is not None and steps is not None:
            rate = rate_text(LORA_RATE / steps.median)
            fields["length of A's rows"] = facts.scale
            fields["learning rate"] = f"{rate} does what {rate_text(LORA_RATE)} does in LoRA"
    fields |= facts.results
    return {
        name: value if value.startswith("`") else markdown_text(value)
        for name, value in fields.items()
        if value
    }


def _scales(rows: Sequence[AdapterRow]) -> list[float]:
    return sorted({round(row.scale, 6) for row in rows})[:4]


def _ranks_text(ranks: Sequence[int], usual: int) -> str:
    if set(ranks) == {usual}:
        return f"Every layer has rank {usual}."
    return (
        f"{sum(ranks):,} ranks in {len(ranks)} layers, from {min(ranks)} to {max(ranks)}, where"
        f" uniform LoRA gives {usual} to each. Layers that got none are not listed."
    )


_TYPE_HEADINGS = ("layer type", "layers", "rank min", "mean", "max", "energy captured", "random A")


def _types(rows: Sequence[AdapterRow], calibration: Calibration | None) -> list[list[str]]:
    """Return a line per layer type, with the energy where a calibration knows it."""
    ranks = {row.layer: row.rank for row in rows}
    known = {} if calibration is None else calibration.layers
    captured = {}
    if calibration is not None:
        captured = calibration.captured({name: ranks[name] for name in ranks if name in known})
    lines = []
    for kind, names in by_type(ranks).items():
        values = [ranks[name] for name in names]
        shares = [captured[name] for name in names if name in captured]
        chance = [ranks[name] / known[name].in_features for name in names if name in known]
        lines.append(
            [
                markdown_text(kind),
                str(len(names)),
                str(min(values)),
                f"{fmean(values):.1f}",
                str(max(values)),
                percent(mean_or_none(shares)),
                percent(mean_or_none(chance)),
            ]
        )
    return lines


def _rank_map(rows: Sequence[AdapterRow], usual: int) -> dict[str, Any]:
    cells = [HeatCell(row.layer, row.rank, row.rank - usual, {"rank": row.rank}) for row in rows]
    return heat_map(cells, f"ranks against uniform ({usual})")


def _loading(base: str | None, model_class: str) -> str:
    source = f'"{base}"' if base else _BASE
    return (
        f"from peft import PeftModel\nfrom transformers import {model_class}\n\n"
        f"base = {model_class}.from_pretrained({source})\n"
        f'model = PeftModel.from_pretrained(base, "{REPOSITORY}")'
    )
