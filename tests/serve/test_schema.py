"""What clients send: OpenAI's fields are read as they are, everything else is refused by name."""

import json

import pytest

from moesmith.serve.schema import ChatRequest, CompletionRequest, Refused, read

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": "m", "prompt": "hi"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def body(base, **fields):
    return json.dumps(base | fields).encode()


@pytest.mark.parametrize(
    "fields",
    [
        {}, {"temperature": 0}, {"temperature": 1, "top_p": 1}, {"n": 3}, {"seed": -1}, {"stop": "a"},
        {"stop": ["a"] * 16}, {"stop": None}, {"stream": True, "stream_options": {"include_usage": True}},
        {"logprobs": True, "top_logprobs": 20}, {"tools": [TOOL], "tool_choice": "auto"}, {"tools": []},
        {"max_completion_tokens": 5}, {"logit_bias": {"5": -100}}, {"response_format": {"type": "text"}},
        {"user": "me"}, {"top_k": -1, "min_p": 0.1}, {"ignore_eos": True}, {"parallel_tool_calls": False},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]},
        {"messages": [
            {"role": "developer", "content": "be kind"},
            {"role": "assistant", "content": None, "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
            {"role": "tool", "tool_call_id": "1", "content": "2"},
        ]},
    ],
)  # fmt: skip
def test_what_openai_sends_is_taken(fields):
    assert read(ChatRequest, body(CHAT, **fields)).model == "m"


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_the_four_forms_of_a_prompt(prompt, prompts):
    assert read(CompletionRequest, body(TEXT, prompt=prompt)).prompts() == prompts


@pytest.mark.parametrize(
    ("fields", "param", "word"),
    [
        ({"unheard_of": 1}, "unheard_of", "not known"), ({"audio": {}}, "audio", "not known"),
        ({"stream": "yes"}, "stream", "boolean"), ({"temperature": "1"}, "temperature", "number"),
        ({"temperature": -0.1}, "temperature", "greater"), ({"temperature": 2.1}, "temperature", "less"),
        ({"top_p": 0}, "top_p", "greater"), ({"n": 0}, "n", "greater"), ({"n": 9}, "n", "less"),
        ({"n": 1.5}, "n", "integer"), ({"n": True}, "n", "integer"), ({"max_tokens": 0}, None, "at least 1"),
        ({"max_tokens": -1}, "max_tokens", "greater"), ({"stop": ["a"] * 17}, "stop", "16"),
        ({"stop": ""}, "stop", "1 character"), ({"top_logprobs": 2}, None, "needs logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less"),
        ({"stream_options": {"include_usage": True}}, None, "needs stream"),
        ({"tool_choice": "required"}, "tool_choice", "auto"),
        ({"response_format": {"type": "json_object"}}, "response_format.type", "text"),
        ({"messages": []}, "messages", "at least 1"), ({"messages": "hi"}, "messages", "array"),
        ({"messages": [{"role": "god", "content": "hi"}]}, "messages.0.role", "system"),
        ({"messages": [{"role": "user"}]}, "messages.0", "content is missing"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
         "messages.0.content.0.image_url", "not known"),
        ({"seed": 2**63}, "seed", "less"), ({"seed": 1.5}, "seed", "integer"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1", "less"), ({"model": None}, "model", "string"),
        ({"tools": [TOOL | {"strict": 1}]}, "tools.0.strict", "not known"),
    ],
)  # fmt: skip
def test_anything_else_is_refused_by_name(fields, param, word):
    with pytest.raises(Refused) as refused:
        read(ChatRequest, body(CHAT, **fields))
    assert refused.value.status == 400
    assert refused.value.param == param
    assert word in refused.value.message
    assert refused.value.body()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"prompt": []}, "prompt"), ({"prompt": [[]]}, "prompt"), ({"prompt": [-1]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"), ({"prompt": None}, "prompt"), ({"prompt": ["a"] * 65}, "prompt"),
        ({"max_tokens": 0}, "echo"), ({"best_of": 2}, "best_of"), ({"suffix": "x"}, "suffix"),
        ({"stream": True, "echo": True, "logprobs": 1}, "streamed"), ({"logprobs": True}, "logprobs"),
    ],
)  # fmt: skip
def test_completions_that_cannot_be_are_refused(fields, word):
    with pytest.raises(Refused, match=word):
        read(CompletionRequest, body(TEXT, **fields))


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"{", b"[]", b"null", b"1", b'"a"', b"\xff\xfe", b'{"model": "m"}', b"[" * 100_000,
        b'{"model": "m", "messages": ' + b"[" * 5000,
        b'{"model": "m", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"model": "m", "messages": [{"role": "user", "content": "a"}], "temperature": NaN}',
        b'{"model": "m", "messages": [{"role": "user", "content": "a"}], "temperature": 1e999}',
    ],
)  # fmt: skip
def test_bytes_that_are_no_request_are_refused(raw):
    with pytest.raises(Refused) as refused:
        read(ChatRequest, raw)
    assert refused.value.status == 400
