"""Log-probabilities of the model before preference training, computed once and kept in a file.

Per pair there are two numbers: the summed log-probability of the chosen and of the rejected completion. The
file's folder is named by a digest of everything the numbers depend on (model, adapter, dtypes, device,
versions), a line by a digest of the pair's tokens; so any run of the same model on the same pairs finds them,
whatever its learning rate or loss. A line is written the moment its pair is done: a killed run loses none.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from moesmith import __version__, console, ranks
from moesmith.config import write_atomically
from moesmith.data.preferences import Pair
from moesmith.errors import UserError

Logps = tuple[float, float]  # of the chosen and of the rejected completion


@dataclass
class ReferenceFacts:
    """Where the reference's log-probabilities came from in this session."""

    mode: str
    """cached or recompute"""
    file: str | None = None
    bytes: int = 0
    pairs: int = 0
    """different ones, held-out ones included"""
    found: int = 0
    """in the file already"""
    computed: int = 0
    tokens: int = 0
    """of the pairs that were computed, prompts included"""
    seconds: float = 0.0

    def facts(self) -> dict[str, Any]:
        """The same for a program."""
        return asdict(self)


class ReferenceCache:
    """One line per pair in FOLDER/KEY/logps.jsonl. Several runs may write at once."""

    def __init__(self, folder: str | Path | None, key: str):
        root = Path(folder).expanduser() if folder else default_folder()
        self.folder = root / key
        self.file = self.folder / "logps.jsonl"

    def read(self) -> dict[str, Logps]:
        """Digest of a pair -> its log-probabilities. A line that a killed run left torn is not there."""
        found: dict[str, Logps] = {}
        if not self.file.exists():
            return found
        for line in self.file.read_bytes().splitlines():
            try:
                entry = json.loads(line)
                values = float(entry["chosen"]), float(entry["rejected"])
                if all(map(math.isfinite, values)):
                    found[str(entry["pair"])] = values
            except (ValueError, KeyError, TypeError):
                continue
        return found

    def describe(self, made_of: Mapping[str, Any]) -> None:
        """Write beside the numbers what they depend on, for people."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if ranks.is_main() and not (self.folder / "key.json").exists():
            write_atomically(self.folder / "key.json", json.dumps(made_of, indent=2, default=str) + "\n")

    def append(self, pair: str, values: Logps) -> None:
        """One more pair, in one write: it is there whole, or torn at the end of the file."""
        line = json.dumps({"pair": pair, "chosen": values[0], "rejected": values[1]}) + "\n"
        descriptor = os.open(self.file, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            torn = size and os.pread(descriptor, 1, size - 1) != b"\n"
            os.write(descriptor, (("\n" if torn else "") + line).encode())
        finally:
            os.close(descriptor)

    @property
    def bytes(self) -> int:
        """Size of the file."""
        return self.file.stat().st_size if self.file.exists() else 0


def default_folder() -> Path:
    """moesmith/reference in the user's cache folder."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "moesmith" / "reference"


def pair_digest(pair: Pair) -> str:
    """Equal for pairs with the same tokens and labels on both sides."""
    parts = (pair.chosen.input_ids, pair.chosen.labels, pair.rejected.input_ids, pair.rejected.labels)
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part.tobytes())
    return digest.hexdigest()[:32]


def reference_key(
    base: Mapping[str, Any], adapter_digest: str | None, model: Any, **settings: Any
) -> tuple[str, dict[str, Any]]:
    """(key, what it is made of): everything that the reference's log-probabilities depend on.

    Args:
        base: from `moesmith.models.checkpoint.base_record`; samples of every tensor, never the whole model.
        adapter_digest: of the adapters that are part of the reference; None without one.
        model: for its implementation of attention and experts.
        settings: dtypes, and where the new adapter sits (another place is another road of the same numbers).
    """
    config = model.config.get_text_config()
    made_of = {
        "base": {key: value for key, value in base.items() if key != "path"},
        "adapter": adapter_digest,
        **settings,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "attention": getattr(config, "_attn_implementation", None),
        "experts": getattr(config, "_experts_implementation", None),
        "versions": {"moesmith": __version__, **{name: version(name) for name in ("torch", "transformers")}},
    }
    text = json.dumps(made_of, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32], made_of


def look_up(
    cache: ReferenceCache,
    pairs: Sequence[Pair],
    compute: Callable[[Pair], Logps],
    quiet: bool = False,
) -> tuple[dict[str, Logps], ReferenceFacts]:
    """The reference's log-probabilities of all pairs: what the file has, the rest computed and added to it.

    Several processes compute a share each.

    Args:
        pairs: from `moesmith.data.preferences`; equal ones are computed once.
        compute: the two log-probabilities of one pair.

    Raises:
        UserError: a number that is not finite; a pair of the file that comes out differently now.
    """
    wanted = {pair_digest(pair): pair for pair in pairs}
    known = ranks.gather(cache.read() if ranks.is_main() else {})[0]  # the same, whoever writes meanwhile
    values = {digest: known[digest] for digest in wanted if digest in known}
    missing = {digest: pair for digest, pair in wanted.items() if digest not in known}
    facts = ReferenceFacts("cached", str(cache.file), cache.bytes, len(wanted), len(values), len(missing))
    _spot_check(cache, wanted, values, compute)
    started = time.monotonic()
    mine = ranks.share(list(missing.items()))
    if missing:
        with console.bar("reference", len(mine)) if not quiet else _silent() as bar:
            for digest, pair in mine:
                values[digest] = compute(pair)
                if not all(map(math.isfinite, values[digest])):
                    raise UserError(
                        f"the model's log-probability of the answers in row {pair.row} is not finite",
                        "a model that cannot read its rows cannot be the reference: look at the row, "
                        "or try train.dtype=float32",
                    )
                cache.append(digest, values[digest])
                facts.tokens += len(pair.chosen) + len(pair.rejected)
                took = max(time.monotonic() - started, 1e-9)
                rate = f"{(bar.done + 1) / took:,.1f} pairs/s · {facts.tokens / took:,.0f} tok/s"
                bar.advance(1, rate)
        parts = ranks.gather(({digest: values[digest] for digest, _ in mine}, facts.tokens))
        facts.tokens = sum(tokens for _, tokens in parts)
        for found, _ in parts:
            values |= found
    facts.seconds, facts.bytes = time.monotonic() - started, cache.bytes
    return values, facts


def look_ahead(cache: ReferenceCache, pairs: Sequence[Pair]) -> ReferenceFacts:
    """What `look_up` would find and compute; nothing is computed, no time and no tokens are counted."""
    wanted = {pair_digest(pair) for pair in pairs}
    found = len(wanted & cache.read().keys())
    return ReferenceFacts("cached", str(cache.file), cache.bytes, len(wanted), found, len(wanted) - found)


SPOT_CHECKS = 2
ROUNDING = (0.5, 0.02)  # nats, and their share of the value, that the same computation may differ by


def differs(found: float, now: float) -> bool:
    """Whether two log-probabilities of one completion cannot be the same computation twice."""
    return abs(found - now) > ROUNDING[0] + ROUNDING[1] * abs(now)


def _spot_check(
    cache: ReferenceCache,
    wanted: Mapping[str, Pair],
    values: Mapping[str, Logps],
    compute: Callable[[Pair], Logps],
) -> None:
    """Compute a few of the pairs that were found once more: the file must be of this model."""
    for digest in _ends(list(values)):
        now = compute(wanted[digest])
        if any(differs(a, b) for a, b in zip(values[digest], now, strict=True)):
            raise UserError(
                f"{cache.file} says {values[digest][0]:.2f} and {values[digest][1]:.2f} of the answers in "
                f"row {wanted[digest].row}, this model says {now[0]:.2f} and {now[1]:.2f}",
                f"the file is of another model: remove {cache.folder} and start again",
            )


def _ends(items: list[str]) -> Iterable[str]:
    """The first and the last."""
    return dict.fromkeys((items[:1] + items[-1:])[:SPOT_CHECKS])


def _silent() -> Any:
    import contextlib

    return contextlib.nullcontext(console.Bar("", None, None))
