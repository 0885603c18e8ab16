"""The sections of benchmarks."""

import copy
import re

import pytest

from moesmith.report import page, poster, tasks, values
from moesmith.report.theme import LIGHT
from report.facts import SCRIPT
from report.test_page import Page, paths, rendered


def score(task, value, metric="acc", main=True, **more):
    return {
        "task": task,
        "metric": metric,
        "value": value,
        "n": 40,
        "interval": [value - 0.1, value + 0.1],
        "right": round(40 * value),
        "higher_is_better": True,
        "form": "mean",
        "main": main,
        "shots": 2,
        **more,
    }


def row(task, a, b, p=0.03, **more):
    facts = {
        "task": task,
        "metric": "acc",
        "main": True,
        "n": 40,
        "a": a,
        "b": b,
        "difference": b - a,
        "interval": [b - a - 0.1, b - a + 0.1],
        "both": 10,
        "only_a": 3,
        "only_b": 13,
        "neither": 14,
    }
    return facts | ({} if p is None else {"p": p}) | more


@pytest.fixture
def facts():
    words = score(
        "text", 23.5, "word_perplexity", form="weighted_perplexity", right=None, higher_is_better=False
    )
    return {
        "title": "Benchmarks of run1/best",
        "tasks": {
            "name": "run1/best",
            "groups": [score("mmlu", 0.41)],
            "scores": [
                score("arc", 0.6),
                score("arc", 0.65, "acc_norm", main=False),
                score("sums", 0.2),
                words,
            ],
            "paired": {
                "a": "base",
                "b": "run1/best",
                "asked_otherwise": 0,
                "rows": [row("arc", 0.5, 0.6), row("sums", 0.1, 0.2, 0.2), row("text", 30.0, 23.5, None)],
                "all": {key: value for key, value in row("x", 0.3, 0.4, 0.01).items() if key != "task"},
            },
            "samples": [
                {
                    "task": "arc",
                    "prompt": "Which?",
                    "target": "iron",
                    "answer": "wood",
                    "right": False,
                    "choices": ["iron", "wood"],
                    "logprobs": [-3.25, -1.5],
                    "before": {"name": "base", "answer": "iron", "right": True},
                },
                {
                    "task": "sums",
                    "prompt": "1+1?",
                    "target": "2",
                    "answer": "3",
                    "right": False,
                    "before": None,
                },
            ],
        },
    }


def words(facts) -> str:
    return Page(rendered(facts)).text.replace("\N{NO-BREAK SPACE}", " ").replace("−", "-")


def test_scores_changes_items_and_figures_are_on_the_page(facts):
    text = words(facts)
    read = Page(rendered(facts))
    assert [one["id"] for one in read.all("section")] == [
        "tasks",
        "tasks-against",
        "task-samples",
        "task-figures",
    ]
    ids = [attributes["id"] for _, attributes in read.elements if "id" in attributes]
    assert len(ids) == len(set(ids)) and {a["href"][1:] for a in read.all("a") if a["href"][0] == "#"} <= set(
        ids
    )
    assert "Highest arc, 60.0 %; lowest sums, 20.0 %." in text
    assert (
        "Against base, run1/best: +10.0 points (p = 0.010). 13 items are right only now, 3 only then." in text
    )
    assert "60.0 % [50.0 %, 70.0 %] 24 40 2 higher" in text
    assert "text word_perplexity 23.5 [23.4, 23.6] – 40 2 lower" in text
    assert "iron -3.25" in text and "base ✓ right" in text and "answer ✕ wrong" in text
    assert not re.search(r"\b(nan|None|null|undefined)\b", text)


def test_one_task_alone_and_a_difference_that_may_be_luck(facts):
    facts["tasks"]["groups"] = []
    facts["tasks"]["scores"] = [score("sums", 0.2)]
    facts["tasks"]["paired"]["rows"] = [row("sums", 0.1, 0.2, 0.2)]
    text = words(facts)
    assert "20.0 % on sums (acc)." in text and "(p = 0.20; they may be the same)" in text
    assert "Against base, run1/best: +10.0 points on sums" in text


def test_what_models_wrote_stays_text(facts):
    evil = f"{SCRIPT}\x1b[31m"
    for sample in facts["tasks"]["samples"]:
        sample |= {"prompt": evil, "target": evil, "answer": evil * 300, "choices": [evil], "logprobs": [0.0]}
    facts["tasks"]["scores"][0]["task"] = evil
    text = rendered(facts)
    assert len(re.findall("<script", text)) == 1 and "\x1b" not in text
    assert not [a for _, a in Page(text).elements if "onerror" in a]


def test_nothing_is_no_section_and_changes_no_byte():
    for nothing in (None, {}, [], "text", {"scores": []}, {"scores": [None]}):
        assert rendered({"title": "t", "tasks": nothing}) == rendered({"title": "t"})


def test_any_one_fact_may_be_missing_or_odd(facts, monkeypatch):
    for name in ("intervals",):
        monkeypatch.setattr(tasks.charts, name, lambda *_, **__: None)
    original = values.clean(facts)
    odds = (None, [], "text", -1.5, 10**30)
    for i, path in enumerate(paths(original)):
        for odd in ("gone", odds[i % len(odds)]):
            changed = copy.deepcopy(original)
            parent = changed
            for step in path[:-1]:
                parent = parent[step]
            if odd == "gone":
                del parent[path[-1]]
            else:
                parent[path[-1]] = odd
            Page("".join(part.html for part in tasks.sections(changed)))


def test_the_png_is_the_scores(facts):
    assert tasks.picture(facts["tasks"], LIGHT) is not None and tasks.picture(None, LIGHT) is None
    assert poster.png(values.clean(facts)).startswith(b"\x89PNG")
    assert page.page(values.clean(facts)).count("<svg") == 2
