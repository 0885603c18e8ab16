"""The sections of multiple choice: what is said is what was counted; hostile, missing and odd facts."""

import copy
import re

import pytest

from moesmith.report import gpqa, gpqa_charts, page, values
from moesmith.report.theme import LIGHT, WIDE
from report.facts import SCRIPT
from report.test_page import Page, paths


def score(right, n=200):
    rate = right / n
    return {"n": n, "right": right, "rate": rate, "interval": [rate - 0.05, rate + 0.05]}


def run(name, right, invalid=1, n=200):
    wrong = n - right - invalid
    row = [right // 4, wrong // 4, 0, 0, 0]
    return {
        "name": name, "n": n, "choices": 4, "flexible": score(right), "strict": score(2),
        "harness": {"flexible": score(right - 9), "strict": score(1)}, "right": right, "wrong": wrong,
        "invalid": invalid, "invalid_by_rule": {"empty": invalid},
        "table": {"gold": list("ABCD"), "read": [*"ABCD", "none"], "counts": [row] * 4},
        "by_domain": [{"name": "Physics", **score(30, 80)}, {"name": "Biology", **score(60, 120)}],
        "lengths": {
            "tokens": {"median": 630.0, "mean": 960.5, "p95": 9000.0, "max": 16_384, "long": 0},
            "reasoning_tokens": {"median": 500.0, "mean": 800.0, "p95": 8192.0, "max": 8192, "long": 0},
            "characters": {"median": 2536.0, "mean": 3840.0, "p95": 20_500.0, "max": 31_000, "long": 6},
        },
        "cut": {"reasoning": 3, "answer": 2, "budget": 11, "budget_unknown": 0, "other": {}}, "reasoned": n,
        "audit": [
            {"id": "q1", "question": "Which one?", "choices": ["x", "y", "z", "w"], "gold": "B", "read": "B",
             "strict": None, "harness": "(A)", "rule": "stated", "why": ["two letters"],
             "excerpt": "is (B) because (A)", "answer": "It is (B) because (A) is wrong"},
        ],
        "look": 30,
    }  # fmt: skip


def facts():
    paired = {"a": "128e", "b": "109e", "n": 200, "both": 130, "only_a": 20, "only_b": 13, "neither": 37,
              "difference": -0.035, "interval": [-0.09, 0.02], "p": 0.3}  # fmt: skip
    return {"title": "GPQA", "gpqa": {"runs": [run("128e", 150), run("109e", 143)], "paired": [paired]}}


def rendered(given):
    return "".join(part.html for part in gpqa.sections(values.clean(given)))


def test_every_section_is_there_and_says_what_was_counted():
    keys = [part.key for part in gpqa.sections(facts())]
    assert keys == ["gpqa", "gpqa-letters", "gpqa-lengths", "gpqa-audit"]
    text = Page(rendered(facts())).text.replace("\N{NO-BREAK SPACE}", " ")
    assert "Right answers of 109e: 71.5 % [66.5, 76.5]; guessing gives 25.0 %." in text
    assert "143 right, 56 wrong and 1 without a letter are 200." in text
    assert "109e against 128e: −3.5 points [−9.0, +2.0], p = 0.30 (they may be the same)." in text
    assert "30 of 200 answers of 109e deserve a look." in text and "29 more are in answers.jsonl" in text
    assert "right: B · read: B · strict: none · lm-eval: (A)" in text
    assert not re.search(r"\b(nan|NaN|None|null|inf|undefined)\b", text)


def test_scores_are_drawn_where_they_are_with_guessing_beside_them():
    axes = gpqa_charts.score(facts()["gpqa"]["runs"], LIGHT, WIDE).axes[0]
    points = [line.get_xdata()[0] for line in axes.lines]
    assert points == pytest.approx([25, 75, 1, 70.5, 0.5, 71.5, 1, 67, 0.5])
    ends = [list(one.get_segments()[0][:, 0]) for one in axes.collections]
    assert ends[0] == pytest.approx([70, 80]) and ends[4] == pytest.approx([66.5, 76.5])


def test_only_the_diagonal_is_right():
    html = gpqa._square("x", list("AB"), [*"AB", "none"], [[5, 1, 0], [2, 7, 3]])
    cells = re.findall(r'<td style="([^"]*)">(\d+)</td>', str(html))
    assert [int(value) for _, value in cells] == [5, 1, 0, 2, 7, 3]
    assert [int(value) for style, value in cells if "--warm" not in style] == [5, 7]


def test_the_page_has_the_sections():
    text = page.page(values.clean(facts()))
    read = Page(text)
    ids = [attributes["id"] for _, attributes in read.elements if "id" in attributes]
    assert {"gpqa", "gpqa-letters", "gpqa-lengths", "gpqa-audit"} <= set(ids) and len(ids) == len(set(ids))
    assert {a["href"][1:] for a in read.all("a") if a["href"].startswith("#")} <= set(ids)
    assert set(re.findall(r"var\((--[\w-]+)\)", text)) <= set(re.findall(r"(--[\w-]+)\s*:", text))
    assert page.page({"title": "t", "gpqa": {}}) == page.page({"title": "t"})


def test_what_models_wrote_stays_text():
    given = facts()
    evil = f"{SCRIPT}</svg>\x1b[31m"
    for one in given["gpqa"]["runs"]:
        one["name"] += evil
        one["audit"][0] |= {"question": evil, "answer": evil * 300, "excerpt": evil, "choices": [evil] * 4}
        one["by_domain"][0]["name"] = evil
    given["gpqa"]["paired"][0]["a"] = evil
    html = rendered(given)
    assert "<script" not in html and "\x1b" not in html and Page(html).all("img") == []


def test_any_one_fact_may_be_missing_or_odd(monkeypatch):
    monkeypatch.setattr(gpqa, "chart", lambda *_, **__: None)
    monkeypatch.setattr(gpqa.gpqa_charts, "score", lambda *_: None)
    monkeypatch.setattr(gpqa.tool_charts, "paired", lambda *_: None)
    original = values.clean(facts())
    odds = (None, [], "text", -1.5, 10**30, {})
    for i, path in enumerate(paths(original)):
        for odd in ("gone", odds[i % len(odds)], odds[(i + 3) % len(odds)]):
            given = copy.deepcopy(original)
            parent = given
            for step in path[:-1]:
                parent = parent[step]
            if odd == "gone":
                del parent[path[-1]]
            else:
                parent[path[-1]] = odd
            try:
                rendered(given)
            except Exception as error:
                raise AssertionError(f"{path} = {odd!r}: {error!r}") from error


def test_odd_scores_are_not_drawn():
    assert gpqa_charts.score([{"name": "x", "flexible": {"rate": None}}], LIGHT) is None
    assert gpqa_charts.score([{"name": "x", "choices": 4, "strict": {"rate": 0.5}}], LIGHT) is not None
