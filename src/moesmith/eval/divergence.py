"""How far one model's next-token distribution is from another's, on the same text.

KL(reference || candidate) in nats for every token, over the full vocabulary, in fp32; top-1 agreement; the
loss and perplexity of both. All intervals are 95 % bootstrap over documents (`bootstrap.py`); pieces of one
long row count as one document there, because they are not independent.

Memory: the logits of one batch of at most `batch_tokens` tokens, once for the reference and once for the
candidate at hand, plus a few pieces of 64 MB in fp32. `divergences` runs one model under several contexts
(masks); `Spool` keeps a reference's logits on disk for two models that do not fit into memory together.

N documents, B of them in a batch, S tokens of the longest, V vocabulary.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moesmith.data.pieces import row_numbers
from moesmith.errors import UserError

from .bootstrap import quantile, quantile_intervals, ratio_interval

BATCH_TOKENS = 2048
PIECE = 2**24  # logits compared at a time: 64 MB in fp32


class Encoded(Protocol):
    """A document as token ids: what `data/corpora.py` gives."""

    @property
    def ids(self) -> list[int]: ...
    @property
    def domain(self) -> str: ...
    @property
    def id(self) -> str: ...


Context = Callable[[], AbstractContextManager[Any]]
"""Makes a context inside which the model is the candidate. If it yields a module, that one is run instead."""


@dataclass
class Divergence:
    """What was measured in each document; every document has at least one predicted token."""

    domains: list[str]
    """(N,)"""
    kl: list[NDArray[np.float32]]
    """(N,) arrays of nats per predicted token, in document order"""
    agree: NDArray[np.float64]
    """(N,) tokens for which both models name the same most likely token"""
    nll_a: NDArray[np.float64]
    """(N,) sum of -log p of the tokens of the text, reference"""
    nll_b: NDArray[np.float64]
    """(N,) the same of the candidate"""
    ids: list[str]
    """(N,) names of the documents"""

    @classmethod
    def empty(cls, documents: Sequence[Encoded]) -> Divergence:
        """Zeros for these documents."""
        n = len(documents)
        nothing = [np.zeros(0, np.float32) for _ in range(n)]
        domains, ids = [d.domain for d in documents], [d.id for d in documents]
        return cls(domains, nothing, np.zeros(n), np.zeros(n), np.zeros(n), ids)

    @property
    def tokens(self) -> NDArray[np.int64]:
        """(N,) predicted tokens."""
        return np.array([len(kl) for kl in self.kl], np.int64)

    @property
    def kl_sums(self) -> NDArray[np.float64]:
        """(N,) nats, summed over the tokens of each document."""
        return np.array([part.sum(dtype=np.float64) for part in self.kl])

    @property
    def rows(self) -> NDArray[np.int64]:
        """(N,) the row that each document is a piece of, numbered 0, 1, ...: what is independent."""
        return np.array(row_numbers(self.ids), np.int64)

    def per_row(self, values: NDArray[Any]) -> NDArray[np.float64]:
        """Values of the documents (N,), summed over the pieces of each row, (rows,)."""
        return np.bincount(self.rows, weights=values).astype(np.float64)

    def select(self, domain: str) -> Divergence:
        """The documents of one domain."""
        mine = [i for i, name in enumerate(self.domains) if name == domain]
        kl, ids = [self.kl[i] for i in mine], [self.ids[i] for i in mine]
        names = [domain] * len(mine)
        return Divergence(names, kl, self.agree[mine], self.nll_a[mine], self.nll_b[mine], ids)

    @classmethod
    def merged(cls, parts: Sequence[Divergence]) -> Divergence:
        """One Divergence over disjoint documents measured apart, in the order given."""
        return cls(
            [name for part in parts for name in part.domains],
            [kl for part in parts for kl in part.kl],
            np.concatenate([part.agree for part in parts]),
            np.concatenate([part.nll_a for part in parts]),
            np.concatenate([part.nll_b for part in parts]),
            [name for part in parts for name in part.ids],
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain data: lists of strings and numpy arrays. `tokens` cuts `kl` (T,) into documents."""
        return {
            "domains": self.domains,
            "ids": self.ids,
            "tokens": self.tokens,
            "kl": np.concatenate(self.kl),
            "agree": self.agree,
            "nll_a": self.nll_a,
            "nll_b": self.nll_b,
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Divergence:
        """Back from `state_dict`; lists in the place of arrays will do."""
        tokens, kl = np.asarray(state["tokens"], np.int64), np.asarray(state["kl"], np.float32)
        agree, nll_a, nll_b = (np.asarray(state[key], np.float64) for key in ("agree", "nll_a", "nll_b"))
        parts = np.split(kl, np.cumsum(tokens)[:-1])
        return cls(list(state["domains"]), parts, agree, nll_a, nll_b, list(state["ids"]))

    def facts(self) -> dict[str, Any]:
        """Everything for a file. Every `ci` is (low, high), or None where there is only one document.

        `documents` counts rows: the pieces of a long one are not independent of each other.
        Overall figures weigh every token alike, so a domain with more tokens weighs more.
        """
        names = list(dict.fromkeys(self.domains))
        parts = {name: self.select(name)._figures() for name in names}
        whole = self._figures()
        return {
            "kl": whole["kl"],
            "top1": whole["top1"],
            "ppl": {"overall": whole["ppl"], "per_domain": {name: parts[name]["ppl"] for name in names}},
            "tokens": whole["tokens"],
            "documents": whole["documents"],
            "per_domain": parts,
        }

    def _figures(self) -> dict[str, Any]:
        tokens = self.tokens
        total = int(tokens.sum())
        kl = np.concatenate(self.kl)
        owner = np.repeat(self.rows, tokens)
        sums = self.kl_sums
        per_row = self.per_row(tokens)
        median_ci, p99_ci = quantile_intervals(kl, owner, (0.5, 0.99))
        more = self.nll_b - self.nll_a
        return {
            "kl": {
                "mean": float(sums.sum() / total),
                "ci": ratio_interval(self.per_row(sums), per_row),
                "median": quantile(kl, 0.5),
                "median_ci": median_ci,
                "p99": quantile(kl, 0.99),
                "p99_ci": p99_ci,
                "max": float(kl.max()),
            },
            "top1": {
                "rate": float(self.agree.sum() / total),
                "ci": ratio_interval(self.per_row(self.agree), per_row),
            },
            "ppl": {
                "a": _exp(self.nll_a.sum() / total),
                "b": _exp(self.nll_b.sum() / total),
                "ratio": _exp(more.sum() / total),
                "ci": ratio_interval(self.per_row(more), per_row, np.exp),
                "loss_a": float(self.nll_a.sum() / total),
                "loss_b": float(self.nll_b.sum() / total),
            },
            "tokens": total,
            "documents": len(per_row),
        }


def report_row(name: str, facts: dict[str, Any]) -> dict[str, Any]:
    """The facts of a Divergence as one row of the report's `divergence` section."""

    def row(part: dict[str, Any], ppl: dict[str, Any]) -> dict[str, Any]:
        return {
            "kl_mean": part["kl"]["mean"],
            "kl_ci": part["kl"]["ci"],
            "kl_median": part["kl"]["median"],
            "kl_p99": part["kl"]["p99"],
            "top1": part["top1"]["rate"],
            "ppl_a": ppl["a"],
            "ppl_b": ppl["b"],
            "ppl_ratio": ppl["ratio"],
            "ppl_ratio_ci": ppl["ci"],
            "tokens": part["tokens"],
            "documents": part["documents"],
        }

    per_domain = {domain: row(part, part["ppl"]) for domain, part in facts["per_domain"].items()}
    return {"name": name, **row(facts, facts["ppl"]["overall"]), "per_domain": per_domain}


# ---------------------------------------------------------------- measuring


def divergence(
    reference: Any,
    candidate: Any,
    documents: Sequence[Encoded],
    on_batch: Callable[[int], None] | None = None,
    batch_tokens: int = BATCH_TOKENS,
    names: tuple[str, str] = ("the reference", "the candidate"),
) -> Divergence:
    """Compare two models, or a `Spool` of the reference's logits and a model.

    Args:
        on_batch: called with the number of tokens done after each batch.
        batch_tokens: most positions in one forward, padding included; a longer document goes alone.
        names: of the two, for messages.

    Raises:
        UserError: no documents, one without a token to predict, two vocabularies, logits that are not finite
            or have another shape than (B, S, V).
    """
    contexts = {names[1]: lambda: contextlib.nullcontext(candidate)}
    return divergences(reference, documents, contexts, on_batch, batch_tokens, names[0])[names[1]]


@torch.no_grad()
def divergences(
    model: Any,
    documents: Sequence[Encoded],
    candidates: Mapping[str, Context],
    on_batch: Callable[[int], None] | None = None,
    batch_tokens: int = BATCH_TOKENS,
    name: str = "the reference",
) -> dict[str, Divergence]:
    """Compare one model with itself inside each of several contexts, e.g. `lambda: masked(model, keep)`.

    Every context is entered once per batch, so that the reference runs once per batch and its logits live no
    longer than that: entering has to be cheap.

    Raises:
        UserError: as `divergence`; names the candidate.
    """
    check_documents(documents)
    found = {key: Divergence.empty(documents) for key in candidates}
    done = 0
    for batch in batches(documents, batch_tokens):
        reference = model.logits(batch) if isinstance(model, Spool) else logits(model, documents, batch, name)
        for key, context in candidates.items():
            with context() as other:
                rows = logits(model if other is None else other, documents, batch, key)
            for i, a, b in zip(batch, reference, rows, strict=True):
                _compare(found[key], i, documents[i], a, b, (name, key))
            del rows
        del reference
        done += sum(len(documents[i].ids) - 1 for i in batch)
        if on_batch:
            on_batch(done)
    return found


def _compare(
    into: Divergence, i: int, document: Encoded, a: Tensor, b: Tensor, names: tuple[str, str]
) -> None:
    """Put one document's figures in place. Logits (tokens, V) of both models."""
    if a.shape != b.shape:
        raise UserError(
            f"{names[0]} has a vocabulary of {a.shape[-1]:,}, {names[1]} of {b.shape[-1]:,}",
            "their distributions can only be compared over the same vocabulary",
        )
    targets = torch.tensor(document.ids[1:], device=b.device)
    kl, agree = [], 0
    step = max(1, PIECE // a.shape[-1])
    for start in range(0, len(a), step):
        piece = slice(start, start + step)
        log_p = a[piece].to(b.device).float().log_softmax(-1)
        log_q = b[piece].float().log_softmax(-1)
        for log, name in ((log_p, names[0]), (log_q, names[1])):
            if log[:, 0].isnan().any():  # one NaN or inf makes its whole row NaN
                raise UserError(
                    f"{name}: logits that are not finite in document {document.id} ({document.domain})"
                )
        agree += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
        chosen = targets[piece, None]
        into.nll_a[i] -= float(log_p.gather(1, chosen).double().sum())
        into.nll_b[i] -= float(log_q.gather(1, chosen).double().sum())
        p = log_p.exp()
        # In place: log_q becomes log p/q. Where p is 0 that may be infinite, and 0 times inf would be NaN.
        log_q.neg_().add_(log_p).masked_fill_(p == 0, 0)
        kl.append(p.mul_(log_q).sum(-1).clamp_(min=0).cpu())  # rounding can give -1e-8
    into.kl[i] = torch.cat(kl).numpy()
    into.agree[i] = agree
    if not (np.isfinite(into.kl[i]).all() and math.isfinite(into.nll_b[i])):
        raise UserError(
            f"{names[1]}: probability 0 for a token of document {document.id} ({document.domain}) "
            f"that {names[0]} can say",
            "their divergence is infinite; are the logits of both models masked alike?",
        )


# ---------------------------------------------------------------- batches and logits


def check_documents(documents: Sequence[Encoded]) -> None:
    """Raise UserError when there is nothing to measure on, naming a document without a token to predict."""
    if not documents:
        raise UserError("no documents to compare the models on")
    for document in documents:
        if len(document.ids) < 2:
            raise UserError(
                f"document {document.id} ({document.domain}) has {len(document.ids)} tokens, wanted 2",
                "leave empty documents out",
            )


def batches(documents: Sequence[Encoded], batch_tokens: int = BATCH_TOKENS) -> Iterator[list[int]]:
    """Indices of documents of similar length, so many that the padded batch has at most `batch_tokens`.

    Longest first, so that running out of memory happens at once.
    """
    order = sorted(range(len(documents)), key=lambda i: (-len(documents[i].ids), i))
    while order:
        rows = max(1, batch_tokens // len(documents[order[0]].ids))
        yield order[:rows]
        order = order[rows:]


def logits(model: Any, documents: Sequence[Encoded], batch: Sequence[int], name: str) -> list[Tensor]:
    """The model's logits for every next token of each document of a batch: views (tokens, V), no padding.

    Documents are padded on the right and masked: no token of a causal model sees what comes after it.
    """
    rows = [documents[i].ids for i in batch]
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    device = next(model.parameters()).device
    known = getattr(model.config.get_text_config(), "vocab_size", None)
    if known is not None and int(ids.max()) >= known:
        raise UserError(
            f"{name}: token id {int(ids.max())} is beyond its vocabulary of {known:,}",
            "the documents were tokenised for another model",
        )
    with _evaluating(model):
        out = model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
    found = getattr(out, "logits", None)
    if not isinstance(found, Tensor) or found.ndim != 3 or found.shape[:2] != ids.shape:
        shape = tuple(found.shape) if isinstance(found, Tensor) else "none"
        raise UserError(
            f"{name}: logits {shape} for ids {tuple(ids.shape)}, wanted (batch, tokens, vocabulary)",
            "only models that predict the next token of a text can be compared",
        )
    return [found[i, : len(row) - 1] for i, row in enumerate(rows)]


@contextlib.contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode, and back to what it was."""
    was_training = model.training
    if was_training:
        model.eval()
    try:
        yield
    finally:
        if was_training:
            model.train()


# ---------------------------------------------------------------- a reference on disk


class Spool:
    """A model's logits for every token of some documents in one file, in the dtype it gave them: exact.

    `with Spool(path) as spool: spool.record(model, documents)`, then `divergence(spool, other, documents)`
    with the same documents. The file goes away at the end.
    """

    def __init__(self, path: Path):
        self.path = path
        self._offsets: dict[int, tuple[int, int]] = {}  # document -> first byte, tokens
        self._dtype: torch.dtype = torch.float32
        self._vocabulary = 0
        self._file: BinaryIO | None = None

    @staticmethod
    def nbytes(documents: Sequence[Encoded], vocabulary: int, width: int) -> int:
        """Bytes the file will take; `width` is that of one logit."""
        return sum(len(document.ids) - 1 for document in documents) * vocabulary * width

    def __enter__(self) -> Spool:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "w+b")
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        self.path.unlink(missing_ok=True)

    @torch.no_grad()
    def record(
        self,
        model: Any,
        documents: Sequence[Encoded],
        on_batch: Callable[[int], None] | None = None,
        batch_tokens: int = BATCH_TOKENS,
        name: str = "the reference",
    ) -> None:
        """Run the model over the documents and write its logits."""
        assert self._file is not None, "a Spool is used in a with block"
        check_documents(documents)
        done = 0
        for batch in batches(documents, batch_tokens):
            for i, rows in zip(batch, logits(model, documents, batch, name), strict=True):
                self._offsets[i] = self._file.tell(), len(rows)
                self._dtype, self._vocabulary = rows.dtype, rows.shape[-1]
                self._file.write(rows.cpu().contiguous().view(torch.uint8).numpy().data)
                done += len(rows)
            if on_batch:
                on_batch(done)
        self._file.flush()

    def logits(self, batch: Sequence[int]) -> list[Tensor]:
        """The recorded logits of each document, (tokens, V)."""
        assert self._file is not None, "a Spool is used in a with block"
        found = []
        for i in batch:
            start, tokens = self._offsets[i]
            self._file.seek(start)
            data = bytearray(self._file.read(tokens * self._vocabulary * self._dtype.itemsize))
            found.append(torch.frombuffer(data, dtype=self._dtype).view(tokens, self._vocabulary))
        return found


def _exp(loss: float) -> float:
    """Perplexity; inf instead of an overflow error."""
    return math.exp(loss) if loss < 700 else math.inf
