"""Chat with a model behind a server: what is asked, what is shown, what happens when the server fails."""

import io
import json
import socket
import sys

import pytest

import chats
import served
import tiny
from fake_server import EXPERTS, LAYERS, FakeServer, picture
from moesmith import cli
from moesmith.data.tools import parse_tools
from moesmith.errors import UserError
from moesmith.jobs import _chat_server, _experts_map
from moesmith.jobs._chat_server import Server, ServerChat, visible
from moesmith.jobs._conversation import converse
from moesmith.jobs.chat import Chat

RESTART = {
    "name": "restart",
    "parameters": {"properties": {"host": {"type": "string"}}, "required": ["host"]},
}


@pytest.fixture
def server():
    with FakeServer() as server:
        yield server


def one(server, capsys, *argv: str) -> tuple[int, str, str]:
    """(status, stdout, stderr) of one answer."""
    status = cli.main(["chat", "--server", server.url, "--prompt", "hello", *argv])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def talk(server, lines: str, monkeypatch, **options) -> ServerChat:
    chat = ServerChat(Server(server.url), "tiny", {"max_tokens": 9}, **options)
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    converse(chat)
    return chat


def test_one_answer(server, capsys):
    server.says(["Grüß", "e 🎉"])
    status, out, err = one(server, capsys, "--temperature", "0", "--seed", "3", "--system", "be kind")
    assert (status, out) == (0, "Grüße 🎉\n") and "2 tokens" in err and "tiny at " in err
    assert server.requests == [
        {
            "model": "tiny", "max_tokens": 512, "temperature": 0.0, "seed": 3, "stream": True,
            "messages": [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}],
            "stream_options": {"include_usage": True},
        }
    ]  # fmt: skip


def test_as_json(server, capsys):
    status, out, _ = one(server, capsys, "tiny-sft", "--json")
    facts = json.loads(out)
    assert status == 0 and facts["answer"] == "Hello there." and facts["tokens"] == 2
    assert facts["prompt_tokens"] == 9 and facts["peak_bytes"] is None and not facts["stopped"]
    assert server.requests[0]["model"] == "tiny-sft"


@pytest.mark.parametrize("ending", ["", "/", "/v1", "/v1/"])
def test_the_address_may_end_as_it_likes(server, ending):
    assert Server(server.url + ending).models() == ["tiny", "tiny-sft"]


def test_turns_are_remembered_until_reset(server, monkeypatch, capsys):
    chat = talk(server, "one\ntwo\n/reset\nthree\n/exit\nfour\n", monkeypatch, system="be kind")
    assert capsys.readouterr().out == "Hello there.\n" * 3
    said = [[m["content"] for m in request["messages"]] for request in server.requests]
    assert said == [
        ["be kind", "one"], ["be kind", "one", "Hello there.", "two"], ["be kind", "three"]
    ]  # fmt: skip
    assert [m["content"] for m in chat.messages] == ["be kind", "three", "Hello there."]


def test_ctrl_c_closes_the_connection_and_keeps_what_was_said(server, monkeypatch, capsys):
    server.says(["abc", "def"], kind="slow")
    chat = ServerChat(Server(server.url), "tiny", {})
    take, heard = _chat_server._Heard.take, []

    def interrupted(self, chunk):
        take(self, chunk)
        heard.append(chunk)
        if self.text == "abcdef":
            raise KeyboardInterrupt

    monkeypatch.setattr(_chat_server._Heard, "take", interrupted)
    answer = chat.answer("go")
    assert answer.stopped and answer.text == "abcdef" and "stopped" in capsys.readouterr().err
    assert server.gone.wait(5), "the server can stop"
    assert [m["content"] for m in chat.messages] == ["go", "abcdef"]


@pytest.mark.parametrize(("kind", "words"), [("broken", "broke off"), ("error", "out of memory")])
def test_an_answer_that_breaks_is_forgotten_with_its_question(server, kind, words, monkeypatch, capsys):
    server.says(["one", "two", "three", "four"], kind=kind)
    chat = talk(server, "x\n", monkeypatch)
    captured = capsys.readouterr()
    assert words in captured.err and captured.out == "onetwo\n" and chat.messages == []


@pytest.mark.parametrize(
    ("status", "message", "headers", "words"),
    [
        (429, "the queue is full", {"Retry_After": "7"}, ["429: the queue is full", "try again in 7 s"]),
        (400, "temperature: too hot", {}, ["400: temperature: too hot"]),
        (503, "", {}, ["503: Service Unavailable"]),
    ],
)
def test_a_refusal_is_one_line(server, status, message, headers, words, capsys):
    server.refuses(status, message, **headers)
    code, out, err = one(server, capsys)
    assert code == 2 and out.strip() == "" and all(word in err for word in words)


def test_a_key_by_hand_or_from_a_file(tmp_path, capsys):
    (tmp_path / "key").write_text("secret\n")
    with FakeServer(key="secret") as server:
        assert one(server, capsys)[0] == 2
        status, _, err = one(server, capsys)
        assert "wants an API key" in err and "--api-key" in err
        status, _, err = one(server, capsys, "--api-key", "wrong")
        assert status == 2 and "the key is wrong" in err and "wrong\n" in err
        for key in ("secret", str(tmp_path / "key")):
            assert one(server, capsys, "--api-key", key)[0] == 0


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["nobody"], "does not serve nobody"),
        (["--adapter", "x"], "--adapter does not go with --server"),
        (["--scheme", "nf4"], "--scheme does not go with --server"),
        (["--device", "cpu"], "--device does not go with --server"),
        (["--temperature", "-1"], "temperature=-1.0"),
        (["--max-new-tokens", "0"], "max_new_tokens=0"),
        (["--api-key", "a\nb"], "no key there"),
    ],
)
def test_mistakes(server, argv, words, capsys):
    status, _, err = one(server, capsys, *argv)
    assert status == 2 and words in err and server.requests == []


def test_no_server_there(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, and nobody listens
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        assert cli.main(["chat", "--server", url, "--prompt", "x"]) == 2
    err = capsys.readouterr().err
    assert f"no answer from {url}" in err and "moesmith serve" in err
    assert cli.main(["chat", "--server", "localhost:8000", "--prompt", "x"]) == 2
    assert "is no address" in capsys.readouterr().err
    assert cli.main(["chat", "some-model", "--api-key", "x", "--prompt", "x"]) == 2
    assert "--api-key goes with --server" in capsys.readouterr().err


def test_a_proxy_is_not_asked_for_this_machine(server, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    assert Server(server.url).models() == ["tiny", "tiny-sft"]


def test_a_server_cannot_steer_the_terminal(server, capsys):
    server.says(["a\x1b]0;pwned\x07", "\x1b[2J", "b\tc\nd\x9b31m"])
    _, out, _ = one(server, capsys)
    assert not set(out) & set("\x1b\x07\x9b") and out.startswith("a\ufffd]0;pwned") and "b\tc\nd" in out
    assert visible("naïve 🎉\n") == "naïve 🎉\n"


def test_calls_are_shown_and_wait_for_their_results(server, monkeypatch, capsys):
    chat = ServerChat(Server(server.url), "tiny", {}, tools=parse_tools([RESTART]))
    parts = [
        {"index": 0, "id": "a", "function": {"name": "restart", "arguments": ""}},
        {"index": 0, "function": {"arguments": '{"host": "na'}},
        {"index": 0, "function": {"arguments": 's"}'}},
        {"index": 1, "id": "b", "function": {"name": "restart", "arguments": "{}"}},
    ]
    calls = [{"id": "x", "choices": [{"delta": {"tool_calls": [part]}}]} for part in parts]
    bodies = []

    def scripted(body):
        bodies.append(body)
        yield from calls if len(bodies) == 1 else [{"choices": [{"delta": {"content": "done"}}]}]

    monkeypatch.setattr(chat.server, "chat", scripted)
    monkeypatch.setattr(sys, "stdin", io.StringIO("do it\n/result up\n/result down\n/result late\n"))
    converse(chat)
    err = capsys.readouterr().err
    assert 'call: restart(host="nas")' in err and "host is missing" in err and "no call waits" in err
    first, second = bodies
    assert first["tools"] == [tool.openai() for tool in parse_tools([RESTART])]
    assert [(m["role"], m.get("tool_call_id")) for m in second["messages"]] == [
        ("user", None), ("assistant", None), ("tool", "a"), ("tool", "b")
    ]  # fmt: skip
    assert second["messages"][1]["tool_calls"][0] == {
        "id": "a", "type": "function", "function": {"name": "restart", "arguments": '{"host": "nas"}'}
    }  # fmt: skip


def test_a_call_that_is_no_json_is_said(monkeypatch, capsys):
    heard = _chat_server._Heard(show=False)
    heard.take({"choices": [{"delta": {"tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}}]})
    assert heard.read_calls() == [] and "cannot be read" in capsys.readouterr().err


# ---------------------------------------------------------------- experts


def test_the_map_has_a_line_per_layer(server, monkeypatch, capsys):
    pieces = ["a", "b", "c", "d", "e"]
    server.says(pieces)
    talk(server, "/experts\nx\n/experts\n", monkeypatch)
    err = capsys.readouterr().err
    assert "no answer yet" in err
    rows = [line for line in err.splitlines() if line.lstrip()[:1].isdigit() and line.endswith("·")]
    facts = picture(pieces)
    assert len(rows) == LAYERS and f"{LAYERS} layers × {EXPERTS} experts" in err
    for number, (row, counts) in enumerate(zip(rows, facts["counts"], strict=True)):
        marks = row[7:]
        assert int(row[:7]) == number and len(marks) == EXPERTS
        assert [mark == "·" for mark in marks] == [n == 0 for n in counts]
        for a, n in zip(marks, counts, strict=True):
            for b, m in zip(marks, counts, strict=True):
                assert n == 0 or m == 0 or n <= m or a >= b, "more tokens, a higher mark"
    busiest = max(max(row) for row in facts["counts"])
    assert f"{busiest / 5:.0%} (even use: 25%)" in err


def test_a_wide_model_is_folded_not_cut(capsys):
    _experts_map.show(picture(["a"] * 9, experts=128), width=47)
    err = capsys.readouterr().err
    rows = err.splitlines()[:LAYERS]
    assert {len(row) for row in rows} == {7 + 32} and "stands for 4 experts" in err
    for row, counts in zip(rows, picture(["a"] * 9, experts=128)["counts"], strict=True):
        together = [counts[at : at + 4] for at in range(0, 128, 4)]
        assert [mark != "·" for mark in row[7:]] == [any(four) for four in together]


def test_experts_of_a_server_that_has_none(server, monkeypatch, capsys):
    server.replies.clear()
    chat = ServerChat(Server(server.url), "tiny", {})
    chat.last = "chatcmpl-unknown"
    with pytest.raises(UserError, match="no such thing"):
        chat.experts()


def test_a_model_of_this_process_shows_its_experts_too(capsys):
    tokenizer = chats.tokenizer()
    chat = Chat(tiny.build("olmoe"), tokenizer, {"max_new_tokens": 6, "do_sample": False})
    with pytest.raises(UserError, match="no answer yet"):
        chat.experts()
    answer = chat.answer("hello", show=False)
    facts = chat.experts()
    assert [sum(row) for row in facts["counts"]] == [answer.tokens * tiny.TOP_K] * tiny.LAYERS
    chat.reset()
    with pytest.raises(UserError, match="no answer yet"):
        chat.experts()


# ---------------------------------------------------------------- our own server


def test_with_our_own_server(monkeypatch, capsys):
    """What the model says through the server and the terminal is what the engine's own route says."""
    with served.running() as real:
        chat = ServerChat(Server(real.url), "first", {"max_tokens": 12, "temperature": 0.0})
        answer = chat.answer("hello", show=False)
        asked = real.client().chat.completions.create(
            model="first", messages=[{"role": "user", "content": "hello"}], max_tokens=12, temperature=0
        )
        assert answer.text == (asked.choices[0].message.content or "").strip()
        assert (
            answer.tokens == asked.usage.completion_tokens
            and answer.prompt_tokens == asked.usage.prompt_tokens
        )
        facts = chat.experts()
        _, _, said, _ = real.engine.kept(chat.last)
        assert [sum(row) for row in facts["counts"]] == [len(said) * k for k in facts["top_k"]]
        assert "".join(facts["tokens"]).startswith(answer.text)
        with pytest.raises(UserError, match="temperature"):
            ServerChat(Server(real.url), "first", {"temperature": 9.0}).answer("x", show=False)
