"""One request on its way: its choices as they are written, and the JSON a client reads.

The events of the engine come from other threads; they are put into the event loop here. Whoever stops reading
(a client that went away, a stop string, the deadline) ends the answer in the engine too.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .calls import BesideCalls
from .sampling import Sampling, Token
from .schema import STOPS, Refused
from .thoughts import Reply

if TYPE_CHECKING:
    from .batching import Event
    from .engine import Engine
    from .metrics import Metrics


@dataclass
class Part:
    """What came since the last part."""

    text: str
    """with tools: as far as no call can have begun"""
    thought: str
    tokens: list[Token]
    finish: str | None
    """set in the last part"""


@dataclass
class Choice:
    """One answer of a request."""

    engine: Engine
    metrics: Metrics
    name: str
    key: str
    """under which the answer is kept"""
    index: int
    prompt: list[int]
    how: Sampling
    stops: tuple[str, ...]
    deadline: float
    """of time.monotonic()"""
    chat: bool = False
    """thoughts are told from what is said"""
    beside: BesideCalls | None = None
    """holds back what may be a tool call; None if there are no tools"""
    tokens: list[Token] = field(default_factory=list)
    text: str = ""
    thought: str = ""
    finish: str | None = None

    @property
    def ids(self) -> list[int]:
        """The answer's token ids, the one that ended it included."""
        return [token.id for token in self.tokens]

    async def parts(self) -> AsyncIterator[Part]:
        """The answer as it grows.

        Raises:
            Refused: 503 the engine stops; 500 it failed; 504 the deadline passed.
        """
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event] = asyncio.Queue()

        def tell(event: Event) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody is left to be told
                loop.call_soon_threadsafe(events.put_nowait, event)

        speaker = self.engine.speakers[self.name]
        markers = speaker.markers if self.chat else None
        thinking = markers is not None and markers.left_open(self.prompt)
        reply = Reply(speaker.tokenizer, markers, (*self.stops, *speaker.ends), thinking)
        began = time.monotonic()
        first: float | None = None
        request = None
        try:
            try:
                request = self.engine.submit(self.name, self.prompt, self.how, tell)
            except RuntimeError as error:
                raise Refused(503, str(error), kind="server_error", headers={"Retry-After": "5"}) from None
            waiting: list[Token] = []
            while self.finish is None:
                event = await self._next(events)
                if first is None and event.tokens:
                    first = time.monotonic()
                    self.metrics.observe("first_token_seconds", first - began)
                shown = []
                for token in event.tokens:
                    self.tokens.append(token)
                    waiting.append(token)
                    text, thought = reply.put(token.id)
                    self.text += text
                    shown.append((self._shown(token, text), thought))
                    if reply.stopped:
                        break
                if reply.stopped:
                    self.finish = "stop"
                elif event.finish == "error" and self.engine.stopping:
                    raise Refused(503, STOPS, kind="server_error", headers={"Retry-After": "5"})
                elif event.finish == "error":
                    raise Refused(500, f"the answer failed: {event.error}", kind="server_error")
                elif event.finish is not None:
                    text, thought = reply.finish()
                    self.text += text
                    shown.append((text if self.beside is None else "", thought))
                    self.finish = event.finish
                text, thought = ("".join(said) for said in zip(*shown, strict=True)) if shown else ("", "")
                self.thought += thought
                if text or thought or self.finish is not None:
                    yield Part(text, thought, waiting, self.finish)
                    waiting = []
        finally:
            if request is not None:
                self.engine.cancel(request)
            self._record(began, first)

    def _shown(self, token: Token, text: str) -> str:
        return text if self.beside is None else self.beside.put(token.id, text)

    async def _next(self, events: asyncio.Queue[Event]) -> Event:
        left = self.deadline - time.monotonic()
        try:
            return await asyncio.wait_for(events.get(), max(left, 0.001))
        except TimeoutError:
            self.finish = "timeout"
            raise Refused(504, "the answer took too long", kind="server_error", code="timeout") from None

    def _record(self, began: float, first: float | None) -> None:
        now = time.monotonic()
        self.metrics.add("prompt_tokens_total", len(self.prompt), model=self.name)
        self.metrics.add("generated_tokens_total", len(self.tokens), model=self.name)
        self.metrics.add("answers_total", model=self.name, finish=self.finish or "cancelled")
        self.metrics.observe("answer_seconds", now - began)
        if first is not None and len(self.tokens) > 1:
            self.metrics.observe("token_seconds", (now - first) / (len(self.tokens) - 1))
        if self.tokens:
            self.engine.keep(self.key, self.name, self.prompt, self.ids)

    async def whole(self) -> Choice:
        """Wait for the end."""
        async for _ in self.parts():
            pass
        return self


async def together(choices: Sequence[Choice]) -> AsyncGenerator[tuple[Choice, Part], None]:
    """The parts of several answers, as they come."""
    ready: asyncio.Queue[tuple[Choice, Part] | BaseException | None] = asyncio.Queue()

    async def follow(choice: Choice) -> None:
        try:
            async for part in choice.parts():
                ready.put_nowait((choice, part))
            ready.put_nowait(None)
        except Exception as error:  # given to the reader
            ready.put_nowait(error)

    tasks = [asyncio.create_task(follow(choice)) for choice in choices]
    try:
        left = len(tasks)
        while left:
            one = await ready.get()
            if one is None:
                left -= 1
            elif isinstance(one, BaseException):
                raise one
            else:
                yield one
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


# ---------------------------------------------------------------- JSON


def usage(choices: Sequence[Choice], n: int | None = None) -> dict[str, int]:
    """Tokens read and written; the `n` answers to one prompt count it once."""
    read = sum(len(choice.prompt) for choice in choices[:: n or 1])
    written = sum(len(choice.tokens) for choice in choices)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def finite(logprob: float | None) -> float | None:
    """A log-probability that JSON can hold."""
    if logprob is None:
        return None
    return logprob if logprob > -9999.0 else -9999.0


def token_text(tokenizer: Any, token: int) -> str:
    """A token by itself, special ones as they are written."""
    return str(tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False))


def chat_logprobs(tokenizer: Any, tokens: Sequence[Token], stop_ids: frozenset[int]) -> dict[str, Any]:
    """Log-probabilities as chat completions have them, without the token that ends the answer."""

    def entry(token: int, logprob: float | None) -> dict[str, Any]:
        text = token_text(tokenizer, token)
        # Half a character has no text of its own, and bytes that a decoder has replaced are lost.
        known = "\ufffd" not in text
        return {
            "token": text,
            "logprob": finite(logprob),
            "bytes": list(text.encode("utf-8", "replace")) if known else None,
        }

    content = [
        entry(one.id, one.logprob) | {"top_logprobs": [entry(*pair) for pair in one.top]}
        for one in tokens
        if one.id not in stop_ids
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(tokenizer: Any, tokens: Sequence[Token], offset: int = 0) -> dict[str, Any]:
    """Log-probabilities as completions have them; `offset` is where the first token begins in the text."""
    texts = [token_text(tokenizer, one.id) for one in tokens]
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": texts,
        "token_logprobs": [finite(one.logprob) for one in tokens],
        "top_logprobs": [_top(tokenizer, one) if one.logprob is not None else None for one in tokens],
        "text_offset": offsets,
    }


def _top(tokenizer: Any, one: Token) -> dict[str, float | None]:
    """The likeliest tokens by their text, and the token itself; of two with one text the likelier stays."""
    found = {token_text(tokenizer, one.id): finite(one.logprob)}
    for token, logprob in reversed(one.top):
        found[token_text(tokenizer, token)] = finite(logprob)
    return found
