"""What one cut does to a model: measured on held-out text with masks, and judged.

The original is loaded once. Masked, it is the smaller model (the same logits, which `same_logits` checks on
what was written), so original, plan and random control are compared batch by batch without a second model in
memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesmith import console
from moesmith.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from moesmith.data.corpora import Document, Encoded
    from moesmith.prune.plan import Keep
    from moesmith.prune.stats import Profile

# (nats per token, perplexity ratio of the worst domain): what people accept every day. 4-bit quantisation of
# Llama 3 8B costs 0.031 and + 2.8 % (Q4_K_M in llama.cpp's perplexity table), 3-bit about 0.1.
SAFE, STOP = (0.03, 1.03), (0.1, 1.10)

# Rows of text below which "safe" is never said, in all and in each domain: intervals from so few are too
# narrow. Of skewed values (KL per document) a 95 % bootstrap interval of 2 holds the true mean 48 times in
# 100, of 5 78 times, of 20 88 times.
FEW_DOCUMENTS, FEW_IN_DOMAIN = 20, 5

PARITY_TOKENS = 64
# Difference between written and masked logits that is rounding, as a share of the largest logit: of the
# median token and of the worst. On a CPU both are 0 as a rule: the same rows meet the same matrices.
PARITY = {"float32": (1e-5, 1e-4), "float16": (1e-3, 1e-2), "bfloat16": (2e-3, 2e-2)}
MEMORY = 1.2  # a loaded model takes its files and a little more
SPARE = 1_000_000_000  # for activations and logits
PLAN, RANDOM, SMALLEST = "plan", "random", "smallest cut"


@dataclass
class Evidence:
    """What was measured."""

    rows: dict[str, dict[str, Any]]
    """facts of a Divergence: PLAN, RANDOM and, where it was asked for, SMALLEST"""
    canary: dict[str, Any] | None = None
    """`eval.canary.compare` of original and plan"""
    parity: dict[str, Any] | None = None
    """see `same_logits`"""
    skipped: list[str] = field(default_factory=list)
    """what was not measured, and why"""
    selected: str | None = None
    """that the plan was chosen on the text it is judged on, in words"""

    def facts(self) -> dict[str, Any]:
        """The figures that stay with the model, without the answers themselves."""
        keys = ("n", "loop_rate", "eos_rate", "empty_rate", "length_ratio", "worse", "significantly_worse")
        canary = self.canary
        return {
            "held_out": self.rows,
            "canary": None if canary is None else {key: canary[key] for key in keys},
            "mask_equals_slice": self.parity,
            "skipped": self.skipped,
            "selected": self.selected,
        }


# ---------------------------------------------------------------- before and beside


def no_room(nbytes: int, device: str) -> str | None:
    """Why a model of so many bytes on disk does not fit into memory; None if it does."""
    from moesmith.jobs._pair import free_memory, on_gpu

    free, needed = free_memory(device), round(MEMORY * nbytes) + SPARE
    if needed <= free:
        return None
    where = "on the card" if on_gpu(device) else "of RAM"
    return f"the model needs about {console.size(needed)}, {console.size(free)} {where} are free"


def enough_tokens(profile: Profile) -> None:
    """Raise UserError for a layer that no token reached: its experts cannot be ranked."""
    for layer in profile.layers:
        if float(layer.total("tokens").sum()) == 0:
            raise UserError(
                f"no token of the profile reached {layer.layer}: its experts cannot be ranked",
                "text never gets there, or the profile is too small",
            )


def load(folder: Path, device: str) -> Any:
    """A checkpoint in the dtype it is stored in, ready to run."""
    import moesmith
    from moesmith.jobs._pair import on_gpu
    from moesmith.models.checkpoint import model_class, read_config

    moesmith.register()
    if not console.stderr().is_terminal:
        from transformers.utils import logging

        logging.disable_progress_bar()
    load_model = model_class(read_config(folder)).from_pretrained
    return load_model(folder, dtype="auto", device_map={"": 0} if on_gpu(device) else None).eval()


def tokenizer_of(folder: Path) -> Any:
    """The model's tokenizer, None if it comes without one."""
    from moesmith.models.checkpoint import has_tokenizer

    if not has_tokenizer(folder):
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def held_out(profile: Path, tokens: int) -> list[Document]:
    """Documents with ids that the profile did not see, about `tokens` tokens, domains in turn.

    Raises:
        UserError: there are none, or they share passages with the calibration text.
    """
    from moesmith.data import leaks
    from moesmith.data.corpora import read_held_out

    documents = read_held_out(profile)
    leaks.check_disjoint(leaks.read(profile), documents)
    usable = [document for document in documents if len(document.ids) > 1]
    if not usable:
        raise UserError(f"{profile}: its held-out text has no token ids", "profile again")
    return in_turn(usable, tokens)


def in_turn(documents: Sequence[Document], tokens: int) -> list[Document]:
    """Documents by domains in turn until there are `tokens`; at least one, the last one whole."""
    by_domain: dict[str, list[Document]] = {}
    for document in documents:
        by_domain.setdefault(document.domain, []).append(document)
    queues = [list(reversed(mine)) for mine in by_domain.values()]
    chosen: list[Document] = []
    taken = 0
    while any(queues) and taken < tokens:
        for queue in queues:
            if queue and taken < tokens:
                chosen.append(queue.pop())
                taken += len(chosen[-1].ids)
    return chosen


# ---------------------------------------------------------------- measuring


def measure(
    model: Any, documents: Sequence[Encoded], plans: Mapping[str, Keep], label: str = "held-out"
) -> dict[str, dict[str, Any]]:
    """KL, agreement and perplexity of the model cut to each plan against itself; facts of a Divergence."""
    from moesmith.eval.divergence import divergences
    from moesmith.models.surgery import masked

    tokens = sum(len(document.ids) - 1 for document in documents)
    contexts = {name: lambda keep=keep: masked(model, keep) for name, keep in plans.items()}
    with console.bar(label, total=tokens) as bar:
        found = divergences(model, documents, contexts, on_batch=bar.update, name="the original")
    return {name: divergence.facts() for name, divergence in found.items()}


def answers(
    model: Any, tokenizer: Any, keep: Keep, prompts: Sequence[Sequence[int]], new_tokens: int
) -> dict[str, Any]:
    """Greedy answers of the original and of the cut model, compared: see `eval.canary.compare`."""
    from moesmith.eval.canary import canary, compare
    from moesmith.models.surgery import masked

    n = len(prompts)
    with console.bar("canary", total=2 * n) as bar:
        before = canary(model, tokenizer, prompts, new_tokens, on_batch=bar.update)
        with masked(model, keep):
            after = canary(model, tokenizer, prompts, new_tokens, on_batch=lambda done: bar.update(n + done))
    return compare(before, after)


def masked_logits(model: Any, keep: Keep, ids: Sequence[int]) -> Tensor:
    """Logits of the masked original on the first PARITY_TOKENS ids, (tokens, V) fp32 on the CPU."""
    from moesmith.models.surgery import masked

    with masked(model, keep):
        return _logits(model, ids)


def same_logits(folder: Path, expected: Tensor, ids: Sequence[int], device: str) -> dict[str, Any]:
    """Load what was written and compare it with the masked original on the same ids.

    Raises:
        UserError: they differ by more than rounding.
    """
    from moesmith.experts.forward import use_experts_function

    model = load(folder, device)
    with use_experts_function(model):
        found = _logits(model, ids)
    width = str(model.dtype).removeprefix("torch.")
    difference = (found - expected).abs().amax(-1)
    median, worst = float(difference.median()), float(difference.max())
    scale = float(expected.abs().max())
    limits = [share * scale for share in PARITY.get(width, PARITY["bfloat16"])]
    if not (median <= limits[0] and worst <= limits[1]):
        raise UserError(
            f"the written model is not the masked original: logits differ by {median:.2g} (median token) and "
            f"{worst:.2g} (worst), more than {limits[0]:.2g} and {limits[1]:.2g}",
            "nothing was kept; this is a fault of moesmith for this architecture, please report it",
        )
    return {
        "difference": worst,
        "median_difference": median,
        "largest_logit": scale,
        "tolerance": {"median": limits[0], "worst": limits[1]},
        "dtype": width,
        "tokens": len(found),
        "top1": float((found.argmax(-1) == expected.argmax(-1)).float().mean()),
    }


def _logits(model: Any, ids: Sequence[int]) -> Tensor:
    import torch

    with torch.no_grad():
        row = torch.tensor([list(ids[:PARITY_TOKENS])], device=model.device)
        return model(input_ids=row, use_cache=False).logits[0].float().cpu()


# ---------------------------------------------------------------- judging


def grade(measured: Mapping[str, Any], compared: Mapping[str, Any] | None) -> str:
    """ "safe", "caution" or "stop".

    safe: KL and perplexity, of every domain, are below SAFE with their whole intervals, and no more answers
    loop or are empty. stop: one of them is above STOP with its whole interval, or answers are significantly
    worse. caution: everything between, and everything that too few documents say (`too_few`).

    Args:
        measured: facts of a Divergence.
        compared: `eval.canary.compare`; None if no answers were made, which does not lower the grade.
    """
    unknown = (-math.inf, math.inf)
    ends = [part["ci"] or unknown for part in measured["ppl"]["per_domain"].values()]
    parts = [measured, *measured["per_domain"].values()]
    kls = [part["kl"]["ci"] or unknown for part in parts]
    if max(kl[0] for kl in kls) > STOP[0] or max(end[0] for end in ends) > STOP[1]:
        return "stop"
    if compared and compared["significantly_worse"]:
        return "stop"
    if too_few(measured) is not None or (compared and compared["worse"]):
        return "caution"
    if max(kl[1] for kl in kls) < SAFE[0] and max(end[1] for end in ends) < SAFE[1]:
        return "safe"
    return "caution"


def too_few(measured: Mapping[str, Any]) -> str | None:
    """Why this text is too little to call anything safe, and what to do; None if it is enough."""
    n = measured["documents"]
    few = {
        name: part["documents"]
        for name, part in measured["per_domain"].items()
        if part["documents"] < FEW_IN_DOMAIN
    }
    if n >= FEW_DOCUMENTS and not few:
        return None
    said = [f"only {n} document{'s' if n > 1 else ''} in all, fewer than {FEW_DOCUMENTS}"]
    said = said if n < FEW_DOCUMENTS else []
    if few:
        each = ", ".join(f"{count} in {name}" for name, count in few.items())
        said.append(f"only {each}, fewer than {FEW_IN_DOMAIN} in a domain")
    return (
        f"{', and '.join(said)}: too few to call anything safe, their intervals are too narrow. More text: "
        "a larger --tokens, a profile with a larger --held-out, or --corpus NAME=FILE (verify, compare)"
    )


def seems_safe(measured: Mapping[str, Any]) -> bool:
    """Whether the figures themselves are below SAFE, whatever their intervals say."""
    worst = max(part["ratio"] for part in measured["ppl"]["per_domain"].values())
    kl = max(part["kl"]["mean"] for part in (measured, *measured["per_domain"].values()))
    return bool(kl < SAFE[0] and worst < SAFE[1])


def verdict(evidence: Evidence | None, cut: str, smallest: str) -> dict[str, Any]:
    """One sentence a hurried person can act on, and the reasons: the report's `verdict`.

    Args:
        cut: what was cut, in words: "14 of 16 experts kept".
        smallest: the same of the smallest cut there is.
    """
    if evidence is None:
        sentence = f"{cut}: not measured, so nobody knows yet whether it is still good"
        return {"level": "info", "sentence": sentence, "points": []}
    measured, compared = evidence.rows[PLAN], evidence.canary
    level = grade(measured, compared)
    points = reasons(measured) + ([*compared["worse"], *unended(compared)] if compared else [])
    kl, other = measured["kl"]["mean"], evidence.rows[RANDOM]["kl"]["mean"]
    if kl < other:
        times = other / max(kl, 1e-12)
        points.append(f"dropped at random (one draw), as many experts do {times:.2g} times the harm")
    else:
        level = "caution" if level == "safe" else level
        points.append(
            f"dropped at random, as many experts do no more harm (KL {other:.2g}): one draw only, but the "
            "ranking may say nothing about this model; `moesmith compare` draws more"
        )
    if evidence.selected:
        points.append(evidence.selected)
    words = {"safe": "safe on this text", "caution": "use with caution", "stop": "not good enough to use"}
    sentence = (
        f"{cut}: {words[level]}. KL {kl:.2g}{interval(measured['kl']['ci'])}, perplexity "
        f"{change(measured['ppl']['overall']['ratio'])}"
    )
    if level != "safe" and SMALLEST in evidence.rows:
        least = evidence.rows[SMALLEST]
        harm = f"KL {least['kl']['mean']:.2g}, perplexity {change(least['ppl']['overall']['ratio'])}"
        if grade(least, None) == "safe":
            sentence += f". {smallest[:1].upper()}{smallest[1:]} would be safe by these figures ({harm})"
        elif seems_safe(least):
            sentence += (
                f". The held-out text is too little to call any cut safe, {smallest} included ({harm})"
            )
        else:
            sentence += f". No cut by this score is safe: even {smallest} costs {harm}"
    return {"level": level, "sentence": sentence, "points": [*points, *evidence.skipped]}


def reasons(measured: Mapping[str, Any]) -> list[str]:
    """What is above a limit, or not known well enough, in words."""
    found = []
    few = too_few(measured)
    if few is not None:
        found.append(few)
    ci = measured["kl"]["ci"]
    if ci is None:
        found.append("one held-out document says nothing about others")
    elif ci[1] >= SAFE[0]:
        found.append(f"KL{interval(ci)} {_beyond(ci)}")
    kls = {
        name: part["kl"]
        for name, part in measured["per_domain"].items()
        if part["kl"]["ci"] is not None and part["kl"]["ci"][1] >= SAFE[0]
    }
    if kls and len(measured["per_domain"]) > 1:
        worst = max(kls, key=lambda name: kls[name]["ci"][0])
        ends, n = kls[worst]["ci"], len(kls)
        more = f", the worst of {n} domains that may be above {SAFE[0]}" if n > 1 else ""
        found.append(f"KL on {worst} {kls[worst]['mean']:.2g}{interval(ends)} {_beyond(ends)}{more}")
    above = {
        name: part
        for name, part in measured["ppl"]["per_domain"].items()
        if part["ci"] is not None and part["ci"][1] >= SAFE[1]
    }
    if above:
        worst = max(above, key=lambda name: above[name]["ratio"])
        part = above[worst]
        low, high = (change(end) for end in part["ci"])
        more = (
            f", the worst of {len(above)} domains that may be above {change(SAFE[1])}"
            if len(above) > 1
            else ""
        )
        found.append(f"perplexity on {worst} {change(part['ratio'])} [{low}, {high}]{more}")
    return found


def unended(compared: Mapping[str, Any]) -> list[str]:
    """That the answers were too short to see whether they end; `compared` is `eval.canary.compare`'s."""
    ended, n = compared["eos_rate"]["a"]["hits"], compared["n"]
    if 4 * ended >= n:
        return []
    return [
        f"the original ended {ended} of {n} answers within {compared['max_new_tokens']} tokens, too few to "
        "see whether answers still end: a larger --new-tokens"
    ]


def _beyond(ci: Sequence[float]) -> str:
    bits, limit = ("3-bit", STOP[0]) if ci[0] > STOP[0] else ("4-bit", SAFE[0])
    return f"reaches above what {bits} quantisation costs ({limit})"


def interval(ci: Sequence[float] | None) -> str:
    """' [0.01, 0.02]', nothing without an interval."""
    return "" if ci is None else f" [{ci[0]:.2g}, {ci[1]:.2g}]"


def change(ratio: float) -> str:
    """1.009 -> '+0.9 %'."""
    return f"{100 * (ratio - 1):+.1f} %" if ratio < 10 else f"x{ratio:.3g}"
