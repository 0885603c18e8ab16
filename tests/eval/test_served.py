"""A server is asked as agreed; what passes is tried again, what does not is said, every word is kept."""

import http.client
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from moesmith.errors import UserError
from moesmith.eval.served import Server, ask_all, root


class Fake(ThreadingHTTPServer):
    """Answers what `script` gives for a body: (status, JSON, headers), or an exception to break off."""

    daemon_threads = True

    def __init__(self, script, models=("tiny",), owner="vllm", props=None):
        self.script, self.models, self.owner, self.props = script, models, owner, props
        self.asked, self.headers, self.most, self.now, self.gone = [], [], 0, 0, threading.Event()
        self.lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        pass


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def say(self, status, found, headers=()):
        raw = json.dumps(found).encode()
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def do_GET(self):
        if self.path == "/v1/models":
            entries = [
                {"id": name, "owned_by": self.server.owner, "max_model_len": 512}
                for name in self.server.models
            ]
            self.say(200, {"data": entries})
        elif self.path == "/props" and self.server.props:
            self.say(200, self.server.props)
        else:
            self.say(404, {"error": "no such route"})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        fake = self.server
        if self.path == "/tokenize":
            return self.say(200, {"tokens": list((body.get("content") or body.get("prompt")).split())})
        with fake.lock:
            fake.asked.append(body)
            fake.headers.append(dict(self.headers))
            fake.now += 1
            fake.most = max(fake.most, fake.now)
        try:
            found = fake.script(body)
        finally:
            with fake.lock:
                fake.now -= 1
        if found is None:
            self.close_connection = True
            return self.connection.close()
        return self.say(*found)


def said(content="The answer is (B).", finish="stop", reasoning=None, tokens=7):
    message = {"role": "assistant", "content": content}
    if reasoning is not None:
        message["reasoning_content"] = reasoning
    return 200, {
        "choices": [{"message": message, "finish_reason": finish}],
        "usage": {"prompt_tokens": 11, "completion_tokens": tokens},
    }


@pytest.fixture
def serve():
    made = []

    def start(script=lambda body: said(), **options):
        made.append(Fake(script, **options))
        server = Server.find(made[-1].url)
        server.pause = 0.01
        return made[-1], server

    yield start
    for one in made:
        one.shutdown()
        one.server_close()


def test_one_question_is_asked_greedily_and_everything_is_kept(serve):
    fake, server = serve(lambda body: said("(B)", "length", "three words here", 40))
    reply = server.ask("why?", max_tokens=100, budget=50, seed=3)
    asked = fake.asked[0]
    assert asked["messages"] == [{"role": "user", "content": "why?"}]
    assert (asked["temperature"], asked["max_tokens"], asked["seed"], asked["model"]) == (0, 100, 3, "tiny")
    assert (reply.answer, reply.reasoning, reply.finish) == ("(B)", "three words here", "length")
    assert (reply.prompt_tokens, reply.tokens, reply.reasoning_tokens, reply.attempts) == (11, 40, 3, 1)
    assert reply.budget_hit is False and server.ask("x", max_tokens=9, budget=3).budget_hit is True


@pytest.mark.parametrize(
    ("owner", "key"),
    [("llamacpp", "reasoning_budget_tokens"), ("vllm", "thinking_token_budget"), ("moesmith", None)],
)
def test_the_budget_goes_under_the_name_that_each_server_knows(serve, owner, key):
    fake, server = serve(owner=owner)
    server.ask("why?", max_tokens=100, budget=50)
    extra = set(fake.asked[0]) - {"model", "messages", "temperature", "max_tokens", "cache_prompt"}
    assert server.takes_budget == bool(key)
    assert extra == ({key, "chat_template_kwargs"} if key else set())
    if key:
        assert fake.asked[0][key] == 50 and fake.asked[0]["chat_template_kwargs"]["enable_thinking"]


def test_reasoning_that_came_inside_of_the_answer_is_taken_out(serve):
    _, server = serve(lambda body: said("<think>maybe (A)</think>\n(B)"))
    reply = server.ask("why?", max_tokens=9)
    assert (reply.reasoning, reply.answer) == ("maybe (A)", "(B)")
    _, server = serve(lambda body: said(None, "length", "on and on"))
    assert server.ask("why?", max_tokens=9).answer == "", "null is no word"


def test_what_passes_is_tried_again(serve):
    left = [(503, {"error": {"message": "loading"}}), None, (429, {"error": "busy"}, [("Retry-After", "0")])]
    fake, server = serve(lambda body: left.pop(0) if left else said())
    reply = server.ask("why?", max_tokens=9)
    assert reply.answer == "The answer is (B)." and reply.attempts == 4 == len(fake.asked)


def test_retry_after_is_kept_to(serve):
    left = [(429, {"error": "busy"}, [("Retry-After", "0.3")])]
    _, server = serve(lambda body: left.pop(0) if left else said())
    started = time.monotonic()
    server.ask("why?", max_tokens=9)
    assert time.monotonic() - started >= 0.3, "pause alone is 0.01 s"


def test_a_server_that_stays_away_ends_the_run(serve):
    _, server = serve(lambda body: (500, {"error": {"message": "out of memory"}}))
    server.tries = 3
    with pytest.raises(UserError, match=r"no answer after 3 tries \(500: out of memory\)") as error:
        server.ask("why?", max_tokens=9)
    assert "goes on" in error.value.hint


@pytest.mark.parametrize("status", [400, 401, 404, 422])
def test_what_a_server_refuses_is_said_at_once(serve, status):
    fake, server = serve(lambda body: (status, {"error": {"message": "no thanks"}}))
    with pytest.raises(UserError, match=f"{status}: no thanks"):
        server.ask("why?", max_tokens=9)
    assert len(fake.asked) == 1


def test_a_server_that_hangs_is_not_waited_for_for_ever(serve):
    hang = threading.Event()
    _, server = serve(lambda body: (hang.wait(10), said())[1])
    server.timeout = 0.2
    with pytest.raises(UserError, match="did not answer in"):
        server.ask("why?", max_tokens=9)
    hang.set()


def test_a_key_is_sent_as_a_bearer_token(serve, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    fake, server = serve()
    server.ask("why?", max_tokens=9)
    assert fake.headers[0]["Authorization"] == "Bearer secret"
    assert "secret" not in json.dumps(server.facts())


# ---------------------------------------------------------------- finding it


def test_llama_server_says_what_it_can_see(serve):
    props = {"default_generation_settings": {"n_ctx": 4096}, "build_info": "b1", "model_path": "/x/y/m.gguf"}
    _, server = serve(owner="llamacpp", props=props)
    assert server.context == 4096 and server.facts()["file"] == "m.gguf" and server.name == "llama-server"
    assert "/x/y" not in json.dumps(server.facts())


def test_of_several_models_one_has_to_be_named(serve):
    fake, server = serve(models=["only"])
    assert server.model == "only"
    fake.models = ["one", "two"]
    with pytest.raises(UserError, match="has 2 models: one, two"):
        Server.find(fake.url)
    assert Server.find(fake.url, "two").model == "two"
    with pytest.raises(UserError, match="has no model three"):
        Server.find(fake.url, "three")


def test_nothing_there_is_one_line():
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(UserError, match="no server answers"):
        Server.find(f"http://127.0.0.1:{port}")


@pytest.mark.parametrize("tail", ["", "/", "/v1", "/v1/", "/v1/chat/completions"])
def test_a_url_is_taken_in_every_form(tail):
    assert root(f"http://host:8080{tail}") == "http://host:8080"


@pytest.mark.parametrize("url", ["host:8080", "ftp://x", "http://", "", "http://h:port"])
def test_what_is_no_url_is_refused(url):
    with pytest.raises(UserError, match="is no URL"):
        root(url)


# ---------------------------------------------------------------- many at a time


def test_questions_are_asked_so_many_at_a_time_and_each_gets_its_own_answer(serve):
    def script(body):
        time.sleep(0.02)
        return said(f"to {body['messages'][0]['content']}")

    fake, server = serve(script)
    texts = [(i, f"q{i}") for i in range(12)]
    found = dict(ask_all(server, texts, max_tokens=9, budget=None, concurrency=3))
    assert {i: one.answer for i, one in found.items()} == {i: f"to q{i}" for i in range(12)}
    assert fake.most == 3


def test_one_that_is_refused_ends_it_and_what_was_answered_is_handed_out(serve):
    fake, server = serve(lambda body: (400, {"error": "bad"}) if "q2" in str(body) else said())
    found = []
    with pytest.raises(UserError, match="bad"):
        for place, _ in ask_all(
            server, [(i, f"q{i}") for i in range(50)], max_tokens=9, budget=None, concurrency=1
        ):
            found.append(place)
    assert found == [0, 1] and len(fake.asked) == 3


def test_stopping_lets_go_of_the_questions_under_way(serve):
    """Ctrl-C: the connections are closed, so that the server stops writing, and nothing is waited for."""
    hang = threading.Event()
    fake, server = serve(lambda body: said() if "q0" in str(body) else (hang.wait(20), said())[1])
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        for _ in ask_all(server, [(i, f"q{i}") for i in range(5)], max_tokens=9, budget=None, concurrency=2):
            raise KeyboardInterrupt
    assert time.monotonic() - started < 10 and len(fake.asked) <= 3
    hang.set()


def test_stopping_while_a_question_connects_sends_nothing(serve, monkeypatch):
    """`stop` finds a connection without a socket; the question behind it must not be sent and waited for."""
    fake, server = serve()
    connect = http.client.HTTPConnection.connect

    def stopped_on_the_way(self):
        server.stop()
        assert self.sock is None, "there is nothing yet that could be closed"
        connect(self)

    monkeypatch.setattr(http.client.HTTPConnection, "connect", stopped_on_the_way)
    with pytest.raises(UserError, match="stopped"):
        server.ask("q", max_tokens=9)
    assert fake.asked == [] and not server._open


@pytest.mark.parametrize(
    "found",
    [
        {},
        "no JSON",
        {"choices": [None]},
        {"choices": "x"},
        {"choices": [{"message": "B"}]},
        {"choices": [{}]},
    ],
)
def test_an_answer_without_a_message_is_asked_for_again_then_said(serve, found):
    fake, server = serve(lambda body: (200, found))
    told = []
    server.tries, server.pause, server.say = 2, 0.0, told.append
    with pytest.raises(UserError, match="no answer after 2 tries"):
        server.ask("?", max_tokens=9)
    assert len(fake.asked) == 2 and len(told) == 1 and "asked again" in told[0]


def test_content_in_parts_and_no_content_are_read(serve):
    parts = [{"type": "text", "text": "The answer "}, {"type": "text", "text": "is (B)."}]
    found = iter([parts, None, 7])
    _, server = serve(lambda body: said(next(found)))
    assert [server.ask("?", max_tokens=9).answer for _ in range(3)] == ["The answer is (B).", "", ""]


def test_a_line_end_behind_the_key_is_no_part_of_it(serve, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret\n")
    fake, server = serve()
    server.ask("?", max_tokens=9)
    assert fake.headers[0]["Authorization"] == "Bearer secret"
