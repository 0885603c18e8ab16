"""Show what is learned: rows as the model sees them, learned tokens coloured, or in « » in plain text."""

from __future__ import annotations

from collections.abc import Iterator

from rich.text import Text
from transformers import PreTrainedTokenizerBase

from .masks import IGNORED, Example

LEARNED_STYLE = "bold green"
CONTEXT_STYLE = "dim"


def runs(example: Example) -> Iterator[tuple[int, int, bool]]:
    """Stretches of tokens that are all learned or all not: (first, one past the last, learned)."""
    learned = example.labels != IGNORED
    start = 0
    for i in range(1, len(learned) + 1):
        if i == len(learned) or learned[i] != learned[start]:
            yield start, i, bool(learned[start])
            start = i


def preview(tokenizer: PreTrainedTokenizerBase, example: Example, colour: bool) -> Text:
    """One row with a headline. `colour` off puts guillemets around the learned tokens instead."""
    ids = example.input_ids.tolist()
    shown = Text(f"row {example.row} · {len(example):,} tokens, {example.learned:,} trained\n", style="bold")
    before = ""
    for _, end, learned in runs(example):
        # Decoding a stretch alone would lose the blank some tokenizers hang on a text's first token.
        upto = tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        text = upto[len(before) :]
        before = upto
        if not colour:
            shown.append(f"«{text}»" if learned else text)
        else:
            shown.append(text, style=LEARNED_STYLE if learned else CONTEXT_STYLE)
    return shown
