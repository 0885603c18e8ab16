"""What the measurements of two models mean: the verdict, the words on the terminal, the report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moesmith import console
from moesmith.jobs._cut import change, grade, interval, reasons, unended

OPENINGS = {
    "safe": "B can stand in for A",
    "caution": "B differs from A, so try it on your own work first",
    "stop": "B is no replacement for A",
}


def verdict(measured: dict[str, Any], compared: dict[str, Any] | None) -> tuple[str, str, list[str]]:
    """(level, one sentence, points) by the rule that also judges cuts, `_cut.grade`.

    Args:
        measured: facts of a Divergence.
        compared: `eval.canary.compare`; None if no answers were made.
    """
    kl, top1 = measured["kl"], measured["top1"]["rate"]
    per_domain = measured["ppl"]["per_domain"]
    worst = max(per_domain, key=lambda name: per_domain[name]["ratio"])
    level = grade(measured, compared)
    sentence = (
        f"{OPENINGS[level]}: KL {kl['mean']:.2g} nats per token{interval(kl['ci'])}, "
        f"the same next token {100 * top1:.1f} % of the time, "
        f"perplexity {change(measured['ppl']['overall']['ratio'])}"
    )
    if len(per_domain) > 1:
        sentence += f" ({change(per_domain[worst]['ratio'])} in {worst}, the worst domain)"
    points = reasons(measured)
    if compared is None:
        points.append("no answers were compared: repetition and empty answers do not show in perplexity")
    else:
        points += [*compared["worse"], *unended(compared)]
    alone = [name for name, part in measured["per_domain"].items() if part["kl"]["ci"] is None]
    if alone and measured["documents"] > 1:
        points.append(f"one document in {', '.join(alone)}: no interval there")
    return level, sentence + ".", points


# ---------------------------------------------------------------- the words


def show(facts: dict[str, Any]) -> None:
    """Table per domain, canary, verdict."""
    measured = facts["divergence"]
    rows = [(name, part, part["ppl"]) for name, part in measured["per_domain"].items()]
    if len(rows) > 1:
        rows.append(("all", measured, measured["ppl"]["overall"]))
    console.say()
    console.table(
        ("", "tokens", "KL, nats", "95 %", "median", "p99", "top-1", "perplexity", "ratio", "95 %"),
        (
            (
                name,
                f"{part['tokens']:,}",
                f"{part['kl']['mean']:.4f}",
                _plain(part["kl"]["ci"], ".4f"),
                f"{part['kl']['median']:.4f}",
                f"{part['kl']['p99']:.3f}",
                f"{100 * part['top1']['rate']:.1f} %",
                f"{ppl['a']:.2f} → {ppl['b']:.2f}",
                f"{ppl['ratio']:.3f}",
                _plain(ppl["ci"], ".3f"),
            )
            for name, part, ppl in rows
        ),
    )
    console.say()
    compared = facts["canary"]
    if compared is not None:
        parts = [
            f"{words} {compared[key]['b']['hits']} (A {compared[key]['a']['hits']})"
            for key, words in (("loop_rate", "loop"), ("eos_rate", "end"), ("empty_rate", "empty"))
        ]
        n, same = compared["n"], compared["same"]["hits"]
        console.row(
            "canary",
            f"{n} answers: {' · '.join(parts)} · length x{compared['length_ratio']:.2f} · "
            f"{same} word for word the same",
        )
    sliced = facts["mask_equals_slice"]
    if sliced is not None:
        far = f"logits of {sliced['tokens']} tokens within {sliced['max_difference']:.2g}"
        console.row(
            "cut",
            f"B is A without the dropped experts, nothing else: {far}"
            if sliced["equal"]
            else f"B is more than A without the dropped experts (healed or trained?): {far}",
        )
    share = facts["b"]["bytes"] / facts["a"]["bytes"]
    console.row("size", f"{console.size(facts['b']['bytes'])}, {100 * share:.0f} % of A on disk")
    console.row("verdict", facts["verdict"]["sentence"])
    for point in facts["verdict"]["points"]:
        console.row("", point)


def _plain(ci: Sequence[float] | None, form: str) -> str:
    return "one document" if ci is None else f"{ci[0]:{form}} - {ci[1]:{form}}"


# ---------------------------------------------------------------- the report


def report_facts(facts: dict[str, Any]) -> dict[str, Any]:
    """The evidence as the report wants it."""
    from moesmith.eval.canary import report_section
    from moesmith.eval.divergence import report_row

    a, b = facts["a"], facts["b"]
    names = (Path(a["given"]).name or a["given"], Path(b["given"]).name or b["given"])
    if names[0] == names[1]:
        names = (a["given"], b["given"])
    notes = [
        f"A: {a['given']}, {a['storage']}, {console.size(a['bytes'])}",
        f"B: {b['given']}, {b['storage']}, {console.size(b['bytes'])}",
        f"text: {facts['text']['origin']}",
    ]
    leaks = facts["text"]["leak_check"]
    if leaks is None:
        notes.append("no calibration text is known that this text could have leaked from")
    else:
        notes.append(
            f"{leaks['shared']:,} of {leaks['ngrams']:,} runs of 13 words are in the calibration text"
        )
    sliced = facts["mask_equals_slice"]
    if sliced is not None:
        same = "equal to" if sliced["equal"] else "not equal to"
        notes.append(
            f"B is {same} A with a masked router: logits of {sliced['tokens']} tokens differ by "
            f"{sliced['max_difference']:.2g} at most, the largest is {sliced['largest_logit']:.3g}"
        )
    return {
        "title": f"{names[1]} against {names[0]}",
        "subtitle": _subtitle(b),
        "verdict": facts["verdict"],
        "divergence": [report_row(names[1], facts["divergence"])],
        **({"canary": report_section(names, facts["canary"])} if facts["canary"] else {}),
        "how": {
            key: value if isinstance(value, (str, dict)) else str(value)
            for key, value in facts["how"].items()
        },
        "notes": notes,
    }


def _subtitle(side: dict[str, Any]) -> str:
    parts = [str(side["model_type"]), f"{console.count(side['parameters'])} parameters"]
    if side["num_experts"]:
        low, high = min(side["num_experts"]), max(side["num_experts"])
        experts = str(low) if low == high else f"{low}-{high}"
        parts.append(f"{side['moe_layers']} layers × {experts} experts, top-{max(side['top_k'])}")
    return " · ".join([*parts, side["storage"], console.size(side["bytes"])])
