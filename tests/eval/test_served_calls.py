"""Tool calls through OpenAI's routes: what goes out, and what is made of what comes back."""

import json

import pytest

from chats import chat
from eval.test_served import Fake
from moesmith.data.requests import read_requests
from moesmith.data.tools import parse_tools
from moesmith.errors import UserError
from moesmith.eval.served import Server
from moesmith.eval.served_calls import as_openai, ask_requests, judged, unread

NAME = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
TOOLS = parse_tools([{"name": name, "parameters": NAME} for name in ("restart", "stop")])


def called(name, arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


@pytest.fixture
def request_(tmp_path):
    calls = [called("restart", {"name": "web"})]
    row = {"messages": [*chat("restart web"), {"role": "assistant", "content": "", "tool_calls": calls}]}
    (tmp_path / "r.jsonl").write_text(json.dumps(row) + "\n")
    return read_requests(tmp_path / "r.jsonl", TOOLS)[0][0]


def reply(*calls, content=None, finish="tool_calls"):
    message = {"role": "assistant", "content": content, "tool_calls": list(calls)}
    usage = {"completion_tokens": 7}
    return {"choices": [{"message": message, "finish_reason": finish}], "usage": usage}


def test_calls_and_their_results_are_tied_by_ids():
    both = [called("a", {"x": "ä"}), called("b", "{}")]
    later = [called("c", {})]
    made = as_openai(
        [
            {"role": "user", "content": "go"},
            {"role": "assistant", "content": "", "tool_calls": both},
            {"role": "tool", "content": "1"},
            {"role": "tool", "content": "2"},
            {"role": "assistant", "tool_calls": later},
            {"role": "tool", "content": "3", "name": "c"},
        ]
    )
    ids = [call["id"] for message in made for call in message.get("tool_calls", ())]
    assert len(set(ids)) == 3 and [one["tool_call_id"] for one in made if one["role"] == "tool"] == ids
    first = made[1]["tool_calls"]
    assert [call["function"]["arguments"] for call in first] == ['{"x": "ä"}', "{}"]
    assert made[4]["content"] is None and made[5]["name"] == "c"


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        (reply(called("restart", '{"name": "web"}')), "right"),
        (reply(called("restart", '{"name": "db"}')), "wrong_arguments"),
        (reply(called("stop", '{"name": "web"}')), "wrong_tool"),
        (reply(called("restart", '{"name": ')), "malformed"),
        (reply(called("restart", "[1]")), "malformed"),
        (reply(content="Which one?", finish="stop"), "missing_call"),
        (reply(content="So I", finish="length"), "cut"),
    ],
)
def test_each_kind_of_answer(request_, found, verdict):
    answer = judged(request_, found)
    assert answer.tokens == 7 and answer.cut == (verdict == "cut")
    assert (answer.verdict == "right") == (verdict == "right")
    assert bool(answer.malformed) == (verdict == "malformed")
    assert answer.name_match == (verdict in ("right", "wrong_arguments"))


def test_reasoning_is_no_part_of_the_answer(request_):
    answer = judged(request_, reply(content="<think>restart?</think>Which one?", finish="stop"))
    assert answer.answer == "Which one?"


def test_a_call_that_the_server_did_not_read_is_told(request_):
    raw = '<tool_call>{"name": "restart", "arguments": {"name": "web"}}</tool_call>'
    unparsed = judged(request_, reply(content=raw, finish="stop"))
    read = judged(request_, reply(called("restart", '{"name": "web"}')))
    assert not unparsed.right and unread([unparsed, read]) == 1


def test_what_the_server_is_asked(request_):
    fake = Fake(lambda body: (200, reply(called("restart", '{"name": "web"}')), ()), owner="llamacpp")
    try:
        found = dict(ask_requests(Server.find(fake.url), [(5, request_)], max_tokens=9))
    finally:
        fake.shutdown()
        fake.server_close()
    assert found[5].right
    (body,) = fake.asked
    assert body["tools"] == TOOLS.openai() and body["messages"] == request_.prompt
    assert body["temperature"] == 0 and body["max_tokens"] == 9 and body["cache_prompt"] is False


def test_a_server_without_tools_says_so(request_):
    fake = Fake(lambda body: (400, {"error": {"message": "tools need --jinja"}}, ()))
    try:
        with pytest.raises(UserError, match="tools need --jinja"):
            list(ask_requests(Server.find(fake.url), [(0, request_)], max_tokens=9))
    finally:
        fake.shutdown()
        fake.server_close()
