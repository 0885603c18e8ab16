"""The items of benchmarks: scores with their intervals, and two runs on the same items.

Knows nothing of lm-eval: `harness.py` makes items of what it returns, `from_dict` reads them back from a
file. A metric's value of an item is a number (0 or 1 where it is a share of right answers), or a pair
(log-likelihood, words) where the metric is no mean.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import log
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesmith.errors import UserError

from .bootstrap import SHARE, Interval, draws, ratio_interval
from .interval import wilson
from .paired import mcnemar

ODD_ROUNDS = 200  # of a score that only its own function can compute


@dataclass
class Item:
    """One question of a task and what became of it."""

    task: str
    id: int
    """its place in the task's data"""
    key: str
    """hash of the question's row and its target"""
    asked: str
    """hash of the prompt: examples and chat template included"""
    prompt: str
    target: str
    answer: str
    """what was generated, or the choice with the highest log-probability"""
    metrics: dict[str, Any] = field(default_factory=dict)
    choices: list[str] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    """of each choice, or of the target"""
    filtered: dict[str, str] = field(default_factory=dict)
    """what each filter of the task took from the answer"""

    def facts(self) -> dict[str, Any]:
        """A line for a file; what is empty is left out."""
        return {name: value for name, value in asdict(self).items() if value not in ([], {})}

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Item:
        """Back from `facts`."""
        return cls(**row)


@dataclass
class Score:
    """One metric of one task, or of a group of tasks."""

    task: str
    metric: str
    value: float
    n: int
    interval: Interval | None = None
    right: int | None = None
    """items that count 1, where every item counts 0 or 1"""
    higher_is_better: bool = True
    form: str = "mean"
    """how the items' values make the score: a key of FORMS, or the name of lm-eval's function"""
    main: bool = False
    """the metric that stands for its task where there is room for one"""
    shots: int = 0
    """solved examples before each question"""

    def facts(self) -> dict[str, Any]:
        """Everything for a file."""
        return asdict(self)


# A score as a transform of sum(numerators) / sum(denominators).
FORMS: dict[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {
    "mean": lambda x: x,
    "nanmean": lambda x: x,
    "perplexity": lambda x: np.exp(-x),
    "weighted_perplexity": lambda x: np.exp(-x),
    "bits_per_byte": lambda x: -x / log(2),
}


def _parts(values: Sequence[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """Numerators and denominators of items' values; None where they are neither numbers nor pairs."""
    pairs = [value if isinstance(value, (tuple, list)) else (value, 1) for value in values]
    try:
        found = np.asarray(pairs, np.float64)
    except (TypeError, ValueError):
        return None
    return (found[:, 0], found[:, 1]) if found.ndim == 2 and found.shape[1] == 2 else None


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and value != value


def is_share(values: Sequence[Any]) -> bool:
    """Whether every value is 0 or 1."""
    return all(isinstance(value, (bool, int, float)) and value in (0, 1) for value in values)


def interval_of(
    values: Sequence[Any], form: str, function: Callable[[list[Any]], float] | None = None
) -> Interval | None:
    """95 % interval of a score: Wilson for shares, else by resampling items; None for fewer than two items.

    Args:
        form: a key of FORMS; any other score is computed by `function` on every resampled list.
    """
    if form == "nanmean":
        values = [value for value in values if not _is_nan(value)]
    if form == "mean" and is_share(values) and values:
        return wilson(int(sum(values)), len(values))
    if len(values) < 2:
        return None
    parts = _parts(values) if form in FORMS else None
    if parts is not None:
        return ratio_interval(*parts, transform=FORMS[form])
    if function is None:
        return None
    drawn = []
    for counts in draws(len(values), ODD_ROUNDS):
        for count in counts:
            drawn.append(function([v for v, times in zip(values, count, strict=True) for _ in range(times)]))
    return _middle(np.asarray(drawn, np.float64))


def pooled_interval(groups: Sequence[Sequence[float]], by_size: bool) -> Interval | None:
    """95 % interval of the mean over several tasks' items, resampled within each task.

    Args:
        by_size: every item counts the same; else every task does.
    """
    if any(len(values) < 2 for values in groups) or not groups:
        return None
    total = sum(map(len, groups))
    means: Any = 0.0
    for i, values in enumerate(groups):
        one = np.concatenate([c @ np.asarray(values, np.float64) for c in draws(len(values), seed=i)])
        means = means + one / len(values) * (len(values) / total if by_size else 1 / len(groups))
    return _middle(means)


def _middle(samples: NDArray[np.float64]) -> Interval | None:
    samples = samples[np.isfinite(samples)]
    if not len(samples):
        return None
    low, high = np.quantile(samples, [(1 - SHARE) / 2, (1 + SHARE) / 2])
    return float(low), float(high)


# ---------------------------------------------------------------- two runs


def by_task(items: Sequence[Item]) -> dict[str, list[Item]]:
    """Items by the name of their task."""
    found: dict[str, list[Item]] = {}
    for item in items:
        found.setdefault(item.task, []).append(item)
    return found


def same_items(a: Sequence[Item], b: Sequence[Item]) -> dict[str, list[tuple[Item, Item]]]:
    """Pairs of each task that both runs have, in b's order.

    Raises:
        UserError: no task in common, or a task with other items, or with other questions under their ids.
    """
    first, second = by_task(a), by_task(b)
    common = [task for task in second if task in first]
    if not common:
        raise UserError(
            f"the earlier run has {', '.join(first) or 'no tasks'}, this one {', '.join(second)}",
            "compare runs that have a task in common",
        )
    pairs = {}
    for task in common:
        earlier = {item.id: item for item in first[task]}
        ids = {item.id for item in second[task]}
        if ids != earlier.keys():
            raise UserError(
                f"{task}: {len(earlier.keys() - ids):,} items only in the earlier run, "
                f"{len(ids - earlier.keys()):,} only in this one",
                "compare runs with the same --limit",
            )
        for item in second[task]:
            if item.key != earlier[item.id].key:
                raise another_item(task, item.id)
        pairs[task] = [(earlier[item.id], item) for item in second[task]]
    return pairs


def another_item(task: str, id: int) -> UserError:
    """What to say when an item has another question or target than it had."""
    return UserError(
        f"{task}: item {id} is another one in the earlier run",
        "its data or --seed is another: ask with the same ones, or evaluate both models again",
    )


def compare(a: Sequence[Item], b: Sequence[Item], scores: Sequence[Score]) -> dict[str, Any]:
    """How b's items differ from a's: per task and metric, and over the main metric of all tasks.

    Returns:
        rows: task, metric, n, a, b, difference, interval, main, and of shares both, only_a, only_b, neither
        and p (McNemar, two-sided); all: the same over every item whose main metric is a share, None if there
        is none; asked_otherwise: items whose prompt differs.

    Raises:
        UserError: as `same_items`.
    """
    pairs = same_items(a, b)
    rows, pooled = [], []
    for score in scores:
        found = [
            (one.metrics[score.metric], other.metrics[score.metric])
            for one, other in pairs.get(score.task, ())
            if score.metric in one.metrics and score.metric in other.metrics
        ]
        row = _paired(found, score.form)
        if row is None:
            continue
        rows.append({"task": score.task, "metric": score.metric, "main": score.main, **row})
        if score.main and "p" in row:
            pooled += found
    return {
        "rows": rows,
        "all": _paired(pooled, "mean"),
        "asked_otherwise": sum(one.asked != other.asked for found in pairs.values() for one, other in found),
    }


def _paired(found: Sequence[tuple[Any, Any]], form: str) -> dict[str, Any] | None:
    """The comparison of one metric; None for values that have no mean."""
    if form == "nanmean":
        found = [pair for pair in found if not any(map(_is_nan, pair))]
    if not found or form not in FORMS:
        return None
    earlier, now = _parts([one for one, _ in found]), _parts([other for _, other in found])
    if earlier is None or now is None:
        return None
    transform = FORMS[form]
    value_a, value_b = (float(transform(np.asarray(p[0].sum() / p[1].sum()))) for p in (earlier, now))
    facts: dict[str, Any] = {"n": len(found), "a": value_a, "b": value_b, "difference": value_b - value_a}
    if len(found) > 1:
        drawn = [
            [transform((counts @ part[0]) / (counts @ part[1])) for part in (earlier, now)]
            for counts in draws(len(found))
        ]
        facts["interval"] = _middle(np.concatenate([after - before for before, after in drawn]))
    else:
        facts["interval"] = None
    if form == "mean" and is_share([value for pair in found for value in pair]):
        both = sum(bool(x and y) for x, y in found)
        only_a = sum(bool(x and not y) for x, y in found)
        only_b = sum(bool(y and not x) for x, y in found)
        facts |= {
            "both": both, "only_a": only_a, "only_b": only_b,
            "neither": len(found) - both - only_a - only_b, "p": mcnemar(only_a, only_b),
        }  # fmt: skip
    return facts
