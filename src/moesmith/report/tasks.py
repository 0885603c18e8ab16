"""The sections of benchmarks: scores with their intervals, two runs on the same items, items to read.

Facts are `facts["tasks"]`: name, scores and groups (task, metric, value, interval, n, right, form, main,
shots), paired (a, b, rows, all), samples. docs/report.md names them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from . import charts
from .markup import Html, join, table, tag
from .parts import Section, chart, hint, section, sentence, shown, to_table, with_interval
from .talk import card, side
from .theme import STAND_INS
from .values import NONE, figure, items, mapping, number, pair, percent, records

ROWS = 30  # of a picture; the tables have all
SURE = 0.05


def sections(facts: dict[str, Any]) -> list[Section]:
    """Scores, the comparison, samples, and every figure."""
    found = mapping(facts.get("tasks"))
    parts = [scores(found), against(found), samples(found), figures(found)]
    return [one for one in parts if one is not None]


def scores(found: dict[str, Any]) -> Section | None:
    """The main metric of every task and group."""
    rows = [row for row in _all(found) if row.get("main") and figure(row.get("value")) is not None]
    shares = [row for row in rows if _is_share(row)]
    if not rows:
        return None
    most, least = (
        max(shares, key=lambda row: row["value"], default=None),
        min(shares, key=lambda row: row["value"], default=None),
    )
    words = None
    if most is not None and least is not None and len(shares) > 1:
        words = (
            f"Highest {_task(most)}, {percent(most['value'])}; lowest {_task(least)}, "
            f"{percent(least['value'])}."
        )
    elif rows:
        words = f"{_value(rows[0])} on {_task(rows[0])} ({rows[0].get('metric', '')})."
    return section(
        "tasks",
        "Benchmarks",
        "What does it score?",
        sentence(words),
        _picture(shares),
        hint(
            join(
                "Lines are 95 % intervals: few items, wide lines. A line of dashes stands at 0. ",
                to_table("t-tasks"),
            )
        )
        if shares
        else None,
        hint(f"{number(len(shares) - ROWS)} more tasks are in the table.") if len(shares) > ROWS else None,
    )


def _picture(shares: Sequence[dict[str, Any]]) -> Html | None:
    if not shares:
        return None
    points = [
        (_task(row), [("score", 100 * row["value"], _hundred(row.get("interval")))]) for row in shares[:ROWS]
    ]
    picture = charts.intervals(points, "percent", 0, STAND_INS)
    return shown(chart(picture, "task-scores", f"Scores of {len(points)} tasks with 95 % intervals."))


def _hundred(bounds: Any) -> list[float] | None:
    ends = pair(bounds)
    return None if ends is None else [100 * ends[0], 100 * ends[1]]


def _task(row: dict[str, Any]) -> str:
    return str(row.get("task", "?"))


def _all(found: dict[str, Any]) -> list[dict[str, Any]]:
    return [*records(found.get("groups")), *records(found.get("scores"))]


def _is_share(row: dict[str, Any]) -> bool:
    value = figure(row.get("value"))
    return row.get("form") == "mean" and value is not None and 0 <= value <= 1


def _value(row: dict[str, Any], key: str = "value") -> str:
    return percent(row.get(key)) if _is_share(row) else number(row.get(key))


def against(found: dict[str, Any]) -> Section | None:
    """Two runs on the same items: differences with intervals, and which items changed."""
    compared = mapping(found.get("paired"))
    rows = [row for row in records(compared.get("rows")) if figure(row.get("difference")) is not None]
    if not rows:
        return None
    main = [row for row in rows if row.get("main")]
    total = mapping(compared.get("all"))
    pooled = figure(total.get("difference")) is not None and len(main) > 1
    whole = [{"task": "all", **total}] if pooled else []
    shares = [row for row in [*whole, *main] if figure(row.get("p")) is not None]
    points = [
        (_task(row), [("difference", 100 * row["difference"], _hundred(row.get("interval")))])
        for row in shares[:ROWS]
    ]
    alt = f"Difference of {len(points)} tasks with 95 % intervals."
    picture = charts.intervals(points, "points more than before", 0, STAND_INS) if points else None
    head = ["", "metric", "items", "before", "now", "difference", "both right", "only now", "only then", "p"]
    body = [
        [
            _task(row),
            str(row.get("metric", "")),
            number(row.get("n")),
            _compared_value(row, "a"),
            _compared_value(row, "b"),
            _difference(row),
            *(number(row.get(key)) for key in ("both", "only_b", "only_a")),
            number(row.get("p"), 2),
        ]
        for row in [*whole, *rows]
    ]
    now, then = str(compared.get("b", "this run")), str(compared.get("a", "the earlier run"))
    return section(
        "tasks-against",
        "Against",
        "What changed on the same items?",
        sentence(_changed(now, then, (whole or main or rows)[0])),
        shown(chart(picture, "task-differences", alt)) if picture is not None else None,
        table(f"{now} against {then}", head, body, id="t-tasks-paired"),
        hint(
            "Items that both runs answer alike say nothing about the difference; p is McNemar's exact test "
            "on the others. Intervals are drawn over items, both runs together."
        ),
    )


def _compared_value(row: dict[str, Any], key: str) -> str:
    return percent(row.get(key)) if figure(row.get("p")) is not None else number(row.get(key))


def _difference(row: dict[str, Any]) -> Html:
    """`+8.1 [+3.2, +13.0]`, in points of percent where it is one of shares."""
    scale = 100 if figure(row.get("p")) is not None else 1

    def form(value: Any) -> str:
        x = figure(value)
        if x is None:
            return NONE
        return (f"{round(100 * x, 1) + 0:+.1f}" if scale == 100 else f"{x:+.3g}").replace("-", "−")

    return with_interval(form(row.get("difference")), row.get("interval"), form)


def _changed(now: str, then: str, row: dict[str, Any]) -> str:
    """`Against base, run1/best: +8.1 points on arc (p = 0.003). 31 items are right only now, 11 only ...`"""
    p, of = figure(row.get("p")), "" if row.get("task") == "all" else f" on {_task(row)}"
    names = f"Against {then}, {now}"
    if p is None:
        return f"{names}{of}: {number(row.get('a'))} before, {number(row.get('b'))} now."
    sure = "p < 0.001" if p < 0.001 else f"p = {number(p, 2)}"
    close = "; they may be the same" if p >= SURE else ""
    points = f"{100 * row['difference']:+.1f}".replace("-", "−")
    return (
        f"{names}: {points} points{of} ({sure}{close}). {number(row.get('only_b'))} items are right only "
        f"now, {number(row.get('only_a'))} only then."
    )


def samples(found: dict[str, Any]) -> Section | None:
    """Items to read: those that changed, then wrong ones."""
    cards = [_card(row) for row in records(found.get("samples"))]
    return section(
        "task-samples",
        "Items",
        "What does it answer?",
        hint(
            "First items that the earlier run answered better or worse, then wrong ones. The end of a long "
            "prompt is shown."
        )
        if cards
        else None,
        cards,
    )


def _card(row: dict[str, Any]) -> Html:
    before = mapping(row.get("before"))
    sides = [side("expected", row.get("target"))]
    if before:
        sides.append(side(str(before.get("name", "before")), before.get("answer"), _mark(before)))
    sides.append(side(str(row.get("name") or "answer"), row.get("answer"), _mark(row)))
    return card(row.get("prompt"), sides, _choices(row))


def _mark(row: dict[str, Any]) -> Html | None:
    if row.get("right") is None:
        return None
    good = row["right"] is True
    return join(" ", tag("span", "✓ right" if good else "✕ wrong", class_="ok" if good else "bad"))


def _choices(row: dict[str, Any]) -> Html | None:
    """The choices with their log-probabilities."""
    texts, scores = items(row.get("choices")), items(row.get("logprobs"))
    if not texts:
        return None
    parts = [
        tag("li", str(text)[:200], tag("span", f" {number(score)}", class_="ci"))
        for text, score in zip(texts, scores, strict=False)
    ]
    return tag("ul", parts, class_="plain")


def figures(found: dict[str, Any]) -> Section | None:
    """Every metric of every task."""
    rows = _all(found)
    if not rows:
        return None
    head = ["task", "metric", "score", "right", "items", "examples", "better"]
    body = [
        [
            _task(row),
            str(row.get("metric", "")),
            with_interval(_value(row), row.get("interval"), percent if _is_share(row) else number),
            number(row.get("right")),
            number(row.get("n")),
            number(row.get("shots")),
            "higher" if row.get("higher_is_better", True) else "lower",
        ]
        for row in rows
    ]
    return section(
        "task-figures", "Figures", "Every score", table("Scores by task and metric", head, body, id="t-tasks")
    )


def picture(found: Any, palette: dict[str, str]) -> Any:
    """For the PNG: the scores; None without any."""
    rows = [row for row in _all(mapping(found)) if row.get("main") and _is_share(row)]
    if not rows:
        return None
    points = [
        (_task(row), [("score", 100 * row["value"], _hundred(row.get("interval")))]) for row in rows[:ROWS]
    ]
    return charts.intervals(points, "percent", 0, palette)
