"""Text that is on every machine, in two halves that share nothing."""

import pytest

from chats import tokenizer
from moesmith.data.calibration import KINDS, sequences, texts


@pytest.fixture(scope="module")
def halves():
    made = tokenizer()
    return texts(made, held_out=False), texts(made, held_out=True)


def test_every_kind_is_there_and_long_enough_for_a_real_tokenizer(halves):
    for half in halves:
        assert tuple(half) == KINDS
        # about 4 characters a token: 6 rows of 512 tokens to calibrate on
        assert min(map(len, half.values())) > 4 * 6 * 512


def test_the_halves_share_no_paragraph(halves):
    fitted, judged = halves
    for kind in KINDS:
        paragraphs = [{p for p in half[kind].split("\n\n") if len(p) > 200} for half in (fitted, judged)]
        assert paragraphs[0] and paragraphs[1]
        assert paragraphs[0].isdisjoint(paragraphs[1]), kind


def test_exercises_are_rendered_by_the_chat_template(halves):
    assert halves[0]["tasks"].startswith("<|im_start|>user\n")
    assert "<|im_start|>" not in texts(tokenizer(template=None), held_out=False)["tasks"]


def test_rows_alternate_between_the_kinds():
    made = tokenizer()
    ids = sequences(made, {"a": "a" * 40, "b": "b" * 50}, per_kind=2, length=16)
    assert [made.decode(row) for row in ids] == ["a" * 16, "b" * 16] * 2


def test_a_text_that_is_too_short_is_named():
    with pytest.raises(ValueError, match="b: 9 tokens"):
        sequences(tokenizer(), {"a": "a" * 40, "b": "b" * 9}, per_kind=1, length=16)
