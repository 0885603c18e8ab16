"""Which part of a rendered conversation is learned, on published chat templates and on odd rows."""

import pytest

from chats import chat, tokenizer, trl_template
from moesmith.data.chat import UnmarkableTurn, cannot_mark, marked_text
from moesmith.data.columns import RowError, conversation

MULTI = chat("1+1?", "Two.", "2+2?", "Four.")
TOOLS = [
    {
        "type": "function",
        "function": {"name": "gpu", "description": "d", "parameters": {"type": "object", "properties": {}}},
    }
]
CALLED = [{"type": "function", "function": {"name": "gpu", "arguments": '{"id": 1}'}}]
CALL = [
    {"role": "user", "content": "gpu?"},
    {"role": "assistant", "content": None, "tool_calls": CALLED},
    {"role": "tool", "name": "gpu", "content": "ok"},
    {"role": "assistant", "content": "It is fine."},
]  # fmt: skip


def learned(template, messages, train_on="last_assistant", special=(), **row):
    tok = tokenizer(template, special=special)
    talk = conversation({"messages": messages, **row}, "auto", train_on)
    text, spans = marked_text(tok, talk)
    return [text[a:b] for a, b in spans]


# Template, tokens it needs, the last turn, all turns (None: they cannot be marked).
PUBLISHED = [
    ("qwen2_5", (), ["Four.<|im_end|>"], ["Two.<|im_end|>", "Four.<|im_end|>"]),
    ("qwen3", (), ["<think>\n\n</think>\n\nFour.<|im_end|>"], None),
    ("gemma3", ("<end_of_turn>",), ["Four.<end_of_turn>"], ["Two.<end_of_turn>", "Four.<end_of_turn>"]),
    ("gemma4", ("<turn|>", "<|turn>"), ["Four.<turn|>"], ["Two.<turn|>", "Four.<turn|>"]),
    ("gptoss", ("<|return|>", "<|end|>"), ["<|channel|>final<|message|>Four.<|return|>"], None),
    ("llama3", ("<|eot_id|>",), ["Four.<|eot_id|>"], ["Two.<|eot_id|>", "Four.<|eot_id|>"]),
    # Phi-3 closes a conversation with one more token than a turn.
    ("phi3", ("<|end|>",), ["Four.<|end|>\n</s>"], ["Two.<|end|>", "Four.<|end|>\n</s>"]),
    # GLM-4 has no end of turn: the token that opens the next one stops it.
    ("glm4moe", ("<|user|>", "<|assistant|>"), ["\n<think></think>\nFour.<|user|>"],
     ["\n<think></think>\nTwo.<|user|>", "\n<think></think>\nFour.<|user|>"]),
    # Templates with {% generation %}: the marker may stand before the role's name.
    ("gptoss_training", ("<|return|>", "<|end|>"), ["<|channel|>final<|message|>Four.<|return|>"],
     ["<|channel|>final<|message|>Two.<|end|>", "<|channel|>final<|message|>Four.<|return|>"]),
    ("qwen3_instruct_2507_training", (), ["Four.<|im_end|>"], ["Two.<|im_end|>", "Four.<|im_end|>"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "special", "last", "every"), PUBLISHED, ids=[row[0] for row in PUBLISHED])
def test_published_templates(name, special, last, every):
    template = trl_template(name)
    assert learned(template, MULTI, "last_assistant", special) == last
    if every is None:
        with pytest.raises(UnmarkableTurn, match="rendered differently"):
            learned(template, MULTI, "all_assistant", special)
    else:
        assert learned(template, MULTI, "all_assistant", special) == every


def test_a_forced_thinking_prompt_cannot_mark_a_plain_answer():
    with pytest.raises(UnmarkableTurn, match="does not continue its generation prompt"):
        learned(trl_template("nemotron_3_nano"), MULTI)
    assert learned(trl_template("nemotron_3_nano"), MULTI, chat_template_kwargs={"enable_thinking": False})


def test_what_to_do_when_a_template_cannot_mark():
    for train_on, first in (
        ("all_assistant", "data.train_on=last_assistant"),
        ("last_assistant", "data.template_kwargs"),
    ):
        error = cannot_mark(UnmarkableTurn("it differs"), 7, train_on)
        assert "row 7" in error.message
        assert first in error.hint.splitlines()[1]
        assert "data.chat_template" in error.hint
        assert "apply_template=false" in error.hint


def test_trailing_user_turns_are_left_out_of_the_text():
    text, spans = marked_text(tokenizer(), conversation({"messages": chat("a", "b", "c")}))
    assert text.endswith("b<|im_end|>\n")
    assert text[slice(*spans[0])] == "b<|im_end|>"


# --- tools


@pytest.mark.parametrize("name", ["qwen2_5", "gemma4", "gptoss"])
def test_tool_calls_with_null_content(name):
    template = trl_template(name)
    last = learned(template, CALL, tools=TOOLS)
    assert len(last) == 1
    assert "It is fine." in last[0]
    call, answer = learned(template, CALL, "all_assistant", tools=TOOLS)
    assert "gpu" in call and "ok" not in call
    assert "It is fine." in answer
    text, _ = marked_text(tokenizer(template), conversation({"messages": CALL, "tools": TOOLS}))
    assert '"d"' in text or "description" in text or "d" in text.split("gpu")[0] + text


def test_tool_arguments_are_given_as_the_template_wants_them():
    as_object = learned(trl_template("qwen2_5"), CALL, "all_assistant", tools=TOOLS)[0]
    assert '"arguments": {"id": 1}' in as_object
    as_text = learned(trl_template("deepseekv3_training"), CALL, "all_assistant", tools=TOOLS)[0]
    assert '{"id": 1}' in as_text


def test_a_template_that_leaves_out_the_tool_call_is_no_lesson():
    with pytest.raises(RowError, match="leaves out the call of gpu"):
        learned(trl_template("llama3"), CALL, "all_assistant", tools=TOOLS)


def test_a_template_that_leaves_out_the_answer_is_no_lesson():
    with pytest.raises(RowError, match="leaves out the answer"):
        learned(trl_template("smolvlm"), chat("a", "Four."))


def test_a_template_that_refuses_the_row_is_a_reason_not_a_crash():
    with pytest.raises(RowError, match="System role not supported"):
        learned(trl_template("gemma"), chat("a", "b", system="s"))
