"""Watch the experts of a running model and add up what `stats` keeps.

The watching happens inside the experts call (see `experts.forward`), where an expert's output and its
routing weight are both at hand: only routed tokens are computed, and the weights are the true ones. The
model's output stays bit for bit what it is. The residual stream, which one score needs, is seen by hooks on
the parts of the decoder layer.
"""

# B rows of a batch, S positions, T = B*S tokens, K experts per token, R = T*K routed rows, E experts,
# D domains, N documents, H width of the experts' output

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moesmith import ranks
from moesmith.errors import UserError
from moesmith.experts.forward import use_experts_function
from moesmith.models.layers import MoELayer, submodule
from moesmith.ops.routing import Routing

from .stats import PER_DOCUMENT, SUMS, Document, LayerStats, Profile

# What one pass over the rows adds up, in this order; prompt_norm follows from contribution_sq per document.
_ROW_SUMS = tuple(name for name in SUMS if name != "prompt_norm")
_OF_DOCUMENT = [_ROW_SUMS.index(name) for name in PER_DOCUMENT]


class Collector:
    """Adds up statistics over any number of forward passes.

        collector = Collector(moe_layers(model), documents)
        with collector.attach(model):
            for ids, index in batches:
                with collector.batch(index):
                    model(input_ids=ids)
        profile = collector.finish(meta)

    Batches have to come in the same order for the same bits.
    """

    def __init__(self, layers: Sequence[MoELayer], documents: Sequence[Document]):
        if not layers:
            raise UserError("the model has no MoE layers, so there are no experts to profile")
        self.layers = list(layers)
        self.documents = list(documents)
        self.domains = list(dict.fromkeys(document.domain for document in documents))
        self._domain_of = torch.tensor([self.domains.index(document.domain) for document in documents])
        self._sums: dict[str, dict[str, Tensor]] = {}  # experts module -> tensors
        self._batch: _Batch | None = None
        self._residual = _Residual()

    @contextmanager
    def attach(self, model: nn.Module) -> Iterator[None]:
        """Watch the layers that are in `model` (all of them, or the one that is in memory)."""
        with ExitStack() as stack:
            stack.enter_context(use_experts_function(model))
            for layer in self.layers:
                module = submodule(model, layer.experts)
                if any(parameter.is_meta for parameter in module.parameters()):
                    continue
                stack.enter_context(_observed(module, self._observer(layer)))
                stack.enter_context(self._residual.watch(submodule(model, _above(layer.name))))
            yield

    @contextmanager
    def batch(self, document_index: Tensor) -> Iterator[None]:
        """The next forward's tokens belong to these documents: int64 (B, S), -1 for padding."""
        self._batch = _Batch(document_index, self._domain_of)
        try:
            yield
        finally:
            self._batch = None
            self._residual.clear()

    def finish(self, meta: dict[str, Any]) -> Profile:
        """The profile of everything seen.

        Raises:
            UserError: a layer was never called.
        """
        return Profile([self._stats(layer) for layer in self.layers], self.domains, self.documents, meta)

    def add_up(self) -> None:
        """What the collectors of all processes have seen, in each of them; nothing in a single process.

        Tokens are counted exactly, largest values are the largest, other sums are added in float64.
        """
        if ranks.world() == 1:
            return
        widths: dict[str, int] = {}
        for part in ranks.gather({experts: s["output"].shape[-1] for experts, s in self._sums.items()}):
            widths |= part
        for layer in self.layers:
            if layer.experts not in widths:  # nobody called it: `finish` says so
                continue
            state = self._sums.setdefault(
                layer.experts, self._zeros(layer.num_experts, widths[layer.experts])
            )
            for name in sorted(state):
                ranks.add(state[name], largest=name in ("max_norm", "max_abs"))

    # ---------------------------------------------------------------- to stop and go on

    def layer_state(self, experts: str) -> dict[str, Tensor]:
        """What one layer has added up, by name; empty before its first call."""
        return dict(self._sums.get(experts, {}))

    def load_layer_state(self, experts: str, state: dict[str, Tensor]) -> None:
        """Go on from a `layer_state`."""
        if state:
            self._sums[experts] = dict(state)

    def state_dict(self) -> dict[str, Tensor]:
        """All layers, flat: "EXPERTS::NAME" -> tensor."""
        return {f"{e}::{name}": tensor for e, state in self._sums.items() for name, tensor in state.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from a `state_dict`."""
        self._sums = {}
        for key, tensor in state.items():
            experts, _, name = key.rpartition("::")
            self._sums.setdefault(experts, {})[name] = tensor

    # ---------------------------------------------------------------- inside the experts call

    def _observer(self, layer: MoELayer) -> Any:
        @torch.no_grad()
        def observe(
            module: nn.Module,
            hidden_states: Tensor,
            top_k_index: Tensor,
            top_k_weights: Tensor,
            rows: Tensor,
            routing: Routing,
            output: Tensor,
        ) -> None:
            batch = self._batch
            if batch is None:  # a forward that nobody asked to count
                return
            if len(hidden_states) != batch.tokens:
                raise UserError(
                    f"{layer.experts} was given {len(hidden_states)} of the batch's {batch.tokens} tokens: "
                    "they cannot be assigned to documents",
                    "this model sends only some tokens through these experts; it cannot be profiled",
                )
            residual = self._residual.before(hidden_states, output)
            self._add(layer, batch, top_k_index, top_k_weights, rows, routing, output, residual)

        return observe

    def _add(
        self,
        layer: MoELayer,
        batch: _Batch,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        rows: Tensor,
        routing: Routing,
        output: Tensor,
        residual: Tensor | None,
    ) -> None:
        num_experts = layer.num_experts
        state = self._sums.get(layer.experts)
        if state is None:
            state = self._sums[layer.experts] = self._zeros(num_experts, rows.shape[-1])
        expert_R = torch.repeat_interleave(
            torch.arange(num_experts, device=rows.device), routing.tokens_per_expert, output_size=len(rows)
        )
        gate_R = top_k_weights.reshape(-1)[routing.perm].double()
        # A weight of exactly 0 is a slot that routes nowhere (zaya's skip expert), filled with some id.
        local_R = batch.local.to(rows.device)[routing.token_index].where(gate_R != 0, batch.num_documents)
        real_R = local_R < batch.num_documents
        norm_R, largest_R, summed = _measure(rows, real_R, routing.offsets)
        token_R = routing.token_index
        turned_T = torch.full((batch.tokens,), torch.nan, dtype=torch.float64, device=rows.device)
        output_sq_T = output.float().square().sum(dim=-1, dtype=torch.float64)
        if residual is not None:
            turned_T = _turned(residual, output)
        weighted_sq_R = (gate_R * norm_R).square()
        columns = {
            "tokens": torch.ones_like(norm_R),
            "gate": gate_R,
            "gate_sq": gate_R.square(),
            "norm": norm_R,
            "norm_sq": norm_R.square(),
            "contribution": gate_R * norm_R,
            "contribution_sq": weighted_sq_R,
            "easyep": gate_R * norm_R * turned_T[token_R],
            "relative": weighted_sq_R / output_sq_T[token_R].clamp_min(1e-30),
        }
        values = torch.stack([columns[name] for name in _ROW_SUMS], dim=1)
        # One more document than there are: padding goes there.
        sums = values.new_zeros((batch.num_documents + 1) * num_experts, len(_ROW_SUMS))
        sums.index_add_(0, local_R * num_experts + expert_R, values)
        of_document = sums.view(-1, num_experts, len(_ROW_SUMS))[:-1].cpu()
        self._check(layer, batch, of_document)

        state["per_document"].index_add_(0, batch.documents, of_document[..., _OF_DOCUMENT])
        state["sums"].index_add_(0, batch.domains, of_document)
        key_R = torch.where(
            real_R, batch.domain_of(local_R) * num_experts + expert_R, state["max_norm"].numel()
        )
        for name, values_R in (("max_norm", norm_R), ("max_abs", largest_R)):
            flat = torch.cat([state[name].flatten(), state[name].new_zeros(1)])
            flat.scatter_reduce_(0, key_R.cpu(), values_R.cpu(), "amax")
            state[name] = flat[:-1].view_as(state[name])
        state["output"] += summed.cpu()
        chosen = torch.zeros(batch.tokens, num_experts, device=rows.device)
        chosen.scatter_(1, top_k_index.clamp(max=num_experts - 1), 1.0)
        chosen = chosen[batch.local.to(rows.device) < batch.num_documents]
        state["coactivation"] += (chosen.T @ chosen).double().cpu()

    def _zeros(self, num_experts: int, width: int) -> dict[str, Tensor]:
        domains, double = len(self.domains), torch.float64
        return {
            "sums": torch.zeros(domains, num_experts, len(_ROW_SUMS), dtype=double),
            "per_document": torch.zeros(len(self.documents), num_experts, len(PER_DOCUMENT), dtype=double),
            "max_norm": torch.zeros(domains, num_experts, dtype=double),
            "max_abs": torch.zeros(domains, num_experts, dtype=double),
            "output": torch.zeros(num_experts, width, dtype=double),
            "coactivation": torch.zeros(num_experts, num_experts, dtype=double),
        }

    def _check(self, layer: MoELayer, batch: _Batch, sums: Tensor) -> None:
        """Raise for numbers that would rank experts by noise: NaN or infinity aborts, naming the layer."""
        # The other sums take in the output of all experts of a token: they would blame the neighbours too.
        finite = (
            sums[..., [_ROW_SUMS.index("norm"), _ROW_SUMS.index("contribution_sq")]].isfinite().all(dim=-1)
        )
        if bool(finite.all()):
            return
        document, expert = (int(i) for i in (~finite).nonzero()[0])
        culprit = self.documents[int(batch.documents[document])]
        raise UserError(
            f"{layer.experts}: expert {expert} gave NaN or infinity on document {culprit.id} "
            f"({culprit.domain}): the profile is not usable",
            "try --dtype float32 or bfloat16; a layer that overflows in 16 bits cannot be ranked",
        )

    def _stats(self, layer: MoELayer) -> LayerStats:
        state = self._sums.get(layer.experts)
        if state is None:
            raise UserError(f"{layer.experts} was never called: no statistics for it")
        sums = {name: state["sums"][..., index] for index, name in enumerate(_ROW_SUMS)}
        per_document = {name: state["per_document"][..., i] for i, name in enumerate(PER_DOCUMENT)}
        prompt_norm = torch.zeros(len(self.domains), layer.num_experts, dtype=torch.float64)
        prompt_norm.index_add_(0, self._domain_of, per_document["contribution_sq"].sqrt())
        tokens = sums["tokens"].sum(dim=0)
        return LayerStats(
            name=layer.experts,
            layer=layer.name,
            num_experts=layer.num_experts,
            top_k=layer.top_k,
            n_group=layer.n_group,
            topk_group=layer.topk_group,
            sums={**sums, "prompt_norm": prompt_norm},
            max_norm=state["max_norm"],
            max_abs=state["max_abs"],
            mean_output=(state["output"] / tokens.clamp_min(1)[:, None]).float(),
            coactivation=state["coactivation"],
            per_document=per_document,
        )


class _Batch:
    """Which document each token of one forward belongs to."""

    def __init__(self, document_index: Tensor, domain_of: Tensor):
        flat = document_index.reshape(-1).cpu()
        self.tokens = len(flat)
        self.documents = flat[flat >= 0].unique()
        """(n,) documents of this batch, ascending"""
        self.num_documents = len(self.documents)
        self.domains = domain_of[self.documents]
        local = torch.searchsorted(self.documents, flat.contiguous())
        self.local = torch.where(flat >= 0, local, self.num_documents)
        """(T,) position in `documents`; n for padding"""

    def domain_of(self, local: Tensor) -> Tensor:
        """Domain of each token given by its local document; padding gets 0."""
        padded = torch.cat([self.domains, self.domains.new_zeros(1)])
        return padded.to(local.device)[local]


class _Residual:
    """Remembers what the parts of a decoder layer turned into what, to find the stream the experts add to.

    The experts read a normed copy of the residual stream: the input of the part whose output they were given.
    """

    def __init__(self) -> None:
        self._input_of: dict[int, tuple[Tensor, Tensor]] = {}

    @contextmanager
    def watch(self, decoder_layer: nn.Module) -> Iterator[None]:
        """Follow the direct children of a decoder layer."""

        def remember(_module: nn.Module, args: tuple, output: Any) -> None:
            if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
                if args[0].numel() == output.numel():
                    # Both are held, or a later tensor could get the same address.
                    self._input_of[output.data_ptr()] = (args[0], output)

        def forget(_module: nn.Module, *_: Any) -> None:
            self.clear()

        hooks = [child.register_forward_hook(remember) for child in decoder_layer.children()]
        hooks.append(decoder_layer.register_forward_hook(forget))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def before(self, hidden_states: Tensor, output: Tensor) -> Tensor | None:
        """The residual stream of the tokens in `hidden_states`, (T, H), None if it is out of sight."""
        stream, _ = self._input_of.get(hidden_states.data_ptr(), (None, None))
        if stream is None or stream.numel() != output.numel():
            return None
        return stream.reshape(output.shape)

    def clear(self) -> None:
        """Let go of the tensors."""
        self._input_of.clear()


@contextmanager
def _observed(module: Any, observer: Any) -> Iterator[None]:
    module.experts_observer = observer
    try:
        yield
    finally:
        del module.experts_observer


def _above(name: str) -> str:
    """model.layers.3.mlp -> model.layers.3"""
    parts = name.split(".")
    while parts and not parts[-1].isdigit():
        parts.pop()
    return ".".join(parts) or name


def _turned(residual: Tensor, output: Tensor) -> Tensor:
    """max(0, 1 - cos(h, h + y)) of every token, (T,) fp64: how far the routed sum turns the stream."""
    h, y = residual.float(), output.float()
    hh, hy, yy = ((a * b).sum(dim=-1, dtype=torch.float64) for a, b in ((h, h), (h, y), (y, y)))
    norms = (hh * (hh + 2 * hy + yy).clamp_min(0)).sqrt()
    return (1 - (hh + hy) / norms.clamp_min(1e-30)).clamp_min(0)


PIECE = 256  # rows in fp32 that stay in a CPU's cache while they are measured


def _measure(rows: Tensor, real: Tensor, offsets: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Norm and largest absolute element of every row, (R,) fp64 each; sum of each expert's real rows, (E, H).

    In fp32, a few rows of one expert at a time: three passes over all rows in fp32 would cost as much as the
    rest of the observation.
    """
    whole = bool(real.all())
    norms, largest = rows.new_empty(2, len(rows), dtype=torch.float32)
    sums = rows.new_zeros(len(offsets) - 1, rows.shape[-1], dtype=torch.float32)
    for expert, (start, end) in enumerate(zip(offsets[:-1], offsets[1:], strict=True)):
        for first in range(start, end, PIECE):
            part = slice(first, min(first + PIECE, end))
            f = rows[part].float()
            torch.linalg.vector_norm(f, dim=-1, out=norms[part])
            torch.maximum(f.amax(dim=-1), -f.amin(dim=-1), out=largest[part])  # 4x faster than the norm
            sums[expert] += (f if whole else f[real[part]]).sum(dim=0)
    return norms.double(), largest.double(), sums
