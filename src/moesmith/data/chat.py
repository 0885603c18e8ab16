"""From messages to text with the learned turns marked, through the model's chat template.

What the model sees in training is what it will see when it answers: the chat template renders what comes
before a turn with its generation prompt, and the turn is what the template adds to that. A template for which
this does not hold cannot mark assistant turns, and says so.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os.path

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from moesmith.errors import UserError

from .columns import Conversation, Message, RowError, TrainOn


class UnmarkableTurn(Exception):
    """The chat template does not show where an assistant turn begins or ends."""


def render(
    tokenizer: PreTrainedTokenizerBase, talk: Conversation, upto: int, answer_next: bool = False
) -> str:
    """The first `upto` messages as text; `answer_next` adds the template's generation prompt.

    Raises:
        RowError: the template refuses these messages.
    """
    return _render(tokenizer, talk, upto, answer_next, mark=False)[0]


def _render(
    tokenizer: PreTrainedTokenizerBase, talk: Conversation, upto: int, answer_next: bool, mark: bool
) -> tuple[str, list[tuple[int, int]]]:
    template = tokenizer.get_chat_template(tools=talk.tools)
    try:
        texts, spans = render_jinja_template(
            conversations=[talk.messages[:upto]],
            tools=talk.tools,
            chat_template=template,
            add_generation_prompt=answer_next,
            return_assistant_tokens_mask=mark,
            **{**tokenizer.special_tokens_map, **talk.template_kwargs},
        )
    except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
        # A template is a program over the row: whatever it trips over is about this row.
        raise RowError("template failed", f"{type(error).__name__}: {error}") from None
    return texts[0], spans[0] if mark else []


def marked_text(tokenizer: PreTrainedTokenizerBase, talk: Conversation) -> tuple[str, list[tuple[int, int]]]:
    """The conversation up to its last learned turn, and where in that text the learned turns are.

    A span starts after the generation prompt and ends after the turn's end token. Markers in the template
    (`{% generation %}`) are used when it has one per assistant turn, otherwise the template is rendered turn
    by turn.

    Returns:
        text, spans as (first character, character after the last).

    Raises:
        RowError: the template refuses these messages, or leaves out an answer.
        UnmarkableTurn: the template renders a turn differently when it is not yet there, or no longer the
            last.
    """
    try:
        text, spans = _marked_text(tokenizer, talk)
    except RowError:
        if (other := _arguments_as_text(talk)) is None:
            raise
        talk = other
        text, spans = _marked_text(tokenizer, talk)
    for i, (start, end) in zip(talk.learn, spans, strict=True):
        _check_said(talk.messages[i], text[start:end])
    return text, spans


def _marked_text(tokenizer: PreTrainedTokenizerBase, talk: Conversation) -> tuple[str, list[tuple[int, int]]]:
    upto = talk.learn[-1] + 1
    assistant = [i for i in range(upto) if talk.messages[i]["role"] == "assistant"]
    spans: list[tuple[int, int]] = []
    if has_markers(tokenizer.get_chat_template(tools=talk.tools)):
        text, marked = _render(tokenizer, talk, upto, answer_next=False, mark=True)
        if len(marked) == len(assistant):
            closing = text[marked[-1][1] :].rstrip()
            for i, (start, end) in zip(assistant, marked, strict=True):
                if i in talk.learn:
                    end += len(closing) if text.startswith(closing, end) else 0
                    spans.append((_after_prompt(tokenizer, talk, i, text, start, end), end))
    if not spans:
        text = render(tokenizer, talk, upto)
        spans = [_turn_span(tokenizer, talk, i, text) for i in talk.learn]
    text += _missing_end(tokenizer, talk, text)
    return text, [(start, _end_of_turn(tokenizer, text, start, end)) for start, end in spans]


def _after_prompt(
    tokenizer: PreTrainedTokenizerBase, talk: Conversation, i: int, text: str, start: int, end: int
) -> int:
    """`start`, or the end of the generation prompt when a template's marker stands before the role's name."""
    prompt = render(tokenizer, talk, i, answer_next=True)
    return len(prompt) if text.startswith(prompt) and start < len(prompt) < end else start


def _turn_span(tokenizer: PreTrainedTokenizerBase, talk: Conversation, i: int, text: str) -> tuple[int, int]:
    """Characters of `text` that message `i` adds to the prompt before it."""
    prompt = render(tokenizer, talk, i, answer_next=True)
    turn = text if i == talk.learn[-1] else render(tokenizer, talk, i + 1)
    if not turn.startswith(prompt):
        raise UnmarkableTurn(
            f"message {i + 1} does not continue its generation prompt: {_difference(prompt, turn)}"
        )
    if not text.startswith(turn):
        # Some templates close a whole conversation with one more token: what comes before it is the turn.
        shared = _upto_last_token(tokenizer, os.path.commonprefix([turn, text]))
        if len(shared) <= len(prompt) or _without_tokens(tokenizer, turn[len(shared) :]):
            raise UnmarkableTurn(
                f"message {i + 1} is rendered differently once later ones follow: {_difference(turn, text)}"
            )
        turn = shared
    return len(prompt), len(turn)


def _end_of_turn(tokenizer: PreTrainedTokenizerBase, text: str, start: int, end: int) -> int:
    """End of a learned turn: after its end token, without the line break templates put there.

    A turn that has none ends with the token that opens the next turn (GLM-4 stops at `<|user|>`).
    """
    closed = start + len(text[start:end].rstrip())
    if _ends_with_token(tokenizer, text[start:closed]):
        return closed
    opener = next((token for token in special_tokens(tokenizer) if text.startswith(token, end)), None)
    return end + len(opener) if opener else end


def _missing_end(tokenizer: PreTrainedTokenizerBase, talk: Conversation, text: str) -> str:
    """The token that would open the next turn, when the template closes the last one with none."""
    if _ends_with_token(tokenizer, text.rstrip()):
        return ""
    upto = talk.learn[-1] + 1
    called = bool(talk.messages[upto - 1].get("tool_calls"))
    reply = {"role": "tool" if called else "user", "content": "..."}
    following = dataclasses.replace(talk, messages=[*talk.messages[:upto], reply])
    try:
        longer = render(tokenizer, following, upto + 1)
    except RowError:
        return ""
    if not longer.startswith(text):
        return ""
    return next((token for token in special_tokens(tokenizer) if longer.startswith(token, len(text))), "")


def _upto_last_token(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """The text up to the end of the last special token in it."""
    return text[
        : max((at + len(t) for t in special_tokens(tokenizer) if (at := text.rfind(t)) >= 0), default=0)
    ]


def _without_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """What is left of a text without special tokens and white space."""
    for token in special_tokens(tokenizer):
        text = text.replace(token, "")
    return text.strip()


def _ends_with_token(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    return text.endswith(special_tokens(tokenizer))


def _check_said(message: Message, turn: str) -> None:
    """Some templates leave out what they do not know: tool calls, or content that is not a list of parts."""
    ending = message["content"].strip()[-24:].strip()
    if ending and ending not in turn:
        raise RowError("template failed", f"the chat template leaves out the answer ending in {ending!r}")
    for call in message.get("tool_calls") or []:
        name = call.get("function", call).get("name")
        if name and name not in turn:
            raise RowError("template failed", f"the chat template leaves out the call of {name}")


def _arguments_as_text(talk: Conversation) -> Conversation | None:
    """The conversation with tool arguments as JSON text, as some templates want; None without tool calls."""
    if not any(message.get("tool_calls") for message in talk.messages):
        return None
    messages = []
    for message in talk.messages:
        calls = []
        for call in message.get("tool_calls") or []:
            holder = call.get("function", call)
            if not isinstance(holder.get("arguments"), str):
                holder = {**holder, "arguments": json.dumps(holder.get("arguments", {}), ensure_ascii=False)}
            calls.append({**call, "function": holder} if "function" in call else holder)
        messages.append({**message, "tool_calls": calls} if calls else message)
    return dataclasses.replace(talk, messages=messages)


def has_markers(template: str) -> bool:
    """Whether a chat template marks assistant turns with `{% generation %}`."""
    return "endgeneration" in template


@functools.lru_cache(maxsize=8)
def special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Text of the tokens that stand for themselves (end of turn, end of text, roles), longest first."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    return tuple(sorted(added | set(tokenizer.all_special_tokens), key=len, reverse=True))


def _difference(a: str, b: str) -> str:
    """Both texts from just before they part."""
    at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    start = max(0, at - 20)
    return f"{a[start : at + 30]!r} against {b[start : at + 30]!r}"


def cannot_mark(problem: UnmarkableTurn, row: int, train_on: TrainOn) -> UserError:
    """What to do about a template that cannot mark assistant turns."""
    ways = [
        "data.template_kwargs, when the template has a switch for it (enable_thinking: false)",
        "data.chat_template: a copy of it with {% generation %} ... {% endgeneration %} around the answer",
    ]
    if train_on == "all_assistant":
        ways.insert(0, "data.train_on=last_assistant, which only needs the last turn")
    ways.append("rows with prompt and completion as ready text, and data.apply_template=false")
    return UserError(
        f"row {row}: the chat template cannot mark assistant tokens: {problem}",
        "one of:\n- " + "\n- ".join(ways),
    )
