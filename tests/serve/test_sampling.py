"""Choosing a token: the settings do what they say; a choice depends on its own row and seed only."""

import math
from collections import Counter

import pytest
import torch

from moesmith.serve.sampling import Sampling, choose, draw

LOGITS = torch.tensor([0.0, 2.0, 1.0, 2.0, -1.0, 0.5])
ORDER = [1, 3, 2, 5, 0, 4]


def share(how: Sampling, points: int = 4000) -> dict[int, float]:
    """How much of [0, 1) each token has."""
    drawn = Counter(draw(LOGITS, how, (i + 0.5) / points) for i in range(points))
    return {token: count / points for token, count in drawn.items()}


def test_greedy_takes_the_first_of_the_likeliest_tokens():
    assert choose(LOGITS, Sampling(5), []).id == 1


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_tokens_are_drawn_as_often_as_the_softmax_says(temperature):
    wanted = (LOGITS / temperature).softmax(-1)
    found = share(Sampling(5, temperature=temperature))
    assert all(abs(found.get(i, 0.0) - float(p)) < 1e-3 for i, p in enumerate(wanted))


@pytest.mark.parametrize(
    ("cut", "left"),
    [
        ({"top_k": 1}, ORDER[:1]), ({"top_k": 3}, ORDER[:3]), ({"top_k": 99}, ORDER),
        ({"top_p": 1e-9}, ORDER[:1]), ({"top_p": 0.5}, ORDER[:2]), ({"top_p": 0.999}, ORDER),
        ({"min_p": 1.0}, [1, 3]), ({"min_p": 0.3}, ORDER[:3]), ({"min_p": 0.0}, ORDER),
        ({"top_k": 3, "top_p": 0.5}, ORDER[:2]),
    ],
)  # fmt: skip
def test_cuts_leave_the_likeliest_tokens_in_proportion(cut, left):
    found = share(Sampling(5, temperature=1.0, **cut))
    kept = LOGITS.softmax(-1)[left]
    assert sorted(found) == sorted(left)
    assert all(abs(found[i] - float(p)) < 1e-3 for i, p in zip(left, kept / kept.sum(), strict=True))


def test_top_p_looks_beyond_the_first_thousand_tokens():
    flat = torch.zeros(2000)
    flat[1600:] = -0.1
    drawn = {draw(flat, Sampling(5, temperature=1.0, top_p=0.7), i / 3000) for i in range(3000)}
    wanted = math.ceil(0.7 * (1600 + 400 * math.exp(-0.1)))
    assert (len(drawn), max(drawn) < 1600) == (wanted, True)


def test_a_tiny_temperature_is_no_overflow():
    assert {draw(LOGITS * 1e4, Sampling(5, temperature=1e-6), at / 10) for at in range(10)} <= {1, 3}
    assert choose(LOGITS, Sampling(5, temperature=1e-320), []).id == 1


def test_a_seed_repeats_and_another_seed_does_not():
    def answer(seed: int) -> list[int]:
        ids: list[int] = []
        for _ in range(30):
            ids.append(choose(LOGITS, Sampling(30, temperature=1.5, seed=seed), ids).id)
        return ids

    assert answer(7) == answer(7)
    assert answer(7) != answer(8)
    assert len(set(answer(7))) > 2, "every step has a draw of its own"


def test_penalties_count_the_tokens_of_the_answer():
    plain = Sampling(5)
    assert choose(LOGITS, Sampling(5, presence_penalty=2.0), [1]).id == 3
    assert choose(LOGITS, Sampling(5, presence_penalty=0.5), [1, 1, 1, 3]).id == 1
    assert choose(LOGITS, Sampling(5, frequency_penalty=0.5), [1, 1, 1, 3]).id == 3
    assert choose(LOGITS, plain, [1, 1, 1, 3]).id == 1


def test_a_bias_moves_one_token_and_the_reported_probabilities_stay_the_models():
    biased = choose(LOGITS, Sampling(5, logit_bias=((4, 100.0),), top_logprobs=2), [])
    logprobs = LOGITS.log_softmax(-1)
    assert biased.id == 4
    assert biased.logprob == pytest.approx(float(logprobs[4]))
    assert [i for i, _ in biased.top] == [1, 3]
    assert biased.top[0][1] == pytest.approx(float(logprobs[1]))
    for seed in range(4):
        warm = choose(LOGITS, Sampling(5, temperature=1.7, top_p=0.9, seed=seed, top_logprobs=1), [])
        assert warm.logprob == pytest.approx(float(logprobs[warm.id]))


def test_logits_are_left_as_they_were():
    before = LOGITS.clone()
    choose(LOGITS, Sampling(5, temperature=1, presence_penalty=1, logit_bias=((0, 5.0),)), [1, 2])
    assert torch.equal(LOGITS, before)
