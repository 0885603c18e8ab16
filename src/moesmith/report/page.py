"""Facts to one HTML page that needs nothing beside it: style, script, pictures and figures are inside.

The page's own policy forbids every load from anywhere and every script but ours (by its hash), so text a
model wrote stays text even if escaping had a hole.
"""

from __future__ import annotations

import base64
import hashlib
import re
from importlib import resources
from typing import Any

from . import build, gpqa, loop, pairs, sections, tables, tasks, tool_tables, tools, transfers
from .markup import Html, join, prose, tag
from .parts import Section, verdict
from .theme import COLOURS
from .values import visible

LEVELS = {  # level -> (sign, word)
    "safe": ("✓", "Safe"),
    "caution": ("!", "Caution"),
    "stop": ("✕", "Stop"),
    "info": ("i", "For information"),
}


def page(facts: dict[str, Any]) -> str:
    """The page for `facts`, which are plain JSON data (`values.clean`)."""
    built, asked = build.sections(facts), _asked(facts)
    parts = [*built, *asked, *transfers.sections(facts), *sections.build(facts), *tables.build(facts)]
    script = _file("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    filled = {
        "policy": f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'",
        "title": join(facts.get("title") or "moesmith report"),
        "colours": _colours(),
        "css": join(
            _file("page.css"),
            [["\n", _file(f"{name}.css")] for name, there in (("build", built), ("loop", asked)) if there],
        ),
        "js": script,
        "body": join(
            _header(facts, parts),
            tag("main", [part.html for part in parts], id="main"),
            tag("footer", _footer(facts)),
        ),
    }
    # One pass: a slot's name inside of what was filled in is text.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: filled[match.group(1)], _file("page.html"))


def _asked(facts: dict[str, Any]) -> list[Section]:
    """Sections of rounds, calls, pairs, benchmarks: first what came out, then how, then what was written."""
    rounds, calls = loop.sections(facts), tools.sections(facts)
    last = [part for part in calls if part.key == "samples"]
    parts = [*rounds[:1], *(part for part in calls if part not in last), *rounds[1:], *pairs.sections(facts)]
    parts += [*tasks.sections(facts), *gpqa.sections(facts)]
    figures = tool_tables.build(facts)
    return [*parts, *last, *([figures] if figures else [])]


def _header(facts: dict[str, Any], parts: list[Section]) -> Html:
    subtitle = facts.get("subtitle")
    title = tag(
        "div",
        tag("h1", facts.get("title") or "moesmith report"),
        tag("p", subtitle, class_="subtitle") if subtitle else None,
    )
    button = tag("button", "Theme: auto", id="theme", type="button", hidden=True)
    links = [tag("a", part.short, href=f"#{part.key}") for part in parts]
    contents = tag("nav", links, aria_label="Contents") if len(links) > 1 else None
    return tag("header", tag("div", title, button, class_="top"), _verdict(verdict(facts)), contents)


def _verdict(found: dict[str, Any]) -> Html | None:
    if not found.get("sentence"):
        return None
    level = found.get("level")
    level = level if level in LEVELS else "info"
    sign, word = LEVELS[level]
    word = found.get("word") or word
    points = found.get("points") if isinstance(found.get("points"), list) else []
    return tag(
        "div",
        tag("p", tag("i", sign, aria_hidden="true"), word, class_="level"),
        tag("p", found["sentence"], class_="sentence"),
        tag("ul", [tag("li", prose(point)) for point in points or []]) if points else None,
        class_=f"verdict {level}",
        role="region",
        aria_label="Verdict",
    )


def _footer(facts: dict[str, Any]) -> Html:
    versions = (facts.get("how") or {}).get("versions") if isinstance(facts.get("how"), dict) else None
    version = (
        f" {visible(versions['moesmith'])}" if isinstance(versions, dict) and "moesmith" in versions else ""
    )
    return join(
        f"Written by moesmith{version}. This page needs no network. Every figure with all its digits: ",
        tag("a", "report.json", href="report.json"),
        "; the first picture: ",
        tag("a", "report.png", href="report.png"),
        ".",
    )


def _colours() -> Html:
    """The colour table as CSS variables; browsers older than light-dark() get the light values."""
    both = "".join(f"--{name}:light-dark({light},{dark});" for name, (light, dark) in COLOURS.items())
    light = "".join(f"--{name}:{light};" for name, (light, _) in COLOURS.items())
    return Html(f":root{{{both}}}\n@supports not (color:light-dark(#000,#fff)){{:root{{{light}}}}}")


def _file(name: str) -> Html:
    return Html((resources.files(__package__) / name).read_text(encoding="utf-8").strip())
