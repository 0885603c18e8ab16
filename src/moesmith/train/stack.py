"""A new adapter over a saved one that stays frozen, and both saved as one stock adapter.

`stack` puts the two on a model, both active, the new one trained. `join` makes one adapter whose update is
exactly their sum: ranks side by side, scaling folded into B. What is saved is the joined one, in PEFT's
format, so that every command, stock PEFT and any server loads it like an adapter trained in one go; the two
lie beside it in parts/, as they were trained.

How PEFT stores the factors is said in `models/lora_factors.py`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict, load_peft_weights
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, set_seed

from moesmith.errors import UserError
from moesmith.models.lora_factors import (
    WEIGHTS,
    A,
    B,
    as_peft,
    check_same_parameters,
    factors,
    module_of,
    padded,
    refuse_unknown,
    side_by_side,
)

from . import expert_parallel
from .lora import lora_config
from .settings import LoraSettings

TRAINED = "default"
FROZEN = "frozen"

WAY_OUT = "adapter_mode=continue trains the adapter itself further"


# ---------------------------------------------------------------- on a model


def stack(model: PreTrainedModel, adapter: str | Path, settings: LoraSettings, seed: int) -> PeftModel:
    """The saved adapter on `model`, frozen, and a fresh one over it; the model computes with both.

    The fresh one starts as no change at all: the model is the one that `adapter` made of it.

    Args:
        adapter: a folder or a hub name.
        settings: of the fresh adapter.
        seed: of its first weights.

    Raises:
        UserError: no adapter there, one that does not fit the model, or two that could not be saved as one.
    """
    fresh = lora_config(model, settings)
    stacked = load_adapter(model, adapter, FROZEN, trainable=False)
    saved = stacked.peft_config[FROZEN]
    if not isinstance(saved, LoraConfig):
        raise UserError(f"adapter={adapter} is {saved.peft_type}, wanted a LoRA", WAY_OUT)
    refuse_unknown(saved, f"adapter={adapter}", WAY_OUT)
    for module in stacked.modules():
        if isinstance(module, LoraLayer) and FROZEN in module.lora_dropout:
            module.lora_dropout[FROZEN] = nn.Identity()  # it is not trained: nothing of it is dropped
    fresh.base_model_name_or_path = model.name_or_path or None
    set_seed(seed)
    try:
        with _other_parameters(stacked):
            stacked.add_adapter(TRAINED, fresh)
    except ValueError as error:
        raise UserError(f"no other adapter can go over {adapter}: {_one_line(error)}", WAY_OUT) from None
    activate(stacked)
    check_same_parameters(
        [(stacked.peft_config[n], _weights(stacked, n)) for n in (FROZEN, TRAINED)], WAY_OUT
    )
    return stacked


def load_adapter(model: PreTrainedModel, adapter: str | Path, name: str, trainable: bool) -> PeftModel:
    """A saved adapter on `model`.

    Raises:
        UserError: no adapter there, or one that does not fit the model.
    """
    folder = Path(adapter).expanduser()
    if folder.exists() and not (folder / "adapter_config.json").is_file():
        raise UserError(f"adapter={adapter} holds no adapter (no adapter_config.json)")
    place = str(folder) if folder.exists() else str(adapter)
    try:
        with warnings.catch_warnings():
            # PEFT only warns, and goes on with random weights where the adapter has none.
            warnings.filterwarnings("error", message=".*missing adapter keys")
            loaded = PeftModel.from_pretrained(model, place, adapter_name=name, is_trainable=trainable)
    except (UserWarning, ValueError, RuntimeError) as error:
        raise UserError(f"adapter={adapter} does not fit the model: {_one_line(error)}") from None
    if (file := folder / WEIGHTS).is_file():
        with safe_open(file, "pt") as saved, expert_parallel.whole(loaded):
            left = sorted(set(saved.keys()) - _weights(loaded, name).keys())
        # Weights of the time before stacked experts are renamed by PEFT while it reads them.
        if (
            left
            and loaded.peft_config[name].target_modules == PeftConfig.from_pretrained(place).target_modules
        ):
            place = module_of(left[0].partition(".lora_")[0])
            raise UserError(f"adapter={adapter} does not fit the model, which has no {place}")
    return loaded


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def is_stacked(model: nn.Module) -> bool:
    """Whether the model has a frozen adapter under the trained one."""
    return isinstance(model, PeftModel) and {TRAINED, FROZEN} <= set(model.peft_config)


def activate(model: PeftModel) -> None:
    """Both adapters run and the upper one is trained; PEFT's own loading leaves it at one of them."""
    model.set_adapter(TRAINED)
    model.base_model.set_adapter([TRAINED, FROZEN])
    model.set_requires_grad(FROZEN, False)


@contextlib.contextmanager
def _other_parameters(model: PeftModel) -> Iterator[None]:
    """Let the next adapter go on parameters of other modules than the frozen one.

    PEFT wants all adapters on the same set of parameters, because the names of their weights tell the
    parameter by how deep it is nested. Only the parameters of one module are nested in each other, so only
    they have to be the same: `check_same_parameters` looks at that.
    """
    config = model.peft_config[FROZEN]
    there, config.target_parameters = config.target_parameters, None
    try:
        yield
    finally:
        config.target_parameters = there


def _weights(model: PeftModel, name: str, gathered: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """One adapter's weights under the names PEFT saves them by."""
    return get_peft_model_state_dict(
        model, adapter_name=name, save_embedding_layers=False, state_dict=gathered
    )


# ---------------------------------------------------------------- as one adapter


def join(
    adapters: Sequence[tuple[LoraConfig, dict[str, Tensor]]],
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """One adapter whose update is the sum of the given ones, on every place that any of them has.

    Its rank is the sum of their ranks, alpha = r. On a place that one of them lacks, its part of the rank is
    zeros.

    Args:
        adapters: config and weights of each, named as PEFT saves them.

    Returns:
        config, weights in float32.

    Raises:
        UserError: an adapter that is more than B @ A, or different parameters of one module.
    """
    for i, (config, _) in enumerate(adapters):
        refuse_unknown(config, f"adapter {i + 1}", WAY_OUT)
    targets = check_same_parameters(adapters, WAY_OUT)
    ranks = [max([config.r, *config.rank_pattern.values()]) for config, _ in adapters]
    places = dict.fromkeys(
        key.removesuffix(A) for _, weights in adapters for key in weights if key.endswith(A)
    )
    joined: dict[str, Tensor] = {}
    for place in places:
        parts = [factors(place, config, weights, WAY_OUT) for config, weights in adapters]
        shape = next(part.shape for part in parts if part)
        same = [padded(part, rank, shape) for part, rank in zip(parts, ranks, strict=True)]
        joined[place + A], joined[place + B] = as_peft(side_by_side(same))
    modules = dict.fromkeys(map(module_of, places))
    last = adapters[-1][0]
    config = LoraConfig(
        r=sum(ranks),
        lora_alpha=sum(ranks),
        target_modules=sorted(name for name in modules if name not in targets),
        target_parameters=sorted(f"{name}.{leaf}" for name in targets for leaf in targets[name]) or None,
        task_type=last.task_type,
        base_model_name_or_path=last.base_model_name_or_path,
        inference_mode=True,
    )
    return config, joined


# ---------------------------------------------------------------- saved


def write_stacked(
    folder: Path, model: PeftModel, gathered: dict[str, Tensor] | None = None
) -> list[dict[str, str]]:
    """The joined adapter into `folder`, the two into its parts/1 (frozen) and parts/2 (trained).

    Args:
        gathered: state dict to take them from, where the model's own is split over processes.

    Returns:
        what moesmith.json says about the parts.
    """
    adapters = [(model.peft_config[name], _weights(model, name, gathered)) for name in (FROZEN, TRAINED)]
    _write(folder, *join(adapters))
    parts = [folder / "parts" / str(i) for i in (1, 2)]
    for part, (config, weights) in zip(parts, adapters, strict=True):
        _write(part, config, weights)
    what = ("what was trained on, frozen", "what this run trained")
    return [{"folder": f"parts/{i}", "what": words} for i, words in enumerate(what, 1)]


def _write(folder: Path, config: LoraConfig, weights: dict[str, Tensor]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    mode, config.inference_mode = config.inference_mode, True
    try:
        config.save_pretrained(str(folder))
    finally:
        config.inference_mode = mode


ESSENTIALS = (
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules",
    "target_parameters", "use_dora", "bias",
)  # fmt: skip


def digest(adapter: str | Path) -> str:
    """A digest of what a saved adapter does: its weights, and what its config says about how they are used.

    Args:
        adapter: a folder or a hub name.
    """
    folder = Path(adapter).expanduser()
    place = str(folder) if folder.exists() else str(adapter)
    return _digest(PeftConfig.from_pretrained(place), load_peft_weights(place, device="cpu"))


def digest_of_model(model: PeftModel) -> str | None:
    """A digest of the adapters that change the model, and which they are; None when none does.

    A fresh adapter's update is zero (its B is), so it is left out whatever its first weights are.
    """
    found = {}
    for name in sorted(model.peft_config):
        weights = _weights(model, name)
        if any(bool(tensor.any()) for key, tensor in weights.items() if key.endswith(B)):
            found[name] = _digest(model.peft_config[name], weights)
    return hashlib.sha256(json.dumps(found).encode()).hexdigest() if found else None


def _digest(config: PeftConfig, weights: dict[str, Tensor]) -> str:
    values = config.to_dict()
    essentials = {name: values.get(name) for name in ESSENTIALS}
    hashed = hashlib.sha256(json.dumps(essentials, sort_keys=True, default=_plain).encode())
    for name, tensor in sorted(weights.items()):
        hashed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        hashed.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()


def _plain(value: Any) -> Any:
    """Sets and enums as JSON."""
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)
