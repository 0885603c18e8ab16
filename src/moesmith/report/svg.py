"""A matplotlib figure as an <svg> element inside of a page: its colours, its font, no id used twice."""

from __future__ import annotations

import io
import re
from xml.etree import ElementTree

from matplotlib.figure import Figure

from .theme import STAND_INS, VARIABLES, style


def inline(picture: Figure, name: str, alt: str, **attributes: str) -> str:
    """The figure as an <svg> element: the page's colours and font, ids that begin with `name`."""
    file = io.StringIO()
    with style(STAND_INS):
        picture.savefig(file, format="svg", metadata={"Date": None})
    root = ElementTree.fromstring(file.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.rpartition("}")[2] in ("metadata", "style") or _unseen(child):
                parent.remove(child)
    used = {
        key
        for element in root.iter()
        for value in element.attrib.values()
        for key in re.findall(r"#(\w+)", value)
    }
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {k.rpartition("}")[2]: v for k, v in element.attrib.items()}
        _tidy(element, name, used)
    width, height = root.get("viewBox", "0 0 1 1").split()[2:]
    root.attrib = {
        "viewBox": f"0 0 {width} {height}",
        "width": width,
        "height": height,
        "role": "img",
        "aria-label": alt,
        **attributes,
    }
    _flatten(root)
    return ElementTree.tostring(root, encoding="unicode")


def _unseen(element: ElementTree.Element) -> bool:
    """A background without colour."""
    return element.get("style", "").strip() == "fill: none"


def _flatten(element: ElementTree.Element) -> None:
    """Groups that say nothing give way to what is in them."""
    children = []
    for child in element:
        _flatten(child)
        if child.tag in ("g", "defs") and not child.attrib and (child.tag == "g" or not len(child)):
            children += list(child)
        else:
            children.append(child)
    element[:] = children


def _tidy(element: ElementTree.Element, name: str, used: set[str]) -> None:
    attributes = element.attrib
    if attributes.get("id") and attributes["id"] not in used:
        del attributes["id"]
    for key, value in list(attributes.items()):
        if key == "id":
            attributes[key] = f"{name}-{value}"
        elif key == "href":
            attributes[key] = f"#{name}-{value[1:]}"
        elif key == "clip-path":
            attributes[key] = value.replace("#", f"#{name}-")
        elif key == "style":
            attributes[key] = _themed(value)
        elif key == "transform" and value.startswith("rotate(-0 "):
            del attributes[key]
        elif key in ("d", "x", "y", "transform", "width", "height"):
            attributes[key] = re.sub(r"-?\d+\.\d+", _rounded, " ".join(value.split()))
    if element.tag != "text":
        element.text = None
    element.tail = None


def _themed(style: str) -> str:
    """Stand-ins to CSS variables; the font is the page's."""
    kept = []
    for declaration in style.split(";"):
        key, _, value = declaration.partition(":")
        if key.strip() not in ("font-family", "font"):
            kept.append(f"{key.strip()}:{VARIABLES.get(value.strip(), value.strip())}")
    return ";".join(part for part in kept if part != ":")


def _rounded(match: re.Match[str]) -> str:
    return f"{float(match.group()):.2f}".rstrip("0").rstrip(".") or "0"
