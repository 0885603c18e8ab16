"""Whatever is sent to the server, it answers in OpenAI's shape and never fails: no 5xx, no exception.

Bodies are drawn three ways: from the server's own description of its routes (schemathesis), from right
requests with something changed, and from JSON of any kind. The application runs in this
process, without a socket.
"""

import copy
import json

import hypothesis
import pytest
import schemathesis
from hypothesis import strategies as st
from starlette.testclient import TestClient

import served
from moesmith.serve.app import make_app
from moesmith.serve.limits import Limits
from moesmith.serve.schema import ChatRequest, CompletionRequest

NAMES = (served.BASE, *served.ADAPTERS)
TOO_LONG = 4  # tokens; what is drawn is about the checks, not about long answers


@pytest.fixture(scope="module")
def app():
    engine = served.engine()
    # A host for the tests' client; errors inside the application reach the test.
    yield make_app(engine, Limits(max_new_tokens=TOO_LONG, local_only=False))
    engine.stop(10)


@pytest.fixture(scope="module")
def client(app):
    with TestClient(app) as client:
        yield client


def settings(examples: int) -> hypothesis.settings:
    """The same examples on every machine."""
    return hypothesis.settings(
        max_examples=examples, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip


def check(answer, asked) -> None:
    """A status below 500, and OpenAI's error if it is one."""
    assert answer.status_code < 500, (asked, answer.text[:500])
    if answer.status_code >= 400:
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}, asked
        assert isinstance(error["message"], str) and error["message"], asked
        assert "Traceback" not in error["message"] and "object at 0x" not in error["message"], asked
    elif "text/event-stream" in answer.headers["content-type"]:
        events = [line[6:] for line in answer.text.split("\n\n") if line.startswith("data: ")]
        assert events[-1] == "[DONE]", asked
        for event in events[:-1]:
            assert "error" not in json.loads(event), asked
    else:
        assert json.loads(answer.text)["choices"], asked


# ---------------------------------------------------------------- what is drawn

numbers = st.one_of(
    st.integers(-5, 200), st.integers(), st.floats(), st.sampled_from([0, 1, -1, 2**31, 2**63, 10**400, 0.5])
)
words = st.one_of(
    st.text(max_size=20), st.sampled_from(["", "\x00", "\ud800", "�", "👩‍👩‍👧", "<|im_end|>", "a" * 300])
)
anything = st.recursive(
    st.none() | st.booleans() | numbers | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=8,
)
CHAT = {"model": served.BASE, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
TEXT = {"model": served.BASE, "prompt": "hi", "max_tokens": 2}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


def likely(kind) -> dict[str, st.SearchStrategy]:
    """Field -> values that are often right."""
    unit = st.floats(0, 1)
    part = st.fixed_dictionaries({"type": st.just("text"), "text": words})
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{"}}
    message = st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "tool", "developer", "x"])},
        optional={
            "content": words | st.lists(part, max_size=2),
            "tool_calls": st.just([call]),
            "tool_call_id": words, "name": words,
        },
    )  # fmt: skip
    ids = st.lists(st.integers(0, 130), max_size=6)
    known = {
        "model": st.sampled_from(NAMES), "max_tokens": st.integers(0, 9), "temperature": st.floats(0, 2.5),
        "top_p": unit, "top_k": st.integers(-2, 300), "min_p": unit, "n": st.integers(0, 4),
        "seed": st.integers(), "stop": words | st.lists(words, max_size=3), "stream": st.booleans(),
        "stream_options": st.just({"include_usage": True}), "presence_penalty": st.floats(-2, 2),
        "frequency_penalty": st.floats(-3, 3), "ignore_eos": st.booleans(),
        "logit_bias": st.dictionaries(st.integers(0, 140).map(str), st.floats(-100, 100), max_size=3),
        "messages": st.lists(message, max_size=4), "top_logprobs": st.integers(0, 25),
        "tools": st.lists(st.just(TOOL), max_size=2),
        "tool_choice": st.sampled_from(["auto", "none", "required"]),
        "prompt": words | ids | st.lists(words | ids, max_size=3), "echo": st.booleans(),
        "logprobs": st.booleans() if kind is ChatRequest else st.integers(0, 25),
    }  # fmt: skip
    return {name: known.get(name, anything) for name in kind.model_fields}


def changed(right: dict, kind) -> st.SearchStrategy[dict]:
    """A right request with some fields given other values, or taken out, or added."""
    fields = likely(kind)

    @st.composite
    def draw(draw):
        body = copy.deepcopy(right)
        for name in draw(st.lists(st.sampled_from(sorted(fields)), max_size=5, unique=True)):
            how = draw(st.integers(0, 9))
            if how == 0:
                body.pop(name, None)
            else:
                body[name] = draw(anything if how == 1 else fields[name])
        if draw(st.integers(0, 9)) == 0:
            body[draw(words)] = draw(anything)
        return body

    return draw()


def post(client, route, body):
    """As bytes: a client of ours would refuse to send some of it."""
    content = json.dumps(body).encode("utf-8", "surrogatepass")
    return client.post(route, content=content, headers={"Content-Type": "application/json"})


def fuzz_changed(client, route, right, kind, examples):
    seen = set()

    @settings(examples)
    @hypothesis.given(changed(right, kind))
    def run(body):
        answer = post(client, route, body)
        check(answer, body)
        seen.add(answer.status_code)

    run()
    assert {200, 400} <= seen, "both right and wrong requests were drawn"


ROUTES = [("/v1/chat/completions", CHAT, ChatRequest), ("/v1/completions", TEXT, CompletionRequest)]


@pytest.mark.parametrize(("route", "right", "kind"), ROUTES)
def test_right_requests_with_something_changed(client, route, right, kind):
    fuzz_changed(client, route, right, kind, 40)


@pytest.mark.slow
@pytest.mark.parametrize(("route", "right", "kind"), ROUTES)
def test_many_requests_with_something_changed(client, route, right, kind):
    fuzz_changed(client, route, right, kind, 1500)


@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/completions"])
def test_json_of_any_kind(client, route):
    @settings(40)
    @hypothesis.given(anything | st.binary(max_size=50))
    def run(body):
        if isinstance(body, bytes):
            answer = client.post(route, content=body, headers={"Content-Type": "application/json"})
        else:
            answer = post(client, route, body)
        check(answer, body)
        assert answer.status_code >= 400, "none of it names a model"

    run()


@pytest.mark.slow
def test_what_the_server_says_about_itself(app):
    """Requests made from the description at /openapi.json, right and wrong ones."""
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    operations = [found.ok() for found in schema.get_all_operations()]
    assert {operation.path for operation in operations} >= {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/models",
    }
    for operation in operations:

        @settings(120)
        @hypothesis.given(case=operation.as_strategy())
        def run(case):
            case.call_and_validate(checks=[schemathesis.checks.not_a_server_error])

        run()


def test_the_description_lists_every_field(client):
    """What the drawn requests rely on, and what other people's tools read."""
    said = client.get("/openapi.json").json()["components"]["schemas"]
    for kind in (ChatRequest, CompletionRequest):
        assert set(said[kind.__name__]["properties"]) == set(kind.model_fields)


def test_the_check_finds_a_server_that_fails(app, client, monkeypatch):
    """The tests above can fail: a handler that raises is a 500, and the check says so."""

    def failing(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(app.state.server, "room", failing)
    with pytest.raises(AssertionError):
        check(post(client, "/v1/chat/completions", CHAT), CHAT)
