"""Does an exported model say what its source says? Next-token log-probabilities, compared prompt by prompt.

`next_logprobs` asks a transformers model; other runtimes bring their own numbers in the same form, token id
to log-probability. `compare` looks at the source's most likely tokens. What is compared is one token after
each prompt: enough to see a lost adapter, swapped halves or another normalisation, and every runtime can
give it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from moesmith.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

TOP = 50
"""tokens of each prompt that are compared: the source's most likely ones"""

Logprobs = Mapping[int, float]
"""token id -> log-probability (nats), of one prompt's next token; of the most likely tokens at least"""


@dataclass(frozen=True)
class Parity:
    """How far one model's next-token log-probabilities are from another's. Differences are in nats."""

    prompts: int
    tokens: int
    """(prompt, token) pairs compared"""
    max: float
    """largest |difference|"""
    mean: float
    """mean |difference| over all pairs"""
    kl: float
    """KL(source, other), mean over prompts; what lies outside the compared tokens counts as one token"""
    agreement: float
    """share of prompts with the same most likely token"""
    worst: int
    """the prompt with the largest difference, counted from 0"""
    missing: int
    """pairs that the other did not report: it gives them at most its smallest reported log-probability"""

    def facts(self) -> dict[str, Any]:
        """For a JSON file."""
        return {name: _rounded(value) for name, value in asdict(self).items()}


def compare(source: Sequence[Logprobs], other: Sequence[Logprobs], top: int = TOP) -> Parity:
    """Compare over the `top` most likely tokens of the source.

    Args:
        source: one mapping per prompt.
        other: the same prompts, in the same order.

    Raises:
        ValueError: not the same number of prompts, or none.
        UserError: a log-probability that is not finite or above 0, or a prompt without any.
    """
    if len(source) != len(other) or not source:
        raise ValueError(f"{len(source)} prompts of the source, {len(other)} of the other")
    worst, worst_prompt, total, tokens, kl, same, missing = -1.0, 0, 0.0, 0, 0.0, 0, 0
    for number, (mine, theirs) in enumerate(zip(source, other, strict=True)):
        _check(mine, f"the source, prompt {number + 1}")
        _check(theirs, f"the export, prompt {number + 1}")
        likely = sorted(mine, key=lambda token: -mine[token])[:top]
        floor = min(theirs.values())
        gave = [theirs.get(token, floor) for token in likely]
        missing += sum(token not in theirs for token in likely)
        differences = [abs(mine[token] - value) for token, value in zip(likely, gave, strict=True)]
        if max(differences) > worst:
            worst, worst_prompt = max(differences), number
        total, tokens = total + sum(differences), tokens + len(likely)
        kl += _divergence([mine[token] for token in likely], gave)
        same += likely[0] == max(theirs, key=lambda token: theirs[token])
    prompts = len(source)
    return Parity(prompts, tokens, worst, total / tokens, kl / prompts, same / prompts, worst_prompt, missing)


def _check(logprobs: Logprobs, whose: str) -> None:
    if not logprobs:
        raise UserError(f"{whose}: no log-probability came back")
    odd = next((value for value in logprobs.values() if not value <= 1e-4 or math.isinf(value)), None)
    if odd is not None:
        raise UserError(f"{whose}: {odd} is no log-probability", "the weights hold NaN or infinity")


def _divergence(mine: Sequence[float], theirs: Sequence[float]) -> float:
    """KL of two distributions over the compared tokens and one more for the rest; never below 0."""
    p, q = [math.exp(value) for value in mine], [math.exp(value) for value in theirs]
    rest_p, rest_q = max(1 - sum(p), 0.0), max(1 - sum(q), 1e-9)
    inside = sum(a * (x - y) for a, x, y in zip(p, mine, theirs, strict=True))
    rest = rest_p * math.log(rest_p / rest_q) if rest_p > 1e-9 else 0.0
    return max(inside + rest, 0.0)


def _rounded(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


# ---------------------------------------------------------------- asking a transformers model


def next_logprobs(
    model: Any,
    prompts: Sequence[Sequence[int]],
    top: int = TOP,
    also: Sequence[Logprobs] | None = None,
    on_prompt: Callable[[], None] | None = None,
) -> list[dict[int, float]]:
    """What a model says comes after each prompt. One forward per prompt: no padding, no cache.

    Args:
        model: a causal language model, in eval mode.
        prompts: token ids.
        top: how many of the most likely tokens are kept.
        also: tokens to keep beside these, by prompt.
        on_prompt: called after each prompt.
    """
    import torch

    found = []
    for number, ids in enumerate(prompts):
        with torch.no_grad():
            inputs = torch.tensor([list(ids)], device=model.device)
            logits = model(input_ids=inputs, attention_mask=torch.ones_like(inputs), use_cache=False).logits
        found.append(keep_top(logits[0, -1], top, also[number] if also is not None else ()))
        if on_prompt is not None:
            on_prompt()
    return found


def keep_top(logits: Tensor, top: int, also: Sequence[int] | Logprobs = ()) -> dict[int, float]:
    """Logits (V,) of one position -> log-probabilities of the `top` most likely tokens, and of `also`."""
    import torch

    logprobs = torch.log_softmax(logits.double().cpu(), -1)
    likely = logprobs.topk(min(top, len(logprobs))).indices.tolist()
    return {token: logprobs[token].item() for token in {*likely, *also}}


# ---------------------------------------------------------------- what is accepted


@dataclass(frozen=True)
class Tolerance:
    """Bounds of a `Parity`, and where they come from."""

    max: float
    mean: float
    kl: float
    agreement: float
    reason: str

    def widened(self, own: Parity, dtype: str) -> Tolerance:
        """Bounds no narrower than twice what computing in `dtype` does to the source itself.

        A router that is nearly undecided turns the last bit of a weight into another expert. The largest
        difference has a long tail then: five times.
        """
        if 5 * own.max <= self.max and 2 * own.mean <= self.mean and 2 * own.kl <= self.kl:
            return self
        return Tolerance(
            max=max(self.max, 5 * own.max),
            mean=max(self.mean, 2 * own.mean),
            kl=max(self.kl, 2 * own.kl),
            agreement=max(min(self.agreement, 2 * own.agreement - 1), 0.0),
            reason=f"twice what computing in {dtype} does to the source itself",
        )

    def beyond(self, parity: Parity) -> list[str]:
        """What is out of bounds, in words; empty when all is well."""
        found = [
            f"{what} {value:.3g}, at most {bound:.3g}"
            for what, value, bound in (
                ("largest difference", parity.max, self.max),
                ("mean difference", parity.mean, self.mean),
                ("KL", parity.kl, self.kl),
            )
            if not value <= bound
        ]
        if parity.agreement < self.agreement:
            found.append(f"same first token {parity.agreement:.0%}, at least {self.agreement:.0%}")
        return found


INF = math.inf

# route -> bounds. A lost adapter, a swapped gate and up, or weights that are not normalised move the mean by
# 0.1 and more on the models of the tests; what is only rounding stays far below.
TOLERANCES: dict[str, Tolerance] = {
    "float32": Tolerance(0.01, 1e-3, 1e-4, 0.0, "the same weights: only the order of sums differs"),
    "bfloat16": Tolerance(0.5, 0.05, 5e-3, 0.0, "merged weights are rounded to 8 bits of mantissa"),
    "float16": Tolerance(0.25, 0.02, 2e-3, 0.0, "merged weights are rounded to 11 bits of mantissa"),
    "peft": Tolerance(0.01, 1e-3, 1e-4, 0.0, "the same factors under other names"),
    "vllm": Tolerance(0.01, 1e-3, 1e-4, 0.0, "the same factors, expert by expert"),
    "gguf f32": Tolerance(0.01, 1e-3, 1e-4, 0.0, "the same weights, another program's sums"),
    "gguf f16": Tolerance(0.5, 0.05, 5e-3, 0.0, "weights and what meets them are rounded to 16 bits"),
    "gguf bf16": Tolerance(0.5, 0.05, 5e-3, 0.0, "weights and what meets them are rounded to 16 bits"),
    # Against the 16-bit GGUF. Quantising changes what a model says; this catches a broken file, no bad one.
    "gguf 8 bits": Tolerance(INF, 0.3, 0.05, 0.75, "8 bits and scales: nearly the 16-bit model"),
    "gguf 5 bits": Tolerance(INF, 0.6, 0.2, 0.6, "5 to 6 bits"),
    "gguf 4 bits": Tolerance(INF, 1.0, 0.5, 0.5, "4 bits"),
    "gguf 2 bits": Tolerance(INF, INF, 2.0, 0.1, "2 to 3 bits: small models lose a lot"),
}


def quant_route(kind: str) -> str:
    """A quantisation's row in the table: q4_k_m -> gguf 4 bits."""
    kind = kind.lower()
    if kind in ("f32", "f16", "bf16"):
        return f"gguf {kind}"
    digits = [int(letter) for letter in kind if letter.isdigit()]
    bits = 4 if "mxfp" in kind else digits[0] if digits else 4
    return "gguf 8 bits" if bits >= 8 else f"gguf {5 if bits >= 5 else 4 if bits == 4 else 2} bits"


def tolerance(route: str, mean: float | None = None) -> Tolerance:
    """The bounds of a route; with `mean`, only that the mean difference is at most so much."""
    if mean is None:
        return TOLERANCES[route]
    return Tolerance(INF, mean, INF, 0.0, "--tolerance")


def lost(parity: Parity, effect: Parity, bounds: Tolerance) -> bool:
    """Whether the export is nearer to the model without its adapter than the adapter's effect allows.

    Args:
        parity: source against export.
        effect: source against the same model without the adapter.
        bounds: of this route; an adapter whose effect is smaller cannot be told from rounding.
    """
    return effect.mean > bounds.mean and parity.mean > effect.mean / 2
