"""Corpora become documents: every kind of row, nothing lost without a word, and two sides that never mix."""

import json
from collections import Counter
from importlib.resources import files

import pytest
from tokenizers.processors import TemplateProcessing

from chats import chat, tokenizer, write_jsonl
from moesmith.data import corpora
from moesmith.data.corpora import (
    Document,
    Reader,
    check_enough,
    check_there,
    cut,
    describe,
    encode,
    hold_out,
    parse_corpora,
    read_corpus,
    read_documents,
    read_held_out,
    read_prompts,
    write_documents,
)
from moesmith.data.rows import Row
from moesmith.errors import UserError

PLAIN = tokenizer()
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% if enable_thinking %}think:{% endif %}{% endif %}"
)


def with_start():
    """A tokenizer that puts <s> before every text, as Llama's and Gemma's do."""
    made = tokenizer()
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", made.bos_token_id)]
    )
    return made


def rows(*values):
    return [Row(number, value) for number, value in enumerate(values, 1)]


def texts(n, words=30):
    return [{"text": " ".join(f"word{i}x{j}" for j in range(words))} for i in range(n)]


def read(*values, **options):
    return Reader(options.pop("words", PLAIN), **options).read("code", rows(*values))


# ---------------------------------------------------------------- rows


@pytest.mark.parametrize(
    "row",
    [
        {"messages": chat("2+2?", "4.")},
        {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4."}]},
        {"prompt": "2+2?", "completion": "4."},
        {"question": "2+2?", "answer": "4."},
        {"instruction": "2+2?", "output": "4."},
        {"messages": json.dumps(chat("2+2?", "4."))},
    ],
)
def test_every_kind_of_chat_row_is_rendered_as_the_template_does(row):
    (source,), counts = read(row)
    assert source.text == PLAIN.apply_chat_template(chat("2+2?", "4."), tokenize=False)
    assert source.ids == PLAIN(source.text, add_special_tokens=False).input_ids
    assert (source.content, source.question, counts.kept) == ("2+2?\n\n4.", None, 1)


def test_input_of_an_instruction_and_a_system_message_are_told_but_no_content_of_the_row():
    (source,), _ = read({"instruction": "Add.", "input": "2+2", "output": "4", "system": "Be brief."})
    assert "Be brief." in source.text and source.content == "Add.\n\n2+2\n\n4"


def test_text_rows_begin_with_the_start_token_and_chats_with_what_their_template_says():
    words = with_start()
    (text,), _ = read({"text": "hello"}, words=words)
    assert text.ids == words("hello").input_ids and text.ids[0] == words.bos_token_id
    (talk,), _ = read({"messages": chat("a", "b")}, words=words)
    assert words.bos_token_id not in talk.ids


def test_a_model_without_template_reads_the_turns_as_paragraphs():
    (source,), _ = read({"messages": chat("Hi", "Ho")}, words=tokenizer(template=None))
    assert source.text == "Hi\n\nHo"


def test_rows_are_kept_or_counted_under_a_reason():
    broken = Row(4, {}, "not JSON", "line 4")
    values = rows({"text": "a b"}, {"text": "a  b"}, {"text": " "})
    sources, counts = Reader(PLAIN).read("code", [*values, broken, Row(5, {"prose": "x"})])
    assert len(sources) == counts.kept == 1
    assert counts.dropped == Counter(
        {"copy of an earlier row": 1, "empty": 1, "not JSON": 1, "columns missing": 1}
    )
    assert counts.read == counts.kept + counts.dropped.total() == 5
    assert "1 copy of an earlier row" in next(describe({"code": counts}, str))


def test_a_copy_in_another_domain_is_dropped_too():
    reader = Reader(PLAIN)
    reader.read("code", rows({"text": "the same"}))
    with pytest.raises(UserError, match="copy of an earlier row"):
        reader.read("math", rows({"text": "the same"}))


def test_nothing_usable_names_the_columns():
    with pytest.raises(UserError) as caught:
        read({"body": "x", "lang": "en"})
    assert "columns missing" in caught.value.message and "body, lang" in caught.value.hint
    with pytest.raises(UserError, match="empty"):
        Reader(PLAIN).read("code", [])


# ---------------------------------------------------------------- questions


@pytest.mark.parametrize("row", [{"prompt": "Why?"}, {"messages": chat("Why?")}, {"question": "Why?"}])
def test_a_prompt_waits_for_the_model_only_when_it_may_answer(row):
    (asked,), _ = read(row, generate=None)
    assert asked.question == chat("Why?")
    assert asked.text == PLAIN.apply_chat_template(chat("Why?"), tokenize=False, add_generation_prompt=True)
    (alone,), _ = read(row, generate=False)
    assert alone.question is None
    assert alone.text == PLAIN.apply_chat_template(chat("Why?"), tokenize=False)


def test_an_answer_that_is_there_is_replaced_only_when_asked():
    row = {"messages": chat("Why?", "Because.")}
    assert read(row, generate=None)[0][0].question is None
    (source,), _ = read(row, generate=True)
    assert source.question == chat("Why?") and "Because" not in source.text


def test_thinking_is_switched_on_for_answers_where_the_template_can():
    words = tokenizer(template=THINKING)
    assert read({"prompt": "Why?"}, words=words, generate=None)[0][0].text.endswith("think:")
    assert not read({"prompt": "Why?"}, words=words, generate=None, thinking=False)[0][0].text.endswith(":")
    kwargs = {"prompt": "Why?", "chat_template_kwargs": {"enable_thinking": False}}
    assert not read(kwargs, words=words, generate=None)[0][0].text.endswith("think:")  # the row knows better
    unless_told = tokenizer(
        template=THINKING.replace(
            "if enable_thinking", "if enable_thinking is not defined or enable_thinking"
        )
    )
    for thinking in (True, False):
        (source,), _ = read({"prompt": "Why?"}, words=unless_told, generate=None, thinking=thinking)
        assert source.text.endswith("think:") == thinking


def test_a_prompt_longer_than_a_document_is_dropped_not_cut():
    with pytest.raises(UserError) as caught:
        read({"prompt": "x" * 100}, max_length=50, generate=None)
    assert "prompt too long" in caught.value.message and "--max-length" in caught.value.hint


# ---------------------------------------------------------------- the budget


def test_the_budget_is_filled_once_and_the_rest_is_said():
    sources, counts = read(*texts(50), tokens=2000, max_length=200)
    assert 2000 <= counts.tokens < 2000 + max(len(s.ids) for s in sources)
    assert counts.tokens == sum(len(s.ids) for s in sources)
    assert counts.unused == 50 - counts.read > 0
    assert f"{counts.read} of 50 rows" in next(describe({"code": counts}, str))


def test_rows_are_drawn_from_the_whole_file_and_not_by_their_order():
    values = texts(50)
    drawn = {s.text for s in read(*values, tokens=1000, max_length=200)[0]}
    assert {s.text for s in read(*reversed(values), tokens=1000, max_length=200)[0]} == drawn
    numbers = [int(s.id.split("/")[1]) for s in read(*values, tokens=1000, max_length=200)[0]]
    assert numbers == sorted(numbers) and max(numbers) > 10


def test_rows_are_drawn_from_as_much_as_fits_in_memory(monkeypatch):
    values = texts(50)
    monkeypatch.setattr(corpora, "READ_CHARACTERS", sum(len(json.dumps(value)) for value in values[:20]))
    sources, counts = read(*values, tokens=1_000_000, max_length=200)
    assert [s.id for s in sources] == [f"code/{n}" for n in range(1, 22)] and counts.unused == 0


def test_a_corpus_that_is_nowhere_is_said_at_once(tmp_path):
    (tmp_path / "a.jsonl").touch()
    check_there({"a": str(tmp_path / "a.jsonl"), "hub": "org/name"})
    with pytest.raises(UserError, match="typo.jsonl"):
        check_there({"code": "typo.jsonl"})


def test_one_row_is_never_most_of_a_domain():
    long = {"text": "y" * 50_000}
    (source,), counts = read(long, tokens=3000, max_length=100)
    assert (len(source.ids), counts.shortened, source.content) == (300, 1, "y" * 300)


# ---------------------------------------------------------------- cutting


def test_pieces_are_the_row_and_each_begins_like_a_text():
    words = with_start()
    (source,), _ = read({"text": "abcdefghij" * 25}, words=words)
    pieces = cut(source, 100, words)
    assert [i for p in pieces for i in p.ids[1:]] == source.ids[1:]
    assert {p.ids[0] for p in pieces} == {words.bos_token_id}
    assert max(len(p.ids) for p in pieces) <= 100 and min(len(p.ids) for p in pieces) > 80
    assert [p.id for p in pieces] == ["code/1", "code/1.2", "code/1.3"]
    assert "".join(p.text for p in pieces) == source.text


def test_an_answered_prompt_stays_whole():
    (source,), _ = read({"prompt": "x" * 90}, max_length=120, generate=None)
    source.ids, source.generated = source.ids + [9] * 200, True
    assert len(cut(source, 120, PLAIN)) == 1


# ---------------------------------------------------------------- two sides


@pytest.mark.parametrize("share", [0.1, 0.2, 0.5])
def test_the_share_is_held_out_of_every_domain(share):
    reader = Reader(PLAIN)
    sources = reader.read("code", rows(*texts(40)))[0] + reader.read("math", rows(*texts(45)[40:]))[0]
    hold_out(sources, share)
    for domain in ("code", "math"):
        mine = [s for s in sources if s.domain == domain]
        assert sum(s.held_out for s in mine) == max(1, round(share * len(mine)))


def test_the_sides_do_not_depend_on_the_order_of_rows():
    values = texts(20)
    chosen = []
    for order in (values, values[::-1]):
        sources, _ = read(*order)
        hold_out(sources, 0.3)
        chosen.append({s.text for s in sources if s.held_out})
    assert chosen[0] == chosen[1]


def test_nothing_is_held_out_of_one_row_or_by_request():
    sources, _ = read({"text": "alone"})
    hold_out(sources, 0.5)
    assert not sources[0].held_out
    sources, _ = read(*texts(5))
    hold_out(sources, 0.0)
    assert not any(s.held_out for s in sources)


def test_some_of_two_rows_is_observed_and_some_is_not():
    for share in (0.01, 0.89):
        sources, _ = read(*texts(2))
        hold_out(sources, share)
        assert sum(s.held_out for s in sources) == 1


def test_documents_of_one_row_are_on_one_side(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", texts(12, words=60))
    used, held_out, counts = read_documents({"code": str(path)}, PLAIN, max_length=100, held_out=0.3)
    sides = [{d.id.split(".")[0] for d in side} for side in (used, held_out)]
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 12
    assert len(used) > len(sides[0]), "no row was cut: the test shows nothing"
    assert sum(len(d.ids) for d in used + held_out) == counts["code"].tokens


def test_too_few_tokens_are_refused():
    with pytest.raises(UserError, match="math: 3 tokens"):
        check_enough(
            [Document("code/1", "code", None, [1] * 99), Document("math/1", "math", None, [1] * 3)],
            ["code", "math"],
        )


# ---------------------------------------------------------------- files


def test_a_text_file_is_cut_at_blank_lines_and_loses_nothing(tmp_path):
    text = "\n\n".join(f"    indented {i}\nsecond line {'x' * 40}" for i in range(30))
    (tmp_path / "book.txt").write_text(text)
    found = [row.value["text"] for row in read_corpus(str(tmp_path / "book.txt"), max_length=50)]
    assert "\n\n".join(found) == text
    assert len(found) > 5 and all(200 <= len(piece) < 300 for piece in found[:-1])


def test_a_folder_of_texts_is_read_whole(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.md").write_text("first")
    (tmp_path / "deep" / "b.py").write_text("second")
    (tmp_path / "c.png").write_bytes(b"\x89PNG")
    assert [row.value["text"] for row in read_corpus(str(tmp_path), 50)] == ["first", "second"]


def test_bytes_are_no_text(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        list(read_corpus(str(tmp_path / "a.bin"), 50))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no data and no text"):
        list(read_corpus(str(tmp_path / "empty"), 50))


def test_held_out_documents_come_back_as_they_were(tmp_path):
    documents = [
        Document("code/1", "code", "a\u2028b \x85 \n c", [5, 6], None),
        Document("math/2.2", "math", "x", [7], "1+1"),
    ]
    write_documents(tmp_path / corpora.HELD_OUT, documents)
    assert read_held_out(tmp_path) == documents == read_held_out(tmp_path / corpora.HELD_OUT)


def test_no_held_out_text_is_said(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_held_out(tmp_path / "prof")
    (tmp_path / corpora.HELD_OUT).touch()
    with pytest.raises(UserError, match="nothing was held out"):
        read_held_out(tmp_path)


def test_documents_with_and_without_ids_are_encoded():
    words = with_start()
    documents = [Document("a/1", "a", "hello", []), Document("a/2", "a", None, [4, 5, 6])]
    first, second = encode(words, documents, max_length=3)
    assert first.ids == words("hello").input_ids[:3]
    assert (second.ids, second.domain, second.id) == ([4, 5, 6], "a", "a/2")


# ---------------------------------------------------------------- names and prompts


def test_corpora_have_names():
    assert parse_corpora(["code=a.jsonl", "deep/math.jsonl"]) == {
        "code": "a.jsonl",
        "math": "deep/math.jsonl",
    }
    with pytest.raises(UserError, match="two domains"):
        parse_corpora(["code=a.jsonl", "code=b.jsonl"])
    with pytest.raises(UserError, match="no path"):
        parse_corpora(["code="])
    with pytest.raises(UserError, match="no name"):
        parse_corpora(["=a.jsonl"])


def test_the_shipped_prompts():
    assert files("moesmith.data").joinpath(corpora.PROMPTS).is_file()
    prompts = read_prompts(None)
    assert list(prompts) == ["math", "logic", "code", "science", "writing"]
    assert {len(found) for found in prompts.values()} == {10}
    said = [row.value["prompt"] for found in prompts.values() for row in found]
    assert len(set(said)) == 50
    for found in prompts.values():  # varied in length, some with several paragraphs
        lengths = [len(row.value["prompt"]) for row in found]
        assert max(lengths) > 5 * min(lengths)
        assert sum("\n\n" in row.value["prompt"] for row in found) >= 2


def test_prompts_of_a_file_by_domain(tmp_path):
    lines = [{"domain": "b", "prompt": "1"}, {"prompt": "2"}, {"domain": "b", "prompt": "3"}]
    found = read_prompts(str(write_jsonl(tmp_path / "p.jsonl", lines)))
    assert {domain: len(rows) for domain, rows in found.items()} == {"b": 2, "all": 1}
    with pytest.raises(UserError, match="has no rows"):
        read_prompts(str(write_jsonl(tmp_path / "none.jsonl", [])))
