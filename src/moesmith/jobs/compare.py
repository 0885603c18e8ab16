"""Try many ways to have fewer experts on text the profile has not seen, without writing a model.

Every criterion at every count, random controls, and merging; each is judged by how far its next-token
distribution is from the original's (KL), top-1 agreement, and perplexity per domain, all with 95 % intervals
over documents. The best of each count also answers a few prompts beside the original. What is measured is
kept as it comes: a killed run goes on, and a later one with more criteria measures only those.
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pydantic

from moesmith import console
from moesmith.config import JobConfig, no_such_file, save, write_atomically
from moesmith.errors import UserError

if TYPE_CHECKING:
    from moesmith.jobs._plans import Candidate, Evidence
    from moesmith.prune.stats import Profile

POSITIONAL = ("model",)
JSON = True
EXAMPLE = "moesmith compare allenai/OLMoE-1B-7B-0924 --profile prof --cut 1/16,1/8,1/4 --out compared"
OUT_OF_MEMORY = "fewer tokens at a time: --batch-tokens 512; or leave merging out: --merge none"

CUTS = ["1/16", "1/8", "1/4", "1/2"]
MEASURED = "measured"


class Config(JobConfig):
    model: str
    """Model folder or hub name, 16 bits or packed: the one that was profiled, or a packed copy of it."""
    profile: Path = Path("prof")
    """Folder that `moesmith profile` wrote."""
    out: Path = Path("compared")
    """Folder for compare.json, the report and what is measured; an unfinished one is gone on with."""
    keep: list[int] = []
    """Experts to keep in every layer, several counts: 64,96,109."""
    cut: list[str] = []
    """Shares to drop, as 1/8, 12.5% or 0.125; without --keep the default is 1/16,1/8,1/4,1/2."""
    scores: list[str] = ["reap", "man", "contribution", "frequency"]
    """Criteria to choose experts by; `all` is every one there is."""
    random: int = pydantic.Field(5, ge=0)
    """Random choices per count, the control that a criterion has to beat."""
    merge: list[Literal["average", "frequency", "hc", "ream", "none"]] = [
        "average",
        "frequency",
        "hc",
        "ream",
    ]
    """Merging methods to compare with, or none."""
    merge_router: Literal["centroid", "sum"] = "centroid"
    """A merged expert gets the gate of one member (as a smaller checkpoint would) or of all of them."""
    domains: str = "mean"
    """How the domains' scores become one: mean, max, or weights as code=2,math=1."""
    corpus: list[str] = []
    """Other text to judge on than what the profile held out: code=a.jsonl; refused if it was profiled."""
    tokens: int | None = pydantic.Field(None, ge=16)
    """At most so many tokens of each domain; none takes all that is held out."""
    max_length: int = pydantic.Field(512, ge=16)
    """Documents are cut off at so many tokens."""
    canary: int = pydantic.Field(8, ge=0)
    """Prompts that the best plan of each count answers beside the original; 0 for none."""
    canary_tokens: int = pydantic.Field(96, ge=8)
    """Longest answer, in tokens."""
    similarity: bool = True
    """Compare the experts' weights, before and after matching their neurons."""
    batch_tokens: int = pydantic.Field(2048, ge=16)
    """Tokens in one forward pass, padding included."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Dtype of everything that is not packed; auto takes the checkpoint's."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto uses the GPU if there is one."""


def check(cfg: Config) -> None:
    """Refuse what needs no model to be refused: a share that is none, no folder, a place that is taken."""
    from moesmith.models.checkpoint import local_folder

    for text in cfg.cut:
        parse_cut(text)
    if not cfg.profile.is_dir():
        raise no_such_file(cfg.profile, "profile")
    folder = local_folder(cfg.model)
    for name, other in (("the model", folder), ("the profile", cfg.profile)):
        if other is not None and cfg.out.resolve() == other.resolve():
            raise UserError(f"--out {cfg.out} is {name} itself")
    ours = any((cfg.out / name).exists() for name in (MEASURED, "compare.json"))
    if cfg.out.exists() and not ours and (not cfg.out.is_dir() or any(cfg.out.iterdir())):
        raise UserError(f"{cfg.out} exists and holds no comparison", "choose another --out")


def run(cfg: Config) -> None:
    from moesmith.data.corpora import corpus_hash
    from moesmith.jobs._cut import enough_tokens, no_room
    from moesmith.jobs._memory import PeakMemory
    from moesmith.jobs._pair import canary_prompts, load, open_side
    from moesmith.jobs._plans import FILE, FORMAT, HELD_OUT, compare_plans, profile_hash
    from moesmith.prune.criteria import parse_domains
    from moesmith.prune.stats import ROUTERS_ONLY, Profile, same_model

    started = time.perf_counter()
    side = open_side("A", cfg.model, anatomy=False)
    profile = Profile.read(cfg.profile)
    if not same_model(profile, side.folder):
        console.warn(ROUTERS_ONLY.format(model=cfg.model))
    enough_tokens(profile)
    tokenizer, documents, encoded = read_text(cfg, side)
    domains = parse_domains(cfg.domains)
    if not console.stderr().is_terminal:
        from transformers.utils import logging

        logging.disable_progress_bar()
    cfg.out.mkdir(parents=True, exist_ok=True)
    save(cfg, cfg.out / "config.yaml")

    with PeakMemory() as peak:
        reason = no_room(side.nbytes, cfg.device)
        if reason is not None:
            raise UserError(reason, "compare a packed copy: moesmith quantize")
        model = load(side, cfg.dtype, cfg.device)
        candidates, notes = plans(cfg, model, profile, domains)
        say_plan(cfg, profile, encoded, candidates, notes)
        known_as = side_hash(side)
        identity = f"{known_as} {side.storage} {model.dtype}"
        kept = cfg.out / MEASURED
        with console.bar("comparing", total=1.0) as bar:
            evidence = compare_plans(
                model, encoded, candidates, profile, kept, identity, cfg.batch_tokens,
                on_batch=lambda done, total, words: bar.update(done / total, words),
            )  # fmt: skip
        by_name = {candidate.name: candidate for candidate in candidates}
        answers = None
        if cfg.canary:
            prompts = canary_prompts(tokenizer, documents, cfg.canary)
            answers = ask(cfg, model, tokenizer, prompts, finalists(evidence, by_name), profile)
        alike = None
        if cfg.similarity:
            from moesmith.prune.similarity import similarity

            with console.bar("similarity of weights", total=len(profile.layers)) as bar:
                alike = similarity(model, profile, on_layer=bar.advance)

    verdicts = judge(evidence, answers)
    show(evidence, verdicts, profile, answers)
    record = {
        "format": FORMAT,
        "command": "compare",
        "model": str(side.folder),
        "model_hash": known_as,
        "profile": str(cfg.profile),
        "profile_hash": profile_hash(profile),
        "identity": identity,
        "corpus": cfg.corpus or HELD_OUT,
        "text_hash": corpus_hash(encoded),
        "config": cfg.model_dump(mode="json"),
        "versions": {name: metadata.version(name) for name in ("moesmith", "torch", "transformers", "scipy")},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "experts": profile.layers[0].num_experts,
        "top_k": max(layer.top_k for layer in profile.layers),
        "documents": len(evidence[0]["documents"]["tokens"]),
        "tokens": sum(evidence[0]["documents"]["tokens"]),
        "notes": notes,
        "verdicts": verdicts,
        "canary": None if answers is None else answers["compared"],
        "seconds": round(time.perf_counter() - started, 1),
        "peak_bytes": peak.nbytes,
        "evidence": evidence,
    }
    write_atomically(cfg.out / FILE, json.dumps(record, indent=1) + "\n")
    beside = "" if cfg.corpus else write_beside_profile(cfg, record)
    page = report(cfg, record, profile, candidates, answers, alike)
    console.row("written", f"{cfg.out / FILE}{beside}" + (f" · {page}" if page else ""))
    console.next_command(next_prune(cfg, verdicts))
    without = ("documents", "keeps")
    slim = [{key: value for key, value in one.items() if key not in without} for one in evidence]
    console.emit({**record, "evidence": slim, "out": str(cfg.out)})


def side_hash(side: Any) -> str:
    """What tells this model, with its adapter, from any other: measurements are taken up under it."""
    import hashlib

    from moesmith.models.identity import model_hash

    found = model_hash(side.folder)
    if side.adapter is None:
        return found
    digest = hashlib.sha256(found.encode())
    for path in sorted(Path(side.adapter).glob("adapter_*")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:32]


# ---------------------------------------------------------------- what is asked


def parse_cut(text: str) -> float:
    """1/8, 12.5% or 0.125 -> 0.125. Raises UserError for what is no share between 0 and 1."""
    try:
        above, slash, below = text.partition("/")
        value = float(above.rstrip("% ")) / (float(below) if slash else 1.0)
        value = value / 100 if text.strip().endswith("%") else value
    except (ValueError, ZeroDivisionError):
        value = 0.0
    if not 0 < value < 1:
        raise UserError(f"cut: {text!r} is no share of the experts", "write 1/8, 12.5% or 0.125")
    return value


def read_text(cfg: Config, side: Any) -> tuple[Any, list[Any], list[Any]]:
    """Tokenizer, documents to judge on, and their ids.

    Raises:
        UserError: no tokenizer, no text, or text that the profile was made of.
    """
    from transformers import AutoTokenizer

    from moesmith.data import leaks
    from moesmith.data.corpora import encode, parse_corpora, read_documents, read_held_out
    from moesmith.jobs._pair import check_ids, first_tokens
    from moesmith.models.checkpoint import has_tokenizer

    if not has_tokenizer(side.folder):
        raise UserError(
            f"{side.folder} has no tokenizer",
            "copy tokenizer.json and tokenizer_config.json of the model there",
        )
    tokenizer = AutoTokenizer.from_pretrained(side.folder)
    if cfg.corpus:
        documents, _, _ = read_documents(parse_corpora(cfg.corpus), tokenizer, cfg.max_length, cfg.tokens)
    else:
        documents = read_held_out(cfg.profile)
        check_ids(tokenizer, documents, cfg.profile)
    leaks.check_disjoint(leaks.read(cfg.profile), documents)
    if cfg.tokens is not None:
        documents = first_tokens(documents, cfg.tokens)
    encoded = [one for one in encode(tokenizer, documents, cfg.max_length) if len(one.ids) > 1]
    return tokenizer, documents, encoded


def plans(cfg: Config, model: Any, profile: Profile, domains: Any) -> tuple[list[Candidate], list[str]]:
    """Everything to try, and a line for each thing asked for that cannot be."""
    from moesmith.jobs._pair import free_memory
    from moesmith.jobs._plans import candidate_plans, counts_of, merged_bytes
    from moesmith.models.layers import text_layers
    from moesmith.models.surgery import minimum_kept
    from moesmith.prune.criteria import CRITERIA

    scores = [name for name in CRITERIA if name != "random"] if cfg.scores == ["all"] else cfg.scores
    if not scores:
        raise UserError("no score to compare", "name some: --scores reap,contribution, or all")
    unknown = [name for name in scores if name not in CRITERIA or name == "random"]
    if unknown:
        words = ", ".join(name for name in CRITERIA if name != "random")
        raise UserError(f"unknown score {unknown[0]!r}", f"choose from {words}")
    cuts = [parse_cut(text) for text in (cfg.cut or ([] if cfg.keep else CUTS))]
    least = max(minimum_kept(layer) for layer in text_layers(model))
    counts, notes = counts_of(profile, cfg.keep, cuts, least)
    if not counts:
        raise UserError("nothing to compare: " + "; ".join(notes))
    merges = [name for name in cfg.merge if name != "none"]
    if merges:
        need, free = merged_bytes(model, max(counts)), free_memory(cfg.device)
        if need > 0.8 * free:
            notes.append(
                f"merging left out: merged experts take {console.size(need)}, {console.size(free)} are free"
            )
            merges = []
    if cfg.scores == ["all"]:
        scores = [name for name in scores if _known(profile, name, notes)]
    found = candidate_plans(profile, counts, scores, domains, cfg.random, merges, cfg.merge_router)
    return found, notes


def _known(profile: Profile, score: str, notes: list[str]) -> bool:
    """Whether this profile can give the score; a note if not."""
    from moesmith.prune.criteria import scores

    try:
        scores(profile, score)
    except UserError as error:
        notes.append(f"{score} left out: {error.message}")
        return False
    return True


def say_plan(
    cfg: Config,
    profile: Profile,
    encoded: Sequence[Any],
    candidates: Sequence[Candidate],
    notes: Sequence[str],
) -> None:
    from moesmith.data.pieces import row_numbers

    layer = profile.layers[0]
    console.row(
        "model",
        f"{cfg.model} · {len(profile.layers)} layers x {layer.num_experts} experts, top-{layer.top_k}",
    )
    by_domain: dict[str, int] = {}
    for one in encoded:
        by_domain[one.domain] = by_domain.get(one.domain, 0) + len(one.ids) - 1
    tokens = ", ".join(f"{name} {console.count(count)}" for name, count in by_domain.items())
    n = len(set(row_numbers(one.id for one in encoded)))
    console.row("text", f"{n} documents that the profile has not seen · tokens: {tokens}")
    counts = sorted({candidate.count for candidate in candidates}, reverse=True)
    console.row("plans", f"{len(candidates)}, keeping {', '.join(map(str, counts))} experts")
    for note in notes:
        console.row("", note)


# ---------------------------------------------------------------- canary


def finalists(evidence: Sequence[Evidence], by_name: dict[str, Candidate]) -> list[Candidate]:
    """The best criterion of each count, and the best merge where it beats that."""
    from moesmith.jobs._plans import best

    found = []
    for count in _counts(evidence):
        winner = best(evidence, count)
        found.append(by_name[winner["name"]])
        any_kind = best(evidence, count, ("prune", "merge"))
        if any_kind["kind"] == "merge":
            found.append(by_name[any_kind["name"]])
    return found


def ask(
    cfg: Config,
    model: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    chosen: Sequence[Candidate],
    profile: Profile,
) -> dict[str, Any]:
    """The original's and the finalists' greedy answers: {"prompts", "compared": {plan: facts}}."""
    from moesmith.eval.canary import canary, compare
    from moesmith.jobs._plans import context_of

    with console.bar("answering", total=len(prompts) * (1 + len(chosen))) as bar:
        original = canary(model, tokenizer, prompts, cfg.canary_tokens)
        bar.advance(len(prompts))
        compared = {}
        for candidate in chosen:
            context = context_of(model, candidate, profile)
            with context():
                answers = canary(model, tokenizer, prompts, cfg.canary_tokens)
            del context  # a merge holds its stacks: not those of two at once
            compared[candidate.name] = compare(original, answers)
            bar.advance(len(prompts), candidate.name)
    return {"prompts": len(prompts), "compared": compared}


# ---------------------------------------------------------------- what it means


def judge(evidence: Sequence[Evidence], answers: dict[str, Any] | None) -> list[dict[str, Any]]:
    """One verdict per count, most experts first: who wins, by how much over whom, and whether it is safe."""
    from moesmith.jobs._cut import reasons, seems_safe
    from moesmith.jobs._plans import best, difference, judged, level, win_shares

    verdicts = []
    for count in _counts(evidence):
        there = [one for one in evidence if one["keep"] == count]
        winner = best(evidence, count)
        others: dict[str, Any] = {}
        randoms = [one for one in there if one["kind"] == "random"]
        if randoms:
            others["random"] = difference(winner, randoms)
        merges = [one for one in there if one["kind"] == "merge"]
        if merges:
            others["merge"] = difference(winner, [min(merges, key=lambda one: one["kl"])])
        usage = [one for one in there if one["series"] == "frequency" and one["kind"] == "prune"]
        if usage and usage[0]["keeps"] != winner["keeps"]:
            others["frequency"] = difference(winner, usage)
        told = (answers or {"compared": {}})["compared"].get(winner["name"])
        verdicts.append(
            {
                "keep": count,
                "best": winner["series"],
                "name": winner["name"],
                "kl": winner["kl"],
                "kl_ci": winner["kl_ci"],
                "ppl_ratio": winner["ppl_ratio"],
                "ppl_ratio_ci": winner["ppl_ratio_ci"],
                "equal": [
                    one["series"]
                    for one in there
                    if one["kind"] == "prune" and one is not winner and one["keeps"] == winner["keeps"]
                ],
                "win_shares": win_shares([one for one in there if one["kind"] == "prune"]),
                "against": others,
                "canary_worse": told["worse"] if told else None,
                "level": level(winner, told),
                "seems_safe": seems_safe(judged(winner)) and not (told and told["worse"]),
                "reasons": [*reasons(judged(winner)), *(told["worse"] if told else ())],
            }
        )
    return verdicts


def recommended(verdicts: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The deepest safe cut with nothing but safe ones above it; None if even the mildest is not safe.

    A cut that looks safe below one that is not has been lucky, so it is not recommended.
    """
    found = None
    for verdict in sorted(verdicts, key=lambda one: -one["keep"]):
        if verdict["level"] != "safe":
            break
        found = verdict
    return found


def next_prune(cfg: Config, verdicts: Sequence[dict[str, Any]]) -> str:
    """The command that writes the recommended plan, or the mildest: with the very options it was made by."""
    chosen = recommended(verdicts) or verdicts[0]
    domains = "" if cfg.domains == "mean" else f" --domains {shlex.quote(cfg.domains)}"
    return (
        f"moesmith prune {shlex.quote(cfg.model)} --profile {shlex.quote(str(cfg.profile))} "
        f"--keep {chosen['keep']} --score {chosen['best']}{domains} --out small"
    )


def sentence(verdicts: Sequence[dict[str, Any]], experts: int) -> tuple[str, str]:
    """(level, one sentence for a hurried person)."""
    least = recommended(verdicts)
    if least is not None:
        share = 100 * (1 - least["keep"] / experts)
        return "safe", (
            f"Keeping {least['keep']} of {experts} experts ({share:.3g} % dropped) chosen by {least['best']} "
            f"looks safe: KL {least['kl']:.3g} nats per token, perplexity ×{least['ppl_ratio']:.3f}."
        )
    first = verdicts[0]
    if first["level"] == "caution" and first["seems_safe"]:
        return "caution", (
            "Too little text to call any cut safe. "
            f"The mildest, keeping {first['keep']} of {experts} experts by {first['best']}, "
            f"has figures below the limits: KL {first['kl']:.3g} nats per token, "
            f"perplexity ×{first['ppl_ratio']:.3f}."
        )
    word = "is a compromise" if first["level"] == "caution" else "costs more than that"
    mild = f"even keeping {first['keep']} of {experts} {word}"
    return ("caution" if first["level"] == "caution" else "stop"), (
        f"No cut that was tried is safe on this text: {mild} "
        f"(KL {first['kl']:.3g} nats per token, perplexity ×{first['ppl_ratio']:.3f}, by {first['best']})."
    )


def show(
    evidence: Sequence[Evidence], verdicts: Sequence[dict[str, Any]], profile: Profile, answers: Any
) -> None:
    """The Pareto table, who wins, and the sentence."""
    counts = _counts(evidence)
    experts = profile.layers[0].num_experts
    console.say()
    console.table(["KL · perplexity", *(f"keep {count}" for count in counts)], table_rows(evidence, counts))
    console.say()
    for verdict in verdicts:
        console.row(f"keep {verdict['keep']}", words(verdict), 10)
    if answers:
        for name, facts in answers["compared"].items():
            loops, ends = facts["loop_rate"], facts["eos_rate"]
            console.row(
                "canary",
                f"{name}: loops {loops['b']['hits']} of {facts['n']} (was {loops['a']['hits']}) · ends "
                f"{ends['b']['hits']} (was {ends['a']['hits']}) · length ×{facts['length_ratio']:.2f}",
                10,
            )
    level, words_ = sentence(verdicts, experts)
    console.row("verdict", words_, 10)
    if level != "safe":
        for point in verdicts[0]["reasons"]:
            console.row("", point, 10)
    console.row("", NOTE, 10)


def table_rows(evidence: Sequence[Evidence], counts: Sequence[int]) -> list[list[str]]:
    """One row per criterion, the random control and merging method; * marks the best criterion of a count."""
    from moesmith.jobs._plans import best

    winners = {count: best(evidence, count)["kl"] for count in counts}
    rows: list[list[str]] = []
    for series, kind in dict.fromkeys((one["series"], one["kind"]) for one in evidence):
        cells = []
        for count in counts:
            there = [
                one for one in evidence if (one["series"], one["kind"], one["keep"]) == (series, kind, count)
            ]
            there.sort(key=lambda one: one["kl"])
            one = there[len(there) // 2]
            mark = "*" if kind == "prune" and one["kl"] == winners[count] else ""
            cells.append(f"{mark}{_kl(one['kl'])} ×{one['ppl_ratio']:.3f}")
        label = str({"merge": f"merge {series}", "random": "random, median"}.get(kind, series))
        rows.append([label, *cells])
    order = {"prune": 0, "random": 1, "merge": 2}
    kinds = dict.fromkeys((one["series"], one["kind"]) for one in evidence)
    return [row for _, row in sorted(zip(kinds, rows, strict=True), key=lambda pair: order[pair[0][1]])]


def words(verdict: dict[str, Any]) -> str:
    """Who wins at one count and by how much."""
    low, high = verdict["kl_ci"] or (verdict["kl"], verdict["kl"])
    parts = [f"{verdict['best']} KL {_kl(verdict['kl'])} [{_kl(low)}, {_kl(high)}]"]
    if verdict["equal"]:
        parts[0] += f" (the same experts: {', '.join(verdict['equal'])})"
    share = verdict["win_shares"].get(verdict["best"])
    if share is not None and len(verdict["win_shares"]) > 1:
        parts.append(f"first in {100 * share:.0f} % of resamples")
    for name, other in verdict["against"].items():
        label = {
            "random": f"random, mean of {len(other['names'])}",
            "frequency": "usage",
            "merge": f"best {other['names'][0].split('@')[0]}",
        }[name]
        low, high = other["ci"] or (other["kl_more"], other["kl_more"])
        parts.append(f"{label} {other['kl_more']:+.3g} [{low:+.3g}, {high:+.3g}]")
    return " · ".join(parts)


def _kl(value: float) -> str:
    return f"{value:.4f}" if value < 0.1 else f"{value:.3f}"


def _counts(evidence: Sequence[Evidence]) -> list[int]:
    return sorted({one["keep"] for one in evidence}, reverse=True)


# ---------------------------------------------------------------- files


def write_beside_profile(cfg: Config, record: dict[str, Any]) -> str:
    """compare.json for `prune --score auto`; a profile that cannot be written to is no reason to fail."""
    from moesmith.jobs._plans import FILE, write_evidence

    try:
        return f", {write_evidence(cfg.profile, record)}"
    except OSError as error:
        console.warn(f"{cfg.profile / FILE}: {error.strerror}; prune --score auto will not find this")
        return ""


def report(
    cfg: Config,
    record: dict[str, Any],
    profile: Profile,
    candidates: Sequence[Candidate],
    answers: dict[str, Any] | None,
    alike: Any,
) -> Path | None:
    """The page; what of it there is to show."""
    from moesmith.jobs._cut_words import arguments
    from moesmith.prune.summary import profile_facts
    from moesmith.report import write_report

    verdicts = record["verdicts"]
    shown = recommended(verdicts) or verdicts[0]
    plan = next(candidate.plan for candidate in candidates if candidate.name == shown["name"])
    level, words_ = sentence(verdicts, record["experts"])
    facts: dict[str, Any] = {
        "title": f"{Path(record['model']).name}: which experts to drop",
        "subtitle": f"{len(profile.layers)} layers × {record['experts']} experts, top-{record['top_k']} · "
        f"{record['documents']} held-out documents, {record['tokens']:,} tokens",
        "verdict": {
            "level": level,
            "sentence": words_,
            "points": [
                *(f"keep {v['keep']}: {words(v)}" for v in verdicts),
                *(verdicts[0]["reasons"] if level != "safe" else ()),
                NOTE,
            ],
        },
        "pareto": pareto(record),
        **profile_facts(profile, plan),
        "how": {
            "command": arguments(cfg, command="compare"),
            **{key: record[key] for key in ("date", "versions", "model_hash", "profile_hash", "tokens")},
            "corpus_hash": profile.meta.get("corpus_hash"),
            "seconds": record["seconds"],
        },
    }
    facts["notes"] = [*facts.get("notes", []), *record["notes"], *merge_notes(cfg)]
    if alike:
        from moesmith.prune.similarity import facts as similarity_facts

        facts["similarity"] = similarity_facts(alike)
    if answers:
        facts["canary"] = canary_section(answers["compared"])
    return write_report(cfg.out, facts)


NOTE = (
    "the best score and count are chosen and judged on the same documents, so these figures are optimistic: "
    "judge what `prune` writes on other text, `moesmith verify MODEL SMALL --corpus NAME=FILE`"
)


def merge_notes(cfg: Config) -> list[str]:
    """What merging did and did not do."""
    if cfg.merge == ["none"]:
        return []
    router = {
        "centroid": "a merged expert has the router row of one member, as in a smaller checkpoint",
        "sum": "a merged expert gets the gates of all its members, which no smaller checkpoint can say",
    }[cfg.merge_router]
    return [
        "Merging is live, from the profile's statistics and the weights, without re-running layers; "
        f"{router}."
    ]


def pareto(record: dict[str, Any]) -> dict[str, Any]:
    """The report's curves and the band of random choices."""
    keys = ("keep", "kl", "kl_ci", "kl_median", "kl_p99", "top1", "ppl_ratio", "ppl")
    series: dict[tuple[str, str], list[dict[str, Any]]] = {}
    band = []
    for count in _counts(record["evidence"]):
        there = [one for one in record["evidence"] if one["keep"] == count]
        randoms = sorted((one for one in there if one["kind"] == "random"), key=lambda one: one["kl"])
        if randoms:
            middle = randoms[len(randoms) // 2]
            band.append(
                {
                    "keep": count,
                    "kl_lo": randoms[0]["kl"],
                    "kl_hi": randoms[-1]["kl"],
                    "kl_median": middle["kl"],
                }
            )
        for one in there:
            if one["kind"] != "random":
                series.setdefault((one["series"], one["kind"]), []).append({key: one[key] for key in keys})
    first = record["evidence"][0]
    return {
        "experts": record["experts"],
        "original": {
            "ppl": {domain: part["ppl_original"] for domain, part in first["per_domain"].items()},
            "ppl_overall": first["ppl_original"],
        },
        "series": [
            {"name": f"{name} (merge)" if kind == "merge" else name, "kind": kind, "points": points}
            for (name, kind), points in series.items()
        ],
        "random_band": band,
    }


def canary_section(compared: dict[str, Any], samples: int = 3) -> dict[str, Any]:
    """The original once, then every finalist; a few samples of each."""
    from moesmith.eval.canary import report_section

    rows: list[dict[str, Any]] = []
    shown: list[dict[str, Any]] = []
    for name, facts in compared.items():
        section = report_section(("original", name), facts)
        rows += section["rows"] if not rows else section["rows"][1:]
        shown += section["samples"][:samples]
    return {"rows": rows, "samples": shown}
