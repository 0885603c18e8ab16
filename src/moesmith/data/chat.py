"""Conversations: from the columns of a row to messages, and from messages to text with the learned turns marked.

What the model sees in training is what it will see when it answers: the chat template renders everything before a turn
with its generation prompt, and the turn is what the template adds to that. A template for which this does not hold
cannot mark assistant turns, and says so.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os.path
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from moesmith.errors import UserError

Format = Literal["auto", "messages", "prompt_completion", "instruction", "text"]
TrainOn = Literal["last_assistant", "all_assistant"]
Message = dict[str, Any]

# Column names that mean the same, in the order they are looked for.
MESSAGES = ("messages", "conversations", "conversation")
PAIRS = (("prompt", "completion"), ("prompt", "response"), ("question", "answer"))
INSTRUCTION = (("instruction", "output"), ("instruction", "response"))
COLUMNS = "messages · prompt + completion · instruction (+ input) + output"

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
ROLE_ALIASES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant", "observation": "tool"}


class RowError(Exception):
    """A row that cannot be learned from: `reason` is what it is counted under, `detail` says more about this one."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


class UnmarkableTurn(Exception):
    """The chat template does not show where an assistant turn begins or ends."""


@dataclass
class Conversation:
    """Messages and the turns to learn; or, without a template, a plain prompt and its completion."""

    messages: list[Message] = field(default_factory=list)
    learn: list[int] = field(default_factory=list)
    """indices of the assistant messages to learn, ascending"""
    tools: list[dict[str, Any]] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    plain: tuple[str, str] | None = None
    """(prompt, completion) as raw text"""
    kind: str = "messages"
    """the columns it came from"""


# ---------------------------------------------------------------- from columns to messages


def conversation(
    row: dict[str, Any], format: Format = "auto", train_on: TrainOn = "last_assistant", templated: bool = True
) -> Conversation:
    """The conversation in a row.

    Args:
        row: columns -> values, see `COLUMNS`; also `tools` and `chat_template_kwargs`, as objects or as JSON text.
        train_on: which assistant turns of `messages` are learned. A completion is always learned whole.
        templated: put prompt and completion strings through the chat template as a user and an assistant turn.

    Raises:
        RowError: nothing to learn in it, or not a conversation.
    """
    kind = detect(row) if format == "auto" else format
    if kind == "text":
        return Conversation(plain=("", _text(row, "text")), kind=kind)
    if kind == "messages":
        column = next((name for name in MESSAGES if row.get(name)), None)
        if column is None:
            raise RowError("columns missing", f"no {' or '.join(MESSAGES)}")
        messages = _messages(row[column], column)
        first_learned = 0
    else:
        prompt, completion = _pair(row, kind)
        if not templated:
            if not isinstance(prompt, str) or not isinstance(completion, str):
                raise RowError("not text", "data.apply_template=false wants prompt and completion as strings")
            if not completion:
                raise RowError("nothing to learn", "the completion is empty")
            return Conversation(plain=(prompt, completion), kind=kind)
        before = _messages(prompt, "prompt") if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        if isinstance(row.get("system"), str) and row["system"]:
            before = [{"role": "system", "content": row["system"]}, *before]
        after = (
            _messages(completion, "completion")
            if isinstance(completion, list)
            else [{"role": "assistant", "content": completion}]
        )
        messages, first_learned, train_on = before + after, len(before), "all_assistant"
    return Conversation(
        messages=messages,
        learn=learned_turns(messages, train_on, first_learned),
        tools=_json_column(row, "tools"),
        template_kwargs=_json_column(row, "chat_template_kwargs") or {},
        kind=kind,
    )


def detect(row: dict[str, Any]) -> Format:
    """Which of the known column sets a row has.

    Raises:
        RowError: none of them.
    """
    if any(row.get(name) for name in MESSAGES):
        return "messages"
    if any(a in row and b in row for a, b in PAIRS):
        return "prompt_completion"
    if any(a in row and b in row for a, b in INSTRUCTION):
        return "instruction"
    raise RowError("columns missing", f"has {', '.join(list(row)[:8])}")


def learned_turns(messages: Sequence[Message], train_on: TrainOn, first: int = 0) -> list[int]:
    """Indices of the assistant messages to learn.

    A turn is skipped when it has no content, when OpenAI's `weight` says 0, and when nothing comes before it.

    Raises:
        RowError: there is no assistant turn, or none with something in it.
    """
    assistant = [i for i, m in enumerate(messages) if m["role"] == "assistant" and i >= max(first, 1)]
    if not assistant:
        raise RowError("no assistant turn")
    if train_on == "last_assistant":
        assistant = assistant[-1:]
    learn = [i for i in assistant if _says_something(messages[i]) and messages[i].get("weight") != 0]
    if not learn:
        raise RowError("nothing to learn", "the assistant turn is empty")
    return learn


def _says_something(message: Message) -> bool:
    return bool(str(message.get("content") or "").strip() or message.get("tool_calls"))


def _messages(value: Any, column: str) -> list[Message]:
    """A list of messages with known roles and text content. Takes OpenAI's and ShareGPT's keys."""
    if isinstance(value, str):
        value = _parse_json(value, column)
    if not isinstance(value, list) or not value:
        raise RowError("empty", f"{column} has no messages")
    return [_message(entry) for entry in value]


def _message(entry: Any) -> Message:
    if not isinstance(entry, dict):
        raise RowError("bad roles", f"a message is a {type(entry).__name__}, not an object")
    # Tables fill absent keys with null: a null is an absent key.
    message = {k: v for k, v in entry.items() if v is not None}
    if "from" in message and "role" not in message:
        message = {"role": message.pop("from"), "content": message.pop("value", ""), **message}
    role = message.get("role")
    role = ROLE_ALIASES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise RowError("bad roles", f"role {role!r} is none of {', '.join(ROLES)}")
    content = message.get("content")
    if content is None and role in ("system", "developer", "user"):
        raise RowError("empty", f"a {role} message without content")
    message = {**message, "role": role, "content": "" if content is None else _content(content)}
    if message.get("tool_calls"):
        message["tool_calls"] = [_tool_call(call) for call in message["tool_calls"]]
    return message


def _content(content: Any) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
        return "".join(part["text"] for part in content)
    kinds = sorted({str(p.get("type")) for p in content if isinstance(p, dict)}) if isinstance(content, list) else []
    raise RowError("not text", f"content of type {', '.join(kinds) or type(content).__name__}")


def _tool_call(call: Any) -> dict[str, Any]:
    """A tool call with its arguments as an object: OpenAI sends them as JSON text, templates want the object."""
    if not isinstance(call, dict):
        raise RowError("bad roles", f"a tool call is a {type(call).__name__}, not an object")
    call = {k: v for k, v in call.items() if v is not None}
    function = call.get("function")
    holder = function if isinstance(function, dict) else call
    arguments = holder.get("arguments")
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments or "{}")
        except json.JSONDecodeError:
            parsed = arguments  # the model wrote broken JSON: keep what it wrote
        holder = {**holder, "arguments": parsed}
    return {**call, "function": holder} if isinstance(function, dict) else holder


def _pair(row: dict[str, Any], kind: str) -> tuple[Any, Any]:
    names = PAIRS if kind == "prompt_completion" else INSTRUCTION
    found = next(((a, b) for a, b in names if a in row and b in row), None)
    if found is None:
        raise RowError("columns missing", f"has {', '.join(list(row)[:8])}")
    prompt, completion = row[found[0]], row[found[1]]
    if not prompt:
        raise RowError("empty", f"{found[0]} is empty")
    if not completion:
        raise RowError("nothing to learn", f"{found[1]} is empty")
    for name, value in zip(found, (prompt, completion), strict=True):
        if not isinstance(value, (str, list)):
            raise RowError("not text", f"{name} is a {type(value).__name__}")
    if kind == "instruction" and row.get("input"):
        prompt = f"{prompt}\n\n{_text(row, 'input')}"
    return prompt, completion


def _text(row: dict[str, Any], column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str):
        raise RowError("not text" if value is not None else "columns missing", f"{column} is {type(value).__name__}")
    if not value.strip():
        raise RowError("empty", f"{column} is empty")
    return value


def _json_column(row: dict[str, Any], column: str) -> Any:
    value = row.get(column)
    return _parse_json(value, column) if isinstance(value, str) and value else value or None


def _parse_json(text: str, column: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise RowError("not JSON", f"{column}: {error}") from None


# ---------------------------------------------------------------- from messages to marked text


def render(tokenizer: PreTrainedTokenizerBase, talk: Conversation, upto: int, answer_next: bool = False) -> str:
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
    (`{% generation %}`) are used when it has one per assistant turn, otherwise the template is rendered turn by turn.

    Returns:
        text, spans as (first character, character after the last).

    Raises:
        RowError: the template refuses these messages, or leaves out an answer.
        UnmarkableTurn: the template renders a turn differently when it is not yet there, or no longer the last.
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
        raise UnmarkableTurn(f"message {i + 1} does not continue its generation prompt: {_difference(prompt, turn)}")
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
    return text[: max((at + len(t) for t in special_tokens(tokenizer) if (at := text.rfind(t)) >= 0), default=0)]


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
    """The conversation with tool arguments as JSON text, which some templates want; None without tool calls."""
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
        "data.chat_template: a copy of the template with {% generation %} ... {% endgeneration %} around the answer",
    ]
    if train_on == "all_assistant":
        ways.insert(0, "data.train_on=last_assistant, which only needs the last turn")
    ways.append("rows with prompt and completion as ready text, and data.apply_template=false")
    return UserError(
        f"row {row}: the chat template cannot mark assistant tokens: {problem}", "one of:\n- " + "\n- ".join(ways)
    )
