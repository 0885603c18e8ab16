"""The server as clients meet it: OpenAI's own, and raw HTTP where that one would not misbehave."""

import asyncio
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2 as http
import openai
import pytest

import chats
import served
from moesmith.serve import app as room
from moesmith.serve import batching, streams
from served import TOOLS, ask

# One client: every new one reads the machine's certificates again.
HTTP = http.Client(timeout=60, limits=http.Limits(max_keepalive_connections=0))
ASK = {"model": served.BASE, "messages": [{"role": "user", "content": "hi"}]}
NAMES = (served.BASE, *served.ADAPTERS)


@pytest.fixture(scope="module")
def running():
    with served.running(context=512) as server:
        yield server


@pytest.fixture
def limits(running):
    """The server's limits, to be changed for one test."""
    before, places = dict(vars(running.server.limits)), running.server.gate.places
    yield running.server.limits
    vars(running.server.limits).update(before)
    running.server.gate.places = places


@pytest.fixture(autouse=True)
def nothing_is_left(running):
    yield
    wait_until(lambda: running.server.gate.inside == 0)
    assert running.engine.active() == running.engine.held() == 0


def wait_until(true):
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def post(running, path="/v1/chat/completions", **options):
    options = options or {"json": ASK}
    return HTTP.post(running.url + path, **options)


# ---------------------------------------------------------------- answers


def test_every_name_is_listed_and_answers_in_its_own_way(running):
    client = running.client()
    listed = list(client.models.list())
    assert [model.id for model in listed] == list(NAMES)
    assert {model.max_model_len for model in listed} == {running.engine.context}
    answers = [ask(client, name) for name in NAMES]
    assert len({answer.choices[0].message.content for answer in answers}) == len(NAMES)
    one = answers[0]
    assert one.choices[0].finish_reason == "length"
    prompt = running.engine.speakers[served.BASE].prompt(ASK["messages"], None)
    assert (one.usage.prompt_tokens, one.usage.completion_tokens) == (len(prompt), 12)
    assert one.usage.total_tokens == len(prompt) + 12


def test_a_stream_adds_up_to_the_whole_answer(running):
    client = running.client()
    whole = ask(client, served.ADAPTERS[0], logprobs=True, top_logprobs=2)
    parts = list(
        ask(client, served.ADAPTERS[0], logprobs=True, top_logprobs=2, stream=True,
            stream_options={"include_usage": True})
    )  # fmt: skip
    choices = [part.choices[0] for part in parts if part.choices]
    assert choices[0].delta.role == "assistant"
    assert "".join(one.delta.content or "" for one in choices) == whole.choices[0].message.content
    logprobs = [one for choice in choices if choice.logprobs for one in choice.logprobs.content]
    assert logprobs == whole.choices[0].logprobs.content
    assert [one.finish_reason for one in choices if one.finish_reason] == ["length"]
    assert parts[-1].usage == whole.usage
    assert len({part.id for part in parts}) == 1


def test_log_probabilities_belong_to_the_tokens_of_the_answer(running):
    answer = ask(running.client(), logprobs=True, top_logprobs=3)
    content = answer.choices[0].logprobs.content
    assert "".join(one.token for one in content) == answer.choices[0].message.content
    for one in content:
        assert len(one.top_logprobs) == 3
        assert one.logprob == one.top_logprobs[0].logprob, "greedy takes the likeliest"
        assert bytes(one.bytes).decode() == one.token


def test_several_answers_have_seeds_of_their_own_and_repeat(running):
    client = running.client()
    options = {"n": 3, "temperature": 1.5, "seed": 11, "max_tokens": 16}
    first, again = ([one.message.content for one in ask(client, **options).choices] for _ in range(2))
    assert first == again
    assert len(set(first)) == 3
    streamed = ["", "", ""]
    for part in ask(client, stream=True, **options):
        streamed[part.choices[0].index] += part.choices[0].delta.content or ""
    assert streamed == first
    assert ask(client, temperature=1.5, max_tokens=16).choices[0].message.content not in first[:1]


def test_a_stop_string_ends_an_answer_and_is_not_in_it(running):
    client = running.client()
    text = ask(client, served.ADAPTERS[0]).choices[0].message.content
    stop = text[4:6]
    for stream in (False, True):
        answer = ask(client, served.ADAPTERS[0], stop=[stop, "never"], stream=stream)
        if stream:
            choices = [part.choices[0] for part in answer]
            found, end = "".join(one.delta.content or "" for one in choices), choices[-1].finish_reason
        else:
            found, end = answer.choices[0].message.content, answer.choices[0].finish_reason
        assert (found, end) == (text[: text.index(stop)], "stop")


def test_clients_at_once_get_the_answers_they_get_alone(running):
    client = running.client()
    asked = [(name, f"{i}?") for i in range(4) for name in NAMES]
    alone = [ask(client, name, text).choices[0].message.content for name, text in asked]
    with ThreadPoolExecutor(len(asked)) as pool:
        together = list(pool.map(lambda one: ask(client, *one).choices[0].message.content, asked))
    assert together == alone


def test_bias_and_eos(running):
    client = running.client()
    token = chats.tokenizer().encode("Z", add_special_tokens=False)[0]
    assert ask(client, logit_bias={str(token): 100}).choices[0].message.content == "Z" * 12
    end = chats.tokenizer().convert_tokens_to_ids("<|im_end|>")
    ended = ask(client, logit_bias={str(end): 100}, logprobs=True)
    assert (ended.choices[0].message.content, ended.choices[0].finish_reason) == ("", "stop")
    assert (ended.usage.completion_tokens, ended.choices[0].logprobs.content) == (1, [])
    longer = ask(client, logit_bias={str(end): 100}, extra_body={"ignore_eos": True})
    assert (longer.choices[0].finish_reason, longer.usage.completion_tokens) == ("length", 12)


# ---------------------------------------------------------------- completions


def test_echo_scores_the_prompt(running):
    """As lm-eval's local-completions asks for it."""
    prompts = [[10, 20, 30, 40], [50, 60]]
    answer = running.client().completions.create(
        model=served.ADAPTERS[1],
        prompt=prompts,
        temperature=0,
        max_tokens=1,
        logprobs=1,
        echo=True,
        seed=1234,
    )
    for prompt, choice in zip(prompts, answer.choices, strict=True):
        found = choice.logprobs
        scored = running.engine.score(served.ADAPTERS[1], prompt, 1)
        assert found.token_logprobs[: len(prompt)] == pytest.approx([one.logprob for one in scored])
        assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == len(prompt) + 1
        assert found.top_logprobs[0] is None
        best = max(found.top_logprobs[-1].values())
        assert found.token_logprobs[-1] == best, "one greedy token is written"
        assert choice.text.startswith(chats.tokenizer().decode(prompt))
        assert found.text_offset == [len("".join(found.tokens[:i])) for i in range(len(found.tokens))]
    only = running.client().completions.create(
        model=served.ADAPTERS[1], prompt=prompts[0], max_tokens=0, logprobs=0, echo=True
    )
    assert only.choices[0].logprobs.token_logprobs == answer.choices[0].logprobs.token_logprobs[:-1]
    assert only.usage.completion_tokens == 0


def test_text_and_its_tokens_are_one_prompt_and_streams_add_up(running):
    client = running.client()
    ids = chats.tokenizer().encode("abc def")
    options = {"model": served.BASE, "temperature": 0, "max_tokens": 8, "logprobs": 2}
    text, tokens = (client.completions.create(prompt=prompt, **options) for prompt in ("abc def", ids))
    assert text.choices[0].text == tokens.choices[0].text
    parts = list(client.completions.create(prompt="abc def", stream=True, **options))
    assert "".join(part.choices[0].text for part in parts) == text.choices[0].text
    streamed = [one for part in parts for one in part.choices[0].logprobs.token_logprobs]
    assert streamed == text.choices[0].logprobs.token_logprobs
    echoed = client.completions.create(
        prompt="abc def", stream=True, echo=True, **options | {"logprobs": None}
    )
    assert "".join(part.choices[0].text for part in echoed) == "abc def" + text.choices[0].text


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        ({"model": "nobody"}, 404, "model_not_found"),
        ({"unheard_of": 1}, 400, "unknown_parameter"),
        ({"logit_bias": {"9999999": 1}}, 400, None),
        ({"logit_bias": {"x": 1}}, 400, None),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, 400, "context_length_exceeded"),
        ({"tools": [TOOLS[0], TOOLS[0] | {"function": {"name": "add"}}]}, 400, None),
    ],
)
def test_requests_that_cannot_be_answered(running, change, status, code):
    answer = post(running, json=ASK | change)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (status, code)
    assert error["message"] and error["type"] == "invalid_request_error"


def test_tokens_that_the_model_does_not_have_are_refused(running):
    answer = post(running, "/v1/completions", json={"model": served.BASE, "prompt": [5, 128]})
    assert (answer.status_code, "128" in answer.json()["error"]["message"]) == (400, True)


def test_a_template_that_refuses_is_the_clients_error(running, monkeypatch):
    template = "{{ raise_exception('roles must alternate') }}"
    speaker = running.engine.speakers[served.BASE]
    words = chats.tokenizer(template)
    monkeypatch.setattr(speaker, "tokenizer", words)
    answer = post(running)
    assert answer.status_code == 400
    assert "roles must alternate" in answer.json()["error"]["message"]
    monkeypatch.setattr(speaker, "form", None)
    assert "no chat template" in post(running).json()["error"]["message"]


def test_routes_that_are_not_there_and_methods_that_do_not_fit(running):
    for method, path, status in (
        ("GET", "/nowhere", 404),
        ("GET", "/v1/completions", 405),
        ("PUT", "/", 405),
    ):
        answer = HTTP.request(method, running.url + path)
        assert answer.status_code == status
        assert answer.json()["error"]["message"].startswith(method)


def test_only_json_that_is_not_too_large_and_comes_in_time(running, limits):
    text = json.dumps(ASK | {"max_tokens": 2}).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        assert post(running, content=text, headers={"Content-Type": kind}).status_code == 415
    limits.max_body = 1000
    large = json.dumps(ASK | {"user": "x" * 1000}).encode()
    as_json = {"Content-Type": "application/json"}
    assert post(running, content=large, headers=as_json).status_code == 413
    assert post(running, content=iter([large[:800], large[800:]]), headers=as_json).status_code == 413
    assert post(running, content=text, headers=as_json).status_code == 200
    limits.body_timeout = 0.2
    with socket.create_connection(("127.0.0.1", running.port), 10) as slow:
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        slow.sendall((head + "Content-Length: 100\r\n\r\n{").encode())
        assert b" 408 " in slow.recv(100)


def test_the_key_is_wanted_everywhere_but_for_the_page_and_health(running, limits):
    limits.api_key = "secret"
    for path in ("/v1/models", "/metrics", "/moesmith/experts/x"):
        answer = HTTP.get(running.url + path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    for wrong in ("secre", "secrets", "x", "\xfc"):
        header = {"Authorization": f"Bearer {wrong}".encode("latin-1")}
        assert post(running, json=ASK, headers=header).status_code == 401
    assert [HTTP.get(running.url + path).status_code for path in ("/", "/health")] == [200, 200]
    assert ask(running.client("secret")).choices
    with pytest.raises(openai.AuthenticationError):
        ask(running.client("other"))


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8000", 200),
        ("LocalHost:8000", 200),
        ("", 200),
        ("127.0.0.1", 200),
        ("[::1]:80", 200),
        ("evil.example", 403),
        ("127.0.0.1.evil", 403),
    ],
)
def test_a_name_that_was_pointed_here_is_refused(running, limits, host, status):
    for path in ("/v1/models", "/"):
        assert HTTP.get(running.url + path, headers={"Host": host}).status_code == status
    limits.local_only = False
    assert HTTP.get(running.url + "/v1/models", headers={"Host": host}).status_code == 200


def test_a_full_queue_says_when_to_come_back(running, limits):
    running.server.gate.places = 2
    client = running.client()
    with running.engine.exclusive(served.BASE):  # nothing moves while the model is held
        streams = [
            threading.Thread(target=ask, args=(client,), kwargs={"text": f"{i}", "max_tokens": 3})
            for i in range(2)
        ]
        for stream in streams:
            stream.start()
        wait_until(lambda: running.server.gate.inside == 2)
        refused = post(running)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
        assert int(refused.headers["retry-after"]) >= 1
        assert post(running, json=ASK | {"n": 3}).status_code == 400, "that many never fit"
        assert HTTP.get(running.url + "/health").status_code == 200
    for stream in streams:
        stream.join(30)
    assert post(running, json=ASK | {"max_tokens": 2}).status_code == 200


def test_an_answer_that_takes_too_long_is_given_up(running, limits):
    limits.timeout = 0.3
    with running.engine.exclusive(served.BASE):
        whole = post(running)
        streamed = post(running, json=ASK | {"stream": True})
    assert (whole.status_code, whole.json()["error"]["code"]) == (504, "timeout")
    assert streamed.status_code == 200
    assert '"code": "timeout"' in streamed.text and "[DONE]" not in streamed.text


def test_a_server_that_stops_takes_nothing_new(running, monkeypatch):
    monkeypatch.setattr(running.engine, "stopping", True)
    answer = post(running)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    assert HTTP.get(running.url + "/health").status_code == 503


def test_a_model_that_fails_is_an_error_and_the_next_answer_comes(running, monkeypatch):
    plain, left = batching.Voice.__call__, [1, 1]

    def fails(self, **batch):
        if left and left.pop():
            raise RuntimeError("broken weights")
        return plain(self, **batch)

    monkeypatch.setattr(batching.Voice, "__call__", fails)
    answer = post(running)
    assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
    assert "broken weights" in answer.json()["error"]["message"]
    streamed = post(running, json=ASK | {"stream": True})
    assert (streamed.status_code, "broken weights" in streamed.text) == (200, True)
    deadline = time.monotonic() + 60
    while (again := post(running, json=ASK | {"max_tokens": 2}).status_code) == 503:
        assert time.monotonic() < deadline, "503 asks to come back: the loop that died is being replaced"
    assert again == 200


def test_a_mistake_of_ours_is_a_500_without_its_insides(running, monkeypatch):
    monkeypatch.setattr(room.Server, "chat", lambda self, request: 1 / 0)
    answer = post(running)
    assert answer.status_code == 500
    assert "division" not in answer.text


# ---------------------------------------------------------------- clients that leave


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_nobody_waits_for_is_not_written_on(running, stream):
    body = json.dumps(ASK | {"stream": stream, "ignore_eos": True, "max_tokens": 100}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    with running.engine.exclusive(served.BASE):
        with socket.create_connection(("127.0.0.1", running.port), 10) as client:
            client.sendall((head + "Content-Type: application/json\r\n\r\n").encode() + body)
            wait_until(lambda: running.engine.active() == 1)
        wait_until(lambda: running.engine.active() == 0)
        assert running.server.gate.inside == 0
    gone = 'moesmith_answers_total{finish="cancelled",model="tiny"}'
    assert gone in HTTP.get(running.url + "/metrics").text


def test_a_client_may_leave_in_the_middle_of_a_stream(running):
    stream = ask(running.client(), stream=True, max_tokens=200, extra_body={"ignore_eos": True})
    for _ in range(3):
        next(iter(stream))
    stream.close()
    wait_until(lambda: running.engine.active() == 0)


def test_a_client_that_reads_slowly_gets_every_part_once(running, monkeypatch):
    """The answer is at its end while its first parts are still being sent."""
    send = streams.EventStream._write

    async def slowly(self, out):
        async def slow(message):
            await asyncio.sleep(0.03)
            await out(message)

        await send(self, slow)

    monkeypatch.setattr(streams.EventStream, "_write", slowly)
    for tools in ({}, {"tools": TOOLS}):
        whole = ask(running.client(), max_tokens=30, **tools).choices[0]
        choices = [part.choices[0] for part in ask(running.client(), max_tokens=30, stream=True, **tools)]
        assert "".join(one.delta.content or "" for one in choices) == (whole.message.content or "")
        assert [one.finish_reason for one in choices if one.finish_reason] == [whole.finish_reason]


# ---------------------------------------------------------------- the rest


def test_metrics_count_what_happened(running):
    def read():
        lines = HTTP.get(running.url + "/metrics").text.splitlines()
        return {
            name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")
        }

    before = read()
    ask(running.client(), max_tokens=7)
    post(running, json=ASK | {"model": "nobody"})
    after = read()

    def more(name):
        return after.get(f"moesmith_{name}", 0) - before.get(f"moesmith_{name}", 0)

    assert more('generated_tokens_total{model="tiny"}') == 7
    assert more('requests_total{route="/v1/chat/completions",status="200"}') == 1
    assert more('requests_total{route="/v1/chat/completions",status="404"}') == 1
    assert more("answer_seconds_count") == more("first_token_seconds_count") == 1
    assert more('answer_seconds_bucket{le="+Inf"}') == 1
    assert more("first_token_seconds_sum") > 0
    assert after["moesmith_answers_active"] == after["moesmith_queue_used"] == 0


def test_the_experts_of_a_reply_can_be_looked_at(running):
    answer = ask(running.client(), served.ADAPTERS[0])
    found = HTTP.get(f"{running.url}/moesmith/experts/{answer.id}").json()
    assert (found["id"], found["model"]) == (answer.id, served.ADAPTERS[0])
    assert "".join(found["tokens"]) == answer.choices[0].message.content
    for counts in found["counts"]:
        assert sum(counts) == 12 * 2  # top-2
    assert HTTP.get(f"{running.url}/moesmith/experts/nothing").status_code == 404


def test_the_description_names_every_field(running):
    described = HTTP.get(running.url + "/openapi.json").json()
    schemas = described["components"]["schemas"]
    assert "top_logprobs" in schemas["ChatRequest"]["properties"]
    body = described["paths"]["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]
    assert body["schema"]["$ref"].rpartition("/")[2] in schemas
