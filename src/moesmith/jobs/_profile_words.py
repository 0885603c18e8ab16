"""What a profile says: on the terminal, in its own record, and on its report page."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesmith import console

if TYPE_CHECKING:
    from moesmith.data.corpora import Counts, Document
    from moesmith.jobs.profile import Config
    from moesmith.prune.stats import Profile


def meta(cfg: Config, folder: Path, about: dict[str, str], facts: dict[str, Any]) -> dict[str, Any]:
    """What a profile says about where its numbers come from."""
    import moesmith
    from moesmith.models.checkpoint import local_folder

    return {
        "model": str(folder.resolve()) if local_folder(cfg.model) is not None else cfg.model,
        **about,
        "settings": cfg.model_dump(mode="json"),
        "moesmith": moesmith.__version__,
        "versions": versions(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **facts,
    }


def versions() -> dict[str, str]:
    """Of the libraries that compute the numbers."""
    return {name: metadata.version(name) for name in ("torch", "transformers", "safetensors")}


def side_facts(documents: Sequence[Document]) -> dict[str, Any]:
    """Documents and tokens of one side, in all and per domain."""
    tokens: Counter[str] = Counter()
    number: Counter[str] = Counter()
    for document in documents:
        tokens[document.domain] += len(document.ids)
        number[document.domain] += 1
    return {
        "documents": len(documents),
        "tokens": sum(tokens.values()),
        "by_domain": {name: {"documents": number[name], "tokens": tokens[name]} for name in number},
    }


def say_text(counts: dict[str, Counts]) -> None:
    """What was read, domain by domain."""
    from moesmith.data.corpora import describe

    for i, line in enumerate(describe(counts, console.count)):
        console.row("" if i else "text", line)


def say_profile(profile: Profile, cfg: Config, facts: dict[str, Any]) -> None:
    """Counts, coverage, what stands out, the report and what to do next."""
    from moesmith.prune.summary import profile_facts
    from moesmith.report import write_report

    summary = profile_facts(profile, seed=cfg.seed)
    tokens, seconds = facts["tokens"], facts["seconds"]["replay"]
    held_out = facts["held_out"]
    console.row(
        "observed",
        f"{len(profile.documents):,} documents, {tokens:,} tokens in {len(profile.domains)} domains · "
        f"{console.duration(seconds)}, {tokens / max(seconds, 1e-9):,.0f} tok/s · "
        f"peak {console.size(facts['peak_bytes'])}",
    )
    dropped = len(facts["held_out_dropped"])
    alike = f" · {dropped:,} more share passages with the observed text and are left out" if dropped else ""
    console.row(
        "held out", f"{held_out['documents']:,} documents, {held_out['tokens']:,} tokens, not observed{alike}"
    )
    for domain in profile.domains:
        if domain not in held_out["by_domain"] and cfg.held_out:
            console.warn(f"{domain} has nothing held out: no cut can be judged on it")
    say_experts(summary)
    report = write_report(cfg.out, report_facts(profile, cfg, facts, summary))
    console.row("written", f"{cfg.out} · report: {report}")
    model, out = shlex.quote(cfg.model), shlex.quote(str(cfg.out))
    console.next_command(
        f"moesmith prune {model} --profile {out} --retain 99% --out small",
        f"moesmith compare {model} --profile {out}",
    )
    console.emit({"out": str(cfg.out), "report": str(report), **profile.meta, **summary})


def say_experts(summary: dict[str, Any]) -> None:
    """Coverage, dead experts and concentration, and a warning where the text was too little."""
    reliability, concentration = summary["reliability"], summary["concentration"]
    per_expert = reliability["tokens_per_expert"]
    dead = sum(map(len, concentration["dead"]))
    console.row(
        "experts",
        f"fewest tokens for one: {per_expert['min']:,} (layer {per_expert['layer']}, expert "
        f"{per_expert['expert']}), median {per_expert['median']:,} · {dead} never used",
    )
    needed = concentration["experts_for"]
    console.row(
        "",
        f"99 % of the contribution comes from {_span(needed['99'])} experts of a layer, "
        f"80 % from {_span(needed['80'])}",
    )
    halves = [value for value in reliability["split_half"] if value is not None]
    if halves:
        console.row(
            "", f"two halves of the text rank them alike: {min(halves):.2f}-{max(halves):.2f} (Spearman)"
        )
    if reliability["warning"]:
        console.warn(reliability["warning"])


def _span(counts: list[int]) -> str:
    """[6, 13, 9] -> 6-13"""
    low, high = min(counts), max(counts)
    return f"{low}-{high}" if low < high else str(low)


def report_facts(
    profile: Profile, cfg: Config, facts: dict[str, Any], summary: dict[str, Any]
) -> dict[str, Any]:
    """The page of a profile: what was measured, and how."""
    layer = profile.layers[0]
    warning = summary["reliability"]["warning"]
    dead = sum(map(len, summary["concentration"]["dead"]))
    needed = summary["concentration"]["experts_for"]["99"]
    sentence = (
        f"99 % of what the experts add comes from {max(needed)} of {layer.num_experts} experts "
        "in the layer that needs most"
    )
    points = [
        f"{facts['tokens']:,} tokens of {len(profile.documents):,} documents in {len(profile.domains)} "
        f"domains were observed, {facts['held_out']['tokens']:,} tokens are held out",
        f"{dead} experts were never used" if dead else "every expert was used",
        "what removing experts costs is not on this page: `moesmith compare` measures it on held-out text",
    ]
    return {
        "title": Path(profile.meta["model"]).name,
        "subtitle": f"{len(profile.layers)} layers × {layer.num_experts} experts, top-{layer.top_k}",
        "verdict": {
            "level": "caution" if warning else "info",
            "sentence": sentence,
            "points": [*([warning] if warning else []), *points],
        },
        **summary,
        "how": {
            "command": command(cfg),
            "date": profile.meta["date"],
            "versions": {"moesmith": profile.meta["moesmith"], **profile.meta["versions"]},
            "model_hash": profile.meta["model_hash"],
            "corpus_hash": profile.meta["corpus_hash"],
            "seed": cfg.seed,
        },
    }


def command(cfg: Config) -> str:
    """The command line that makes this profile."""
    words = ["moesmith", "profile", cfg.model]
    for name in type(cfg).model_fields:
        value = getattr(cfg, name)
        if name == "model" or value == type(cfg).model_fields[name].get_default(call_default_factory=True):
            continue
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            for item in value if isinstance(value, list) else [value]:
                words += [f"--{flag}", str(item)]
    return shlex.join(words)
