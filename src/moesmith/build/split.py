"""Split every FFN of a dense model into experts, and a router that picks the ones a token needs.

The experts are disjoint groups of the FFN's own neurons, so with all of them active the MoE equals the
dense model. Neurons that work together share an expert (`cluster.py`), and a ridge regression predicts
from the router's input which experts would write most (`routerfit.py`). No training.

A stock router makes the weights of the chosen experts add up to 1, while every chosen slice has to count
fully. So the weights are kept nearly equal, 1/k, and k is multiplied into down_proj. Another k needs
another factor (`refold`).

`SplitFit` finds members and routers while a model streams by, one layer at a time; `split_model` splits one
that is in memory.

Shapes: T tokens, H hidden size, F FFN width, E experts, I = F / E.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from moesmith.errors import UserError
from moesmith.models.layers import moe_layers, submodule

from .capture import LayerInputs, Text
from .cluster import cluster_neurons, neuron_profiles
from .native import native_config
from .routerfit import (
    CHUNK,
    SCALE,
    SCALE_FP16,
    expert_output_norms,
    fit_ridge_router,
    kept_share,
    picked_share,
)
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
    picked: float
    """how many of a token's k largest the router picks; k / E at random"""


class SplitFit:
    """The split of every layer's FFN, from what the FFNs read: `capture(folder, texts, fit.visit, state)`.

    Args:
        texts: those that are captured; the ones that are held out judge the routers.
        dtype: what the routers will be stored in, None for the dtype of the inputs.
    """

    def __init__(
        self,
        texts: Sequence[Text],
        num_experts: int,
        top_k: int,
        seed: int = 0,
        dtype: torch.dtype | None = None,
    ):
        self.num_experts, self.top_k, self.seed, self.dtype = num_experts, top_k, seed, dtype
        self.fit = torch.tensor([text.fit for text in texts], dtype=torch.bool)
        self.tokens = self.held_out = 0
        self.members: list[Tensor] = []
        """of every layer (E, I) int64, the neurons of each expert"""
        self.routers: list[Tensor] = []
        """of every layer (E, H) fp32"""
        self.layers: list[LayerSplit] = []

    def visit(self, given: LayerInputs) -> None:
        """Split one layer's FFN; layers come in order.

        Raises:
            UserError: no tokens to fit on, another kind of FFN, one that num_experts does not divide, or
                outputs that are NaN or infinite.
        """
        assert given.layer == len(self.members), (given.layer, len(self.members))
        fit = self.fit.to(given.document.device)[given.document]
        self.tokens, self.held_out = int(fit.sum()), int((~fit).sum())
        name = f"model.layers.{given.layer}"
        members, router, split = fit_layer(
            name, given.ffn, given.inputs, fit, self.num_experts, self.top_k, self.seed, self.dtype
        )
        self.members.append(members)
        self.routers.append(router)
        self.layers.append(split)

    def facts(self) -> dict[str, Any]:
        """How much of what the FFNs write is kept, by layer and in the mean over layers.

        `held_out` is False when there was no text to judge on but the fitted ones.
        """
        shares = ("kept", "best", "random", "picked")
        mean = {
            name: sum(getattr(layer, name) for layer in self.layers) / len(self.layers) for name in shares
        }
        return {
            "num_experts": self.num_experts,
            "top_k": self.top_k,
            "tokens": self.tokens,
            "held_out": self.held_out > 0,
            "held_out_tokens": self.held_out,
            **mean,
            "layers": [asdict(layer) for layer in self.layers],
        }


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
    tokens, held_out = sum(chunk.numel() for chunk in chunks), chunks[-1].numel()
    fit = torch.arange(tokens) < tokens - held_out
    layers = []
    for layer in stream_layers(dense, chunks, FFN):
        ffn = layer.module.get_submodule(FFN)
        members, router, split = fit_layer(
            layer.name, ffn, layer.ffn_input, fit.to(layer.ffn_input.device), num_experts, top_k, seed
        )
        gate, up, down = ffn_weights(ffn, layer.name)
        gate_up_proj, down_proj = slice_ffn(gate, up, down, members.to(gate.device), fold=num_experts)
        weights |= {
            f"{layer.name}.{FFN}.gate.weight": router.to(gate.device, gate.dtype),
            f"{layer.name}.{FFN}.experts.gate_up_proj": gate_up_proj,
            f"{layer.name}.{FFN}.experts.down_proj": down_proj,
        }
        layers.append(split)
        if on_layer:
            on_layer(split)
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    difference = None if verify is None else all_active_difference(dense, model, verify)
    refold(model, top_k)
    return model, SplitReport(layers, difference)


@torch.no_grad()
def fit_layer(
    name: str,
    ffn: nn.Module,
    inputs: Tensor,
    fit: Tensor,
    num_experts: int,
    top_k: int,
    seed: int,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, LayerSplit]:
    """One FFN as experts and a router: members (E, I) int64, router rows (E, H) fp32, and how good it is.

    Activations of a few thousand tokens are in memory at a time.

    Args:
        inputs: (T, H) what the FFN reads.
        fit: (T,) bool, the tokens to fit on; the others judge the router, or the same ones if there are none.
        dtype: what the router will be stored in, None for that of the inputs.

    Raises:
        UserError: as `SplitFit.visit`.
    """
    gate, up, down = ffn_weights(ffn, name)

    def activations(x: Tensor) -> Tensor:
        return ffn.act_fn(x @ gate.T) * (x @ up.T)  # type: ignore[operator]

    fitted = fit.nonzero().squeeze(1)
    if not len(fitted):
        raise UserError(f"{name}: none of the {len(inputs)} tokens is to fit on", "give more text")
    count = min(PROFILE_TOKENS, len(fitted))
    sample = fitted[torch.arange(count, device=fitted.device) * len(fitted) // count]  # evenly spread
    profiles = neuron_profiles(activations(inputs[sample]).cpu(), down.float().norm(dim=0).cpu())
    _check_finite(name, profiles)
    members = cluster_neurons(profiles, num_experts, seed)
    del profiles

    pieces = [expert_output_norms(activations(x), down, members.to(down.device)) for x in inputs.split(CHUNK)]
    norms = torch.cat(pieces)  # (T, E)
    _check_finite(name, norms)
    stored = inputs.dtype if dtype is None else dtype
    scale = SCALE_FP16 if stored == torch.float16 else SCALE
    router = fit_ridge_router(inputs[fit], norms[fit], scale=scale)
    judged = fit if bool(fit.all()) else ~fit
    logits = (inputs[judged].to(stored) @ router.to(stored).T).float()
    split = LayerSplit(
        name,
        kept=kept_share(norms[judged], logits, top_k),
        best=kept_share(norms[judged], norms[judged], top_k),
        random=top_k / num_experts,
        picked=picked_share(norms[judged], logits, top_k),
    )
    return members, router.cpu(), split


def _check_finite(name: str, values: Tensor) -> None:
    if not bool(values.isfinite().all()):
        raise UserError(
            f"the FFN of {name} writes NaN or infinity",
            "the weights are damaged, or their numbers too large for this dtype: try float32",
        )


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
