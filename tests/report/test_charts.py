"""The pictures show what the facts say, in any theme, and can stand in one page with each other."""

import re
from xml.etree import ElementTree

import matplotlib
import pytest

from moesmith.report import charts, poster, svg
from moesmith.report.charts import MEASURES, Line
from moesmith.report.theme import COLOURS, LIGHT, NARROW, SERIES, STAND_INS, viridis
from report.facts import build_pareto, small


def lines(picture) -> dict:
    """label -> line of a figure's one plot, labelled ones only."""
    return {line.get_label(): line for line in picture.axes[0].lines if not line.get_label().startswith("_")}


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_colours_can_be_read(theme):
    """WCAG: 4.5:1 for text, 3:1 for lines and marks, on the page and on the verdict's card."""
    for ground in ("page", "card"):
        background = COLOURS[ground][theme]
        for name in ("ink", "muted", "safe", "caution", "stop", "info"):
            assert contrast(COLOURS[name][theme], background) >= 4.5, (name, ground)
        for name in SERIES:
            assert contrast(COLOURS[name][theme], background) >= 3, (name, ground)


def test_the_heatmap_scale_gets_lighter_all_the_way():
    shades = [luminance(colour) for colour in viridis()]
    assert shades == sorted(shades) and shades[-1] > 20 * shades[0]


def test_curves_look_like_what_they_are():
    facts = small()["pareto"]
    found = lines(charts.pareto(facts, MEASURES[0], LIGHT))
    assert {series["name"] for series in facts["series"]} <= found.keys()
    assert found["contribution"].get_linestyle() == "-" and found["merge ream"].get_linestyle() == "--"
    healed = found["contribution + heal"]
    assert healed.get_marker() == "*" and healed.get_color() == found["contribution"].get_color()
    colours = [found[series["name"]].get_color() for series in facts["series"] if series["kind"] != "healed"]
    assert len(set(colours)) == len(colours)
    assert list(found["contribution"].get_xdata()) == [8, 12, 14, 15], "by experts kept, whatever the order"
    points = {point["keep"]: point["kl"] for point in facts["series"][0]["points"]}
    assert list(found["contribution"].get_ydata()) == [points[keep] for keep in (8, 12, 14, 15)]


def test_random_choices_are_a_grey_band_and_one_count_is_a_bar():
    facts = small()["pareto"]
    assert [c.get_label() for c in charts.pareto(facts, MEASURES[0], LIGHT).axes[0].collections][
        0
    ] == "random, range"
    facts["random_band"] = facts["random_band"][:1]
    band = charts.pareto(facts, MEASURES[0], LIGHT).axes[0].collections[0]
    assert band.get_label() == "random, range" and band.get_linewidth()[0] > 5


def test_a_wide_range_is_drawn_on_a_log_scale_and_a_narrow_one_is_not():
    facts = build_pareto(16, [(8, 1.0), (15, 0.01)])
    assert charts.pareto(facts, MEASURES[0], LIGHT).axes[0].get_yscale() == "log"
    narrow = build_pareto(16, [(14, 0.02), (15, 0.01)])
    picture = charts.pareto(narrow, MEASURES[0], LIGHT)
    assert picture.axes[0].get_yscale() == "linear" and "original" in lines(picture)
    zero = build_pareto(16, [(8, 1.0), (15, 0.01), (16, 0.0)])
    assert list(lines(charts.pareto(zero, MEASURES[0], LIGHT))["one"].get_xdata()) == [8, 15], "no log of 0"


def test_a_measure_nobody_has_is_no_picture():
    facts = build_pareto(16, [(8, 1.0), (15, 0.01)])
    made = [charts.pareto(facts, measure, LIGHT, NARROW) is not None for measure in MEASURES]
    assert made == [True, False, False, False]
    assert charts.pareto({}, MEASURES[0], LIGHT) is None and charts.lorenz({}, LIGHT) is None
    assert charts.heatmap({}, LIGHT) is None and charts.by_layer([], [Line("x", [None])], "y", LIGHT) is None


def test_lines_over_layers_leave_gaps_and_ring_the_worst():
    line = Line("kept", [0.9, None, 0.8], [[0.85, 0.95], None, [None, 0.9]])
    picture = charts.by_layer(["3", "5", "7"], [line], "share", LIGHT, 100, worst=2)
    found = lines(picture)
    assert found["kept"].get_ydata()[0] == 90 and str(found["kept"].get_ydata()[1]) == "nan"
    assert list(found["worst: layer 7"].get_ydata()) == [80]
    assert len(picture.axes[0].collections) == 1, "one whole interval of three"


def test_inline_svg_takes_the_pages_colours_and_font():
    facts = build_pareto(16, [(8, 1.0), (15, 0.01)], name="a <b> & $c$ 'd'")
    text = svg.inline(
        charts.pareto(facts, MEASURES[0], STAND_INS), "one", 'what it "shows"', **{"class": "chart"}
    )
    root = ElementTree.fromstring(text)
    assert root.get("aria-label") == 'what it "shows"' and root.get("role") == "img"
    assert not re.search(r"#0101[0-9a-f]{2}", text), "a stand-in was left"
    assert set(re.findall(r"var\(--(\w+)\)", text)) <= COLOURS.keys()
    assert "font-family" not in text and "<style" not in text and "metadata" not in text
    assert "a <b> & $c$ 'd'" in [element.text for element in root.iter("text")], (
        "text is text, dollars are no math"
    )


def test_ids_of_two_pictures_do_not_meet():
    facts = small()["pareto"]
    texts = [svg.inline(charts.pareto(facts, MEASURES[0], STAND_INS), name, "") for name in ("one", "two")]
    ids = [set(re.findall(r'\bid="([^"]+)"', text)) for text in texts]
    assert ids[0] and not ids[0] & ids[1]
    for text, own in zip(texts, ids, strict=True):
        assert set(re.findall(r"#([\w-]+)\)|href=\"#([\w-]+)\"", text)) <= {(i, "") for i in own} | {
            ("", i) for i in own
        }


def test_the_users_matplotlib_settings_neither_matter_nor_change():
    facts = build_pareto(16, [(8, 1.0), (15, 0.01)])

    def drawn() -> str:
        return svg.inline(charts.pareto(facts, MEASURES[0], STAND_INS), "x", "")

    plain = drawn()
    with matplotlib.rc_context({"font.size": 31, "xtick.direction": "in", "axes.linewidth": 9}):
        assert drawn() == plain
        assert matplotlib.rcParams["font.size"] == 31


@pytest.mark.parametrize("keep", [["pareto"], ["heatmap"], ["retained"], []], ids=str)
def test_the_png_is_the_decisive_picture(keep):
    facts = small()
    facts = {key: facts[key] for key in ("title", "verdict", *keep)}
    image = poster.png(facts)
    assert image.startswith(b"\x89PNG") and len(image) > 5000
    assert poster.png(facts) == image, "the same facts, the same bytes"
