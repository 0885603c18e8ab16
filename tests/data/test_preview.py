"""The preview shows the whole row and marks exactly what is learned."""

from tokenizers import normalizers

from chats import chat, tokenizer
from moesmith.data.columns import conversation
from moesmith.data.masks import tokenize
from moesmith.data.preview import LEARNED_STYLE, preview


def test_learned_tokens_are_marked_in_plain_text_and_coloured_on_a_terminal():
    tok = tokenizer()
    example = tokenize(
        tok, conversation({"messages": chat("1+1?", "Two.", "2+2?", "Four.")}, train_on="all_assistant"), 7
    )
    plain = preview(tok, example, colour=False).plain
    assert plain == (
        f"row 7 · {len(example)} tokens, 11 trained\n"
        "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n«Two.<|im_end|>»\n"
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n«Four.<|im_end|>»\n"
    )
    coloured = preview(tok, example, colour=True)
    green = [coloured.plain[s.start : s.end] for s in coloured.spans if s.style == LEARNED_STYLE]
    assert green == ["Two.<|im_end|>", "Four.<|im_end|>"]
    assert "«" not in coloured.plain


def test_blanks_that_a_tokenizer_adds_are_not_lost():
    tok = tokenizer()
    tok.backend_tokenizer.normalizer = normalizers.Prepend(" ")
    example = tokenize(tok, conversation({"prompt": "a b", "completion": " c"}, templated=False))
    assert "« c" in preview(tok, example, colour=False).plain
