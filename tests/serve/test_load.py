"""The server as a process of its own under load: answers do not mix, memory does not grow, a stop stops."""

import asyncio
import contextlib
import json
import os
import random
import signal
import time
from pathlib import Path

import openai
import pytest

import served

pytestmark = pytest.mark.slow
CLIENTS = 64


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    with served.process(folder, "--slots", "8", "--max-queue", str(CLIENTS)) as server:
        yield server


def talker(server) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300)


def question(number: int) -> dict:
    """A request of its own: prompt, name and length differ."""
    model = (served.BASE, *served.ADAPTERS)[number % 3]
    text = f"client {number} asks: {chr(97 + number % 26) * (number % 7)}"
    return {
        "model": model, "messages": [{"role": "user", "content": text}], "max_tokens": 8 + number % 9,
        "temperature": 0, "extra_body": {"ignore_eos": True},
    }  # fmt: skip


async def streamed(talk, number: int) -> str:
    said = ""
    async for chunk in await talk.chat.completions.create(stream=True, **question(number)):
        for choice in chunk.choices:
            said += choice.delta.content or ""
    return said


def idle(server, seconds: float = 30.0) -> dict[str, float]:
    """The gauges once nothing is on its way."""
    deadline = time.monotonic() + seconds
    while True:
        gauges = server.gauges()
        busy = {k: gauges[k] for k in ("answers_active", "queue_used", "requests_held") if gauges.get(k)}
        if not busy:
            return gauges
        assert time.monotonic() < deadline, f"still there: {busy}"
        time.sleep(0.1)


def resident(pid: int) -> float:
    """Megabytes that the process holds for itself."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")) / 1e3


@pytest.fixture(scope="module")
def alone(server) -> list[str]:
    """What each client is told when it is the only one."""

    async def ask():
        async with talker(server) as talk:
            return [await streamed(talk, number) for number in range(CLIENTS)]

    said = asyncio.run(ask())
    assert len(set(said)) > CLIENTS * 0.9, "answers tell the clients apart"
    return said


def test_64_streams_at_once_get_what_each_gets_alone(server, alone):
    async def ask():
        async with talker(server) as talk:
            return await asyncio.gather(*(streamed(talk, number) for number in range(CLIENTS)))

    assert asyncio.run(ask()) == alone
    idle(server)


def test_clients_that_vanish_disturb_nobody(server, alone):
    """Half of them close in the middle of their stream, or right after asking."""

    async def vanish(number: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(server.url.rpartition(":")[2]))
        asked = question(number)
        body = json.dumps(asked | asked.pop("extra_body") | {"stream": True, "max_tokens": 90}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n"
        writer.write(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
        await writer.drain()
        if number % 4 == 0:
            await reader.read(300)
        if number % 4 == 2:
            writer.transport.abort()
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()

    async def ask():
        async with talker(server) as talk:
            stay = [streamed(talk, number) for number in range(1, CLIENTS, 2)]
            found = await asyncio.gather(*stay, *(vanish(number) for number in range(0, CLIENTS, 2)))
        return found[: len(stay)]

    assert asyncio.run(ask()) == alone[1::2]
    idle(server)


def test_wrong_requests_among_right_ones(server, alone):
    async def wrong(talk, number: int) -> str:
        asked = question(number)
        asked |= random.Random(number).choice(
            [{"temperature": 9}, {"model": "nobody"}, {"messages": []}, {"extra_body": {"surprise": 1}},
             {"messages": [{"role": "user", "content": "x" * 2_000_000}]}]
        )  # fmt: skip
        try:
            await talk.chat.completions.create(**asked)
        except openai.APIStatusError as error:
            return str(error.status_code)
        except openai.APIConnectionError:
            # The server has answered and closed while the client was still sending.
            assert len(asked["messages"][0]["content"]) > 1_000_000
            return "413"
        raise AssertionError(f"answered: {number}")

    async def ask():
        async with talker(server) as talk:
            return await asyncio.gather(
                *((streamed if number % 2 else wrong)(talk, number) for number in range(CLIENTS))
            )

    found = asyncio.run(ask())
    assert found[1::2] == alone[1::2] and set(found[0::2]) == {"400", "404", "413"}
    idle(server)


def test_2000_requests_leave_nothing_behind(server):
    """Memory settles; what is kept of answers is bounded; nothing is still on its way."""

    async def ask(first: int, count: int) -> None:
        async with talker(server) as talk:
            numbers = iter(range(first, first + count))

            async def work() -> None:
                for number in numbers:
                    asked = question(number) | {"max_tokens": 2}
                    if number % 10 == 9:
                        stream = await talk.chat.completions.create(stream=True, **asked | {"max_tokens": 60})
                        async for _ in stream:
                            break
                        await stream.close()
                    else:
                        await talk.chat.completions.create(**asked)

            await asyncio.gather(*(work() for _ in range(16)))

    asyncio.run(ask(0, 500))
    idle(server)
    before = resident(server.pid)
    threads = len(os.listdir(f"/proc/{server.pid}/task"))
    files = len(os.listdir(f"/proc/{server.pid}/fd"))
    asyncio.run(ask(500, 1500))
    gauges = idle(server)
    assert gauges.get("answers_kept", 0) <= 64
    grown = resident(server.pid) - before
    assert grown < 15, f"{grown:.1f} MB over 1,500 requests: 10 kB each would be a leak"
    assert len(os.listdir(f"/proc/{server.pid}/task")) <= threads + 2
    assert len(os.listdir(f"/proc/{server.pid}/fd")) <= files + 20


@pytest.mark.parametrize("grace", [0, 30])
def test_sigterm_under_load(grace, tmp_path):
    """With time, every answer is whole; without, the clients are told. The process ends with 0 either way."""
    with served.process(tmp_path, "--slots", "4", "--grace", str(grace)) as server:

        async def one(talk, number: int) -> str:
            asked = question(number) | {"max_tokens": 60}
            try:
                chunks = [c async for c in await talk.chat.completions.create(stream=True, **asked)]
            except openai.APIError as error:
                return f"error: {type(error).__name__}"
            except Exception as error:  # the connection ended
                return f"gone: {type(error).__name__}"
            return "whole" if any(c.choices and c.choices[0].finish_reason for c in chunks) else "cut"

        async def ask():
            async with talker(server) as talk:
                asked = [asyncio.create_task(one(talk, number)) for number in range(24)]
                while server.gauges()["answers_active"] < 12:
                    await asyncio.sleep(0.02)
                began = time.monotonic()
                os.kill(server.pid, signal.SIGTERM)
                found = await asyncio.gather(*asked)
                return found, began

        found, began = asyncio.run(ask())
        assert server.process.wait(grace + 60) == 0
        assert time.monotonic() - began < grace + 30
        if grace:
            assert found.count("whole") >= 12, found
        assert "cut" not in found, "an end without a reason looks like a whole answer"


def test_a_second_ctrl_c_does_not_wait(tmp_path):
    with served.process(tmp_path, "--grace", "600") as server:

        async def ask():
            async with talker(server) as talk:
                asked = question(0) | {"max_tokens": 100}
                stream = await talk.chat.completions.create(stream=True, **asked)
                async for _ in stream:
                    break
                os.kill(server.pid, signal.SIGINT)
                await asyncio.sleep(0.2)
                os.kill(server.pid, signal.SIGINT)
                await asyncio.sleep(0.2)

        asyncio.run(ask())
        server.process.wait(30)
