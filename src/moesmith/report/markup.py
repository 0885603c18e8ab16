"""HTML from function calls, escaped unless said otherwise.

A report shows what models wrote. Text is escaped here, in one place, and only `Html` is taken as it is.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from typing import Any

from .values import visible

EMPTY = {"br", "input", "meta", "col"}  # elements without an end tag


class Html(str):
    """Text that is HTML already."""


def join(*children: Any) -> Html:
    """Children side by side: `Html` as it is, lists flattened, None left out, anything else escaped."""
    parts: list[str] = []
    for child in children:
        if child is None or child == "":
            continue
        if isinstance(child, Html):
            parts.append(child)
        elif isinstance(child, (list, tuple)):
            parts.append(join(*child))
        else:
            parts.append(html.escape(visible(child)))
    return Html("".join(parts))


def tag(name: str, /, *children: Any, **attributes: Any) -> Html:
    """`<name attributes>children</name>`.

    class_ is class, aria_label is aria-label; None leaves an attribute out, True writes its name alone.
    """
    words = [name]
    for key, value in attributes.items():
        key = key.rstrip("_").replace("_", "-")
        if value is True:
            words.append(key)
        elif value is not None and value is not False:
            words.append(f'{key}="{html.escape(visible(value))}"')
    start = Html(f"<{' '.join(words)}>")
    return start if name in EMPTY else Html(f"{start}{join(*children)}</{name}>")


def prose(text: Any) -> Html:
    """Text in which `words between backticks` are code."""
    parts = re.split(r"`([^`\n]+)`", str(text))
    return join([tag("code", part) if index % 2 else part for index, part in enumerate(parts)])


def table(
    caption: str,
    head: Sequence[Any],
    rows: Sequence[Sequence[Any]],
    bold: Sequence[int] = (),
    **attributes: Any,
) -> Html:
    """A table in a box that scrolls sideways. The first column names the row; rows in `bold` stand out."""
    names = tag(
        "tr",
        [cell if str(cell).startswith("<th") else tag("th", cell, scope="col") for cell in map(_cell, head)],
    )
    body = [
        tag(
            "tr",
            tag("th", row[0], scope="row"),
            [cell if cell.startswith("<td") else tag("td", cell) for cell in map(_cell, row[1:])],
            class_="worst" if index in bold else None,
        )
        for index, row in enumerate(rows)
    ]
    inner = tag(
        "table", tag("caption", tag("span", caption)), tag("thead", names), tag("tbody", body), **attributes
    )
    return tag("div", inner, class_="scroll", tabindex="0", role="region", aria_label=caption)


def _cell(cell: Any) -> Html:
    return cell if isinstance(cell, Html) else join(cell)
