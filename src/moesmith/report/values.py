"""Figures as people read them, and as JSON and the page carry them.

Every number of the page goes through here: three significant digits, thousands separated, units said by the
caller, an en dash where there is no figure (None, NaN). `clean` makes any facts valid JSON; `pack` makes a
large matrix small enough for a page.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

NONE = "–"
SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
# Control characters of a model's output, made visible; line feed and tab stay what they are.
CONTROLS = {code: f"\\x{code:02x}" for code in (*range(9), *range(11, 32), *range(127, 160))}

CODES = 4094  # codes 0..4094 carry a value, 4095 says that there is none
DIGITS64 = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"


def clean(value: Any) -> Any:
    """`value` as plain JSON data: NaN and infinities are None, arrays lists, keys strings, the rest text."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode(
            "utf-16", "replace"
        )  # half a pair cannot be written
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(clean(key)): clean(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return [clean(item) for item in sorted(value)]
    if hasattr(value, "tolist"):  # numpy and torch, scalars included
        return clean(value.tolist())
    return clean(str(value))


def visible(text: Any) -> str:
    """Text for the page with its control characters written out (\\x1b) instead of acted upon."""
    return str(text).replace("\r\n", "\n").translate(CONTROLS)


def figure(value: Any) -> float | None:
    """`value` as a finite float, or None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def figures(values: Any) -> list[float | None]:
    """A list of figures; anything that is no list is an empty one."""
    return [figure(value) for value in values] if isinstance(values, list) else []


def mapping(value: Any) -> dict[str, Any]:
    """A dict as it is, anything else as an empty one."""
    return value if isinstance(value, dict) else {}


def records(value: Any) -> list[dict[str, Any]]:
    """The dicts of a list."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def items(value: Any) -> list[Any]:
    """A list as it is, anything else as an empty one."""
    return value if isinstance(value, list) else []


def number(value: Any, digits: int = 3) -> str:
    """`digits` significant digits: 6,087 · 12.3 · 0.0120 · 1.20 × 10⁻⁵ · –. Whole numbers stay whole."""
    x = figure(value)
    if x is None:
        return NONE
    if isinstance(value, int) or x == 0:
        text = f"{int(x):,}"
    elif abs(x) >= 1e9 or abs(x) < 1e-4:
        mantissa, exponent = f"{x:.{digits - 1}e}".split("e")
        text = f"{mantissa} × 10{str(int(exponent)).translate(SUPERSCRIPT)}"
    elif abs(x) >= 10 ** (digits - 1):
        text = f"{x:,.0f}"
    else:
        text = f"{x:#.{digits}g}".rstrip(".")
    return text.replace("-", "−")


def fixed(value: Any, decimals: int = 2) -> str:
    """A figure with so many decimals: 0.85 · 1.00 · –."""
    x = figure(value)
    return NONE if x is None else f"{x:.{decimals}f}".replace("-", "−")


def percent(share: Any, digits: int = 1) -> str:
    """A share of one as `95.1 %`. What is less than all gets one digit more before it reads 100 %."""
    x = figure(share)
    if x is None:
        return NONE
    text = f"{100 * x:.{digits}f}"
    if x < 1 and float(text) == 100:
        text = f"{100 * x:.{digits + 1}f}"
    return f"{text} %".replace("-", "−")


def change(ratio: Any) -> str:
    """A ratio as its change: 1.009 is `+0.9 %`; from a doubling on, `×2.31`."""
    x = figure(ratio)
    if x is None:
        return NONE
    if x >= 2:
        return f"×{number(x)}"
    return f"{100 * (x - 1):+.1f} %".replace("-", "−")


def pair(bounds: Any) -> tuple[float, float] | None:
    """Two figures, or None."""
    ends = figures(bounds)
    if len(ends) != 2 or ends[0] is None or ends[1] is None:
        return None
    return ends[0], ends[1]


def interval(bounds: Any, form: Any = number) -> str:
    """`[0.010, 0.014]`, or nothing where there are no two figures."""
    return f"[{form(bounds[0])}, {form(bounds[1])}]" if pair(bounds) else ""


def median(values: Sequence[float | None]) -> float | None:
    """The middle figure of those that are there; the lower of two."""
    there = sorted(value for value in values if value is not None)
    return there[(len(there) - 1) // 2] if there else None


def short_list(items: Sequence[Any], most: int = 8) -> str:
    """`1, 5, 9 and 12 more`."""
    words = ", ".join(str(item) for item in items[:most])
    return words if len(items) <= most else f"{words} and {len(items) - most} more"


def pack(rows: Any) -> dict[str, Any]:
    """A matrix of figures as text of two base64 digits (12 bits) per value.

    Returns {"low", "high", "log", "rows": [str]}. Linear between low and high; logarithmic where all figures
    are >= 0 and the largest is over 30 times the smallest positive one. Then code 0 is exactly 0, what lies
    under a billionth of the largest reads as that, and the relative error is 0.26 % at the worst.
    """
    values = [figures(row) for row in rows] if isinstance(rows, list) else []
    there = [value for row in values for value in row if value is not None]
    low, high = (min(there), max(there)) if there else (0.0, 0.0)
    positive = max(min((value for value in there if value > 0), default=high), high * 1e-9)
    log = low >= 0 and high > 30 * positive > 0
    if log:
        low = positive

    def code(value: float | None) -> int:
        if value is None:
            return CODES + 1
        if log:
            at = math.log(max(value, low) / low) / math.log(high / low)
            return 0 if value == 0 else 1 + round((CODES - 1) * at)
        return round(CODES * (value - low) / (high - low)) if high > low else 0

    def text(row: list[float | None]) -> str:
        return "".join(DIGITS64[c >> 6] + DIGITS64[c & 63] for c in map(code, row))

    return {"low": low, "high": high, "log": log, "rows": [text(row) for row in values]}


def unpack(packed: dict[str, Any]) -> list[list[float | None]]:
    """What the page's script reads from `pack`; the definition that both are tested against."""
    low, high, log = packed["low"], packed["high"], packed["log"]

    def value(first: str, second: str) -> float | None:
        c = (DIGITS64.index(first) << 6) | DIGITS64.index(second)
        if c > CODES:
            return None
        if log:
            return 0.0 if c == 0 else low * (high / low) ** ((c - 1) / (CODES - 1))
        return low + (high - low) * c / CODES

    return [[value(*row[i : i + 2]) for i in range(0, len(row), 2)] for row in packed["rows"]]
