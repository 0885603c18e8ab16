"""The experts function that computes with packed weights (registered in transformers as "moesmith").

Same signature, same steps and same order of operations as transformers' `grouped_mm` function, so that a
packed model equals the stock model holding the dequantised weights. What differs: each projection reads
packed bytes, dequantises bounded pieces of them, and does so again in backward; adapters are applied to the
activations of an expert's rows. Modules that moesmith did not load fall through to the stock function.

Three attributes of an experts module, packed or not, change what its call means:
- `experts_kept`, int64 (kept,): the router has rows for these experts only, and the ids it gives are
  positions in this list. The weights stay where they are: a pruned model without slicing.
- `experts_residency`: lends the experts of this call, which lie elsewhere (see `residency.attach`). They are
  there inside the call, and again in its backward; the numbers and their order do not change.
- `experts_observer`: called with everything the call computed, see `Observer`. Only here do an expert's
  output and its routing weight meet. The output stays bit for bit what it is without.

T tokens, K experts per token, H model dim, R <= T*K routed rows sorted by expert.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.integrations.moe import _grouped_linear, grouped_mm_experts_forward

from ..ops.grouped import Lora, grouped_linear
from ..ops.routing import Routing, sort_by_expert
from ..ops.rows import combine_rows, gather_rows
from .residency.lender import Lender, Loan, with_rows
from .storage import named_experts, scheme_of, stack

EXPERTS_FUNCTION = "moesmith"
DECODING_ROWS = 64  # routed rows of a few tokens


class Observer(Protocol):
    """What `experts_observer` is called with, after the output is known. Nothing may be changed in place."""

    def __call__(
        self,
        module: nn.Module,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        rows: Tensor,
        routing: Routing,
        output: Tensor,
    ) -> None:
        """hidden_states (T, H); top_k_index (T, K), original ids; top_k_weights (T, K); rows (R, H): what
        each routed expert gave, unweighted, sorted by expert; output (T, H).
        """


def experts_forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """(T, H), (T, K), (T, K) -> (T, H): the weighted sum of each token's experts.

    Ids equal to `num_experts` mean "computed elsewhere" (expert parallelism) and contribute nothing.
    """
    kept = getattr(module, "experts_kept", None)
    observer: Observer | None = getattr(module, "experts_observer", None)
    if kept is not None:
        top_k_index = kept[top_k_index]
    if scheme_of(module) is None and observer is None:
        return grouped_mm_experts_forward(module, hidden_states, top_k_index, top_k_weights)

    routing = sort_by_expert(top_k_index, module.num_experts)
    expert_index = top_k_index.reshape(-1)[routing.perm] if module.has_bias else None
    h_RH = gather_rows(hidden_states, routing)
    lender: Lender | None = getattr(module, "experts_residency", None)
    if lender is None:
        h_RH = _ffn(module, h_RH, partial(_project, module, routing=routing, expert_index=expert_index))
    else:
        h_RH = _ffn_lent(module, h_RH, routing, expert_index, lender, len(hidden_states))
    if module.has_post_expert_norm:
        h_RH = module.post_expert_norm(h_RH)
    output = combine_rows(h_RH, top_k_weights, routing).to(hidden_states.dtype)
    if observer is not None:
        observer(module, hidden_states, top_k_index, top_k_weights, h_RH, routing, output)
    return output


@contextmanager
def use_experts_function(model: nn.Module) -> Iterator[None]:
    """Send the experts of a transformers model through this function; what was chosen before comes back."""
    configs = {id(module.config): module.config for _, module in named_experts(model)}
    before = [(config, config._experts_implementation_internal) for config in configs.values()]
    try:
        for config, _ in before:
            config._experts_implementation_internal = EXPERTS_FUNCTION
        yield
    finally:
        for config, implementation in before:
            config._experts_implementation_internal = implementation


def _ffn(module: Any, h_RH: Tensor, project: Callable[[str, Tensor], Tensor]) -> Tensor:
    """What each routed expert makes of its rows, unweighted: (R, H) -> (R, H)."""
    h_RF = project("gate_up_proj" if module.has_gate else "up_proj", h_RH)
    h_RF = module._apply_gate(h_RF) if module.has_gate else module.act_fn(h_RF)
    return project("down_proj", h_RF)


def _project(
    module: Any,
    name: str,
    x: Tensor,
    routing: Routing,
    expert_index: Tensor | None,
    loan: Loan | None = None,
) -> Tensor:
    """One projection of every routed row by its expert: packed weight, adapters, bias."""
    if scheme_of(module) is None:
        y = _grouped_linear(
            x, getattr(module, name), routing.offsets_tensor[1:], is_transposed=module.is_transposed
        )
    else:
        lora = _adapter(module, name, x)
        packed, again = (stack(module, name), None) if loan is None else (loan.stacks[name], loan.again(name))
        y = grouped_linear(x, packed, routing.offsets, lora, module.is_transposed, again)
    if expert_index is not None:
        y = y + getattr(module, name + "_bias")[expert_index]
    return y


# ---------------------------------------------------------------- experts that lie elsewhere


def _ffn_lent(
    module: Any,
    h_RH: Tensor,
    routing: Routing,
    expert_index: Tensor | None,
    lender: Lender,
    tokens: int,
) -> Tensor:
    """As `_ffn`, with experts that are lent for this call, or left where they lie."""
    wanted = with_rows(routing.offsets)
    cold = [] if module.training else lender.left_on_cpu(wanted, module.num_experts)
    if not cold:
        with lender.lend(wanted, routing.num_rows, tokens) as loan:
            project = partial(_project, module, routing=routing, expert_index=expert_index, loan=loan)
            return _ffn(module, h_RH, project)

    left, rows_left = _only(routing, cold)
    lent, rows_lent = _only(routing, [e for e in wanted if e not in cold])
    index_left, index_lent = (
        (None, None) if expert_index is None else (expert_index[rows_left], expert_index[rows_lent])
    )
    # down to the CPU first: what is queued on the device behind it runs beside the CPU's part
    x_left = h_RH[rows_left].cpu()
    with lender.lend(with_rows(lent.offsets), lent.num_rows, tokens) as loan:
        project = partial(_project, module, routing=lent, expert_index=index_lent, loan=loan)
        out_lent = _ffn(module, h_RH[rows_lent], project)
        project = partial(_project_at_home, module, lender, cold, left.offsets, index_left)
        out_left = _ffn(module, x_left, project)
    out_RH = out_lent.new_empty(len(h_RH), out_lent.shape[1])
    out_RH[rows_lent], out_RH[rows_left] = out_lent, out_left.to(out_RH.device)
    lender.remember(cold)
    return out_RH


def _only(routing: Routing, experts: list[int]) -> tuple[Routing, Tensor]:
    """The routing of some experts' rows alone, and which rows those are."""
    sizes = [0] * (len(routing.offsets) - 1)
    rows: list[int] = []
    for e in experts:
        rows.extend(range(routing.offsets[e], routing.offsets[e + 1]))
        sizes[e] = routing.offsets[e + 1] - routing.offsets[e]
    offsets = [0, *itertools.accumulate(sizes)]
    index = torch.tensor(rows, dtype=torch.int64).to(routing.perm.device, non_blocking=True)
    return replace(routing, offsets=offsets), index


def _project_at_home(
    module: Any,
    lender: Lender,
    experts: list[int],
    offsets: list[int],
    expert_index: Tensor | None,
    name: str,
    x: Tensor,
) -> Tensor:
    """As `_project`, on the CPU, for the rows of `experts` alone; their adapters and biases come over."""
    there = replace(lender.home(name), where=torch.tensor(experts))
    bounds = [*(offsets[e] for e in experts), offsets[-1]]
    lora = _adapter(module, name, x)
    if lora is not None:
        index = torch.tensor(experts).to(lora.A.device, non_blocking=True)
        lora = Lora(lora.A[index].cpu(), lora.B[index].cpu(), lora.scaling)
    y = grouped_linear(x, there, bounds, lora, module.is_transposed)
    if expert_index is not None:
        y = y + getattr(module, name + "_bias")[expert_index].cpu()
    return y


# ---------------------------------------------------------------- adapters


def _adapter(module: Any, name: str, x: Tensor) -> Lora | None:
    """The adapter of one projection.

    While decoding it is kept in the form the kernels read, until it changes: converting the factors of all
    experts would cost as much as the few products that are wanted.
    """
    adapters = module.experts_lora.get(name)
    if not adapters:
        return None
    kept = module.experts_lora_decoding
    if torch.is_grad_enabled():
        kept.pop(name, None)
        return _as_one(adapters)
    if len(x) > DECODING_ROWS:
        return _as_one(adapters)
    tensors = [factor for lora in adapters for factor in (lora.A, lora.B)]
    key = (x.dtype, *(lora.scaling for lora in adapters), *((t.data_ptr(), t._version) for t in tensors))
    if name not in kept or kept[name][0] != key:
        lora = _as_one(adapters)
        B_ErO = lora.B.transpose(1, 2).to(x.dtype).contiguous()
        kept[name] = key, Lora(lora.A.to(x.dtype).contiguous(), B_ErO.transpose(1, 2), lora.scaling)
    return kept[name][1]


def _as_one(adapters: list[Lora]) -> Lora:
    """Several active adapters add up: their ranks side by side are one adapter."""
    if len(adapters) == 1:
        return adapters[0]
    A = torch.cat([lora.A for lora in adapters], dim=1)
    B = torch.cat([lora.B * lora.scaling for lora in adapters], dim=2)
    return Lora(A, B, 1.0)
