"""Split every FFN of a dense model into experts, and a router that picks the ones a token needs.

The experts are disjoint groups of the FFN's own neurons, so with all of them active the MoE equals the
dense model. Neurons that work together share an expert (`cluster.py`), and a ridge regression predicts
from the router's input which experts would write most (`routerfit.py`). No training.

A stock router makes the weights of the chosen experts add up to 1, while every chosen slice has to count
fully. So the weights are kept nearly equal, 1/k, and k is multiplied into down_proj. Another k needs
another factor (`refold`).

Shapes: T tokens, H hidden size, F FFN width, E experts, I = F / E.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from moesmith.errors import UserError
from moesmith.models.layers import moe_layers, submodule

from .cluster import cluster_neurons, neuron_profiles
from .native import native_config
from .routerfit import expert_output_norms, fit_ridge_router, kept_share
from .stream import stream_layers

FFN = "mlp"
PROFILE_TOKENS = 2048  # more change the clusters little and cost time in proportion


@dataclass
class LayerSplit:
    """How much of what a layer's FFN writes is kept: shares of the summed expert norms, on unseen tokens."""

    layer: str
    kept: float
    """by the experts the router picks"""
    best: float
    """by the k largest"""
    random: float
    """by k experts at random: k / E"""


@dataclass
class SplitReport:
    """What a split came to."""

    layers: list[LayerSplit]
    difference: float | None
    """largest logit difference from the dense model with every expert on, in fp32; None when not asked for"""


def split_model(
    dense: PreTrainedModel,
    chunks: list[Tensor],
    num_experts: int = 16,
    top_k: int = 12,
    seed: int = 0,
    verify: Tensor | None = None,
    on_layer: Callable[[LayerSplit], None] | None = None,
) -> tuple[PreTrainedModel, SplitReport]:
    """The dense model as a native MoE of the same dtype; embeddings and attention are shared, not copied.

    Args:
        dense: a decoder-only model whose FFNs are gate_proj, up_proj, down_proj without bias.
        chunks: calibration token ids, each (B, S), one shape, no padding. The last chunk judges the
            routers and is not fitted on, so give two or more; about 10,000 tokens are enough for a
            576-wide model.
        verify: token ids (B, S) to compare the models on with every expert active; holds both in fp32 for
            a moment.
        on_layer: called after each layer.

    Raises:
        UserError: no native MoE class fits the model, or an option is out of range.
    """
    if len(chunks) < 2:
        raise ValueError(
            f"{len(chunks)} chunk of calibration tokens, wanted 2 or more: the last one is held out"
        )
    config = native_config(dense.config, num_experts, top_k)
    config.num_experts_per_tok = num_experts  # `refold` sets k; until then the factor E keeps slices exact
    model = _empty(config, dense)
    weights = {name: tensor for name, tensor in dense.state_dict().items() if f".{FFN}." not in name}
    _check_places(model, weights, dense)
    held_out = chunks[-1].numel()
    layers = []
    for layer in stream_layers(dense, chunks, FFN):
        ffn = layer.module.get_submodule(FFN)
        tensors, split = split_layer(layer.name, ffn, layer.ffn_input, held_out, num_experts, top_k, seed)
        weights |= tensors
        layers.append(split)
        if on_layer:
            on_layer(split)
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    difference = None if verify is None else all_active_difference(dense, model, verify)
    refold(model, top_k)
    return model, SplitReport(layers, difference)


@torch.no_grad()
def split_layer(
    name: str, ffn: nn.Module, inputs: Tensor, held_out: int, num_experts: int, top_k: int, seed: int
) -> tuple[dict[str, Tensor], LayerSplit]:
    """One FFN as experts and a router: tensors under their native names, and how good the router is.

    Args:
        inputs: (T, H) what the FFN reads; the last `held_out` of them are not fitted on.
    """
    gate, up, down = ffn_weights(ffn, name)
    activations = ffn.act_fn(inputs @ gate.T) * (inputs @ up.T)  # (T, F)
    stride = max(1, len(inputs) // PROFILE_TOKENS)
    profiles = neuron_profiles(activations[:-held_out:stride], down.float().norm(dim=0))
    members = cluster_neurons(profiles, num_experts, seed)
    norms = expert_output_norms(activations, down, members)  # (T, E)
    router = fit_ridge_router(inputs[:-held_out], norms[:-held_out]).to(gate.dtype)
    gate_up_proj, down_proj = slice_ffn(gate, up, down, members, fold=num_experts)
    tensors = {
        f"{name}.{FFN}.gate.weight": router,
        f"{name}.{FFN}.experts.gate_up_proj": gate_up_proj,
        f"{name}.{FFN}.experts.down_proj": down_proj,
    }
    unseen, unseen_norms = inputs[-held_out:], norms[-held_out:]
    kept = kept_share(unseen_norms, unseen @ router.T, top_k)
    best = kept_share(unseen_norms, unseen_norms, top_k)
    return tensors, LayerSplit(name, kept, best, top_k / num_experts)


def ffn_weights(ffn: nn.Module, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """gate_proj (F, H), up_proj (F, H), down_proj (H, F) of a gated FFN.

    Raises UserError if the module is something else.
    """
    weights: list[Tensor] = []
    for part in ("gate_proj", "up_proj", "down_proj"):
        linear = getattr(ffn, part, None)
        if not isinstance(linear, nn.Linear) or linear.bias is not None:
            found = ", ".join(child for child, _ in ffn.named_children())
            raise UserError(f"{name}.{FFN}: wanted {part}, a linear without bias; the module has {found}")
        weights.append(linear.weight)
    return weights[0], weights[1], weights[2]


def slice_ffn(gate: Tensor, up: Tensor, down: Tensor, members: Tensor, fold: float) -> tuple[Tensor, Tensor]:
    """Experts out of an FFN's neurons: (F, H), (F, H), (H, F), (E, I) -> (E, 2I, H), (E, H, I).

    `fold` is multiplied into down_proj, in fp32 and rounded once.
    """
    gate_up_proj = torch.cat([gate[members], up[members]], dim=1)
    down_proj = (down.float() * fold).to(down.dtype)[:, members].permute(1, 0, 2).contiguous()
    return gate_up_proj, down_proj


def _empty(config: PreTrainedConfig, dense: PreTrainedModel) -> PreTrainedModel:
    """The native model without values; its memory is not touched before it is replaced."""
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dense.dtype)
    model.generation_config = dense.generation_config
    return model.eval()


def _check_places(model: PreTrainedModel, weights: dict[str, Tensor], dense: PreTrainedModel) -> None:
    """Raise UserError unless everything but the FFNs of `dense` has its place in `model`, and the reverse."""
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items() if f".{FFN}." not in name}
    given = {name: tensor.shape for name, tensor in weights.items()}
    odd = sorted(name for name in wanted.keys() | given.keys() if wanted.get(name) != given.get(name))
    if odd:
        name = odd[0]
        raise UserError(
            f"{type(dense).__name__} does not fit into {type(model).__name__}: {len(odd)} tensors differ, "
            f"first {name} (is {given.get(name, 'absent')}, wanted {wanted.get(name, 'absent')})"
        )


@torch.no_grad()
def refold(model: PreTrainedModel, top_k: int) -> None:
    """Change how many experts of a split model are active: k in config and routers, its factor in down_proj.

    In 16 bits each call rounds down_proj once.

    Raises:
        UserError: top_k is out of range.
    """
    layers = moe_layers(model)
    if not 1 <= top_k <= layers[0].num_experts:
        raise UserError(f"top_k={top_k} must be between 1 and the {layers[0].num_experts} experts there are")
    for layer in layers:
        router, experts = submodule(model, layer.router), submodule(model, layer.experts)
        experts.down_proj.copy_(experts.down_proj.float() * (top_k / layer.top_k))
        router.top_k = top_k
    model.config.num_experts_per_tok = top_k


@contextmanager
def random_routers(model: PreTrainedModel, seed: int = 0) -> Iterator[None]:
    """Inside, every router has random rows of the same spread: the control that shows what a fit is worth."""
    generator = torch.Generator().manual_seed(seed)
    weights: list[Tensor] = [submodule(model, layer.router).weight for layer in moe_layers(model)]
    before = [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        for weight in weights:
            weight.copy_(torch.randn(weight.shape, generator=generator) * weight.float().std().cpu())
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, old in zip(weights, before, strict=True):
                weight.copy_(old)


@torch.no_grad()
def all_active_difference(dense: PreTrainedModel, moe: PreTrainedModel, input_ids: Tensor) -> float:
    """Largest logit difference, in fp32, between `dense` and `moe` with every expert on at the same weight.

    `moe` is folded for all its experts (`refold`). Both models are copied to fp32; neither is changed.
    """
    exact = copy.deepcopy(moe).float()
    for layer in moe_layers(exact):
        assert layer.top_k == layer.num_experts, "folded for fewer experts: their factor is rounded"
        submodule(exact, layer.router).weight.zero_()
    ours = exact(input_ids).logits
    del exact
    theirs = copy.deepcopy(dense).float()(input_ids).logits
    return float((ours - theirs).abs().max())
