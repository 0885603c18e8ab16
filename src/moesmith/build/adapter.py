"""The FFN part of a PEFT LoRA folder, to be merged into the matrices of the dense model it was trained on.

An expert is an FFN, so what an adapter does to attention has no place in it: it is counted and left out.
Adapters that are more than `W + scaling * B @ A` (DoRA and others) are refused.

Shapes: r rank, `lora_A` (r, in), `lora_B` (out, r).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from moesmith.errors import UserError
from moesmith.models.headers import read_header, read_json

from .native import Kind
from .sources import Source

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PLACE = re.compile(r"(?:.*\.)?layers\.(\d+)\.mlp\.(gate|up|down)_proj")
KEY = re.compile(r"base_model\.model\.(.+)\.lora_(A|B)\.weight")

# Fields of adapter_config.json that make an adapter more than W + scaling * B @ A.
REFUSED = (
    "use_dora", "fan_in_fan_out", "layer_replication", "lora_bias", "alora_invocation_tokens", "use_qalora",
    "use_bdlora", "arrow_config", "kasa_config", "monteclora_config",
)  # fmt: skip
# Initialisations that also change the weights under the adapter, unless it was converted when saved.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class Delta:
    """Where one matrix's update lies: names of A and B in the file, and what B @ A is multiplied by."""

    a: str
    b: str
    scaling: float


@dataclass(frozen=True)
class Adapter:
    """The FFN updates of a LoRA, by layer and kind; their values stay in the file."""

    folder: Path
    deltas: dict[tuple[int, Kind], Delta]
    left_out: dict[str, int]
    """tensors that have no place in an FFN, by module: {"q_proj": 32, ...}"""
    trained_on: str | None
    """the model that it says it was trained on. Only shapes are checked: a copy may be called otherwise"""

    def merge(self, layer: int, kind: Kind, weight: Tensor) -> None:
        """Add this adapter's update to an fp32 matrix, in place; nothing where it has none."""
        delta = self.deltas.get((layer, kind))
        if delta is None:
            return
        with safe_open(self.folder / WEIGHTS, framework="pt") as file:
            a, b = file.get_tensor(delta.a).float(), file.get_tensor(delta.b).float()
        weight.addmm_(b, a, alpha=delta.scaling)


def read_adapter(folder: Path, source: Source) -> Adapter:
    """The adapter in `folder`, checked against the FFNs of `source`.

    Raises:
        UserError: no LoRA in safetensors, one that cannot be merged by adding B @ A, no FFN part, shapes or
            layers that `source` does not have.
    """
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder} is no PEFT adapter: it has no {CONFIG}")
    config = read_json(folder / CONFIG)
    _check_plain(folder, config)
    if not (folder / WEIGHTS).is_file():
        raise UserError(
            f"{folder} has no {WEIGHTS}", "save it as safetensors: peft_model.save_pretrained(folder)"
        )
    tensors = read_header(folder / WEIGHTS)
    found: dict[tuple[int, Kind], dict[str, str]] = {}
    left_out: dict[str, int] = {}
    for name in tensors:
        key = KEY.fullmatch(name)
        place = PLACE.fullmatch(key[1]) if key else None
        if key is None or place is None:
            if PLACE.match(name.removeprefix("base_model.model.")):
                raise UserError(
                    f"{folder}: {name} is not a plain LoRA of an FFN", "only lora_A and lora_B are"
                )
            module = key[1] if key else name.removesuffix(".weight")
            module = module.rpartition(".")[2]
            left_out[module] = left_out.get(module, 0) + 1
            continue
        kind: Kind = place[2]  # type: ignore[assignment]  # what PLACE admits
        pair = found.setdefault((int(place[1]), kind), {})
        if key[2] in pair:
            raise UserError(f"{folder}: both {pair[key[2]]} and {name} update the same matrix")
        pair[key[2]] = name
    if not found:
        raise UserError(
            f"{folder} changes no FFN, only {', '.join(sorted(left_out)) or 'nothing'}",
            "an expert is an FFN: its adapter needs gate_proj, up_proj or down_proj among its target_modules",
        )
    deltas = {}
    for (layer, kind), pair in sorted(found.items()):
        if len(pair) != 2:
            raise UserError(f"{folder}: {next(iter(pair.values()))} has no other half")
        rank, scaling = _rank_and_scaling(config, KEY.sub(r"\1", pair["A"]))
        if layer >= source.num_layers:
            raise UserError(f"{folder} updates layer {layer}; {source.name} has {source.num_layers} layers")
        out, into = source.tensors[source.ffn(layer, kind)].shape
        seen, wanted = (tensors[pair["B"]].shape, tensors[pair["A"]].shape), ((out, rank), (rank, into))
        if seen != wanted:
            raise UserError(
                f"{folder}: {pair['B']} {list(seen[0])} and its lora_A {list(seen[1])}, wanted "
                f"{list(wanted[0])} and {list(wanted[1])} for {source.name}",
                "the adapter must have been trained on the expert's source_model",
            )
        deltas[layer, kind] = Delta(pair["A"], pair["B"], scaling)
    return Adapter(folder, deltas, dict(sorted(left_out.items())), config.get("base_model_name_or_path"))


def _check_plain(folder: Path, config: dict[str, Any]) -> None:
    """Raise UserError unless merging this adapter is adding scaling * B @ A."""
    if config.get("peft_type") != "LORA":
        raise UserError(f"{folder}: peft_type is {config.get('peft_type')!r}, wanted 'LORA'")
    odd = [f"{key}={config[key]}" for key in REFUSED if config.get(key)]
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(CHANGES_BASE):
        odd.append(f"init_lora_weights={start}")
    if odd:
        raise UserError(
            f"{folder}: LoRA with {', '.join(odd)} is not merged here",
            "merge it into its model with PEFT (merge_and_unload), save that and give it as source_model",
        )


def _rank_and_scaling(config: dict[str, Any], module: str) -> tuple[int, float]:
    """r and the factor of B @ A for one module, as PEFT computes them: patterns are regular expressions."""

    def patterned(pattern: str, default: str) -> float:
        for key, value in (config.get(pattern) or {}).items():
            if re.match(rf"(.*\.)?({key})$", module):
                return value
        return config.get(default, 8)

    rank, alpha = int(patterned("rank_pattern", "r")), patterned("alpha_pattern", "lora_alpha")
    return rank, alpha / (rank**0.5 if config.get("use_rslora") else rank)
