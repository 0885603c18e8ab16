"""The page of transfers: the sentence, the bars and the table say what the statistics hold."""

import math
import re

import pytest

from moesmith.report import poster, transfers, values, write_report
from moesmith.report.theme import LIGHT, NARROW, WIDE
from report.test_page import Page, cheap, rendered

MB = 1_000_000


def statistics(**changes) -> dict:
    """Two layers and ten tokens."""
    layers = [
        {"layer": "model.layers.0.mlp.experts", "bytes": 300 * MB, "fetches": 30, "hits": 50, "misses": 30,
         "stall_s": 1.5, "slack_s": 0.0},
        {"layer": "model.layers.1.mlp.experts", "bytes": 100 * MB, "fetches": 10, "hits": 70, "misses": 10,
         "stall_s": 0.05, "slack_s": 0.25},
    ]  # fmt: skip
    return {
        "link": "cpu", "layers": layers, "bytes": 400 * MB, "seconds": 0.4, "bandwidth": 1e9,
        "hit_rate": 0.75, "predicted": 20, "predicted_right": 15, "tokens": 10, "bytes_per_token": 40 * MB,
        "elapsed": 3.1, "link_bandwidth": 2e9, "experts_bytes": 800 * MB, **changes,
    }  # fmt: skip


def page(found: dict) -> Page:
    return Page(rendered({"title": "t", "verdict": transfers.verdict(found), "transfers": found}))


def test_the_page_opens_with_a_sentence_and_its_parts_are_in_order():
    read = page(statistics())
    assert (
        "40.0 MB of experts were fetched for each token, and computing waited for them 50 % of the time."
        in read.text
    )
    assert [a["id"] for a in read.all("section")] == ["transfers", "moved", "transfer-figures"]
    assert {a["href"][1:] for a in read.all("a") if a["href"].startswith("#")} <= {
        attributes["id"] for _, attributes in read.elements if "id" in attributes
    }
    assert not re.search(r"\b(nan|NaN|None|null|inf)\b", read.text)


def test_what_is_said_is_what_the_figures_are():
    text = page(statistics()).text
    assert "75.0 % of the experts asked for were there already, or on their way." in text
    assert "moving whole layers for each token would take 20.0 times as much" in text
    assert "The link (cpu) moved 1.0 GB/s, 50 % of the 2.0 GB/s that it gives alone." in text
    assert "Of 20 experts expected ahead, 75.0 % were asked for." in text
    assert "Computing waited 1.6 s for experts, most at layer 0 (1.5 s)." in text
    assert "all 400 MB 40 120 40 75.0 % 1.55 0.250" in text, "the last row adds the layers up"


def test_mapped_experts_are_computed_with_where_they_are():
    text = page(statistics(in_memory=0.9, seconds=0.0, bandwidth=None)).text
    assert "40.0 MB of mapped experts were read for each token; 90.0 % of that was in memory" in text


def test_nothing_fetched_is_said():
    none = statistics(bytes=0, layers=[], bandwidth=None)
    assert "Nothing was fetched" in page(none).text
    assert transfers.verdict({}) == {}


def test_a_figure_that_is_missing_or_no_figure_leaves_a_page(monkeypatch):
    for name in ("stalls", "_link"):
        monkeypatch.setattr(transfers, name, cheap(getattr(transfers, name)))
    monkeypatch.setattr(transfers.charts, "by_layer", lambda *_, **__: None)
    for key in statistics():
        for value in (None, math.nan, "word", []):
            text = page(statistics(**{key: value})).text
            assert not re.search(r"\b(nan|NaN|None|null|inf)\b", text), (key, value)


def test_layers_without_figures_leave_a_page():
    hollow = {"layer": None, "bytes": None, "hits": math.nan, "stall_s": None}
    text = page(statistics(layers=[hollow, {}])).text
    assert not re.search(r"\b(nan|NaN|None|null|inf)\b", text)


@pytest.mark.parametrize("size", [WIDE, NARROW])
def test_bars_are_milliseconds_per_token_up_for_stall_and_down_for_slack(size):
    axes = transfers.stalls(statistics(), LIGHT, size).axes[0]
    heights = [bar.get_height() for bar in axes.patches]
    assert heights == pytest.approx([150, 5, 0, -25])


def test_without_tokens_bars_are_seconds():
    axes = transfers.stalls(statistics(tokens=None), LIGHT).axes[0]
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([1.5, 0.05, 0, -0.25])
    assert axes.get_ylabel() == "seconds"


def test_all_three_files_are_written_and_the_picture_is_of_the_stalls(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(transfers, "stalls", lambda *a, real=transfers.stalls: drawn.append(a) or real(*a))
    monkeypatch.setattr(transfers, "waiting", lambda found: None)
    write_report(tmp_path, {"title": "t", "transfers": statistics()})
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "report.json", "report.png"}
    assert len(drawn) == 1 and poster.transfers is transfers and values.clean(drawn[0][0]) == statistics()
