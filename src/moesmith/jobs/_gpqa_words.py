"""What `eval --gpqa` says on the terminal, and the facts of its page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moesmith import console

if TYPE_CHECKING:
    from moesmith.eval.gpqa import Answer, Counts, GpqaEval, Question
    from moesmith.jobs.eval import Config

SHOWN, PAGE_AUDIT, LABEL = 3, 24, 10


# ---------------------------------------------------------------- words


def say_questions(cfg: Config, questions: Sequence[Question], counts: Counts) -> None:
    """How many questions there are, and what was dropped."""
    domains = len({one.domain for one in questions if one.domain})
    parts = [f"{len(questions):,} questions of {cfg.gpqa}", f"choices in the order of seed {cfg.seed}"]
    if domains:
        parts.insert(1, f"{domains} domain{'s' * (domains > 1)}")
    console.row("gpqa", " · ".join(parts), width=LABEL)
    for why, count in counts.dropped.items():
        console.warn(f"{count:,} rows are dropped: {why} (first: row {counts.firsts[why]})")


def say_limits(longest: int, budget: int | None, marked: bool = True) -> None:
    """The longest answer and the longest reasoning."""
    words = f"greedy, at most {longest:,} tokens"
    if budget is not None:
        words += f", {budget:,} of them for the reasoning"
    elif not marked:
        words += " · the model marks no reasoning"
    console.row("answers", words, width=LABEL)


def say(scores: Mapping[str, Any], evaluation: GpqaEval, budget: int | None) -> None:
    """Scores, sums, lengths, what was cut, and some answers to look at, on the terminal."""
    from moesmith.jobs._eval import between, percent, short

    def score(one: Mapping[str, Any]) -> str:
        return f"{one['right']:,} of {one['n']:,} · {percent(one['rate'])} ({between(one['interval'])})"

    console.say()
    console.row("score", f"flexible {score(scores['flexible'])}", width=LABEL)
    console.row("", f"strict   {score(scores['strict'])}", width=LABEL)
    harness = scores["harness"]
    console.row(
        "lm-eval",
        f"flexible-extract {percent(harness['flexible']['rate'])}, strict-match "
        f"{percent(harness['strict']['rate'])}: the same answers by the harness's filters",
        width=LABEL,
    )
    low, high = scores["flexible"]["interval"]
    if low <= 1 / scores["choices"] <= high:
        console.row("", f"guessing gives {100 / scores['choices']:.0f} %: this may be no better", width=LABEL)
    why = ", ".join(f"{rule} {count:,}" for rule, count in scores["invalid_by_rule"].items())
    console.row(
        "answers",
        f"{scores['right']:,} right + {scores['wrong']:,} wrong + {scores['invalid']:,} invalid = "
        f"{scores['n']:,}" + (f" · invalid: {why}" if why else ""),
        width=LABEL,
    )
    if scores["wrong"]:
        for label, key in (("wrong", "by letter read"), ("", "by right letter")):
            found = scores["wrong_by_predicted" if label else "wrong_by_gold"]
            told = ", ".join(f"{letter} {count:,}" for letter, count in found.items())
            console.row(label, f"{key}: {told}", width=LABEL)
    say_lengths(scores, budget)
    if len(scores["by_domain"]) > 1:
        console.say()
        console.table(
            ("domain", "n", "right", "share", "95 %"),
            [
                (short(one["name"], 40), f"{one['n']:,}", f"{one['right']:,}", percent(one["rate"]),
                 between(one["interval"]))
                for one in scores["by_domain"]
            ],
        )  # fmt: skip
    say_audit(scores, evaluation)


def say_lengths(scores: Mapping[str, Any], budget: int | None) -> None:
    """Tokens of answers and reasoning, long ones, cut ones."""
    lengths = scores["lengths"]
    tokens, reasoning = lengths["tokens"], lengths["reasoning_tokens"]
    if tokens["median"] is not None:
        words = f"{tokens['median']:,.0f} tokens in the median, {tokens['mean']:,.0f} on average, "
        words += f"{tokens['p95']:,.0f} at the 95th percentile, {tokens['max']:,} at most"
        if scores["reasoned"] and reasoning["mean"] is not None:
            words += f" · reasoning {reasoning['mean']:,.0f} of them on average"
        console.row("length", words, width=LABEL)
    long = lengths["long"]
    console.row(
        "" if tokens["median"] is not None else "length",
        f"{long['characters']:,} over 20,000 characters, {long['tokens']:,} over 20,000 tokens",
        width=LABEL,
    )
    cut = scores["cut"]
    ended = f"{cut['budget']:,} reasonings ended by the budget" if budget is not None else None
    if cut["budget_unknown"] and ended:
        ended += f" (unknown of {cut['budget_unknown']:,})"
    other = [f"{count:,} ended by `{word}`" for word, count in cut["other"].items()]
    parts = [f"{cut['reasoning']:,} in the reasoning, {cut['answer']:,} in the answer", ended, *other]
    console.row("cut", " · ".join(filter(None, parts)), width=LABEL)


def say_audit(scores: Mapping[str, Any], evaluation: GpqaEval) -> None:
    """How many answers a person should look at, why, and the first ones."""
    from moesmith.eval.choice_audit import KINDS
    from moesmith.eval.choices import RULES
    from moesmith.jobs._eval import short

    look = hard(evaluation)
    if not look:
        return
    console.say()
    console.row("look at", f"{len(look):,} answers; answers.jsonl and the page have them", width=LABEL)
    for kind, count in scores["audit"].items():
        console.row("", f"{count:>5,} {KINDS[kind]}", width=LABEL)
    for one in look[:SHOWN]:
        read = one.flexible or "no letter"
        console.say()
        console.row(
            short(one.id, 16), f"read {read}: {RULES[one.flexible_rule]}; right is {one.gold}", width=18
        )
        console.row("", short(one.excerpt) or "(no answer)", width=18)
    console.say()


def hard(evaluation: GpqaEval) -> list[Answer]:
    """Answers a person should look at: no letter first, then by how many reasons there are."""
    found = [one for one in evaluation.records if one.look]
    return sorted(found, key=lambda one: (one.flexible is not None, -len(one.look)))


def say_paired(found: Mapping[str, Any], other: GpqaEval, evaluation: GpqaEval) -> None:
    """This run against an earlier one on the same questions."""
    interval = found["interval"]
    span = f" (95 %: {100 * interval[0]:+.1f} – {100 * interval[1]:+.1f})" if interval else ""
    console.row(
        "against",
        f"{found['a']}: {other.right:,} → {evaluation.right:,} of {found['n']:,} right · "
        f"{100 * found['difference']:+.1f} points{span}",
        width=LABEL,
    )
    console.row(
        "",
        f"{found['only_b']:,} only now, {found['only_a']:,} only then, {found['both']:,} both, "
        f"{found['neither']:,} neither · McNemar p = {found['p']:.2g}",
        width=LABEL,
    )


# ---------------------------------------------------------------- the page


def report_facts(
    facts: Mapping[str, Any], evaluation: GpqaEval, earlier: tuple[GpqaEval, dict[str, Any]] | None
) -> dict[str, Any]:
    """The facts of the page."""
    from moesmith.jobs._eval import percent

    scores, compared = facts["gpqa"], facts["paired"]
    low, high = scores["flexible"]["interval"]
    chance = 1 / scores["choices"]
    sentence = (
        f"{facts['name']} answers {scores['right']:,} of {scores['n']:,} questions right: "
        f"{percent(scores['flexible']['rate'])} (95 %: {percent(low)} to {percent(high)})."
    )
    points = []
    if compared:
        p = compared["p"]
        same = " The two may be the same." if p >= 0.05 else ""
        points.append(
            f"{100 * compared['difference']:+.1f} points against {compared['a']}: {compared['only_b']:,} "
            f"right only now, {compared['only_a']:,} only then (McNemar p = {p:.2g}).{same}"
        )
    if low <= chance <= high:
        points.append(f"Guessing gives {percent(chance)}: this may be no better.")
    cut = scores["cut"]["reasoning"] + scores["cut"]["answer"]
    if cut:
        points.append(
            f"{cut:,} answers were cut at {scores['max_new_tokens']:,} tokens: with a higher limit the score "
            "may be higher."
        )
    if scores["invalid"]:
        why = ", ".join(f"`{rule}` {count:,}" for rule, count in scores["invalid_by_rule"].items())
        points.append(f"{scores['invalid']:,} answers have no letter: {why}.")
    theirs = scores["harness"]["flexible"]["right"]
    if theirs != scores["right"]:
        points.append(
            f"The harness's flexible filter counts {theirs:,} of the same answers right; the audit shows "
            "where the letters differ."
        )
    runs = [report_run(facts["name"], scores, evaluation)]
    if earlier is not None and compared:
        runs.insert(0, report_run(compared["a"], earlier[0].facts(), earlier[0]))
    return {
        "title": f"GPQA of {facts['name']}",
        "subtitle": f"{scores['n']:,} questions of {facts['questions']['path']}",
        "verdict": {"level": "info", "word": "Measured", "sentence": sentence, "points": points},
        "gpqa": {"runs": runs, "paired": [compared] if compared else []},
        "how": facts["how"],
    }


def report_run(name: str, scores: Mapping[str, Any], evaluation: GpqaEval) -> dict[str, Any]:
    """One run as the report's `gpqa` section takes it."""
    from moesmith.eval.choice_audit import KINDS
    from moesmith.eval.choices import RULES

    keys = (
        "n", "choices", "flexible", "strict", "harness", "right", "wrong", "invalid", "invalid_by_rule",
        "table", "by_domain", "lengths", "cut", "reasoned",
    )  # fmt: skip
    look = [
        {
            "id": one.id, "question": one.question, "choices": one.choices, "gold": one.gold,
            "read": one.flexible, "strict": one.strict, "harness": one.harness_flexible,
            "rule": RULES[one.flexible_rule], "why": [KINDS[kind] for kind in one.look],
            "excerpt": one.excerpt, "answer": one.answer,
        }
        for one in hard(evaluation)[:PAGE_AUDIT]
    ]  # fmt: skip
    return {"name": name, **{key: scores[key] for key in keys}, "audit": look, "look": len(hard(evaluation))}
