"""Leaks: copied passages are found whatever the size, independent text and shared forms are not."""

import random

import numpy as np
import pytest

from moesmith.data import leaks
from moesmith.data.corpora import Document
from moesmith.data.leaks import check_disjoint, collect, disjoint, hash_ngrams, overlaps
from moesmith.errors import UserError

WORDS = [f"w{i}" for i in range(5000)]


def text(seed: int, length: int = 200) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=length))


def document(words: str, name: str = "code/1", domain: str = "code", content: str | None = None) -> Document:
    return Document(name, domain, words, [1], content)


CALIBRATION = [document(text(i), f"code/{i}") for i in range(20)]
KNOWN = collect(CALIBRATION)


def test_hashes_are_sorted_unique_and_all_there():
    assert KNOWN.dtype == np.uint64
    assert (np.diff(KNOWN.astype(object)) > 0).all()
    border = int(np.searchsorted(KNOWN, leaks.WHOLE))
    assert (border, len(KNOWN) - border) == (20 * (200 - 12), 20)


def test_independent_text_is_disjoint():
    found = check_disjoint(KNOWN, [document(text(1000 + i), f"math/{i}", "math") for i in range(20)])
    assert found == {"documents": 20, "ngrams": 20 * 188, "shared": 0}


def test_a_planted_passage_is_refused_with_its_place_and_count():
    copied = " ".join(CALIBRATION[7].text.split()[40:80])  # 40 words: 28 runs of 13
    planted = document(f"{text(77, 100)} {copied} {text(78, 100)}", "math/3", "math")
    with pytest.raises(UserError) as caught:
        check_disjoint(KNOWN, [document(text(2000)), planted])
    assert "math, document math/3 shares 28 of its 228 runs of 13 words" in caught.value.message
    kept, dropped = disjoint(KNOWN, [document(text(2000)), planted])
    assert [d.text for d in kept] == [text(2000)] and dropped[0].document is planted


def test_a_quotation_below_the_share_is_counted_and_let_pass():
    copied = " ".join(CALIBRATION[7].text.split()[:15])
    found = check_disjoint(KNOWN, [document(f"{text(77, 300)} {copied}")])
    assert found["shared"] == 3


def test_case_punctuation_and_spaces_do_not_hide_a_copy():
    words = CALIBRATION[3].text.upper().split()
    (found,) = overlaps(KNOWN, [document(",  ".join(words) + "!")])
    assert found.identical and found.shared == found.ngrams == 188


def test_a_whole_text_of_thirteen_words_is_a_copy_and_of_twelve_is_none():
    known = collect([document("Hello!"), document(text(1, 12), "code/2"), document(text(2, 13), "code/3")])
    assert check_disjoint(known, [document("hello"), document(text(1, 12))])["shared"] == 0
    with pytest.raises(UserError, match="word for word"):
        check_disjoint(known, [document(text(2, 13).upper(), "code/9")])
    (found,) = overlaps(np.array([*known, hash_ngrams("hello")[1]], dtype=np.uint64), [document("Hello!")])
    assert not found.leaks  # hashes of short texts in profiles that are there already


def test_twelve_words_have_no_run_of_thirteen():
    assert [len(hash_ngrams(text(1, n))[0]) for n in (0, 12, 13, 14)] == [0, 0, 1, 2]


def test_the_form_that_most_rows_share_is_no_leak():
    form = text(5, 30)
    rows = [document(f"{form} {text(i, 40)}", f"code/{i}") for i in range(10)]
    assert check_disjoint(collect(rows), [document(f"{form} {text(99, 40)}")])["shared"] == 0
    # in two rows it is a copied passage: nothing says that it is a form
    with pytest.raises(UserError, match="leaks"):
        check_disjoint(collect(rows[:2]), [document(f"{form} {text(99, 40)}")])


def with_header(header: str, rows: int, of: int) -> list[Document]:
    """`of` different documents, every first one of which opens with the header."""
    return [
        document(f"{header} {text(i, 250)}" if i < rows else text(i, 250), f"code/{i}") for i in range(of)
    ]


def test_a_licence_header_of_a_quarter_of_the_rows_is_no_leak():
    header = text(5, 84)
    known = collect(with_header(header, 10, of=40))
    others = [document(f"{header} {text(900 + i, 250)}", f"code/9{i}") for i in range(12)]
    assert check_disjoint(known, others)["shared"] < 12 * 2
    # whoever copies one of those rows is known by what only that row says
    with pytest.raises(UserError, match="leaks"):
        check_disjoint(known, [document(f"{header} {text(3, 250)[:600]} {text(901, 100)}")])


def test_what_three_of_a_thousand_rows_say_is_no_form():
    known = collect(with_header(text(5, 30), 3, of=1000))
    with pytest.raises(UserError, match="leaks"):
        check_disjoint(known, [document(f"{text(5, 30)} {text(99_999, 40)}")])


def test_a_long_passage_is_a_leak_whatever_the_length_of_the_text_around_it():
    around = text(77, 5000)
    (found,) = overlaps(KNOWN, [document(f"{around} {CALIBRATION[7].text}")])
    assert found.shared == 188 < leaks.SHARE * found.ngrams and found.leaks
    (quoted,) = overlaps(KNOWN, [document(f"{around} {' '.join(CALIBRATION[7].text.split()[:60])}")])
    assert quoted.shared == 48 and not quoted.leaks


def test_the_template_is_not_compared():
    system = text(5, 60)
    rows = [document(f"{system} {text(1, 30)}", content=text(1, 30))]
    other = document(f"{system} {text(2, 30)}", "math/1", "math", content=text(2, 30))
    assert check_disjoint(collect(rows), [other])["shared"] == 0


def test_a_sample_of_the_hashes_still_finds_the_copy(monkeypatch):
    monkeypatch.setattr(leaks, "CAP", 400)
    known = collect(CALIBRATION)
    assert len(known) == 400 + 20
    (copy,) = overlaps(known, [document(CALIBRATION[4].text + " " + text(900, 50))])
    assert copy.sampled and not copy.identical and copy.leaks
    assert copy.shared / copy.ngrams == pytest.approx(188 / 238, abs=0.2)
    check_disjoint(known, [document(text(3000 + i), f"math/{i}", "math") for i in range(20)])


def test_languages_without_spaces_have_words_too():
    assert leaks.words("東京は日本の首都です。Tokyo 2024") == [*"東京は日本の首都です", "tokyo", "2024"]
    for line in ("ភ្នំពេញជារាជធានី", "ວຽງຈັນແມ່ນນະຄອນຫຼວງ", "ရန်ကုန်မြို့တော်ကြီး", "𠀀𠀁𠀂𠀃𠀄𠀅𠀆𠀇𠀈𠀉𠀊𠀋𠀌"):
        assert len(hash_ngrams(line)[0]) == len(line) - 12


def test_the_file(tmp_path):
    leaks.write(tmp_path / leaks.NGRAMS, KNOWN)
    assert (leaks.read(tmp_path) == KNOWN).all()
    assert [path.name for path in tmp_path.iterdir()] == [leaks.NGRAMS]
    (tmp_path / leaks.NGRAMS).write_bytes((tmp_path / leaks.NGRAMS).read_bytes()[:100])
    with pytest.raises(UserError, match="no n-gram hashes"):
        leaks.read(tmp_path)
    with pytest.raises(UserError, match="no such file"):
        leaks.read(tmp_path / "elsewhere")


def test_nothing_collected_is_disjoint_from_everything():
    assert check_disjoint(collect([]), [document(text(1))])["shared"] == 0
