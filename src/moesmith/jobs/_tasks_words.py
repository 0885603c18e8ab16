"""Benchmarks in words: what the terminal says of tasks, scores and two runs, and the facts of the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moesmith import console

if TYPE_CHECKING:
    from moesmith.eval.harness import Asked, Tasks
    from moesmith.eval.items import Item, Score
    from moesmith.jobs._tasks import Asker

SHOWN, PAGE_SAMPLES, TEXT = 2, 16, 6000
ROWS = 20  # tasks that the terminal lists
KINDS = {
    "generate_until": "text", "multiple_choice": "choices by log-probability",
    "loglikelihood": "log-probability of the target", "loglikelihood_rolling": "log-likelihood of the text",
}  # fmt: skip


def say_tasks(tasks: Tasks, asker: Asker) -> None:
    """What is asked and how."""
    kinds, counts = tasks.kinds(), tasks.counts()
    for i, (name, task) in enumerate(list(tasks.loaded["tasks"].items())[:ROWS]):
        total, shots = len(task.eval_docs), task.get_config("num_fewshot") or 0
        some = f"{counts[name]:,} of {total:,} items" if counts[name] < total else f"{total:,} items"
        console.row(
            "" if i else "tasks", f"{name}: {some}, {KINDS[kinds[name]]}, {shots} examples each", width=10
        )
    if len(counts) > ROWS:
        console.row("", f"and {len(counts) - ROWS} more", width=10)
    for note in tasks.notes:
        console.warn(note)
    how_asked = "through the chat template" if asker.chat else "as plain text"
    where = "" if asker.route == "memory" else f", {asker.server_model} at {asker.url}/{asker.route}"
    console.row("asked", how_asked + where, width=10)


def value_words(value: float, form: str) -> str:
    """A share in percent, anything else as a number."""
    return f"{100 * value:.1f} %" if form == "mean" and 0 <= value <= 1 else f"{value:.4g}"


def interval_words(interval: Sequence[float] | None, value: float, form: str) -> str:
    """49.0 – 72.9, in the unit of the value."""
    if interval is None:
        return ""
    if form == "mean" and 0 <= value <= 1:
        return f"{100 * interval[0]:.1f} – {100 * interval[1]:.1f}"
    return f"{interval[0]:.4g} – {interval[1]:.4g}"


def say_scores(asked: Asked, cut: int, seconds: float) -> None:
    """A table of scores, what to beware of, and a wrong answer or two."""
    console.say()
    console.table(
        ("task", "metric", "score", "95 %", "items"),
        [
            (
                score.task, score.metric, value_words(score.value, score.form),
                interval_words(score.interval, score.value, score.form), f"{score.n:,}",
            )
            for score in [*asked.groups, *asked.scores]
        ],
    )  # fmt: skip
    wrong = {item.task: item for item in reversed(asked.items) if right(item, asked.scores) is False}
    for item in [wrong[score.task] for score in asked.scores if score.main and score.task in wrong][:SHOWN]:
        say_item(item)
    console.say()
    console.row("answers", f"{len(asked.items):,} items in {console.duration(seconds)}", width=10)
    if cut:
        console.warn(f"{cut:,} prompts are longer than the model sees: their beginning is cut")


def say_item(item: Item) -> None:
    """One wrong answer."""
    from moesmith.jobs._eval import short

    console.say()
    console.row(f"{item.task} {item.id}", short(item.prompt[-400:]), width=18)
    console.row("  expected", short(item.target), width=18)
    console.row("  answered", short(item.answer) or "(nothing)", width=18)


def right(item: Item, scores: Sequence[Score]) -> bool | None:
    """Whether an item counts as right by its task's main metric; None where that is no share."""
    for score in scores:
        if score.task == item.task and score.main and score.right is not None:
            value = item.metrics.get(score.metric)
            return None if value is None else bool(value)
    return None


def say_compared(found: Mapping[str, Any]) -> None:
    """This run against an earlier one, task by task and in all."""
    rows = [row for row in found["rows"] if row["main"]]
    several = len(rows) > 1 and found["all"] is not None
    for i, row in enumerate([*rows, *([{"task": "in all", **found["all"]}] if several else [])]):
        console.row("" if i else "against", f"{found['a']}: {change_words(row)}", width=10)
    if found["asked_otherwise"]:
        console.warn(
            f"{found['asked_otherwise']:,} items had another prompt then: examples or template differ"
        )


def change_words(row: Mapping[str, Any]) -> str:
    """arc_easy 43.1 → 51.2 % · +8.1 points (95 %: +3.2 – +13.0) · 31 only now, 11 only then · p = 0.003."""
    interval = row["interval"]
    if "p" not in row:
        span = f" (95 %: {interval[0]:+.4g} – {interval[1]:+.4g})" if interval else ""
        return f"{row['task']} {row['a']:.4g} → {row['b']:.4g}, {row['difference']:+.4g}{span}"
    span = f" (95 %: {100 * interval[0]:+.1f} – {100 * interval[1]:+.1f})" if interval else ""
    points = f"{100 * row['difference']:+.1f} points{span}"
    sure = "p < 0.001" if row["p"] < 0.001 else f"p = {row['p']:.2g}"
    return (
        f"{row['task']} {100 * row['a']:.1f} → {100 * row['b']:.1f} % · {points}"
        f" · {row['only_b']:,} only now, {row['only_a']:,} only then · McNemar {sure}"
    )


# ---------------------------------------------------------------- the page


def report_facts(
    facts: dict[str, Any], asked: Asked, earlier: tuple[list[Item], dict[str, Any]] | None
) -> dict[str, Any]:
    """The facts of the page."""
    shown = [score for score in [*asked.groups, *asked.scores] if score.main]
    said = [
        f"{score.task} {value_words(score.value, score.form)}"
        + (f" (95 %: {words})" if (words := interval_words(score.interval, score.value, score.form)) else "")
        for score in shown[:3]
    ]
    more = f" and {len(shown) - 3} more" if len(shown) > 3 else ""
    compared = facts["paired"]
    points = []
    if compared is not None:
        rows = [row for row in compared["rows"] if row["main"]]
        if compared["all"] is not None and len(rows) > 1:
            rows.insert(0, {"task": "in all", **compared["all"]})
        points = [f"Against {compared['a']}: {change_words(row)}." for row in rows[:4]]
    counted = facts["tasks"]
    if counted["empty"]:
        points.append(f"{counted['empty']:,} answers are empty.")
    if counted["cut_prompts"]:
        points.append(f"{counted['cut_prompts']:,} prompts were longer than the model sees.")
    return {
        "title": f"Benchmarks of {facts['name']}",
        "subtitle": f"{counted['items']:,} items of {', '.join(counted['versions'])}"[:200],
        "verdict": {
            "level": "info", "word": "Measured", "points": points,
            "sentence": f"{facts['name']}: {', '.join(said)}{more}.",
        },
        "tasks": {
            "name": facts["name"],
            "scores": counted["scores"],
            "groups": counted["groups"],
            "paired": compared,
            "samples": page_samples(facts["name"], asked, earlier),
        },
        "how": facts["how"],
    }  # fmt: skip


def page_samples(
    run_name: str, asked: Asked, earlier: tuple[list[Item], dict[str, Any]] | None
) -> list[dict[str, Any]]:
    """Items to read: those that changed since the earlier run, then wrong ones; of each task in turn."""
    from moesmith.eval.items import by_task

    before = {(item.task, item.id): item for item in earlier[0]} if earlier is not None else {}
    changed: list[tuple[int, Item]] = []
    wrong: list[tuple[int, Item]] = []
    for items in by_task(asked.items).values():
        new, bad = [], []
        for item in items:
            good, old = right(item, asked.scores), before.get((item.task, item.id))
            if old is not None and good is not None and right(old, asked.scores) != good:
                new.append(item)
            if good is False:
                bad.append(item)
        changed += enumerate(new)
        wrong += enumerate(bad)
    in_turn = [[item for _, item in sorted(found, key=lambda pair: pair[0])] for found in (changed, wrong)]
    chosen = {(item.task, item.id): item for item in [*in_turn[0][: PAGE_SAMPLES // 2], *in_turn[1]]}
    rows = []
    name = earlier[1]["name"] if earlier is not None else ""
    for place, item in list(chosen.items())[:PAGE_SAMPLES]:
        old = before.get(place)
        rows.append(
            {
                "task": item.task,
                "prompt": item.prompt[-TEXT:],
                "target": item.target,
                "answer": item.answer,
                "name": run_name,
                "right": right(item, asked.scores),
                "choices": item.choices,
                "logprobs": item.logprobs,
                "before": None
                if old is None
                else {"answer": old.answer, "right": right(old, asked.scores), "name": name},
            }
        )
    return rows
