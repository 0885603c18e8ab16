"""What a conversation in the terminal is made of, wherever the model runs: answer, figures, loop."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from moesmith import console
from moesmith.errors import UserError

if TYPE_CHECKING:
    from moesmith.data.tools import Call, ToolSpec


@dataclass
class Answer:
    """What the model said and what it took. `stopped` says Ctrl-C ended it."""

    text: str
    prompt_tokens: int
    tokens: int
    seconds: float
    peak_bytes: int | None
    """None for a model that runs elsewhere"""
    stopped: bool = False
    calls: list[Call] = field(default_factory=list)
    transfers: dict[str, Any] | None = None
    """what was fetched for it; None where all experts lie on the device"""

    def facts(self) -> dict[str, Any]:
        """The same for a program."""
        return {
            "answer": self.text,
            "prompt_tokens": self.prompt_tokens,
            "tokens": self.tokens,
            "seconds": round(self.seconds, 3),
            "tokens_per_second": round(self.tokens / self.seconds, 2) if self.seconds else None,
            "peak_bytes": self.peak_bytes,
            "stopped": self.stopped,
            "calls": [call.openai()["function"] for call in self.calls],
            **({"transfers": self.transfers} if self.transfers is not None else {}),
        }


class Talker(Protocol):
    """Somebody to talk to."""

    tools: ToolSpec | None

    def reset(self) -> None: ...

    def result(self, text: str) -> None: ...

    def answer(self, text: str) -> Answer: ...

    def experts(self) -> dict[str, Any]:
        """The picture of the last answer, see `moesmith.serve.experts.picture`."""

    def fetched(self) -> dict[str, Any]:
        """Transfers of the last answer, see `moesmith.report.transfers`."""


def say_figures(answer: Answer, tools: ToolSpec | None) -> None:
    """The calls, what is wrong with them, tokens, rate and peak memory; dim, on stderr."""
    from moesmith.eval.failures import problems
    from moesmith.jobs._eval import in_words

    for call in answer.calls:
        wrong = problems([call], tools) if tools is not None else []
        console.note("; ".join([f"call: {in_words(asdict(call))}", *wrong]))
    rate = answer.tokens / answer.seconds if answer.seconds else 0.0
    peak = f" · peak {console.size(answer.peak_bytes)}" if answer.peak_bytes is not None else ""
    moved = (answer.transfers or {}).get("bytes_per_token")
    fetched = f" · {console.size(moved)} of experts per token" if moved is not None else ""
    stopped = " · stopped" if answer.stopped else ""
    console.note(f"{answer.tokens} tokens · {rate:.1f} tok/s{peak}{fetched}{stopped}")


def converse(chat: Talker) -> None:
    """Read, answer, repeat; until /exit, end of input, or Ctrl-C twice at the prompt."""
    typed = sys.stdin.isatty()
    if typed:
        import readline  # noqa: F401  (arrow keys and history in input())

        results = " /result TEXT is what a call returns," if chat.tools is not None else ""
        console.note(
            f"/reset starts over,{results} /experts shows where the last answer went, /transfers what was "
            "fetched for it, /exit leaves, Ctrl-C stops an answer"
        )
    interrupted = False
    while True:
        try:
            line = input("> " if typed else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            if interrupted:
                return
            interrupted = True
            console.note("\nonce more, or /exit, to leave")
            continue
        interrupted = False
        if line in ("/exit", "/quit"):
            return
        try:
            _do(chat, line)
        except UserError as error:
            console.error(error.message, error.hint)


def _do(chat: Talker, line: str) -> None:
    """One line that was typed: a command, or a message."""
    if line == "/reset":
        chat.reset()
        console.note("started over")
    elif line == "/experts":
        from moesmith.jobs._experts_map import show

        show(chat.experts())
    elif line == "/transfers":
        from moesmith.jobs._transfers import say

        say(chat.fetched())
    elif chat.tools is not None and line.startswith("/result "):
        chat.result(line.removeprefix("/result ").strip())
    elif line.startswith("/") and line[1:].isalpha():
        results = ", /result TEXT" if chat.tools is not None else ""
        console.note(f"no such command: {line}; there are /reset{results}, /experts, /transfers and /exit")
    elif line:
        chat.answer(line)
