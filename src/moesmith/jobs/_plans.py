"""Candidate plans and the evidence for each: what `compare` shows and `prune --score auto` chooses by.

A candidate is a set of kept experts (a criterion's, or a random control's) or a way to merge. Masks run side
by side: a batch of held-out text goes through the original once and through every mask; no weight is written.
Merging needs other weights, so merged stacks are made, put in place for a few passes, and taken out again.
What was measured is kept batch by batch under a name made of the plan's content: a killed run goes on, and a
later one with more criteria runs the new ones only.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moesmith.errors import UserError

if TYPE_CHECKING:
    from moesmith.eval.divergence import Divergence, Encoded
    from moesmith.prune.stats import Profile

FILE = "compare.json"
HELD_OUT = "held out by the profile"
FORMAT = 2
SCORES = ("reap", "man", "contribution", "frequency")
# Merged stacks in memory at a time; one plan at least.
MERGE_BYTES = 2_000_000_000

Evidence = dict[str, Any]


@dataclass(frozen=True)
class Candidate:
    """One way to have fewer experts."""

    series: str
    """a criterion, "random" or a merging method"""
    kind: str
    """prune, random or merge"""
    count: int
    """experts left in every layer"""
    keep: dict[str, list[int]] | None = None
    """MoELayer.name -> kept ids; None for merging"""
    domains: Any = "mean"
    router: str = "centroid"
    """merging only, see `prune.merge.merged`"""
    seed: int | None = None
    """of a random control"""
    plan: Any = field(default=None, compare=False, repr=False)

    @property
    def name(self) -> str:
        draw = "" if self.seed is None else f"#{self.seed // 1000 + 1}"
        merge = "merge " if self.kind == "merge" else ""
        return f"{merge}{self.series}{draw}@{self.count}"

    def key(self, profile_key: str) -> str:
        """Equal for plans that are the same thing, whatever criterion chose them."""
        how: Any = self.keep
        if self.kind == "merge":
            how = [self.series, self.count, self.domains, self.router, profile_key]
        return hashlib.sha256(json.dumps(how, sort_keys=True).encode()).hexdigest()[:20]


def candidate_plans(
    profile: Profile,
    keeps: Sequence[int],
    scores: Sequence[str] = SCORES,
    domains: Any = "mean",
    randoms: int = 5,
    merges: Sequence[str] = (),
    router: str = "centroid",
) -> list[Candidate]:
    """Every criterion, random control and merging method at every count.

    Criteria and random controls follow the same rules (groups, super experts), those of `prune`.

    Raises:
        UserError: an unknown name, or a count that this model cannot have.
    """
    from moesmith.prune.merge import METHODS
    from moesmith.prune.plan import make_plan

    unknown = [name for name in merges if name not in METHODS]
    if unknown:
        raise UserError(f"unknown merging method {unknown[0]!r}", f"use any of {', '.join(METHODS)}")
    found = []
    for count in sorted(set(keeps), reverse=True):
        for score in dict.fromkeys(scores):
            plan = make_plan(profile, keep=count, score=score, domains=domains)
            found.append(Candidate(score, "prune", count, plan.keep, domains, plan=plan))
        for index in range(randoms):
            # Plans draw with seed + layer, so neighbouring seeds would share draws.
            seed = 1000 * index
            plan = make_plan(profile, keep=count, score="random", domains=domains, seed=seed)
            found.append(Candidate("random", "random", count, plan.keep, domains, seed=seed, plan=plan))
        for method in dict.fromkeys(merges):
            found.append(Candidate(method, "merge", count, None, domains, router))
    return found


def counts_of(
    profile: Profile, keeps: Sequence[int], cuts: Sequence[float], least: int = 0
) -> tuple[list[int], list[str]]:
    """Kept counts asked for, largest first, and a line for each wish that this model cannot have.

    A cut that groups do not allow becomes the next smaller cut; `keep` has to be exact. `least` is what the
    routers can run with, if that is more than top-k (`surgery.minimum_kept`).
    """
    sizes = {layer.num_experts for layer in profile.layers}
    if len(sizes) > 1:
        raise UserError(
            f"layers have {' and '.join(map(str, sorted(sizes)))} experts: one count does not fit all of them"
        )
    experts, top_k = sizes.pop(), max(layer.top_k for layer in profile.layers)
    groups = max(layer.n_group for layer in profile.layers)
    found, notes = set(), []
    wishes = [(count, f"keep {count}") for count in keeps]
    for cut in cuts:
        exact = experts - int(experts * cut + 1e-9)
        wishes.append((-(-exact // groups) * groups, f"cut {_share(cut)}"))
    for count, words in wishes:
        if count >= experts:
            notes.append(f"{words}: {count} of {experts} experts drops none")
        elif count < max(top_k, least):
            why = f"a token uses {top_k}" if top_k >= least else f"the router needs {least}"
            notes.append(f"{words}: {count} experts, but {why}")
        elif count % groups:
            notes.append(f"{words}: the router compares {groups} groups, which must keep equally many")
        else:
            found.add(count)
    return sorted(found, reverse=True), notes


def _share(cut: float) -> str:
    whole = round(1 / cut)
    return f"1/{whole}" if whole <= 64 and abs(1 / whole - cut) < 1e-9 else f"{100 * cut:.3g} %"


# ---------------------------------------------------------------- measuring


def compare_plans(
    model: Any,
    documents: Sequence[Encoded],
    candidates: Sequence[Candidate],
    profile: Profile | None = None,
    folder: Path | None = None,
    identity: str = "",
    batch_tokens: int | None = None,
    on_batch: Callable[[int, int, str], None] | None = None,
) -> list[Evidence]:
    """Run every candidate over the documents against the model itself.

    Args:
        profile: needed for merging.
        folder: where measurements are kept batch by batch; None keeps them in memory only.
        identity: of the model, so that measurements of another one are not taken up.
        on_batch: (done, total, words): tokens through one plan or the original.

    Returns:
        One plain dict per candidate in their order, see `evidence`.
    """
    measured = measure(model, documents, candidates, profile, folder, identity, batch_tokens, on_batch)
    first: dict[int, Evidence] = {}
    found = []
    for candidate, divergence in zip(candidates, measured, strict=True):
        known = first.get(id(divergence))
        facts = evidence(candidate, divergence) if known is None else _named(candidate, known)
        first.setdefault(id(divergence), facts)
        found.append(facts)
    return found


def measure(
    model: Any,
    documents: Sequence[Encoded],
    candidates: Sequence[Candidate],
    profile: Profile | None = None,
    folder: Path | None = None,
    identity: str = "",
    batch_tokens: int | None = None,
    on_batch: Callable[[int, int, str], None] | None = None,
) -> list[Divergence]:
    """The Divergence of each candidate; equal plans share one object."""
    from moesmith.eval.divergence import BATCH_TOKENS, Divergence, batches, check_documents, divergences

    check_documents(documents)
    batch_tokens = batch_tokens or BATCH_TOKENS
    profile_key = profile_hash(profile) if profile else ""
    by_key: dict[str, Candidate] = {}
    for candidate in candidates:
        by_key.setdefault(candidate.key(profile_key), candidate)
    groups = list(batches(documents, batch_tokens))
    kept = _Kept(folder, _stamp(identity, documents, batch_tokens), len(groups))
    sizes = [sum(len(documents[i].ids) - 1 for i in group) for group in groups]
    missing = {key: [b for b in range(len(groups)) if not kept.has(key, b)] for key in by_key}
    masks = [key for key, candidate in by_key.items() if candidate.kind != "merge" and missing[key]]
    merges = [key for key, candidate in by_key.items() if candidate.kind == "merge" and missing[key]]
    rounds = ([masks] if masks else []) + _merge_rounds(model, [(k, by_key[k]) for k in merges], profile)
    total = sum(
        size * (1 + sum(b in missing[key] for key in keys))
        for keys in rounds
        for b, size in enumerate(sizes)
        if any(b in missing[key] for key in keys)
    )
    done = 0
    for keys in rounds:
        contexts = _contexts(model, [(key, by_key[key]) for key in keys], profile)
        for b, group in enumerate(groups):
            wanted = [key for key in keys if b in missing[key]]
            if not wanted:
                continue
            part = [documents[i] for i in group]
            got = divergences(
                model, part, {key: contexts[key] for key in wanted}, None, batch_tokens, "the original"
            )
            kept.add(b, got)
            done += sizes[b] * (1 + len(wanted))
            if on_batch:
                many = f"{len(wanted)} plans" if len(wanted) > 1 else by_key[wanted[0]].name
                on_batch(done, total, f"batch {b + 1} of {len(groups)} · {many}")
        del contexts
    whole = {
        key: _in_order(Divergence.merged([kept.get(key, b) for b in range(len(groups))]), groups)
        for key in by_key
    }
    return [whole[candidate.key(profile_key)] for candidate in candidates]


def _in_order(found: Divergence, groups: Sequence[Sequence[int]]) -> Divergence:
    """The documents in the order they were given, not the order of the batches."""
    from moesmith.eval.divergence import Divergence

    order = np.argsort([i for group in groups for i in group])
    return Divergence(
        [found.domains[i] for i in order],
        [found.kl[i] for i in order],
        found.agree[order],
        found.nll_a[order],
        found.nll_b[order],
        [found.ids[i] for i in order],
    )


def context_of(
    model: Any, candidate: Candidate, profile: Profile | None
) -> Callable[[], AbstractContextManager[Any]]:
    """What makes the model this candidate; merging is done here, entering is cheap."""
    return _contexts(model, [("", candidate)], profile)[""]


def _contexts(
    model: Any, candidates: Sequence[tuple[str, Candidate]], profile: Profile | None
) -> dict[str, Callable[[], AbstractContextManager[Any]]]:
    return {key: _context(model, candidate, profile) for key, candidate in candidates}


def _context(
    model: Any, candidate: Candidate, profile: Profile | None
) -> Callable[[], AbstractContextManager[Any]]:
    if candidate.kind != "merge":
        from moesmith.models.surgery import masked

        keep = candidate.keep or {}
        return lambda: masked(model, keep)
    from moesmith.prune.merge import make_groups, merge_model, merged

    if profile is None:
        raise UserError("merging needs the profile's statistics")
    groups = make_groups(model, profile, candidate.series, candidate.count, candidate.domains)
    stacks = merge_model(model, groups)
    return lambda: merged(model, groups, stacks, candidate.router)  # type: ignore[arg-type]


def _merge_rounds(
    model: Any, merges: Sequence[tuple[str, Candidate]], profile: Profile | None
) -> list[list[str]]:
    """Merging plans, as many at a time as fit into MERGE_BYTES: each set of them costs a pass of the
    original."""
    per_expert = merged_bytes(model, 1) if merges else 0
    rounds: list[list[str]] = []
    room = 0
    for key, candidate in merges:
        need = per_expert * candidate.count
        if need > room:
            rounds.append([])
            room = MERGE_BYTES
        rounds[-1].append(key)
        room -= need
    return rounds


def merged_bytes(model: Any, count: int) -> int:
    """What the merged stacks of all layers take with `count` experts each."""
    from moesmith.models.layers import submodule, text_layers
    from moesmith.prune.merge import stack_bytes

    width = model.dtype.itemsize
    return count * sum(stack_bytes(submodule(model, la.experts), width) for la in text_layers(model))


# ---------------------------------------------------------------- what is kept between runs


class _Kept:
    """Measurements by (plan, batch): in memory, and in `folder` if there is one."""

    def __init__(self, folder: Path | None, stamp: str, batches: int):
        self.folder = None if folder is None else folder / stamp
        self.parts: dict[tuple[str, int], Divergence] = {}
        if self.folder is not None and self.folder.is_dir():
            for file in sorted(self.folder.glob("*.npz")):
                self._read(file, batches)

    def has(self, key: str, batch: int) -> bool:
        return (key, batch) in self.parts

    def get(self, key: str, batch: int) -> Divergence:
        return self.parts[key, batch]

    def add(self, batch: int, found: Mapping[str, Divergence]) -> None:
        for key, divergence in found.items():
            self.parts[key, batch] = divergence
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        name = hashlib.sha256("".join(sorted(found)).encode()).hexdigest()[:12]
        arrays = {
            f"{key}.{field_name}": np.asarray(value)
            for key, divergence in found.items()
            for field_name, value in divergence.state_dict().items()
        }
        temporary = self.folder / f".{batch:05d}-{name}.tmp"
        with open(temporary, "wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
        temporary.replace(self.folder / f"{batch:05d}-{name}.npz")

    def _read(self, file: Path, batches: int) -> None:
        from moesmith.eval.divergence import Divergence

        batch = int(file.name.partition("-")[0])
        if batch >= batches:
            return
        states: dict[str, dict[str, Any]] = {}
        try:
            with np.load(file) as arrays:
                for name in arrays.files:
                    key, _, field_name = name.rpartition(".")
                    states.setdefault(key, {})[field_name] = arrays[name]
        except (
            OSError,
            ValueError,
            EOFError,
            KeyError,
            zipfile.BadZipFile,
        ):  # cut short: disk full, power lost
            return
        for key, state in states.items():
            state["domains"], state["ids"] = state["domains"].tolist(), state["ids"].tolist()
            self.parts[key, batch] = Divergence.from_state_dict(state)


def _stamp(identity: str, documents: Sequence[Encoded], batch_tokens: int) -> str:
    """Names one model on one text in one cut into batches."""
    text = json.dumps([identity, batch_tokens, [[d.id, d.domain, d.ids] for d in documents]])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def profile_hash(profile: Profile) -> str:
    """Identity of a profile's numbers, from what every criterion starts with."""
    digest = hashlib.sha256(json.dumps([profile.domains, profile.meta.get("model_hash")]).encode())
    for layer in profile.layers:
        for tensor in (*layer.sums.values(), layer.mean_output):
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:20]


# ---------------------------------------------------------------- evidence


def evidence(candidate: Candidate, divergence: Divergence) -> Evidence:
    """One candidate's figures, plain data. KL in nats per token against the original; perplexities as ratios.

    `documents` holds nats and tokens of every document (the pieces of one row are one), so that two
    candidates can be compared in pairs.
    """
    facts = divergence.facts()
    overall = facts["ppl"]["overall"]
    return {
        "name": candidate.name,
        "series": candidate.series,
        "kind": candidate.kind,
        "keep": candidate.count,
        "seed": candidate.seed,
        "kl": facts["kl"]["mean"],
        "kl_ci": facts["kl"]["ci"],
        "kl_median": facts["kl"]["median"],
        "kl_p99": facts["kl"]["p99"],
        "top1": facts["top1"]["rate"],
        "top1_ci": facts["top1"]["ci"],
        "ppl_original": overall["a"],
        "ppl_ratio": overall["ratio"],
        "ppl_ratio_ci": overall["ci"],
        "ppl": {domain: ppl["ratio"] for domain, ppl in facts["ppl"]["per_domain"].items()},
        "ppl_ci": {domain: ppl["ci"] for domain, ppl in facts["ppl"]["per_domain"].items()},
        "per_domain": {
            domain: {
                "kl": part["kl"]["mean"],
                "kl_ci": part["kl"]["ci"],
                "ppl_original": part["ppl"]["a"],
                "documents": part["documents"],
            }
            for domain, part in facts["per_domain"].items()
        },
        "keeps": candidate.keep,
        "domains": candidate.domains,
        "router": candidate.router if candidate.kind == "merge" else None,
        "same_as": None,
        "documents": {
            "nats": [round(float(x), 6) for x in divergence.per_row(divergence.kl_sums)],
            "tokens": [int(n) for n in divergence.per_row(divergence.tokens)],
        },
    }


def _named(candidate: Candidate, known: Evidence) -> Evidence:
    """The evidence of an equal plan under another name."""
    own = {"name": candidate.name, "series": candidate.series, "kind": candidate.kind}
    return {**known, **own, "seed": candidate.seed, "same_as": known["name"]}


def best(evidence: Sequence[Evidence], keep: int, kinds: Sequence[str] = ("prune",)) -> Evidence:
    """The candidate with the lowest mean KL at this count; random controls and merging only if asked for.

    Raises:
        UserError: nothing was measured at this count.
    """
    there = [one for one in evidence if one["keep"] == keep and one["kind"] in kinds]
    if not there:
        counts = sorted({one["keep"] for one in evidence}, reverse=True)
        raise UserError(
            f"no plan that keeps {keep} experts was compared",
            f"compared were {', '.join(map(str, counts))}: moesmith compare MODEL --keep {keep}",
        )
    return min(there, key=lambda one: one["kl"])


def difference(a: Evidence, others: Sequence[Evidence]) -> dict[str, Any]:
    """How many nats per token more the others have than `a`: their mean, with a paired 95 % interval."""
    from moesmith.eval.bootstrap import ratio_interval

    tokens = np.asarray(a["documents"]["tokens"])
    more = np.mean([one["documents"]["nats"] for one in others], axis=0) - np.asarray(a["documents"]["nats"])
    return {
        "kl_more": float(more.sum() / tokens.sum()),
        "ci": ratio_interval(more, tokens),
        "names": [one["name"] for one in others],
    }


def win_shares(evidence: Sequence[Evidence]) -> dict[str, float]:
    """Series -> share of resamples (whole documents, paired) in which its mean KL is the lowest; equal plans
    share the credit they have together."""
    from moesmith.eval.bootstrap import draws

    nats = np.array([one["documents"]["nats"] for one in evidence])
    if nats.shape[1] < 2:
        return {}
    firsts = np.zeros(len(evidence))
    rounds = 0
    for counts in draws(nats.shape[1]):
        sums = counts @ nats.T
        first = sums <= sums.min(axis=1, keepdims=True)
        firsts += first.sum(axis=0)
        rounds += len(counts)
    return {one["series"]: float(share) for one, share in zip(evidence, firsts / rounds, strict=True)}


def level(one: Evidence, canary: Mapping[str, Any] | None = None) -> str:
    """safe, caution or stop, by the rule that `prune` and `verify` have."""
    from moesmith.jobs._cut import grade

    return grade(judged(one), canary)


def judged(one: Evidence) -> dict[str, Any]:
    """The figures of one candidate in the shape that `_cut.grade`, `reasons` and `too_few` read."""
    return {
        "kl": {"mean": one["kl"], "ci": one["kl_ci"]},
        "ppl": {
            "per_domain": {name: {"ratio": one["ppl"][name], "ci": ci} for name, ci in one["ppl_ci"].items()}
        },
        "documents": len(one["documents"]["nats"]),
        "per_domain": {
            name: {"kl": {"mean": part["kl"], "ci": part["kl_ci"]}, "documents": part["documents"]}
            for name, part in one["per_domain"].items()
        },
    }


def read_evidence(folder: Path, profile: Profile, model_hash: str | None = None) -> list[Evidence] | None:
    """What `compare` left in the profile's folder, if it was measured with this very profile.

    Args:
        model_hash: of the model it has to have been measured on (`models.identity`); None takes any that the
            profile fits, a packed copy too.
    """
    record = read_record(folder, profile)
    if record is None or (model_hash is not None and record.get("model_hash") != model_hash):
        return None
    return list(record["evidence"])


def selected(folder: Path, profile: Profile, score: str, count: int | None) -> str | None:
    """How this plan was chosen on the profile's own held-out text by what `compare` left there, in words.

    That text also judges the plan afterwards. None if no comparison on it says anything of score or count.
    """
    record = read_record(folder, profile)
    if record is None or record.get("corpus") != HELD_OUT:
        return None
    there = [one for one in record["evidence"] if one["kind"] == "prune"]
    counts = {one["keep"] for one in there}
    lowest = {n: best(there, n)["kl"] for n in counts}
    won = any(one["series"] == score and one["kl"] == lowest[one["keep"]] for one in there)
    what = [name for name, found in (("score", won), ("count", count in counts)) if found]
    return f"`moesmith compare` chose or measured this {' and '.join(what)}" if what else None


def write_evidence(folder: Path, record: Mapping[str, Any]) -> Path:
    """Leave a comparison in the profile's folder; what an earlier one measured on the same text stays."""
    from moesmith.config import write_atomically

    def key(one: Evidence) -> tuple[Any, ...]:
        return one["name"], json.dumps(one["domains"], sort_keys=True), one["router"]

    earlier, found = _read(folder), list(record["evidence"])
    if earlier is not None and all(
        earlier.get(k) == record[k] for k in ("profile_hash", "text_hash", "identity")
    ):
        known = {key(one) for one in found}
        found += [one for one in earlier["evidence"] if key(one) not in known]
    write_atomically(folder / FILE, json.dumps({**record, "evidence": found}, indent=1) + "\n")
    return folder / FILE


def read_record(folder: Path, profile: Profile) -> dict[str, Any] | None:
    """The compare.json beside a profile; None if there is none of this very profile."""
    record = _read(folder)
    return record if record is not None and record.get("profile_hash") == profile_hash(profile) else None


def _read(folder: Path) -> dict[str, Any] | None:
    try:
        record = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError):
        return None
    return record if isinstance(record, dict) and record.get("format") == FORMAT else None
