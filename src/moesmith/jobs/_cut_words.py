"""What `prune` says: its lines on the terminal, the facts of its report, the section of the model card."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesmith import console
from moesmith.config import JobConfig
from moesmith.jobs._cut import PLAN, RANDOM, SMALLEST, change, interval, too_few

if TYPE_CHECKING:
    from moesmith.jobs._cut import Evidence
    from moesmith.models.rewrite import Rewritten
    from moesmith.prune.plan import Plan
    from moesmith.prune.sizes import Sizes
    from moesmith.prune.stats import Profile

MANY_LAYERS = 60  # more rows than this are not printed; report.json has all
SCHEMES = ("bf16", "q8", "q4", "nf4")
UNITS = {"contribution": "weighted output norm", "prompt_norm": "weighted output norm per document"}
WIDTH = 10  # of the labels


def arguments(cfg: JobConfig, command: str = "prune", **changed: Any) -> str:
    """The command line of these options, without those that are defaults."""
    values = {**dict(cfg), **changed}
    found = [f"moesmith {command}", shlex.quote(values["model"])]
    for name, field in type(cfg).model_fields.items():
        default = field.get_default(call_default_factory=True)
        if name == "model" or values[name] == default:
            continue
        flag = name.replace("_", "-")
        if isinstance(values[name], bool):
            found.append(f"--{flag}" if values[name] else f"--no-{flag}")
        elif isinstance(values[name], list):
            found += [f"--{flag} {shlex.quote(','.join(map(str, values[name])))}"]
        else:
            found.append(f"--{flag} {shlex.quote(str(values[name]))}")
    return " ".join(found)


def kept_words(plan: Plan) -> str:
    """ "12 of 16 experts kept"; ranges where layers differ."""
    return f"{_range(plan.counts.values())} of {_range(plan.num_experts.values())} experts kept"


def _range(values: Any) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}-{high}"


def domain_words(plan: Plan, profile: Profile) -> str:
    """How domains were brought together."""
    n = len(profile.domains)
    if n == 1:
        return f"one domain ({profile.domains[0]})"
    if isinstance(plan.domains, dict):
        return "weighted " + ", ".join(f"{name} {weight:g}" for name, weight in plan.domains.items())
    return f"{plan.domains} over {n} domains"


def mean_count(plan: Plan) -> float:
    """Experts per layer, the mean where layers differ."""
    return sum(plan.counts.values()) / len(plan.counts)


def plan_facts(plan: Plan, sizes: Sizes) -> dict[str, Any]:
    """The plan for a program."""
    mean = mean_count(plan)
    stored = {f"after_{scheme}": sizes.nbytes(mean, scheme) for scheme in SCHEMES}
    return {
        "score": plan.score,
        "domains": plan.domains,
        "keep": plan.count,
        "counts": plan.counts,
        "kept": plan.keep,
        "dropped": plan.drop,
        "retained": plan.retained,
        **plan.meta,
        "bytes": {"before": sizes.stored, "after": sizes.stored_with(mean), **stored},
    }


# ---------------------------------------------------------------- the terminal


def say_plan(plan: Plan, profile: Profile, sizes: Sizes, reliability: dict[str, Any]) -> None:
    """What was chosen by what, what it keeps, and the sizes."""
    from moesmith.prune.summary import short_names

    fewest = reliability["tokens_per_expert"]
    tokens = sum(float(layer.total("tokens").sum()) for layer in profile.layers)
    console.row(
        "score",
        f"{plan.score}, {domain_words(plan, profile)} · {console.count(tokens)} routed tokens, fewest for "
        f"one expert: {fewest['min']:,} (layer {fewest['layer']}, expert {fewest['expert']})",
        WIDTH,
    )
    if reliability["warning"]:
        console.warn(reliability["warning"])
    names = dict(zip(plan.keep, short_names(profile), strict=True))
    worst = min(plan.retained, key=lambda name: plan.retained[name])
    console.row(
        "keep",
        f"{kept_words(plan).removesuffix(' experts kept')} {'in' if plan.count else 'by'} "
        f"{'every ' if plan.count else ''}layer: worst layer {names[worst]} keeps "
        f"{100 * plan.retained[worst]:.2f} % of {UNITS.get(plan.meta['unit'], plan.meta['unit'])}",
        WIDTH,
    )
    lines = list(plan.meta["notes"])
    retain = plan.meta.get("retain")
    if retain:
        by_unit = retain["keep_by_unit"]
        said = " · ".join(f"{count} by {unit}" for unit, count in by_unit.items())
        agree = " (they agree)" if len(set(by_unit.values())) == 1 else ""
        lines.append(f"smallest count by unit: {said}{agree}")
    for title, key in (("super experts", "super_experts"), ("protected", "protected")):
        found = plan.meta[key]
        listed = [f"layer {names[name]}: {', '.join(map(str, ids))}" for name, ids in found.items()]
        if listed:
            more = f" and {len(listed) - 3} more layers" if len(listed) > 3 else ""
            lines.append(f"{title} stay: {' · '.join(listed[:3])}{more}")
    for line in lines:
        console.row("", line, WIDTH)
    mean = mean_count(plan)
    stored = " · ".join(f"{scheme} {console.size(sizes.nbytes(mean, scheme))}" for scheme in SCHEMES)
    console.row(
        "size",
        f"{console.size(sizes.stored)} → {console.size(sizes.stored_with(mean))} stored as now · {stored}",
        WIDTH,
    )


def say_layers(plan: Plan, profile: Profile) -> None:
    """Per layer what stays and what goes."""
    from moesmith.prune.summary import short_names

    drop = plan.drop
    rows = []
    for short, layer in zip(short_names(profile), profile.layers, strict=True):
        name, ids = layer.layer, drop[layer.layer]
        listed = ",".join(map(str, ids[:12])) + (f" +{len(ids) - 12}" if len(ids) > 12 else "")
        fewest = f"{int(layer.total('tokens').min()):,}"
        rows.append([short, str(plan.counts[name]), f"{100 * plan.retained[name]:.2f} %", fewest, listed])
    console.say()
    console.table(["layer", "keep", "retained", "fewest tokens", "dropped"], rows[:MANY_LAYERS])
    if len(rows) > MANY_LAYERS:
        console.say(f"and {len(rows) - MANY_LAYERS} more layers")
    console.say()


def say_evidence(evidence: Evidence) -> None:
    """Three lines of figures."""
    measured = evidence.rows[PLAN]
    kl, domains = measured["kl"], measured["ppl"]["per_domain"]
    each = ", ".join(f"{name} {change(part['ratio'])}" for name, part in domains.items())
    console.row(
        "held-out",
        f"KL {kl['mean']:.3g}{interval(kl['ci'])}, median {kl['median']:.2g}, p99 {kl['p99']:.2g} · top-1 "
        f"agreement {100 * measured['top1']['rate']:.1f} % · perplexity "
        f"{change(measured['ppl']['overall']['ratio'])}{f' ({each})' if len(domains) > 1 else ''}",
        WIDTH,
    )
    canary = evidence.canary
    if canary:
        loops, ends = canary["loop_rate"], canary["eos_rate"]
        console.row(
            "canary",
            f"{canary['n']} answers: loops {loops['b']['hits']} (was {loops['a']['hits']}), ended "
            f"{ends['b']['hits']} (was {ends['a']['hits']}), length ×{canary['length_ratio']:.2f}",
            WIDTH,
        )
    random = evidence.rows[RANDOM]
    console.row(
        "random",
        f"as many experts dropped at random, one draw: KL {random['kl']['mean']:.3g}, perplexity "
        f"{change(random['ppl']['overall']['ratio'])}",
        WIDTH,
    )


def say_result(
    out: Path,
    evidence: Evidence | None,
    verdict: dict[str, Any],
    rewritten: Rewritten | None,
    took: dict[str, float],
) -> None:
    """Verdict, what was written, and the time."""
    if evidence is not None:
        say_evidence(evidence)
    console.row("verdict", verdict["sentence"], WIDTH)
    for point in verdict["points"]:
        console.row("", point, WIDTH)
    parity = evidence.parity if evidence else None
    what = f"{out}: the plan only; counts per layer run in moesmith, no checkpoint can say them"
    if rewritten is not None:
        n = len(rewritten.files)
        what = f"{out} ({console.size(rewritten.nbytes)}, {n} weight file{'s' if n > 1 else ''})"
        for head in rewritten.heads:
            what += f" · {head.name}: {len(head.kept)} experts with the largest router rows, not measured"
        for name in rewritten.left:
            what += f" · {name} copied whole"
    if parity:
        what += f" · mask == slice: {parity['difference']:.1g} (allowed {parity['tolerance']['worst']:.1g})"
    console.row("written", f"{what} · report: {out / 'report.html'}", WIDTH)
    times = [f"{name} {console.duration(seconds)}" for name, seconds in took.items()]
    console.row("time", " · ".join(times), WIDTH)


# ---------------------------------------------------------------- report and model card


def report_facts(
    cfg: Any,
    plan: Plan,
    profile: Profile,
    evidence: Evidence | None,
    verdict: dict[str, Any],
    summary: dict[str, Any],
    record: dict[str, Any],
    notes: list[str],
) -> dict[str, Any]:
    """The page: verdict, evidence, and what the profile says about it."""
    layer = profile.layers[0]
    found: dict[str, Any] = {
        "title": Path(cfg.model).name,
        "subtitle": f"pruned · {len(profile.layers)} layers × {layer.num_experts} experts, "
        f"top-{layer.top_k} · {kept_words(plan)} by {plan.score}, {domain_words(plan, profile)}",
        "verdict": verdict,
        **summary,
        "how": {
            "command": arguments(cfg),
            "date": record["date"],
            "versions": {"moesmith": record["moesmith"], **record["versions"]},
            "machine": f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}, "
            f"Python {sys.version.split()[0]}",
            "model_hash": profile.meta.get("model_hash"),
            "corpus_hash": profile.meta.get("corpus_hash"),
            "seed": cfg.seed,
            "profile": str(cfg.profile),
        },
        "notes": [*summary.get("notes", ()), *notes],
    }
    if evidence is None:
        return found
    from moesmith.eval.canary import report_section
    from moesmith.eval.divergence import report_row

    names = {PLAN: plan.score, RANDOM: "random", SMALLEST: f"{plan.score}, smallest cut"}
    found["divergence"] = [report_row(names[key], rows) for key, rows in evidence.rows.items()]
    if plan.count is not None:
        found["pareto"] = _pareto(plan, layer.num_experts, layer.n_group, evidence)
    if evidence.canary is not None:
        found["canary"] = report_section(("original", "pruned"), evidence.canary)
    return found


def _pareto(plan: Plan, experts: int, step: int, evidence: Evidence) -> dict[str, Any]:
    """The few points that were measured."""
    assert plan.count is not None
    series: dict[str, dict[str, Any]] = {}
    for key, rows in evidence.rows.items():
        name, kind = ("random", "random") if key == RANDOM else (plan.score, "prune")
        one = series.setdefault(name, {"name": name, "kind": kind, "points": []})
        kl, ppl = rows["kl"], rows["ppl"]
        one["points"].append(
            {
                "keep": experts - step if key == SMALLEST else plan.count,
                "kl": kl["mean"],
                "kl_ci": kl["ci"],
                "kl_median": kl["median"],
                "kl_p99": kl["p99"],
                "top1": rows["top1"]["rate"],
                "ppl_ratio": ppl["overall"]["ratio"],
                "ppl": {domain: part["ratio"] for domain, part in ppl["per_domain"].items()},
            }
        )
    return {"experts": experts, "series": list(series.values())}


def card(cfg: Any, plan: Plan, evidence: Evidence | None, verdict: dict[str, Any]) -> str:
    """The section of the model card: what was cut, how, and what it did."""
    least = 100 * min(plan.retained.values())
    domains = plan.domains if isinstance(plan.domains, str) else str(dict(plan.domains))
    lines = [
        "## Pruned with moesmith",
        "",
        f"`{cfg.model}` with fewer experts: the others were dropped, no weight was changed.",
        f"{verdict['sentence']}.",
        "",
        f"- score: {plan.score}, domains: {domains}",
        f"- every layer keeps {least:.2f} % or more of its {plan.meta['unit']} on the calibration text",
        f"- made by `{arguments(cfg)}`",
        "- kept and dropped experts with their scores: `expert_drop_metadata.json`; figures: `report.html`",
        "",
    ]
    if evidence is not None:
        if evidence.selected:
            lines[-1:] = [f"- {evidence.selected}", ""]
        few = too_few(evidence.rows[PLAN])
        if few:
            lines[-1:] = [f"- {few}", ""]
        lines += [
            "| held-out text, against the original | KL, nats per token | same next token | perplexity |",
            "|---|---|---|---|",
        ]
        for title, key in (("this model", PLAN), ("as many dropped at random, one draw", RANDOM)):
            row = evidence.rows[key]
            lines.append(
                f"| {title} | {row['kl']['mean']:.3g}{interval(row['kl']['ci'])} | "
                f"{100 * row['top1']['rate']:.1f} % | {change(row['ppl']['overall']['ratio'])} |"
            )
        lines.append("")
        if evidence.canary:
            canary = evidence.canary
            loops = canary["loop_rate"]
            lines += [
                f"Of {canary['n']} answers {loops['b']['hits']} loop (original: {loops['a']['hits']}); "
                f"their length is ×{canary['length_ratio']:.2f}.",
                "",
            ]
    return "\n".join(lines)
