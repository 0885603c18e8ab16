"""Reasoning is told from the answer in every form, and ends when its budget is used up."""

from types import SimpleNamespace

import pytest
import torch

from chats import CHATML, tokenizer
from moesmith.eval import reasoning
from moesmith.eval.greedy import continuations
from moesmith.eval.reasoning import (
    FORMS,
    Budget,
    answer_batches,
    form_of,
    is_open,
    prompt_ids,
    split,
    split_any,
)

THINK = FORMS[0]
MARKS = ["<think>", "</think>"]
OPENS = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.start)
def test_every_form_is_split(form):
    text = f"{form.start}why\nnot{form.end}\nThe answer is (B)."
    assert split(text, form) == ("why\nnot", "The answer is (B).")
    assert split_any(text) == ("why\nnot", "The answer is (B).")
    assert split(f"why{form.end}B", form, opened=True) == ("why", "B")
    assert split(f"{form.start}on and on", form) == ("on and on", ""), "it never came to an answer"
    assert split("on and on", form, opened=True) == ("on and on", "")
    assert split("B", form) == ("", "B") and split_any("B") == ("", "B")
    closed = f"{form.start}why{form.close}B"
    assert split(closed, form) == ("why", "B"), "what ends it by force ends it"


def test_a_mark_that_is_only_mentioned_ends_nothing():
    assert split("I would write <think> here. B", THINK) == ("", "I would write <think> here. B")


def test_the_answer_of_gpt_oss_is_its_final_channel():
    text = "<|channel|>analysis<|message|>why<|end|><|start|>assistant<|channel|>final<|message|>B"
    assert split(text, FORMS[2]) == ("why", "B")


def test_thinking_in_pieces_is_all_thinking():
    assert split("<think>a</think>b<think>c</think>d", THINK) == ("a\nc", "bd")


@pytest.mark.parametrize(
    ("name", "start"),
    [("qwen3", "<think>"), ("gemma4", "<|channel>thought"), ("gptoss", "<|channel|>analysis<|message|>"),
     ("deepseekv3", "<think>"), ("glm4moe", "<think>"), ("qwen2_5", None), ("llama3", None),
     ("gemma3", None)],
)  # fmt: skip
def test_the_form_of_published_templates(name: str, start: str | None):
    from chats import trl_template

    found = form_of(tokenizer(template=trl_template(name)))
    assert (found.start if found else None) == start


def test_the_form_of_a_tokenizer_is_in_its_vocabulary():
    assert form_of(tokenizer()) is None
    assert form_of(tokenizer(special=MARKS)) is THINK


def test_templates_are_told_to_think_or_not():
    switch = (
        CHATML + "{% if add_generation_prompt and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    )
    made = tokenizer(template=switch, special=MARKS)
    off, on = (made.decode(prompt_ids(made, "q", think)) for think in (False, True))
    assert off.endswith("</think>\n\n") and "</think>" not in on
    assert not is_open(made, prompt_ids(made, "q", False), THINK), "opened and closed"
    opens = tokenizer(template=OPENS, special=MARKS)
    assert is_open(opens, prompt_ids(opens, "q", True), THINK)


# ---------------------------------------------------------------- the budget


def steps(budget: Budget, wanted: list[int], count: int, vocabulary: int = 128) -> list[int]:
    """What a row writes that would write `wanted`, then 70 for ever, with the budget in the way."""
    ids: list[int] = []
    for i in range(count):
        scores = torch.zeros(1, vocabulary)
        scores[0, wanted[i] if i < len(wanted) else 70] = 1.0
        row = torch.tensor([[9, 9, 9, *ids]])
        ids.append(int(budget(row, scores).argmax()))
    return ids


@pytest.mark.parametrize("limit", [0, 1, 5])
def test_reasoning_ends_after_exactly_its_budget(limit: int):
    made = tokenizer(special=MARKS)
    start, close = made.convert_tokens_to_ids("<think>"), made.encode(THINK.close, add_special_tokens=False)
    budget = Budget(made, THINK, limit, 3, [False], [2])
    written = steps(budget, [start], 20)
    assert written == [start, *[70] * limit, *close, *[70] * (19 - limit - len(close))]
    assert (budget.spent, budget.hit) == ([limit], [True])


def test_reasoning_that_ends_by_itself_is_left_alone():
    made = tokenizer(special=MARKS)
    start, end = made.convert_tokens_to_ids(MARKS)
    budget = Budget(made, THINK, 5, 3, [False], [2])
    assert steps(budget, [start, 60, 61, end, 62], 12) == [start, 60, 61, end, 62, *[70] * 7]
    assert (budget.spent, budget.hit) == ([2], [False])


def test_a_prompt_that_opens_the_reasoning_counts_from_its_first_token():
    made = tokenizer(special=MARKS)
    budget = Budget(made, THINK, 3, 3, [True], [2])
    assert steps(budget, [], 4)[:4] == [70, 70, 70, made.encode("\n", add_special_tokens=False)[0]]


def test_what_follows_the_end_of_an_answer_is_no_reasoning():
    """Rows that have ended are padded while others go on."""
    made = tokenizer(special=MARKS)
    budget = Budget(made, THINK, 3, 3, [True], [2])
    assert steps(budget, [60, 2], 12) == [60, 2, *[70] * 10]
    assert (budget.spent, budget.hit) == ([1], [False])


def test_marks_of_several_tokens_are_seen():
    made = tokenizer()  # no such token: "<think>" is seven characters
    spelled = made.encode("<think>", add_special_tokens=False)
    assert len(spelled) == 7
    budget = Budget(made, THINK, 2, 3, [False], [2])
    written = steps(budget, spelled, 24)
    text = made.decode(written)
    assert text.startswith("<think>" + made.decode([70, 70]) + THINK.close)
    assert budget.hit == [True]


# ---------------------------------------------------------------- a model in memory


@pytest.fixture(scope="module")
def model(checkpoint):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(checkpoint("olmoe")).eval()


ITEMS = [SimpleNamespace(id=str(i), row=i) for i in range(3)]


def ask(model, made, texts, **options):
    prompts = [prompt_ids(made, text, True) for text in texts]
    items = ITEMS[: len(texts)]
    found = {}
    for batch in answer_batches(
        model, made, items, prompts, **{"max_new_tokens": 24, "budget": None, **options}
    ):
        found |= batch
    return [found[i] for i in range(len(texts))]


def test_a_model_is_held_to_its_budget_and_goes_on_to_an_answer(model):
    made = tokenizer(template=OPENS, special=MARKS)
    free, *_ = ask(model, made, ["why?"])
    assert free.answer == "" and free.finish == "length", "it thinks to the very end"
    held, *_ = ask(model, made, ["why?"], budget=6)
    assert (held.reasoning_tokens, held.budget_hit) == (6, True)
    assert free.reasoning.startswith(held.reasoning) and held.answer
    assert held.tokens == free.tokens == 24


def test_without_reasoning_it_is_plain_greedy_decoding(model):
    made = tokenizer()
    texts = ["why?", "a longer question", "x"]
    replies = ask(model, made, texts, batch_size=3)
    prompts = [prompt_ids(made, text, True) for text in texts]
    for reply, (ids, ended) in zip(replies, continuations(model, made, prompts, 24), strict=True):
        assert reply.tokens == len(ids) and (reply.finish == "stop") == ended
        text = made.decode(ids, skip_special_tokens=False)
        for token in made.all_special_tokens:
            text = text.replace(token, " ")
        assert reply.answer == text.strip()


def test_a_batch_that_is_there_is_not_asked_again(model, monkeypatch):
    made = tokenizer()
    replies = ask(model, made, ["why?", "x"], batch_size=1)
    monkeypatch.setattr(reasoning, "_answer", lambda *_: pytest.fail("asked again"))
    assert ask(model, made, ["why?", "x"], batch_size=1, done=dict(enumerate(replies))) == replies
