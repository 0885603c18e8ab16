"""Labels: what is learned, that a prompt's tokens are what the model will be given, and what a cut leaves."""

import numpy as np
import pytest
from tokenizers import normalizers, pre_tokenizers

from chats import chat, tokenizer
from moesmith.data.chat import render
from moesmith.data.columns import RowError, conversation
from moesmith.data.masks import IGNORED, Example, fit, split_tokens, tokenize


def learned_text(tok, example):
    return tok.decode([t for t in example.labels.tolist() if t != IGNORED])


@pytest.mark.parametrize(
    ("train_on", "text"),
    [("last_assistant", "Four.<|im_end|>"), ("all_assistant", "Two.<|im_end|>Four.<|im_end|>")],
)
def test_only_the_chosen_turns_are_learned_each_with_its_end(train_on, text):
    tok = tokenizer()
    example = tokenize(
        tok, conversation({"messages": chat("1+1?", "Two.", "2+2?", "Four.")}, train_on=train_on)
    )
    assert learned_text(tok, example) == text
    kept = example.labels != IGNORED
    assert (example.labels[kept] == example.input_ids[kept]).all()


def test_the_context_is_what_the_model_is_given_when_it_answers():
    tok = tokenizer()
    talk = conversation({"messages": chat("1+1?", "Two.", "2+2?", "Four.")})
    example = tokenize(tok, talk)
    first = int(np.argmax(example.labels != IGNORED))
    prompt = render(tok, talk, 3, answer_next=True)
    assert example.input_ids[:first].tolist() == tok(prompt, add_special_tokens=False).input_ids


def test_a_token_with_nothing_before_it_is_not_learned():
    tok = tokenizer(
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}{% endif %}{% endfor %}"
    )
    assert learned_text(tok, tokenize(tok, conversation({"messages": chat("a", "bcd")}))) == "cd"


def test_a_token_that_would_straddle_prompt_and_answer_is_split():
    # The prompt ends in a line break, the answer starts with one, and the tokenizer knows both as one token.
    tok = tokenizer(merges=[("\n", "\n")])
    talk = conversation({"messages": chat("a", "\nb")})
    whole = tok(render(tok, talk, 2), add_special_tokens=False).input_ids
    double = tok.convert_tokens_to_ids("\n\n")
    assert double in whole
    example = tokenize(tok, talk)
    assert double not in example.input_ids
    assert learned_text(tok, example) == "\nb<|im_end|>"


def test_a_tokenizer_that_puts_a_blank_before_every_text():
    tok = tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}")
    tok.backend_tokenizer.normalizer = normalizers.Prepend(" ")
    ids, positions = split_tokens(tok, "abcd", [2])
    assert tok.convert_ids_to_tokens(ids.tolist()) == [" ", "a", "b", "c", "d"]
    assert positions == [3]


def test_a_straddling_token_that_cannot_be_split_drops_the_row():
    tok = tokenizer(merges=[("b", "c")])
    tok.backend_tokenizer.normalizer = normalizers.Prepend(" ")
    with pytest.raises(RowError, match="swallows"):
        split_tokens(tok, "abcd", [2])


def test_plain_completion_ends_with_the_end_token():
    tok = tokenizer()
    example = tokenize(tok, conversation({"prompt": "1+1=", "completion": "2"}, templated=False))
    assert tok.decode(example.input_ids.tolist()) == "1+1=2</s>"
    assert learned_text(tok, example) == "2</s>"


def test_text_learns_everything_but_its_first_token():
    tok = tokenizer()
    example = tokenize(tok, conversation({"text": "abc"}, format="text"))
    assert tok.decode(example.input_ids.tolist()) == "abc</s>"
    assert learned_text(tok, example) == "bc</s>"


def test_the_tokenizers_own_start_token_is_context():
    from tokenizers.processors import TemplateProcessing

    tok = tokenizer()
    tok.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    example = tokenize(tok, conversation({"prompt": "ab", "completion": "c"}, templated=False))
    assert tok.decode(example.input_ids.tolist()) == "<s>abc</s>"
    assert learned_text(tok, example) == "c</s>"


def row_of(labels):
    labels = np.array(labels, dtype=np.int32)
    return Example(1, np.arange(len(labels), dtype=np.int32), labels)


def test_too_long_is_dropped_or_cut_at_the_end():
    row = row_of([-100, -100, 2, 3])
    assert fit(row, 4, "drop") == (row, False)
    with pytest.raises(RowError, match="too long"):
        fit(row, 3, "drop")
    cut, was_cut = fit(row, 3, "truncate")
    assert was_cut
    assert cut.input_ids.tolist() == [0, 1, 2]
    assert cut.learned == 1
    with pytest.raises(RowError) as error:
        fit(row, 2, "truncate")
    assert error.value.reason == "cut before the answer"


def test_multi_turn_cut_never_trains_a_turn_that_was_not_chosen():
    tok = tokenizer()
    example = tokenize(tok, conversation({"messages": chat("1+1?", "Two.", "2+2?", "Four.")}))
    before_answer = int(np.argmax(example.labels != IGNORED))
    for length in range(8, before_answer + 1):
        with pytest.raises(RowError, match="cut before the answer"):
            fit(example, length, "truncate")


def test_isolated_pretokenizer_keeps_positions():
    tok = tokenizer()
    tok.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ids, positions = split_tokens(tok, "ab cd", [3])
    assert tok.convert_ids_to_tokens(ids.tolist())[positions[0] :] == ["c", "d"]
