"""A key is a word or the first line of a file, and no message shows it."""

from __future__ import annotations

import pytest

from moesmith.errors import UserError
from moesmith.jobs._api_key import read_key


def test_a_word_or_the_first_line_of_a_file(tmp_path):
    (tmp_path / "key").write_text("from-file\nsecond line\n")
    assert (read_key(None), read_key("word"), read_key(str(tmp_path / "key"))) == (None, "word", "from-file")
    long = "k" * 5000
    assert read_key(long) == long
    assert read_key("a/b+c==") == "a/b+c=="


@pytest.mark.parametrize("given", ["missing/secret", "a/" + "secret" * 900, " ", "secrét", "secret\x07"])
def test_what_is_no_key_is_refused_without_being_shown(given):
    with pytest.raises(UserError, match="api_key") as caught:
        read_key(given, slash=False)
    assert "secr" not in str(caught.value) + str(caught.value.hint)


def test_a_file_without_a_key(tmp_path):
    for name, content in (("empty", b"\n"), ("binary", b"\xff\xfe")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match="api_key"):
            read_key(str(tmp_path / name))
