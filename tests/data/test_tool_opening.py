"""What is let through of a growing answer is no part of a call, whatever the format; prose is let through."""

from __future__ import annotations

import itertools

import pytest

import chats
import tool_templates
from moesmith.data.tool_format import ToolFormat
from moesmith.data.tool_opening import Opening, literal, marks_of
from moesmith.data.tool_probe import ONE, Turn, tools_for, without_thoughts

TOOLS = tools_for([ONE])
BARE = '{"name": "%s", "arguments": {}}' % ONE.name  # noqa: UP031 (braces)
PROSE = ("", "Let me see.", "Let me see.\n\n", "a [1] and `x` {y}\n", "<think>\n{a\n</think>\n\nWell, ", "\n")
AFTER = ("", "\nDone.", "\n[not a call]")
ONE_PIECE = ("llama_4",)  # calls without a mark that are no JSON: any text may be one


def shown(opening: Opening, text: str) -> str:
    """What is let through of a text that comes character by character."""
    through = waiting = ""
    for character in text:
        waiting += character
        if opening.put(character):
            through, waiting = through + waiting, ""
    return through


def own_call(tokenizer, form: ToolFormat) -> str:
    """A call as the template writes it."""
    return form._without_end(Turn.of(tokenizer, [ONE], form.form).text)


@pytest.mark.parametrize("name", tool_templates.PUBLISHED)
def test_nothing_of_a_call_is_shown_and_prose_is(name):
    tokenizer = chats.tokenizer(tool_templates.PUBLISHED[name])
    form = ToolFormat.of(tokenizer)
    calls = (own_call(tokenizer, form), BARE, f"```json\n{BARE}\n```", f"```\n\n  {BARE}\n```")
    for before, call, after in itertools.product(PROSE, calls, AFTER):
        text = before + call + after
        found = form.parse(text, TOOLS)
        if not found.calls and not found.malformed:
            continue
        through = shown(Opening.of(form), text)
        assert found.text.startswith(without_thoughts(through).strip()), (text, through)
        if name not in ONE_PIECE:
            assert without_thoughts(before).strip() in through, text
    plain = "Paris is the capital.\n\n```python\nprint()\n```\nYes"
    assert shown(Opening.of(form), plain) == ("" if name in ONE_PIECE else plain)


def test_a_mark_is_known_by_its_beginning():
    opening = Opening(("<call>",))
    assert [opening.put(part) for part in ("a <", "b", "<ca", "ll", ">", "x")] == [
        False, True, False, False, False, False
    ]  # fmt: skip


def test_thoughts_that_look_like_a_call_hold_back_nothing_behind_them():
    opening = Opening(("<call>",))
    assert not opening.put("<call> maybe?")
    assert opening.put("</think>\nNo")
    late = Opening(("<call>",))
    assert not late.put("a <think> <call>")
    assert not late.put("</think> b"), "these are no thoughts to the reader of calls"


@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [
        (r"<tool_call>\s*<function=(?P<name>\w+)>", "<tool_call>"),
        (r"<\|tool_call>call:(?P<name>\w+)", "<|tool_call>call:"),
        (r"to=functions\.(?P<name>\S+?)<", "to=functions."),
        (r"(?:<\|tool\|>\[|,\s*)(?P<name>\w+)", ""),
        (r"abc*d", "ab"),
        (r"ab|cd", ""),
    ],
)
def test_the_text_that_a_pattern_begins_with(pattern, wanted):
    assert literal(pattern) == wanted


def test_every_published_template_of_the_library_has_a_mark_or_is_held_whole():
    from moesmith.data.tool_response import published_grammars

    found = [marks_of(grammar) for grammar in published_grammars(chats.tokenizer())]
    assert ("<tool_call>",) in found
    assert all(marks is None or all(marks) for marks in found)
