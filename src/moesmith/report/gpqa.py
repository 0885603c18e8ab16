"""The sections of multiple choice by reasoning: scores, which letters, lengths, answers to look at.

Facts are `facts["gpqa"]`: `runs` and `paired`, as `moesmith eval --gpqa` writes them. Any of them may be
missing or odd; what is left is what can be shown.
"""

from __future__ import annotations

from typing import Any

from . import gpqa_charts, tool_charts
from .markup import Html, table, tag
from .parts import Section, chart, hint, section, sentence
from .runs import Paired, bounds
from .talk import card, side
from .theme import NARROW, STAND_INS, WIDE
from .values import NONE, figure, items, mapping, number, pair, percent, records, visible

AUDIT = 16  # answers to look at on the page; answers.jsonl has all
SURE = 0.05


def sections(facts: dict[str, Any]) -> list[Section]:
    """Every section that the answers have something for, in the order of the page."""
    found = mapping(facts.get("gpqa"))
    runs = [run for run in records(found.get("runs")) if figure(run.get("n"))]
    made = [scores(runs, records(found.get("paired"))), wrong(runs), lengths(runs), audit(runs)]
    return [one for one in made if one is not None]


def name_of(run: dict[str, Any]) -> str:
    """The run's name."""
    return str(run.get("name") or "run")


def scores(runs: list[dict[str, Any]], compared: list[dict[str, Any]]) -> Section | None:
    """Right answers by run and by way of reading, with intervals; by domain; run against run."""
    if not runs:
        return None
    readings = [(name_of(run), key, one) for run in runs for key, one in gpqa_charts.readings(run)]
    words = "; ".join(f"{name}, {key}: {_score(one)}" for name, key, one in readings)
    alt = f"Right answers: {words}."
    head = ["", "reading", "right", "of", "share"]
    rows = [
        [name, tag("td", key, class_="words"), number(one.get("right")), number(one.get("n")), _score(one)]
        for name, key, one in readings
    ]
    last = runs[-1]
    said = f"Right answers of {name_of(last)}: {_score(mapping(last.get('flexible')))}"
    return section(
        "gpqa",
        "Score",
        "How many questions are answered right?",
        sentence(f"{said}; guessing gives {percent(_chance(last))}.", _sums(last)),
        chart(gpqa_charts.score(runs, STAND_INS, WIDE), "gpqa-score", alt, "wide"),
        chart(gpqa_charts.score(runs, STAND_INS, NARROW), "gpqa-score-narrow", alt, "narrow"),
        hint(
            "Flexible: read as a person would. Strict: stated in a set form. lm-eval: the same answers by "
            "the filters of the evaluation harness. Lines are 95 % intervals; the dashed line is guessing."
        ),
        table("Right answers by reading", head, rows, id="t-gpqa") if rows else None,
        _domains(runs),
        _compared(compared),
    )


def _chance(run: dict[str, Any]) -> float | None:
    choices = figure(run.get("choices"))
    return 1 / choices if choices else None


def _score(one: dict[str, Any]) -> str:
    return f"{percent(one.get('rate'))} {bounds(pair(one.get('interval')))}".strip()


def _sums(run: dict[str, Any]) -> str | None:
    """`142 right, 55 wrong and 1 without a letter are 198.`"""
    counts = [figure(run.get(key)) for key in ("right", "wrong", "invalid", "n")]
    if any(count is None for count in counts):
        return None
    right, wrong, invalid, n = (number(int(count or 0)) for count in counts)
    return f"{right} right, {wrong} wrong and {invalid} without a letter are {n}."


def _domains(runs: list[dict[str, Any]]) -> Html | None:
    names = list(dict.fromkeys(str(one.get("name")) for run in runs for one in records(run.get("by_domain"))))
    if len(names) < 2:
        return None
    rows = []
    for name in names:
        found = [
            next((one for one in records(run.get("by_domain")) if str(one.get("name")) == name), {})
            for run in runs
        ]
        asked = next((one.get("n") for one in found if figure(one.get("n"))), None)
        rows.append([name, number(asked), *(_score(one) if one else NONE for one in found)])
    head = ["domain", "questions", *map(name_of, runs)]
    return table("Right answers by domain", head, rows, id="t-gpqa-domains")


def _compared(found: list[dict[str, Any]]) -> Html | None:
    """Run against run on the same questions: a sentence each, and bars."""
    pairs = []
    for row in found:
        counts = [figure(row.get(key)) for key in ("n", "both", "only_a", "only_b")]
        if any(count is None or count < 0 for count in counts) or not counts[0]:
            continue
        n, both, only_a, only_b = (int(count or 0) for count in counts)
        ends, p = pair(row.get("interval")), figure(row.get("p"))
        a, b = (str(row.get(key) or key) for key in ("a", "b"))
        pairs.append(Paired(a, b, n, both, only_a, only_b, (only_b - only_a) / n, ends, p))
    if not pairs:
        return None
    alt = f"Questions that both, one or neither of two runs answer right, {len(pairs)} comparisons."
    return tag(
        "div",
        tag("h3", "The same questions, run against run"),
        tag("ul", [tag("li", _pair_words(one)) for one in pairs], class_="plain"),
        chart(tool_charts.paired(pairs, STAND_INS, WIDE), "gpqa-paired", alt, "wide"),
        chart(tool_charts.paired(pairs, STAND_INS, NARROW), "gpqa-paired-narrow", alt, "narrow"),
    )


def _pair_words(one: Paired) -> str:
    points = f"{100 * one.difference:+.1f} points".replace("-", "−")
    p = None if one.p is None else "p < 0.001" if one.p < 0.001 else f"p = {number(one.p, 2)}"
    close = " (they may be the same)" if one.p is not None and one.p >= SURE else ""
    figures = ", ".join(filter(None, (f"{points} {bounds(one.ends, sign=True)}".strip(), p)))
    return (
        f"{one.b} against {one.a}: {figures}{close}. Of {number(one.n)} questions both are right on "
        f"{number(one.both)}, only {one.b} on {number(one.only_b)}, only {one.a} on {number(one.only_a)}."
    )


def wrong(runs: list[dict[str, Any]]) -> Section | None:
    """The right letter against the letter read, one square per run."""
    squares = []
    for run in runs:
        found = mapping(run.get("table"))
        gold, read = ([str(one) for one in items(found.get(key))] for key in ("gold", "read"))
        counts = items(found.get("counts"))
        if not gold or not read or len(counts) != len(gold):
            continue
        squares.append(_square(name_of(run), gold, read, counts))
    if not squares:
        return None
    return section(
        "gpqa-letters",
        "Letters",
        "Which letter is taken for which?",
        sentence(*(_bias(run) for run in runs[-1:])),
        tag("div", squares, class_="matrices"),
        hint(
            "Rows: the right letter. Columns: the letter that was read; none: no letter. The diagonal is "
            "right. The choices are shuffled, so a column that stands out is a liking for that letter."
        ),
    )


def _square(name: str, gold: list[str], read: list[str], counts: list[Any]) -> Html:
    """A table of counts, each on a tint as strong as its share of the largest; warm where it is wrong."""
    values = [[int(figure(value) or 0) for value in items(row)[: len(read)]] for row in counts]
    top = max((value for row in values for value in row), default=0) or 1
    head = tag("tr", tag("th", "right ↓ read →", scope="col"), [tag("th", one, scope="col") for one in read])
    body = []
    for letter, row in zip(gold, values, strict=True):
        cells = []
        for column, value in zip(read, row, strict=False):
            tone = "" if column == letter else "--tone:var(--warm);"
            cells.append(tag("td", number(value), style=f"{tone}--v:{52 * value / top:.0f}%"))
        body.append(tag("tr", tag("th", letter, scope="row"), cells))
    inner = tag(
        "table", tag("caption", tag("span", name)), tag("thead", head), tag("tbody", body), class_="matrix"
    )
    return tag("div", inner, class_="scroll", tabindex="0", role="region", aria_label=name)


def _bias(run: dict[str, Any]) -> str | None:
    """`Read letters: A 40, B 52, C 51, D 54, none 1.`"""
    found = mapping(run.get("table"))
    read = [str(one) for one in items(found.get("read"))]
    rows = [[figure(value) or 0 for value in items(row)] for row in items(found.get("counts"))]
    if not read or any(len(row) != len(read) for row in rows):
        return None
    told = ", ".join(
        f"{name} {number(int(sum(column)))}"
        for name, column in zip(read, zip(*rows, strict=True), strict=True)
    )
    return f"Letters read from {name_of(run)}: {told}."


LENGTHS = {"tokens": "tokens", "reasoning_tokens": "tokens of reasoning", "characters": "characters"}


def lengths(runs: list[dict[str, Any]]) -> Section | None:
    """How long answers are with their reasoning, and what was cut."""
    rows, cuts = [], []
    for run in runs:
        for key, words in LENGTHS.items():
            one = mapping(mapping(run.get("lengths")).get(key))
            if figure(one.get("median")) is None:
                continue
            shown_as = [number(_whole(one.get(name))) for name in ("median", "mean", "p95", "max", "long")]
            rows.append([f"{name_of(run)}, {words}", *shown_as])
        cut = mapping(run.get("cut"))
        if cut:
            cuts.append(
                [name_of(run), *(number(_whole(cut.get(name))) for name in ("reasoning", "answer", "budget"))]
            )
    if not rows and not cuts:
        return None
    head = ["", "median", "mean", "95th percentile", "longest", "over 20,000"]
    ended = ["", "cut in the reasoning", "cut in the answer", "reasoning ended by the budget"]
    return section(
        "gpqa-lengths",
        "Lengths",
        "How long does it think, and is it cut?",
        table("Lengths, reasoning included", head, rows, id="t-gpqa-lengths") if rows else None,
        table("Answers that did not end by themselves", ended, cuts, id="t-gpqa-cut") if cuts else None,
        hint("An answer that was cut in its reasoning has no letter and counts as invalid."),
    )


def _whole(value: Any) -> int | None:
    there = figure(value)
    return None if there is None else round(there)


def audit(runs: list[dict[str, Any]]) -> Section | None:
    """Answers a person should look at, with what was read and why."""
    run = runs[-1] if runs else {}
    found = records(run.get("audit"))
    if not found:
        return None
    total = figure(run.get("look")) or len(found)
    cards = [_card(one) for one in found[:AUDIT]]
    more = int(total) - len(cards)
    return section(
        "gpqa-audit",
        "Audit",
        "Which answers are hard to read?",
        sentence(f"{number(int(total))} of {number(run.get('n'))} answers of {name_of(run)} deserve a look."),
        cards,
        hint(f"{number(more)} more are in answers.jsonl, under `look`.") if more > 0 else None,
    )


def _card(one: dict[str, Any]) -> Html:
    choices = "\n".join(f"({chr(65 + i)}) {choice}" for i, choice in enumerate(items(one.get("choices"))))
    read = [
        ("right", one.get("gold")), ("read", one.get("read") or "no letter"),
        ("strict", one.get("strict") or "none"), ("lm-eval", one.get("harness")),
    ]  # fmt: skip
    told = " · ".join(f"{name}: {visible(value)}" for name, value in read if value is not None)
    why = "; ".join(str(word) for word in items(one.get("why")))
    above = tag("p", told, tag("br"), tag("small", f"{one.get('rule') or ''}. {why}.".strip()), class_="hint")
    excerpt, end = str(one.get("excerpt") or ""), _end(one.get("answer"))
    sides = [side("where it was read", excerpt), side("the end of the answer", end)]
    if excerpt.split() == end.split():
        sides = [side("the answer", end)]
    return card(f"{one.get('question') or ''}\n{choices}", sides, above)


def _end(value: Any, most: int = 1500) -> str:
    text = str(value or "")
    return text if len(text) <= most else f"… {text[-most:]}"
