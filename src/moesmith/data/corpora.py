"""Text to observe a model on: corpora and prompts, rendered, tokenised, cut, and split in two.

A corpus is one domain: rows of chats, pairs or text, or plain text files. Its rows are rendered with the
model's chat template, copies are dropped, and a share of them, chosen by hash, is held out: that part is
never observed, so that what is decided on the rest can be judged on it. All documents of a row stay on one
side.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesmith.config import no_such_file, write_atomically
from moesmith.errors import UserError

from .chat import render
from .columns import COLUMNS, INSTRUCTION, MESSAGES, PAIRS, ROLE_ALIASES, Conversation, RowError, conversation
from .rows import SUFFIXES, Row, read_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HELD_OUT = "held_out.jsonl"
PROMPTS = "calibration_prompts.jsonl"  # shipped: 5 domains x 10

TEXT_COLUMNS = ("text", "content")
TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst", ".py")
THINKING = ("enable_thinking", "thinking")  # what chat templates call the switch

CHARACTERS_PER_TOKEN = 4  # of a plain text file: paragraphs are joined up to about one document
LONGEST_TOKEN = 16  # characters, on average at most: more of a row is not tokenised for nothing
READ_ROWS = 20_000  # of a corpus: rows to draw from; reading all of a huge file for a few of them takes long
READ_CHARACTERS = 1 << 28  # of those rows, which are all held at once: books are longer than chats
ROW_SHARE = 10  # one row gives at most a tenth of its domain's tokens, so that none is the domain
MIN_TOKENS = 64  # fewer in a domain say nothing about any expert


@dataclass
class Document:
    """A piece of text as the model sees it, at most `max_length` tokens."""

    id: str
    """domain/row, and .2, .3 ... for the later pieces of a long row"""
    domain: str
    text: str | None
    """as rendered; None where only the ids were kept"""
    ids: list[int]
    content: str | None = None
    """the words that were written for it, without template, system message and generated answer; None where
    they are the text"""


@dataclass
class Encoded:
    """What a model is given: ids of one document, without padding."""

    ids: list[int]
    domain: str
    id: str


@dataclass
class Source:
    """One row, rendered and tokenised, not yet cut."""

    id: str
    domain: str
    text: str
    ids: list[int]
    content: str
    question: Any = None
    """messages or text that wait for the model's answer; None for a row that has one"""
    generated: bool = False
    held_out: bool = False


@dataclass
class Counts:
    """Where the rows of one domain went: read = kept + dropped."""

    read: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)
    """reason -> the first row dropped for it, and what was wrong"""
    shortened: int = 0
    """kept rows that were longer than one row may be"""
    tokens: int = 0
    unused: int = 0
    """further rows, not looked at because the token budget was full"""
    columns: list[str] = field(default_factory=list)

    def drop(self, reason: str, row: int, detail: str = "") -> None:
        """Count a dropped row."""
        self.dropped[reason] += 1
        self.first.setdefault(reason, f"row {row}{': ' + detail if detail else ''}")

    def facts(self) -> dict[str, Any]:
        """The same for a program."""
        return {**vars(self), "dropped": dict(self.dropped)}


# ---------------------------------------------------------------- which corpora


def parse_corpora(specs: Sequence[str]) -> dict[str, str]:
    """["code=a.jsonl", "math.jsonl"] -> {"code": "a.jsonl", "math": "math.jsonl"}.

    Raises:
        UserError: a name without a path, or one name twice.
    """
    corpora: dict[str, str] = {}
    for spec in specs:
        name, equals, path = spec.partition("=")
        if not equals or Path(spec).exists():
            name, path = Path(spec).stem, spec
        name = name.strip()
        if not name or not path:
            raise UserError(f"corpus: {spec!r} has no {'name' if path else 'path'}", "give name=path")
        if name in corpora:
            raise UserError(
                f"corpus: two domains are called {name!r}: {corpora[name]} and {path}",
                "give each its name: --corpus code=a.jsonl --corpus math=b.jsonl",
            )
        corpora[name] = path
    return corpora


def read_corpus(path: str, max_length: int, key: str = "corpus") -> Iterator[Row]:
    """Rows of a dataset (see rows.py), or pieces of a plain text file or of a folder of them.

    Raises:
        UserError: nothing there, or nothing that can be read.
    """
    found = Path(path).expanduser()
    texts = [found] if found.is_file() and found.suffix.lower() not in SUFFIXES else []
    if found.is_dir() and not any(f.suffix in (*SUFFIXES, ".arrow") for f in found.rglob("*")):
        texts = sorted(f for f in found.rglob("*") if f.suffix.lower() in TEXT_SUFFIXES)
        if not texts:
            kinds = " ".join((*SUFFIXES, *TEXT_SUFFIXES))
            raise UserError(f"{key}: {found} holds no data and no text file", f"looked for {kinds}")
    if not texts:
        yield from read_rows(path, key=key)
        return
    number = 0
    for file in texts:
        for text in paragraphs(read_text(file, key), CHARACTERS_PER_TOKEN * max_length):
            number += 1
            yield Row(number, {"text": text})


def read_text(path: Path, key: str) -> str:
    """A UTF-8 text file. Raises UserError for a file of bytes."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        kinds = " ".join((*SUFFIXES, *TEXT_SUFFIXES))
        raise UserError(f"{key}: {path} is not UTF-8 text", f"a corpus is one of {kinds}, or a hub name")
    return text


def paragraphs(text: str, size: int) -> Iterator[str]:
    """A text in pieces of whole paragraphs, each just above `size` characters but the last."""
    piece: list[str] = []
    for paragraph in re.split(r"\n(?:[ \t]*\n)+", text):
        piece.append(paragraph)
        if sum(map(len, piece)) >= size:
            yield "\n\n".join(piece)
            piece = []
    if any(paragraph.strip() for paragraph in piece):
        yield "\n\n".join(piece)


def read_prompts(path: str | None) -> dict[str, list[Row]]:
    """Prompts by their domain column ("all" without one); those shipped with the package without a path.

    Raises:
        UserError: no such file, or no row in it.
    """
    rows: Iterable[Row]
    if path is None:
        lines = files("moesmith.data").joinpath(PROMPTS).read_text(encoding="utf-8").strip().split("\n")
        rows = [Row(number, json.loads(line)) for number, line in enumerate(lines, 1)]
    else:
        rows = read_corpus(path, max_length=512, key="prompts")
    by_domain: dict[str, list[Row]] = {}
    for row in rows:
        domain = row.value.get("domain")
        by_domain.setdefault(domain if isinstance(domain, str) and domain else "all", []).append(row)
    if not by_domain:
        raise UserError(f"prompts: {path} has no rows", 'rows look like {"domain": "math", "prompt": "..."}')
    return by_domain


def check_there(corpora: dict[str, str], key: str = "corpus") -> None:
    """Raise UserError for a corpus that is neither here nor a hub name: before anything is downloaded."""
    for name, path in corpora.items():
        looks_local = path.startswith((".", "~", "/")) or path.count("/") != 1
        if looks_local and not Path(path).expanduser().exists():
            raise no_such_file(path, f"{key} {name}")


# ---------------------------------------------------------------- rows to sources


@dataclass
class Reader:
    """Renders and tokenises rows for one model.

    Args:
        tokens: about how many tokens to take per domain; None takes every row.
        generate: True leaves every answer to the model, None those that are missing, False none.
        thinking: switch thinking on, or off, in prompts, where the template has a switch.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int = 512
    tokens: int | None = None
    generate: bool | None = False
    thinking: bool = True
    seen: set[bytes] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.prefix = opening_ids(self.tokenizer)
        template = self.tokenizer.chat_template
        template = template if isinstance(template, str) else json.dumps(template or "")
        self.switch = [name for name in THINKING if re.search(rf"(?<![.\w'\"]){name}\b", template)]

    def read(self, domain: str, rows: Iterable[Row]) -> tuple[list[Source], Counts]:
        """Sources of one domain, in the order of the rows. Copies of an earlier row are dropped.

        With a token budget rows are drawn from the first `READ_ROWS` (`READ_CHARACTERS`, if that is less) by
        a hash of each, until it is full: the beginning of a file is seldom like the rest of it.

        Raises:
            UserError: no row could be used.
        """
        counts = Counts()
        sources: dict[int, Source] = {}
        numbered = enumerate(rows) if self.tokens is None else _in_drawn_order(rows)
        for position, row in numbered:
            if self.tokens is not None and counts.tokens >= self.tokens:
                counts.unused = sum(1 for _ in numbered) + 1
                break
            counts.read += 1
            counts.columns = counts.columns or list(row.value)
            try:
                source = self.source(domain, row, counts)
            except RowError as error:
                counts.drop(error.reason, row.number, error.detail)
                continue
            key = content_key(source.content)
            if key in self.seen:
                counts.drop("copy of an earlier row", row.number)
                continue
            self.seen.add(key)
            counts.tokens += len(source.ids)
            sources[position] = source
        counts.kept = len(sources)
        if not sources:
            raise _nothing_kept(domain, counts)
        return [sources[position] for position in sorted(sources)], counts

    def source(self, domain: str, row: Row, counts: Counts) -> Source:
        """One row, rendered. Raises RowError with the reason it is dropped for."""
        if row.problem:
            raise RowError(row.problem, row.detail)
        answered = self.answered(domain, row)
        if answered is not None:
            return answered
        talk, asks = self.talk(row.value, self.generate)
        limit = self.max_length if self.tokens is None else max(self.max_length, self.tokens // ROW_SHARE)
        if talk.plain is not None:
            text = content = talk.plain[1][: limit * LONGEST_TOKEN]
            ids = self.plain_ids(text)
        else:
            content = content_of(talk)
            text, ids = self.render(talk, asks)
        if not content.strip():
            raise RowError("empty")
        if asks and len(ids) > self.max_length:
            raise RowError("prompt too long", f"{len(ids)} tokens, --max-length is {self.max_length}")
        if self.tokens is not None and len(ids) > limit:
            counts.shortened += 1
            ids = ids[:limit]
            text = self.tokenizer.decode(ids[len(self.prefix) :] if talk.plain else ids)
            content = text if talk.plain is not None else content
        question = talk.messages if asks else None
        return Source(f"{domain}/{row.number}", domain, text, ids, content, question)

    def answered(self, domain: str, row: Row) -> Source | None:
        """A row that a profile generated, with its very ids; None for any other row.

        Its answer may be empty, or be cut where it goes round in circles, and its text need not give the ids
        it was decoded from. They are taken if this tokenizer and template render the prompt as it was.
        """
        said = row.value.get("response_ids")
        if self.generate is True or not isinstance(said, list) or question(row.value) is None:
            return None
        talk, _ = self.talk(row.value, generate=True)
        text, ids = self.render(talk, asks=True)
        if ids_key(ids) != row.value.get("key"):
            return None
        said = said[: row.value.get("repeats_from")]
        text += self.tokenizer.decode(said)
        name = f"{domain}/{row.number}"
        return Source(name, domain, text, [*ids, *said], content_of(talk), generated=True)

    def talk(self, row: dict[str, Any], generate: bool | None) -> tuple[Conversation, bool]:
        """The conversation in a row, and whether the model is to answer it."""
        asked = question(row)
        if asked is None:
            column = next((name for name in TEXT_COLUMNS if isinstance(row.get(name), str)), None)
            return (conversation({"text": row[column]}, "text") if column else conversation(row)), False
        if has_answer(row) and generate is not True:
            return conversation(row), False
        # `conversation` wants an answer to learn: it gets one, which is taken off again.
        extra: dict[str, Any] = {k: row[k] for k in ("tools", "chat_template_kwargs") if k in row}
        talk = conversation({"messages": [*asked, {"role": "assistant", "content": "?"}], **extra})
        talk.messages.pop()
        asks = generate is not False
        if asks:  # False is said too: many templates think unless they are told not to
            talk.template_kwargs = {**dict.fromkeys(self.switch, self.thinking), **talk.template_kwargs}
        return talk, asks

    def render(self, talk: Conversation, asks: bool) -> tuple[str, list[int]]:
        """Text and ids of a conversation; a model without a template reads the turns as paragraphs."""
        if self.tokenizer.chat_template is None:
            text = "\n\n".join(message["content"] for message in talk.messages if message["content"])
            return text, self.plain_ids(text)
        text = render(self.tokenizer, talk, len(talk.messages), answer_next=asks)
        return text, list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def plain_ids(self, text: str) -> list[int]:
        """Ids of text that no template opened: with the tokenizer's start token, without its end token."""
        return [*self.prefix, *self.tokenizer(text, add_special_tokens=False).input_ids]


def content_of(talk: Conversation) -> str:
    """What was said in a conversation, without system messages."""
    said = [m["content"] for m in talk.messages if m["role"] not in ("system", "developer")]
    return "\n\n".join(part for part in said if part)


def question(row: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The messages up to where an answer belongs, whether or not the row has one; None for a text."""
    for name in MESSAGES:
        if row.get(name):
            messages = _as_list(row[name])
            while messages and _role(messages[-1]) == "assistant":
                messages = messages[:-1]
            return messages or None
    for asked, _ in (*PAIRS, *INSTRUCTION):
        prompt = row.get(asked)
        if prompt and isinstance(prompt, list):
            return prompt
        if prompt and isinstance(prompt, str):
            if asked == "instruction" and isinstance(row.get("input"), str) and row["input"]:
                prompt = f"{prompt}\n\n{row['input']}"
            system = row.get("system")
            opening = [{"role": "system", "content": system}] if isinstance(system, str) and system else []
            return [*opening, {"role": "user", "content": prompt}]
    return None


def has_answer(row: dict[str, Any]) -> bool:
    """Whether the row's own last word is an answer."""
    for name in MESSAGES:
        if row.get(name):
            messages = _as_list(row[name])
            return bool(messages) and _role(messages[-1]) != "user"
    return any(row.get(a) and row.get(b) for a, b in (*PAIRS, *INSTRUCTION))


def _as_list(value: Any) -> list[Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise RowError("not JSON", str(error)) from None
    return value if isinstance(value, list) else []


def _role(message: Any) -> Any:
    role = (message.get("role") or message.get("from")) if isinstance(message, dict) else None
    return ROLE_ALIASES.get(role, role) if isinstance(role, str) else role


def opening_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before a plain text: its start token, or nothing."""
    bare = list(tokenizer("a", add_special_tokens=False).input_ids)
    full = list(tokenizer("a").input_ids)
    start = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
    return full[:start]


def ids_key(ids: Sequence[int]) -> str:
    """A short digest of token ids."""
    return hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest()[:16]


def content_key(text: str) -> bytes:
    """Equal for texts of the same words, whatever the spaces between them."""
    return hashlib.blake2b(" ".join(text.split()).encode(), digest_size=16).digest()


def _in_drawn_order(rows: Iterable[Row]) -> Iterator[tuple[int, Row]]:
    """(position, row) of the first rows of a corpus, in the order of a hash of their columns."""
    drawn: list[tuple[bytes, int, Row]] = []
    characters = 0
    for position, row in enumerate(itertools.islice(rows, READ_ROWS)):
        text = json.dumps(row.value, sort_keys=True, default=str)
        drawn.append((content_key(text), position, row))
        characters += len(text)
        if characters > READ_CHARACTERS:
            break
    drawn.sort(key=lambda entry: entry[:2])
    return iter([(position, row) for _, position, row in drawn])


def _nothing_kept(domain: str, counts: Counts) -> UserError:
    if not counts.read:
        return UserError(f"corpus {domain}: it is empty")
    reasons = [f"{n:,} {reason} ({counts.first[reason]})" for reason, n in counts.dropped.most_common()]
    hint = None
    if "columns missing" in counts.dropped:
        hint = f"columns there: {', '.join(counts.columns[:10])}; known: text · {COLUMNS}"
    elif "prompt too long" in counts.dropped:
        hint = "raise --max-length"
    return UserError(f"corpus {domain}: none of {counts.read:,} rows can be used: {'; '.join(reasons)}", hint)


# ---------------------------------------------------------------- both sides, documents


def hold_out(sources: list[Source], share: float) -> None:
    """Mark `share` of each domain's rows as held out, at least one and never all of them.

    The choice follows a hash of each row's words: it needs no seed and does not depend on the order of rows.
    """
    by_domain: dict[str, list[Source]] = {}
    for source in sources:
        by_domain.setdefault(source.domain, []).append(source)
    for rows in by_domain.values():
        wanted = min(max(1, round(share * len(rows))), len(rows) - 1) if share else 0
        for row in sorted(rows, key=lambda row: content_key("held out? " + row.content))[:wanted]:
            row.held_out = True


def cut(source: Source, max_length: int, tokenizer: PreTrainedTokenizerBase) -> list[Document]:
    """Documents of one row, of about equal length. A prompt with its generated answer is not cut."""
    if source.generated or len(source.ids) <= max_length:
        content = source.content if source.content != source.text else None
        return [Document(source.id, source.domain, source.text, source.ids, content)]
    prefix = opening_ids(tokenizer)
    prefix = prefix if source.ids[: len(prefix)] == prefix else []
    body = source.ids[len(prefix) :]
    room = max(max_length - len(prefix), 1)
    size = math.ceil(len(body) / math.ceil(len(body) / room))
    documents = []
    for i, start in enumerate(range(0, len(body), size), 1):
        ids = body[start : start + size]
        text = tokenizer.decode(ids)
        # A chat's words cannot be told from its template's once it is cut: each piece answers for the row.
        content = source.content if source.content != source.text else None
        name = source.id if i == 1 else f"{source.id}.{i}"
        documents.append(Document(name, source.domain, text, [*prefix, *ids], content))
    return documents


def check_enough(documents: Sequence[Document], domains: Iterable[str]) -> None:
    """Raise UserError for a domain with too few tokens to observe."""
    for domain in domains:
        tokens = sum(len(document.ids) for document in documents if document.domain == domain)
        if tokens < MIN_TOKENS:
            raise UserError(
                f"corpus {domain}: {tokens} tokens to observe, at least {MIN_TOKENS} are wanted",
                "add rows, or hold out less: --held-out",
            )


def encode(
    tokenizer: PreTrainedTokenizerBase, documents: Iterable[Document], max_length: int | None = None
) -> list[Encoded]:
    """Ids of the documents, tokenised where there is only text, cut off at `max_length`."""
    encoded, prefix = [], opening_ids(tokenizer)
    for document in documents:
        ids = document.ids
        if not ids:
            ids = list(tokenizer(document.text or "", add_special_tokens=False).input_ids)
            ids = [*(prefix if ids[: len(prefix)] != prefix else []), *ids]
        encoded.append(Encoded(ids[:max_length], document.domain, document.id))
    return encoded


def read_documents(
    corpora: dict[str, str], tokenizer: PreTrainedTokenizerBase, max_length: int = 512,
    tokens: int | None = None, held_out: float = 0.0,
) -> tuple[list[Document], list[Document], dict[str, Counts]]:  # fmt: skip
    """Corpora as documents, nothing generated: (to use, held out, domain -> counts).

    Raises:
        UserError: a corpus that is not there, or has no row to use.
    """
    reader = Reader(tokenizer, max_length, tokens)
    sources, counts = [], {}
    for domain, path in corpora.items():
        found, counts[domain] = reader.read(domain, read_corpus(path, max_length))
        sources += found
    hold_out(sources, held_out)
    sides: tuple[list[Document], list[Document]] = [], []
    for source in sources:
        sides[source.held_out].extend(cut(source, max_length, tokenizer))
    return *sides, counts


def corpus_hash(documents: Iterable[Document]) -> str:
    """A digest of every document's domain and ids, in order."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(f"{document.domain}\0{','.join(map(str, document.ids))}\n".encode())
    return digest.hexdigest()[:32]


# ---------------------------------------------------------------- files


def write_documents(path: Path, documents: Iterable[Document]) -> None:
    """Documents as JSONL, whole or not at all."""
    rows = [{k: v for k, v in vars(document).items() if v is not None} for document in documents]
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_held_out(profile: str | Path) -> list[Document]:
    """The documents that a profile held out, or documents in any JSONL file with the same keys.

    Raises:
        UserError: not there, or none in it.
    """
    path = Path(profile)
    path = path / HELD_OUT if path.is_dir() else path
    if not path.is_file():
        raise no_such_file(path, "profile")
    documents = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            row = json.loads(line)
            documents.append(
                Document(
                    row.get("id") or f"{row['domain']}/{number}",
                    row["domain"],
                    row.get("text"),
                    row.get("ids") or [],
                    row.get("content"),
                )  # fmt: skip
            )
    if not documents:
        raise UserError(f"{path} is empty: nothing was held out", "moesmith profile --held-out 0.2")
    return documents


def describe(counts: dict[str, Counts], unit: Callable[[float], str]) -> Iterator[str]:
    """One line per domain. `unit` writes a number of tokens."""
    for domain, count in counts.items():
        drawn = f" of {count.read + count.unused:,}" if count.unused else ""
        line = f"{domain}: {count.read:,}{drawn} row{'' if count.read == 1 else 's'} → {count.kept:,} kept"
        if count.dropped:
            dropped = ", ".join(f"{n:,} {reason}" for reason, n in count.dropped.most_common())
            line += f" · dropped: {dropped} (first: {next(iter(count.first.values())).split(':')[0]})"
        if count.shortened:
            line += f" · {count.shortened:,} shortened"
        yield f"{line} · {unit(count.tokens)} tokens"
