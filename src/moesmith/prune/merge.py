"""Merge experts instead of dropping them: which go together, what their average is, and a way to try it live.

The baselines that pruning is measured against, at the same number of experts:

    average    the most used experts stay, every other joins the one with the most similar weights; plain mean
    frequency  like M-SMoE: joins the one with the most similar router row; mean weighted by use
    hc         like HC-SMoE: average-linkage clusters of the experts' mean outputs; mean weighted by use
    ream       like REAM: experts with the highest REAP score stay, every other joins the one with the most
               similar mean output; neurons are matched first; mean weighted by the score

What the papers do beyond that is left out: M-SMoE compares router logits instead of rows and matches neurons
too, REAM looks at later layers again after it has merged earlier ones. Nothing is written here; a model is
changed inside `merged` and has its own tensors back afterwards.
"""

# E experts, K groups

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from ..errors import UserError
from ..experts.forward import use_experts_function
from ..experts.storage import weight_names
from ..models.layers import MoELayer, expert_id_tensors, moe_layers, per_expert_tensors, submodule
from ..models.surgery import masked, minimum_kept
from .neurons import Weights, align, as_neurons, expert_names, expert_weights, order_is_free, permuted
from .stats import LayerStats, Profile

METHODS = ("average", "frequency", "hc", "ream")
Router = Literal["centroid", "sum"]


@dataclass(frozen=True)
class Groups:
    """How the experts of one layer are merged."""

    centroids: list[int]
    """(K,) the expert whose router row each group keeps, ascending"""
    slot: list[int]
    """(E,) the group of every expert: an index into `centroids`"""
    weight: list[float]
    """(E,) share of every expert in its group's average; each group sums to 1"""
    align: bool = False
    """match every member's neurons to the centroid's before averaging"""

    def members(self, slot: int) -> list[int]:
        return [expert for expert, its in enumerate(self.slot) if its == slot]


# ---------------------------------------------------------------- which experts go together


def make_groups(
    model: nn.Module, profile: Profile, method: str, keep: int, domains: Any = "mean"
) -> dict[str, Groups]:
    """MoELayer.name -> groups, `keep` of them in every layer.

    Args:
        method: one of METHODS.
        domains: how the scores of several domains become one, as `criteria.scores` takes it.

    Raises:
        UserError: an unknown method, a count that the router cannot have, neurons that cannot be matched.
    """
    from .criteria import scores

    if method not in METHODS:
        raise UserError(f"unknown merging method {method!r}", f"use any of {', '.join(METHODS)}")
    by_layer = scores(profile, "reap" if method == "ream" else "frequency", domains)
    stats = {layer.name: layer for layer in profile.layers}
    return {
        layer.name: group_layer(model, layer, stats[layer.experts], method, keep, by_layer[layer.name])
        for layer in moe_layers(model)
        if layer.experts in stats
    }


def group_layer(
    model: nn.Module, layer: MoELayer, stats: LayerStats, method: str, keep: int, score: Tensor
) -> Groups:
    """The groups of one layer; `score` (E,) says which experts stay and what they weigh."""
    least = minimum_kept(layer)
    if not least <= keep <= layer.num_experts or keep % layer.n_group:
        groups = f" in {layer.n_group} equal groups" if layer.n_group > 1 else ""
        raise UserError(
            f"{layer.name} cannot be merged to {keep} experts",
            f"its router wants {least} to {layer.num_experts}{groups}",
        )
    module: Any = submodule(model, layer.experts)
    if method == "ream" and not order_is_free(module):
        raise UserError(
            f"{type(module).__name__}: its activation mixes neurons, so they cannot be matched",
            "leave ream out: --merge average,frequency,hc",
        )
    score = score.double().cpu().nan_to_num(0.0)
    slot = [-1] * layer.num_experts
    centroids: list[int] = []
    if method == "hc":
        for part in _router_groups(layer):
            label = _cluster(stats.mean_output[part].double().cpu(), keep // layer.n_group)
            for number in range(keep // layer.n_group):
                members = [expert for expert, its in zip(part, label, strict=True) if its == number]
                centroids.append(max(members, key=lambda expert: (float(score[expert]), -expert)))
                for expert in members:
                    slot[expert] = centroids[-1]
    else:
        likeness = _likeness(model, layer, stats, method)
        for part in _router_groups(layer):
            best = sorted(part, key=lambda expert: (-float(score[expert]), expert))
            stay = sorted(best[: keep // layer.n_group])
            centroids += stay
            for expert in part:
                nearest = stay[int(likeness[expert, stay].argmax())]
                slot[expert] = expert if expert in stay else nearest
    centroids.sort()
    place = {expert: index for index, expert in enumerate(centroids)}
    slots = [place[expert] for expert in slot]
    return Groups(centroids, slots, _shares(slots, score, method == "average"), align=method == "ream")


def _router_groups(layer: MoELayer) -> list[list[int]]:
    """Experts that a group-limited router compares together; one group without such limits."""
    size = layer.num_experts // layer.n_group
    return [list(range(start, start + size)) for start in range(0, layer.num_experts, size)]


def _cluster(outputs: Tensor, count: int) -> list[int]:
    """(E, D) mean outputs -> the cluster 0..count-1 of each: average linkage of Euclidean distances."""
    if len(outputs) == 1:
        return [0]
    from scipy.cluster.hierarchy import cut_tree, linkage

    return cut_tree(linkage(outputs.numpy(), method="average"), n_clusters=count)[:, 0].tolist()


def _likeness(model: nn.Module, layer: MoELayer, stats: LayerStats, method: str) -> Tensor:
    """(E, E) cosine of what the method compares."""
    if method == "average":
        return weight_cosines(submodule(model, layer.experts), layer.num_experts)
    rows = router_rows(model, layer) if method == "frequency" else stats.mean_output
    rows = normalize(rows.detach().double().cpu(), dim=1)
    return rows @ rows.T


def weight_cosines(module: nn.Module, num_experts: int) -> Tensor:
    """(E, E) fp64: cosine of every two experts' weights, in the order their neurons happen to have."""
    gram = torch.zeros(num_experts, num_experts, dtype=torch.float64)
    for name in weight_names(module):
        for columns in _flat(module, name, num_experts).split(1 << 18, dim=1):
            block = columns.float()
            gram += (block @ block.T).double().cpu()
    norm = gram.diagonal().clamp_min(1e-30).sqrt()
    return gram / (norm[:, None] * norm)


def _flat(module: Any, name: str, num_experts: int) -> Tensor:
    """A stack as (E, X): the module's own if it is not packed, else dequantised to 16 bits."""
    own = getattr(module, name)
    if own.is_floating_point():
        return own.detach().flatten(1)
    return torch.stack([expert_weights(module, e)[name].bfloat16().flatten() for e in range(num_experts)])


def router_rows(model: nn.Module, layer: MoELayer) -> Tensor:
    """(E, X): the router's matrix, one row per expert.

    Raises:
        UserError: the router has no such matrix.
    """
    for name in per_expert_tensors(model, layer):
        holder, _, leaf = name.rpartition(".")
        if name.startswith(layer.router + "."):
            tensor = getattr(submodule(model, holder), leaf)
            if tensor.ndim == 2 and tensor.shape[0] >= layer.num_experts > 1 and tensor.shape[1] > 1:
                return tensor[: layer.num_experts]
    raise UserError(f"{layer.router} has no matrix with one row per expert", "leave `frequency` out")


def _shares(slots: list[int], score: Tensor, plain: bool) -> list[float]:
    """Averaging weights that sum to 1 in every group; equal ones where nobody scored."""
    count = max(slots) + 1
    weight = torch.ones(len(slots), dtype=torch.float64) if plain else score.clamp_min(0)
    index = torch.tensor(slots)
    total = torch.zeros(count, dtype=torch.float64).index_add(0, index, weight)
    size = torch.bincount(index, minlength=count).double()
    return torch.where(total[index] > 0, weight / total[index].clamp_min(1e-300), 1 / size[index]).tolist()


# ---------------------------------------------------------------- the average


def merge_stacks(module: Any, groups: Groups, dtype: torch.dtype) -> Weights:
    """The merged stacks of one experts module by name, K slices each.

    Averaged in fp32, stored in the dtype of the module's own weights, `dtype` where those are packed. An
    expert that is alone in its group is copied as it is.
    """
    own = {name: getattr(module, name) for name in expert_names(module)}
    stacks: Weights = {}
    for slot, centroid in enumerate(groups.centroids):
        for name, tensor in _average(module, groups, slot, centroid).items():
            if name not in stacks:
                kept = own[name].dtype if own[name].is_floating_point() else dtype
                shape = (len(groups.centroids), *tensor.shape)
                stacks[name] = torch.empty(shape, dtype=kept, device=own[name].device)
            stacks[name][slot] = tensor
    return stacks


def stack_bytes(module: Any, width: int) -> int:
    """Bytes one merged expert of this module takes, `width` per number."""
    return sum(tensor.numel() for tensor in expert_weights(module, 0).values()) * width


def _average(module: Any, groups: Groups, slot: int, centroid: int) -> Weights:
    """One group's weighted mean, fp32, in the order of the centroid's neurons."""
    members = groups.members(slot)
    first = expert_weights(module, centroid)
    if members == [centroid]:
        return first
    reference = as_neurons(module, first) if groups.align else None
    mean = {name: tensor * groups.weight[centroid] for name, tensor in first.items()}
    for expert in members:
        if expert == centroid:
            continue
        weights = expert_weights(module, expert)
        if reference is not None:
            weights = permuted(module, weights, align(reference, as_neurons(module, weights)))
        for name, tensor in weights.items():
            mean[name] += tensor * groups.weight[expert]
    return mean


# ---------------------------------------------------------------- a model that is merged for a while


def merge_model(
    model: Any, groups: Mapping[str, Groups], on_layer: Callable[[], None] | None = None
) -> dict[str, Weights]:
    """MoELayer.name -> merged stacks; the work of merging, done once. The model is not changed."""
    merged_stacks = {}
    for layer in moe_layers(model):
        if layer.name in groups:
            module = submodule(model, layer.experts)
            with torch.no_grad():
                merged_stacks[layer.name] = merge_stacks(module, groups[layer.name], model.dtype)
            if on_layer:
                on_layer()
    return merged_stacks


@contextmanager
def merged(
    model: Any, groups: Mapping[str, Groups], stacks: Mapping[str, Weights], router: Router = "centroid"
) -> Iterator[None]:
    """Inside, the model computes with merged experts; afterwards it has its own tensors back.

    Args:
        stacks: what `merge_model` made of the same groups. They are put in, not copied: entering is cheap.
        router: "centroid" keeps each group's one row, as a smaller checkpoint would; "sum" leaves the router
            whole and gives a merged expert the gates of all its members (no server can run that).
    """
    by_name = {layer.name: layer for layer in moe_layers(model) if layer.name in groups}
    with ExitStack() as outside:
        if router == "centroid":
            tables = {name: _tables(model, layer) for name, layer in by_name.items()}
            outside.enter_context(masked(model, {name: groups[name].centroids for name in by_name}))
            for name, found in tables.items():
                for holder, key, table in found:
                    slots = torch.tensor(groups[name].slot, dtype=table.dtype, device=table.device)
                    outside.callback(holder.__setitem__, key, holder[key])
                    holder[key] = _like(table, slots[table.long()])
        else:
            outside.enter_context(use_experts_function(model))
        for name, layer in by_name.items():
            module = submodule(model, layer.experts)
            mapped = torch.tensor(groups[name].slot) if router == "sum" else None
            outside.enter_context(_swapped(module, stacks[name], mapped))
        yield


def _tables(model: nn.Module, layer: MoELayer) -> list[tuple[dict[str, Any], str, Tensor]]:
    """Tables of expert ids by token, where they are kept and as they are: merging sends ids to groups."""
    found = []
    for name in expert_id_tensors(model, layer):
        path, _, key = name.rpartition(".")
        module = submodule(model, path)
        holder: dict[str, Any] = module._parameters if key in module._parameters else module._buffers
        found.append((holder, key, holder[key]))
    return found


def _like(old: Tensor, new: Tensor) -> Tensor:
    return nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new


@contextmanager
def _swapped(module: Any, stacks: Weights, mapped: Tensor | None) -> Iterator[None]:
    """An experts module that holds `stacks` instead of its own; `mapped` sends router ids to their slices."""
    own = {name: module._parameters[name] for name in stacks}
    num_experts, kept = module.num_experts, module.__dict__.pop("experts_kept", None)
    try:
        for name, tensor in stacks.items():
            module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
        module.num_experts = len(next(iter(stacks.values())))
        if mapped is not None:
            module.experts_kept = mapped.to(next(iter(stacks.values())).device)
        yield
    finally:
        module.__dict__.pop("experts_kept", None)
        if kept is not None:
            module.experts_kept = kept
        module.num_experts = num_experts
        module._parameters.update(own)
