"""The answers to one request as JSON: whole, or in server-sent events."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from starlette.responses import JSONResponse, Response

from .answers import Choice, Part, chat_logprobs, completion_logprobs, together, usage
from .sampling import Token
from .schema import ChatRequest, CompletionRequest
from .streams import event, gather
from .thoughts import UNREAD

if TYPE_CHECKING:
    from .app import Server


class ChatReply:
    """The answers to one chat request as JSON, whole or in chunks."""

    def __init__(self, server: Server, asked: ChatRequest, key: str, tools: Any, choices: list[Choice]):
        self.server, self.asked, self.tools, self.choices = server, asked, tools, choices
        self.speaker = server.engine.speakers[asked.model]
        self.head = {"id": key, "created": int(time.time()), "model": asked.model}

    async def whole(self) -> Response:
        await gather(choice.whole() for choice in self.choices)
        made = [
            {
                "index": choice.index,
                "message": message,
                "logprobs": self.logprobs(choice.tokens),
                "finish_reason": end,
            }
            for choice in self.choices
            for message, end in [self.message(choice)]
        ]
        return JSONResponse(
            self.head
            | {"object": "chat.completion", "choices": made, "usage": usage(self.choices, len(made))}
        )

    def message(self, choice: Choice) -> tuple[dict[str, Any], str]:
        """(message, finish_reason)."""
        said: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
        if choice.thought:
            said["reasoning_content"] = choice.thought
        end = choice.finish or "stop"
        if self.tools is None:
            return said, end
        text, calls = self.speaker.read_calls(choice.ids, self.tools)
        if not calls:
            return said, end
        if choice.beside is not None and any(marker in text for marker in UNREAD):
            text = choice.beside.shown.strip()
        if self.asked.parallel_tool_calls is False:
            calls = calls[:1]
        said |= {"content": text or None, "tool_calls": calls}
        return said, "tool_calls" if end == "stop" else end

    def logprobs(self, tokens: list[Token]) -> dict[str, Any] | None:
        if not self.asked.logprobs:
            return None
        return chat_logprobs(self.speaker.tokenizer, tokens, self.speaker.stop_ids)

    async def lines(self) -> AsyncIterator[bytes]:
        """Server-sent events. Calls, and what may be one, come at the end: a call is known by its end."""
        for choice in self.choices:
            yield self.chunk(choice.index, {"role": "assistant", "content": ""})
        async with aclosing(together(self.choices)) as parts:
            async for choice, part in parts:
                for line in self.lines_of(choice, part):
                    yield line
        if self.asked.stream_options is not None and self.asked.stream_options.include_usage:
            yield event(self.base() | {"choices": [], "usage": usage(self.choices, len(self.choices))})
        yield b"data: [DONE]\n\n"

    def lines_of(self, choice: Choice, part: Part) -> Iterator[bytes]:
        """The events of one part. The choice may be ahead of it by now."""
        tokens, end = part.tokens, part.finish
        both: dict[str, Any] = {"content": part.text, "reasoning_content": part.thought}
        if choice.beside is not None and end is not None:
            message, end = self.message(choice)
            both["content"] += choice.beside.rest(message["content"] or "")
            calls = message.get("tool_calls", ())
            both["tool_calls"] = [{"index": place} | call for place, call in enumerate(calls)]
        delta = {key: value for key, value in both.items() if value}
        if delta or tokens:
            yield self.chunk(choice.index, delta, logprobs=self.logprobs(tokens))
        if end is not None:
            yield self.chunk(choice.index, {}, finish=end)

    def base(self) -> dict[str, Any]:
        return self.head | {"object": "chat.completion.chunk"}

    def chunk(
        self, index: int, delta: dict[str, Any], logprobs: Any = None, finish: str | None = None
    ) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return event(self.base() | {"choices": [choice]})


class CompletionReply:
    """The answers to one completion request as JSON, whole or in chunks."""

    def __init__(
        self, server: Server, asked: CompletionRequest, key: str, prompts: int, choices: list[Choice]
    ):
        self.server, self.asked, self.prompts, self.choices = server, asked, prompts, choices
        self.speaker = server.engine.speakers[asked.model]
        self.head = {
            "id": key, "object": "text_completion", "created": int(time.time()), "model": asked.model
        }  # fmt: skip

    async def whole(self) -> Response:
        if self.asked.max_tokens != 0:
            await gather(choice.whole() for choice in self.choices)
        made = [await self.choice(choice) for choice in self.choices]
        return JSONResponse(self.head | {"choices": made, "usage": usage(self.choices, self.asked.n)})

    async def choice(self, choice: Choice) -> dict[str, Any]:
        text, tokens = choice.text, choice.tokens
        if self.asked.echo:
            text = self.echoed(choice) + text
            if self.asked.logprobs is not None:
                read = await self.server.in_model_thread(
                    self.server.engine.score, self.asked.model, choice.prompt, self.asked.logprobs
                )
                tokens = read + tokens
        logprobs = None
        if self.asked.logprobs is not None:
            logprobs = completion_logprobs(self.speaker.tokenizer, tokens)
        return {
            "index": choice.index, "text": text, "logprobs": logprobs,
            "finish_reason": choice.finish or "length",
        }  # fmt: skip

    def echoed(self, choice: Choice) -> str:
        """The prompt as text."""
        asked = self.asked.prompts()[choice.index // (self.asked.n or 1)]
        if isinstance(asked, str):
            return asked
        return str(self.speaker.tokenizer.decode(asked, clean_up_tokenization_spaces=False))

    async def lines(self) -> AsyncIterator[bytes]:
        """Server-sent events."""
        if self.asked.echo:
            for choice in self.choices:
                yield self.chunk(choice, self.echoed(choice), None, None)
        offsets = [0] * len(self.choices)
        if self.asked.max_tokens != 0:
            async with aclosing(together(self.choices)) as parts:
                async for choice, part in parts:
                    place = offsets[choice.index]
                    offsets[choice.index] += len(part.text)
                    logprobs = None
                    if self.asked.logprobs is not None:
                        logprobs = completion_logprobs(self.speaker.tokenizer, part.tokens, place)
                    yield self.chunk(choice, part.text, logprobs, part.finish)
        if self.asked.stream_options is not None and self.asked.stream_options.include_usage:
            yield event(self.head | {"choices": [], "usage": usage(self.choices, self.asked.n)})
        yield b"data: [DONE]\n\n"

    def chunk(self, choice: Choice, text: str, logprobs: Any, finish: str | None) -> bytes:
        one = {"index": choice.index, "text": text, "logprobs": logprobs, "finish_reason": finish}
        return event(self.head | {"choices": [one]})
