"""A conversation with a model behind an OpenAI-compatible server: `moesmith chat --server URL`.

Only the standard library speaks here, so a machine without torch models or the serve packages can be the
client. An answer is streamed; Ctrl-C closes the connection, which is how the server learns to stop. What a
server sends is shown without control characters: text from elsewhere cannot steer the terminal.
"""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from moesmith import console
from moesmith.errors import UserError
from moesmith.jobs._conversation import Answer, say_figures

if TYPE_CHECKING:
    from moesmith.data.tools import Call, ToolSpec

SILENCE = 600  # seconds without a byte before a server is given up: a long prompt on a CPU takes its time


class Server:
    """The routes of a server that a conversation needs.

    Args:
        url: with or without /v1 at its end.
        key: sent as a bearer token.
    """

    def __init__(self, url: str, key: str | None = None):
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"server: {url} is no address", "for example http://127.0.0.1:8000")
        self.url = url.rstrip("/").removesuffix("/v1")
        self.key = key
        # A proxy that the environment names is for places elsewhere, not for this machine.
        here = parts.hostname in ("localhost", "::1") or parts.hostname.startswith("127.")
        self._opener = urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if here else []))

    def models(self) -> list[str]:
        """The names it serves."""
        with self._open("/v1/models") as response:
            found = self._json(response)
        try:
            return [model["id"] for model in found["data"]]
        except (KeyError, TypeError):
            raise UserError(f"{self.url} does not list its models as OpenAI's servers do") from None

    def experts(self, answer: str) -> dict[str, Any]:
        """The picture of a kept answer's experts. Only moesmith's own server has it."""
        found: dict[str, Any] = self._json(self._open(f"/moesmith/experts/{urllib.parse.quote(answer)}"))
        return found

    def chat(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The chunks of one answer. Closing the iterator closes the connection."""
        asked = body | {"stream": True, "stream_options": {"include_usage": True}}
        with self._open("/v1/chat/completions", asked) as response:
            try:
                for raw in response:
                    line = raw.decode("utf-8", "replace").strip()
                    if not line.startswith("data:"):
                        continue
                    data = line.removeprefix("data:").strip()
                    if data == "[DONE]":
                        return
                    chunk = json.loads(data)
                    if "error" in chunk:
                        raise UserError(f"{self.url}: {_message(chunk) or 'the answer failed'}")
                    yield chunk
            except (OSError, http.client.HTTPException, json.JSONDecodeError) as error:
                raise UserError(f"{self.url}: the answer broke off ({_words(error)})") from None
        raise UserError(f"{self.url}: the answer broke off")

    def _open(self, path: str, body: dict[str, Any] | None = None) -> Any:
        request = urllib.request.Request(self.url + path)
        if self.key:
            request.add_header("Authorization", f"Bearer {self.key}")
        if body is not None:
            request.add_header("Content-Type", "application/json")
            request.data = json.dumps(body).encode()
        try:
            return self._opener.open(request, timeout=SILENCE)
        except urllib.error.HTTPError as error:
            raise self._refused(path, error) from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise UserError(
                f"no answer from {self.url}: {_words(reason)}", "moesmith serve MODEL starts a server"
            ) from None

    def _refused(self, path: str, error: urllib.error.HTTPError) -> UserError:
        try:
            said = _message(json.load(error))
        except (ValueError, OSError):
            said = ""
        if error.code == 401:
            hint = "the key is wrong" if self.key else "--api-key KEY, or a file that holds it"
            return UserError(f"{self.url} wants an API key", hint)
        if error.code == 404 and path.startswith("/moesmith/"):
            return UserError(said or f"{self.url} cannot show experts; `moesmith serve` can")
        wait = error.headers.get("Retry-After")
        return UserError(
            f"{self.url} answered {error.code}: {said or error.reason}",
            f"try again in {wait} s" if wait else None,
        )

    def _json(self, response: Any) -> Any:
        try:
            return json.load(response)
        except (ValueError, OSError, http.client.HTTPException) as error:
            raise UserError(f"{self.url} answered something else than JSON ({_words(error)})") from None


@dataclass
class ServerChat:
    """A conversation: what was said so far, and the server that answers."""

    server: Server
    model: str
    options: dict[str, Any]
    """sampling, as the request has it"""
    system: str | None = None
    tools: ToolSpec | None = None
    messages: list[dict[str, Any]] = field(default_factory=list)
    waiting: list[str] = field(default_factory=list)
    """ids of the last answer's calls that have no result yet"""
    last: str | None = None
    """the server's id of the last answer"""

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []
        self.waiting, self.last = [], None

    def result(self, text: str) -> None:
        """What the next waiting call returns; after the last one the model answers."""
        if not self.waiting:
            raise UserError("no call waits for a result")
        message = {"role": "tool", "content": text, "tool_call_id": self.waiting[0]}
        if len(self.waiting) == 1:
            self._say(message, show=True)
            return
        self.messages.append(message)
        self.waiting.pop(0)
        console.note(f"results wanted: {len(self.waiting)} more")

    def answer(self, text: str, show: bool = True) -> Answer:
        """Say `text` to the model. The answer is streamed to stdout if `show`, and kept with the question."""
        return self._say({"role": "user", "content": text}, show)

    def experts(self) -> dict[str, Any]:
        if self.last is None:
            raise UserError("no answer yet, so no experts to show")
        return self.server.experts(self.last)

    def fetched(self) -> dict[str, Any]:
        counts = f"{self.server.url.removesuffix('/v1')}/metrics has the sums over all answers"
        raise UserError("what a server fetches for one answer is not known here", counts)

    def _say(self, message: dict[str, Any], show: bool) -> Answer:
        body: dict[str, Any] = {"model": self.model, "messages": [*self.messages, message], **self.options}
        if self.tools is not None:
            body["tools"] = [tool.openai() for tool in self.tools]
        heard, started, stopped = _Heard(show), time.perf_counter(), False
        chunks = self.server.chat(body)
        try:
            for chunk in chunks:
                heard.take(chunk)
        except KeyboardInterrupt:
            stopped = True
        finally:
            chunks.close()  # type: ignore[attr-defined]
            heard.end()
        seconds = time.perf_counter() - started
        self.messages += [message, heard.message()]
        self.waiting, self.last = [call["id"] for call in heard.calls.values()], heard.id
        answer = Answer(
            heard.text.strip(),
            heard.usage.get("prompt_tokens", 0),
            heard.usage.get("completion_tokens", heard.pieces),
            seconds,
            None,
            stopped,
            heard.read_calls(),
        )
        if show:
            say_figures(answer, self.tools)
        return answer


class _Heard:
    """What has come of an answer, shown as it comes."""

    def __init__(self, show: bool):
        self.show = show
        self.id: str | None = None
        self.text, self.pieces = "", 0
        self.usage: dict[str, int] = {}
        self.calls: dict[int, dict[str, Any]] = {}

    def take(self, chunk: dict[str, Any]) -> None:
        self.id = chunk.get("id") or self.id
        self.usage = chunk.get("usage") or self.usage
        for choice in chunk.get("choices", ()):
            delta = choice.get("delta") or {}
            if delta.get("reasoning_content"):
                self.pieces += 1
                if self.show:
                    console.stderr().print(visible(delta["reasoning_content"]), style="dim", end="")
            if delta.get("content"):
                self.pieces += 1
                self.text += delta["content"]
                if self.show:
                    print(visible(delta["content"]), end="", flush=True)
            for part in delta.get("tool_calls") or ():
                self._take_call(part)

    def _take_call(self, part: dict[str, Any]) -> None:
        at = part.get("index", len(self.calls))
        call = self.calls.setdefault(at, {"id": f"call_{at}", "name": "", "arguments": ""})
        call["id"] = part.get("id") or call["id"]
        words = part.get("function") or {}
        call["name"] += words.get("name") or ""
        call["arguments"] += words.get("arguments") or ""

    def end(self) -> None:
        if self.show:
            print(flush=True)

    def message(self) -> dict[str, Any]:
        """The answer as a message of the conversation."""
        said: dict[str, Any] = {"role": "assistant", "content": self.text.strip()}
        if self.calls:
            said["tool_calls"] = [
                {"id": call["id"], "type": "function",
                 "function": {"name": call["name"], "arguments": call["arguments"]}}
                for call in self.calls.values()
            ]  # fmt: skip
        return said

    def read_calls(self) -> list[Call]:
        """The calls as data; one whose arguments are no JSON object is said and left out."""
        from moesmith.data.tools import Call

        found = []
        for call in self.calls.values():
            try:
                arguments = json.loads(call["arguments"] or "{}")
            except json.JSONDecodeError:
                arguments = None
            if isinstance(arguments, dict):
                found.append(Call(call["name"], arguments))
            else:
                console.note("a call was begun and cannot be read")
        return found


def visible(text: str) -> str:
    """Without control characters, which a terminal would obey: escape sequences are shown, not followed."""
    return "".join(
        c if c in "\n\t" or not (ord(c) < 32 or 127 <= ord(c) < 160) else "\N{REPLACEMENT CHARACTER}"
        for c in text
    )


def pick_model(server: Server, wanted: str | None) -> str:
    """The name asked for, else the first the server has."""
    names = server.models()
    if not names:
        raise UserError(f"{server.url} serves no model")
    if wanted is None or wanted in names:
        return wanted or names[0]
    raise UserError(f"{server.url} does not serve {wanted}", f"it serves: {', '.join(names)}")


def _message(body: Any) -> str:
    error = body.get("error") if isinstance(body, dict) else None
    said = error.get("message") if isinstance(error, dict) else error
    return " ".join(visible(str(said or "")).split())[:300]


def _words(error: Any) -> str:
    return " ".join(str(getattr(error, "strerror", None) or error).split())[:200] or type(error).__name__
