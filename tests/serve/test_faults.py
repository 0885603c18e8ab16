"""What goes wrong around a server stays with the request it happened to: the next one is answered as ever."""

import concurrent.futures
import json
import socket
import struct
import time

import openai
import pytest

import served
from moesmith.serve.limits import Limits

pytestmark = pytest.mark.slow
ASK = {"max_tokens": 12, "temperature": 0}


@pytest.fixture(scope="module")
def server():
    with served.running(limits=Limits(max_body=20_000, body_timeout=1.0, max_queue=8)) as server:
        server.talk = server.client()
        yield server


def say(server, text="hello", model=served.BASE, **options) -> str:
    asked = server.talk.chat.completions.create(
        model=model, messages=[{"role": "user", "content": text}], **(ASK | options)
    )
    return asked.choices[0].message.content or ""


@pytest.fixture(scope="module")
def usual(server) -> dict[str, str]:
    """What each name answers when nothing is wrong."""
    return {name: say(server, model=name) for name in (served.BASE, *served.ADAPTERS)}


@pytest.fixture(autouse=True)
def answers_as_ever(server, usual):
    """After every test the server is idle and gives its usual answers."""
    yield
    deadline = time.monotonic() + 20
    while server.engine.active() or server.server.gate.inside:
        assert time.monotonic() < deadline, (server.engine.active(), server.server.gate.inside)
        time.sleep(0.02)
    assert say(server) == usual[served.BASE]


def raw(server, content: bytes, wait: float = 10.0) -> bytes:
    """Send bytes as they are; what comes back until the server closes or is silent."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=wait) as line:
        line.sendall(content)
        got = b""
        try:
            while part := line.recv(65536):
                got += part
                head, _, body = got.partition(b"\r\n\r\n")
                length = [row for row in head.lower().split(b"\r\n") if row.startswith(b"content-length:")]
                if length and len(body) >= int(length[0].split(b":")[1]):
                    break
        except (TimeoutError, ConnectionError):
            pass
        return got


def post(body: bytes, *headers: str, length: int | None = None) -> bytes:
    head = [
        "POST /v1/chat/completions HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json",
        f"Content-Length: {len(body) if length is None else length}", *headers,
    ]  # fmt: skip
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


CHAT = {"model": served.BASE, "messages": [{"role": "user", "content": "hello"}], **ASK}


# ---------------------------------------------------------------- the model fails


@pytest.mark.parametrize("stream", [False, True])
def test_a_forward_that_fails_is_an_error_of_its_own_request(server, stream, monkeypatch):
    model = server.engine.model
    forward, calls = model.forward, []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("out of memory: tried to allocate 9 TB")
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", failing)
    with pytest.raises(openai.APIError) as caught:
        asked = server.talk.chat.completions.create(
            model=served.BASE, messages=[{"role": "user", "content": "hello"}], stream=stream, **ASK
        )
        for _ in asked:
            pass
    assert len(calls) >= 4, "it was this fault"
    body = caught.value.body
    assert isinstance(body, dict) and body["message"] and body["type"] == "server_error"
    monkeypatch.undo()
    assert say(server)


def test_one_name_failing_leaves_the_others_answering(server, usual, monkeypatch):
    """An adapter whose weights are gone makes errors under its own name only."""
    name = served.ADAPTERS[0]
    speaker = server.engine.speakers[name]
    monkeypatch.setattr(speaker, "prompt", lambda *_: (_ for _ in ()).throw(RuntimeError("gone")))
    with pytest.raises(openai.InternalServerError) as caught:
        say(server, model=name)
    assert "gone" not in str(caught.value), "what happened inside is for the log"
    assert say(server) == usual[served.BASE]


# ---------------------------------------------------------------- the picture


def test_pictures_and_answers_of_all_names_at_once(server, usual):
    """Every answer and every picture is that of its own name, whatever is active in between."""
    import urllib.request

    def look(name):
        asked = server.talk.chat.completions.create(
            model=name, messages=[{"role": "user", "content": "hello"}], **ASK
        )
        with urllib.request.urlopen(f"{server.url}/moesmith/experts/{asked.id}", timeout=30) as answer:
            return asked.choices[0].message.content or "", json.load(answer)

    names = [*usual] * 3
    alone = {name: look(name)[1] for name in usual}
    with concurrent.futures.ThreadPoolExecutor(len(names)) as pool:
        found = list(pool.map(look, names))
    for name, (text, picture) in zip(names, found, strict=True):
        assert text == usual[name]
        assert picture["counts"] == alone[name]["counts"] and picture["model"] == name
    assert len({json.dumps(picture["counts"]) for picture in alone.values()}) == 3, "names differ"


@pytest.mark.parametrize("key", ["nothing", "../../etc/passwd", "%00", "a" * 3000, "%F0%9F%98%80"])
def test_a_picture_of_nothing_is_not_there(server, key):
    got = raw(server, f"GET /moesmith/experts/{key} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
    assert got.startswith(b"HTTP/1.1 404") and b'"error"' in got


def test_only_the_last_answers_are_kept(server):
    for number in range(70):
        server.engine.keep(f"test-{number}", served.BASE, [5, 6], [7])
    assert len(server.engine._kept) == 64
    with pytest.raises(KeyError):
        server.engine.kept("test-0")
    assert tuple(server.engine.kept("test-69"))[2] == [7]


# ---------------------------------------------------------------- bodies


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"null", 400),
        (b"[]", 400),
        (b"\xff\xfe", 400),
        (b"{" * 9000, 400),
        (b'{"a":' * 2000 + b"1" + b"}" * 2000, 400),
        (json.dumps(CHAT | {"temperature": float("nan")}).encode(), 400),
        (json.dumps(CHAT | {"max_tokens": -(10**400)}).encode(), 400),
        (json.dumps(CHAT | {"max_tokens": "7"}).encode(), 400),
        (json.dumps(CHAT | {"messages": []}).encode(), 400),
        (json.dumps(CHAT | {"messages": [{"role": "user", "content": "\ud800"}]}).encode(), 400),
        (json.dumps(CHAT | {"surprise": 1}).encode(), 400),
        (json.dumps(CHAT | {"model": "nobody"}).encode(), 404),
        (json.dumps(CHAT | {"messages": [{"role": "user", "content": "x" * 5000}]}).encode(), 400),
        (b" " * 30_000, 413),
    ],
)
def test_a_body_that_is_wrong_gets_openais_error(server, body, status):
    got = raw(server, post(body))
    head, _, said = got.partition(b"\r\n\r\n")
    assert head.startswith(f"HTTP/1.1 {status}".encode()), got[:300]
    assert set(json.loads(said)["error"]) == {"message", "type", "param", "code"}


def test_a_body_that_grows_beyond_the_limit_on_its_way(server):
    chunk = b"1000\r\n" + b"x" * 0x1000 + b"\r\n"
    head = (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n"
    )
    assert raw(server, head + chunk * 8).startswith(b"HTTP/1.1 413")


def test_a_body_that_never_comes(server):
    began = time.monotonic()
    got = raw(server, post(b'{"model":', length=500))
    assert got.startswith(b"HTTP/1.1 408") and time.monotonic() - began < 8


@pytest.mark.parametrize(
    "content",
    [b"\x16\x03\x01\x02\x00\x01", b"GET\r\n\r\n", b"\r\n" * 500, b"X" * 70_000, b"GET / HTTP/9.9\r\n\r\n"],
)
def test_what_is_no_http_at_all(server, content):
    raw(server, content, wait=0.5)


def test_routes_and_methods_that_are_not_there(server):
    for request, status in (("GET /v1/chat/completions", 405), ("DELETE /v1/models", 405), ("GET /x", 404)):
        got = raw(server, f"{request} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
        assert got.startswith(f"HTTP/1.1 {status}".encode()) and b'"error"' in got


def test_a_page_from_elsewhere_cannot_ask(server):
    """A name that was pointed at this machine, and a form that a browser sends without asking first."""
    rebound = raw(server, post(json.dumps(CHAT).encode()).replace(b"Host: 127.0.0.1", b"Host: evil.example"))
    assert rebound.startswith(b"HTTP/1.1 403")
    form = raw(server, post(json.dumps(CHAT).encode()).replace(b"application/json", b"text/plain"))
    assert form.startswith(b"HTTP/1.1 415")


# ---------------------------------------------------------------- clients


@pytest.mark.parametrize("reset", [False, True])
def test_a_client_that_goes_away_ends_its_answer(server, reset):
    body = json.dumps(CHAT | {"max_tokens": 100, "stream": True, "ignore_eos": True}).encode()
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as line:
        line.sendall(post(body))
        assert b"200" in line.recv(200)
        if reset:
            line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    deadline = time.monotonic() + 10
    while server.engine.active():
        assert time.monotonic() < deadline, "an answer nobody reads goes on"
        time.sleep(0.01)


def test_a_client_that_does_not_read_holds_nobody_up(server, usual):
    body = json.dumps(CHAT | {"max_tokens": 100, "stream": True, "ignore_eos": True, "logprobs": True,
                              "top_logprobs": 20}).encode()  # fmt: skip
    with socket.socket() as line:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        line.connect(("127.0.0.1", server.port))
        line.sendall(post(body))
        assert say(server) == usual[served.BASE]


def test_too_many_at_once_are_told_to_come_back(server):
    """Places are slots + queue: 12 here."""

    def ask(_):
        try:
            return say(server, max_tokens=40, extra_body={"ignore_eos": True}) is not None
        except openai.RateLimitError as error:
            assert int(error.response.headers["Retry-After"]) >= 1 and error.code == "queue_full"
            return None

    with concurrent.futures.ThreadPoolExecutor(40) as pool:
        found = list(pool.map(ask, range(40)))
    assert found.count(True) >= 12 and None in found
