"""Which token comes next: one request's settings, and the choice from a row of logits.

A choice depends on the row, the settings, the tokens so far and (seed, step), and on nothing else in the
batch: the same seed gives the same answer whoever else is being served. Logits are float32 rows of length V.
What is reported as log-probabilities is the model's own distribution, before temperature, penalties and cuts.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


COLD = 1e-5  # below, a division would overflow, and the draw be greedy anyway


@dataclass(frozen=True)
class Sampling:
    """How one answer is drawn."""

    max_new_tokens: int
    temperature: float = 0.0
    """0 takes the most likely token"""
    top_p: float = 1.0
    top_k: int = 0
    """0: no limit"""
    min_p: float = 0.0
    seed: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    top_logprobs: int | None = None
    """how many of the likeliest tokens to report beside the one taken; None reports nothing"""
    stop_ids: frozenset[int] = field(default_factory=frozenset)


@dataclass(frozen=True)
class Token:
    """A token of an answer or prompt. `logprob` and `top` are filled if asked for."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    """(id, log-probability), the likeliest first"""


def choose(logits: Tensor, how: Sampling, before: list[int]) -> Token:
    """The next token of an answer.

    Args:
        logits: (V,) float32, as the model gave them; left unchanged.
        before: the answer's tokens so far.
    """
    scores = _adjusted(logits, how, before)
    if how.temperature < COLD:
        chosen = int(scores.argmax())
    else:
        chosen = draw(scores, how, random.Random(f"{how.seed}/{len(before)}").random())
    if how.top_logprobs is None:
        return Token(chosen)
    return report(logits, chosen, how.top_logprobs)


def _adjusted(logits: Tensor, how: Sampling, before: list[int]) -> Tensor:
    """Logits with biases and penalties on them."""
    if not how.logit_bias and not (before and (how.presence_penalty or how.frequency_penalty)):
        return logits
    import torch

    scores = logits.clone()
    if before and (how.presence_penalty or how.frequency_penalty):
        ids, counts = torch.tensor(before, device=scores.device).unique(return_counts=True)
        scores[ids] -= how.presence_penalty + how.frequency_penalty * counts
    for token, bias in how.logit_bias:
        scores[token] += bias
    return scores


def draw(scores: Tensor, how: Sampling, at: float) -> int:
    """The token at the point `at` in [0, 1) of what temperature, top-k, top-p and min-p leave.

    The likeliest token is always left.
    """
    # Subtracted before the division: a temperature of 1e-6 must not overflow.
    chances = ((scores - scores.max()) / how.temperature).softmax(-1).double()
    ids = None
    if how.top_k or how.top_p < 1:
        chances, ids = _likeliest(chances, how)
    if how.min_p:
        chances = chances.where(chances >= how.min_p * chances.max(), 0.0)
    total = chances.cumsum(-1)
    place = min(int((total <= at * total[-1]).sum()), len(total) - 1)
    return place if ids is None else int(ids[place])


def _likeliest(chances: Tensor, how: Sampling) -> tuple[Tensor, Tensor]:
    """(probabilities, ids) that top-k, then top-p leave; a whole vocabulary is rarely sorted for it."""
    many = how.top_k or 1024
    ordered, ids = chances.topk(min(many, len(chances)))
    while not how.top_k and len(ids) < len(chances) and float(ordered.sum()) < how.top_p:
        many *= 8
        ordered, ids = chances.topk(min(many, len(chances)))
    if how.top_p < 1:
        whole = float(ordered.sum()) if how.top_k else 1.0
        kept = max(1, int((ordered.cumsum(-1) - ordered < how.top_p * whole).sum()))
        ordered, ids = ordered[:kept], ids[:kept]
    return ordered, ids


def report(logits: Tensor, chosen: int, top: int) -> Token:
    """The token with its log-probability and those of the `top` likeliest."""
    logprobs = logits.log_softmax(-1)
    values, ids = logprobs.topk(min(top, len(logprobs)))
    best = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return Token(chosen, float(logprobs[chosen]), best)
