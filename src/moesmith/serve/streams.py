"""Writing to a client that may go away at any time, and knowing when it has."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .schema import Refused


def event(facts: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return (
        b"data: "
        + json.dumps(facts, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace")
        + b"\n\n"
    )


class EventStream(Response):
    """Server-sent events, until their end or until the client is gone.

    Args:
        close: called at the very end, whatever happened.
        limit: seconds after which a client that does not take its stream is given up.
    """

    def __init__(self, lines: AsyncIterator[bytes], close: Callable[[], None], limit: float):
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        del self.headers["content-length"]
        self.lines, self.close, self.limit = lines, close, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        writing = asyncio.create_task(self._write(send))
        gone = asyncio.create_task(client_gone(receive))
        try:
            await asyncio.wait({writing, gone}, timeout=self.limit, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            writing.cancel()
            await asyncio.gather(gone, writing, return_exceptions=True)
            await self.lines.aclose()  # type: ignore[attr-defined]
            self.close()
        if not writing.cancelled() and writing.exception() is not None:
            raise writing.exception()  # type: ignore[misc]

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for line in self.lines:
                await send({"type": "http.response.body", "body": line, "more_body": True})
        except Refused as refused:  # too late for a status
            await send({"type": "http.response.body", "body": event(refused.body()), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def client_gone(receive: Receive) -> None:
    """Return when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(request: Request, work: Awaitable[Response]) -> Response:
    """The response, or the end of the work when the client is gone."""
    working = asyncio.ensure_future(work)
    gone = asyncio.create_task(client_gone(request.receive))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        return Response(status_code=499)  # nobody reads it; the log and the metrics do
    finally:
        gone.cancel()
        working.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await asyncio.gather(working, gone, return_exceptions=True)


async def gather(work: Any) -> None:
    """Wait for all; the first error ends the others."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
