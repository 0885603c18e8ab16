"""Evidence that one model can stand in for another: KL, agreement, perplexity and answers on unseen text.

Works for any two models that share a vocabulary: 16-bit, packed, pruned, healed or with an adapter. A is the
reference. Both read the same text; where they do not fit into memory together, they run one after the other
and A's logits wait on disk, exactly. Text that B was made from is refused where B or a profile remembers it.
"""

from __future__ import annotations

import contextlib
import gc
import json
import shlex
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pydantic

import moesmith
from moesmith import console
from moesmith.config import JobConfig, write_atomically
from moesmith.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from moesmith.data.corpora import Document
    from moesmith.eval.canary import Canary
    from moesmith.jobs._pair import Side
    from moesmith.prune.plan import Plan

POSITIONAL = ("a", "b")
JSON = True
EXAMPLE = "moesmith verify Qwen/Qwen3-30B-A3B small/ --corpus code=code.jsonl --corpus math=math.jsonl"
OUT_OF_MEMORY = "lower --batch-tokens or --max-length, or run the models one after the other: --memory apart"

RECORD = "verify.json"


class Config(JobConfig):
    a: str
    """The reference: a model folder, a hub name, or an adapter folder."""
    b: str
    """The model to judge, likewise."""
    corpus: list[str] = []
    """name=path of text that neither model was made from, once per domain: JSONL, Parquet, text files."""
    profile: Path | None = None
    """Folder of a profile: what it held out is the text, without --corpus; what it observed must not be."""
    out: Path = Path("verify")
    """Folder to create: verify.json and report.html."""
    tokens: int = pydantic.Field(20_000, ge=2)
    """Tokens to read of each domain, at most."""
    max_length: int = pydantic.Field(512, ge=8)
    """Longest document in tokens; longer ones are cut into several."""
    canary: int = pydantic.Field(16, ge=0)
    """Prompts that both models answer greedily; 0 for none."""
    new_tokens: int = pydantic.Field(128, ge=1)
    """Longest answer in tokens."""
    batch_tokens: int = pydantic.Field(2048, ge=1)
    """Positions in one forward; logits take this times the vocabulary, once per model."""
    memory: Literal["auto", "together", "apart"] = "auto"
    """Both models in memory at once, or one after the other with A's logits on disk."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Dtype of everything that is not packed; auto takes the checkpoint's."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto uses the GPU if there is one."""
    overwrite: bool = False
    """Replace an earlier output of this command."""


def check(cfg: Config) -> None:
    """Refuse what needs no model to be refused: folders that are not there, a place that is taken."""
    from moesmith.config import no_such_file
    from moesmith.data.corpora import parse_corpora
    from moesmith.jobs._folder import check_place
    from moesmith.models.checkpoint import local_folder

    for model in (cfg.a, cfg.b):
        local_folder(model)
    parse_corpora(cfg.corpus)
    if cfg.profile is not None and not cfg.profile.exists():
        raise no_such_file(cfg.profile, "profile")
    check_place(cfg.out, None, cfg.overwrite, RECORD)


def run(cfg: Config) -> None:
    from moesmith.eval.canary import canary, compare
    from moesmith.eval.divergence import Spool, divergence
    from moesmith.jobs._evidence import report_facts, show, verdict
    from moesmith.jobs._folder import check_place, check_space, finish_folder, start_folder
    from moesmith.jobs._pair import canary_prompts, check_same_words, load, open_side, read_tokenizers
    from moesmith.report import write_report

    started = time.perf_counter()
    if not console.stderr().is_terminal:
        from transformers.utils import logging

        logging.disable_progress_bar()
    a, b = open_side("A", cfg.a), open_side("B", cfg.b)
    for side in (a, b):
        check_place(cfg.out, side.folder, cfg.overwrite, RECORD)
        console.row(side.name, side.line())
    plan = plan_of(b)
    tokenizers = read_tokenizers(a, b)
    documents, origin, notes = read_text(cfg, tokenizers[0])
    check_same_words(a, b, tokenizers, documents)
    leaks = check_leaks(cfg, b, plan, documents)
    say_text(documents, origin, notes, leaks)
    prompts = canary_prompts(tokenizers[0], documents, cfg.canary)

    temporary = start_folder(cfg.out)
    spool = None
    names = ("A", "B")
    with contextlib.ExitStack() as stack:
        if apart(cfg, a, b):
            needed = Spool.nbytes(documents, _vocabulary(a), 4 if cfg.dtype == "float32" else _width(a))
            check_space(cfg.out, needed, "A's logits on this text")
            console.note(f"one after the other: {console.size(needed)} of A's logits wait on disk")
            spool = stack.enter_context(Spool(temporary / "logits.bin"))

        model = load(a, cfg.dtype, cfg.device)
        answers: list[Canary] = []
        if prompts:
            with console.bar("A answers", total=len(prompts)) as bar:
                answers.append(canary(model, tokenizers[0], prompts, cfg.new_tokens, on_batch=bar.update))
        slice_of_a = masked_a(model, plan, a, b, documents)
        reference: Any = model
        total = sum(len(document.ids) - 1 for document in documents)
        if spool is not None:
            with console.bar("A reads", total=total) as bar:
                spool.record(model, documents, bar.update, cfg.batch_tokens, "A")
            reference = spool
        del model
        if spool is not None:
            gc.collect()

        model = load(b, cfg.dtype, cfg.device)
        with console.bar("B reads" if spool else "both read", total=total) as bar:
            found = divergence(reference, model, documents, bar.update, cfg.batch_tokens, names)
        if prompts:
            with console.bar("B answers", total=len(prompts)) as bar:
                answers.append(canary(model, tokenizers[1], prompts, cfg.new_tokens, on_batch=bar.update))
        sliced = compare_slice(model, slice_of_a, documents)
        del reference, model

    measured = found.facts()
    compared = compare(answers[0], answers[1]) if answers else None
    level, sentence, points = verdict(measured, compared)
    points += chosen_here(cfg, plan)
    facts = {
        "command": "verify",
        "verdict": {"level": level, "sentence": sentence, "points": points},
        "a": a.facts(),
        "b": b.facts(),
        "text": {"origin": origin, "leak_check": leaks},
        "divergence": measured,
        "canary": compared,
        "mask_equals_slice": sliced,
        "config": cfg.model_dump(mode="json"),
        "how": how(cfg, a, b, documents),
        "seconds": round(time.perf_counter() - started, 1),
    }
    write_atomically(
        temporary / RECORD, json.dumps({**facts, "canaries": _answers(answers)}, indent=1) + "\n"
    )
    report = write_report(temporary, report_facts(facts))
    finish_folder(temporary, cfg.out)

    show(facts)
    console.row("written", f"{cfg.out}/{RECORD}, {cfg.out / report.name}")
    console.next_command(*following(level, cfg, a, b, plan))
    console.emit({"out": str(cfg.out), "report": str(cfg.out / report.name), **facts})


# ---------------------------------------------------------------- text


def read_text(cfg: Config, tokenizer: Any) -> tuple[list[Document], str, list[str]]:
    """The documents both models read, where they come from, and what was left out of them, in words."""
    from moesmith.data.corpora import describe, encode, parse_corpora, read_documents, read_held_out
    from moesmith.jobs._pair import check_ids, first_tokens, shipped_documents

    notes: list[str] = []
    if cfg.corpus:
        corpora = parse_corpora(cfg.corpus)
        documents, _, counts = read_documents(corpora, tokenizer, cfg.max_length, cfg.tokens)
        notes += describe(counts, console.count)
        origin = ", ".join(f"{name}={path}" for name, path in corpora.items())
    elif cfg.profile is not None:
        documents = read_held_out(cfg.profile)
        check_ids(tokenizer, documents, cfg.profile)
        for document, encoded in zip(documents, encode(tokenizer, documents), strict=True):
            document.ids = encoded.ids
        origin = f"held out by {cfg.profile}"
    else:
        documents = shipped_documents(tokenizer, cfg.max_length)
        origin = "text that comes with Python and reasoning-gym"
    found = len(documents)
    documents = first_tokens([d for d in documents if len(d.ids) > 1], cfg.tokens)
    if not documents:
        raise UserError(f"no text to compare on: {origin}", "give --corpus name=path")
    if len(documents) < found:
        notes.append(f"{found - len(documents)} more were not read: --tokens {cfg.tokens} per domain")
    return documents, origin, notes


def plan_of(side: Side) -> Plan | None:
    """What `prune` wrote beside a model; None if it did not come from there."""
    from moesmith.prune.plan import FILE, Plan

    return Plan.read(side.folder) if (side.folder / FILE).is_file() else None


def chosen_here(cfg: Config, plan: Plan | None) -> list[str]:
    """That B's experts were chosen on the very text it is judged on, where `prune` wrote that down."""
    selected = None if plan is None else plan.meta.get("selected")
    if plan is None or selected is None or cfg.corpus or cfg.profile is None:
        return []
    folder = (plan.meta.get("profile") or {}).get("folder")
    return [selected] if folder and Path(folder).resolve() == cfg.profile.resolve() else []


def check_leaks(
    cfg: Config, b: Side, plan: Plan | None, documents: Sequence[Document]
) -> dict[str, Any] | None:
    """Compare the text with the calibration text that B was made by, where that is known.

    Returns:
        what was compared; None where nothing remembers a calibration text.

    Raises:
        UserError: they share passages.
    """
    from moesmith.data import leaks

    places = [cfg.profile, b.folder, b.adapter]
    remembered = (plan.meta.get("profile") or {}).get("folder") if plan is not None else None
    if remembered:
        places.append(Path(remembered))
    known = [
        place for place in dict.fromkeys(places) if place is not None and (place / leaks.NGRAMS).is_file()
    ]
    if remembered and not any(place in (b.folder, Path(remembered)) for place in known):
        console.warn(
            f"{b.given} was cut by the profile {remembered}, which is not here: whether this text was in"
            " it cannot be checked"
        )
    if not known:
        return None
    compared = [leaks.check_disjoint(leaks.read(place), documents) for place in known]
    return {"against": ", ".join(map(str, known)), **max(compared, key=lambda counts: counts["shared"])}


def say_text(
    documents: Sequence[Document], origin: str, notes: Sequence[str], leaks: dict[str, Any] | None
) -> None:
    """What is read, on the terminal."""
    tokens = sum(len(document.ids) - 1 for document in documents)
    console.row("text", f"{len(documents)} documents, {console.count(tokens)} tokens: {origin}")
    for note in notes:
        console.row("", note)
    if leaks is not None:
        shared = f"{leaks['shared']:,} of {leaks['ngrams']:,} runs of 13 words are in the calibration text"
        console.row("", f"{shared} ({leaks['against']}): no leak")


# ---------------------------------------------------------------- memory


def apart(cfg: Config, a: Side, b: Side) -> bool:
    """Whether the models have to run one after the other."""
    from moesmith.jobs._pair import free_memory

    if cfg.memory != "auto":
        return cfg.memory == "apart"
    wider = 2 if cfg.dtype == "float32" else 1
    weights = wider * (a.nbytes + b.nbytes)
    logits = 2 * cfg.batch_tokens * _vocabulary(a) * 4
    return 1.1 * weights + logits > 0.9 * free_memory(cfg.device)


def _vocabulary(side: Side) -> int:
    config = side.checkpoint.config
    return int(config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size") or 0)


def _width(side: Side) -> int:
    """Bytes of one logit: models compute them in the dtype of their embeddings."""
    return 4 if side.storage.endswith("f32") else 2


# ---------------------------------------------------------------- mask == slice


def masked_a(model: Any, plan: Plan | None, a: Side, b: Side, documents: Sequence[Document]) -> Tensor | None:
    """Logits of A without the experts that B lost, (tokens, V); None unless B is to be A cut by a plan.

    A packed B is compared with a packed A only: otherwise what packing costs would be in the difference.
    """
    from moesmith.jobs._cut import masked_logits
    from moesmith.models.layers import moe_layers

    if plan is None or plan.merge is not None or a.adapter is not None or b.adapter is not None:
        return None
    if a.checkpoint.quantization != b.checkpoint.quantization:
        return None
    experts = {layer.name: layer.num_experts for layer in moe_layers(model)}
    if any(experts.get(name) != count for name, count in plan.num_experts.items()):
        return None
    return masked_logits(model, plan.keep, slice_ids(documents))


def compare_slice(model: Any, wanted: Tensor | None, documents: Sequence[Document]) -> dict[str, Any] | None:
    """B's logits against those of A with a masked router; equal means within what `prune` calls rounding."""
    import torch

    from moesmith.experts.forward import use_experts_function
    from moesmith.jobs._cut import PARITY

    if wanted is None:
        return None
    ids = torch.tensor([slice_ids(documents)], device=model.device)
    with torch.no_grad(), use_experts_function(model):
        got = model(input_ids=ids, use_cache=False).logits[0].float().cpu()
    difference = (got - wanted).abs().amax(-1)
    median, worst = float(difference.median()), float(difference.max())
    scale = float(wanted.abs().max())
    width = str(model.dtype).removeprefix("torch.")
    median_limit, worst_limit = PARITY.get(width, PARITY["bfloat16"])
    return {
        "tokens": len(got),
        "max_difference": worst,
        "median_difference": median,
        "largest_logit": scale,
        "equal": median <= median_limit * scale and worst <= worst_limit * scale,
    }


def slice_ids(documents: Sequence[Document]) -> list[int]:
    """The start of the longest document."""
    from moesmith.jobs._cut import PARITY_TOKENS

    return max(documents, key=lambda document: len(document.ids)).ids[:PARITY_TOKENS]


# ---------------------------------------------------------------- for the record, and what comes next


def how(cfg: Config, a: Side, b: Side, documents: Sequence[Document]) -> dict[str, Any]:
    """How it was measured, for the record."""
    import platform

    import torch

    from moesmith.data.corpora import corpus_hash
    from moesmith.eval.bootstrap import ROUNDS, SEED
    from moesmith.jobs._pair import on_gpu
    from moesmith.models.identity import model_hash

    machine = f"{platform.machine()}, {torch.get_num_threads()} threads"
    if on_gpu(cfg.device):
        machine = torch.cuda.get_device_name()
    return {
        "command": command(cfg),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {
            "moesmith": moesmith.__version__,
            **{name: metadata.version(name) for name in ("torch", "transformers")},
        },
        "machine": machine,
        "model_hash": {side.name: model_hash(side.folder) for side in (a, b)},
        "corpus_hash": corpus_hash(documents),
        "seed": SEED,
        "intervals": f"95 %, percentile bootstrap over documents, {ROUNDS} rounds",
    }


def command(cfg: Config) -> str:
    """The command line that these options are."""
    words = ["moesmith", "verify", cfg.a, cfg.b]
    for name in type(cfg).model_fields:
        value = getattr(cfg, name)
        if name in POSITIONAL or name not in cfg.model_fields_set or value is None:
            continue
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words += [flag] if value else []
            continue
        for item in value if isinstance(value, list) else [value]:
            words += [flag, str(item)]
    return shlex.join(words)


def _answers(answers: Sequence[Any]) -> dict[str, Any]:
    return {name: answer.facts() for name, answer in zip("ab", answers, strict=False)}


def following(level: str, cfg: Config, a: Side, b: Side, plan: Plan | None) -> list[str]:
    """What to run next."""
    talk = f"moesmith chat --adapter {cfg.b}" if b.adapter is not None else f"moesmith chat {cfg.b}"
    if level != "safe" and plan is not None:
        return [f"moesmith heal {cfg.b} --teacher {cfg.a}", talk]
    return [talk]
