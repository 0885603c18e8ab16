"""Around an export: what is exported, whether it may be, the folder it goes to, and what is said of parity.

The folder is written as `<out>.tmp` and named at the end, after parity; whatever fails or is stopped before
leaves nothing, and the next run clears away what a killed one left.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import moesmith
from moesmith import console
from moesmith.config import write_atomically
from moesmith.errors import UserError

if TYPE_CHECKING:
    from moesmith.export.parity import Logprobs, Parity, Tolerance
    from moesmith.jobs._export_ask import Prompts, Said
    from moesmith.models.checkpoint import Checkpoint

PARITY = "parity.json"
OUTTYPES = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}

# bits per weight that a quantisation takes at most, for the space check only
BITS = {"f32": 32, "f16": 16, "bf16": 16, "8": 9, "6": 7, "5": 6.2, "4": 5.4, "3": 4.6, "2": 3.8, "1": 3}


@dataclass
class Source:
    """A model folder and the adapters on it."""

    given: str
    """as the user or the adapter names it"""
    folder: Path
    checkpoint: Checkpoint
    adapters: list[Path]
    base: dict[str, Any] | None
    """what the first adapter's record says about its base"""

    @property
    def packed(self) -> bool:
        return self.checkpoint.is_packed

    @property
    def scheme(self) -> str | None:
        return (self.checkpoint.quantization or {}).get("scheme")

    @property
    def plain(self) -> bool:
        """Whether the folder can be converted as it is: 16-bit weights and nothing to add."""
        return not self.packed and not self.adapters

    def words(self) -> str:
        """demo/packed (nf4) with sft/best"""
        name = f"{short(self.folder)} ({self.scheme or 'not packed'})"
        return " with ".join([name, *([" + ".join(map(short, self.adapters))] if self.adapters else [])])

    def facts(self) -> dict[str, Any]:
        """For the record: where it is, and hashes that tell it from another."""
        from moesmith.jobs.eval import adapter_digest
        from moesmith.models.identity import model_hash

        return {
            "source": {
                "path": str(self.folder.resolve()),
                "given": self.given,
                "hash": model_hash(self.folder),
                "scheme": self.scheme,
                "bytes": self.checkpoint.nbytes,
            },
            "adapters": [
                {"path": str(one.resolve()), "digest": adapter_digest(one)} for one in self.adapters
            ],
        }


def short(path: Path) -> str:
    """The last two parts of a path."""
    return "/".join(path.resolve().parts[-2:])


def open_source(model: str | None, adapters: Sequence[Path], action: str) -> Source:
    """Find model and adapters, and refuse what cannot be exported.

    Raises:
        UserError: no model named, adapters of different bases, a base that the adapter was not trained on, a
            model that somebody else quantised.
    """
    from moesmith.jobs.chat import recorded_base
    from moesmith.models.checkpoint import Checkpoint, check_architecture, resolve

    bases = [recorded_base(adapter) for adapter in adapters]
    base = next((one for one in bases if one), None)
    prints = {one["fingerprint"] for one in bases if one and one.get("fingerprint")}
    if len(prints) > 1:
        raise UserError(
            "the adapters were trained on different bases: "
            + ", ".join(str(one["path"]) for one in bases if one),
            "adapters that belong together name the same base",
        )
    given = model or (base or {}).get("path")
    if given is None:
        raise UserError(
            "missing MODEL", f"moesmith export {action} MODEL, or --adapter with a folder that names its base"
        )
    folder = resolve(given)
    checkpoint = Checkpoint.open(folder)
    check_architecture(checkpoint.config)
    if checkpoint.quantization is not None and not checkpoint.is_packed:
        method = checkpoint.quantization.get("quant_method", "an unnamed method")
        raise UserError(
            f"{given} is quantised with {method}",
            "export starts from 16-bit weights, or from what moesmith packed",
        )
    source = Source(given, folder, checkpoint, list(adapters), base)
    if model is not None and adapters:
        check_base(source)
    return source


def check_base(source: Source) -> None:
    """Raise UserError if the adapter was trained on another model; say it where it was on a packed copy."""
    from moesmith.models.checkpoint import fingerprint
    from moesmith.models.identity import router_hash

    base, adapter = source.base, source.adapters[0]
    if base is None or not base.get("fingerprint"):
        console.warn(f"{adapter} does not say which model it was trained on: nothing checks that it fits")
        return
    trained_on = Path(str(base.get("path")))
    if source.packed:
        if fingerprint(source.folder) != base["fingerprint"]:
            raise UserError(
                f"{adapter} was trained on another base than {source.given}",
                f"its base: {base['path']}; leave MODEL out to use that",
            )
        return
    if (trained_on / "config.json").is_file() and trained_on.resolve() != source.folder.resolve():
        experts = expert_counts(source.checkpoint.config)
        hashes = {router_hash(folder, experts) for folder in (source.folder, trained_on)}
        if len(hashes) > 1:
            raise UserError(
                f"{source.given} has other routers than {trained_on}, which {adapter} was trained on",
                "give the model that was packed, or leave MODEL out",
            )
    if base.get("scheme") not in (None, "none", "bf16", "fp16"):
        console.note(
            f"{short(adapter)} was trained over {base.get('scheme')}; here it goes onto the 16-bit weights: "
            "leave MODEL out to export exactly what was trained"
        )


def expert_counts(config: dict[str, Any]) -> list[int]:
    """Every number in the config that may be the count of experts."""
    text = config.get("text_config") or config
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    found = [text[name] for name in names if isinstance(text.get(name), (int, list))]
    return [n for one in found for n in (one if isinstance(one, list) else [one])]


def read_tokenizer(source: Source) -> Any | None:
    """The tokenizer that goes with the export: the adapter's if it brings one. None if there is none."""
    from transformers import AutoTokenizer

    from moesmith.models.checkpoint import has_tokenizer

    for folder in (*reversed(source.adapters), source.folder):
        if has_tokenizer(folder):
            return AutoTokenizer.from_pretrained(folder)
    return None


def quant_bytes(wide: int, kind: str, width: int = 2) -> int:
    """At most how many bytes a quantisation of `wide` bytes of `width`-byte weights takes."""
    kind = kind.lower()
    bits = BITS.get(kind) or BITS[next((letter for letter in kind if letter in BITS), "8")]
    return int(wide / width / 8 * bits)


# ---------------------------------------------------------------- the folder


@contextmanager
def making(out: Path) -> Iterator[Path]:
    """The folder to write into; it gets its name when the body ends, and is removed when that fails."""
    from moesmith.jobs._folder import finish_folder, start_folder

    temporary = start_folder(out)
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finish_folder(temporary, out)


def record_of(cfg: Any, source: Source) -> dict[str, Any]:
    """What moesmith.json says of every export."""
    names = ("torch", "transformers", "peft", "safetensors")
    return {
        "command": "export",
        "action": cfg.action,
        "config": cfg.model_dump(mode="json"),
        "versions": {name: metadata.version(name) for name in names},
        "moesmith": moesmith.__version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **source.facts(),
    }


def write_record(folder: Path, record: dict[str, Any], around: Mapping[str, Any] | None = None) -> None:
    """moesmith.json and parity.json.

    Args:
        around: another record that this one goes into, under "export".
    """
    from moesmith.models.checkpoint import RECORD

    whole = record if around is None else {**around, "export": record}
    write_atomically(folder / RECORD, json.dumps(whole, indent=2) + "\n")
    proof = {"prompts": record.get("prompts"), "parity": record.get("parity"), "date": record["date"]}
    write_atomically(folder / PARITY, json.dumps(proof, indent=2) + "\n")


def bytes_of(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


# ---------------------------------------------------------------- parity, judged and said


@dataclass
class Judged:
    """One comparison and what is accepted of it."""

    route: str
    against: str
    """what it was compared with"""
    parity: Parity
    bounds: Tolerance
    effect: Parity | None
    """how far the adapter itself moves the source"""
    own: Parity | None = None
    """how far computing in 16 bits moves the source itself"""
    seconds: float = 0.0

    def facts(self) -> dict[str, Any]:
        """For the record."""
        bounds = {key: None if value == float("inf") else value for key, value in asdict(self.bounds).items()}
        return {
            "route": self.route,
            "against": self.against,
            "parity": self.parity.facts(),
            "effect": self.effect.facts() if self.effect is not None else None,
            "own": self.own.facts() if self.own is not None else None,
            "bounds": bounds,
            "seconds": round(self.seconds, 2),
        }


def judge(
    route: str,
    against: str,
    source: Said,
    export: Sequence[Logprobs],
    prompts: Prompts,
    mean: float | None,
    seconds: float = 0.0,
    bounds_of: str | None = None,
    dtype: str = "float32",
    own: Parity | None = None,
) -> Judged:
    """Compare, say it, and refuse what is out of bounds.

    Args:
        source, export: what was said after the same prompts.
        mean: the user's own bound.
        bounds_of: the row of the table, where it is not called like the route.
        dtype: what `source.rounded` was computed in.
        own: how far that moved the model, where `source` does not say; not said again.

    Raises:
        UserError: out of bounds, or an adapter that did not arrive.
    """
    from moesmith.export.parity import compare, lost, tolerance

    bounds = tolerance(bounds_of or route, mean)
    effect = compare(source.full, source.bare) if source.bare is not None else None
    measured = compare(source.full, source.rounded) if source.rounded is not None else None
    scale = measured or own
    if scale is not None and mean is None:
        bounds = bounds.widened(scale, dtype)
    judged = Judged(route, against, compare(source.full, export), bounds, effect, measured, seconds)
    say_judged(judged, dtype)
    parity = judged.parity
    if effect is not None and lost(parity, effect, bounds):
        raise UserError(
            f"{route}: the adapter is not in the export: it differs from the source by {parity.mean:.3g} on "
            f"average, and the adapter itself changes {effect.mean:.3g}",
            "nothing was kept; if the adapter is very small, --dtype float32 keeps it",
        )
    beyond = bounds.beyond(parity)
    if beyond:
        text = prompts.texts[parity.worst].replace("\n", " ")
        raise UserError(
            f"{route} differs from {against}: {'; '.join(beyond)}",
            f"nothing was kept; worst on: {text[:80]!r}\n"
            f"the bounds: {bounds.reason}; --tolerance MEAN accepts a larger mean difference",
        )
    return judged


def say_judged(judged: Judged, dtype: str) -> None:
    """One comparison in a line, and what the adapter does in another."""
    parity, effect = judged.parity, judged.effect
    same = round(parity.agreement * parity.prompts)
    console.row(
        "parity",
        f"{judged.route} against {judged.against}: mean {parity.mean:.2g}, largest {parity.max:.2g}, "
        f"KL {parity.kl:.2g} · same first token {same} of {parity.prompts}",
    )
    if parity.missing:
        console.row("", f"{parity.missing:,} of {parity.tokens:,} tokens were not reported")
    if judged.own is not None:
        own = judged.own
        console.row(
            "",
            f"for scale, the source computed in {dtype} against itself in 32 bits: mean {own.mean:.2g}, "
            f"largest {own.max:.2g}, KL {own.kl:.2g}",
        )
    if effect is not None:
        if effect.mean > judged.bounds.mean:
            console.row("", f"without the adapter it would be {effect.mean:.2g} on average")
        else:
            console.row(
                "",
                f"the adapter itself changes {effect.mean:.2g} on average: too little for parity to show it",
            )


def say_merged(merged: Any, adapters: bool) -> None:
    """What merging changed, placement by placement; refuses a merge that left something out.

    Raises:
        UserError: nothing changed, or rounding left targeted tensors as they were.
    """
    if adapters:
        parts = [
            f"{place} {merged.changed.get(place, 0):,} of {count:,}"
            for place, count in merged.targeted.items()
        ]
        console.row("merge", "tensors changed: " + ", ".join(parts))
        if merged.zero:
            console.warn(f"{len(merged.zero):,} places have a zero update (B is zero): {merged.zero[0]} ...")
        if merged.unchanged:
            raise UserError(
                f"{len(merged.unchanged):,} updates are too small for this dtype: every bit of "
                f"{merged.unchanged[0]} stayed as it was",
                "--dtype float32 keeps them",
            )
        if not any(merged.changed.values()):
            raise UserError("the adapter changes nothing: its update is zero everywhere", "train it first")
    if merged.left:
        console.warn(
            f"{len(merged.left):,} tensors of the source are left out, as transformers loads none of them "
            f"(heads for later tokens, mostly): {merged.left[0]} ..."
        )
    console.row(
        "weights" if adapters else "merge",
        f"{merged.tensors:,} tensors, {console.size(merged.bytes)} in {merged.shards:,} "
        f"file{'s' if merged.shards != 1 else ''} · at most {console.size(merged.layer_bytes)} of a layer in "
        "memory",
    )
