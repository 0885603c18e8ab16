"""How much memory the tensors of a step take: a step played on torch's meta device, where none takes any.

The model itself runs, with its own attention, norms and checkpointing, and every tensor that torch makes is
booked until nobody holds it. Two things stand in: the experts, by a function that allocates what
`experts/forward.py` and `ops/grouped.py` allocate, and attention by what the flash kernels keep. Of layers
that repeat, a few are played and the rest is added up. What is not seen: scratch memory inside a kernel, and
what the C library holds back.
"""

# T tokens, R = T*K routed rows, r adapter rank, E experts

from __future__ import annotations

import copy
import warnings
import weakref
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.integrations.sdpa_attention import repeat_kv, use_gqa_in_sdpa
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moesmith.experts.storage import named_experts, weight_names
from moesmith.models.anatomy import meta_model
from moesmith.models.layers import adapter_targets
from moesmith.ops.routing import Routing
from moesmith.ops.rows import combine_rows, gather_rows

from .shape import Shape, layer_kinds

NAME = "moesmith_rehearsal"
"""of the two functions that stand in, where transformers registers such functions by name"""


@dataclass(frozen=True)
class Rehearsal:
    """Bytes beside weights, adapters and gradients."""

    between: int
    """what the forward pass leaves for the backward pass"""
    peak: int
    """the most there was at once, the output head left out"""

    def times(self, rows: int) -> Rehearsal:
        """The same for more rows: nearly all of it is per token."""
        return Rehearsal(self.between * rows, self.peak * rows)


@lru_cache(maxsize=64)
def rehearse(
    shape: Shape,
    seq: int,
    checkpointing: bool | None,
    lora_r: int = 16,
    lora_targets: tuple[str, ...] = (),
    adapter_dtype: str = "float32",
    dtype: str = "bfloat16",
) -> Rehearsal | None:
    """Play one training step of one row of `seq` tokens, or the reading of a prompt.

    Args:
        checkpointing: None is a forward pass without gradients.

    Returns:
        None for a model that cannot run without values (an architecture that looks at its data).
    """

    def play(config: dict[str, Any], kinds: tuple[int, ...] | None = None) -> Rehearsal | None:
        model = _model(config, checkpointing is not None, lora_r, lora_targets, adapter_dtype, dtype, kinds)
        if model is None:
            return None
        _stand_in(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _step(model, seq, checkpointing)

    try:
        for n, more in _repeats(shape.kinds):
            few, some = (play(_shortened(shape, m), shape.kinds[:m]) for m in (n, n + more))
            if few is not None and some is not None and (told := _extended(few, some, shape, n, more)):
                return told
        return play(dict(shape.config))
    # Whatever a modeling file does with values that are not there; the caller has a formula instead.
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError, LookupError):
        return None


def _repeats(kinds: tuple[int, ...]) -> list[tuple[int, int]]:
    """[(n, q)]: the layers are the first n of them and then the last q of these again and again.

    The shortest such n and q, q at most n, n at least 2 (the most of a single layer is in its forward pass);
    nothing where too little repeats for it to be worth it.
    """
    depth = len(kinds)
    found = []
    for q in range(1, depth // 3 + 1):
        begins = depth
        while begins > q and kinds[begins - 1 - q] == kinds[begins - 1]:
            begins -= 1
        n = begins + (depth - begins) % q  # kinds[begins - q : begins] is the first of what repeats
        n += q if n < 2 else 0
        if 2 * n + q <= 0.7 * depth:
            found.append((n, q))
    return sorted(found, key=lambda pair: 2 * pair[0] + pair[1])[:1]


def _shortened(shape: Shape, layers: int) -> dict[str, Any]:
    """Its config with the first `layers` layers only."""
    config = copy.deepcopy(dict(shape.config))
    text = config.get("text_config") or config
    text["num_hidden_layers"] = layers
    for key, value in text.items():
        if isinstance(value, list) and len(value) == shape.layers:
            text[key] = value[:layers]
    return config


def _extended(few: Rehearsal, some: Rehearsal, shape: Shape, n: int, more: int) -> Rehearsal | None:
    """What all layers take, from n layers and from `more` further ones.

    None where the most is not reached while everything between the layers is kept: it does not grow evenly.
    """
    between, peak = some.between - few.between, some.peak - few.peak
    if abs(peak - between) > 0.01 * max(abs(peak), abs(between)):
        return None
    times = (len(shape.kinds) - n) // more
    return Rehearsal(few.between + times * between, few.peak + times * peak)


def _step(model: Any, seq: int, checkpointing: bool | None) -> Rehearsal:
    ids = torch.empty(1, seq, dtype=torch.int64, device="meta")
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train(checkpointing is not None)
    ledger = Ledger()
    for tensor in (*model.parameters(), *model.buffers(), ids):
        ledger.ignore(tensor)
        if isinstance(tensor, nn.Parameter) and tensor.requires_grad:
            tensor.grad = torch.empty_like(tensor)  # there from the step's first backward pass on
            ledger.ignore(tensor.grad)
    with torch.set_grad_enabled(checkpointing is not None), ledger:
        out = model(input_ids=ids, use_cache=False, logits_to_keep=1)
        between = ledger.live
        if checkpointing is not None:
            out.logits.float().sum().backward()
    return Rehearsal(between, ledger.peak)


def _model(
    config: dict[str, Any],
    training: bool,
    lora_r: int,
    lora_targets: tuple[str, ...],
    adapter_dtype: str,
    dtype: str,
    kinds: tuple[int, ...] | None,
) -> Any:
    """The model with its adapters, without memory; None if its layers are not of these `kinds`."""
    from peft import LoraConfig, get_peft_model

    model: Any = meta_model(config)
    if kinds is not None and layer_kinds(model) != kinds:
        return None
    model.to(getattr(torch, dtype))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    wide = getattr(torch, adapter_dtype)
    modules = []
    for target in lora_targets:
        if target != "experts":
            modules += adapter_targets(model, [target])[0]
    experts = list(named_experts(model)) if "experts" in lora_targets else []
    if modules:
        lora = LoraConfig(r=lora_r, target_modules=modules)
        get_peft_model(model, lora, autocast_adapter_dtype=False)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(wide)
    for _, module in experts:
        holder: Any = module
        for name in weight_names(module):
            E, rows, columns = getattr(module, name).shape
            inner, outer = (rows, columns) if holder.is_transposed else (columns, rows)
            for factor, sizes in (("A", (E, lora_r, inner)), ("B", (E, lora_r, outer))):
                weight = torch.empty(sizes, dtype=wide, device="meta")
                module.register_parameter(f"rehearsed_{name}_{factor}", nn.Parameter(weight, training))
    return model


# ---------------------------------------------------------------- the ledger


class Ledger(TorchDispatchMode):
    """Books every storage that torch makes, until it is gone."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: dict[int, weakref.ref[Any]] = {}
        self._ignored: set[int] = set()

    def ignore(self, tensor: Tensor) -> None:
        """This one was there before; its holder keeps it."""
        self._ignored.add(tensor.untyped_storage()._cdata)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype == torch.bool:
            return True  # "is nothing masked, is nothing packed?" before a mask is made
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._book(leaf.untyped_storage())
        return out

    def _book(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._seen or key in self._ignored:
            return
        nbytes = storage.nbytes()

        def gone(_: Any) -> None:
            self._seen.pop(key, None)
            self.live -= nbytes

        self._seen[key] = weakref.ref(storage, gone)
        self.live += nbytes
        self.peak = max(self.peak, self.live)


# ---------------------------------------------------------------- what stands in


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # Kernels write (batch, T, heads, dim), which the model then reshapes without a copy.
        B, heads, T, _ = query.shape
        out = query.new_empty(B, T, heads, value.shape[-1]).transpose(1, 2)
        sums = query.new_empty(B, heads, T, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, sums)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, _, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: Any
) -> tuple[Tensor, None]:
    """The allocations of transformers' `sdpa_attention_forward`."""
    groups = getattr(module, "num_key_value_groups", 1)
    if groups > 1 and not use_gqa_in_sdpa(attention_mask, key, value):
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    return _Flash.apply(query, key, value).transpose(1, 2).contiguous(), None


def _stand_in(model: Any) -> None:
    """Send experts and attention of this throw-away model through the functions here."""
    ALL_EXPERTS_FUNCTIONS.register(NAME, _experts)
    ALL_ATTENTION_FUNCTIONS.register(NAME, _attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)
    for config in {id(module.config): module.config for _, module in named_experts(model)}.values():
        config._experts_implementation_internal = NAME
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    for config in configs.values():
        if getattr(config, "_attn_implementation", None) == "sdpa":
            config._attn_implementation_internal = NAME


def _experts(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The allocations of `experts.forward.experts_forward`."""
    T, K = top_k_index.shape
    R = T * K
    perm = top_k_index.new_empty(R)
    routing = Routing(perm, perm.clone(), perm[:1], [0, R], perm[:1], R, K)
    h_RH = gather_rows(hidden_states, routing)
    h_RF = _project(module, "gate_up_proj" if module.has_gate else "up_proj", h_RH)
    h_RF = module._apply_gate(h_RF) if module.has_gate else module.act_fn(h_RF)
    h_RH = _project(module, "down_proj", h_RF)
    if module.has_post_expert_norm:
        h_RH = module.post_expert_norm(h_RH)
    return combine_rows(h_RH, top_k_weights, routing).to(hidden_states.dtype)


def _project(module: Any, name: str, x: Tensor) -> Tensor:
    _, rows, columns = getattr(module, name).shape
    A, B = (getattr(module, f"rehearsed_{name}_{factor}", None) for factor in "AB")
    y = _Grouped.apply(x, A, B, columns if module.is_transposed else rows)
    if module.has_bias:
        y = y + getattr(module, name + "_bias")[torch.empty(len(x), dtype=torch.int64, device="meta")]
    return y


class _Grouped(torch.autograd.Function):
    """The allocations of `ops.grouped.grouped_linear`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor | None, B: Tensor | None, wide: int) -> Tensor:
        x = x.contiguous()
        if A is None or B is None:
            ctx.save_for_backward(None, None, None, None)
            ctx.inner = x.shape[1]
            return x.new_empty(len(x), wide)
        ErI = A.to(x.dtype)
        low_Rr = x.new_empty(len(x), A.shape[1])
        del ErI
        ErO = B.to(x.dtype)
        y = x.new_empty(len(x), wide)
        del ErO
        ctx.save_for_backward(x, low_Rr, A, B)
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, low_Rr, A, B = ctx.saved_tensors
        grad_y = grad_y.contiguous()
        if A is None:
            return grad_y.new_empty(len(grad_y), ctx.inner), None, None, None
        ErO = B.to(grad_y.dtype)
        low_grad_Rr = torch.empty_like(low_Rr)
        ErI = A.to(grad_y.dtype)
        grad_x = torch.empty_like(x)
        del low_grad_Rr, ErO, ErI
        return grad_x, torch.empty_like(A), torch.empty_like(B), None
