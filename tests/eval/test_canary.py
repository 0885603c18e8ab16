"""What counts as a loop, and how two models' answers are compared."""

import json

import pytest
import torch

from moesmith.errors import UserError
from moesmith.eval.canary import (
    Answer,
    Canary,
    canary,
    compare,
    looped,
    report_section,
    sign_test,
    worse,
)
from moesmith.eval.greedy import continuations

FRESH = list(range(1000, 1400))  # tokens that never repeat


@pytest.mark.parametrize(
    "ids",
    [
        [7] * 24,  # one token for ever
        FRESH[:30] + [1, 2, 3] * 8,  # a phrase, after something sensible
        FRESH[:10] + list(range(32)) * 3,  # a sentence three times
        FRESH[:5] + [1, 2, 3] * 9 + [1, 2],  # cut in the middle of a round
        [t for i in range(12) for t in (500 + i, 1, 2, 3, 4, 5, 6, 7, 8, 9)],  # a list whose number counts up
        [1, 2, 3, 4, 5, 6, 7, 8] * 10 + FRESH[:8],  # came out of it at the very end
    ],
)
def test_loops(ids):
    assert looped(ids)


@pytest.mark.parametrize(
    "ids",
    [
        [],
        [7] * 23,  # a rule of dashes
        FRESH,
        FRESH[:60] + [1, 2, 3] * 4 + FRESH[60:],  # said four times, then went on
        FRESH[:10] + list(range(32)) * 2,  # a sentence twice
        [t for i in range(20) for t in (500 + i, 1, 2, 600 + i)],  # rows of a table
        list(range(40)) + list(range(30)),  # a quotation of itself
    ],
)
def test_no_loops(ids):
    assert not looped(ids)


def answers(*kinds: str) -> Canary:
    """l loops, e is empty, o ends well, c is cut."""
    made = []
    for i, kind in enumerate(kinds):
        ids = {"l": [7] * 60, "e": [], "o": FRESH[:20], "c": FRESH[:60]}[kind[0]]
        made.append(Answer(f"prompt {i}", " ".join(map(str, ids)), ids, kind[0] in "oe", looped(ids)))
    return Canary(made, 60)


def test_compare_counts():
    facts = compare(answers(*"ooocol"), answers(*"oolcel"))
    assert facts["loop_rate"]["a"]["hits"] == 1 and facts["loop_rate"]["b"]["hits"] == 2
    assert facts["eos_rate"]["a"]["rate"] == pytest.approx(4 / 6) and facts["eos_rate"]["b"]["hits"] == 3
    assert facts["empty_rate"]["a"]["hits"] == 0 and facts["empty_rate"]["b"]["hits"] == 1
    assert facts["same"]["hits"] == 4 and facts["length_ratio"] == 1
    low, high = facts["loop_rate"]["b"]["ci"]
    assert low < 2 / 6 < high
    shown = [sample["prompt"] for sample in facts["samples"]]
    assert shown[:2] == ["prompt 2", "prompt 4"], "what went wrong is shown first"
    assert len(shown) == 6 and len(compare(answers(*"o" * 30), answers(*"o" * 30))["samples"]) == 10
    section = report_section(("A", "B"), facts)
    assert [row["name"] for row in section["rows"]] == ["A", "B"] and section["rows"][1]["loop_rate"] == 2 / 6
    json.dumps(section)


def test_length_ratio_is_the_median_of_pairs():
    a, b = answers(*"ooo"), answers(*"occ")
    assert compare(a, b)["length_ratio"] == 3
    assert compare(answers("o"), answers("e"))["length_ratio"] == 1 / 20


def test_worse():
    assert worse(answers(*"oolc"), answers(*"oolc")) == []
    assert worse(answers(*"ool"), answers(*"ooo")) == []
    [reason] = worse(answers(*"oooo"), answers(*"oolo"))
    assert reason == "answers that loop: 1 of 4, before 0 (p = 0.5)"
    [reason] = worse(answers(*"oooo"), answers(*"oeoo"))
    assert "empty" in reason
    assert worse(answers(*"oooo"), answers(*"ocoo")) == [], "one more cut answer is noise"
    assert worse(answers(*"oooo"), answers(*"oelo"), strict=False) == []
    assert len(worse(answers(*"o" * 9), answers(*"ccccccooo"))) == 1
    assert len(worse(answers(*"o" * 9), answers(*"llllllooo"), strict=False)) == 2  # nor do they end
    # As many loops elsewhere are no more loops.
    assert worse(answers(*"ollo"), answers(*"looc")) == []


def test_sign_test():
    assert sign_test(0, 0) == 1 and sign_test(5, 0) == 1 / 32 and sign_test(1, 1) == 0.75
    assert sign_test(8, 2) == pytest.approx(0.0546875)


def test_other_prompts_are_refused():
    with pytest.raises(ValueError):
        compare(answers(*"oo"), answers(*"ooo"))
    other = answers(*"oo")
    other.answers[0].prompt = "something else"
    with pytest.raises(ValueError, match="other prompts"):
        compare(answers(*"oo"), other)


def prompts():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(5, 128, (n,), generator=generator).tolist() for n in (4, 11, 2, 7, 5)]


def test_answers_are_greedy_and_do_not_depend_on_the_batch(model, tok):
    found = canary(model, tok, prompts(), max_new_tokens=9, batch_size=2)
    alone = [canary(model, tok, [prompt], max_new_tokens=9).answers[0] for prompt in prompts()]
    assert found.answers == alone and found.n == 5
    ids, answer = list(prompts()[1]), found.answers[1]
    with torch.no_grad():
        for token in answer.ids:
            assert token == int(model(torch.tensor([ids])).logits[0, -1].argmax())
            ids.append(token)
    assert answer.prompt == tok.decode(prompts()[1])
    assert Canary.from_facts(json.loads(json.dumps(found.facts()))) == found


def test_ended_is_the_end_token_before_the_limit(model, tok):
    [(free, _)] = continuations(model, tok, [prompts()[0]], 12)
    last = free[5]
    model.generation_config.eos_token_id = last
    try:
        answer = canary(model, tok, [prompts()[0]], max_new_tokens=12).answers[0]
    finally:
        model.generation_config.eos_token_id = 2
    assert answer.ended and answer.ids == free[: free.index(last)]
    assert not canary(model, tok, [prompts()[0]], max_new_tokens=3).answers[0].ended


def test_penalties_of_the_model_do_not_hide_loops(model, tok):
    plain = continuations(model, tok, prompts(), 20)
    model.generation_config.repetition_penalty = 5.0
    try:
        assert continuations(model, tok, prompts(), 20) == plain
    finally:
        model.generation_config.repetition_penalty = 1.0


def test_progress_mode_and_refusals(model, tok):
    model.train()
    done = []
    canary(model, tok, prompts(), max_new_tokens=1, batch_size=2, on_batch=done.append)
    assert done == [2, 4, 5] and model.training
    model.eval()
    with pytest.raises(UserError, match="no prompts"):
        canary(model, tok, [])
    with pytest.raises(UserError, match="prompt 1 of the canary is empty"):
        canary(model, tok, [[5], []])
