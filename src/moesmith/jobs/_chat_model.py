"""A conversation with a model that is loaded here: what it is asked, when it stops, what is kept of it."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from moesmith import console
from moesmith.errors import UserError
from moesmith.jobs._conversation import Answer, say_figures

if TYPE_CHECKING:
    from torch import Tensor

    from moesmith.data.tools import Call, ToolSpec
    from moesmith.jobs._transfers import Transfers


@dataclass
class Chat:
    """A conversation: the model, what was said so far, and how to answer."""

    model: Any
    tokenizer: Any
    generation: dict[str, Any]
    system: str | None = None
    tools: ToolSpec | None = None
    messages: list[dict[str, Any]] = field(default_factory=list)
    waiting: int = 0
    """calls of the last answer that have no result yet"""
    last: tuple[list[int], list[int]] | None = None
    """ids of the last prompt and answer"""
    transfers: Transfers | None = None
    """what is fetched for answers; None where all experts lie on the device"""

    def __post_init__(self) -> None:
        self.reset()
        self.end = end_of_turn(self.tokenizer)

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []
        self.waiting, self.last = 0, None

    def result(self, text: str) -> None:
        """What the next waiting call returns; after the last one the model answers."""
        if self.waiting == 0:
            raise UserError("no call waits for a result")
        if self.waiting == 1:
            self.answer(text, role="tool")
            return
        self.messages.append({"role": "tool", "content": text})
        self.waiting -= 1
        console.note(f"results wanted: {self.waiting} more")

    def answer(self, text: str, show: bool = True, role: str = "user") -> Answer:
        """Say `text` to the model. The answer is streamed to stdout if `show`, and kept with the question."""
        import torch

        from moesmith.jobs._memory import PeakMemory
        from moesmith.jobs._stream import make_stream

        self.messages.append({"role": role, "content": text})
        try:
            ids = self.encode().to(self.model.device)
            room = self.room() - ids.shape[1]
            if room < 1:
                raise UserError(
                    f"{ids.shape[1]} tokens are too long for this model ({self.room()})", "/reset starts over"
                )
        except UserError:
            self.messages.pop()
            raise
        first = self.transfers.first if self.transfers is not None else None
        stream = make_stream(self.tokenizer, self.end, show, first)
        options = self.generation | {"max_new_tokens": min(self.generation["max_new_tokens"], room)}
        stopped = False
        if self.transfers is not None:
            self.transfers.begin()
        started = time.perf_counter()
        with PeakMemory() as peak, torch.inference_mode():
            try:
                self.model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    streamer=stream,
                    eos_token_id=self.stop_ids(),
                    pad_token_id=self.pad_id(),
                    **options,
                )
            except KeyboardInterrupt:
                stopped = True
        seconds = time.perf_counter() - started
        fetched = self.transfers.end() if self.transfers is not None else None
        stream.finish()
        message, calls = self.read(stream)
        self.last = ids[0].tolist(), stream.ids
        self.messages.append(message)
        self.waiting = len(calls)
        answer = Answer(
            stream.text, ids.shape[1], stream.tokens, seconds, peak.nbytes, stopped, calls, transfers=fetched
        )
        if show:
            say_figures(answer, self.tools)
        return answer

    def read(self, stream: Any) -> tuple[dict[str, Any], list[Call]]:
        """The answer as a message of the conversation, and the calls in it."""
        said = {"role": "assistant", "content": stream.text}
        if self.tools is None:
            return said, []
        from moesmith.data.tool_format import ToolFormat

        form = ToolFormat.of(self.tokenizer)
        found = form.parse(form.decode(self.tokenizer, stream.ids), self.tools)
        if found.malformed:
            console.note("a call was begun and cannot be read")
        if found.calls:
            said |= {"content": found.text, "tool_calls": [call.openai() for call in found.calls]}
        return said, found.calls

    def encode(self) -> Tensor:
        """The conversation with the opening of the next answer, as ids (1, tokens)."""
        import jinja2
        import torch

        if self.tools is not None:
            from moesmith.data.tool_format import ToolFormat

            form = ToolFormat.of(self.tokenizer)
            return torch.tensor([form.prompt_ids(self.tokenizer, self.messages, self.tools)])
        if self.tokenizer.chat_template is None:
            text = "\n".join(message["content"] for message in self.messages)
            return self.tokenizer(text, return_tensors="pt")["input_ids"]
        try:
            encoded = self.tokenizer.apply_chat_template(
                self.messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        except jinja2.TemplateError as error:
            raise UserError(
                f"the chat template refuses this conversation: {error}", "is there a --system it cannot take?"
            ) from None
        return encoded["input_ids"]

    def room(self) -> int:
        """Tokens the model can see at once."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize

    def stop_ids(self) -> list[int]:
        """Token ids that end an answer: the model's own and the one its template ends a turn with."""
        own = self.model.generation_config.eos_token_id
        own = own if isinstance(own, list) else [own]
        ends = self.tokenizer.encode(self.end, add_special_tokens=False) if self.end else []
        ids = [*own, self.tokenizer.eos_token_id, *(ends if len(ends) == 1 else [])]
        return sorted({token for token in ids if token is not None})

    def pad_id(self) -> int | None:
        """Padding is never read here; naming one keeps `generate` from guessing aloud."""
        pad = self.tokenizer.pad_token_id
        return pad if pad is not None else next(iter(self.stop_ids()), None)

    def experts(self) -> dict[str, Any]:
        """Which experts the last answer went through: it is read once more."""
        from moesmith.serve.experts import picture

        if self.last is None or not self.last[1]:
            raise UserError("no answer yet, so no experts to show")
        prompt, said = self.last
        return picture(self.model, prompt + said, len(prompt))

    def fetched(self) -> dict[str, Any]:
        """What was fetched for the last answer."""
        if self.transfers is None:
            raise UserError(
                "all experts lie on the device: nothing is fetched", "--experts ram or --experts disk"
            )
        if self.transfers.last is None:
            raise UserError("no answer yet, so nothing was fetched")
        return self.transfers.last


def end_of_turn(tokenizer: Any) -> str:
    """What the chat template puts right after an assistant turn ("<|im_end|>"), "" if nothing."""
    if tokenizer.chat_template is None:
        return ""
    import jinja2

    word = "ANSWER"
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": word}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except jinja2.TemplateError:
        return ""
    return text.rpartition(word)[2].strip()
