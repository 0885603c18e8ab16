"""Tool calls of a model behind an OpenAI-compatible server: what the server makes of them is judged.

The conversation and the tools go out as OpenAI's routes take them, and the calls come back as `tool_calls`.
Chat template and reading of calls are the server's: where it differs from ours, so do the answers. A call
that the server left in the text counts as text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moesmith.data.requests import Request
from moesmith.data.tool_text import Parsed
from moesmith.data.tools import Call

from .reasoning import split_any
from .served import Server, in_parallel, text_of
from .tool_calls import ToolAnswer, judge_parsed

# What calls begin with in the text of well-known templates, when nobody has read them.
UNREAD = ("<tool_call", "[TOOL_CALLS]", "<|python_tag|>", "<function=")


def ask_requests(
    server: Server, requests: Sequence[tuple[int, Request]], *, max_tokens: int, concurrency: int = 4
) -> Iterator[tuple[int, ToolAnswer]]:
    """(place, judged answer) as answers come, greedily, `concurrency` requests at a time.

    Raises:
        UserError: the server refuses, or is gone for good.
    """

    def ask(request: Request) -> ToolAnswer:
        found, _ = server.complete(body_of(server, request, max_tokens))
        return judged(request, found)

    return in_parallel(server, ask, requests, concurrency)


def body_of(server: Server, request: Request, max_tokens: int) -> dict[str, Any]:
    """The chat completion that asks a request."""
    body: dict[str, Any] = {
        "model": server.model,
        "messages": as_openai(request.prompt),
        "temperature": 0,
        "max_tokens": max_tokens,
    }
    if len(request.tools):
        body["tools"] = request.tools.openai()
    if server.kind == "llamacpp":
        body["cache_prompt"] = False  # a kept prefix changes rounding, and with it greedy answers
    return body


def as_openai(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages as chat templates take them -> as OpenAI does: arguments as text, calls with ids."""
    made, made_ids = [], 0
    waiting: list[str] = []  # ids of calls whose results have not come yet
    for message in messages:
        one = {key: value for key, value in message.items() if key in ("role", "content", "name")}
        if message.get("tool_calls"):
            waiting = [f"call_{made_ids + i}" for i in range(len(message["tool_calls"]))]
            made_ids += len(waiting)
            one["tool_calls"] = [
                {
                    "id": name,
                    "type": "function",
                    "function": {"name": function["name"], "arguments": _as_text(function.get("arguments"))},
                }
                for name, function in zip(
                    waiting, (call.get("function", call) for call in message["tool_calls"]), strict=True
                )
            ]
            one.setdefault("content", None)
        elif message["role"] == "tool":
            one["tool_call_id"] = waiting.pop(0) if waiting else f"call_{made_ids}"
        made.append(one)
    return made


def _as_text(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments or {}, ensure_ascii=False)


def judged(request: Request, found: Mapping[str, Any]) -> ToolAnswer:
    """A chat completion against its request."""
    choice = found["choices"][0]
    message = choice["message"]
    _, text = split_any(text_of(message.get("content")))
    parsed = Parsed(text=text)
    for call in message.get("tool_calls") or []:
        function = call.get("function") or {}
        try:
            arguments = json.loads(function.get("arguments") or "{}")
        except (TypeError, ValueError):
            arguments = None
        if isinstance(arguments, dict) and isinstance(function.get("name"), str):
            parsed.calls.append(Call(function["name"], arguments))
        else:
            parsed.malformed.append(json.dumps(function, ensure_ascii=False))
    calls = [json.dumps(call.openai()["function"], ensure_ascii=False) for call in parsed.calls]
    tokens = (found.get("usage") or {}).get("completion_tokens") or 0
    answer = "\n".join(part for part in [text.strip(), *calls, *parsed.malformed] if part)
    return judge_parsed(request, parsed, answer, tokens, cut=choice.get("finish_reason") == "length")


def unread(answers: Sequence[ToolAnswer]) -> int:
    """Answers whose text holds a call that the server did not read."""
    return sum(not one.called and any(mark in one.answer for mark in UNREAD) for one in answers)
