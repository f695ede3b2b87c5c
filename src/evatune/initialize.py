"""The one line: `initialize(peft_model, batches)` or `initialize(trainer)`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from evatune.calibrate import ForwardFunction, Progress
from evatune.calibration import Calibration
from evatune.capture.tap import RowsFunction
from evatune.config import CalibrationConfig
from evatune.errors import DataError


def initialize(
    model: Any,
    batches: Iterable[Any] | None = None,
    *,
    rank: int | None = None,
    rho: float | None = None,
    budget: str | None = None,
    metric: str | None = None,
    scale: str = "paper",
    config: CalibrationConfig | None = None,
    forward: ForwardFunction | None = None,
    rows: RowsFunction | None = None,
    adapter_name: str = "default",
    progress: Callable[[Progress], None] | None = None,
    on_unsupported: str = "error",
) -> Calibration:
    """Calibrate, redistribute ranks and write the result into a model's LoRA layers, in place.

    Call it before the optimiser exists: layers whose rank changes get new parameters.

    Args:
        model: a `PeftModel` with a LoRA adapter (or a transformers model after `add_adapter`); or a
            transformers or TRL `Trainer` around one, whose own data, collator and device are then used. The adapter
            may sit on any kind of layer that `evatune.calibrate` lists, and on parameters (`target_parameters`).
        batches: as for `evatune.calibrate`; not with a Trainer.
        rank: r. Default: the adapter's `LoraConfig.r`.
        rho: ρ. Default: the adapter's `EvaConfig.rho` if it has one, else 2.
        budget, metric: "ranks" and "ratio" unless `config` says otherwise; see `evatune.ranks.allocate`.
        scale: length of the rows of A. With v_j the j-th direction, r_l the layer's rank, `in` its width:

            "paper"    a_j = v_j, orthonormal rows.
            "whiten"   a_j = v_j / σ_j, σ_j the standard deviation of v_j·x over tokens, so that every
                       component of Ax has variance 1. σ_j is taken no smaller than 0.001·sqrt(E[(v_j·x)²]).
                       Also what `EvaConfig(whiten=True)` in the adapter's config asks for.
            "matched"  a_j = c·v_j, c² = (r_l / (3·in)) · E‖x‖² / Σ_j E[(v_j·x)²], so that E‖Ax‖² is what it
                       is for PEFT's default initialisation (uniform on ±1/√in) at the layer's rank: a
                       learning rate tuned for LoRA carries over.

        config: other settings of the calibration; `rank`, `rho`, `budget` and `metric` given here override it. Where
            it leaves `labels_only` open and the adapter's config asks for EVA (`init_lora_weights="eva"`), its
            `EvaConfig.use_label_mask` and `label_mask_value` hold: tokens without a loss are left out of batches that
            have a label per token (but not for encoder-decoder models).
        forward, rows, progress: as for `evatune.calibrate`.
        adapter_name: which adapter to initialise; no other is touched.
        on_unsupported: adapted layers of a kind that EVA does not initialise are an "error" that names them, or with
            "skip" stay as PEFT initialised them, at their rank and outside the budget, and are named in a warning.

    Returns:
        The `Calibration`. Afterwards B = 0, so the model's output is what it was; ranks and α are set in the
        adapter's config (`rank_pattern`, `alpha_pattern`) such that each layer's scale is α over `rank` (rsLoRA:
        over its root), whatever its own rank, and so what it was unless `rank` replaces r; layers of rank 0 carry
        this adapter no more; `save_pretrained` writes a folder that plain PEFT loads.

    Raises:
        AdapterError: no LoRA adapter of that name, or one that is already trained or merged.
        LayerError: layers without a usable result. BudgetError: the budget cannot be met.
        ConfigError, DataError, TargetError: as for `calibrate`. The model is unchanged in every case.
    """
    options: dict[str, Any] = {
        "rank": rank, "rho": rho, "budget": budget, "metric": metric, "scale": scale, "config": config, "rows": rows,
        "adapter_name": adapter_name, "progress": progress, "on_unsupported": on_unsupported,
    }  # fmt: skip
    if hasattr(model, "get_train_dataloader"):
        if batches is not None:
            raise DataError("initialize(trainer) takes its batches from the trainer; leave out the second argument")
        from evatune.trainers.hf import initialize_trainer

        return initialize_trainer(model, forward=forward, **options)
    if batches is None:
        raise DataError("initialize(model, batches) needs batches: a DataLoader, list or generator of model inputs")
    from evatune.adapters.peft import initialize_model

    return initialize_model(model, batches, forward=forward, **options)
