"""The factors of a saved LoRA adapter: what each of its tensors belongs to, and its update as B @ A.

Reads PEFT's format and nothing of a model's weights. Leaves out putting an adapter on a model (`train`) and
adding its update to weights (`export`).

PEFT stores a linear's factors as A (r, in), B (out, r). Of a parameter with a slice per expert it stores
A (E*r, in) with the expert slowest and B (out, r*E) with the expert fastest; which parameter of a module they
belong to is told by how deep `base_layer` is nested in their name: the first targeted parameter of the module
is the innermost. A linear is the case E = 1.
"""

# E experts, r rank, I in features, O out features

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.utils import load_peft_weights
from peft.utils.other import get_pattern_key
from torch import Tensor
from torch.nn import functional as F

from moesmith.errors import UserError

from ..experts.storage import WEIGHT_NAMES

A, B = ".lora_A.weight", ".lora_B.weight"
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."

# Fields of a LoraConfig that change what an adapter does and that a plain sum of B @ A does not know.
UNKNOWN = (
    "use_dora", "lora_bias", "fan_in_fan_out", "modules_to_save", "trainable_token_indices",
    "layer_replication", "megatron_config", "alora_invocation_tokens", "use_qalora", "arrow_config",
    "velora_config", "kasa_config",
)  # fmt: skip
# Ways to start an adapter that also change the base's weights; True and "gaussian" do not.
KEEPS_BASE = (True, False, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True)
class Factors:
    """One update: W + B @ A, for each expert. The scaling is in B."""

    a_ERI: Tensor
    """float32 (E, r, I)"""
    b_EOR: Tensor
    """float32 (E, O, r)"""

    @property
    def rank(self) -> int:
        return self.a_ERI.shape[1]

    @property
    def shape(self) -> tuple[int, int, int]:
        """E, I, O"""
        return self.a_ERI.shape[0], self.a_ERI.shape[2], self.b_EOR.shape[1]


# ---------------------------------------------------------------- a saved adapter


def read_adapter(folder: str | Path) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Config and weights of a saved adapter, the weights named as PEFT saves them.

    Args:
        folder: a folder or a hub name.

    Raises:
        UserError: no adapter there, one that is no LoRA or that is more than B @ A.
    """
    place = Path(folder).expanduser()
    if place.exists() and not (place / CONFIG).is_file():
        raise UserError(f"adapter={folder} holds no adapter (no {CONFIG})")
    name = str(place) if place.exists() else str(folder)
    try:
        config = PeftConfig.from_pretrained(name)
        weights = load_peft_weights(name, device="cpu")
    except Exception as error:  # PEFT, the hub and safetensors each have their own
        raise UserError(f"adapter={folder} cannot be read: {' '.join(str(error).split())[:300]}") from None
    if not isinstance(config, LoraConfig):
        raise UserError(f"adapter={folder} is {config.peft_type}, wanted a LoRA")
    refuse_unknown(config, f"adapter={folder}")
    return config, weights


def refuse_unknown(config: LoraConfig, what: str, hint: str | None = None) -> None:
    """UserError for an adapter that is more than B @ A on its places; `what` names it."""
    odd = [name for name in UNKNOWN if getattr(config, name, None)]
    odd += ["bias"] if config.bias != "none" else []
    odd += ["init_lora_weights"] if config.init_lora_weights not in KEEPS_BASE else []
    if odd:
        raise UserError(
            f"{what} has {odd[0]}={getattr(config, odd[0])}: it is more than the product of two factors", hint
        )


# ---------------------------------------------------------------- its places


def places(weights: Mapping[str, Tensor], hint: str | None = None) -> list[str]:
    """Names of the adapter's pairs of factors, without `.lora_A.weight`.

    Raises:
        UserError: weights that are no such pair (of an embedding, a bias), half a pair.
    """
    odd = next((key for key in weights if not key.endswith((A, B))), None)
    if odd is not None:
        raise UserError(f"the adapter's {odd} is no factor of a low-rank update", hint)
    found = dict.fromkeys(key.removesuffix(A).removesuffix(B) for key in weights)
    half = next((place for place in found if place + A not in weights or place + B not in weights), None)
    if half is not None:
        raise UserError(
            f"the adapter has one of two factors at {half}", "its file is damaged: fetch it again"
        )
    return list(found)


def module_of(place: str) -> str:
    """base_model.model.model.layers.0.mlp.experts.base_layer -> model.layers.0.mlp.experts"""
    return ".".join(part for part in place.removeprefix(PREFIX).split(".") if part != "base_layer")


def leaves(module: str, config: LoraConfig) -> list[str]:
    """Names of the module's own parameters that the adapter targets; PEFT compares ends of names."""
    found = []
    for target in config.target_parameters or ():
        parent, _, leaf = target.rpartition(".")
        if module == parent or module.endswith(f".{parent}") or not parent:
            found.append(leaf)
    return sorted(set(found))


def _usual_order(_module: str) -> Sequence[str]:
    return WEIGHT_NAMES


def parameters(
    config: LoraConfig,
    weights: Mapping[str, Tensor],
    order: Callable[[str], Sequence[str]] = _usual_order,
) -> dict[str, str]:
    """place -> full name of the in-memory parameter that its factors update.

    Args:
        order: module name -> its own parameters in the order the module has them: the first of the targeted
            ones is the innermost. Without it, the order that every experts module has.

    Raises:
        UserError: more or fewer places on a module than parameters of it that the adapter targets.
    """
    depths: dict[str, dict[int, str]] = {}
    for place in places(weights):
        depths.setdefault(module_of(place), {})[place.split(".").count("base_layer")] = place
    found = {}
    for module, by_depth in depths.items():
        known = list(order(module))
        targeted = leaves(module, config) or ["weight"]
        targeted.sort(key=lambda leaf: known.index(leaf) if leaf in known else len(known))
        if sorted(by_depth) != list(range(len(targeted))):
            raise UserError(
                f"the adapter has {len(by_depth)} pairs of factors on {module} and names "
                f"{len(targeted)} of its parameters ({', '.join(targeted)})",
                "its adapter_config.json and its weights are of different adapters",
            )
        for depth, place in by_depth.items():
            found[place] = f"{module}.{targeted[len(targeted) - 1 - depth]}"
    return {place: found[place] for place in places(weights)}


def check_same_parameters(
    adapters: Sequence[tuple[LoraConfig, Mapping[str, Tensor]]], hint: str | None = None
) -> dict[str, list[str]]:
    """module -> its targeted parameters, for modules with such.

    Raises:
        UserError: two adapters target different parameters of one module.
    """
    found: dict[str, list[str]] = {}
    for config, weights in adapters:
        for module in dict.fromkeys(map(module_of, places(weights, hint))):
            mine = leaves(module, config)
            there = found.setdefault(module, mine)
            if there != mine:
                both = [", ".join(names) or "the module" for names in (there, mine)]
                raise UserError(
                    f"{module}: one adapter is on {both[0]}, the other on {both[1]}; such two cannot be one",
                    hint,
                )
    return {module: names for module, names in found.items() if names}


# ---------------------------------------------------------------- its numbers


def factors(
    place: str,
    config: LoraConfig,
    weights: Mapping[str, Tensor],
    hint: str | None = None,
    parameter: str | None = None,
) -> Factors | None:
    """An adapter's factors at one place, in float32; None where it has none.

    Args:
        parameter: what `parameters` says the place belongs to; without it, parameters of one module must not
            differ in rank or alpha.

    Raises:
        UserError: factors that do not belong together, or whose rank cannot be told.
    """
    if place + A not in weights:
        return None
    a, b = weights[place + A].detach().float(), weights[place + B].detach().float()
    r, alpha = rank_and_alpha(place, config, hint, parameter)
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] % r or a.shape[0] != b.shape[1]:
        raise UserError(
            f"{module_of(place)}: factors {tuple(a.shape)} and {tuple(b.shape)} are not of rank {r}"
        )
    experts = a.shape[0] // r
    b_EOR = b.view(b.shape[0], r, experts).permute(2, 0, 1) * scaling(r, alpha, config.use_rslora)
    return Factors(a.view(experts, r, -1), b_EOR)


def scaling(r: int, alpha: float, rslora: bool) -> float:
    """What B @ A is multiplied by: alpha/r, or alpha/sqrt(r) (rsLoRA, arXiv 2312.03732)."""
    return alpha / math.sqrt(r) if rslora else alpha / r


def rank_and_alpha(
    place: str, config: LoraConfig, hint: str | None = None, parameter: str | None = None
) -> tuple[int, float]:
    """Rank and alpha at a place. PEFT looks patterns up by the parameter's name, where one is targeted."""
    module = module_of(place)
    names = [f"{module}.{leaf}" for leaf in leaves(module, config)] or [module]
    if parameter in names:
        names = [parameter]

    def look_up(pattern: dict[str, Any], default: Any) -> set[Any]:
        return {pattern.get(get_pattern_key(list(pattern), name), default) for name in names}

    ranks, alphas = look_up(config.rank_pattern, config.r), look_up(config.alpha_pattern, config.lora_alpha)
    if len(ranks) > 1 or len(alphas) > 1:
        raise UserError(
            f"{' and '.join(names)} have different rank or alpha: their weights cannot be told apart", hint
        )
    return int(ranks.pop()), float(alphas.pop())


def padded(part: Factors | None, rank: int, shape: tuple[int, int, int]) -> Factors:
    """Factors of the given rank: zeros where there are none. `shape` is E, I, O."""
    experts, inner, outer = shape
    if part is None:
        return Factors(torch.zeros(experts, rank, inner), torch.zeros(experts, outer, rank))
    missing = rank - part.rank
    return Factors(F.pad(part.a_ERI, (0, 0, 0, missing)), F.pad(part.b_EOR, (0, missing)))


def side_by_side(parts: Sequence[Factors]) -> Factors:
    """One update that is the sum of the given ones: their ranks beside each other."""
    return Factors(torch.cat([part.a_ERI for part in parts], 1), torch.cat([part.b_EOR for part in parts], 2))


def as_peft(part: Factors) -> tuple[Tensor, Tensor]:
    """A (E*r, I) and B (O, r*E) as PEFT stores them; its scaling has to be 1, alpha = r."""
    b = part.b_EOR.permute(1, 2, 0).reshape(part.b_EOR.shape[1], -1)
    return part.a_ERI.reshape(-1, part.a_ERI.shape[-1]).contiguous(), b.contiguous()
