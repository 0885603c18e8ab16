"""Prompts that do not fit into one batch are read in parts, and the answers do not notice."""

import pytest

import served
from moesmith.serve import batching
from moesmith.serve.sampling import Sampling
from serve.test_engine import Heard, alone

LENGTHS = (50, 9, 33, 70, 16, 17)  # with 16 tokens to a batch: read in parts, alone and among others
PROMPTS = [[5 + (11 * i * j + 3 * j + i) % 90 for j in range(n)] for i, n in enumerate(LENGTHS, 1)]


@pytest.fixture(scope="module")
def engine():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batching, "BATCH_TOKENS", 16)
        made = served.engine()
    yield made
    made.stop(10)


@pytest.mark.parametrize("prompt", PROMPTS[:2], ids=len)
def test_one_long_prompt_alone(engine, prompt):
    assert Heard(engine, served.BASE, prompt, Sampling(6)).ids() == alone(engine, served.BASE, prompt, 6)


def test_long_and_short_prompts_together(engine):
    heard = [Heard(engine, served.BASE, prompt, Sampling(10)) for prompt in PROMPTS]
    assert [one.ids() for one in heard] == [alone(engine, served.BASE, p, 10) for p in PROMPTS]


def test_a_long_prompt_arrives_while_another_answer_is_written(engine):
    first = Heard(engine, served.BASE, PROMPTS[1], Sampling(40))
    first.events.get(timeout=60)  # its first token is out
    second = Heard(engine, served.ADAPTERS[0], PROMPTS[3], Sampling(6))
    assert second.ids() == alone(engine, served.ADAPTERS[0], PROMPTS[3], 6)
    assert len(first.ids()) == 39
