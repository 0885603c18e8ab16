"""Find a model's MoE layers and the places an adapter can go.

Works on any decorated MoE model, found by structure: in memory or on the meta device, plain, packed, or
inside PEFT. Names are those of the plain model: what PEFT puts around a module (`base_model.model.`,
`.base_layer`) is left out, so they are also the names a LoraConfig wants; `submodule` finds the module
behind such a name.
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
    topk_group: int = 1
    """of these groups, how many a token's experts come from"""

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


def text_layers(model: nn.Module) -> list[MoELayer]:
    """The MoE layers that text runs through: of the text decoder, without experts kept for images.

    `dots3_note` has vision experts too, `qwen3_omni_moe` a talker; `ernie4_5_vl_moe` has both in a layer.
    """
    config = getattr(_bare(model), "config", None)
    text = "" if config is None else config.get_text_config().model_type
    layers = [layer for layer in moe_layers(model) if text in (layer.model_type, "")]
    return [layer for layer in layers if not set(layer.name.split(".")) & set(layer.family.no_adapter)]


def _moe_layer(model: nn.Module, name: str, experts: Any) -> MoELayer:
    block_name = name.rpartition(".")[0]
    block = submodule(model, block_name)
    model_type = getattr(experts.config, "model_type", "")
    routers = [
        attr for attr in family(model_type).router if isinstance(getattr(block, attr, None), nn.Module)
    ]
    if not routers:
        raise UserError(
            f"{block_name} ({type(block).__name__}) has experts but no router beside them",
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
        topk_group=_first((router, experts.config), ("topk_group",), default=1),
    )


def submodule(model: nn.Module, name: str) -> nn.Module:
    """The model's own module of that name, whatever PEFT has put around it or the modules above it."""
    module = _bare(model)
    for part in name.split(".") if name else ():
        module = _bare(getattr(module, part))
    return module


def per_expert_tensors(model: nn.Module, layer: MoELayer) -> dict[str, int]:
    """Every tensor of the layer that has one slice per expert -> the dimension the experts lie along.

    Parameters and buffers, of the experts (weights, biases, packed codes and scales) and of the router. A
    router may have more rows than experts (`zaya`: one that skips the layer): the first `num_experts` are the
    experts'.
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
        (target_modules, target_parameters): full names of nn.Linear modules, and of parameters: the stacked
        experts, routers that are no nn.Linear, and linears that PEFT would misread as experts. PEFT takes no
        lora_dropout with target_parameters.

    Raises:
        UserError: an unknown placement, one that this model has no module for, or an adapter that PEFT could
            train but not load back or merge.
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
    _refuse_unsound(model, asked, modules, parameters)
    taken = _taken_for_experts(model, modules)
    parameters += [f"{name}.weight" for name in modules if name in taken]
    return [name for name in modules if name not in taken], parameters


def _taken_for_experts(model: nn.Module, modules: list[str]) -> set[str]:
    """Linears that have to be named by their weight.

    For model types whose experts were lists of linears once (glm4_moe, qwen3_next...), PEFT reads any target
    module called gate_proj, up_proj or down_proj, a shared expert's too, as those lists: without a word it
    drops the target for an adapter of twice the rank on the stacked experts. Parameters it takes as they are.
    """
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    partners = ("gate_proj", "up_proj", "w1", "w3")  # PEFT raises for a gate without its up projection
    probe = LoraConfig(target_modules=[*modules, *(f"moesmith.{leaf}" for leaf in partners)])
    convert_peft_config_for_transformers(probe, model=_bare(model), conversions=None)
    taken = set(modules) - set(probe.target_modules or ())
    for name in modules:
        if name in taken and type(submodule(model, name)) is not nn.Linear:
            raise UserError(
                f"PEFT cannot put an adapter on {name} of this model type while it is quantised",
                "load with linears=None, or leave this placement out",
            )
    return taken


def _refuse_unsound(
    model: nn.Module, placements: list[str], modules: list[str], parameters: list[str]
) -> None:
    """UserError for adapters that could be trained but not loaded or merged, or that would spread."""
    for layer in text_layers(model):
        lost = layer.family.lost_adapters
        for placement in placements:
            if placement in lost:
                raise UserError(
                    f"PEFT cannot load an adapter on {placement} of {layer.model_type} back: it renames the "
                    "adapter's tensors like those of the original checkpoint, and then finds none",
                    "placements that work: " + (", ".join(p for p in PLACEMENTS if p not in lost) or "none"),
                )
    targets: dict[int, str] = {}
    for target in [*parameters, *(f"{name}.weight" for name in modules)]:
        other = targets.setdefault(id(_tensor(model, target)), target)
        if other != target:
            raise UserError(
                f"{other} and {target} are one tensor: an adapter for each can be trained but not merged",
                "choose placements without tied weights",
            )
    holders = {*modules, *(name.rpartition(".")[0] for name in parameters)}
    for name, _ in _modules(model):
        parts = name.split(".")
        for start in range(1, len(parts)):
            target = ".".join(parts[start:])
            if target in holders:  # PEFT compares ends of names
                raise UserError(
                    f"PEFT would put the adapter of {target} on {name} too", "adapt a part of the model"
                )


def _all_targets(model: nn.Module) -> dict[str, tuple[list[str], list[str]]]:
    """placement -> (target_modules, target_parameters)."""
    found: dict[str, tuple[list[str], list[str]]] = {placement: ([], []) for placement in PLACEMENTS}

    def add(placement: str, prefix: str, names: Family, parameters: bool = False) -> None:
        targets = _targets(submodule(model, prefix), prefix, names.no_adapter, parameters)
        for kind, of_kind in zip(found[placement], targets, strict=True):
            kind.extend(name for name in of_kind if name not in kind)

    layers = text_layers(model)
    with_experts = {above for layer in layers for above in _up_to_decoder_layer(layer.name)}
    stacks = {_decoder_layer(layer.name).rpartition(".")[0]: layer.family for layer in layers}
    for stack, names in stacks.items():
        for index, decoder_layer in submodule(model, stack).named_children():
            for attr in dict.fromkeys(names.attention + names.dense_mlp):
                part = getattr(_bare(decoder_layer), attr, None)
                prefix = f"{stack}.{index}.{attr}"
                if isinstance(part, nn.Module) and prefix not in with_experts:
                    is_mlp = attr not in names.attention or hasattr(_bare(part), "down_proj")
                    add("dense_mlp" if attr in names.dense_mlp and is_mlp else "attention", prefix, names)
    for layer in layers:
        if any(part in layer.family.no_adapter for part in layer.name.split(".")):
            continue
        experts = submodule(model, layer.experts)
        found["experts"][1].extend(f"{layer.experts}.{name}" for name in weight_names(experts))
        add("router", layer.router, layer.family)
        for name in layer.family.per_expert:
            parameter = f"{layer.router}.{name}"
            tensor, holder = _tensor(model, parameter), submodule(model, parameter.rpartition(".")[0])
            if tensor is not None and not _is_linear(holder):
                if tensor.ndim == 2 and tensor.shape[0] >= layer.num_experts:
                    found["router"][1].append(parameter)
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
    """nn.Linear, quantised or not, but no architecture's subclass with its own forward (deepseek_v4)."""
    return isinstance(module, nn.Linear) and not type(module).__module__.startswith("transformers.models.")


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
