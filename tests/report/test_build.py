"""The page of a built model: what it says is what the facts say, whatever is missing, whatever names hold."""

import copy
import re

import pytest

from moesmith.report import build, build_charts, build_tables, charts, poster, sections, tables, values
from moesmith.report.theme import LIGHT, NARROW, WIDE
from report.build_facts import degenerate, divided, many, moe
from report.facts import SCRIPT, small
from report.test_page import Page, cheap, paths, rendered

EVERY = {"moe": moe, "many": many, "divided": divided, "degenerate": degenerate}
DRAWN = ("perplexity", "depth", "shares", "positions", "load", "energy", "split", "gap_by_domain")


@pytest.fixture(scope="module", params=EVERY)
def whole(request) -> tuple[str, str]:
    return request.param, rendered(EVERY[request.param]())


@pytest.fixture
def undrawn(monkeypatch):
    for name in DRAWN:
        monkeypatch.setattr(build_charts, name, cheap(getattr(build_charts, name)))


def keys(read: Page) -> list[str]:
    return [attributes["id"] for attributes in read.all("section")]


def words(facts: dict) -> str:
    return Page(rendered(facts)).text.replace("\N{NO-BREAK SPACE}", " ")


def test_the_page_is_whole_and_its_links_lead_somewhere(whole):
    name, text = whole
    read = Page(text)
    ids = [attributes["id"] for _, attributes in read.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {a["href"][1:] for a in read.all("a") if a["href"].startswith("#")} <= set(ids)
    assert not re.search(r"\b(nan|NaN|None|null|inf|undefined)\b", read.text)
    assert all(len(a["aria-label"]) > 10 and a["role"] == "img" for a in read.all("svg"))
    assert set(re.findall(r"var\((--[\w-]+)", text)) <= set(re.findall(r"(--[\w-]+)\s*:", text))
    expected = {
        "moe": ["perplexity", "routing", "load", "built", "tables", "how"],
        "many": ["perplexity", "routing", "load", "built", "tables", "how"],
        "divided": ["perplexity", "load", "split", "built", "tables", "how"],
        "degenerate": ["perplexity", "routing", "load", "built", "tables"],
    }
    assert keys(read) == expected[name]


def test_the_finding_is_said_with_its_interval():
    text = words(moe())
    assert (
        "closes 83 % [79, 87] of the gap between random routing and the oracle; embed closes 41 % [36, 47]"
        in text
    )
    assert "oracle − base −0.1570 [−0.1900, −0.1300]" in text
    assert "75.2 % [72.2, 77.2] of the tokens go to their label's expert first (chance 25.0 %)" in text
    assert "Layer 15 tells the experts apart best, 85.8 %; layer 0 least, 35.6 %" in text
    assert (
        "Collapsed (less than a tenth of an even share): Coding Expert in layer 7; prose in layers 0, 1, 2."
        in text
    )
    assert (
        "372 M in all, 214 M active per token" in text and "665 MB copied byte for byte, 80.1 MB made" in text
    )
    assert "science-lora: 90 matrices merged, left out 30 k_proj, 30 q_proj" in text
    assert "too much" not in text and "Not held out" not in text


def test_what_is_wrong_is_said():
    text = words(degenerate())
    assert "For information There is nothing for a router to gain." in text, (
        "the build's own sentence opens the page"
    )
    assert "No share of a gap" not in text  # all experts are the same: no wonder
    other = degenerate()
    other["build"]["identical"] = False
    assert "No share of a gap can be given: random routing is not above the oracle." in words(other)
    assert (
        "All experts are the same" in text
        and "held-out text" not in text
        and "This is too much." in text
        and "Not held out." in text
    )
    facts = moe()
    facts["build"]["perplexity"]["gap_closed"] |= {
        "ci": None,
        "reason": "no interval: a domain has one document",
    }
    assert "closes 83 % of the gap" in words(facts) and "No interval: a domain has one document." in words(
        facts
    )


def test_what_is_lost_between_the_fit_and_the_model_is_said():
    assert "As fitted" not in words(moe()), "one point is not worth a sentence"
    facts = moe()
    for row in facts["build"]["routing"]["layers"]:
        row["accuracy"] = row["by_method"]["probe"] - 0.3
    assert "As fitted, on what the base's FFNs read, it was 76.2 %: in the model the experts" in words(facts)


def test_the_first_token_alone_is_no_loss():
    """Prompts of 4 tokens: a quarter of what is judged is a first token, which no fit counts."""
    facts = moe()
    routing = facts["build"]["routing"]
    routing |= {"tokens": 400, "positions": [{"from": 0, "to": 0, "accuracy": 0.25, "tokens": 100}]}
    for row in routing["layers"]:
        row["by_method"]["probe"] = 0.65
        row["accuracy"] = (3 * 0.65 + 0.25) / 4
    assert "As fitted" not in words(facts)
    routing["positions"] = []
    assert "As fitted" in words(facts)


def test_little_text_is_said():
    facts = moe()
    build = facts["build"]
    assert "One domain has" not in words(facts)
    assert "In 95 of 96 documents the most used expert is the label's." in words(facts)
    build["perplexity"]["fewest"] = 2
    assert "One domain has 2 documents, so the intervals are narrower than they should be" in words(facts)
    build["perplexity"]["fewest"] = 1
    assert "a single document, which has no interval" in words(facts)
    routing = build["routing"]
    routing["confusion"][3] = [None] * 4
    routing["chance"] = 1.0
    text = words(facts)
    assert "No text of prose was judged" in text and "Collapsed (less than" in text
    assert "prose in layers" not in text, "without text of its own it need not be used"
    assert "chance, top-k" not in rendered(facts), "all experts are chosen: nothing to draw"


def test_long_names_and_many_domains_have_an_end():
    found = moe()["build"]
    found["perplexity"]["rows"][-1]["name"] = "n" * 100
    table = build._by_domain(found["perplexity"])
    assert "n" * 59 + "…" in str(table) and "n" * 60 not in str(table)
    gap = found["perplexity"]["gap_closed"]
    gap["by_domain"] = {f"domain {n}": 0.5 for n in range(build_charts.MANY + 1)}
    assert build_charts.gap_by_domain(found, LIGHT) is None


def test_a_split_has_no_oracle_and_says_what_it_keeps():
    text = words(divided())
    assert (
        "against other routing and the dense model?" in text
        and "gap between" not in text.split("Perplexity by")[1]
    )
    assert re.search(
        r"keeps 8\d\.\d % of what the dense FFN writes, mean of the layers; 50\.\d % with parts", text
    )
    assert (
        "Loss on text, nats per token: dense 2.71, split 2.98." in text
        and "expert 15 in layers 0, 1, 2" in text
    )


@pytest.mark.parametrize("key", ["routing", "perplexity", "split", "modes", "experts", "proof", "class"])
def test_any_part_alone(key):
    facts = divided() if key in ("split", "modes") else moe()
    read = Page(rendered({"build": {key: facts["build"][key]}}))
    own = {"routing": ["routing", "load", "tables"], "perplexity": ["perplexity", "tables"],
           "split": ["split", "tables"], "modes": ["built", "tables"]}  # fmt: skip
    assert keys(read) == own.get(key, ["built"])


@pytest.mark.parametrize("nothing", [None, {}, [], "", 0, "text", [None], {"x": None}], ids=str)
def test_nothing_is_no_section_and_changes_no_byte(nothing):
    assert rendered({"title": "t", "build": nothing}) == rendered({"title": "t"})


def test_other_pages_do_not_carry_the_style():
    assert "table.ppl" in rendered({"build": {"class": "X"}}) and "table.ppl" not in rendered({"title": "t"})


@pytest.mark.parametrize("make", [moe, divided])
def test_any_one_fact_may_be_missing_or_odd(make, undrawn):
    original = values.clean({"build": make()["build"]})
    for path in list(paths(original)):
        for odd in ("gone", None, [], {}, "text", -1.5):
            facts = copy.deepcopy(original)
            parent = facts
            for step in path[:-1]:
                parent = parent[step]
            if odd == "gone":
                del parent[path[-1]]
            else:
                parent[path[-1]] = odd
            try:
                Page("".join(part.html for part in [*build.sections(facts), *tables.build(facts)]))
            except Exception as error:
                raise AssertionError(f"{path} = {odd!r}: {error!r}") from error


def test_names_are_text():
    evil = f"{SCRIPT}</svg>\x1b[31m\n$x$"

    def spoil(value):
        if isinstance(value, str):
            return value if value in ("router", "control", "oracle", "source") else value + evil
        if isinstance(value, list):
            return [spoil(item) for item in value]
        return {key: spoil(item) for key, item in value.items()} if isinstance(value, dict) else value

    facts = spoil(moe())
    facts["build"]["perplexity"]["domains"] = ["code" + evil]
    for row in facts["build"]["perplexity"]["rows"]:
        row["by_domain"] = {name + evil: value for name, value in row["by_domain"].items()}
    for row in facts["build"]["routing"]["layers"]:
        row["by_method"] = {name + evil: value for name, value in row["by_method"].items()}
    text = rendered(facts)
    read = Page(text)
    assert len(re.findall("<script", text)) == 1 and read.all("img") == []
    assert not [a for _, a in read.elements if "onerror" in a] and "\x1b" not in text
    assert SCRIPT in read.text


def test_perplexities_stand_where_they_are():
    facts = moe()["build"]["perplexity"]
    axes = build_charts.perplexity(facts, LIGHT, WIDE).axes[0]
    drawn = [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == "None"]
    assert drawn == [row["mean"] for row in facts["rows"]] and axes.get_xscale() == "linear"
    names = [tick.get_text() for tick in axes.get_yticklabels()]
    assert names[:2] == ["probe (this model)", "routed otherwise"] and names[-1] == "science-lora (dense)"
    shade = axes.patches[0].get_extents().transformed(axes.transData.inverted())
    means = {row["kind"] + row["key"]: row["mean"] for row in facts["rows"]}
    assert [shade.x0, shade.x1] == pytest.approx([means["oracleoracle"], means["controlrandom"]])
    assert build_charts.perplexity(many()["build"]["perplexity"], LIGHT, NARROW).axes[0].get_xscale() == "log"
    assert build_charts.perplexity({"rows": [{"name": "x", "mean": None}]}, LIGHT) is None


def test_routing_is_drawn_against_chance():
    facts = moe()["build"]
    lines = {line.get_label(): line for line in build_charts.depth(facts, LIGHT).axes[0].lines}
    own = lines["probe (this model)"]
    assert list(own.get_ydata()) == [100 * row["accuracy"] for row in facts["routing"]["layers"]]
    assert own.get_linewidth() > lines["lda"].get_linewidth()
    assert lines["probe, as fitted"].get_linestyle() == "--" and "probe" not in lines
    assert set(lines["chance"].get_ydata()) == {25.0}
    shares = {line.get_label(): line for line in build_charts.shares(facts, LIGHT).axes[0].lines}
    assert shares["chance, top-k"].get_ydata()[0] == 50 and shares["chance, share"].get_ydata()[0] == 25
    del facts["routing"]["chance_top1"]
    assert build_charts.chances(facts) == (0.25, 0.5), "from the experts, where it is not said"


def test_the_load_has_a_cell_for_every_figure_and_a_cross_for_the_collapsed():
    rows = moe()["build"]["routing"]["layers"]
    rows[4]["load"][1] = None
    assert build_charts.collapsed(rows) == [(0, 3), (1, 3), (2, 3), (7, 0)]
    axes = build_charts.load(rows, list("abcd"), LIGHT, NARROW).axes[0]
    cells = sum(len(patch.get_path().to_polygons()) for patch in axes.patches)
    assert cells == 4 * len(rows) - 1 and len(axes.lines[0].get_xdata()) == 4


def test_every_tinted_figure_says_how_far_it_is_from_the_best():
    text = rendered(moe())
    table = re.search(r'<table id="t-perplexity".*?</table>', text, re.S).group()
    assert table.count('class="best"') == 4 and "--v:0%" in table and "--v:52%" not in table
    assert '<td class="best" style="--tone:var(--warm);--v:0%">4.300</td>' in table


def test_the_png_shows_the_perplexities_of_a_build(monkeypatch):
    facts = small(build=moe()["build"])
    monkeypatch.setattr(charts, "pareto", lambda *_: pytest.fail("the perplexities decide"))
    image = poster.png(facts)
    assert image.startswith(b"\x89PNG") and poster.png(facts) == image
    del facts["build"]["perplexity"]
    assert poster.png(facts) != image, "the routing by layer"


def test_tables_stand_behind_the_pictures():
    made = {maker.__name__ for maker in build_tables.MAKERS if maker(moe())}
    assert made == {"differences", "layers", "positions"}
    assert {maker.__name__ for maker in build_tables.MAKERS if maker(divided())} >= {"energy", "split"}
    assert sections.build({"build": moe()["build"]}) == []
