"""Greedy answers of a model to some prompts, and whether they loop, end, or are empty.

Perplexity can look fine while a model repeats itself or says nothing, and that is what its users see. So a
smaller model answers the same prompts as the original, and the answers are compared.

An answer *looped* when one of two things holds:
  - its end repeats itself: the last 24 tokens, or three times the period where that is longer, have a period
    of at most 32 tokens;
  - it has 40 tokens or more, and at least half of its 4-grams have occurred in it before.
It *ended* when the model stopped by itself before the limit, and it is *empty* when it is blank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import comb
from statistics import median
from typing import Any

import torch

from moesmith.errors import UserError

from .greedy import continuations
from .interval import wilson

PERIOD, REPEATS, TAIL = 32, 3, 24
GRAM, GRAM_TOKENS, GRAM_SHARE = 4, 40, 0.5
SIGNIFICANT = 0.05
SAMPLES = 10
SHOWN = 600  # characters of a prompt in the report


def looped(ids: Sequence[int]) -> bool:
    """Whether an answer repeats itself, by the rule at the top of this file."""
    for period in range(1, PERIOD + 1):
        tail = list(ids[-max(TAIL, REPEATS * period) :])
        if len(tail) >= max(TAIL, REPEATS * period) and tail[period:] == tail[:-period]:
            return True
    if len(ids) < GRAM_TOKENS:
        return False
    grams = [tuple(ids[i : i + GRAM]) for i in range(len(ids) - GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) >= GRAM_SHARE


@dataclass
class Answer:
    """One prompt and what the model made of it."""

    prompt: str
    text: str
    ids: list[int]
    """of the answer, without the token that ended it"""
    ended: bool
    looped: bool

    @property
    def empty(self) -> bool:
        """Whether there is nothing to read."""
        return not self.text.strip()


@dataclass
class Canary:
    """A model's answers, in the order of the prompts."""

    answers: list[Answer]
    max_new_tokens: int

    @property
    def n(self) -> int:
        """Prompts asked."""
        return len(self.answers)

    def count(self, what: str) -> int:
        """How many answers are `looped`, `ended` or `empty`."""
        return sum(getattr(answer, what) for answer in self.answers)

    def rate(self, what: str) -> dict[str, Any]:
        """Count, share and 95 % Wilson interval of `looped`, `ended` or `empty`."""
        return _rate(self.count(what), self.n)

    def facts(self) -> dict[str, Any]:
        """Everything for a file."""
        return {
            "n": self.n,
            "max_new_tokens": self.max_new_tokens,
            **{f"{what}_rate": self.rate(key) for what, key in _RATES},
            "answers": [asdict(answer) for answer in self.answers],
        }

    @classmethod
    def from_facts(cls, facts: dict[str, Any]) -> Canary:
        """Back from `facts`."""
        return cls([Answer(**answer) for answer in facts["answers"]], facts["max_new_tokens"])


_RATES = (("loop", "looped"), ("eos", "ended"), ("empty", "empty"))


@torch.no_grad()
def canary(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 128,
    batch_size: int = 8,
    on_batch: Callable[[int], None] | None = None,
) -> Canary:
    """Answer every prompt (token ids, template included) greedily.

    Rows are padded on the left and masked, so an answer does not depend on its neighbours.

    Args:
        on_batch: called with the number of prompts done after each batch.

    Raises:
        UserError: no prompts, or an empty one.
    """
    if not prompts:
        raise UserError("no prompts for the canary")
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"prompt {i} of the canary is empty")
    was_training = model.training
    model.eval()
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    answers: dict[int, Answer] = {}
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        said = continuations(model, tokenizer, [prompts[i] for i in batch], max_new_tokens)
        for i, (ids, ended) in zip(batch, said, strict=True):
            prompt = tokenizer.decode(list(prompts[i]), skip_special_tokens=False)
            text = tokenizer.decode(ids, skip_special_tokens=True).strip()
            answers[i] = Answer(prompt, text, ids, ended, looped(ids))
        if on_batch:
            on_batch(len(answers))
    model.train(was_training)
    return Canary([answers[i] for i in range(len(prompts))], max_new_tokens)


# ---------------------------------------------------------------- two models


def compare(reference: Canary, candidate: Canary, samples: int = SAMPLES) -> dict[str, Any]:
    """The answers of two models to the same prompts: rates of both, length ratio, samples side by side.

    Samples come first where one of the two loops, is empty or did not end and the other did, then where the
    answers differ, then the rest.

    Raises:
        ValueError: other prompts, or another length limit.
    """
    pairs = _pairs(reference, candidate)
    ratios = [max(len(b.ids), 1) / max(len(a.ids), 1) for a, b in pairs]

    def interest(i: int) -> tuple[int, int]:
        a, b = pairs[i]
        flags = [getattr(a, what) != getattr(b, what) for what in ("looped", "empty", "ended")]
        return (flags.index(True) if any(flags) else 3 if a.ids != b.ids else 4), i

    chosen = sorted(range(len(pairs)), key=interest)[:samples]
    return {
        "n": reference.n,
        "max_new_tokens": reference.max_new_tokens,
        **{f"{name}_rate": {"a": reference.rate(what), "b": candidate.rate(what)} for name, what in _RATES},
        "length_ratio": float(median(ratios)),
        "same": _rate(sum(a.ids == b.ids for a, b in pairs), len(pairs)),
        "worse": worse(reference, candidate),
        "significantly_worse": worse(reference, candidate, strict=False),
        "samples": [
            {
                "prompt": a.prompt,
                "a": a.text,
                "b": b.text,
                "loop_a": a.looped,
                "loop_b": b.looped,
                "ended_a": a.ended,
                "ended_b": b.ended,
            }
            for a, b in (pairs[i] for i in chosen)
        ],
    }


def worse(reference: Canary, candidate: Canary, strict: bool = True) -> list[str]:
    """In which ways the candidate's answers are worse, one sentence each; empty when in none.

    The rule: more answers loop or are empty than the reference's, or significantly fewer end. With `strict`
    one more loop or empty answer is enough, which is what a gate wants; without, they too have to be
    significantly more. Significant: a one-sided sign test over the prompts where the two models differ in
    that respect has p < 0.05.

    Raises:
        ValueError: other prompts, or another length limit.
    """
    pairs = _pairs(reference, candidate)
    reasons = []
    for what, words, bad in (
        ("looped", "answers that loop", True),
        ("empty", "empty answers", True),
        ("ended", "answers that end", False),
    ):
        better = sum(getattr(a, what) == bad != getattr(b, what) for a, b in pairs)
        worse_ = sum(getattr(b, what) == bad != getattr(a, what) for a, b in pairs)
        p = sign_test(worse_, better)
        if worse_ > better and ((strict and bad) or p < SIGNIFICANT):
            counts = f"{candidate.count(what)} of {candidate.n}, before {reference.count(what)}"
            reasons.append(f"{words}: {counts} (p = {p:.2g})")
    return reasons


def sign_test(worse: int, better: int) -> float:
    """Probability of at least so many `worse` among worse + better fair coin tosses."""
    n = worse + better
    return sum(comb(n, k) for k in range(worse, n + 1)) / 2**n


def report_section(names: tuple[str, str], compared: dict[str, Any]) -> dict[str, Any]:
    """What `compare` found, as the report's `canary` section."""
    rows = [
        {
            "name": name,
            "loop_rate": compared["loop_rate"][side]["rate"],
            "eos_rate": compared["eos_rate"][side]["rate"],
            "empty_rate": compared["empty_rate"][side]["rate"],
            "length_ratio": 1.0 if side == "a" else compared["length_ratio"],
            "n": compared["n"],
        }
        for name, side in zip(names, "ab", strict=True)
    ]
    samples = [
        {**sample, "prompt": _end(sample["prompt"]), "a_name": names[0], "b_name": names[1]}
        for sample in compared["samples"]
    ]
    return {"rows": rows, "samples": samples}


def _end(prompt: str) -> str:
    """The end of a long prompt: what the answer goes on from."""
    prompt = prompt.strip()
    return prompt if len(prompt) <= SHOWN else "…" + prompt[-SHOWN:]


def _pairs(reference: Canary, candidate: Canary) -> list[tuple[Answer, Answer]]:
    pairs = list(zip(reference.answers, candidate.answers, strict=True))
    if any(a.prompt != b.prompt for a, b in pairs) or reference.max_new_tokens != candidate.max_new_tokens:
        raise ValueError("the two canaries answered other prompts or had other limits")
    return pairs


def _rate(hits: int, n: int) -> dict[str, Any]:
    return {"hits": hits, "rate": hits / n, "ci": wilson(hits, n)}
