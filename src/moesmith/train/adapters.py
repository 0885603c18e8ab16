"""Put a LoRA adapter on a model, count it by placement, and save it so that it knows its base."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from moesmith import __version__
from moesmith.config import write_atomically
from moesmith.errors import UserError
from moesmith.experts.report import count
from moesmith.models.layers import PLACEMENTS, adapter_targets

from .expert_parallel import shared_factors
from .folder import replace_folder
from .lora import lora_config
from .settings import LoraSettings
from .stack import TRAINED, is_stacked, load_adapter, write_stacked


@dataclass
class AdapterCounts:
    """Parameters of a model with an adapter."""

    trainable: dict[str, int] = field(default_factory=dict)
    """placement -> trainable parameters"""
    frozen: int = 0
    unused: list[str] = field(default_factory=list)
    """adapters on modules that the model never runs"""

    @property
    def total(self) -> int:
        """Trainable parameters of all placements."""
        return sum(self.trainable.values())


def attach(model: PreTrainedModel, settings: LoraSettings, seed: int) -> PeftModel:
    """A fresh adapter on `model` as `settings` ask for; its first weights follow from `seed`.

    Raises:
        UserError: a placement the model does not have, dropout where PEFT cannot apply it.
    """
    config = lora_config(model, settings)
    set_seed(seed)
    return get_peft_model(model, config)


def continue_from(model: PreTrainedModel, adapter: str | Path) -> PeftModel:
    """A saved adapter on `model`, trainable.

    Raises:
        UserError: no adapter there, or one that does not fit the model.
    """
    return load_adapter(model, adapter, TRAINED, trainable=True)


def count_adapters(model: PeftModel, targets: Iterable[str] | None = None) -> AdapterCounts:
    """Trainable parameters by placement, and what is frozen.

    Args:
        targets: the placements asked for; None counts under every placement the model has.

    Raises:
        UserError: a placement asked for has no trainable parameter.
    """
    owners: dict[str, str] = {}
    for placement in PLACEMENTS:
        if targets is None or placement in targets:
            for name in _targets_of(model, placement):
                owners.setdefault(name, placement)
    counts = AdapterCounts(frozen=count(model).frozen)
    # Expert parallelism: a process holds the factors of its own experts.
    holders = {id(p): m.share.mesh.size() for m, _, _, p in shared_factors(model) if m.share is not None}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            placement = owners.get(_module_of(name), "other")
            numel = parameter.numel() * holders.get(id(parameter), 1)
            counts.trainable[placement] = counts.trainable.get(placement, 0) + numel
    counts.trainable = {p: counts.trainable[p] for p in (*PLACEMENTS, "other") if p in counts.trainable}
    missing = [placement for placement in targets or () if placement not in counts.trainable]
    if missing:
        raise UserError(f"lora.targets asks for {missing[0]}, and no parameter there is trainable")
    return counts


def _targets_of(model: PeftModel, placement: str) -> list[str]:
    """Modules that carry the adapters of a placement; none when the model has no such place."""
    try:
        modules, parameters = adapter_targets(model, [placement])
    except UserError:
        return []
    return [*modules, *(name.rpartition(".")[0] for name in parameters)]


def _module_of(parameter: str) -> str:
    """base_model.model.model.layers.0.mlp.experts.base_layer.lora_A.w -> model.layers.0.mlp.experts"""
    name = parameter.partition(".lora_")[0].removeprefix("base_model.model.")
    return ".".join(part for part in name.split(".") if part != "base_layer")


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter of everything that is trained."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def cast_trainable(model: nn.Module, values: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Give the trainable parameters the given values in `dtype`.

    TRL rounds adapters on a 4-bit model to bf16 when it is constructed; the values are those from before.
    """
    for name, parameter in trainable(model).items():
        parameter.data = values[name].to(parameter.device, dtype)


def save_adapter(
    path: Path,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    base: dict[str, Any],
    facts: dict[str, Any],
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """The adapter in PEFT's format, the tokenizer with its chat template, and which base they belong to.

    A stacked model is saved as one adapter that is the sum of its two, with the two in parts/.

    Args:
        base: what `moesmith.models.checkpoint.base_record` says about the model.
        facts: what else is worth knowing: step, held-out loss.
        weights: state dict to take the adapter from, gathered from all processes; None: the model's own.
    """

    def write(folder: Path) -> None:
        parts = {}
        if is_stacked(model):
            parts = {"parts": write_stacked(folder, model, *([] if weights is None else [weights]))}
        else:
            gathered: dict[str, Any] = {} if weights is None else {"state_dict": weights}
            # No look at the hub whether the vocabulary grew: embeddings are never trained.
            model.save_pretrained(str(folder), save_embedding_layers=False, **gathered)
        tokenizer.save_pretrained(str(folder))
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's unfilled model card
        record = {"base": base, **facts, **parts, "moesmith": __version__}
        write_atomically(folder / "moesmith.json", json.dumps(record, indent=2) + "\n")

    replace_folder(path, write)
