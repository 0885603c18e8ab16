"""What a model thinks, apart from what it says: OpenAI's clients get the two as separate fields.

The markers are tokens of their own in every tokenizer that has them, so they are found by id, also where text
decoding leaves special tokens out. A marker that is plain text to the tokenizer stays text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .calls import Words

# (opens, closes, what the opening is followed by)
PAIRS = (("<think>", "</think>", ""), ("<|channel>", "<channel|>", "thought"))
# The harmony format: <|channel|>NAME<|message|>text<|end|>, then <|start|>ROLE and the next channel.
CHANNELS = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>")
THINKING = "analysis"
UNREAD = ("<|channel>", "<channel|>", *CHANNELS)  # what readers of tool calls leave in the text beside them
FAR = 4  # tokens behind an opening marker at the end of a prompt


@dataclass(frozen=True)
class Markers:
    """The ids of a tokenizer's markers; 0 pairs and no channels for most."""

    opens: dict[int, str]
    """id -> the heading that follows it"""
    closes: frozenset[int]
    channels: tuple[int, ...] = ()
    """start, channel, message, end"""

    @classmethod
    def of(cls, tokenizer: Any) -> Markers:
        """The markers that a tokenizer has as single tokens."""
        opens, closes = {}, set()
        for start, end, heading in PAIRS:
            first, last = _single(tokenizer, start), _single(tokenizer, end)
            if first is not None and last is not None:
                opens[first] = heading
                closes.add(last)
        channels = [_single(tokenizer, word) for word in CHANNELS]
        found = tuple(i for i in channels if i is not None)
        return cls(opens, frozenset(closes), found if len(found) == len(CHANNELS) else ())

    def left_open(self, prompt: list[int]) -> bool:
        """Whether a prompt ends with the opening of thoughts, as some templates write it."""
        for token in reversed(prompt[-FAR:]):
            if token in self.closes:
                return False
            if token in self.opens:
                return True
        return False


def _single(tokenizer: Any, word: str) -> int | None:
    ids = tokenizer.encode(word, add_special_tokens=False)
    return ids[0] if len(ids) == 1 and tokenizer.convert_ids_to_tokens(ids[0]) == word else None


class Reply:
    """An answer as it grows, in two streams.

    Args:
        stops: strings that end what is said; thoughts may hold them.
        thinking: the prompt has opened the thoughts.
    """

    def __init__(
        self, tokenizer: Any, markers: Markers | None, stops: tuple[str, ...], thinking: bool = False
    ):
        self.tokenizer, self.markers, self.stops = tokenizer, markers, stops
        self.mode = "thought" if thinking else "text"
        self.stopped = False
        self._words = self._new_words()
        self._heading = ""
        self._first = self.mode == "thought"

    def put(self, token: int) -> tuple[str, str]:
        """(text, thought) that can be shown now that `token` has come."""
        mode = self._mode_after(token)
        if mode is None:
            return self._show(self._words.put(token))
        shown = self._show(self._words.finish())
        name = self._words.text.strip() if self.mode == "channel" else ""
        if self.mode == "channel" and mode == "text" and name.startswith(THINKING):
            mode = "thought"
        self.mode, self._first = mode, True
        self._words = self._new_words()
        return shown

    def finish(self) -> tuple[str, str]:
        """What was held back to the end."""
        return self._show(self._words.finish())

    def _new_words(self) -> Words:
        return Words(self.tokenizer, self.stops if self.mode == "text" else ())

    def _mode_after(self, token: int) -> str | None:
        """The mode that a marker begins; None for any other token."""
        known = self.markers
        if known is None:
            return None
        if token in known.opens:
            self._heading = known.opens[token]
            return "thought"
        if token in known.closes:
            return "text"
        if token in known.channels:
            return ("skip", "channel", "text", "skip")[known.channels.index(token)]
        return None

    def _show(self, new: str) -> tuple[str, str]:
        self.stopped = self.stopped or self._words.stopped
        if self._first and new:  # line breaks beside a marker belong to it
            new = new.lstrip("\n") if self.mode == "text" else self._without_heading(new)
            self._first = not new
        if self.mode == "text":
            return new, ""
        return ("", new) if self.mode == "thought" else ("", "")

    def _without_heading(self, new: str) -> str:
        """Thoughts without the word and the line breaks they begin with; the word may come in pieces."""
        while self._heading and new and new[0] == self._heading[0]:
            new, self._heading = new[1:], self._heading[1:]
        if new:
            self._heading = ""
        return new.lstrip("\n")
