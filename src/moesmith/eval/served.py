"""Ask a model behind an OpenAI-compatible server, several questions at a time, and keep all that it says.

Chat completions without streaming, by the standard library alone. What other clients drop is kept: the
reasoning beside the answer, why the answer ended, what it took. What passes (no connection, 429, 5xx) is
tried again; what does not (a wrong key, a request the server does not take) ends the run with its words.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import os
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit

from moesmith.errors import UserError

from .reasoning import Reply, split_any

TRIES = 7  # of one question, with 1, 2, 4 ... 32 s between them
LONGEST_WAIT = 60.0  # seconds between two tries, whatever Retry-After says
TIMEOUT = 3600.0  # seconds for one answer: 16,384 tokens at 5 tokens/s
PROBE = 20.0  # seconds for a question about the server itself
QUIET = 30.0  # seconds between two words about trouble
PASSING = {408, 425, 429, 500, 502, 503, 504}

# What a server calls the tokens of reasoning it allows; `owned_by` of its models says which server it is.
BUDGET_KEYS = {"llamacpp": "reasoning_budget_tokens", "vllm": "thinking_token_budget"}
NAMES = {"llamacpp": "llama-server", "vllm": "vLLM", "moesmith": "moesmith serve", "sglang": "SGLang"}


Question = TypeVar("Question")
Answer = TypeVar("Answer")


class _Passing(Exception):
    """Worth another try; `after`: seconds the server asked to wait."""

    def __init__(self, words: str, after: float | None = None):
        super().__init__(words)
        self.after = after


@dataclass
class Server:
    """A server, the model it is asked for, and what it says about itself."""

    url: str
    """without /v1"""
    model: str
    kind: str = ""
    """`owned_by` of the model: llamacpp, vllm, ..."""
    context: int | None = None
    """tokens of prompt and answer together, for one request"""
    about: dict[str, Any] = field(default_factory=dict)
    """for the record: build, file name of the model"""
    key: str | None = None
    timeout: float = TIMEOUT
    tries: int = TRIES
    pause: float = 1.0
    """seconds before the second try"""
    say: Callable[[str], None] = lambda words: None
    """told, not more than twice a minute, that the server has trouble and is asked again"""
    _told: float = -math.inf
    _open: set[http.client.HTTPConnection] = field(default_factory=set)
    _stopped: threading.Event = field(default_factory=threading.Event)

    @classmethod
    def find(cls, url: str, model: str | None = None, key: str | None = None) -> Server:
        """The server at `url` (with or without /v1), asked which models it has.

        Args:
            model: which of them; may be left out where there is one.
            key: sent as a bearer token; $OPENAI_API_KEY if left out.

        Raises:
            UserError: nothing answers there, no such model, or several to choose from.
        """
        given = key or os.environ.get("OPENAI_API_KEY") or ""
        server = cls(root(url), model or "", key=given.strip())  # a file's last line end is no part of it
        status, found = server._request("GET", "/v1/models", None, PROBE)
        if status != 200 or not isinstance(found, dict):
            raise UserError(
                f"{server.url}/v1/models answered {status}: {_words(found)}",
                "set OPENAI_API_KEY"
                if status in (401, 403)
                else "--server takes the URL of an OpenAI-compatible server, such as http://127.0.0.1:8080",
            )
        listed = found.get("data")
        entries = [one for one in listed or [] if one.get("id")] if _is_dicts(listed) else []
        ids = [str(one["id"]) for one in entries]
        if model is None:
            if len(ids) != 1:
                names = ", ".join(ids[:8]) or "none"
                raise UserError(f"{server.url} has {len(ids)} models: {names}", "--server-model NAME chooses")
            server.model = ids[0]
        chosen = next((one for one in entries if one["id"] == server.model), None)
        if chosen is None and ids and (entries[0].get("owned_by") != "llamacpp"):
            raise UserError(f"{server.url} has no model {server.model}", f"it has: {', '.join(ids[:8])}")
        chosen = chosen or (entries[0] if entries else {})
        server.kind = str(chosen.get("owned_by") or "")
        server.context = chosen.get("max_model_len")
        if server.kind == "llamacpp":
            server._props()
        return server

    def _props(self) -> None:
        """What llama-server says of itself: the context of one slot, its build, its model's file."""
        status, found = self._request("GET", "/props", None, PROBE)
        if status != 200 or not isinstance(found, dict):
            return
        self.context = (found.get("default_generation_settings") or {}).get("n_ctx")
        self.about = {
            "build": found.get("build_info"),
            "file": os.path.basename(str(found.get("model_path") or "")),
            "slots": found.get("total_slots"),
        }

    @property
    def name(self) -> str:
        """What kind of server this is, in words."""
        return NAMES.get(self.kind, self.kind or "a server")

    @property
    def takes_budget(self) -> bool:
        """Whether a request can say how many tokens of reasoning are allowed."""
        return self.kind in BUDGET_KEYS

    def facts(self) -> dict[str, Any]:
        """For the record."""
        return {
            "url": self.url,
            "model": self.model,
            "kind": self.kind,
            "context": self.context,
            **self.about,
        }

    # ------------------------------------------------------------ one question

    def ask(self, text: str, *, max_tokens: int, budget: int | None = None, seed: int | None = None) -> Reply:
        """One user turn, answered greedily.

        Args:
            budget: tokens of reasoning; left out where the server takes none.

        Raises:
            UserError: the server refuses, or did not answer after all tries.
        """
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": text}],
            "temperature": 0,
            "max_tokens": max_tokens,
        }
        if seed is not None:
            body["seed"] = seed
        if self.takes_budget and budget is not None:
            body[BUDGET_KEYS[self.kind]] = budget
            body["chat_template_kwargs"] = {"enable_thinking": budget > 0, "thinking": budget > 0}
        if self.kind == "llamacpp":
            body["cache_prompt"] = False  # a kept prefix changes rounding, and with it greedy answers
        started = time.perf_counter()
        found, tries = self.complete(body)
        return self._reply(found, budget, time.perf_counter() - started, tries)

    def complete(self, body: dict[str, Any]) -> tuple[dict[str, Any], int]:
        """A chat completion as the server sends it, and how many tries it took.

        Raises:
            UserError: the server refuses, or did not answer after all tries.
        """
        said = ""
        for attempt in range(1, self.tries + 1):
            try:
                return self._complete(body), attempt
            except _Passing as problem:
                said = str(problem)
                after = problem.after if problem.after is not None else self.pause * 2 ** (attempt - 1)
                if attempt == self.tries:
                    break
                self._tell(f"{said}; it is asked again, {self.tries} times in all")
                if self._stopped.wait(min(after, LONGEST_WAIT)):
                    break
        raise UserError(
            f"{self.url}: no answer after {self.tries} tries ({said})",
            "nothing is lost: the same command goes on when the server is back",
        )

    def _tell(self, words: str) -> None:
        now = time.monotonic()
        if now - self._told > QUIET and not self._stopped.is_set():
            self._told = now
            self.say(f"{self.url}: {words}")

    def _complete(self, body: dict[str, Any]) -> dict[str, Any]:
        status, found = self._request("POST", "/v1/chat/completions", body, self.timeout)
        choices = found.get("choices") if isinstance(found, dict) else None
        if status == 200 and choices and _is_dicts(choices) and isinstance(choices[0].get("message"), dict):
            return found  # type: ignore[no-any-return]
        if status in PASSING or status == 200:
            after = found.get("retry_after") if isinstance(found, dict) else None
            raise _Passing(f"{status}: {_words(found)}", after)
        hint = {401: "set OPENAI_API_KEY", 403: "set OPENAI_API_KEY"}.get(status)
        raise UserError(f"{self.url} refuses a question, {status}: {_words(found)}", hint)

    def _reply(self, found: dict[str, Any], budget: int | None, seconds: float, attempts: int) -> Reply:
        choice = found["choices"][0]
        message = choice["message"]
        answer = text_of(message.get("content"))
        reasoning = text_of(message.get("reasoning_content") or message.get("reasoning"))
        if not reasoning:
            reasoning, answer = split_any(answer)
        usage = found["usage"] if isinstance(found.get("usage"), dict) else {}
        tokens = usage.get("completion_tokens")
        spent = (usage.get("completion_tokens_details") or {}).get("reasoning_tokens")
        if spent is None:
            spent = self.count(reasoning) if reasoning else 0
        hit = None
        if not reasoning:
            hit = False
        elif budget is not None and spent is not None and self.takes_budget:
            hit = spent >= budget - 2  # the text tokenises a little differently than it was written
        return Reply(
            answer=answer.strip(),
            reasoning=reasoning.strip(),
            finish=str(choice.get("finish_reason") or "unknown"),
            prompt_tokens=usage.get("prompt_tokens"),
            tokens=tokens,
            reasoning_tokens=spent,
            budget_hit=hit,
            seconds=seconds,
            attempts=attempts,
        )

    def count(self, text: str) -> int | None:
        """Tokens of a text, where the server counts them."""
        body = {"llamacpp": {"content": text}, "vllm": {"model": self.model, "prompt": text}}.get(self.kind)
        if body is None:
            return None
        with contextlib.suppress(UserError, _Passing):
            status, found = self._request("POST", "/tokenize", body, PROBE)
            if status == 200 and isinstance(found, dict):
                return found.get("count", len(found.get("tokens") or []))
        return None

    # ------------------------------------------------------------ the wire

    def _request(self, method: str, path: str, body: Any, timeout: float) -> tuple[int, Any]:
        """(status, JSON or text).

        Raises:
            _Passing: no connection, or it broke.
            UserError: no answer in time, or nothing answers at all.
        """
        if self._stopped.is_set():
            raise _Passing("stopped")
        parts = urlsplit(self.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        assert parts.hostname is not None
        connection = kind(parts.hostname, parts.port, timeout=timeout)
        self._open.add(connection)
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        try:
            connection.connect()
            if self._stopped.is_set():  # `stop` found no socket to close yet
                raise _Passing("stopped")
            with contextlib.suppress(OSError):  # a dead machine is noticed, however long an answer takes
                connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            data = None if body is None else json.dumps(body).encode()
            connection.request(method, parts.path + path, data, headers)
            response = connection.getresponse()
            raw = response.read()
        except TimeoutError:
            raise UserError(
                f"{self.url}{path} did not answer in {timeout:,.0f} s",
                "fewer questions at a time (--concurrency), or shorter answers (--max-new-tokens)",
            ) from None
        except ssl.SSLError as error:
            raise UserError(f"{self.url}: {error}") from None
        except (OSError, http.client.HTTPException) as error:
            if method == "GET" and path == "/v1/models":
                hint = "is the server running, and is --server its URL?"
                raise UserError(f"no server answers at {self.url}: {error}", hint) from None
            raise _Passing(f"{type(error).__name__}: {error}") from None
        finally:
            self._open.discard(connection)
            connection.close()
        try:
            found = json.loads(raw)
        except ValueError:
            found = raw.decode("utf-8", "replace")
        if response.status in PASSING:
            with contextlib.suppress(TypeError, ValueError):
                after = float(response.headers["Retry-After"])
                found = {"error": found, "retry_after": after}
        return response.status, found

    def stop(self) -> None:
        """Give up what is under way: a server stops writing when its client is gone."""
        self._stopped.set()
        for connection in list(self._open):
            with contextlib.suppress(Exception):
                connection.sock.shutdown(socket.SHUT_RDWR)


def root(url: str) -> str:
    """A server's URL without a slash at its end, /v1 or /v1/chat/completions.

    Raises:
        UserError: no URL of a server.
    """
    bare = url.strip().rstrip("/")
    for tail in ("/chat/completions", "/completions", "/v1"):
        bare = bare.removesuffix(tail).rstrip("/")
    try:
        parts = urlsplit(bare)
        port_is_fine = parts.port is None or parts.port > 0
    except ValueError:
        parts, port_is_fine = urlsplit(""), False
    if parts.scheme not in ("http", "https") or not parts.hostname or not port_is_fine:
        raise UserError(f"--server {url} is no URL", "such as http://127.0.0.1:8080")
    return bare


def _is_dicts(found: Any) -> bool:
    """Whether this is a list of JSON objects."""
    return isinstance(found, list) and all(isinstance(one, dict) for one in found)


def text_of(content: Any) -> str:
    """A message's text: as it is, or as the parts that some servers make of it."""
    if _is_dicts(content):
        return "".join(one["text"] for one in content if isinstance(one.get("text"), str))
    return content if isinstance(content, str) else ""


def _words(found: Any) -> str:
    """What an error says, on one line."""
    inner = found.get("error", found) if isinstance(found, dict) else found
    inner = inner.get("error", inner) if isinstance(inner, dict) else inner
    inner = inner.get("message", inner) if isinstance(inner, dict) else inner
    text = inner if isinstance(inner, str) else json.dumps(inner)
    return " ".join(text.split())[:300]


def ask_all(
    server: Server,
    texts: Sequence[tuple[int, str]],
    *,
    max_tokens: int,
    budget: int | None,
    seed: int | None = None,
    concurrency: int = 4,
) -> Iterator[tuple[int, Reply]]:
    """(place, reply) as answers come, `concurrency` questions at a time.

    Args:
        texts: (place, question).
    """

    def ask(text: str) -> Reply:
        return server.ask(text, max_tokens=max_tokens, budget=budget, seed=seed)

    return in_parallel(server, ask, texts, concurrency)


def in_parallel(
    server: Server,
    ask: Callable[[Question], Answer],
    questions: Sequence[tuple[int, Question]],
    concurrency: int,
) -> Iterator[tuple[int, Answer]]:
    """(place, answer) as answers come, `concurrency` at a time.

    An error, or the reader going away, stops the questions under way; what was answered has been handed out.

    Args:
        questions: (place, question).
    """
    waiting = deque(questions)

    def work(place: int, question: Question) -> tuple[int, Answer]:
        return place, ask(question)

    pool = ThreadPoolExecutor(max_workers=concurrency, thread_name_prefix="ask")
    running: set[Future[tuple[int, Answer]]] = set()
    try:
        while running or waiting:
            while len(running) < concurrency and waiting:
                running.add(pool.submit(work, *waiting.popleft()))
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            failed = [one for one in finished if one.exception() is not None]
            for future in finished:
                if future not in failed:
                    yield future.result()
            for future in failed:
                future.result()
    except BaseException:
        server.stop()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
