"""A run's options: refused where they cannot be, and in the words of TRL's arguments."""

from __future__ import annotations

import difflib
import os
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import str_to_bool
from transformers.training_args import OptimizerNames

from moesmith import ranks
from moesmith.errors import UserError

from . import layer_major
from .settings import RunSettings, TrainSettings
from .together import local_passes

if TYPE_CHECKING:
    from .sft import Session


def check_settings(settings: TrainSettings, text_config: Any, offloaded: bool) -> None:
    """Refuse what the libraries would only refuse later, or in other words."""
    check_launcher(settings, offloaded)
    shares = ranks.world() // settings.expert_parallel
    if settings.expert_parallel > 1 and shares * settings.expert_parallel != ranks.world():
        started = f"{ranks.world()} processes" if ranks.world() > 1 else "one process"
        raise UserError(
            f"train.expert_parallel={settings.expert_parallel}, and the run has {started}",
            f"torchrun --nproc-per-node {settings.expert_parallel} -m moesmith sft ...",
        )
    if settings.sharding is not None and ranks.world() == 1:
        raise UserError(
            f"train.sharding={settings.sharding} splits the weights over processes, and the run has one",
            "torchrun --nproc-per-node 2 -m moesmith sft ..., or leave it out",
        )
    if settings.sharding is not None and settings.expert_parallel > 1:
        raise UserError(
            "train.sharding with train.expert_parallel: both split the same weights", "leave one of them out"
        )
    if settings.sharding is not None and offloaded:
        raise UserError(
            "train.sharding with experts that are not on the device: both would place the same weights",
            "leave one of them out; several processes without sharding each have their own experts",
        )
    if settings.layer_major and settings.grad_accum % shares:
        raise UserError(
            f"train.layer_major with train.grad_accum={settings.grad_accum} over {shares} processes",
            "train.grad_accum has to be a multiple of their number",
        )
    for logger in settings.loggers:
        if find_spec(logger) is None:
            raise UserError(
                f"train.loggers asks for {logger}, which is not installed", f"pip install {logger}"
            )
    names = [name.value for name in OptimizerNames]
    if settings.optim not in names:
        near = difflib.get_close_matches(settings.optim, names, n=3)
        raise UserError(
            f"train.optim={settings.optim} is no optimizer of transformers", f"near it: {', '.join(near)}"
        )
    if ("8bit" in settings.optim or "paged" in settings.optim) and not torch.cuda.is_available():
        raise UserError(f"train.optim={settings.optim} needs a GPU", "train.optim=adamw_torch")
    needed = ("output_router_logits", "num_experts", "num_experts_per_tok")
    if settings.router_aux_loss and not all(hasattr(text_config, name) for name in needed):
        raise UserError(
            f"train.router_aux_loss={settings.router_aux_loss}: "
            f"{text_config.model_type} has no load-balancing loss",
            "train.router_aux_loss=0",
        )


def splits(settings: TrainSettings) -> bool:
    """Whether the run splits its weights, by our option or by accelerate's configuration."""
    return settings.sharding is not None or str_to_bool(os.environ.get("ACCELERATE_USE_FSDP", "false")) == 1


def check_launcher(settings: TrainSettings, offloaded: bool) -> None:
    """Refuse what the configuration of `accelerate launch` asks for and would do in other ways than ours."""
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked not in ("no", "bf16" if settings.dtype == "bfloat16" else "no"):
        raise UserError(
            f"accelerate's configuration has mixed_precision: {asked}, and train.dtype is {settings.dtype}",
            "set mixed_precision: no there",
        )
    for name, engine in (("DEEPSPEED", "DeepSpeed"), ("MEGATRON_LM", "Megatron-LM"), ("FSDP", "FSDP")):
        if not str_to_bool(os.environ.get(f"ACCELERATE_USE_{name}", "false")):
            continue
        if name != "FSDP":
            raise UserError(
                f"accelerate's configuration asks for {engine}", "leave it out: DDP, or fsdp_version: 2"
            )
        if offloaded or settings.expert_parallel > 1:
            other = "train.expert_parallel" if settings.expert_parallel > 1 else "experts.home"
            raise UserError(
                f"accelerate's configuration asks for FSDP, and {other} places the experts",
                "leave one of them out",
            )


def check_same_everywhere(base: dict[str, Any], rows: str, cfg: RunSettings) -> None:
    """Refuse processes that would train on different things, each on a machine of its own perhaps."""
    what = {"model": base.get("fingerprint"), "rows": rows, "options": cfg.model_dump_json()}
    for number, other in enumerate(ranks.gather(what)):
        for name, value in what.items():
            if other[name] != value:
                raise UserError(
                    f"rank {number} has other {name} than rank {ranks.rank()}",
                    "every machine of a run needs the same files and the same command",
                )


def passes_of(train: TrainSettings) -> tuple[int, int]:
    """(rows of a forward pass, forward passes of a step in all processes together)."""
    rows, passes = layer_major.rows_and_passes(train)
    if train.layer_major:  # one forward pass in each process
        passes = ranks.world() // train.expert_parallel
        rows //= passes
    return rows, passes


def shared_arguments(session: Session, first: bool) -> dict[str, Any]:
    """Our options in TRL's words, whatever the loss. Only what is set here differs from TRL's defaults."""
    cfg, folder, plan, evaluate = session.cfg, session.folder, session.plan, bool(session.held_out)
    train: TrainSettings = cfg.train
    on_gpu = torch.cuda.is_available()
    rows, passes = passes_of(train)
    several = ranks.world() > 1
    return dict(
        output_dir=str(folder.checkpoints),
        max_steps=plan.steps,
        per_device_train_batch_size=rows,
        per_device_eval_batch_size=train.batch_size,
        gradient_accumulation_steps=local_passes(passes, ranks.world() // train.expert_parallel),
        learning_rate=train.lr,
        lr_scheduler_type="cosine_warmup_with_min_lr",  # cosine_with_min_lr takes its first step at 0
        lr_scheduler_kwargs={"min_lr_rate": train.min_lr_ratio},
        warmup_steps=train.warmup,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        optim=train.optim,
        gradient_checkpointing=train.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        bf16=train.dtype == "bfloat16",
        use_cpu=not on_gpu,
        dataloader_pin_memory=on_gpu,
        router_aux_loss_coef=train.router_aux_loss,
        eval_strategy="steps" if evaluate else "no",
        eval_steps=plan.eval_steps,
        eval_on_start=evaluate and first,
        save_strategy="steps",
        save_steps=plan.save_steps,
        save_total_limit=None,  # the trainer keeps whole checkpoints only, and counts them itself
        logging_steps=1,
        logging_nan_inf_filter=False,  # a loss that is not finite is handled, not hidden
        report_to=["trackio"] if "trackio" in train.loggers else "none",
        project="moesmith",
        run_name=folder.path.name,
        disable_tqdm=True,
        seed=cfg.seed,
        max_length=None,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False if several else None,  # they are frozen before
        ddp_broadcast_buffers=False if several else None,
        **({"fsdp": True, "fsdp_config": {"version": 2}} if train.sharding == "fsdp2" else {}),
    )
