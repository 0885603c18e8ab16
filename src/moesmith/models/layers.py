"""Find a model's MoE layers and the places an adapter can go.

Works on any decorated MoE model, found by structure: in memory or on the meta device, plain, packed, or inside PEFT.
Names are those of the plain model: what PEFT puts around a module (`base_model.model.`, `.base_layer`) is left out,
so they are also the names a LoraConfig wants; `submodule` finds the module behind such a name.
"""

# E experts

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..errors import UserError
from ..experts.storage import is_experts, weight_names
from .families import Family, family

PLACEMENTS = ("experts", "attention", "router", "shared_experts", "dense_mlp")

_TOP_K = ("top_k", "num_experts_per_tok", "top_k_experts", "moe_topk", "moe_k")
_GROUPS = ("num_group", "n_group", "num_expert_group")


@dataclass(frozen=True)
class MoELayer:
    """One MoE block: where its parts are and how many experts a token gets."""

    name: str
    """the module that holds router and experts"""
    router: str
    experts: str
    num_experts: int
    top_k: int
    n_group: int
    """groups that group-limited routing compares first; 1 without them"""
    model_type: str
    """of the config the experts were built from"""

    @property
    def family(self) -> Family:
        return family(self.model_type)


def moe_layers(model: nn.Module) -> list[MoELayer]:
    """Every MoE block of the model in order, text and other towers alike; empty for a dense model.

    Raises:
        UserError: experts without a router beside them, an architecture that `families` does not describe.
    """
    layers = []
    for name, module in _modules(model):
        if is_experts(module):
            layers.append(_moe_layer(model, name, module))
    return layers


def _moe_layer(model: nn.Module, name: str, experts: Any) -> MoELayer:
    block_name = name.rpartition(".")[0]
    block = submodule(model, block_name)
    model_type = getattr(experts.config, "model_type", "")
    routers = [
        attr for attr in family(model_type).router if isinstance(getattr(block, attr, None), nn.Module)
    ]
    if not routers:
        raise UserError(
            f"{block_name} ({type(block).__name__}) has experts but no {' or '.join(family(model_type).router)}",
            f"{model_type} needs a row in moesmith/models/families.py",
        )
    router = _bare(getattr(block, routers[0]))
    return MoELayer(
        name=block_name,
        router=f"{block_name}.{routers[0]}",
        experts=name,
        num_experts=experts.num_experts,
        top_k=_first((router, block, experts.config), _TOP_K),
        n_group=_first((router, experts.config), _GROUPS, default=1) or 1,
        model_type=model_type,
    )


def submodule(model: nn.Module, name: str) -> nn.Module:
    """The model's own module of that name, whatever PEFT has put around it or the modules above it."""
    module = _bare(model)
    for part in name.split(".") if name else ():
        module = _bare(getattr(module, part))
    return module


def per_expert_tensors(model: nn.Module, layer: MoELayer) -> dict[str, int]:
    """Every tensor of the layer that has one slice per expert -> the dimension the experts lie along.

    Parameters and buffers, of the experts (weights, biases, packed codes and scales) and of the router. A router may
    have more rows than experts (`zaya`: one that skips the layer); the first `num_experts` are the experts'.
    """
    found = {
        f"{layer.experts}.{name}": 0
        for name, tensor in _own_tensors(submodule(model, layer.experts))
        if tensor.ndim and tensor.shape[0] == layer.num_experts
    }
    on_router = [f"{layer.router}.{name}" for name in layer.family.per_expert]
    for full_name in [*on_router, *(f"{layer.name}.{name}" for name in layer.family.block_per_expert)]:
        tensor = _tensor(model, full_name)
        if tensor is not None:
            # ernie keeps a correction bias as (1, E).
            found[full_name] = 1 if tensor.ndim == 2 and tensor.shape[0] == 1 != layer.num_experts else 0
    return found


def expert_id_tensors(model: nn.Module, layer: MoELayer) -> list[str]:
    """Names of the layer's tensors whose values are expert ids: they are renumbered when experts move."""
    names = [f"{layer.router}.{name}" for name in layer.family.expert_ids]
    return [name for name in names if _tensor(model, name) is not None]


def adapter_targets(model: nn.Module, placements: Iterable[str]) -> tuple[list[str], list[str]]:
    """What to give peft.LoraConfig for adapters on the named placements of the text model.

    Args:
        model: any MoE model; towers for images and audio, embeddings and the output head are never included.
        placements: any of "experts", "attention", "router", "shared_experts", "dense_mlp".

    Returns:
        (target_modules, target_parameters): full names of nn.Linear modules, and of parameters that belong to no
        nn.Linear (the stacked experts, most routers).

    Raises:
        UserError: an unknown placement, or one that this model has no module for.
    """
    asked = list(dict.fromkeys(placements))
    unknown = [placement for placement in asked if placement not in PLACEMENTS]
    if unknown:
        raise UserError(f"unknown adapter placement {unknown[0]!r}", f"use any of {', '.join(PLACEMENTS)}")
    if not asked:
        raise UserError("no adapter placement was given", f"use any of {', '.join(PLACEMENTS)}")
    found = _all_targets(model)
    missing = [placement for placement in asked if not any(found[placement])]
    if missing:
        present = [placement for placement in PLACEMENTS if any(found[placement])]
        raise UserError(
            f"{type(_bare(model)).__name__} has no {missing[0]} for an adapter to go on",
            f"it has {', '.join(present)}" if present else "it has no experts that transformers dispatches",
        )
    modules, parameters = ([name for p in asked for name in found[p][kind]] for kind in (0, 1))
    return modules, parameters


def _all_targets(model: nn.Module) -> dict[str, tuple[list[str], list[str]]]:
    """placement -> (target_modules, target_parameters)."""
    found: dict[str, tuple[list[str], list[str]]] = {placement: ([], []) for placement in PLACEMENTS}

    def add(placement: str, prefix: str, names: Family, parameters: bool = False) -> None:
        targets = _targets(submodule(model, prefix), prefix, names.no_adapter, parameters)
        for kind, of_kind in zip(found[placement], targets, strict=True):
            kind.extend(name for name in of_kind if name not in kind)

    layers = [layer for layer in moe_layers(model) if _is_text(model, layer)]
    with_experts = [layer.name for layer in layers]
    for stack_name, names in {
        _decoder_layer(layer.name).rpartition(".")[0]: layer.family for layer in layers
    }.items():
        for index, decoder_layer in submodule(model, stack_name).named_children():
            for attr in dict.fromkeys(names.attention + names.dense_mlp):
                part = getattr(_bare(decoder_layer), attr, None)
                prefix = f"{stack_name}.{index}.{attr}"
                if isinstance(part, nn.Module) and not any(
                    _is_below(block, prefix) for block in with_experts
                ):
                    is_mlp = attr not in names.attention or hasattr(_bare(part), "down_proj")
                    add("dense_mlp" if attr in names.dense_mlp and is_mlp else "attention", prefix, names)
    for layer in layers:
        if any(part in layer.family.no_adapter for part in layer.name.split(".")):
            continue
        experts = submodule(model, layer.experts)
        found["experts"][1].extend(f"{layer.experts}.{name}" for name in weight_names(experts))
        add("router", layer.router, layer.family)
        for name in layer.family.per_expert:
            tensor = _tensor(model, f"{layer.router}.{name}")
            owner = submodule(model, f"{layer.router}.{name}".rpartition(".")[0])
            if (
                tensor is not None
                and tensor.ndim == 2
                and tensor.shape[0] >= layer.num_experts
                and not _is_linear(owner)
            ):
                found["router"][1].append(f"{layer.router}.{name}")
        for prefix in _up_to_decoder_layer(layer.name):
            for attr in layer.family.shared_experts:
                if isinstance(getattr(submodule(model, prefix), attr, None), nn.Module):
                    add("shared_experts", f"{prefix}.{attr}", layer.family, parameters=True)
    return found


def _targets(
    module: nn.Module, prefix: str, skip: tuple[str, ...], parameters: bool
) -> tuple[list[str], list[str]]:
    """Full names of the linears below `module`, and of matrices that it holds itself if `parameters`."""
    linears = [
        f"{prefix}.{name}" if name else prefix
        for name, part in _modules(module)
        if _is_linear(part) and not any(word in skip for word in name.split("."))
    ]
    own = _own_tensors(module) if parameters and not _is_linear(module) else ()
    return linears, [f"{prefix}.{name}" for name, tensor in own if tensor.ndim == 3]


def _is_linear(module: nn.Module) -> bool:
    """nn.Linear or a quantised one; not an architecture's subclass with a forward of its own (deepseek_v4, phimoe)."""
    return isinstance(module, nn.Linear) and not type(module).__module__.startswith("transformers.models.")


def _is_text(model: nn.Module, layer: MoELayer) -> bool:
    """Whether the layer belongs to the model's text decoder (`dots3_note` has vision experts, `qwen3_omni` a talker)."""
    config = getattr(_bare(model), "config", None)
    return config is None or config.get_text_config().model_type in (layer.model_type, "")


def _decoder_layer(name: str) -> str:
    """model.layers.3.mlp -> model.layers.3"""
    parts = name.split(".")
    while parts and not parts[-1].isdigit():
        parts.pop()
    return ".".join(parts) or name


def _up_to_decoder_layer(name: str) -> Iterator[str]:
    """model.layers.3.mlp -> itself, then model.layers.3"""
    top = _decoder_layer(name)
    while name != top:
        yield name
        name = name.rpartition(".")[0]
    yield top


def _is_below(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def _bare(module: nn.Module) -> nn.Module:
    """The model's own module inside what PEFT wrapped around it: PeftModel, tuner layers, modules to save."""
    if hasattr(module, "get_base_model"):
        module = module.get_base_model()
    while True:
        inner = module._modules.get("base_layer") or module._modules.get("original_module")
        if inner is None:
            return module
        module = inner


def _modules(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """`named_modules` of the plain model."""
    module = _bare(module)
    yield name, module
    for key, child in module.named_children():
        yield from _modules(child, f"{name}.{key}" if name else key)


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers of the module itself, not of its children."""
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)


def _tensor(model: nn.Module, name: str) -> Tensor | None:
    """The parameter or buffer of that name, None if the model has none."""
    module = submodule(model, "")
    *path, last = name.split(".")
    for part in path:
        child = module._modules.get(part)
        if child is None:
            return None
        module = _bare(child)
    return dict(_own_tensors(module)).get(last)


def _first(holders: tuple[Any, ...], names: tuple[str, ...], default: int | None = None) -> int:
    """The first of these attributes that one of the holders has."""
    for holder in holders:
        for name in names:
            value = getattr(holder, name, None)
            if isinstance(value, int):
                return value
    if default is None:
        raise UserError(f"none of {', '.join(names)} says how many experts a token gets")
    return default
