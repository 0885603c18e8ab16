"""The page: whole, in order, without the network, and nothing a model wrote becomes markup."""

import base64
import copy
import hashlib
import json
import math
import re
from html.parser import HTMLParser

import pytest

from moesmith import report
from moesmith.report import page, sections, tables, values, write_report
from report.facts import SCRIPT, big, build, small

SECTIONS = [
    "pareto", "heatmap", "retained", "concentration", "domains", "reliability", "agreement", "units",
    "similarity", "canary", "divergence", "how", "notes",
]  # fmt: skip
EMPTY = {"meta", "input", "br", "link", "img"}


class Page(HTMLParser):
    """A page as a browser reads it: elements, text outside of scripts and styles; tags must match."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == [], "tags that are not closed"

    def handle_starttag(self, name, attributes):
        self.elements.append((name, dict(attributes)))
        if name not in EMPTY:
            self.open.append(name)

    def handle_startendtag(self, name, attributes):
        self.elements.append((name, dict(attributes)))

    def handle_endtag(self, name):
        assert self.open and self.open.pop() == name, f"</{name}> closes something else"

    def handle_data(self, data):
        if not set(self.open) & {"script", "style"}:
            self.words.append(data)

    def all(self, name: str) -> list[dict]:
        return [attributes for element, attributes in self.elements if element == name]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


DRAWN = ("lorenz", "by_layer", "intervals", "heatmap", "pareto")


@pytest.fixture
def undrawn(monkeypatch):
    """Without pictures, which take most of a page's time."""
    for name in DRAWN:
        monkeypatch.setattr(sections.charts, name, lambda *_, **__: None)


def rendered(facts: dict) -> str:
    return page.page(values.clean(facts))


@pytest.fixture(scope="module")
def whole() -> str:
    return rendered(small())


@pytest.fixture(scope="module")
def read(whole) -> Page:
    return Page(whole)


def test_three_files_and_the_json_is_what_was_given(tmp_path):
    facts = small()
    path = write_report(tmp_path / "new" / "folder", facts)
    assert path == tmp_path / "new" / "folder" / "report.html"
    assert sorted(p.name for p in path.parent.iterdir()) == ["report.html", "report.json", "report.png"]

    def never(constant):
        raise AssertionError(f"{constant} is no JSON")

    read = json.loads((path.parent / "report.json").read_text(encoding="utf-8"), parse_constant=never)
    assert read["pareto"] == facts["pareto"] and read["retained"] == facts["retained"]
    assert read["heatmap"]["statistics"]["contribution"]["by_domain"]["math"][0][0] > 0
    assert (path.parent / "report.png").read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_mode & 0o044, "readable like any other file"


def test_a_page_that_fails_leaves_the_old_one_and_the_new_json(tmp_path, monkeypatch):
    write_report(tmp_path, {"title": "first"})
    replace = report.os.replace

    def full(source, target):
        if str(target).endswith("html"):
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(report.os, "replace", full)
    with pytest.raises(OSError):
        write_report(tmp_path, {"title": "second"})
    assert "first" in (tmp_path / "report.html").read_text()
    assert json.loads((tmp_path / "report.json").read_text())["title"] == "second"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.json", "report.png"]


def test_the_order_is_verdict_pictures_tables_how(whole):
    verdict, picture = whole.index('class="sentence"'), whole.index("<svg")
    assert verdict < picture < whole.rindex("<svg") < whole.index('id="tables"') < whole.index('id="how"')


def test_tags_match_ids_are_unique_and_links_lead_somewhere(read):
    ids = [attributes["id"] for _, attributes in read.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    local = [a["href"][1:] for name, a in read.elements if name == "a" and a["href"].startswith("#")]
    assert set(local) <= set(ids)
    assert {a["for"] for a in read.all("label") if "for" in a} <= set(ids)
    assert {a["href"] for a in read.all("a") if not a["href"].startswith("#")} == {
        "report.json",
        "report.png",
    }


def test_nothing_is_loaded_from_anywhere(whole, read):
    assert [a for _, a in read.elements if {"src", "srcset", "action", "data", "poster"} & a.keys()] == []
    assert read.all("link") == [] and read.all("iframe") == []
    assert not re.search(r"@import|url\((?!#)|https?://", whole)


def test_the_policy_allows_our_script_and_no_other(whole, read):
    policy = next(a["content"] for a in read.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    scripts = re.findall(r"<script>(.*?)</script>", whole, re.S)
    assert len(scripts) == 1
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy


def test_what_a_model_wrote_stays_text(read):
    assert SCRIPT in read.text
    assert read.all("img") == [] and read.all("b") == [{}], "one <b>, ours, in the warning"
    assert len(read.all("script")) == 2 and not [
        a for _, a in read.elements if any(k.startswith("on") for k in a)
    ]


def test_markup_anywhere_in_the_facts_stays_text(undrawn):
    """Every string and every key of the facts is hostile."""
    evil = '</script><script>1</script>"><svg onload=1>{{css}}$x$'

    def spoil(value):
        if isinstance(value, str):
            return value + evil
        if isinstance(value, list):
            return [spoil(item) for item in value]
        return {key: spoil(item) for key, item in value.items()} if isinstance(value, dict) else value

    facts = spoil(small())
    heat = facts["heatmap"]["statistics"]["contribution"]
    heat["by_domain"] = {name + evil: rows for name, rows in heat["by_domain"].items()}
    facts["how"] = {key + evil: value for key, value in facts["how"].items()}
    text = rendered(facts)
    assert len(re.findall("<script", text)) == 2
    read = Page(text)
    assert not [a for _, a in read.elements if "onload" in a]
    assert read.text.count("{{css}}") > 20


def test_no_figure_is_an_en_dash_and_valid_json(tmp_path, read, undrawn):
    facts = small()
    facts["retained"][0]["norm"] = math.nan
    facts["pareto"]["series"][0]["points"][1]["top1"] = None
    facts["divergence"][0]["kl_p99"] = math.inf
    facts["concentration"]["gini"][2] = math.nan
    facts["agreement"]["spearman"][0][1] = math.nan
    path = write_report(tmp_path, facts)
    json.loads((tmp_path / "report.json").read_text(), parse_constant=lambda _: pytest.fail("NaN in JSON"))
    text = Page(path.read_text(encoding="utf-8")).text
    assert not re.search(r"\b(nan|NaN|None|null|inf|undefined)\b", text)
    assert text.count("–") > read.text.count("–") + 3


@pytest.mark.parametrize("level", ["safe", "caution", "stop", "info", "strange", None])
def test_the_verdict_has_words_beside_its_colour(level):
    read = Page(rendered({"verdict": {"level": level, "sentence": "Do <this>.", "points": ["a", "b"]}}))
    word = {"safe": "Safe", "caution": "Caution", "stop": "Stop"}.get(level, "For information")
    assert re.search(rf"{word} Do <this>\. a b", read.text)
    assert f"verdict {level if level in ('safe', 'caution', 'stop') else 'info'}" in [
        a.get("class") for a in read.all("div")
    ]


def test_no_verdict_no_box_and_nothing_at_all_is_still_a_page():
    read = Page(rendered({}))
    assert "verdict" not in str(read.elements) and read.all("h2") == [] and read.all("nav") == []
    assert rendered({"verdict": {"level": "safe"}}).count('class="verdict') == 0


@pytest.mark.parametrize("key", SECTIONS)
def test_a_section_alone_and_no_other(key):
    text = rendered({key: small()[key]})
    headings = Page(text).all("section")
    own = {"units": ["agreement", "tables"], "canary": ["canary", "tables"], "domains": ["domains"],
           "how": ["how"], "heatmap": ["heatmap"], "notes": ["notes"]}.get(key, [key, "tables"])  # fmt: skip
    assert [a["id"] for a in headings] == own


@pytest.mark.parametrize("nothing", [None, {}, [], "", 0, "text", [None], {"x": None}], ids=str)
@pytest.mark.parametrize("key", [key for key in SECTIONS if key not in ("how", "notes")])
def test_a_section_of_nothing_leaves_no_heading(key, nothing):
    assert Page(rendered({key: nothing})).all("section") == []


def paths(value, at=()):
    """Every place in nested facts, of lists the first item only."""
    items = (
        value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    )
    for key, item in items:
        yield (*at, key)
        yield from paths(item, (*at, key))


@pytest.mark.parametrize("key", SECTIONS)
def test_any_one_fact_may_be_missing_or_odd(key, monkeypatch):
    """A report is written after hours of work: what one writer left out must not cost the rest."""
    original = values.clean({key: build(2, 4, 2, ["contribution"], ["math", "code"], "mini")[key]})
    for name in DRAWN:
        monkeypatch.setattr(sections.charts, name, cheap(getattr(sections.charts, name)))
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
                Page("".join(part.html for part in [*sections.build(facts), *tables.build(facts)]))
            except Exception as error:
                raise AssertionError(f"{path} = {odd!r}: {error!r}") from error


def cheap(draw):
    """A chart that is made, so that it may fail, in one of 150 calls: drawing takes long."""
    calls = iter(range(10**9))
    return lambda *args, **more: draw(*args, **more) if next(calls) % 150 == 0 else None


def test_the_worst_layer_and_the_best_candidate_are_bold(whole):
    facts = small()
    worst = min(facts["retained"], key=lambda row: row["norm"])
    row = re.search(r'<tr class="worst"><th scope="row">(\w+)</th>', whole)
    assert row and row.group(1) == worst["layer"]
    assert whole.count('<td class="best">') == len({row["keep"] for row in facts["pareto"]["random_band"]})
    best = re.findall(r'<td class="words">([^<]+)</td><td class="best">', whole)
    assert best == [
        "contribution",
        "contribution + heal (healed)",
        "contribution + heal (healed)",
        "contribution",
    ]


def test_every_picture_has_words_and_a_table(read):
    pictures = read.all("svg")
    assert len(pictures) > 10 and all(len(a["aria-label"]) > 10 and a["role"] == "img" for a in pictures)
    ids = {a.get("id") for a in read.all("table")}
    assert {"t-candidates", "t-divergence", "t-retained", "t-concentration", "t-reliability", "t-similarity",
            "t-canary", "t-criteria", "t-units"} <= ids  # fmt: skip
    assert len(read.all("caption")) == len(read.all("table"))


def test_backticks_are_code_and_still_escaped():
    text = rendered({"verdict": {"sentence": "s", "points": ["run `moesmith <x>` now"]}})
    assert "run <code>moesmith &lt;x&gt;</code> now" in text


def test_control_characters_and_empty_answers_are_shown(read):
    assert "A bell \\x07, an escape \\x1b[31m" in read.text and "(empty answer)" in read.text
    assert "14 of 16 experts loops" in read.text


def test_long_answers_are_cut_and_say_so():
    sample = {"prompt": "p", "a": "x" * 9000, "b": "y"}
    text = rendered({"canary": {"samples": [sample] * 30}})
    assert (
        "5,000 more characters in report.json" in text and "18 more samples" in text and len(text) < 150_000
    )


def test_variables_of_the_style_are_defined(whole):
    defined = set(re.findall(r"(--[\w-]+)\s*:", whole))
    assert set(re.findall(r"var\((--[\w-]+)", whole)) <= defined


def test_the_largest_page_stays_below_a_megabyte(tmp_path):
    path = write_report(tmp_path, big())
    assert path.stat().st_size < 1_000_000
    data = json.loads(re.search(r'id="heat-data">(.*?)</script>', path.read_text(), re.S).group(1))
    assert len(data["statistics"]) == 10 and len(data["domains"]) == 7
    packed = data["statistics"]["contribution"]["by_domain"]["code"]
    back, given = values.unpack(packed), big()["heatmap"]["statistics"]["contribution"]["by_domain"]["code"]
    assert back[29][127] == pytest.approx(given[29][127], rel=0.003)


def test_a_map_too_large_for_a_page_keeps_all_domains_together_and_says_so():
    facts = big()["heatmap"]
    rows = [[1.0, 2.0] * 128] * 64
    for statistic in facts["statistics"].values():
        statistic["by_domain"] = {name: rows for name in statistic["by_domain"]}
    text = rendered({"heatmap": facts})
    assert len(text) < 1_000_000 and "Too large for a page, so without domains: " in text
    data = json.loads(re.search(r'id="heat-data">(.*?)</script>', text, re.S).group(1))
    assert all("all" in statistic["by_domain"] for statistic in data["statistics"].values())
