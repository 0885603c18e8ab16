"""An answer on the terminal as it grows, without the marker that ends it; its token ids are kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def make_stream(tokenizer: Any, end: str, show: bool, first: Callable[[], None] | None = None) -> Any:
    """A streamer that prints an answer as it grows, counts tokens, and leaves out the end-of-turn marker.

    Args:
        first: called when the first token is there, so when the prompt has been read.
    """
    from transformers import TextStreamer

    class Stream(TextStreamer):
        def __init__(self) -> None:
            super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
            self.ids: list[int] = []
            self.text = ""
            self._held = ""  # may be the beginning of the end-of-turn marker
            self._ended = False

        @property
        def tokens(self) -> int:
            return len(self.ids)

        def put(self, value: Any) -> None:
            if not self.next_tokens_are_prompt:
                if first is not None and not self.ids:
                    first()
                self.ids += value.flatten().tolist()
            super().put(value)

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if self._ended:
                return
            text = self._held + text
            self._held = ""
            if end and end in text:
                text, self._ended = text[: text.index(end)], True
            elif end and not stream_end:
                cut = next((n for n in range(min(len(end), len(text)), 0, -1) if text.endswith(end[:n])), 0)
                text, self._held = text[: len(text) - cut], text[len(text) - cut :]
            self.text += text
            if show:
                print(text, end="", flush=True)

        def finish(self) -> None:
            """Print what was held back, also when the answer was stopped, and end the line."""
            if self.token_cache:
                self.end()
            if self._held and not self._ended:
                self.on_finalized_text("", stream_end=True)
            self.text = self.text.strip()
            if show:
                print(flush=True)

    return Stream()
