"""Figures as people read them; what a page carries decodes to what was given."""

import json
import math

import numpy as np
import pytest
import torch

from moesmith.report import values
from moesmith.report.values import change, clean, fixed, interval, number, pack, percent, unpack, visible


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (6087, "6,087"),
        (6087.4, "6,087"),
        (12.345, "12.3"),
        (0.012, "0.0120"),
        (0.000012, "1.20 × 10⁻⁵"),
        (2.5e12, "2.50 × 10¹²"),
        (0, "0"),
        (0.0, "0"),
        (-0.5, "−0.500"),
        (128.0, "128"),
        (None, "–"),
        (math.nan, "–"),
        (math.inf, "–"),
        (True, "–"),
        ("12", "–"),
    ],
)
def test_numbers_have_three_digits(value, text):
    assert number(value) == text


def test_shares_and_ratios():
    assert percent(0.951) == "95.1 %" and percent(0.99012, 2) == "99.01 %" and percent(1.0) == "100.0 %"
    assert percent(0.9996) == "99.96 %", "what is not all does not read as all"
    assert change(1.009) == "+0.9 %" and change(0.98) == "−2.0 %" and change(2.31) == "×2.31"
    assert percent(None) == change(math.nan) == fixed(None) == "–"
    assert interval([0.01, 0.014]) == "[0.0100, 0.0140]" and interval([0.01, None]) == interval(None) == ""


def test_clean_makes_json_of_anything():
    facts = {
        1: np.float32(0.5), "nan": [math.nan, math.inf, np.nan], "tensor": torch.arange(3),
        "path": values.__spec__, "set": {2, 1}, "tuple": (np.int64(3), True, None), "half": "a\ud800b",
    }  # fmt: skip
    cleaned = json.loads(json.dumps(clean(facts), allow_nan=False))
    assert cleaned["1"] == 0.5 and cleaned["nan"] == [None, None, None] and cleaned["tensor"] == [0, 1, 2]
    assert cleaned["set"] == [1, 2] and cleaned["tuple"] == [3, True, None]
    cleaned["half"].encode()  # raises for half a surrogate pair


def test_control_characters_are_written_out():
    assert visible("a\x1b[31m\x00\r\n\tb") == "a\\x1b[31m\\x00\n\tb"


@pytest.mark.parametrize("scale", ["linear", "log", "negative", "counts", "equal", "zero"])
def test_packed_matrices_come_back(scale):
    random = np.random.default_rng(0)
    rows = {
        "linear": random.uniform(3, 5, (7, 33)),
        "log": random.lognormal(0, 3, (7, 33)) * (random.random((7, 33)) > 0.1),
        "negative": random.normal(0, 1, (7, 33)),
        "counts": random.integers(0, 90_000, (7, 33)),
        "equal": np.full((2, 3), 4.2),
        "zero": np.zeros((2, 3)),
    }[scale].tolist()
    rows[0][1] = None
    rows[1] = rows[1][:2]  # layers may have different numbers of experts
    packed = pack(rows)
    assert all(len(text) == 2 * len(row) for text, row in zip(packed["rows"], rows, strict=True))
    span = packed["high"] - packed["low"]
    for row, back in zip(rows, unpack(packed), strict=True):
        assert len(row) == len(back)
        for value, read in zip(row, back, strict=True):
            if value is None or value == 0 and packed["log"]:
                assert read == value
            elif packed["log"]:
                assert read == pytest.approx(value, rel=0.003)
            else:
                assert read == pytest.approx(value, abs=span / 4000 + 1e-12)
    assert packed["log"] == (scale in ("log", "counts"))


def test_packing_nothing():
    assert pack(None)["rows"] == [] and unpack(pack([[None, math.nan]])) == [[None, None]]
