"""Which choice an answer in words settles on: a letter, or none, and the rule that says so.

`strict` wants the answer stated in one of a few set forms and nothing said against it. `flexible` reads as a
person does: the last plain statement, else what is called correct, else the one letter that is mentioned.
Letters that are ruled out, asked about, supposed or taken back are no answers, and two letters that stand
beside each other are not one. A letter is never guessed: where no rule holds there is none.

Only what follows the reasoning is read here; `reasoning.py` splits. `choice_audit.py` reads as the evaluation
harness does, and says which answers a person should look at.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field

# Every reading ends in one of these.
RULES = {
    "bare": "the whole answer is a letter",
    "boxed": "a letter in \\boxed{}",
    "stated": "the answer is said to be this letter",
    "text": "the answer is said to be this choice, in its words",
    "line": "a line of its own holds nothing but the letter",
    "correct": "this letter, and no other, is called correct or chosen",
    "only": "no other letter is mentioned",
    "empty": "there is no answer",
    "none": "no letter and no choice is mentioned",
    "several": "several letters are mentioned, and none is chosen",
    "both": "two letters are given as the answer",
    "changed": "one letter is stated, then another",
    "taken_back": "the letter is taken back, and no other follows",
    "form": "the answer is not in a set form",
}
FOUND = ("bare", "boxed", "stated", "text", "line", "correct", "only")
FAR = 240  # characters before a statement in which something may be said against it
LINE = 300  # characters of a line that are compared with the choices
AROUND = 90  # characters of an excerpt on each side


@dataclass(frozen=True)
class Candidate:
    """One place that says or mentions a letter."""

    letter: str
    rule: str
    start: int
    end: int
    against: str = ""
    """why it does not count: `denied`, `asked`, `supposed`, `both`"""


@dataclass
class Reading:
    """What was decided, and what it was decided on."""

    letter: str | None
    rule: str
    """a key of `RULES`"""
    start: int = 0
    end: int = 0
    """where in the text the decision stands"""
    candidates: list[Candidate] = field(default_factory=list)
    """every statement and mention, in the order of the text"""

    @property
    def why(self) -> str:
        """The rule in words."""
        return RULES[self.rule]

    def excerpt(self, text: str, around: int = AROUND) -> str:
        """The text around the decision, or the end of the text where nothing was decided, on one line."""
        start, end = (self.start, self.end) if self.end else (len(text), len(text))
        left, right = max(0, start - around), min(len(text), end + around)
        return ("… " if left else "") + " ".join(text[left:right].split()) + (" …" * (right < len(text)))


# ---------------------------------------------------------------- the patterns


def _compile(pattern: str, flags: int = 0) -> re.Pattern[str]:
    """A blank stands for white space, ~ for white space or none; never more than 6: no search gets slow."""
    return re.compile(pattern.replace(" ", r"\s{1,6}").replace("~", r"\s{0,6}"), flags)


_WRAP = r"\\(?:text\w*|math\w+|bf|rm|boxed|fbox|mbox|displaystyle)\b"
_OPEN = rf"(?:[*_`$\"'“‘«「(\[{{<]|{_WRAP}|\\[(\[]|(?<=[\\({{$\[])\s){{0,12}}"
_CLOSE = r"(?:[*_`$\"'”’»」)\]}>]|\\[)\]]){0,12}"
# After a letter no word may go on: not "C6", "D-glucose", "A/B", "B's", "A_1", "C=O".
_END = r"(?![^\W_]|°|_[^\W_]|_[{\\])(?![-–=/+^'’][\w(])"
# "A proton" is no letter; "A because", "A and", "A is" are.
_ARTICLE = (
    r"(?!(?<=[Aa]) (?!(?:because|since|as|due|with|and|or|which|that|for|from|is|was|but|based|given|by|"
    r"on|in|not|rather|instead|seems|looks|would|has|the|are|nor|only|if|when|so|here|it|this)\b)[a-z])"
)


def _letter(letters: str, name: str = "l") -> str:
    """A letter with whatever is put around it: `(B)`, `**B**`, `\\boxed{\\text{B}}`, `B`."""
    low = letters.lower()
    bare = rf"[{letters}](?=[\s*_`$\"'”’»」)\]}}><.,;:!?)。、—]|\\[)\]]|$)"
    # A small letter counts in brackets, or where the sentence ends behind it: `a` is a word.
    small = rf"(?<=[(\[{{*])[{low}](?=[)\]}}*])|[{low}](?=~(?:[.,;:!)]|\n|$))"
    return rf"{_OPEN}(?P<{name}>(?:{bare})|(?:{small})){_END}{_ARTICLE}{_CLOSE}"


_FILL = (
    r"(?:(?:therefore|thus|hence|indeed|clearly|definitely|probably|likely|most|simply|just|then|also|so|"
    r"option|choice|answer|letter|number|the|given|by|be|to|going|with|as|follows|correct|one|labell?ed|"
    r"indicated|is)\b[\s,:]*|[:=→⇒>*_$\-–—#]~){0,6}"
)
_NOUN = r"(?:answer|choice|option|solution|selection|response|pick|conclusion)"
_IS = (
    r"(?:~(?:is|was|should be|must be|has to be|will be|would be|remains|becomes|=|:|→|⇒)"
    r"|\n|\s[-–—])"
)


class _Patterns:
    """The expressions for one set of letters; they are written for `_compile`."""

    def __init__(self, letters: str):
        one = _letter(letters)
        self.letter = _compile(one)
        self.bare = _compile(
            rf"~(?:(?:final |the |correct )*(?:answer|option|choice)~(?:is)?~[:\-]?~)?"
            rf"{one}[\s.!]*\Z", re.I | re.S,
        )  # fmt: skip
        self.boxed = _compile(r"\\(?:boxed|fbox)~\{(?:[^{}]|\{[^{}]*\})*\}")
        self.strict = _compile(
            rf"(?i:<answer>~|\bthe (?:final |correct |best |right )*(?:answer|choice|option) is"
            rf"~:?~|\b(?:final )?answer[*_]*~:~){_OPEN}(?i:(?:option|choice) )?{one}"
        )
        self.stated = _compile(
            rf"(?:(?i:<answer>~|\b{_NOUN}\b[*_]*[^.\n!?;]{{0,40}}?{_IS}[*_]*~{_FILL}"
            rf"|\b{_NOUN}[*_]*~:~[*_]*~{_FILL}"
            rf"|\b(?:I(?:'ll|’ll|'d|’d| will| would)?|we(?:'ll)?|let(?:'s|’s| us| me)) "
            rf"(?:would |will |must |therefore |now )*"
            rf"(?:choose|pick|select|go with|go for|settle on|opt for|answer|say|guess|"
            rf"think|believe|conclude) (?:(?:that|it|it's|it’s|must|is|be|the) )*{_FILL}"
            rf"|\b(?:choose|pick|select|answering|choosing|selecting) {_FILL}"
            rf"|\b(?:so|therefore|thus|hence|consequently)\b,?~"
            rf"(?:it (?:is|must be) |it's |it’s )?(?:(?:option|choice|answer) )?"
            rf"|\bit(?:'s|’s| is| must be| has to be) (?:(?:option|choice|therefore|clearly) )*"
            rf")){one}(?P<tail>~\(?(?:,|/|or|and|&)~(?:(?:option|choice|possibly|maybe|perhaps) )?"
            rf"{_letter(letters, 'other')}"
            rf"|~{_letter(letters, 'next')}(?=[\s.]*(?:\Z|\n|[(*]*[{letters}][)*\s])))?"  # a list of letters
        )
        self.correct = _compile(
            rf"(?i:\b(?:option|choice|answer|only|statement) )*{one}"
            rf"(?:(?!\b(?:but|while|and|whereas)\b|\([A-Z]\))[^.\n!?;]){{0,50}}? "
            rf"(?:is|are|seems|appears|looks|must be|has to be|remains) "
            rf"(?:(?:the|clearly|indeed|therefore|thus|most|likely|probably|definitely|to be|my|our|best|"
            rf"only|one) )*"
            rf"(?:correct|right|answer|best|true|choice|option|match|left|consistent|closest|solution|possible|"
            rf"one)\b"
            rf"|\b(?:corresponds?(?: exactly| closely)? to|match(?:es|ing)?|agrees with|points to|"
            rf"closest to|consistent with|equivalent to|leaves(?: us with)?|which is|i\.e\.,?)~"
            rf"{_FILL}{_letter(letters, 'm')}"
            rf"|\b{_OPEN}{one.replace('(?P<l>', '(?P<n>')} (?:it is|works|fits|it must be)\b"
            rf"|{one.replace('(?P<l>', '(?P<v>')}~[|:–-]?~(?:correct\b|✓|✔|✅)"  # a list or table of verdicts
        )
        self.line = _compile(
            rf"^[\x20\t>#\-]*(?:(?:option|choice) )?{one}[\x20\t.!]*$", re.M | re.I
        )  # nothing beside it
        self.mention = _compile(rf"(?<![\w\\^_/]){one}")
        self.head = _compile(rf"\A~{one}[\s,.]*(?:because|since|as|due to)\b")
        self.beside = _compile(rf"~(?:,|/|or|and|&)~{one}")


_CACHE: dict[str, _Patterns] = {}
_DENIED = re.compile(
    r"(?:\bnot|n['’]t|\b(?:never|cannot|neither|nor|no|rule[sd]?\s+out|ruling\s+out|eliminat\w+|exclud\w+|reject\w*|"
    r"dismiss\w*|discard\w*|instead\s+of|rather\s+than|other\s+than|except|unlike|against)"
    r"|\b(?:incorrect|wrong|false)\s+(?:answer|choice|option)\s+is)\s*(?:\w+\s+){0,2}(?:[^\w,;]|_)*$", re.I,
)  # fmt: skip
_DENIAL = re.compile(
    r"^[\W_]*(?:[^.\n!?;,]{0,60}?)\b(?:is|are|was|seems|can|could|would|does|do|must|has|being|=|:|looks|appears)?"
    r"\s*(?:also\s+|clearly\s+|just\s+|simply\s+|therefore\s+|definitely\s+)*"
    r"(?:not\b|n't\b|n’t\b|cannot\b|isn['’]t\b|doesn['’]t\b|can['’]t\b|wrong\b|incorrect\b|false\b|"
    r"ruled\s+out|out\b|excluded\b|eliminated\b|impossible\b|invalid\b|unlikely\b|too\s+\w+|fails\b)", re.I,
)  # fmt: skip
_SUPPOSED = re.compile(
    r"\b(?:if|suppose|supposing|assume|assuming|whether|unless|consider)\s+(?:\w+\s+){0,2}[\W_]*$", re.I
)
_MAYBE = re.compile(r"\b(?:could|might|may)\b", re.I)
_TAKEN_BACK = re.compile(
    r"(?:,\s*(?:no,|I\s+mean\b|sorry\b|or\s+rather\b)"
    r"|(?:^|[.!?…\n)*\"]|\.\.\.|—|-)\s*(?:but\s+|oh,?\s+)?"
    r"(?:wait|hold\s+on|hmm+|actually,?\s+no|no,?\s+(?:wait|that|this|it)|scratch\s+that|on\s+second\s+thought|"
    r"I\s+made\s+(?:a|an)\s+(?:mistake|error)|that(?:'s|’s|\s+is)\s+(?:wrong|not\s+right|incorrect)|"
    r"let\s+me\s+(?:reconsider|rethink|start\s+over|try\s+again))\b)", re.I,
)  # fmt: skip
_LOOSE = re.compile(r"(?:so|therefore|thus|hence|consequently|it)\b", re.I)  # other letters follow too
_CHOSEN = re.compile(r"\b(?:choos|pick|select)\w*\s", re.I)
_PURPOSE = re.compile(
    rf"\s+(?:from|such|as\s+(?:the|an?|our)\s+(?!(?:\w+\s+)?(?:{_NOUN}|one|best|correct)\b))", re.I
)
_NAMED = re.compile(  # "P(A)", "figure (A)": no choice
    r"(?:\b[a-z]|\bPr)\(\Z|\b(?:figure|fig\.|panel|table|equation|eq\.|step|case|part)\s+\(?\Z", re.I
)
_CLAUSE_ENDS = re.compile(
    r"[*_`$\"'”’)\]}]*\s*(?:[.,;:!]|\n|\Z|(?:because|since|as|with|and\s+not|not|rather)\b"
    r"|(?:is|must\s+be)\s+(?:the\s+)?(?:correct|right|best|answer|only))", re.I,
)  # fmt: skip
_POINTED = re.compile(
    r"(?:\b(?:option|choice|answer|letter|pick|choose|select)\s+|:\s*|(?:^|\n)[\s>#*\-]*)\Z", re.I
)
_FORMULA = re.compile(r"\s*[=<>≈≤≥+]")  # "A = 6": a quantity
_KEPT = re.compile(
    r"\b(?:yes|indeed|confirm(?:s|ed)?|consistent|(?:still|stands|holds|same\s+answer)|checks?\s+out|"
    r"that(?:'s|’s|\s+is)\s+(?:right|correct))\b", re.I,
)  # fmt: skip


def _patterns(letters: str) -> _Patterns:
    if letters not in _CACHE:
        _CACHE[letters] = _Patterns(letters)
    return _CACHE[letters]


def plain(text: str) -> str:
    """Wide, circled and styled letters as ordinary ones, character by character, so that places stay."""
    if text.isascii():
        return text
    made = (unicodedata.normalize("NFKC", character) for character in text)
    return "".join(one if len(one) == 1 else old for one, old in zip(made, text, strict=True))


# ---------------------------------------------------------------- reading


def flexible(text: str, choices: Sequence[str]) -> Reading:
    """The letter that an answer settles on, read as a person would.

    Args:
        text: what follows the reasoning.
        choices: the words of choice A, B, ...; at least two.
    """
    letters = string.ascii_uppercase[: len(choices)]
    text = plain(text)
    if not text.strip():
        return Reading(None, "empty")
    pattern = _patterns(letters)
    mentions = _mentions(text, pattern)
    whole = pattern.bare.match(text)
    if whole:
        return Reading(whole["l"].upper(), "bare", whole.start("l"), whole.end("l"), mentions)
    said = _statements(text, pattern, choices)
    everything = sorted([*mentions, *said], key=lambda one: one.start)
    counted = [one for one in said if not one.against]
    last = max(counted, key=lambda one: (one.end, -one.start), default=None)
    both = [one for one in said if one.against == "both"]
    if both and (last is None or both[-1].end > last.end):
        return Reading(None, "both", both[-1].start, both[-1].end, everything)
    if last is not None:
        rest = text[last.end :]
        back = _TAKEN_BACK.search(rest)
        if back and not _KEPT.search(rest, back.end()):
            called = _called(text, pattern, last.end + back.end())
            if len({one.letter for one in called}) == 1:
                return _decided(called[-1], everything)
            return Reading(None, "taken_back", last.start, last.end, everything)
        return _decided(last, everything)
    lines = [Candidate(m["l"].upper(), "line", m.start("l"), m.end("l")) for m in pattern.line.finditer(text)]
    if len({one.letter for one in lines}) == 1:
        return _decided(lines[-1], everything)
    called = _called(text, pattern)
    everything = sorted([*everything, *called], key=lambda one: one.start)
    if called:
        # What was called correct before a second thought is past.
        back = _TAKEN_BACK.search(text, called[0].end)
        later = [one for one in called if back and one.start > back.start()] or called
        if len({one.letter for one in later}) == 1:
            return _decided(later[-1], everything)
        return Reading(None, "several", called[-1].start, called[-1].end, everything)
    worded = _worded(text, choices, letters)
    if worded is not None:
        return _decided(worded, everything)
    free = [one for one in mentions if not one.against]
    if len({one.letter for one in everything}) == 1 and free and not any(one.against for one in everything):
        beside = pattern.beside.match(text, free[-1].end)
        if beside and beside["l"].upper() != free[-1].letter:
            return Reading(None, "both", free[-1].start, beside.end("l"), everything)
        return Reading(free[-1].letter, "only", free[-1].start, free[-1].end, everything)
    if mentions:
        return Reading(None, "several", mentions[-1].start, mentions[-1].end, everything)
    return Reading(None, "none", candidates=everything)


def strict(text: str, choices: Sequence[str]) -> Reading:
    """The letter of an answer in a set form: a bare letter, `The answer is (B)`, `Answer: B`, `\\boxed{B}`.

    Everything stated in the text has to be the same letter, and `flexible` has to agree.
    """
    letters = string.ascii_uppercase[: len(choices)]
    text = plain(text)
    if not text.strip():
        return Reading(None, "empty")
    pattern = _patterns(letters)
    whole = pattern.bare.match(text)
    if whole:
        return Reading(whole["l"].upper(), "bare", whole.start("l"), whole.end("l"))
    set_forms = [
        Candidate(m["l"].upper(), "stated", m.start(), m.end("l"))
        for m in pattern.strict.finditer(text)
        if not _against(text, m.start("l"), m.end("l"), m.start())
    ]
    set_forms += _boxed(text, pattern)
    if not set_forms:
        return Reading(None, "form")
    last = max(set_forms, key=lambda one: one.end)
    free = flexible(text, choices)
    others = [one for one in free.candidates if one.rule in ("stated", "boxed", "text") and not one.against]
    if {one.letter for one in [*set_forms, *others]} != {last.letter}:
        return Reading(None, "changed", last.start, last.end, free.candidates)
    if free.letter != last.letter:
        return Reading(None, free.rule, free.start, free.end, free.candidates)
    return Reading(last.letter, last.rule, last.start, last.end, free.candidates)


def _decided(one: Candidate, candidates: list[Candidate]) -> Reading:
    return Reading(one.letter, one.rule, one.start, one.end, candidates)


def _boxed(text: str, pattern: _Patterns) -> list[Candidate]:
    """Boxes that hold one letter, perhaps with the choice behind it."""
    found = []
    for match in pattern.boxed.finditer(text):
        inner = list(pattern.mention.finditer(match.group(), match.group().index("{") + 1))
        if (
            len({one["l"].upper() for one in inner}) == 1
            and inner[0].start() <= match.group().index("{") + 12
        ):
            found.append(Candidate(inner[0]["l"].upper(), "boxed", match.start(), match.end()))
    return found


def _statements(text: str, pattern: _Patterns, choices: Sequence[str]) -> list[Candidate]:
    """Every place that says what the answer is, those that do not count with the reason."""
    found = _boxed(text, pattern)
    head = pattern.head.match(text)
    if head and not _against(text, head.start("l"), head.end("l"), head.start()):
        found.append(Candidate(head["l"].upper(), "stated", head.start("l"), head.end("l")))
    for match in pattern.stated.finditer(text):
        start, end = match.start(), match.end("l")
        if _LOOSE.match(match.group()) and not _set_apart(text, match.start("l"), end):
            continue  # "so, B grows": the letter is a name
        if _CHOSEN.search(match.group()) and _PURPOSE.match(text, match.end()):
            continue  # "we choose C as the origin"
        against = _against(text, match.start("l"), end, start)
        other = (match["other"] or match["next"] or match["l"]).upper()
        if other != match["l"].upper() and not against:
            against = "" if _DENIAL.match(text[match.end() : match.end() + 80]) else "both"
        found.append(Candidate(match["l"].upper(), "stated", start, match.end("l"), against))
    found += _named(text, pattern, choices)
    return sorted(found, key=lambda one: one.start)


def _called(text: str, pattern: _Patterns, start: int = 0) -> list[Candidate]:
    """Letters that are called correct, or that what was found is said to match."""
    found = []
    for match in pattern.correct.finditer(text, start):
        name = next(name for name in "lmnv" if match[name])
        place = match.start(name), match.end(name)
        if not _against(text, *place, match.start(), whole=match.group()):
            found.append(Candidate(match[name].upper(), "correct", *place))
    return found


def _mentions(text: str, pattern: _Patterns) -> list[Candidate]:
    """Every letter that stands for a choice: in brackets, at the head of a line, behind `option`."""
    found = []
    for match in pattern.mention.finditer(text):
        start, end = match.start("l"), match.end("l")
        pointed = _POINTED.search(text[max(0, start - 24) : start]) and not _FORMULA.match(text, end)
        if match.group() == match["l"] and (not pointed or _PURPOSE.match(text, end)):
            continue  # "A" and "I" are words, and compounds, fields and vitamins have letters
        if _NAMED.search(text, max(0, start - 24), start):
            continue
        found.append(Candidate(match["l"].upper(), "only", start, end, _against(text, start, end, start)))
    return found


def _set_apart(text: str, start: int, end: int) -> bool:
    """Whether a letter is in brackets or bold, or ends its clause: `so B.`, `so B, because`."""
    if start and text[start - 1] in "([{*`$":
        return True
    return bool(_CLAUSE_ENDS.match(text, end))


def _against(text: str, start: int, end: int, cue: int, whole: str = "") -> str:
    """Why a letter at start..end, in a statement from `cue` on, is no answer; empty if it is one."""
    least = max(0, cue - FAR)
    sentence = max(
        least, 1 + max(text.rfind(mark, least, cue) for mark in (". ", "\n", "? ", "! ", "; ", ": "))
    )
    before = text[sentence:cue] + re.sub(r"[*_(\[{$]+$", "", text[cue:start])
    after = text[end : end + 100]
    tail = re.match(r"[^.!?\n]*\?", after)
    if tail and "." not in tail.group():
        return "asked"
    # Right before the letter, or before the statement: "not B", "I don't think the answer is B".
    if (
        _DENIED.search(before)
        or _DENIED.search(text[sentence:cue])
        or re.search(r"\bnot\b|n['’]t\b", text[cue:start])
    ):
        return "denied"
    if _SUPPOSED.search(text[sentence:cue]) or _MAYBE.search(text[cue:start]):
        return "supposed"
    if re.search(r"\bnot\b|n['’]t\b|incorrect|\bin(?:valid|consistent)", whole):
        return "denied"
    if not whole and _DENIAL.match(_first_clause(after)):
        return "denied"
    return ""


def _first_clause(after: str) -> str:
    """Up to where another thought begins: `(B) because (A) is wrong` says nothing against B."""
    cut = re.search(
        r"\b(?:because|since|as|but|while|whereas|and|so|for|given|due|which|where|when)\b|[.,;:\n(]", after
    )
    return after[: cut.start()] if cut else after


# ---------------------------------------------------------------- choices in their words


def bare_words(text: str) -> str:
    """Words to compare: no case, no signs around them, single blanks, none between a number and its unit."""
    words = re.sub(rf"{_WRAP}|\\[,;:! ]|[*_`$\\{{}}()\[\]\"'“”‘’«»「」]", " ", text).casefold()
    words = " ".join(words.split()).strip(" .,:;!。")
    return re.sub(r"(?<=\d) (?=[a-zµ°%])", "", words)


def _named(text: str, pattern: _Patterns, choices: Sequence[str]) -> list[Candidate]:
    """Statements that give the answer in the words of one choice: `the answer is 42 nm`, `\\boxed{42 nm}`."""
    found = []
    for match in pattern.boxed.finditer(text):
        inner = bare_words(match.group()[match.group().index("{") :])
        fits = [i for i, choice in enumerate(choices) if inner and bare_words(choice) == inner]
        if len(fits) == 1:
            found.append(Candidate(string.ascii_uppercase[fits[0]], "text", match.start(), match.end()))
    for match in re.finditer(rf"\b{_NOUN}\b[*_]*(?:\s+is|\s*:)[*_\s:]*", text, re.I):
        line = text[match.end() : match.end() + LINE].split("\n", 1)[0]
        index = begins_with(bare_words(line), choices)
        if index is not None and not _against(text, match.end(), match.end() + len(line), match.start()):
            end = match.end() + min(len(line), len(choices[index]))
            found.append(Candidate(string.ascii_uppercase[index], "text", match.start(), end))
    for match in _SO_IT_IS.finditer(text):
        sentence = re.split(r"[.!?](?:\s|$)|\n", text[match.end() : match.end() + LINE], maxsplit=1)[0]
        fits = [i for i, choice in enumerate(choices) if bare_words(choice) == bare_words(sentence)]
        if len(fits) == 1:
            end = match.end() + len(sentence)
            found.append(Candidate(string.ascii_uppercase[fits[0]], "text", match.start(), end))
    for match in _IS_THE_ANSWER.finditer(text):
        words = bare_words(re.split(r"[.!?;:]\s|\n", text[max(0, match.start() - LINE) : match.start()])[-1])
        fits = [
            i
            for i, bare in enumerate(map(bare_words, choices))
            if bare and re.search(rf"(?<!\w){re.escape(bare)}$", words)
        ]
        longest = max(fits, key=lambda i: len(choices[i]), default=None)
        if longest is not None and not _against(text, match.start(), match.end(), match.start()):
            found.append(Candidate(string.ascii_uppercase[longest], "text", match.start(), match.end()))
    return found


_IS_THE_ANSWER = _compile(rf"(?<=\S) is (?:the|my) (?:correct |right |best )?{_NOUN}\b", re.I)
_SO_IT_IS = _compile(r"\b(?:so|therefore|thus|hence),? (?:(?:it|this|that) (?:is|must be) )?", re.I)


# What makes other words, or two choices, of a choice that is read: 8 m/s, 8 m or 16 m.
_GOES_ON = r"(?!\w|[.,]\d|\s?[-+–/^×·*=%]|\s(?:or|and|per|times|plus|minus|to)\b(?!\s+not\b))"


def begins_with(words: str, choices: Sequence[str]) -> int | None:
    """The choice that words begin with; the longest, and None where two read alike."""
    fits = [
        (len(bare), i) for i, choice in enumerate(choices)
        if (bare := bare_words(choice)) and re.match(rf"{re.escape(bare)}{_GOES_ON}", words)
    ]  # fmt: skip
    longest = [one for one in fits if one[0] == max(fits)[0]]
    return longest[0][1] if len(longest) == 1 else None


def _worded(text: str, choices: Sequence[str], letters: str) -> Candidate | None:
    """The whole answer, or its last line, is one choice in its words."""
    lines = text.strip().splitlines()
    bare = [bare_words(choice) for choice in choices]
    for part in (text, lines[-1]):
        fits = [i for i, choice in enumerate(bare) if choice and bare_words(part) == choice]
        if len(fits) == 1:
            start = text.rfind(part.strip())
            return Candidate(letters[fits[0]], "text", start, start + len(part.strip()))
    return None
