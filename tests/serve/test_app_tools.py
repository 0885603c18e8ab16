"""Requests with tools: calls come as calls, and text as it is written, up to where a call may begin."""

import json

import pytest

import chats
import served
import tool_templates
from moesmith.serve import batching
from moesmith.serve.calls import Speaker
from served import TOOLS, ask

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'


@pytest.fixture(scope="module")
def running():
    with served.running(context=512) as server:
        yield server


@pytest.fixture
def says(running, monkeypatch):
    """says(text): the model writes this text, whatever it is asked."""
    words = chats.tokenizer(tool_templates.PUBLISHED["hermes"])
    speaker = Speaker.of(words, running.engine.model.generation_config)
    monkeypatch.setitem(running.engine.speakers, served.BASE, speaker)
    seen = []

    def set_text(text):
        ids = [*words.encode(text, add_special_tokens=False), words.convert_tokens_to_ids("<|im_end|>")]

        def choose(row, how, before):
            return batching.Token(ids[len(before)])

        monkeypatch.setattr(batching, "choose", choose)
        submit = running.engine.submit

        def watched(name, prompt, *rest):
            seen.append(words.decode(prompt))
            return submit(name, prompt, *rest)

        monkeypatch.setattr(running.engine, "submit", watched)
        return seen

    return set_text


def test_calls_come_as_calls_whole_and_streamed(running, says):
    seen = says(f"Sure.\n{CALL}\n{CALL}")
    client = running.client()
    message = ask(client, tools=TOOLS, max_tokens=200).choices[0]
    assert (message.finish_reason, message.message.content) == ("tool_calls", "Sure.")
    calls = [(call.function.name, json.loads(call.function.arguments)) for call in message.message.tool_calls]
    assert calls == [("add", {"a": 1})] * 2
    assert len({call.id for call in message.message.tool_calls}) == 2
    assert '"name": "add"' in seen[0], "the tools are in the prompt"
    choices = [part.choices[0] for part in ask(client, tools=TOOLS, max_tokens=200, stream=True)]
    assert choices[-1].finish_reason == "tool_calls"
    pieces = [call for one in choices for call in one.delta.tool_calls or []]
    assert [(one.index, one.function.name) for one in pieces] == [(0, "add"), (1, "add")]
    assert "".join(one.delta.content or "" for one in choices) == "Sure."


def test_with_tools_text_is_streamed_up_to_where_a_call_may_begin(running, says):
    says(f"Let me <see> [it].\n{CALL}\nDone.")
    stream = ask(running.client(), tools=TOOLS, max_tokens=200, stream=True, logprobs=True)
    choices = [part.choices[0] for part in stream]
    pieces = [one.delta.content for one in choices if one.delta.content]
    assert len(pieces) > 5
    whole = ask(running.client(), tools=TOOLS, max_tokens=200).choices[0].message
    assert "".join(pieces) == whole.content
    assert "tool_call" not in whole.content
    assert whole.content.startswith("Let me <see> [it].")
    reported = [one for choice in choices if choice.logprobs for one in choice.logprobs.content]
    assert "".join(one.token for one in reported).startswith("Let me <see>")
    says("No call: <tool_")
    stream = ask(running.client(), tools=TOOLS, max_tokens=200, stream=True)
    assert "".join(part.choices[0].delta.content or "" for part in stream) == "No call: <tool_"


def test_thoughts_are_no_part_of_the_text_beside_a_call(running, monkeypatch):
    marks = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>")
    words = chats.tokenizer(tool_templates.PUBLISHED["hermes"], special=marks)
    speaker = Speaker.of(words, running.engine.model.generation_config)
    monkeypatch.setitem(running.engine.speakers, served.BASE, speaker)
    text = f"<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>Yes.\n{CALL}"
    ids = [*words.encode(text, add_special_tokens=False), words.convert_tokens_to_ids("<|im_end|>")]
    monkeypatch.setattr(batching, "choose", lambda row, how, before: batching.Token(ids[len(before)]))
    message = ask(running.client(), tools=TOOLS, max_tokens=200).choices[0].message
    assert (message.content, message.reasoning_content) == ("Yes.", "hm")
    assert len(message.tool_calls) == 1
    stream = ask(running.client(), tools=TOOLS, max_tokens=200, stream=True)
    deltas = [part.choices[0].delta for part in stream]
    assert "".join(one.content or "" for one in deltas) == "Yes."
    assert "".join(getattr(one, "reasoning_content", None) or "" for one in deltas) == "hm"


def test_a_client_may_want_one_call_at_a_time(running, monkeypatch):
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    monkeypatch.setattr(Speaker, "read_calls", lambda self, ids, tools: ("", [call, call]))
    for single, wanted in ((True, 2), (False, 1)):
        message = (
            ask(running.client(), tools=TOOLS, max_tokens=2, parallel_tool_calls=single).choices[0].message
        )
        assert (len(message.tool_calls), message.content) == (wanted, None)


def test_results_of_calls_go_into_the_prompt_and_without_tools_a_call_is_text(running, says):
    seen = says(CALL)
    client = running.client()
    first = ask(client, tools=TOOLS, max_tokens=200).choices[0].message
    history = [{"role": "user", "content": "hi"}, first.model_dump(exclude_none=True), {
        "role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "the sum is 2"}]  # fmt: skip
    client.chat.completions.create(model=served.BASE, messages=history, tools=TOOLS, max_tokens=5)
    assert CALL in seen[1] and "the sum is 2" in seen[1]
    plain = ask(client, max_tokens=200).choices[0]
    assert (plain.message.content, plain.message.tool_calls) == (CALL, None)
    none = ask(client, max_tokens=200, tools=TOOLS, tool_choice="none").choices[0]
    assert (none.message.tool_calls, none.finish_reason) == (None, "stop")
    assert '"name": "add"' not in seen[-1]
