"""Messages to token ids, and token ids to text as it grows, and to tool calls.

Templates and tokenizers come with the model and with every adapter, so each served name has a `Speaker`.
Tokens of one answer go through a `Words`, which holds back what may still change: half a character, the
beginning of a stop string.
"""

from __future__ import annotations

import json
import threading
import uuid
from dataclasses import dataclass, field
from typing import Any

from moesmith.data.tool_format import ToolFormat
from moesmith.data.tool_opening import Opening
from moesmith.data.tool_probe import without_thoughts
from moesmith.data.tools import ToolSpec, parse_tools
from moesmith.errors import UserError


@dataclass
class Speaker:
    """How one served name reads conversations and writes answers."""

    tokenizer: Any
    form: ToolFormat | None
    """None: there is no chat template"""
    stop_ids: frozenset[int]
    ends: tuple[str, ...] = ()
    """what ends a turn and is no single token"""
    markers: Any = None
    """thoughts.Markers"""
    defaults: dict[str, Any] = field(default_factory=dict)
    """sampling that the model's generation settings ask for"""
    lock: threading.Lock = field(default_factory=threading.Lock)
    """a fast tokenizer may not be set up by two threads at once"""

    @classmethod
    def of(cls, tokenizer: Any, generation: Any) -> Speaker:
        """The speaker of a tokenizer and a model's generation settings."""
        from .thoughts import Markers

        form = ToolFormat.of(tokenizer) if tokenizer.chat_template is not None else None
        own = generation.eos_token_id
        ids = {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id}
        ends = []
        for end in form.ends if form is not None else ():
            pieces = tokenizer.encode(end, add_special_tokens=False)
            if len(pieces) == 1:
                ids.add(pieces[0])
            else:
                ends.append(end)
        defaults = {"temperature": 0.0}
        if generation.do_sample:
            keys = ("temperature", "top_p", "top_k", "min_p")
            said = {key: getattr(generation, key, None) for key in keys}
            defaults = {"temperature": 1.0} | {key: value for key, value in said.items() if value is not None}
        stop_ids = frozenset(i for i in ids if i is not None)
        return cls(tokenizer, form, stop_ids, tuple(ends), Markers.of(tokenizer), defaults)

    def prompt(self, messages: list[dict[str, Any]], tools: ToolSpec | None) -> list[int]:
        """A conversation with the opening of the next answer, as token ids.

        Raises:
            UserError: no chat template, or one that refuses these messages.
        """
        if self.form is None:
            raise UserError("this model has no chat template", "use /v1/completions")
        with self.lock:
            return self.form.prompt_ids(self.tokenizer, messages, tools)

    def encode(self, text: str) -> list[int]:
        """Plain text as token ids, with the special tokens that the tokenizer adds."""
        with self.lock:
            return list(self.tokenizer(text).input_ids)

    def pieces(self, ids: list[int]) -> list[str]:
        """The text of every token by itself."""
        return [str(self.tokenizer.decode([token])) for token in ids]

    def read_calls(self, ids: list[int], tools: ToolSpec) -> tuple[str, list[dict[str, Any]]]:
        """(text beside the calls, OpenAI's tool_calls) of a finished answer."""
        assert self.form is not None
        found = self.form.parse(self.form.decode(self.tokenizer, ids), tools)
        calls = [
            {
                "id": f"call_{uuid.uuid4().hex[:24]}",
                "type": "function",
                "function": {
                    "name": call.name,
                    "arguments": json.dumps(call.arguments, ensure_ascii=False),
                },
            }
            for call in found.calls
        ]
        return found.text, calls


class Words:
    """The text of one answer as it grows.

    Args:
        stops: strings that end the answer; they are no part of it.
        special: with special tokens as they are written.
    """

    def __init__(self, tokenizer: Any, stops: tuple[str, ...] = (), special: bool = False):
        self.tokenizer, self.special = tokenizer, special
        self.stops = tuple(stop for stop in stops if stop)
        self.ids: list[int] = []
        self.text = ""
        self.stopped = False
        self._held = ""
        self._from = self._read = 0  # ids[_from:_read] have been shown and say how the next are joined

    def put(self, token: int) -> str:
        """What can be shown now that `token` has come."""
        self.ids.append(token)
        return self._show(self._new(last=False), last=False)

    def finish(self) -> str:
        """What was held back to the end."""
        return "" if self.stopped else self._show(self._new(last=True), last=True)

    def _new(self, last: bool) -> str:
        before = self._decode(self.ids[self._from : self._read])
        text = self._decode(self.ids[self._from :])
        if not last and text.endswith("\ufffd"):
            return ""  # the rest of the character is in the next token
        self._from, self._read = self._read, len(self.ids)
        return text[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        skip = not self.special
        return str(self.tokenizer.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False))

    def _show(self, new: str, last: bool) -> str:
        text = self._held + new
        self._held = ""
        found = [place for place in (text.find(stop) for stop in self.stops) if place >= 0]
        if found:
            text, self.stopped = text[: min(found)], True
        elif not last:
            held = max((_overlap(text, stop) for stop in self.stops), default=0)
            text, self._held = text[: len(text) - held], text[len(text) - held :]
        self.text += text
        return text


class BesideCalls:
    """What is said in an answer that may hold tool calls, as far as it is certainly no part of one."""

    def __init__(self, tokenizer: Any, form: ToolFormat):
        self.shown = ""
        """what `put` has let through"""
        self._words = Words(tokenizer, special=True)
        self._opening = Opening.of(form)
        self._waiting = ""

    def put(self, token: int, text: str) -> str:
        """What can be shown now that `token` has come, and `text` with it."""
        self._waiting += text
        if not self._opening.put(self._words.put(token)):
            return ""
        text, self._waiting = self._waiting, ""
        self.shown += text
        return text

    def rest(self, said: str) -> str:
        """What is still to be shown of an answer that has ended, and says `said` beside its calls."""
        for begun in (self.shown, self.shown.strip(), without_thoughts(self.shown).strip()):
            if said.startswith(begun):
                return said[len(begun) :]
        return ""


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is the beginning of `stop`."""
    most = min(len(text), len(stop) - 1)
    return next((n for n in range(most, 0, -1) if text.endswith(stop[:n])), 0)


def chat_messages(messages: list[Any]) -> list[dict[str, Any]]:
    """Checked messages (`schema.ChatMessage`) as chat templates take them."""
    made = []
    for message in messages:
        role = "system" if message.role == "developer" else message.role
        content = message.content
        if isinstance(content, list):
            content = "".join(part.text for part in content)
        one: dict[str, Any] = {"role": role, "content": content or ""}
        if message.tool_calls:
            one["tool_calls"] = [call.model_dump() for call in message.tool_calls]
        if message.role == "tool" and message.tool_call_id is not None:
            one["tool_call_id"] = message.tool_call_id
        if message.name is not None:
            one["name"] = message.name
        made.append(one)
    return made


def chat_tools(tools: list[Any] | None) -> ToolSpec | None:
    """Checked tools (`schema.Tool`) as data.

    Raises:
        UserError: a tool that is none, or two different ones of one name.
    """
    if not tools:
        return None
    return parse_tools([tool.model_dump(exclude_none=True) for tool in tools])
