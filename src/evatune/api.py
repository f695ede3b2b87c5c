"""The public door: signature, documentation and dispatch of `calibrate` and `initialize`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from evatune.adapters.options import InitializeOptions, RankOptions
from evatune.calibration.checkpoint import Checkpoint
from evatune.calibration.config import CalibrationConfig
from evatune.calibration.loop import run
from evatune.calibration.options import RunOptions, require_model, settings_of
from evatune.calibration.progress import ProgressOption, progress_callback
from evatune.calibration.result import Calibration
from evatune.capture import find_target_layers
from evatune.capture.recorder import RowsFunction
from evatune.capture.targets import Targets
from evatune.choices import Budget, Metric, OnUnsupported, Scale
from evatune.distributed.group import ProcessGroup
from evatune.errors import DataError
from evatune.modeling.forward import ForwardFunction, model_device
from evatune.modeling.loss import LossFunction
from evatune.modeling.wrappers import adapted, carries_adapters, unwrapped


@torch.inference_mode(mode=False)
def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    config: CalibrationConfig | None = None,
    *,
    targets: Targets = None,
    forward: ForwardFunction | None = None,
    rows: RowsFunction | None = None,
    loss: LossFunction | None = None,
    progress: ProgressOption = "auto",
    checkpoint: Checkpoint | None = None,
) -> Calibration:
    """Find the leading directions of what each layer's input carries on this data.

    Args:
        model: any `nn.Module`, or a `PeftModel` (its adapters stand aside, so the result is the
            base model's); looked for inside DistributedDataParallel, DataParallel and DeepSpeed's
            engine. Where a module of your own, or of sentence-transformers, holds the one model
            that carries adapters, the whole is run, and names are those in that model.
        batches: DataLoader, list, iterator or generator. Each batch is read once, one pass at most.
            The iterator may itself run the model: between our forward passes the model is as it was
            found, with its modes and adapters and without hooks, and those runs are not counted.
            Batches must be mixed: of sorted data, the stop rule sees the first kind only and finds
            it settled.
        config: settings; `CalibrationConfig()` by default. Of a model with one LoRA adapter, what
            it leaves open is as the adapter's config says, as in `evatune.initialize`.
        targets: which layers, as PEFT names them: "all-linear", a list of names or suffixes, or a
            regular expression for whole names. Default: the layers that carry an adapter, else
            "all-linear". Besides linear layers: convolutions (their own patches;
            `evatune.initialize` takes those that PEFT's A sees, which pads with zeros and has no
            dilation), embeddings, `nn.MultiheadAttention` (named like it, and "….out_proj") and
            parameters in which the weights of experts are stacked (one entry per expert, "….0",
            "….1", …).
        forward: `forward(model, batch)` replaces the default call: `model(**batch)` for a mapping
            or a dataclass, `model(*batch)` for a tuple or list, `model(batch)` for a tensor, and
            for a mapping where the model's first argument is none of its keys, as
            sentence-transformers wants it.
        rows: `rows(activation, batch, layer_name)` → (n, d) replaces the default choice of rows:
            all tokens that the `attention_mask` of the nearest module around the layer does not
            exclude, else that of the batch; a warning names layers that no mask fits, of which all
            rows count (inside the decoder of an encoder-decoder model: its own mask, else those
            with a label). Layers then no longer share sketches. The activation is the layer's
            input, of a convolution its patches (batch, positions, d), of an embedding the ids, of
            which it returns (n,).
        loss: `loss(model, batch)` → a scalar, the mean over the batch's examples, for objectives
            that see gradients (`config.objective`); replaces the loss that the model returns for a
            batch with labels. `rows` then chooses tokens, the same of inputs and of gradients: it
            is handed a number for each token's place in place of the activation, and so can neither
            look at values nor compute rows of its own; layers share no sketches. A head of your
            own in it must not lie in a reentrant checkpoint, which hides that its `.grad` is to be
            left alone.
        progress: "auto" shows how far a run is that takes longer than a moment: as a bar in a
            terminal (on stderr) or a notebook, elsewhere as a line every few seconds of the logger
            "evatune", level INFO; before a run of more than 5 s one line says what it will take. Of
            several processes the first alone shows it. None shows nothing. Or a function, called
            with a `Progress` after each batch.
        checkpoint: a file to go on from after an interruption, see
            `evatune.calibration.Checkpoint`. One process only.

    Several processes of torch.distributed work together (unless `config.distributed` is False): all
    call this, each with batches of its own. They see up to `max_batches` in all, stop together and
    end with the same directions, bit for bit. The result equals, to rounding, that of one process
    which reads all batches in turn, with one exception: of its first batch, every process but one
    keeps only the part inside its leading directions. Only sums of a sketch's size travel. A model
    in shards (FSDP, ZeRO-3) runs in step: processes whose data has ended repeat their last batch,
    and it is not counted.

    Returns:
        A `Calibration`: per layer a `Spectrum` and a `Status`. Layers that went wrong are there
        with a status that says how; nothing is raised for them here.

    Raises:
        TargetError: no layer matches.
        DataError: no batch, or something that is not batches.
        ConfigError: a `forward`, `rows` or `loss` of other arguments.
        AdapterError: weights on the meta device, or in the shards of DeepSpeed's zero.Init that no
            engine gathers; or, for an objective that sees gradients, made in inference mode.
        ProcessError: another process failed, is lost, or has another model, other weights, targets
            or settings.

    What the model itself raises passes through. In every case the model, its modes, hooks,
    gradients and the random number generators are left as they were, but for buffers and weights
    that its own forward pass writes to, such as a counter or the ranges of an observer.

    The first forward pass runs to its end. The later ones of a transformers model may end at the
    last watched layer, where nothing is lost by it: see `evatune.modeling.state.may_stop_early`.

    Cost: the forward passes plus 4·d·l flops per token and distinct layer input of width d, with
    l = components + oversampling; 12·d·l bytes per distinct input.
    """
    require_model(model)
    model = unwrapped(model)
    base, settings = adapted(model), settings_of(config)
    if carries_adapters(base):
        from evatune.adapters.initialize import calibration_settings

        settings = calibration_settings(base, settings)
    device, timeout = model_device(model), settings.rendezvous_timeout
    with (
        ProcessGroup.create(settings.distributed, device, timeout) as process_group,
        progress_callback(progress, settings) as report,
    ):
        options = RunOptions(
            forward=forward, rows=rows, loss=loss, progress=report, checkpoint=checkpoint
        )
        target_layers = find_target_layers(base, targets)
        return run(model, target_layers, batches, settings, process_group, options)


@torch.inference_mode(mode=False)  # which would leave parameters that cannot be trained
def initialize(
    model: Any,
    batches: Iterable[Any] | Calibration | None = None,
    *,
    rank: int | None = None,
    rho: float | None = None,
    budget: Budget | None = None,
    metric: Metric | None = None,
    scale: Scale | None = None,
    config: CalibrationConfig | None = None,
    forward: ForwardFunction | None = None,
    rows: RowsFunction | None = None,
    loss: LossFunction | None = None,
    adapter_name: str = "default",
    overwrite: bool = False,
    progress: ProgressOption = "auto",
    checkpoint: Checkpoint | None = None,
    on_unsupported: OnUnsupported = "error",
) -> Calibration:
    """Calibrate, redistribute ranks and write the result into a model's LoRA layers, in place.

    Call it before the optimizer exists, or before its first step: layers whose rank changes have
    the same parameters in other shapes, and those without a rank have none.

    Args:
        model: a `PeftModel` with a LoRA adapter (or a transformers model after `add_adapter`), or a
            module that holds one such (your own, a `SentenceTransformer`), through which batches
            then run; or a transformers, TRL or sentence-transformers `Trainer` around one, whose
            own data, collator and device are then used. To resume a run, give the same data and
            seed, or the `Calibration` of the first: the checkpoint's ranks must come out again. The
            adapter may sit on any kind of layer that `evatune.calibrate` lists, and on parameters
            (`target_parameters`).
        batches: as for `evatune.calibrate`, mixed; not with a Trainer. Or a finished `Calibration`
            of this model, merged or loaded from a file, also with a Trainer: it must cover the
            adapter's layers, and no batch is run then.
        rank: r. Default: the adapter's `LoraConfig.r`, and its `rank_pattern` as it stands: a layer
            that it names gets at most the rank there, whatever ρ, and counts with it in the budget,
            so that all ranks together are as many as the config gives. A `rank` given here (or in
            `config`) replaces r and the pattern, which an adapter that evatune has written ranks
            into needs, to be redistributed anew.
        rho: ρ. Default: the adapter's `EvaConfig.rho` if it has one, else that of the
            `Calibration`, else 2.
        budget, metric: "ranks" and "ratio" unless `config` or the `Calibration` says otherwise; see
            `evatune.ranks.allocate`.
        scale: length of the rows of A, and so the learning rate that suits the adapter: see
            `Calibration.learning_rate`. Default: "whiten" if the adapter's config says
            `EvaConfig(whiten=True)`, which no other scale given here may contradict; else
            "matched". With v_j the j-th direction, λ_j = E[(v_j·x)²], r_l the layer's rank, `in`
            its width:

            - "paper": a_j = v_j, orthonormal rows. LoRA's usual α and rate may then be too large; a
              warning says so where α/r is 0.5 or more.
            - "whiten": a_j = v_j / σ_j, σ_j the standard deviation of v_j·x over tokens, so that
              every component of Ax has variance 1. σ_j is taken no smaller than 0.001·√λ_j.
            - "matched": a_j = c·v_j, c² = (r_l / (3·in)) · E‖x‖² / Σ_j λ_j, so that E‖Ax‖² is what
              it is for PEFT's default initialization (uniform on ±1/√in) at the layer's rank: a
              learning rate tuned for LoRA carries over.
            - "whiten-matched": a_j = v_j · √(E‖x‖² / (3·in·λ_j)), so that every component of Ax has
              the mean square that it has for PEFT's default: where the v_j are eigenvectors of
              E[x xᵀ], which they are unless centered, E[Ax (Ax)ᵀ] is that number times the
              identity. λ_j is taken no smaller than E‖x‖² / 10⁶.

            With an objective that sees gradients no row of the last two is longer than 1.

        config: other settings of the calibration; `rank`, `rho`, `budget` and `metric` given here
            override it. Where it leaves `labels_only` open and the adapter's config asks for EVA
            (`init_lora_weights="eva"`), its `EvaConfig.use_label_mask` and `label_mask_value` hold:
            tokens without a loss are left out of batches that have a label per token (but not for
            encoder-decoder models).
        forward, rows, loss, progress, checkpoint: as for `evatune.calibrate`, and so are several
            processes: each ends with the same adapter. A Trainer's processes share its batches out.
        adapter_name: which adapter to initialize; no other is touched.
        overwrite: let an adapter that is trained already start over: B = 0 and, with DoRA,
            magnitudes as at the start. Modules trained in full (`modules_to_save`) stay as they
            are.
        on_unsupported: adapted layers of a kind that EVA does not initialize are an "error" that
            names them, or with "skip" stay as PEFT initialized them, at their rank and outside the
            budget, and are named in a warning.

    Returns:
        The `Calibration`. Afterwards B = 0, so the model's output is what it was; ranks and α are
        set in a copy of the adapter's config, which `model.peft_config[adapter_name]` then is, such
        that each layer's scale is what it was, α over r
        (rsLoRA: over its root) with both patterns, whatever its new rank, unless `rank` replaces r;
        layers of rank 0 carry this adapter no more; `save_pretrained` writes a folder that plain
        PEFT loads. A Trainer logs, at the start of each `train()`, what the calibration found, for
        its trackers (`report_to`) too: see `evatune.trainers.summary`.

    Raises:
        AdapterError: no LoRA adapter of that name, or one that is merged, or trained already
            (unless `overwrite`), whose start has changed the base weights (PiSSA, OLoRA, CorDA,
            LoftQ, LoRA-GA), or of a variant of LoRA that does not fit
            (`evatune.adapters.variants`); a `Calibration` of another model; several adapted models
            in one module; a Trainer that has an optimizer already, or a `model_init`, by which it
            builds its model anew; a model without weights (on the meta device), or one that was
            made under `torch.inference_mode()` and cannot be trained. When it begins to train: a
            Trainer whose model was replaced since.
        LayerError: layers without a usable result. BudgetError: the budget cannot be met.
        ConfigError: options that contradict each other, the adapter's config or the `Calibration`.
        DataError, TargetError: as for `calibrate`.

    The model is unchanged in every case.
    """
    settings = settings_of(config)
    finished = batches if isinstance(batches, Calibration) else None
    is_trainer = hasattr(model, "get_train_dataloader")
    if is_trainer and batches is not finished:
        raise DataError(
            "initialize(trainer) takes its batches from the trainer; leave out the second argument,"
            " or give a Calibration"
        )
    if not is_trainer and batches is None:
        raise DataError(
            "initialize(model, batches) needs batches: a DataLoader, list or generator of model"
            " inputs, or a Calibration"
        )
    if not is_trainer:
        require_model(model)
    device = model_device(model.model if is_trainer else model)
    together = settings.distributed and finished is None
    with (
        ProcessGroup.create(together, device, settings.rendezvous_timeout) as process_group,
        progress_callback(progress, settings, runs=finished is None) as report,
    ):
        options = InitializeOptions(
            ranks=RankOptions(rank=rank, rho=rho, budget=budget, metric=metric),
            run=RunOptions(
                forward=forward, rows=rows, loss=loss, progress=report, checkpoint=checkpoint
            ),
            config=config,
            scale=scale,
            adapter_name=adapter_name,
            overwrite=overwrite,
            on_unsupported=on_unsupported,
        )
        if is_trainer:
            from evatune.trainers.hf import initialize_trainer

            return initialize_trainer(model, finished, options, process_group)
        from evatune.adapters.initialize import initialize_model

        assert batches is not None  # a trainer alone may do without
        return initialize_model(model, batches, options, process_group)
