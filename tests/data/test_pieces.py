"""Pieces of one row know their row, and nothing else is taken for a piece."""

from chats import tokenizer
from moesmith.data.corpora import Source, cut
from moesmith.data.pieces import row_numbers, row_of


def test_the_row_of_a_piece():
    names = ("code/7", "code/7.2", "code/7.31", "v1.5/7", "v1.5", "d0", "a.b/c.2")
    assert [row_of(name) for name in names] == [
        "code/7",
        "code/7",
        "code/7",
        "v1.5/7",
        "v1.5",
        "d0",
        "a.b/c.2",
    ]


def test_what_a_long_row_is_cut_into():
    words = tokenizer()
    text = "one two three four five six seven " * 20
    source = Source("code/7", "code", text, words(text).input_ids, text)
    pieces = cut(source, 40, words)
    assert len(pieces) > 3 and {row_of(piece.id) for piece in pieces} == {"code/7"}


def test_rows_are_numbered_as_they_come():
    assert row_numbers(["a/2", "a/1", "a/2.2", "b/2", "a/1.3", "", ""]) == [0, 1, 0, 2, 1, 3, 4]
