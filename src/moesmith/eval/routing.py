"""Where a MoE model sends the tokens of labelled texts, and what its routing costs in nats.

The label of a text is the expert that it belongs to, -1 for none. Everything is counted per token over the
routing weights of the plain model, normalised to sum 1 per token; top-1 is the expert with the largest
weight, of equal ones the first. Padding never counts.

Accuracy, share and in_top_k are means over the labels that occur, so that an expert with ten times the text
does not decide them: for routing that knows nothing they are 1/E, 1/E and K/E on average, whatever the text.
"""

# N texts, B of them in a batch, S positions, T tokens of a batch without padding, K experts per token,
# E experts that labels count, L layers, P bins of positions

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from moesmith.data.pieces import row_numbers
from moesmith.errors import UserError
from moesmith.models.layers import MoELayer, submodule

from .bootstrap import ROUNDS, SEED, SHARE, Interval, draws
from .divergence import PIECE, batches, check_documents, logits
from .routed import Choose, moe_text_layers, needs_labels, routed, set_labels

Floats = NDArray[np.float64]

Losses = list[tuple[float, int]]
"""Per text: nats summed over its predicted tokens, and how many these are."""

OnText = Callable[[int, int], None]
"""Called with the number of texts done and of all texts."""


@dataclass
class Labelled:
    """A text as token ids, and the expert it belongs to (-1: none)."""

    ids: list[int]
    domain: str
    id: str
    label: int


# ---------------------------------------------------------------- losses


@torch.no_grad()
def losses(
    model: Any,
    texts: Sequence[Labelled],
    on_text: OnText | None = None,
    choose: Choose | None = None,
    name: str = "the model",
) -> Losses:
    """Next-token losses of a dense or MoE model, in fp32, summed in fp64.

    Args:
        choose: routing to use in the place of the model's own (`routed`).
        name: of the model, for messages.

    Raises:
        UserError: no texts, one without a token to predict or, for an oracle, without a label; a loss that
            is not finite.
    """
    check_documents(texts)
    if choose is not None and needs_labels(choose):
        for text in texts:
            if text.label < 0:
                raise UserError(
                    f"text {text.id} ({text.domain}) has no label, so an oracle has no expert for it",
                    "leave texts out that belong to no expert",
                )
    found: Losses = [(0.0, 0)] * len(texts)
    done = 0
    with contextlib.nullcontext() if choose is None else routed(model, choose):
        for batch in batches(texts):
            if choose is not None:
                set_labels(choose, torch.tensor([texts[i].label for i in batch]))
            for i, rows in zip(batch, logits(model, texts, batch, name), strict=True):
                nats = _nats(rows, texts[i].ids)
                if not math.isfinite(nats):
                    raise UserError(
                        f"{name}: a loss of {nats} on text {texts[i].id} ({texts[i].domain})",
                        "try --dtype float32 or bfloat16",
                    )
                found[i] = nats, len(rows)
            done += len(batch)
            if on_text:
                on_text(done, len(texts))
    return found


def _nats(logits_SV: Tensor, ids: list[int]) -> float:
    """-log p of ids[1:], summed; a few rows of the vocabulary in fp32 at a time."""
    targets = torch.tensor(ids[1:], device=logits_SV.device)[:, None]
    step = max(1, PIECE // logits_SV.shape[-1])
    parts = zip(logits_SV.split(step), targets.split(step), strict=True)
    return sum(-float(part.float().log_softmax(-1).gather(1, t).double().sum()) for part, t in parts)


# ---------------------------------------------------------------- routing


@torch.no_grad()
def measure_routing(
    model: Any,
    texts: Sequence[Labelled],
    num_experts: int,
    on_text: OnText | None = None,
    group: int = 1,
) -> dict[str, Any]:
    """Run the model over the texts and tell how its routers' choices agree with the labels.

    Args:
        num_experts: what labels count, E.
        group: experts of the model per label, where virtual groups were made: E * group experts, in order.

    Returns:
        plain data; `layers` in order, the rest pooled over all layers. Figures that need a label are None
        where no text has one; texts without a label count in `load` and `entropy` only. `majority` is the
        share of documents whose most used expert is their label's; pieces of one row are one document. The
        row of a label without text in `confusion` is all None. `accuracy_ci` is None where a label has a
        single document.

    Raises:
        UserError: no texts, a label or a number of experts that does not fit the model, weights that are not
            finite.
    """
    check_documents(texts)
    layers = moe_text_layers(model)
    for layer in layers:
        if layer.num_experts != num_experts * group:
            raise UserError(
                f"{layer.name} has {layer.num_experts} experts, wanted {num_experts * group}: "
                f"{num_experts} that labels name" + (f", in groups of {group}" if group > 1 else "")
            )
    for text in texts:
        if not -1 <= text.label < num_experts:
            raise UserError(
                f"text {text.id} ({text.domain}) has label {text.label}, "
                f"the experts are 0 to {num_experts - 1}",
                "-1 says that a text belongs to none",
            )
    watch = _Watch(layers, texts, num_experts, group)
    done = 0
    with watch.attach(model):
        for batch in batches(texts):
            watch.start(batch)
            logits(model, texts, batch, "the model")
            done += len(batch)
            if on_text:
                on_text(done, len(texts))
    return watch.facts()


class _Counts:
    """What one layer adds up, per text."""

    def __init__(self, texts: int, num_experts: int, bins: int):
        self.top1 = torch.zeros(texts, num_experts, dtype=torch.int64)
        self.mass = torch.zeros(texts, num_experts, dtype=torch.float64)
        self.in_top_k = torch.zeros(texts, dtype=torch.int64)
        self.hits = torch.zeros(bins, num_experts, dtype=torch.int64)
        """(P, E) labelled tokens whose top-1 is the label, by position and label"""


class _Watch:
    """Counts the ids and weights that every layer's experts are called with."""

    def __init__(self, layers: list[MoELayer], texts: Sequence[Labelled], num_experts: int, group: int):
        self.layers, self.texts, self.num_experts, self.group = layers, texts, num_experts, group
        self.label = torch.tensor([text.label for text in texts])
        self.length = torch.tensor([len(text.ids) for text in texts])
        longest = int(self.length.max())
        # 0, 1-3, 4-15, ...: the first tokens say little of what a text is about, later ones change slowly
        self.edges = [0, *(4**i for i in range(longest) if 4**i < longest)]
        self.counts = [_Counts(len(texts), num_experts, len(self.edges)) for _ in layers]

    @contextmanager
    def attach(self, model: nn.Module) -> Iterator[None]:
        with ExitStack() as stack:
            for layer, counts in zip(self.layers, self.counts, strict=True):
                hook = self._counting(layer, counts)
                handle = submodule(model, layer.experts).register_forward_pre_hook(hook)
                stack.callback(handle.remove)
            yield

    def start(self, batch: list[int]) -> None:
        """The next forward has these texts, padded on the right."""
        length_B = self.length[batch]
        position_BS = torch.arange(int(length_B.max())).expand(len(batch), -1)
        self._real = (position_BS < length_B[:, None]).flatten()
        self._text_T = torch.tensor(batch).repeat_interleave(length_B)
        position_T = position_BS.flatten()[self._real]
        self._bin_T = torch.bucketize(position_T, torch.tensor(self.edges), right=True) - 1
        self._label_T = self.label[self._text_T]

    def _counting(self, layer: MoELayer, counts: _Counts) -> Callable[[nn.Module, Any], None]:
        def hook(_experts: nn.Module, args: tuple[Tensor, ...]) -> None:
            _, index, weights = args
            if len(index) != len(self._real):
                raise UserError(
                    f"{layer.experts} was given {len(index)} of the batch's {len(self._real)} tokens: "
                    "they cannot be assigned to texts"
                )
            index_TK, weights_TK = index.cpu()[self._real] // self.group, weights.cpu().double()[self._real]
            if not bool(weights_TK.isfinite().all()):
                raise UserError(f"{layer.router}: routing weights that are not finite")
            mass_TE = weights_TK.new_zeros(len(index_TK), self.num_experts)
            mass_TE.scatter_add_(1, index_TK, weights_TK)
            mass_TE /= mass_TE.sum(1, keepdim=True)
            top1_T = mass_TE.argmax(1)
            one_T = torch.ones_like(top1_T)
            label_T = self._label_T
            counts.mass.index_add_(0, self._text_T, mass_TE)
            counts.top1.index_put_((self._text_T, top1_T), one_T, accumulate=True)
            in_top_k_T = (index_TK == label_T[:, None]).any(1).long()
            counts.in_top_k.index_add_(0, self._text_T, in_top_k_T)
            hit_T = top1_T == label_T
            counts.hits.index_put_((self._bin_T[hit_T], label_T[hit_T]), one_T[hit_T], accumulate=True)

        return hook

    # ---------------------------------------------------------------- figures

    def facts(self) -> dict[str, Any]:
        top_k = self.layers[0].top_k // self.group
        top1 = torch.stack([counts.top1 for counts in self.counts]).sum(0)
        mass = torch.stack([counts.mass for counts in self.counts]).sum(0)
        in_top_k = torch.stack([counts.in_top_k for counts in self.counts]).sum(0)
        pooled = self._figures(top1, mass, in_top_k, len(self.layers))
        layers = [
            {
                "layer": number,
                **self._figures(counts.top1, counts.mass, counts.in_top_k, 1),
                "load": _shares(counts.mass.sum(0)),
                "load_top1": _shares(counts.top1.sum(0)),
                "entropy": _entropy(counts.mass.sum(0)),
            }
            for number, counts in enumerate(self.counts)
        ]
        return {
            "chance": top_k / self.num_experts,
            "chance_top1": 1 / self.num_experts,
            "tokens": int(self.length[self.label >= 0].sum()),
            "documents": len(self._documents()[1]),
            **pooled,
            "accuracy_ci": self._accuracy_interval(top1),
            "positions": self._positions(),
            "layers": layers,
        }

    def _figures(self, top1: Tensor, mass: Tensor, in_top_k: Tensor, layers: int) -> dict[str, Any]:
        """Agreement with the labels: top1 and mass (N, E), in_top_k (N,), summed over so many layers."""
        mine = self.label >= 0
        label = self.label[mine]
        if not len(label):
            return dict.fromkeys(("accuracy", "share", "in_top_k", "majority", "confusion"))
        routed_E = torch.zeros(self.num_experts, dtype=torch.float64)
        routed_E.index_add_(0, label, layers * self.length[mine].double())
        there = routed_E > 0

        def mean(values_n: Tensor) -> float:
            """Of the labels' shares, from sums per text."""
            return float((torch.zeros_like(routed_E).index_add_(0, label, values_n) / routed_E)[there].mean())

        confusion = torch.zeros(self.num_experts, self.num_experts, dtype=torch.float64)
        confusion.index_add_(0, label, top1[mine].double())
        return {
            "accuracy": mean(top1[mine].gather(1, label[:, None])[:, 0].double()),
            "share": mean(mass[mine].gather(1, label[:, None])[:, 0]),
            "in_top_k": mean(in_top_k[mine].double()),
            "majority": self._majority(top1),
            "confusion": [
                (row / total).tolist() if total else [None] * self.num_experts
                for row, total in zip(confusion, routed_E.tolist(), strict=True)
            ],
        }

    def _documents(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Of the labelled texts: the document (n,) that each belongs to, the label of each document."""
        number = np.array(document_numbers([text for text in self.texts if text.label >= 0]), np.int64)
        first = np.unique(number, return_index=True)[1]
        return number, self.label[self.label >= 0].numpy()[first]

    def _majority(self, top1: Tensor) -> float:
        number, label = self._documents()
        uses = torch.zeros(len(label), self.num_experts, dtype=torch.int64)
        uses.index_add_(0, torch.from_numpy(number), top1[self.label >= 0])
        return float((uses.argmax(1).numpy() == label).mean())

    def _accuracy_interval(self, top1: Tensor) -> Interval | None:
        mine = self.label >= 0
        label = self.label[mine].numpy()
        number, _ = self._documents()
        hits = top1[mine].gather(1, self.label[mine][:, None]).numpy().astype(np.float64)
        tokens = self.length[mine].numpy() * float(len(self.layers))
        found = [
            drawn(hits[label == e], tokens[label == e], number[label == e], SEED + int(e))
            for e in np.unique(label)
        ]
        whole = [one for one in found if one is not None]
        if not whole or len(whole) < len(found):
            return None
        return middle(np.mean(whole, axis=0)[:, 0].clip(0, 1))

    def _positions(self) -> list[dict[str, Any]]:
        """Accuracy of the labelled tokens in each bin of positions, over all layers; empty bins left out."""
        mine = self.label >= 0
        length, label = self.length[mine], self.label[mine]
        longest = int(length.max()) if len(length) else 0
        hits = torch.stack([counts.hits for counts in self.counts]).sum(0)
        found = []
        for number, (start, end) in enumerate(zip(self.edges, [*self.edges[1:], longest], strict=True)):
            tokens_E = torch.zeros(self.num_experts, dtype=torch.int64)
            tokens_E.index_add_(0, label, (length.clamp(max=end) - start).clamp(min=0))
            there = tokens_E > 0
            if there.any():
                accuracy = (hits[number][there] / (tokens_E[there] * len(self.layers))).double().mean()
                tokens = int(tokens_E.sum())
                last = min(end, longest) - 1
                found.append({"from": start, "to": last, "accuracy": float(accuracy), "tokens": tokens})
        return found


def drawn(values_NX: Floats, weights_N: Floats, document_N: NDArray[np.int64], seed: int) -> Floats | None:
    """sum(values) / sum(weights) of resampled documents, (W, X); None for fewer than two.

    A bootstrap of M documents has (M - 1) / M of the variance that it should have, half of it for two, so
    deviations from the ratio of all are widened by sqrt(M / (M - 1)).
    """
    document = np.unique(document_N, return_inverse=True)[1]
    count = int(document.max()) + 1
    if count < 2:
        return None
    values_MX, weights_M = np.zeros((count, values_NX.shape[1])), np.zeros(count)
    np.add.at(values_MX, document, values_NX)
    np.add.at(weights_M, document, weights_N)
    ratios = np.concatenate([(c @ values_MX) / (c @ weights_M)[:, None] for c in draws(count, ROUNDS, seed)])
    whole = values_MX.sum(0) / weights_M.sum()
    widened: Floats = whole + (ratios - whole) * math.sqrt(count / (count - 1))
    return widened


def middle(samples: Floats) -> Interval:
    """The 95 % interval of drawn values."""
    low, high = np.quantile(samples, [(1 - SHARE) / 2, (1 + SHARE) / 2])
    return float(low), float(high)


def document_numbers(texts: Sequence[Labelled]) -> list[int]:
    """Per text the number 0, 1, ... of its document: pieces of one row of a domain belong together."""
    return row_numbers(f"{text.domain}\n{text.id}" if text.id else "" for text in texts)


def _shares(load: Tensor) -> list[float]:
    return (load / load.sum()).tolist()


def _entropy(load: Tensor) -> float:
    """Entropy of the load over log E: 1 where all experts do the same work; 1 for a single expert."""
    if len(load) == 1:
        return 1.0
    share = load / load.sum()
    return float(torch.special.entr(share).sum() / math.log(len(load)))
