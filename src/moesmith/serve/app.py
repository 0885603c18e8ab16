"""The HTTP side: OpenAI's routes over an `Engine`.

Transformers' own server (`transformers serve`) sits on the same continuous batching. It is not used, because
it answers no log-probabilities, fixes one way of sampling for all clients, knows no adapters by name, and has
routes that load and unload models. So this is a thin application of ours: every handler checks who asks,
reads and checks the body, takes a place in the queue and passes on what the engine tells.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
import uuid
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException

from moesmith.errors import UserError

from .answers import Choice
from .calls import BesideCalls, chat_messages, chat_tools
from .engine import Engine
from .limits import Gate, Limits, check_host, check_key, errors_as_json, read_body
from .metrics import Metrics
from .replies import ChatReply, CompletionReply
from .sampling import Sampling
from .schema import STOPS, ChatRequest, Common, CompletionRequest, Refused, read
from .streams import EventStream, unless_gone

log = logging.getLogger(__name__)
TAIL = 30.0  # seconds beyond an answer's deadline that a client has to take the rest of its stream

PAGE_HEADERS = {
    "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "X-Frame-Options": "DENY"
}  # fmt: skip


class Server:
    """An engine, what it allows, and what has happened."""

    def __init__(self, engine: Engine, limits: Limits):
        self.engine, self.limits, self.metrics = engine, limits, Metrics()
        self.gate = Gate(limits.max_queue + engine.slots)
        # Scoring and pictures take the model one by one; they must not use up the threads that others need.
        self.model_thread = ThreadPoolExecutor(1, "moesmith-model")

    # ------------------------------------------------------------ checks

    def enter(self, request: Request) -> None:
        """What every route that needs the key asks first."""
        check_host(request, self.limits)
        check_key(request, self.limits)

    def check_model(self, name: str) -> None:
        if name not in self.engine.served:
            known = ", ".join(self.engine.served)
            raise Refused(
                404,
                f"there is no model {name[:100]!r}; there are: {known}",
                code="model_not_found",
                param="model",
            )

    def check_running(self) -> None:
        if self.engine.stopping:
            raise Refused(503, STOPS, kind="server_error", headers={"Retry-After": "5"})

    def room(self, prompt: list[int]) -> int:
        """Tokens that an answer to this prompt may have."""
        if not prompt:
            raise Refused(400, "the prompt has no tokens")
        if max(prompt) >= self.engine.vocabulary:
            raise Refused(400, f"token {max(prompt)}: the model has {self.engine.vocabulary:,} tokens")
        room = self.engine.context - len(prompt)
        if room < 1:
            raise Refused(
                400,
                f"the prompt has {len(prompt):,} tokens; prompt and answer together may have "
                f"{self.engine.context:,}",
                code="context_length_exceeded",
            )
        return room

    def sampling(self, asked: Common, wanted: int | None, room: int, top: int | None) -> Sampling:
        """The settings of a request, over the model's own."""
        speaker = self.engine.speakers[asked.model]
        said = {key: getattr(asked, key) for key in ("temperature", "top_p", "top_k", "min_p")}
        chosen: dict[str, Any] = speaker.defaults | {k: v for k, v in said.items() if v is not None}
        chosen["top_k"] = max(0, chosen.get("top_k", 0))  # -1 is "no limit" elsewhere
        seed = asked.seed if asked.seed is not None else secrets.randbits(63)
        return Sampling(
            max_new_tokens=min(room, self.limits.max_new_tokens, wanted or room),
            seed=seed,
            presence_penalty=asked.presence_penalty or 0.0,
            frequency_penalty=asked.frequency_penalty or 0.0,
            logit_bias=self.biases(asked.logit_bias),
            top_logprobs=top,
            stop_ids=frozenset() if asked.ignore_eos else speaker.stop_ids,
            **chosen,
        )

    def biases(self, asked: dict[str, float] | None) -> tuple[tuple[int, float], ...]:
        for key in asked or {}:
            if not (
                key.isascii() and key.isdecimal() and len(key) < 10 and int(key) < self.engine.vocabulary
            ):
                raise Refused(
                    400, f"logit_bias: {key[:20]!r} is no token id of this model", param="logit_bias"
                )
        return tuple((int(key), value) for key, value in (asked or {}).items())

    def choices(
        self, asked: Common, key: str, prompts: list[tuple[list[int], Sampling]], chat: bool = False
    ) -> list[Choice]:
        """One `Choice` per prompt and per n, in OpenAI's order; each has a seed of its own."""
        deadline, stops = time.monotonic() + self.limits.timeout, asked.stops()
        made: list[Choice] = []
        for prompt, how in prompts:
            for number in range(asked.n or 1):
                index = len(made)
                name = key if index == 0 else f"{key}-{index}"
                own = replace(how, seed=how.seed + number)
                choice = Choice(
                    self.engine, self.metrics, asked.model, name, index, prompt, own, stops, deadline, chat
                )
                made.append(choice)
        return made

    async def in_model_thread(self, call: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self.model_thread, call, *args)

    # ------------------------------------------------------------ chat

    async def chat(self, request: Request) -> Response:
        asked = read(ChatRequest, await read_body(request, self.limits))
        self.check_model(asked.model)
        with ExitStack() as stack:
            stack.enter_context(self.gate.enter(asked.n or 1))
            try:
                tools = chat_tools(asked.tools) if asked.tool_choice != "none" else None
                speaker = self.engine.speakers[asked.model]
                prompt = await asyncio.to_thread(speaker.prompt, chat_messages(asked.messages), tools)
            except UserError as error:
                hint = f" ({error.hint})" if error.hint else ""
                raise Refused(400, f"{error.message}{hint}", param="messages") from None
            top = (asked.top_logprobs or 0) if asked.logprobs else None
            how = self.sampling(
                asked, asked.max_completion_tokens or asked.max_tokens, self.room(prompt), top
            )
            key = f"chatcmpl-{uuid.uuid4().hex}"
            choices = self.choices(asked, key, [(prompt, how)], chat=True)
            if tools is not None and speaker.form is not None:
                for choice in choices:
                    choice.beside = BesideCalls(speaker.tokenizer, speaker.form)
            reply = ChatReply(self, asked, key, tools, choices)
            if asked.stream:
                return EventStream(reply.lines(), stack.pop_all().close, self.limits.timeout + TAIL)
            return await unless_gone(request, reply.whole())

    # ------------------------------------------------------------ completions

    async def complete(self, request: Request) -> Response:
        asked = read(CompletionRequest, await read_body(request, self.limits))
        self.check_model(asked.model)
        prompts = asked.prompts()
        with ExitStack() as stack:
            stack.enter_context(self.gate.enter(len(prompts) * (asked.n or 1)))
            speaker = self.engine.speakers[asked.model]
            made: list[tuple[list[int], Sampling]] = []
            for prompt in prompts:
                ids = await asyncio.to_thread(speaker.encode, prompt) if isinstance(prompt, str) else prompt
                room = self.room(ids)
                # 16 is OpenAI's default here
                wanted = 16 if asked.max_tokens is None else asked.max_tokens
                made.append((ids, self.sampling(asked, wanted, room, asked.logprobs)))
            key = f"cmpl-{uuid.uuid4().hex}"
            reply = CompletionReply(self, asked, key, len(prompts), self.choices(asked, key, made))
            if asked.stream:
                return EventStream(reply.lines(), stack.pop_all().close, self.limits.timeout + TAIL)
            return await unless_gone(request, reply.whole())

    # ------------------------------------------------------------ the rest

    def models(self) -> dict[str, Any]:
        about = {
            "object": "model", "created": int(self.engine.started), "owned_by": "moesmith",
            "max_model_len": self.engine.context,
        }  # fmt: skip
        return {"object": "list", "data": [{"id": name} | about for name in self.engine.served]}

    def health(self) -> Response:
        if self.engine.stopping:
            return JSONResponse({"status": "stopping"}, 503)
        return JSONResponse({"status": "ok"})

    def metrics_text(self) -> str:
        return self.metrics.text(
            [
                ("answers_active", "Answers that are being written or wait", self.engine.active()),
                ("requests_held", "Requests that the generation loops know of", self.engine.held()),
                ("answers_kept", "Answers kept for their picture", self.engine.kept_count()),
                ("queue_places", "Places for answers", self.gate.places),
                ("queue_used", "Places that are taken", self.gate.inside),
                ("queue_refused", "Requests refused because the queue was full", self.gate.refused),
                ("start_time_seconds", "When the server started", self.engine.started),
            ]
        )

    async def experts(self, key: str) -> Response:
        """The experts that a kept answer went through."""
        from . import experts

        try:
            name, prompt, answer, pieces = self.engine.kept(key)
        except KeyError:
            raise Refused(404, "no such reply, or it is too long ago", code="not_found") from None

        def look() -> dict[str, Any]:
            with self.engine.exclusive(name) as model:
                return experts.picture(model, prompt + answer, len(prompt))

        try:
            found = await self.in_model_thread(look)
        except UserError as error:
            raise Refused(400, error.message) from None
        return JSONResponse(found | {"id": key, "model": name, "tokens": pieces})


# ---------------------------------------------------------------- the application


def make_app(engine: Engine, limits: Limits | None = None) -> FastAPI:
    """The ASGI application over an engine; `app.state.server` is its `Server`."""
    server = Server(engine, limits or Limits())
    app = FastAPI(title="moesmith", version="1", docs_url=None, redoc_url=None)
    app.state.server = server

    def counted(route: str, status: int) -> None:
        server.metrics.add("requests_total", route=route, status=str(status))

    async def answer(
        request: Request, route: str, work: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        try:
            server.enter(request)
            server.check_running()
            response = await work(request)
        except Refused as refused:
            counted(route, refused.status)
            return errors_as_json(refused)  # type: ignore[no-any-return]
        except Exception:
            log.exception("%s failed", route)
            counted(route, 500)
            return errors_as_json(Refused(500, "the server failed; its log says why", kind="server_error"))  # type: ignore[no-any-return]
        counted(route, response.status_code)
        return response

    @app.post("/v1/chat/completions", openapi_extra=_body("ChatRequest"))
    async def chat_completions(request: Request) -> Response:
        return await answer(request, "/v1/chat/completions", server.chat)

    @app.post("/v1/completions", openapi_extra=_body("CompletionRequest"))
    async def completions(request: Request) -> Response:
        return await answer(request, "/v1/completions", server.complete)

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        async def work(_: Request) -> Response:
            return JSONResponse(server.models())

        return await answer(request, "/v1/models", work)

    @app.get("/moesmith/experts/{key}")
    async def experts(request: Request, key: str) -> Response:
        return await answer(request, "/moesmith/experts", lambda _: server.experts(key))

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        async def work(_: Request) -> Response:
            return PlainTextResponse(server.metrics_text(), media_type="text/plain; version=0.0.4")

        return await answer(request, "/metrics", work)

    @app.get("/health")
    async def health() -> Response:
        return server.health()

    @app.get("/", include_in_schema=False)
    async def page(request: Request) -> Response:
        from .page import html

        try:
            check_host(request, server.limits)
        except Refused as refused:
            return errors_as_json(refused)  # type: ignore[no-any-return]
        return HTMLResponse(html(), headers=PAGE_HEADERS)

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> Response:
        refused = Refused(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
        refused.headers = dict(error.headers or {})
        return errors_as_json(refused)  # type: ignore[no-any-return]

    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


def _body(name: str) -> dict[str, Any]:
    schema = {"$ref": f"#/components/schemas/{name}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _openapi(app: FastAPI) -> dict[str, Any]:
    """The description of the routes, with the bodies that the handlers read themselves."""
    made = get_openapi(title=app.title, version=app.version, routes=app.routes)
    _, bodies = models_json_schema(
        [(ChatRequest, "validation"), (CompletionRequest, "validation")],
        ref_template="#/components/schemas/{model}",
    )
    made.setdefault("components", {}).setdefault("schemas", {}).update(bodies["$defs"])
    return made
