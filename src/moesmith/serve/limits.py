"""Who may ask, how much, and how many at once: keys, hosts, bodies, the queue, and the time an answer has.

A browser on the same machine is a stranger too: a page from elsewhere could post to a loopback port. It
cannot send JSON with its content type without asking first, and a name that was pointed at 127.0.0.1 shows in
the Host header; both are checked.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .schema import Refused

if TYPE_CHECKING:
    from starlette.requests import Request

LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")


@dataclass
class Limits:
    """What one server allows."""

    api_key: str | None = None
    max_body: int = 1_000_000
    """bytes"""
    max_queue: int = 64
    """answers that wait beside those that are written"""
    max_new_tokens: int = 4096
    """longest answer, also when a client asks for more"""
    timeout: float = 600.0
    """seconds that one answer may take, waiting included"""
    body_timeout: float = 30.0
    """seconds that a client has to send its body"""
    local_only: bool = True
    """bound to loopback without a key: requests must name a loopback host"""


def is_loopback(host: str) -> bool:
    """Whether an address or name to bind to can be reached from this machine only."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def check_host(request: Request, limits: Limits) -> None:
    """403 for a Host header that is no loopback name, on a server that only this machine should reach."""
    if not limits.local_only:
        return
    host = request.headers.get("host", "").lower()
    name = host[1 : host.find("]")] if host.startswith("[") else host.partition(":")[0]
    if name and not is_loopback(name):
        raise Refused(
            403,
            f"this server answers on {LOCAL_NAMES[0]} only, not {name[:100]}; give it --api-key to open it",
        )


def check_key(request: Request, limits: Limits) -> None:
    """401 without the key, if there is one."""
    if limits.api_key is None:
        return
    given = request.headers.get("authorization", "").encode()
    if not hmac.compare_digest(given, b"Bearer " + limits.api_key.encode()):
        raise Refused(
            401,
            "wrong or missing API key: send it as Authorization: Bearer KEY",
            kind="authentication_error",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


async def read_body(request: Request, limits: Limits) -> bytes:
    """The JSON body of a request.

    Raises:
        Refused: 415 not JSON by its content type; 413 too large, by its header or while it comes; 408 too
            slow; 400 the client went away in the middle.
    """
    from starlette.requests import ClientDisconnect

    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refused(415, f"content type {kind[:50] or 'missing'}: send application/json")
    too_large = Refused(
        413, f"the body is larger than {limits.max_body:,} bytes", code="request_too_large",
        headers={"Connection": "close"},
    )  # fmt: skip
    said = request.headers.get("content-length", "")
    if said.isdecimal() and int(said) > limits.max_body:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_timeout):
            async for part in request.stream():
                body += part
                if len(body) > limits.max_body:
                    raise too_large
    except TimeoutError:
        raise Refused(408, "the body did not come in time", headers={"Connection": "close"}) from None
    except ClientDisconnect:
        raise Refused(400, "the client went away") from None
    return bytes(body)


@dataclass
class Gate:
    """How many answers are on their way. Used in the event loop's thread only."""

    places: int
    """answers written at once and waiting together"""
    inside: int = 0
    seconds: float = 1.0
    """running mean of the time an answer takes"""
    refused: int = field(default=0)

    @contextmanager
    def enter(self, answers: int) -> Iterator[None]:
        """Places for the answers of one request, or 429 with the time after which to try again.

        Raises:
            Refused: 400 more than there are places; 429 not enough of them are free.
        """
        if answers > self.places:
            raise Refused(400, f"{answers} answers in one request: this server takes {self.places} at once")
        if self.inside + answers > self.places:
            self.refused += 1
            raise Refused(
                429,
                f"{self.inside} answers are on their way, as many as this server takes: try again later",
                kind="rate_limit_error",
                code="queue_full",
                headers={"Retry-After": str(min(60, max(1, round(self.seconds))))},
            )
        self.inside += answers
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            yield
        finally:
            self.inside -= answers
            self.seconds += 0.1 * (loop.time() - began - self.seconds)


def errors_as_json(refused: Refused) -> Any:
    """The response to a refused request."""
    from starlette.responses import JSONResponse

    return JSONResponse(refused.body(), refused.status, headers=refused.headers)
