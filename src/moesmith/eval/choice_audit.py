"""What the evaluation harness makes of an answer, and which answers a person should look at.

`lm_eval` reads as the filters of lm-eval's gpqa tasks do, misreadings included, for figures that can be laid
beside published ones; its test holds it against the harness itself. `audit` lists why an
answer is hard: two ways to read it disagree, several letters, none.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Sequence

from .choices import Reading, bare_words, begins_with, flexible, strict

INVALID = "[invalid]"  # what the harness writes for no letter


# ---------------------------------------------------------------- as the harness reads


def lm_eval(text: str, choices: Sequence[str]) -> tuple[str, str]:
    """What the strict-match and flexible-extract filters of lm-eval 0.4's gpqa tasks make of an answer.

    Strict takes what follows the first "The answer is " up to the last character but one of the line;
    flexible the last `(X)` anywhere, else the last choice quoted, else the last letter after a colon.

    Returns:
        Both as they came; compare with `same_to_lm_eval`.
    """
    first = re.search(r"(?<=The answer is )(.*)(?=.)", text)
    strictly = first[1].strip() if first else "[invalid]"
    marked = re.findall(r"(\([A-Z]\))", text)
    if marked:
        return strictly, marked[-1]
    bare = {
        _lm_words(choice.strip()): f"({letter})"
        for letter, choice in zip(string.ascii_uppercase, choices, strict=False)
    }
    quoted = re.findall("|".join(sorted(map(re.escape, bare), key=len, reverse=True)), _lm_words(text))
    if quoted and quoted[-1]:
        return strictly, bare.get(quoted[-1].strip(), quoted[-1].strip())
    colon = re.findall(rf":[\s]*([{string.ascii_uppercase[: len(choices)]}])", text)
    return strictly, f"({colon[-1]})" if colon else "[invalid]"


def same_to_lm_eval(answer: str, gold: str | None) -> bool:
    """Whether the harness's exact match, without case and punctuation, takes `answer` for the letter `gold`.

    For None: whether it took none.
    """
    if gold is None:
        return answer == INVALID
    drop = str.maketrans("", "", string.punctuation)
    return answer.lower().translate(drop) == gold.lower()


def _lm_words(text: str) -> str:
    return "".join(c for c in text.lower() if not unicodedata.category(c).startswith("P"))


# ---------------------------------------------------------------- the cases to look at

KINDS = {
    "disagree": "strict and flexible read different letters",
    "no_letter": "letters are mentioned, and none is taken",
    "no_mention": "nothing in it can be read as a choice",
    "several": "several letters are stated, the last one counts",
    "words": "the letter stands beside the words of another choice",
    "harness": "the harness's flexible filter reads another letter",
}


def audit(text: str, choices: Sequence[str]) -> list[str]:
    """Why a person should look at this answer: keys of `KINDS`; an answer that is not there has none."""
    tight, free = strict(text, choices), flexible(text, choices)
    if free.rule == "empty":
        return []
    kinds = []
    if tight.letter is not None and tight.letter != free.letter:
        kinds.append("disagree")
    if free.letter is None:
        kinds.append("no_letter" if free.candidates else "no_mention")
    stated = {
        one.letter for one in free.candidates if one.rule in ("stated", "boxed", "text") and not one.against
    }
    if len(stated) > 1:
        kinds.append("several")
    if free.letter is not None and _other_words(text, free, choices):
        kinds.append("words")
    theirs = lm_eval(text, choices)[1]
    if not same_to_lm_eval(theirs, free.letter):
        kinds.append("harness")
    return kinds


def _other_words(text: str, reading: Reading, choices: Sequence[str]) -> bool:
    """Whether what follows the letter is another choice: `(B) 20 m` where 20 m is choice C."""
    if reading.rule == "text":
        return False
    line = re.sub(r"^[\s)\]}*_`$.,:–—-]+", "", text[reading.end :].split("\n", 1)[0])
    index = begins_with(bare_words(line), choices)
    return index is not None and string.ascii_uppercase[index] != reading.letter
