"""A tokenizer small enough for `tiny`'s vocabulary, its chat template, and conversations to train on."""

from __future__ import annotations

import json
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")


def tokenizer(
    template: str | None = CHATML, special: Iterable[str] = (), merges: Iterable[tuple[str, str]] = ()
) -> Any:
    """One token per printable ASCII character, the special tokens first: below 128 with the default ones."""
    extra = list(special)
    characters = ["\n", *map(chr, range(32, 127))]
    names = [*SPECIAL, *extra, *characters, *(a + b for a, b in merges)]
    bpe = models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=list(merges))
    inner = Tokenizer(bpe)
    inner.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        additional_special_tokens=[*SPECIAL[3:], *extra],
    )  # fmt: skip
    made.chat_template = template
    return made


def trl_template(name: str) -> str:
    """A model's published chat template, as TRL ships it."""
    return files("trl").joinpath("chat_templates", f"{name}.jinja").read_text(encoding="utf-8")


def chat(*turns: str, system: str | None = None) -> list[dict[str, str]]:
    """User and assistant messages in turn."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]
    return [{"role": "system", "content": system}, *messages] if system else messages


def sums(n: int) -> list[dict[str, Any]]:
    """Rows with different prompts: additions."""
    return [{"messages": chat(f"{i}+{i + 1}?", f"{2 * i + 1}.")} for i in range(n)]


def write_jsonl(path: Path, rows: Iterable[Any]) -> Path:
    """Rows as JSONL; a string is written as it is."""
    path.write_text(
        "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8"
    )
    return path
