"""A model that thinks first: where its reasoning stands, and an end to it after so many tokens.

`FORMS` says how families mark reasoning. A model in memory is held to a budget while it writes: after so many
tokens of reasoning the tokens that end it are put in the model's mouth, and it goes on to the answer. Without
this a hard question may use up the whole context and have no answer. A model that marks no reasoning has
nothing to cut.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moesmith.errors import UserError

from .generating import batches, ending, watched
from .greedy import stop_ids


@dataclass(frozen=True)
class Form:
    """How reasoning begins and ends in a model's text."""

    start: str
    end: str
    close: str
    """what is written for the model when its budget is used up"""


FORMS = (
    Form("<think>", "</think>", "\n</think>\n\n"),  # Qwen 3, DeepSeek R1 and V3.1, GLM, Nemotron, SmolLM3
    Form("<|channel>thought", "<channel|>", "\n<channel|>"),  # Gemma 4
    Form(
        "<|channel|>analysis<|message|>", "<|end|>", "<|end|><|start|>assistant<|channel|>final<|message|>"
    ),  # gpt-oss
    Form("[THINK]", "[/THINK]", "[/THINK]"),  # Magistral, Ministral
    Form("<|START_THINKING|>", "<|END_THINKING|>", "<|END_THINKING|>"),  # Command A, Cohere 2 MoE
    Form("<seed:think>", "</seed:think>", "\n</seed:think>"),  # Seed-OSS
    Form("<mm:think>", "</mm:think>", "\n</mm:think>\n\n"),  # MiniMax M3
    Form("◁think▷", "◁/think▷", "◁/think▷"),  # Kimi
    Form("<thinking>", "</thinking>", "\n</thinking>\n\n"),
    Form("<reasoning>", "</reasoning>", "\n</reasoning>\n\n"),
)
HEADERS = ("<|start|>assistant", "<|channel|>final<|message|>", "<|message|>")  # gpt-oss, before its answer
TAIL = 24  # tokens in which a mark of several tokens is looked for


@dataclass
class Reply:
    """What came back for one question, from a server or from a model in memory."""

    answer: str
    reasoning: str
    finish: str
    """`stop`: it ended by itself; `length`: it was cut; or a server's own word"""
    prompt_tokens: int | None
    tokens: int | None
    """reasoning and answer together"""
    reasoning_tokens: int | None
    budget_hit: bool | None
    """the reasoning was ended because its budget was used up; None where nothing says so"""
    seconds: float
    attempts: int = 1


def form_of(tokenizer: Any) -> Form | None:
    """The form that a chat template writes or reads, else one whose marks are tokens; None for neither."""
    template = tokenizer.chat_template or ""
    for form in FORMS:
        if form.end in template and (
            form.start in template or form.start.removesuffix("thought") in template
        ):
            return form
    words = tokenizer.get_vocab()
    return next((form for form in FORMS if form.start in words and form.end in words), None)


def split(text: str, form: Form, opened: bool = False) -> tuple[str, str]:
    """(reasoning, answer) of a text that begins inside of the reasoning if `opened`.

    Reasoning that was begun and not ended is all reasoning.
    """
    reasoning, rest = "", text
    if not opened:
        before, mark, after = text.partition(form.start)
        if not mark:
            # some servers drop the mark at the beginning and leave the one at the end
            inside, end, answer = text.partition(form.end)
            return (inside.strip(), _clean(answer)) if end and form.end != "<|end|>" else ("", _clean(text))
        if before.strip() and form.end not in after:
            return "", _clean(text)  # a mark in the middle of an answer that never ends is only a word
        rest = after
    inside, mark, answer = rest.partition(form.end)
    reasoning = inside
    while mark and form.start in answer:  # it thinks in several pieces
        before, _, after = answer.partition(form.start)
        inside, mark, rest = after.partition(form.end)
        reasoning, answer = f"{reasoning}\n{inside}", f"{before}{rest}"
    return reasoning.strip(), _clean(answer)


def split_any(text: str) -> tuple[str, str]:
    """(reasoning, answer) by whichever form's marks stand in a text."""
    for form in FORMS:
        if form.end in text and form.end != "<|end|>" or text.lstrip().startswith(form.start):
            return split(text, form)
    return "", text.strip()


def _clean(answer: str) -> str:
    for header in HEADERS:
        answer = answer.replace(header, "")
    return answer.strip()


# ---------------------------------------------------------------- prompts


def prompt_ids(tokenizer: Any, text: str, think: bool) -> list[int]:
    """Token ids of one user turn and the opening of the answer; of the bare text without a chat template.

    Templates that can switch reasoning on or off are told to: `enable_thinking`, or `thinking`.

    Raises:
        UserError: the template refuses.
    """
    import jinja2

    if tokenizer.chat_template is None:
        return list(tokenizer(text)["input_ids"])
    try:
        encoded = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=True,
            enable_thinking=think, thinking=think,
        )  # fmt: skip
    except jinja2.TemplateError as error:
        raise UserError(f"the chat template refuses a question: {error}") from None
    return list(encoded["input_ids"])


def is_open(tokenizer: Any, ids: Sequence[int], form: Form | None) -> bool:
    """Whether a prompt ends inside of the reasoning: templates may write the first mark themselves."""
    if form is None:
        return False
    text = tokenizer.decode(ids[-64:], skip_special_tokens=False)
    start = text.rfind(form.start)
    return start >= 0 and not text[start + len(form.start) :].strip()


# ---------------------------------------------------------------- the budget


class _Mark:
    """Whether a row of token ids has just ended in a mark."""

    def __init__(self, tokenizer: Any, text: str):
        self.tokenizer, self.text = tokenizer, text
        ids = tokenizer.encode(text, add_special_tokens=False)
        self.id = ids[0] if len(ids) == 1 else None

    def ends(self, row: Sequence[int]) -> bool:
        if self.id is not None:
            return bool(row) and row[-1] == self.id
        said = self.tokenizer.decode(row[-TAIL:], skip_special_tokens=False)
        return self.text in said


class Budget:
    """A logits processor that ends each row's reasoning after `limit` tokens of it.

    B rows of prompts of one width; `opened`: rows whose prompt ends inside of the reasoning.
    """

    def __init__(
        self, tokenizer: Any, form: Form, limit: int, width: int, opened: Sequence[bool], stops: Sequence[int]
    ):
        self.limit, self.width, self.stops = limit, width, set(stops)
        self.start, self.end = _Mark(tokenizer, form.start), _Mark(tokenizer, form.end)
        self.close = tokenizer.encode(form.close, add_special_tokens=False)
        self.inside = list(opened)
        self.spent = [0] * len(self.inside)
        """tokens of reasoning of each row, its marks not counted"""
        self.hit = [False] * len(self.inside)
        self.forced: list[list[int]] = [[] for _ in self.inside]
        self.since = [0] * len(self.inside)  # where the part that a mark is looked for in begins
        self.ended = [False] * len(self.inside)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """input_ids (B, width + new), scores (B, V) -> scores; all but the forced token at -inf."""
        written = input_ids[:, self.width :].tolist()
        for row, ids in enumerate(written):
            self._follow(row, ids)
            if self.forced[row]:
                token = self.forced[row].pop(0)
                scores[row] = torch.full_like(scores[row], -torch.inf)
                scores[row, token] = 0.0
        return scores

    def _follow(self, row: int, ids: list[int]) -> None:
        """Take note of the newest token; start to end the reasoning when the budget is used up."""
        if ids and not self.forced[row] and not self.ended[row]:
            if ids[-1] in self.stops:
                self.ended[row] = True
            elif self.inside[row]:
                self.spent[row] += 1
                if self.end.ends(ids[self.since[row] :]):
                    self.inside[row], self.since[row] = False, len(ids)
                    self.spent[row] -= 1
            elif self.start.ends(ids[self.since[row] :]):
                self.inside[row], self.since[row] = True, len(ids)
        if self.inside[row] and not self.ended[row] and self.spent[row] >= self.limit:
            self.hit[row], self.inside[row] = True, False
            self.forced[row] = list(self.close)
            self.since[row] = len(ids) + len(self.close)


# ---------------------------------------------------------------- answers of a model in memory


@torch.inference_mode()
def answer_batches(
    model: Any,
    tokenizer: Any,
    items: Sequence[Any],
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    budget: int | None,
    batch_size: int = 16,
    batch_tokens: int = 16_384,
    done: Mapping[int, Reply] | None = None,
) -> Iterator[dict[int, Reply]]:
    """index -> reply, batch after batch, greedily; prompts of similar length together, longest first.

    Args:
        items: what is asked, with `id` and `row` for messages.
        prompts: token ids per item.
        budget: tokens of reasoning, at most; None for no limit but max_new_tokens.
        done: replies there are already; a batch that has all of its own is not asked again, any other is
            asked whole: rounding may depend on the batch.

    Raises:
        UserError: logits that are not finite.
    """
    done, form = done or {}, form_of(tokenizer)
    was_training = model.training
    model.eval()
    try:
        with ending(model, tokenizer), watched(model) as watch:
            for batch in batches([len(ids) + max_new_tokens for ids in prompts], batch_size, batch_tokens):
                if all(i in done for i in batch):
                    yield {i: done[i] for i in batch}
                    continue
                watch.start(len(batch))
                replies = _answer(model, tokenizer, [prompts[i] for i in batch], max_new_tokens, form, budget)
                watch.check([items[i] for i in batch])
                yield dict(zip(batch, replies, strict=True))
    finally:
        model.train(was_training)


def _answer(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    form: Form | None,
    budget: int | None,
) -> list[Reply]:
    """One batch. As `greedy.continuations`, with the budget among the logits processors."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    width, started = max(map(len, prompts)), time.perf_counter()
    ids = torch.full((len(prompts), width), pad)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, width - len(prompt) :] = torch.tensor(prompt)
        mask[i, width - len(prompt) :] = 1
    stops = stop_ids(model, tokenizer)
    opened = [is_open(tokenizer, prompt, form) for prompt in prompts]
    counter = None
    if form is not None:
        limit = max_new_tokens if budget is None else budget
        counter = Budget(tokenizer, form, limit, width, opened, stops)
        stops = [stop for stop in stops if stop != counter.end.id]  # gpt-oss: <|end|> ends the reasoning only
        counter.stops = set(stops)
    out = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        temperature=None,
        top_p=None,
        top_k=None,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        eos_token_id=stops or None,
        pad_token_id=pad,
        logits_processor=[counter] if counter is not None else None,
    )
    seconds, replies = time.perf_counter() - started, []
    for row, new in enumerate(out[:, width:].tolist()):
        end = next((i for i, token in enumerate(new) if token in stops), None)
        said = new[:end]
        text = tokenizer.decode(said, skip_special_tokens=False)
        reasoning, answer = split(text, form, opened[row]) if form is not None else ("", text.strip())
        for token in tokenizer.all_special_tokens:
            answer = answer.replace(token, " ")
        replies.append(
            Reply(
                answer=answer.strip(),
                reasoning=reasoning,
                finish="length" if end is None else "stop",
                prompt_tokens=len(prompts[row]),
                tokens=len(said),
                reasoning_tokens=counter.spent[row] if counter is not None else 0,
                budget_hit=counter.hit[row] if counter is not None and budget is not None else False,
                seconds=seconds / len(prompts),
            )
        )
    return replies
