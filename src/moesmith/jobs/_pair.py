"""Two models to be compared: what each is, loading it, and the text that both read.

A side is a model folder (16 or 32 bits, or packed), a hub name, or an adapter folder, which runs over the
base it was trained on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesmith import console
from moesmith.errors import UserError

if TYPE_CHECKING:
    from moesmith.data.corpora import Document
    from moesmith.models.checkpoint import Checkpoint

PROMPT_TOKENS = 48  # of a plain text, for the canary to continue
QUESTION, ANSWER = "moesmithasks", "moesmithsays"  # words that no template has
CHARACTERS = 4  # per token, to cut the text that ships with the package


# ---------------------------------------------------------------- a side


@dataclass
class Side:
    """One of the two models."""

    name: str
    """A or B"""
    given: str
    """as it was asked for"""
    folder: Path
    """of the weights; the base's, for an adapter"""
    checkpoint: Checkpoint
    adapter: Path | None = None
    base: dict[str, Any] | None = None
    """what the adapter says about its base"""
    anatomy: dict[str, Any] = field(default_factory=dict)

    @property
    def words(self) -> Path:
        """Where its tokenizer is: an adapter brings the one it was trained with."""
        from moesmith.models.checkpoint import has_tokenizer

        return self.adapter if self.adapter is not None and has_tokenizer(self.adapter) else self.folder

    @property
    def nbytes(self) -> int:
        """Bytes of its weights on disk, the adapter's included."""
        extra = 0
        if self.adapter is not None:
            extra = sum(file.stat().st_size for file in self.adapter.glob("*.safetensors"))
        return self.checkpoint.nbytes + extra

    @property
    def storage(self) -> str:
        """How its weights are stored, in words."""
        quantization = self.checkpoint.quantization
        kind = "adapter on " if self.adapter is not None else ""
        if quantization is not None:
            scheme = quantization.get("scheme") or quantization.get("quant_method")
            return f"{kind}{scheme}"
        dtypes: dict[str, int] = {}
        for tensor in self.checkpoint.tensors.values():
            dtypes[tensor.dtype] = dtypes.get(tensor.dtype, 0) + tensor.nbytes
        return kind + max(dtypes, key=lambda name: dtypes[name]).lower()

    def facts(self) -> dict[str, Any]:
        """What it is, for a program."""
        return {
            "given": self.given,
            "folder": str(self.folder),
            "adapter": None if self.adapter is None else str(self.adapter),
            "bytes": self.nbytes,
            "storage": self.storage,
            "packed": self.checkpoint.is_packed,
            **{key: self.anatomy.get(key) for key in ("model_type", "moe_layers", "num_experts", "top_k")},
            "parameters": (self.anatomy.get("parameters") or {}).get("total"),
            "active_parameters": (self.anatomy.get("parameters") or {}).get("active"),
        }

    def line(self) -> str:
        """One line for a person."""
        facts = self.facts()
        parts = [self.given, facts["storage"]]
        if facts["num_experts"]:
            experts = _range(facts["num_experts"])
            parts.append(f"{experts} experts, top-{_range(facts['top_k'])}, {facts['moe_layers']} layers")
        else:
            parts.append("dense")
        parts.append(f"{console.count(facts['parameters'])} parameters")
        parts.append(console.size(facts["bytes"]))
        return " · ".join(parts)


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}-{high}"


def open_side(name: str, given: str, anatomy: bool = True) -> Side:
    """Describe a model or adapter without loading it; a hub name is downloaded.

    Raises:
        UserError: not there, no weights, an adapter that does not say what it belongs to.
    """
    from moesmith.models.checkpoint import Checkpoint, check_architecture, resolve

    folder = Path(given).expanduser()
    adapter, base, source = None, None, given
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        adapter = folder
        base = _base_of(folder)
        source = base["path"]
    weights = resolve(source)
    side = Side(name, given, weights, Checkpoint.open(weights), adapter, base)
    check_architecture(side.checkpoint.config)
    if anatomy:
        from moesmith.models.anatomy import dissect, meta_model

        side.anatomy = dissect(meta_model(side.checkpoint.config)).facts()
    return side


def _base_of(adapter: Path) -> dict[str, Any]:
    from moesmith.jobs.chat import recorded_base
    from moesmith.models.checkpoint import read_json

    base = recorded_base(adapter)
    if base is not None:
        return base
    path = read_json(adapter / "adapter_config.json").get("base_model_name_or_path")
    if not path:
        raise UserError(
            f"{adapter} does not say which model it belongs to", "an adapter names its base in moesmith.json"
        )
    return {"path": path}


def load(side: Side, dtype: str = "auto", device: str = "auto") -> Any:
    """The model, in evaluation mode. A 16-bit base of an adapter is packed as it was in training."""
    import torch

    from moesmith.experts.quantizer import ExpertsConfig
    from moesmith.models.checkpoint import model_class

    packing = None
    scheme = (side.base or {}).get("scheme")
    if side.base is not None and scheme and side.checkpoint.quantization is None:
        keys = ("linears", "double_quant", "blocksize")
        packing = ExpertsConfig(scheme, **{key: side.base[key] for key in keys if key in side.base})
    model = model_class(side.checkpoint.config).from_pretrained(
        side.folder,
        quantization_config=packing,
        dtype=dtype if dtype == "auto" else getattr(torch, dtype),
        device_map={"": 0} if on_gpu(device) else None,
    )
    if side.adapter is not None:
        from moesmith.jobs.chat import put_adapter

        model = put_adapter(model, side.adapter, side.base, str(side.folder))
    return model.eval()


def on_gpu(device: str) -> bool:
    """Whether the models run on a GPU."""
    import torch

    return torch.cuda.is_available() if device == "auto" else device == "cuda"


def free_memory(device: str) -> int:
    """Bytes that can be taken now, on the device the models run on."""
    if on_gpu(device):
        import torch

        return torch.cuda.mem_get_info()[0]
    from moesmith import ram

    return ram.available()


# ---------------------------------------------------------------- one vocabulary


def read_tokenizers(a: Side, b: Side) -> tuple[Any, Any]:
    """Both tokenizers; a side without one reads with the other's.

    Raises:
        UserError: neither has one.
    """
    from transformers import AutoTokenizer

    from moesmith.models.checkpoint import has_tokenizer

    found = {side.name: has_tokenizer(side.words) for side in (a, b)}
    if not any(found.values()):
        raise UserError(
            f"neither {a.given} nor {b.given} has a tokenizer",
            "copy tokenizer.json and tokenizer_config.json of the model into one of them",
        )
    for side, other in ((a, b), (b, a)):
        if not found[side.name]:
            console.warn(f"{side.given} has no tokenizer: it reads with that of {other.given}")
    words_a = a.words if found["A"] else b.words
    words_b = b.words if found["B"] else a.words
    tokenizer = AutoTokenizer.from_pretrained(words_a)
    return tokenizer, tokenizer if words_a == words_b else AutoTokenizer.from_pretrained(words_b)


def check_same_words(a: Side, b: Side, tokenizers: tuple[Any, Any], documents: Sequence[Document]) -> None:
    """Raise UserError unless both models and both tokenizers give every text the same ids."""
    sizes = [_vocabulary(side) for side in (a, b)]
    if None not in sizes and sizes[0] != sizes[1]:
        raise UserError(
            f"{a.given} has a vocabulary of {sizes[0]:,}, {b.given} of {sizes[1]:,}",
            "only models that share a vocabulary can be compared token by token",
        )
    first, second = tokenizers
    if first is second:
        return
    for document in documents:
        text = document.text or first.decode(document.ids)
        mine, theirs = (t(text, add_special_tokens=False).input_ids for t in (first, second))
        if mine != theirs:
            place = next(
                (i for i, (x, y) in enumerate(zip(mine, theirs, strict=False)) if x != y),
                min(len(mine), len(theirs)),
            )
            seen = first.decode(mine[max(0, place - 5) : place + 1])
            raise UserError(
                f"the tokenizers of {a.given} and {b.given} differ: document {document.id}, token {place}, "
                f"at {seen!r}",
                "only models that share a vocabulary can be compared token by token",
            )


def _vocabulary(side: Side) -> int | None:
    config = side.checkpoint.config
    return config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")


# ---------------------------------------------------------------- text


def shipped_documents(tokenizer: Any, max_length: int) -> list[Document]:
    """Text that comes with Python and reasoning-gym, the half that no command learns or builds from.

    Raises:
        UserError: reasoning-gym is not installed.
    """
    from moesmith.data.calibration import texts
    from moesmith.data.corpora import Document, opening_ids, paragraphs

    try:
        by_kind = texts(tokenizer, held_out=True)
    except ImportError:
        raise UserError(
            "no text to compare on: without --corpus or --profile it comes from reasoning-gym, "
            "which is not installed",
            "--corpus name=path (JSONL, Parquet or text files), or pip install reasoning-gym",
        ) from None
    documents = []
    for kind, text in by_kind.items():
        for number, piece in enumerate(paragraphs(text, CHARACTERS * max_length), 1):
            ids = tokenizer(piece, add_special_tokens=False).input_ids
            ids = [*opening_ids(tokenizer), *ids][:max_length]
            documents.append(Document(f"{kind}/{number}", kind, tokenizer.decode(ids), ids))
    return documents


def first_tokens(documents: Sequence[Document], tokens: int) -> list[Document]:
    """The first documents of every domain, up to about `tokens` tokens; one at least of each domain."""
    taken: dict[str, int] = {}
    kept = []
    for document in documents:
        have = taken.get(document.domain, 0)
        if have == 0 or have + len(document.ids) <= tokens:
            taken[document.domain] = have + len(document.ids)
            kept.append(document)
    return kept


def check_ids(tokenizer: Any, documents: Sequence[Document], where: Path) -> None:
    """Raise UserError when stored ids are not what this tokenizer makes of the stored text."""
    wrong = 0
    known = [d for d in documents if d.text and d.ids]
    for document in known:
        said = "".join(tokenizer.decode(document.ids).split())
        wrong += "".join((document.text or "").split()) not in said
    if 2 * wrong > len(known):
        raise UserError(
            f"{where}: its held-out text was tokenised for another model: {wrong} of {len(known)} documents "
            "read differently",
            "give a profile of one of the two models, or --corpus",
        )


# ---------------------------------------------------------------- prompts


def canary_prompts(tokenizer: Any, documents: Sequence[Document], n: int) -> list[list[int]]:
    """`n` prompts as ids, from the domains in turn: a chat up to its last answer, a text's first tokens."""
    by_domain: dict[str, list[Document]] = {}
    for document in documents:
        by_domain.setdefault(document.domain, []).append(document)
    openings = _openings(tokenizer)
    prompts: list[list[int]] = []
    for document in _in_turn(list(by_domain.values())):
        if len(prompts) >= n:
            break
        prompt = _prompt(tokenizer, document, openings)
        if prompt not in prompts:
            prompts.append(prompt)
    return prompts


def _in_turn(groups: list[list[Document]]) -> Iterator[Document]:
    for i in range(max(map(len, groups), default=0)):
        for group in groups:
            if i < len(group):
                yield group[i]


def _openings(tokenizer: Any) -> list[list[int]]:
    """How an answer opens in a rendered chat, as ids: as before a new answer, and as in one that is there.

    The two differ where a template opens thinking. Some templates (Mixtral's) know only the second: it is
    what stands between the question and the answer.
    """
    if tokenizer.chat_template is None:
        return []
    asked = {"role": "user", "content": QUESTION}
    bare = _rendered(tokenizer, [asked])
    full = _rendered(tokenizer, [asked], add_generation_prompt=True)
    opening = full[len(bare) :] if full.startswith(bare) else ""
    first_line = opening[: opening.index("\n") + 1] if "\n" in opening else opening
    talk = _rendered(tokenizer, [asked, {"role": "assistant", "content": ANSWER}])
    between = talk.rpartition(ANSWER)[0].rpartition(QUESTION)[2]
    # Without the spaces around it last: a tokenizer may make one token of a space and the next word.
    texts = dict.fromkeys((opening, between, first_line, between.strip()))
    return [tokenizer(text, add_special_tokens=False).input_ids for text in texts if text.strip()]


def _rendered(tokenizer: Any, messages: list[dict[str, str]], **options: bool) -> str:
    """A chat as text; empty where the template refuses it, as some do without a system message."""
    import jinja2

    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except jinja2.TemplateError:
        return ""


def _prompt(tokenizer: Any, document: Document, openings: Sequence[list[int]]) -> list[int]:
    ids = document.ids or tokenizer(document.text or "").input_ids
    for opening in openings:
        for start in range(len(ids) - len(opening), 0, -1):
            if ids[start : start + len(opening)] == opening:
                return list(ids[: start + len(opening)])
    # Of a short text, half: the answer should not be over at once.
    return list(ids[: max(1, min(PROMPT_TOKENS, len(ids) // 2))])
