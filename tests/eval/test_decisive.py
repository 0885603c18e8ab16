"""The table of perplexities: figures by hand, intervals that contain them, a name for each outcome."""

import json
import math

import numpy as np
import pytest

from moesmith.errors import UserError
from moesmith.eval.decisive import _percent, by_depth, decisive
from moesmith.eval.routed import Forced, by_rows
from moesmith.eval.routing import Labelled, losses
from planted_routers import plain, rows, texts_of

DOMAINS = {"code": 30, "math": 12}


def texts(domains=DOMAINS):
    return [Labelled([1] * (5 + i), d, f"{d}/{i}", 0) for d, n in domains.items() for i in range(n)]


def measured(spread=0.05, domains=DOMAINS, **nats):
    """Rows with these mean nats per token: one figure, or one per domain. Documents differ, rows alike."""
    docs, rng = texts(domains), np.random.default_rng(0)
    noise = rng.normal(size=len(docs)) * spread
    out = {}
    for key, value in nats.items():
        per = value if isinstance(value, dict) else dict.fromkeys(domains, value)
        own = rng.normal(size=len(docs)) * spread / 10
        out[key.replace("_", " ")] = [
            ((per[doc.domain] + noise[i] + own[i]) * (len(doc.ids) - 1), len(doc.ids) - 1)
            for i, doc in enumerate(docs)
        ]
    return out


def test_the_gap_by_hand():
    """Without noise every figure is known; two seeds of random routing are one row."""
    per = {
        "router": {"code": 1.0, "math": 2.0}, "embed": {"code": 1.5, "math": 2.5},
        "random_0": {"code": 2.0, "math": 2.5}, "random_1": {"code": 2.0, "math": 3.5},
        "oracle": {"code": 0.5, "math": 2.0}, "base": 2.0, "coder": {"code": 0.5, "math": 3.0},
    }  # fmt: skip
    facts = decisive(measured(spread=0, **per), texts(), {"router": "probe (this model)"})
    assert [(row["name"], row["kind"]) for row in facts["rows"]] == [
        ("probe (this model)", "router"), ("embed", "control"), ("random (mean of 2)", "control"),
        ("oracle", "oracle"), ("base", "source"), ("coder", "source"),
    ]  # fmt: skip
    router, embed, random, oracle = (facts["rows"][i] for i in range(4))
    assert router["mean"] == pytest.approx(math.exp(1.5)) and random["mean"] == pytest.approx(math.exp(2.5))
    assert router["by_domain"] == pytest.approx({"code": math.e, "math": math.exp(2)})
    assert router["mean_ci"] == pytest.approx((math.exp(1.5),) * 2)
    e = math.exp
    gap = facts["gap_closed"]
    assert gap["mean"] == pytest.approx((e(2.5) - e(1.5)) / (e(2.5) - e(1.25)))
    assert gap["ci"] == pytest.approx([gap["mean"]] * 2) and gap["reason"] is None
    assert gap["by_domain"]["code"] == pytest.approx((e(2) - e(1)) / (e(2) - e(0.5)))
    assert gap["by_domain"]["math"] == pytest.approx(1.0)
    assert facts["gap_closed_embed"]["mean"] == pytest.approx((e(2.5) - e(2)) / (e(2.5) - e(1.25)))
    assert facts["domains"] == ["code", "math"] and facts["documents"] == 42
    assert facts["tokens"] == sum(len(text.ids) - 1 for text in texts())
    assert facts["verdict"] == (
        "the router closes 89 % [89, 89] of the gap between random and oracle routing; "
        "embed closes 55 % [55, 55]; perplexity 4.48 against 5.75 of the best dense model (coder)"
    )
    json.dumps(facts, allow_nan=False)


def test_intervals_contain_the_figure_and_are_paired():
    rows_ = measured(spread=0.3, router=1.2, random_0=2.0, oracle=1.0, base=1.5)
    facts = decisive(rows_, texts())
    low, high = facts["gap_closed"]["ci"]
    assert low < facts["gap_closed"]["mean"] < high and high - low < 0.05  # documents differ by far more
    mean_low, mean_high = facts["rows"][0]["mean_ci"]
    assert mean_low < facts["rows"][0]["mean"] < mean_high and mean_high / mean_low > 1.1
    assert facts == decisive(rows_, texts())
    # a second domain with the same documents: their errors are independent, so the mean is surer by sqrt(2)
    code = {"code": 30}
    one = measured(spread=0.3, domains=code, router=1.2)
    two = {"router": one["router"] * 2}
    (a, b), (c, d) = (
        decisive(given, texts(domains))["rows"][0]["mean_ci"]
        for given, domains in ((one, code), (two, {"code": 30, "math": 30}))
    )
    assert 0.6 < (d - c) / (b - a) < 0.8
    assert facts["differences"][0]["what"] == "oracle - base"
    assert facts["differences"][0]["nats"] == pytest.approx(-0.5, abs=0.02)


@pytest.mark.parametrize(
    ("nats", "said"),
    [
        (
            {"router": 1.3, "random": 2.0, "oracle": 1.1, "base": 1.5},
            "of the gap between random and oracle routing",
        ),
        ({"router": 1.3, "random": 2.0, "oracle": 1.5, "base": 1.5}, "but the router's mixture is: "),
        ({"router": 1.6, "random": 2.0, "oracle": 1.5, "base": 1.5}, "the experts add nothing on this text"),
        ({"router": 1.6, "random": 2.0, "oracle": 1.6, "base": 1.5}, "add nothing but harm on this text"),
        (
            {"router": 1.6, "random": 2.0, "oracle": {"code": 1.4, "math": 1.7}, "base": 1.5},
            "of the base model; they help in code",
        ),
        (
            {"router": 1.5, "random": 3.0, "oracle": 1.1, "base": 1.3},
            ", but is worse than the best dense model (base): perplexity 4.",
        ),
        (
            {"router": 1.3, "random": 3.0, "oracle": 1.1, "base": 1.3},
            ", but is no better than the best dense model",
        ),
        (
            {"router": 1.3, "random": 3.0, "oracle": 1.1, "base": 1.9, "coder": 1.2},
            ", but is worse than the best dense model (coder): ",
        ),
        (
            {"router": 1.3, "random": 2.0, "oracle": 1.1, "base": 1.5, "uniform": 1.2},
            "; all experts with equal weights do better: perplexity 3.",
        ),
        ({"router": 2.2, "random": 2.0, "oracle": 1.1, "base": 1.5}, "the router is worse than random"),
        ({"router": 2.0, "random": 2.0, "oracle": 1.1, "base": 1.5}, "the router is no better than random"),
        ({"router": 1.2, "random": 1.1, "oracle": 1.2, "base": 1.5}, "nothing for a router to gain"),
        ({"router": 0.9, "random": 2.0, "oracle": 1.1, "base": 1.5}, "the router is better than the oracle"),
        ({"router": 1.2, "random": 2.0, "base": 1.5}, None),
    ],
)
def test_verdicts(nats, said):
    facts = decisive(measured(**nats), texts())
    assert facts["verdict"] is None if said is None else said in facts["verdict"]
    assert facts["useful"] is (
        nats["router"] < min(nats["random"], nats.get("base", 0), nats.get("coder", 9))
    )
    if nats["router"] == 0.9:
        assert facts["gap_closed"]["mean"] > 1


def test_no_gap_has_a_reason():
    equal = decisive(measured(spread=0, router=1.0, random=1.0, oracle=1.0, base=1.0), texts())
    assert equal["gap_closed"]["mean"] is None and "not above the oracle" in equal["gap_closed"]["reason"]
    assert equal["verdict"].startswith("the experts add nothing")
    assert "no oracle" in decisive(measured(router=1.0, random=2.0), texts())["gap_closed"]["reason"]
    single = {"code": 5, "math": 1}
    found = decisive(measured(domains=single, router=1.0, random=2.0, oracle=0.9), texts(single))
    assert found["gap_closed"]["ci"] is None and "single document" in found["gap_closed"]["reason"]
    assert found["rows"][0]["mean_ci"] is None and "closes" in found["verdict"]
    doubtful = measured(router=1.1, random=1.2, oracle=1.0)
    doubtful["oracle"] = [(n + 9 * (-1) ** i, t) for i, (n, t) in enumerate(doubtful["oracle"])]
    facts = decisive(doubtful, texts())
    found = facts["gap_closed"]
    assert found["ci"] is None and "not above the oracle in all draws" in found["reason"]
    assert found["by_domain"]["math"] is None  # 12 documents
    assert facts["verdict"].startswith("what a router can gain on this text is within the interval: ")
    other = {**measured(router=1.0), "oracle": [(1.0, 3)] * 42}
    with pytest.raises(UserError, match="oracle was measured on other tokens than router"):
        decisive(other, texts())


def test_few_documents_have_wider_intervals_and_are_counted():
    """The bootstrap of two documents has half the variance that it should have."""
    domains = {"code": 2, "math": 30}
    given = measured(spread=0, domains=domains, router=1.0)
    given["router"] = [(nats + (i == 0) * tokens, tokens) for i, (nats, tokens) in enumerate(given["router"])]
    facts = decisive(given, [*texts(domains)])
    assert facts["documents"] == 32 and facts["fewest"] == 2
    # code is 2 nats or 1, by the document that is drawn: 1.444 [1, 2], widened by sqrt(2); math is 1
    code = 1 + 4 / 9
    ends = [(1 + code + math.sqrt(2) * (end - code)) / 2 for end in (1, 2)]
    assert facts["rows"][0]["mean_ci"] == pytest.approx([math.exp(end) for end in ends])


def test_shares_are_written_as_on_the_page():
    written = [_percent({"mean": mean, "ci": ci}) for mean, ci in ((0.998, None), (-0.5, (-0.6, 1.0)))]
    assert written == ["99.8 %", "−50 % [−60, 100]"]


def test_by_depth_changes_one_part_at_a_time():
    model, docs = plain("mixtral"), texts_of()
    own = by_rows(rows(model), top_k=2)
    found = by_depth(model, docs, {"own": own, "five": Forced(5)}, elsewhere=own)
    assert [(part["from"], part["to"]) for part in found["own"]] == [(0, 0), (1, 1), (2, 2)]
    for part in found["own"]:
        assert part["losses"] == losses(model, docs)
    assert len({part["perplexity"] for part in (*found["five"], found["own"][0])}) == 4
    oracle = by_depth(model, docs, {"own": own}, elsewhere=Forced(), parts=1)
    assert oracle["own"][0]["losses"] == losses(model, docs)
