"""Whether a tool call may have begun in an answer that is still being written.

A call is known by its end only. `Opening` says how long a growing text is certainly no part of one, so that
it can be shown already. It may be too careful, never too bold: no call that `ToolFormat.parse` finds begins
in what was let through.
"""

from __future__ import annotations

import re

from .tool_bare import BareCalls
from .tool_format import ToolFormat
from .tool_probe import without_thoughts
from .tool_response import ResponseCalls
from .tool_text import Grammar, PythonCalls

# Calls without a mark, which are looked for in every format: JSON that begins a line, or a fenced block.
BARE = re.compile(r"^[ \t]*[\[{]|```(?:json|tool_call|tool_code)?[ \t]*\n\s*[\[{]", re.MULTILINE)
# White space at the end belongs to a call that follows, and begins a line.
UNDECIDED = re.compile(r"(?:\s|`|```[a-z_]*)\Z")
CLOSED = "</think>"


class Opening:
    """Follows one answer: all of its text with special tokens, thoughts included, without the prompt.

    Args:
        marks: what calls begin with; None if there is nothing, so that any text may be one.
    """

    def __init__(self, marks: tuple[str, ...] | None):
        self.marks = marks
        self._text = self._tail = ""
        self._thought = True  # what has come so far may turn out to be thoughts

    @classmethod
    def of(cls, form: ToolFormat) -> Opening:
        """For the answers of a format."""
        return cls(marks_of(form.grammar))

    def put(self, new: str) -> bool:
        """Whether no call can have begun, now that the text goes on with `new`."""
        if self.marks is None:
            return False
        self._text += new
        self._tail += new
        if self._thought and CLOSED in self._text[-len(new) - len(CLOSED) :]:
            self._thought = False
            rest = without_thoughts(self._text)
            if rest != self._text:
                self._tail = rest
        tail = self._tail
        if not tail or UNDECIDED.search(tail) or BARE.search(tail):
            return False
        if any(mark in tail or begun(tail, mark) for mark in self.marks):
            return False
        self._tail = "x"  # nothing begins in what is settled, and it is not the start of a line
        return True


def begun(text: str, mark: str) -> bool:
    """Whether a text ends with the beginning of a mark."""
    return any(text.endswith(mark[:n]) for n in range(min(len(text), len(mark) - 1), 0, -1))


def marks_of(grammar: Grammar) -> tuple[str, ...] | None:
    """What the calls of a grammar, and the marks around them, begin with; None for calls without a mark."""
    if isinstance(grammar, BareCalls):
        return ()
    if isinstance(grammar, ResponseCalls):
        field = grammar.template["fields"]["tool_calls"]
        opens = literal(field["open_pattern"]) if field.get("open_pattern") else field["open"]
    else:
        opens = getattr(grammar, "open", "")
    # Behind the first white space a mark may be of any width.
    first = opens.split()[:1]
    if not first or (isinstance(grammar, PythonCalls) and not grammar.open):
        return None
    around = [mark.split()[0] for mark in getattr(grammar, "around", ()) if mark.strip()]
    return (first[0], *around)


def literal(pattern: str) -> str:
    """The text that everything begins with that a regular expression matches; "" if there is none."""
    found = re.match(r"(?:\\\W|[^\\.^$*+?{}\[\]|()])*", pattern)
    assert found is not None
    rest = pattern[found.end() :]
    if "|" in re.sub(r"\\.|\([^()]*\)", "", pattern):  # one of several: they may begin differently
        return ""
    pieces = re.findall(r"\\\W|.", found[0], re.DOTALL)
    if rest[:1] in ("*", "?", "{", "+"):
        pieces = pieces[:-1]
    return "".join(piece[-1] for piece in pieces)
