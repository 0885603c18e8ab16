"""Keep a subset of the experts of each MoE layer, on a live model.

`masked` cuts only the router, for as long as a `with` block lasts: the experts stay where they are and
`experts_kept` tells the experts function which they are. `slice_model` does it for good. Both give the same
logits, and the same as a router that can never choose a dropped expert. `resized_config` is what config.json
becomes. Shared experts, and router rows that belong to no expert, are untouched.
"""

# E experts, K experts per token

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import UserError
from ..experts.forward import use_experts_function
from .anatomy import meta_model
from .hash_tables import cut_expert_ids
from .layers import MoELayer, expert_id_tensors, moe_layers, per_expert_tensors, submodule, text_layers

Keep = dict[str, list[int]]
"""MoELayer.name -> kept expert ids, ascending, in the original numbering; a layer not named is whole."""

# What a config calls its number of experts; several of them may be aliases of one.
CONFIG_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
# What modules call it, and a router the number of its rows.
_COUNTS = (*CONFIG_COUNTS, "num_router_classes", "n_total_experts", "out_features")

Change = tuple[dict[str, Any], str, Any]  # where a module keeps something, under which key, its new value


def check_keep(layers: list[MoELayer], keep: Keep, uneven: bool = False) -> None:
    """Refuse a choice of experts that the model could not run with.

    Args:
        layers: every MoE layer of the model.
        uneven: let layers differ in how many they keep. No config can say that: such a model only lives.

    Raises:
        UserError: unknown layers or ids, ids out of order, fewer than top-k, unequal layers, unequal groups
            or too small ones where routing is group-limited.
    """
    known = {layer.name: layer for layer in layers}
    for name, kept in keep.items():
        if name not in known:
            raise UserError(
                f"no MoE layer is called {name!r}",
                f"the model has {layers[0].name} ... {layers[-1].name}" if layers else "the model is dense",
            )
        _check_layer(known[name], kept)
    counts: dict[str, dict[int, str]] = {}  # of layers that share a config
    for layer in layers:
        counts.setdefault(layer.model_type, {}).setdefault(_kept_count(layer, keep), layer.name)
    for by_count in counts.values():
        if len(by_count) > 1 and not uneven:
            said = ", ".join(f"{count} in {name}" for count, name in list(by_count.items())[:3])
            raise UserError(
                f"layers keep different numbers of experts: {said}",
                "a config holds one number for all layers; keep equally many in each",
            )


def _check_layer(layer: MoELayer, kept: list[int]) -> None:
    E, where = layer.num_experts, layer.name
    wrong = [expert for expert in kept if not 0 <= expert < E]
    if wrong:
        raise UserError(f"{where} has no expert {wrong[0]}", f"its experts are 0 to {E - 1}")
    if any(a >= b for a, b in zip(kept, kept[1:], strict=False)):
        raise UserError(f"{where}: kept experts are not in ascending order, or one is named twice")
    if len(kept) < layer.top_k:
        raise UserError(
            f"{where} would keep {len(kept)} experts, but a token goes to {layer.top_k}",
            f"keep at least {minimum_kept(layer)}",
        )
    if layer.n_group > 1:
        size = E // layer.n_group
        in_group = [0] * layer.n_group
        for expert in kept:
            in_group[expert // size] += 1
        if len(set(in_group)) > 1:
            raise UserError(
                f"{where} routes by groups of {size} experts and would keep {in_group} of them",
                f"keep equally many in each of the {layer.n_group} groups",
            )
        if len(kept) < minimum_kept(layer):
            raise UserError(
                f"{where} would keep {in_group[0]} experts in each group, but a token's {layer.top_k} come "
                f"from {layer.topk_group} of {layer.n_group} groups",
                f"keep at least {minimum_kept(layer)}",
            )


def minimum_kept(layer: MoELayer) -> int:
    """The fewest experts the layer can route with.

    Top-k, or with groups: enough in the groups a token's experts come from, and the two whose scores most
    such routers add up to compare groups.
    """
    if layer.n_group == 1:
        return layer.top_k
    return layer.n_group * max(2, -(-layer.top_k // layer.topk_group))


@contextmanager
def masked(model: nn.Module, keep: Keep) -> Iterator[None]:
    """Run a model, packed or not, as if only these experts were there; everything comes back afterwards.

    Router tensors are swapped for their kept rows, so a layer costs a copy of its router and nothing else.
    Experts are computed by moesmith's experts function meanwhile. Layers may keep different numbers.

    Args:
        model: a transformers model, with PEFT adapters or without; LoRA on the router is cut along.

    Raises:
        UserError: see `check_keep`; a router that PEFT trains in a way that cannot be cut.
    """
    layers = moe_layers(model)
    check_keep(layers, keep, uneven=True)
    cut = [layer for layer in layers if _kept_count(layer, keep) < layer.num_experts]
    with ExitStack() as undo:
        if cut:
            undo.enter_context(use_experts_function(_root(model)))
        changes = _count_changes(model, layers, keep, own_configs=True)
        for layer in cut:
            changes += _mask_changes(model, layer, keep[layer.name])
        for holder, key, value in changes:
            if key in holder:
                undo.callback(holder.__setitem__, key, holder[key])
            else:
                undo.callback(holder.pop, key, None)
            holder[key] = value
        yield


def _mask_changes(model: nn.Module, layer: MoELayer, kept: list[int]) -> list[Change]:
    experts: Any = submodule(model, layer.experts)
    if hasattr(experts, "experts_kept"):
        raise UserError(f"{layer.name} is masked already: a mask inside a mask would cut its router twice")
    changes: list[Change] = [
        (vars(experts), "experts_kept", torch.tensor(kept, device=experts.down_proj.device))
    ]
    for name, cut_rows in _cuts(model, layer, kept).items():
        if not name.startswith(layer.experts + "."):
            holder, key = _place(model, name)
            old, new = holder[key], cut_rows()
            is_parameter = isinstance(old, nn.Parameter)
            changes.append((holder, key, nn.Parameter(new, old.requires_grad) if is_parameter else new))
            changes += _adapter_changes(model, name, _rows(kept, layer, len(old)))
    return changes


def _adapter_changes(model: nn.Module, name: str, rows: list[int]) -> list[Change]:
    """LoRA around a router's linear or parameter: the output side of its factors has a row per expert too."""
    changes: list[Change] = []
    path, _, key = name.rpartition(".")
    above, _, last = path.rpartition(".")
    module = submodule(model, above)._modules[last]
    while module is not None and module is not submodule(model, path):
        inner = module._modules.get("base_layer")
        factors = module._modules.get("lora_B")
        if inner is None or factors is None or len(module._modules.get("lora_magnitude_vector") or ()):
            raise UserError(
                f"{path} is wrapped by PEFT's {type(module).__name__}, whose weights cannot be masked",
                "merge the adapter first, or use plain LoRA on the router",
            )
        if getattr(module, "parameter_name", key) == key:
            for factor in factors.children():
                for tensor, value in factor._parameters.items():
                    if value is not None:
                        new = nn.Parameter(value.data[rows], value.requires_grad)
                        changes.append((factor._parameters, tensor, new))
        module = inner
    return changes


def slice_model(model: nn.Module, keep: Keep, uneven: bool = False) -> None:
    """Drop all other experts for good: weights, packed codes and scales, biases, router rows, counts, config.

    The model is then what `save_pretrained` and `from_pretrained` make of it, unless `uneven`: one config
    cannot say different counts, so it is left as it was and the model cannot be reloaded by itself.

    Raises:
        UserError: see `check_keep`; a model with adapters; layers that share weights but not their choice.
    """
    if any("base_layer" in module._modules for module in model.modules()):
        raise UserError(
            "a model with adapters cannot be sliced: their factors would no longer fit",
            "merge the adapter, or unload it, slice, and train a new one",
        )
    layers = moe_layers(model)
    check_keep(layers, keep, uneven)
    _check_tied(model, layers, keep)
    cut = [layer for layer in layers if _kept_count(layer, keep) < layer.num_experts]
    changes = _count_changes(model, layers, keep, own_configs=False)
    done: set[int] = set()
    for layer in cut:
        experts = submodule(model, layer.experts)
        changes += _counts(experts, {layer.num_experts}, layer.num_experts - len(keep[layer.name]))
        for name, cut_rows in _cuts(model, layer, keep[layer.name]).items():
            tensor = _tensor(model, name)
            if id(tensor) not in done:  # not tied to one that was cut before
                done.add(id(tensor))
                tensor.grad = None
                tensor.data = cut_rows()  # the same Parameter, so that what is tied stays tied
    for holder, key, value in changes:
        holder[key] = value
    for layer in cut:
        if _is_even(layer, layers, keep):
            for config in _configs(model, layer.model_type):
                _set_counts(config, layer.num_experts, len(keep[layer.name]))


def resized_config(config: dict[str, Any], num_experts: int) -> dict[str, Any]:
    """config.json of the text model with another number of experts, under whatever keys it is kept.

    The result is proved by building the model without memory and looking at its experts. Towers keep theirs.

    Raises:
        UserError: no experts, fewer than top-k, or no key that changes the number.
    """
    model = meta_model(config)
    layers = text_layers(model)
    if not layers:
        raise UserError(f"{config.get('model_type')} has no experts that transformers dispatches")
    top_k = max(layer.top_k for layer in layers)
    if num_experts < top_k:
        raise UserError(
            f"a config with {num_experts} experts, but a token goes to {top_k}", f"at least {top_k}"
        )
    owner: PreTrainedConfig = submodule(model, layers[0].experts).config  # type: ignore[assignment]
    resized = copy.deepcopy(config)
    holder = resized
    for part in _path_to(submodule(model, "").config, owner) or ():  # type: ignore[arg-type]
        inner = holder.get(part)  # a flat config leaves the sub-config out, or says null
        holder = holder if inner is None else inner
    keys = [key for key in CONFIG_COUNTS if key in holder]
    if not keys:  # left at its default: written under the name that is no alias
        keys = [owner.attribute_map.get(key, key) for key in CONFIG_COUNTS if hasattr(owner, key)][:1]
    for key in keys:
        old = holder.get(key)
        holder[key] = [num_experts] * len(old) if isinstance(old, list) else num_experts
    counts = {layer.num_experts for layer in text_layers(meta_model(resized))} if keys else None
    if counts != {num_experts}:
        raise UserError(
            f"the number of experts of {config.get('model_type')} cannot be changed in its config"
            + (f": {', '.join(keys)} = {num_experts} gives {sorted(counts)}" if counts else "")
        )
    return resized


# ---------------------------------------------------------------- tensors


def _kept_count(layer: MoELayer, keep: Keep) -> int:
    return len(keep[layer.name]) if layer.name in keep else layer.num_experts


def _is_even(layer: MoELayer, layers: list[MoELayer], keep: Keep) -> bool:
    """Whether all layers that share this one's config keep as many as it does."""
    counts = {_kept_count(other, keep) for other in layers if other.model_type == layer.model_type}
    return len(counts) == 1


def _rows(kept: list[int], layer: MoELayer, size: int) -> list[int]:
    """Kept rows of a tensor that may have more than one per expert: the others stay, and stay last."""
    return [*kept, *range(layer.num_experts, size)]


def _cuts(model: nn.Module, layer: MoELayer, kept: list[int]) -> Mapping[str, Callable[[], Tensor]]:
    """Tensor name -> what makes its successor: kept slices of it, or its ids renumbered. One copy each."""

    def cut(name: str, dim: int) -> Tensor:
        tensor = _tensor(model, name).data
        rows = torch.tensor(_rows(kept, layer, tensor.shape[dim]), device=tensor.device)
        return tensor.index_select(dim, rows)

    def renumber(name: str) -> Tensor:
        table = _tensor(model, name).data
        ids = cut_expert_ids(table.cpu().numpy(), kept, layer.num_experts)
        return torch.from_numpy(ids).to(table.device)

    cuts = {name: partial(cut, name, dim) for name, dim in per_expert_tensors(model, layer).items()}
    return cuts | {name: partial(renumber, name) for name in expert_id_tensors(model, layer)}


def _check_tied(model: nn.Module, layers: list[MoELayer], keep: Keep) -> None:
    """Layers that are one in memory (`diffusion_gemma`'s encoder and decoder) lose the same experts."""
    owners: dict[int, MoELayer] = {}
    for layer in layers:
        for name in per_expert_tensors(model, layer):
            other = owners.setdefault(id(_tensor(model, name)), layer)
            if keep.get(other.name) != keep.get(layer.name):
                raise UserError(
                    f"{other.name} and {layer.name} share their weights but would keep different experts",
                    "give both the same list",
                )


def _place(model: nn.Module, name: str) -> tuple[dict[str, Any], str]:
    """The dictionary a module keeps this parameter or buffer in, and its key there."""
    path, _, key = name.rpartition(".")
    module = submodule(model, path)
    return (module._parameters if key in module._parameters else module._buffers), key


def _tensor(model: nn.Module, name: str) -> Tensor:
    holder, key = _place(model, name)
    return holder[key]


# ---------------------------------------------------------------- counts


def _count_changes(model: nn.Module, layers: list[MoELayer], keep: Keep, own_configs: bool) -> list[Change]:
    """The number of experts wherever modules other than the experts have noted it.

    Args:
        own_configs: give each router a config of its own, because the shared one is not changed. Where
            layers are uneven they get one anyway.

    Raises:
        UserError: one module above two layers that keep different numbers (`ernie4_5_vl_moe` writes the
            router logits of its text and its vision experts into one tensor).
    """
    changes: list[Change] = []
    above: dict[str, list[MoELayer]] = {}
    for layer in layers:
        parts = layer.name.split(".")
        for length in range(len(parts) + 1):
            above.setdefault(".".join(parts[:length]), []).append(layer)
        dropped = layer.num_experts - _kept_count(layer, keep)
        if dropped:
            own_config = own_configs or not _is_even(layer, layers, keep)
            changes += _router_changes(model, layer, dropped, own_config)
    for name, below in above.items():
        module = submodule(model, name)
        for key in CONFIG_COUNTS:
            value = vars(module).get(key)
            counts = {_kept_count(layer, keep) for layer in below if layer.num_experts == value}
            if len(counts) == 1 and counts != {value}:
                changes.append((vars(module), key, counts.pop()))
            elif len(counts) > 1 and not isinstance(module, PreTrainedModel):  # there, for the balancing loss
                raise UserError(
                    f"{name}: its {len(below)} sets of experts would keep {sorted(counts)}, "
                    "but they have to be equally many",
                    f"give {' and '.join(layer.name for layer in below)} lists of one length",
                )
    return changes


def _router_changes(model: nn.Module, layer: MoELayer, dropped: int, own_config: bool) -> list[Change]:
    router = submodule(model, layer.router)
    modules = {id(router): router}
    sizes = {layer.num_experts}
    for name, dim in per_expert_tensors(model, layer).items():
        if name.startswith(layer.router + "."):
            holder = submodule(model, name.rpartition(".")[0])
            modules[id(holder)] = holder
            sizes.add(_tensor(model, name).shape[dim])
    changes = [change for module in modules.values() for change in _counts(module, sizes, dropped)]
    config = vars(router).get("config")
    if own_config and isinstance(config, PreTrainedConfig):  # `zaya` reads it while routing
        config = copy.copy(config)
        _set_counts(config, layer.num_experts, layer.num_experts - dropped)
        changes.append((vars(router), "config", config))
    return changes


def _counts(module: nn.Module, sizes: set[int], dropped: int) -> list[Change]:
    noted = {key: vars(module).get(key) for key in _COUNTS}
    return [(vars(module), key, value - dropped) for key, value in noted.items() if value in sizes]


def _set_counts(config: PreTrainedConfig, old: int, new: int) -> None:
    for key in CONFIG_COUNTS:
        value = getattr(config, key, None)
        if value == old:
            setattr(config, key, new)
        elif isinstance(value, list) and old in value:
            setattr(config, key, [new if count == old else count for count in value])


def _configs(model: nn.Module, model_type: str) -> list[PreTrainedConfig]:
    """Every config object of this type that the model or a module of it holds."""
    found: dict[int, PreTrainedConfig] = {}

    def add(config: Any) -> None:
        if isinstance(config, PreTrainedConfig) and id(config) not in found:
            found[id(config)] = config
            for name in config.sub_configs:
                add(getattr(config, name, None))

    for module in model.modules():
        add(vars(module).get("config"))
    return [config for config in found.values() if config.model_type == model_type]


def _path_to(config: PreTrainedConfig, wanted: PreTrainedConfig) -> list[str] | None:
    """Names of the sub-configs that lead to one, [] for the config itself."""
    if config is wanted:
        return []
    for name in config.sub_configs:
        inner = getattr(config, name, None)
        below = _path_to(inner, wanted) if isinstance(inner, PreTrainedConfig) else None
        if below is not None:
            return [name, *below]
    return None


def _root(model: nn.Module) -> nn.Module:
    return submodule(model, "")
