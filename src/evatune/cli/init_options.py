"""The options of `evatune init`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from evatune.calibration.config import CalibrationConfig
from evatune.choices import DEFAULT_RANK, DEFAULT_RHO, DEFAULT_SCALE, SCALES
from evatune.cli.options import TRUST_HELP, option, setting

# Tokens per text by default: of the demo model, and of others.
DEMO_LENGTH, LENGTH = 128, 512
CHECKPOINT_EVERY = 8  # batches between checkpoints, by default
_DEFAULT_OUT = Path("evatune-adapter")
_INPUT, _ADAPTER, _CALIBRATION, _OUTPUT = "Model and data", "Adapter", "Calibration", "Output"


@dataclass(frozen=True)
class InitOptions:
    """Options of `evatune init`, in the order in which `--help` lists them."""

    model: str | None = option(
        default=None,
        help="Hub id or local folder. Default: MiniLM, from the demo extra.",
        panel=_INPUT,
    )
    data: str | None = option(
        default=None,
        help="Hub id; text, JSON Lines, CSV or Parquet file; or a folder of such files of one kind,"
        " all of which are read. Default: BBC news, from the demo extra.",
        panel=_INPUT,
    )
    images: str | None = option(
        default=None,
        help="Images in place of --data: a folder, with a subfolder per class or without, or a hub"
        " id. Default model: a small DINOv2, from evatune-assets.",
        panel=_INPUT,
    )
    audio: str | None = option(
        default=None,
        help="Sounds in place of --data: a folder, with a subfolder per class or without, or a hub"
        " id. WAV, and with soundfile installed others; the first 30 seconds of each.",
        panel=_INPUT,
    )
    columns: str | None = option(
        "--columns",
        "--text-column",
        default=None,
        help="Column of chats, texts, images or audio; or prompt,completion; or"
        " instruction,input,output. Default: recognized by name (messages, prompt and completion,"
        " instruction and output, text) or by type.",
        panel=_INPUT,
    )
    label_column: str | None = option(
        default=None,
        help="Column of the classes, for a classifier. Default: 'label' or 'labels'.",
        panel=_INPUT,
    )
    chat_template: str | None = option(
        default=None,
        help="Template for chats: a Jinja file, or the hub id or folder of a model that has one."
        " Default: the tokenizer's.",
        panel=_INPUT,
    )
    split: str = option(default="train", help="Split of the data set.", panel=_INPUT)
    task: str = option(
        default="auto",
        help="auto (what the checkpoint says), causal-lm, seq2seq-lm, masked-lm,"
        " sequence-classification, token-classification, image-classification,"
        " audio-classification, ctc or feature-extraction.",
        panel=_INPUT,
    )
    trust_remote_code: bool = option(
        "--trust-remote-code", default=False, help=TRUST_HELP, panel=_INPUT
    )
    device: str = option(default="auto", help="auto, cpu, cuda, cuda:1, …", panel=_INPUT)
    dtype: str = option(
        default="auto", help="auto (the checkpoint's), float32, bfloat16 or float16.", panel=_INPUT
    )
    rank: int = setting(CalibrationConfig, "rank", default=DEFAULT_RANK, panel=_ADAPTER)
    rho: float = setting(CalibrationConfig, "rho", default=DEFAULT_RHO, panel=_ADAPTER)
    alpha: float | None = option(
        default=None, help="LoRA's alpha. Default: the rank; the paper uses 1.", panel=_ADAPTER
    )
    targets: str = option(
        default="all-linear",
        help="all-linear, endings of layer names with commas between, or a regular expression.",
        panel=_ADAPTER,
    )
    exclude_modules: str | None = option(
        default=None, help="Layers to leave out, named in the same way as targets.", panel=_ADAPTER
    )
    budget: str = setting(CalibrationConfig, "budget", panel=_ADAPTER)
    metric: str = setting(CalibrationConfig, "metric", panel=_ADAPTER)
    scale: str = option(
        default=DEFAULT_SCALE, help=f"Length of A's rows: {', '.join(SCALES)}.", panel=_ADAPTER
    )
    objective: str = setting(CalibrationConfig, "objective", panel=_CALIBRATION)
    sketch: str = setting(CalibrationConfig, "sketch", panel=_CALIBRATION)
    center: bool = setting(CalibrationConfig, "center", "--center", panel=_CALIBRATION)
    batch_size: int = option(
        default=16, help="Texts, images or sounds per batch.", panel=_CALIBRATION
    )
    max_length: int | None = option(
        default=None,
        help=f"Tokens per text. Default: {LENGTH} ({DEMO_LENGTH} for the demo model), or the"
        " model's limit.",
        panel=_CALIBRATION,
    )
    max_batches: int = setting(CalibrationConfig, "max_batches", panel=_CALIBRATION)
    tolerance: float = setting(CalibrationConfig, "tolerance", panel=_CALIBRATION)
    seed: int = setting(CalibrationConfig, "seed", panel=_CALIBRATION)
    checkpoint_every: int | None = option(
        default=None,
        help="Batches from one checkpoint to the next, in OUT.checkpoint. Default: none; with"
        f" --resume, {CHECKPOINT_EVERY}.",
        panel=_CALIBRATION,
    )
    resume: bool = option(
        "--resume",
        default=False,
        help="Go on from OUT.checkpoint, if an interrupted run left one.",
        panel=_CALIBRATION,
    )
    out: Path = option("--out", "-o", default=_DEFAULT_OUT, help="Folder to write.", panel=_OUTPUT)
    overwrite: bool = option(
        "--overwrite", default=False, help="Replace a folder that evatune wrote.", panel=_OUTPUT
    )
    as_json: bool = option(
        "--json", default=False, help="Print one JSON object instead of tables.", panel=_OUTPUT
    )

    @property
    def lora_alpha(self) -> float:
        """The α of the adapter; by default one at which every layer's scale α/r is 1."""
        return self.rank if self.alpha is None else self.alpha
