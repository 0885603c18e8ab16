"""Tokens to text as they come: nothing lost, nothing shown that is taken back, stops and thoughts apart."""

from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import chats
import tool_templates
from moesmith.data.tools import parse_tools
from moesmith.serve.calls import Speaker, Words
from moesmith.serve.thoughts import Markers, Reply

GENERATION = SimpleNamespace(eos_token_id=2, do_sample=False)


@pytest.fixture(scope="module")
def bytes_tokenizer():
    """A token per byte: most characters beyond ASCII come in parts."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


def shown(words: Words, ids: list[int]) -> list[str]:
    return [*(words.put(token) for token in ids), words.finish()]


@pytest.mark.parametrize("text", ["plain", "naïve café", "日本語 🙂 and more", "a\n\n b  c", "🙂"])
def test_the_pieces_add_up_to_the_text(bytes_tokenizer, text):
    ids = bytes_tokenizer.encode(text, add_special_tokens=False)
    pieces = shown(Words(bytes_tokenizer), ids)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_half_a_character_at_the_end_is_shown_as_such(bytes_tokenizer):
    ids = bytes_tokenizer.encode("a🙂", add_special_tokens=False)[:-1]
    assert "".join(shown(Words(bytes_tokenizer), ids)) == "a\ufffd"


@pytest.mark.parametrize(
    ("text", "stops", "left"),
    [
        ("one. two", (".",), "one"),
        ("one END two", ("END",), "one "),
        ("a EN b", ("END",), "a EN b"),
        ("ababac", ("abac",), "ab"),
        ("xyz", ("yz", "y"), "x"),
        ("x EN", ("END",), "x EN"),
        ("STOP", ("STOP",), ""),
    ],
)
def test_a_stop_string_ends_the_text_before_it(text, stops, left):
    words = Words(chats.tokenizer(), stops)
    pieces = []
    for token in chats.tokenizer().encode(text, add_special_tokens=False):
        pieces.append(words.put(token))
        if words.stopped:
            break
    pieces.append(words.finish())
    assert "".join(pieces) == words.text == left
    assert words.stopped == any(stop in text for stop in stops)


def test_what_was_shown_never_turns_out_to_be_part_of_a_stop():
    words, tokenizer = Words(chats.tokenizer(), ("<END>",)), chats.tokenizer()
    so_far = ""
    for token in tokenizer.encode("a <EN b <END> c", add_special_tokens=False):
        so_far += words.put(token)
        if words.stopped:
            break
    assert so_far == "a <EN b "


# ---------------------------------------------------------------- thoughts


def split(tokenizer, text: str, prompt: str = "", stops: tuple[str, ...] = ()) -> tuple[str, str]:
    markers = Markers.of(tokenizer)
    thinking = markers.left_open(tokenizer.encode(prompt, add_special_tokens=False))
    reply = Reply(tokenizer, markers, stops, thinking)
    said = []
    for token in tokenizer.encode(text, add_special_tokens=False):
        said.append(reply.put(token))
        if reply.stopped:
            break
    else:
        said.append(reply.finish())
    return "".join(text for text, _ in said), "".join(thought for _, thought in said)


THINK = ("<think>", "</think>")
HARMONY = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>")


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize(
    ("text", "prompt", "wanted"),
    [
        ("<think>\nhm\n</think>\n\nyes", "", ("yes", "hm\n")),
        ("hm\n</think>\n\nyes", "a<think>\n", ("yes", "hm\n")),
        ("hm", "a<think>", ("", "hm")),
        ("yes", "<think></think>\n", ("yes", "")),
        ("no thoughts", "", ("no thoughts", "")),
        ("\n keeps", "", ("\n keeps", "")),
    ],
)
def test_thoughts_are_told_from_what_is_said(special, text, prompt, wanted):
    tokenizer = chats.tokenizer(special=THINK)
    if not special:
        tokenizer = chats.tokenizer()
        tokenizer.add_tokens(list(THINK), special_tokens=False)
    assert split(tokenizer, text, prompt) == wanted


def test_a_stop_string_in_the_thoughts_does_not_end_the_answer():
    tokenizer = chats.tokenizer(special=THINK)
    assert split(tokenizer, "<think>a. b</think>c. d", stops=(".",)) == ("c", "a. b")


def test_channels_of_the_harmony_format():
    tokenizer = chats.tokenizer(special=HARMONY)
    text = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>yes"
    assert split(tokenizer, text) == ("yes", "hm")


def test_a_thought_loses_the_heading_of_its_channel():
    tokenizer = chats.tokenizer(special=("<|channel>", "<channel|>"))
    assert split(tokenizer, "<|channel>thought\nhm<channel|>yes") == ("yes", "hm")


def test_a_tokenizer_without_markers_leaves_the_words_alone():
    assert split(chats.tokenizer(), "<think>a</think>b") == ("<think>a</think>b", "")


# ---------------------------------------------------------------- tools and ends

TOOLS = parse_tools([{"name": "add", "parameters": {"properties": {"a": {"type": "integer"}}}}])


def test_a_call_is_read_and_the_text_beside_it_kept():
    tokenizer = chats.tokenizer(tool_templates.PUBLISHED["hermes"])
    speaker = Speaker.of(tokenizer, GENERATION)
    ids = tokenizer.encode(
        'Sure.\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>',
        add_special_tokens=False,
    )
    text, calls = speaker.read_calls(ids, TOOLS)
    assert text == "Sure."
    assert [(call["function"]["name"], call["function"]["arguments"]) for call in calls] == [
        ("add", '{"a": 1}')
    ]


def test_the_token_that_ends_a_turn_ends_an_answer():
    tokenizer = chats.tokenizer()
    speaker = Speaker.of(tokenizer, GENERATION)
    assert {2, tokenizer.convert_tokens_to_ids("<|im_end|>")} <= speaker.stop_ids
    assert speaker.ends == ()


def test_an_end_of_several_tokens_is_a_stop_string():
    template = chats.CHATML.replace("<|im_end|>", "%%%")
    assert Speaker.of(chats.tokenizer(template), GENERATION).ends == ("%%%",)


def test_the_models_own_sampling_is_the_default():
    sampled = SimpleNamespace(eos_token_id=2, do_sample=True, temperature=0.6, top_p=0.9, top_k=None)
    assert Speaker.of(chats.tokenizer(), sampled).defaults == {"temperature": 0.6, "top_p": 0.9}
    assert Speaker.of(chats.tokenizer(), GENERATION).defaults == {"temperature": 0.0}
