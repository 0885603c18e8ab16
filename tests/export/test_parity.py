"""Parity: what counts as the same, what as lost, and what a model is asked."""

import math

import pytest
import torch

import tiny
from moesmith.errors import UserError
from moesmith.export.parity import (
    TOLERANCES,
    Parity,
    compare,
    lost,
    next_logprobs,
    quant_route,
    tolerance,
)

HALF = math.log(0.5)


def parity(**changes) -> Parity:
    return Parity(
        **{**dict(prompts=16, tokens=800, max=0, mean=0, kl=0, agreement=1, worst=0, missing=0), **changes}
    )


@pytest.fixture(scope="module")
def model():
    return tiny.build("olmoe")


PROMPTS = [[5, 6, 7], [9, 30, 31, 32, 40], [100]]


def test_a_model_agrees_with_itself_and_all_of_it_is_compared(model):
    said = next_logprobs(model, PROMPTS)
    found = compare(said, next_logprobs(model, PROMPTS))
    assert (found.max, found.mean, found.kl, found.agreement, found.missing) == (0, 0, 0, 1, 0)
    assert (found.prompts, found.tokens) == (3, 150)


def test_logprobs_are_the_softmax_of_the_last_position(model):
    said = next_logprobs(model, PROMPTS, top=tiny.VOCAB)
    with torch.no_grad():
        wanted = model(torch.tensor([PROMPTS[1]])).logits[0, -1].log_softmax(-1)
    assert len(said[1]) == tiny.VOCAB
    assert all(abs(said[1][token] - wanted[token].item()) < 1e-5 for token in range(tiny.VOCAB))
    assert sum(math.exp(value) for value in said[1].values()) == pytest.approx(1, abs=1e-9)


def test_tokens_asked_for_are_kept_though_they_are_unlikely(model):
    everything = next_logprobs(model, PROMPTS, top=tiny.VOCAB)
    unlikely = [min(one, key=one.get) for one in everything]
    said = next_logprobs(model, PROMPTS, top=3, also=[{token: 0.0} for token in unlikely])
    assert all(token in one and len(one) == 4 for token, one in zip(unlikely, said, strict=True))


def test_differences_and_divergence_are_those_of_paper_and_pencil():
    source = [{1: HALF, 2: math.log(0.25)}, {3: HALF, 4: HALF}]
    other = [{1: math.log(0.25), 2: math.log(0.25), 9: math.log(0.4)}, {3: HALF, 4: HALF}]
    found = compare(source, other)
    assert found.max == pytest.approx(math.log(2))
    assert found.mean == pytest.approx(math.log(2) / 4)
    assert found.worst == 0
    assert found.agreement == 0.5  # 9 is the other's first token on the first prompt
    whole = 0.5 * math.log(0.5 / 0.25) + 0.25 * math.log(0.25 / 0.5)  # 1, 2 equal, and the rest
    assert found.kl == pytest.approx(whole / 2)


def test_a_token_that_is_not_reported_counts_as_the_least_likely_reported_one():
    found = compare([{1: HALF, 2: HALF}], [{1: HALF, 7: math.log(0.1)}])
    assert found.missing == 1
    assert found.max == pytest.approx(abs(HALF - math.log(0.1)))


def test_only_the_most_likely_tokens_of_the_source_count():
    source = [{token: -float(token) for token in range(1, 60)}]
    other = [{**source[0], 59: -1000.0}]
    assert compare(source, other).max == 0
    assert compare(other, source, top=59).max > 900


@pytest.mark.parametrize("value", [math.nan, -math.inf, 0.5])
def test_what_is_no_log_probability_is_refused(value):
    with pytest.raises(UserError, match="prompt 2"):
        compare([{1: HALF}] * 2, [{1: HALF}, {1: value}])


def test_an_empty_answer_or_another_number_of_prompts_is_refused():
    with pytest.raises(UserError, match="no log-probability"):
        compare([{1: HALF}], [{}])
    with pytest.raises(ValueError, match="prompts"):
        compare([{1: HALF}], [])


def test_each_bound_is_watched():
    bounds = TOLERANCES["gguf 8 bits"]
    assert bounds.beyond(parity(max=99)) == []  # of a quantised file the largest difference says little
    assert "mean" in bounds.beyond(parity(mean=0.4))[0]
    assert "KL" in bounds.beyond(parity(kl=0.4))[0]
    assert "token" in bounds.beyond(parity(agreement=0.5))[0]
    assert "largest" in TOLERANCES["bfloat16"].beyond(parity(max=0.6))[0]
    assert TOLERANCES["bfloat16"].beyond(parity(mean=math.nan))


def test_a_bound_of_ones_own_replaces_the_others():
    assert tolerance("float32", 0.5).beyond(parity(max=9, mean=0.4, kl=9, agreement=0)) == []
    assert tolerance("float32", 0.3).beyond(parity(mean=0.4))


def test_bounds_are_no_narrower_than_the_source_is_with_itself():
    bounds = TOLERANCES["bfloat16"]
    assert bounds.widened(parity(mean=0.001, max=0.01, kl=1e-5), "bfloat16") is bounds
    wide = bounds.widened(parity(mean=0.3, max=2.0, kl=0.03), "bfloat16")
    assert (wide.mean, wide.max, wide.kl) == (0.6, 10.0, 0.06)
    assert "bfloat16" in wide.reason
    assert wide.beyond(parity(mean=0.7)) and not wide.beyond(parity(mean=0.5, max=5, kl=0.02))


def test_an_adapter_that_is_not_there_is_told_though_it_is_small():
    bounds = TOLERANCES["bfloat16"]
    effect = parity(mean=0.08)
    assert lost(parity(mean=0.045), effect, bounds) and not bounds.beyond(parity(mean=0.045))
    assert not lost(parity(mean=0.01), effect, bounds)
    assert not lost(parity(mean=0.01), parity(mean=0.01), bounds)  # smaller than rounding: cannot be told


@pytest.mark.parametrize(
    ("kind", "route"),
    [
        ("Q4_K_M", "gguf 4 bits"), ("iq4_nl", "gguf 4 bits"), ("q8_0", "gguf 8 bits"),
        ("q6_k", "gguf 5 bits"), ("q2_k", "gguf 2 bits"), ("iq3_xs", "gguf 2 bits"),
        ("mxfp4_moe", "gguf 4 bits"), ("bf16", "gguf bf16"), ("tq1_0", "gguf 2 bits"),
    ],
)  # fmt: skip
def test_a_quantisation_has_bounds(kind, route):
    assert quant_route(kind) == route
    assert route in TOLERANCES
