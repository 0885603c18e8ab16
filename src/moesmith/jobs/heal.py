"""Train a pruned model to answer like the model it was cut from; kept only if that is measurably so.

First the routers alone, then LoRA on experts and attention, both by distillation: the teacher reads
the training text once, then leaves memory. Each stage is accepted only if the divergence from the teacher
falls on text that was not trained on, and the answers to the canary's prompts get no worse; otherwise it is
reverted and the reason is said. A stopped run goes on where it was.
"""

from __future__ import annotations

import gc
import json
import shlex
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pydantic

import moesmith
from moesmith import console
from moesmith.config import JobConfig, write_atomically
from moesmith.errors import UserError
from moesmith.train.settings import LoraSettings, Placement, RunSettings, TrainSettings

if TYPE_CHECKING:
    from moesmith.data.corpora import Document
    from moesmith.data.masks import Example
    from moesmith.eval.canary import Canary
    from moesmith.eval.divergence import Divergence, Spool
    from moesmith.jobs._pair import Side
    from moesmith.train.distill import Teacher

POSITIONAL = ("pruned",)
JSON = True
EXAMPLE = "moesmith heal small/ --teacher Qwen/Qwen3-30B-A3B --profile prof/ --out healed/"
OUT_OF_MEMORY = "heal a packed copy (moesmith quantize), lower --max-length, or --stages router"

RECORD = "heal.json"
DEV_EVERY = 10  # one training document in ten chooses the best step; the held-out text only judges
ROUTER_RMS = 0.02  # of a usual router's weights: the router's updates are scaled with its own against this


class Stage(TrainSettings):
    """One stage of training."""

    epochs: float = pydantic.Field(2, gt=0)
    """Passes over the text."""
    grad_accum: int = pydantic.Field(4, ge=1)
    """Documents per optimizer step, with batch_size 1."""
    r: int = pydantic.Field(16, ge=1)
    """Rank of the adapter that is trained, and merged where weights are not packed."""
    alpha: float = pydantic.Field(32, gt=0)
    """The update is scaled by alpha / r."""


class RouterStage(Stage):
    """Routers alone."""

    lr: float = pydantic.Field(1e-3, gt=0)
    """Highest learning rate."""


class LoraStage(Stage):
    """Experts and attention."""

    lr: float = pydantic.Field(1e-4, gt=0)
    """Highest learning rate."""
    targets: list[Placement] = ["experts", "attention"]
    """Any of experts, attention, router, shared_experts, dense_mlp."""


class Config(JobConfig):
    pruned: str
    """The smaller model: a folder, 16-bit or packed."""
    teacher: str
    """The model it was cut from: a folder or hub name, 16-bit or packed."""
    profile: Path | None = None
    """Folder of a profile: its calibration text is trained on, its held-out text judges."""
    corpus: list[str] = []
    """name=path of text to train on instead, once per domain; a fifth of it is held out to judge."""
    out: Path
    """Folder to create."""
    stages: list[Literal["router", "lora"]] = ["router", "lora"]
    """What to train, in this order."""
    router: RouterStage = RouterStage()
    lora: LoraStage = LoraStage()
    tokens: int = pydantic.Field(100_000, ge=64)
    """Tokens of text to train on, at most."""
    judge_tokens: int = pydantic.Field(20_000, ge=2)
    """Tokens of held-out text to judge on, at most."""
    max_length: int = pydantic.Field(512, ge=16)
    """Longest document in tokens."""
    kept: int = pydantic.Field(64, ge=1)
    """The teacher's likeliest tokens that the loss compares one by one."""
    canary: int = pydantic.Field(16, ge=0)
    """Prompts answered before and after; 0 for none."""
    new_tokens: int = pydantic.Field(128, ge=1)
    """Longest of these answers in tokens."""
    batch_tokens: int = pydantic.Field(2048, ge=1)
    """Positions in one forward while judging."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto uses the GPU if there is one."""
    seed: int = 0
    """Of the adapters' first weights and the order of documents."""
    overwrite: bool = False
    """Replace an earlier output of this command, and start anew instead of going on."""


def check(cfg: Config) -> None:
    """Refuse what needs no model to be refused."""
    if (cfg.profile is None) == (not cfg.corpus):
        raise UserError("text to train on: give either --profile or --corpus")
    if cfg.stages not in (["router"], ["lora"], ["router", "lora"]):
        raise UserError(
            f"stages={','.join(cfg.stages) or 'none'}: wanted router, lora, or router,lora in this order"
        )


@dataclass
class Measured:
    """One model judged against the teacher."""

    divergence: Divergence
    canary: Canary | None

    def line(self) -> str:
        """KL, agreement and perplexity in words."""
        facts = self.divergence.facts()
        kl, ppl = facts["kl"], facts["ppl"]["overall"]
        ci = f" [{kl['ci'][0]:.4f}, {kl['ci'][1]:.4f}]" if kl["ci"] else ""
        return (
            f"KL {kl['mean']:.4f}{ci} · top-1 agreement {100 * facts['top1']['rate']:.1f} % · "
            f"perplexity ×{ppl['ratio']:.3f}"
        )


def run(cfg: Config) -> None:
    from moesmith.eval.divergence import Spool
    from moesmith.jobs._cut import no_room
    from moesmith.jobs._folder import check_place, check_space
    from moesmith.jobs._pair import canary_prompts, check_same_words, open_side, read_tokenizers
    from moesmith.train.distill import Teacher

    started = time.perf_counter()
    if not console.stderr().is_terminal:
        from transformers.utils import logging

        logging.disable_progress_bar()
    teacher, pruned = open_side("teacher", cfg.teacher), open_side("pruned", cfg.pruned)
    teacher.name, pruned.name = "A", "B"
    if pruned.adapter is not None or teacher.adapter is not None:
        raise UserError("heal works on model folders, not on adapters")
    check_place(cfg.out, pruned.folder, cfg.overwrite, RECORD)
    console.row("teacher", teacher.line())
    console.row("pruned", pruned.line())
    for side in (teacher, pruned):
        reason = no_room(side.nbytes, cfg.device)
        if reason:
            raise UserError(f"{side.given}: {reason}", OUT_OF_MEMORY)
    tokenizers = read_tokenizers(teacher, pruned)
    tokenizer = tokenizers[0]
    learned, judged = read_text(cfg, tokenizer, teacher)
    check_same_words(teacher, pruned, tokenizers, judged)
    train, dev = examples(learned)
    console.row(
        "text",
        f"{sum(map(len, train)):,} tokens to learn from, {sum(map(len, dev)):,} to choose the best step, "
        f"{sum(len(d.ids) for d in judged):,} held out to judge",
    )
    prompts = canary_prompts(tokenizer, judged, cfg.canary)

    work = start_work(cfg)
    said = Teacher(work / "teacher")
    said_bytes = Spool.nbytes(judged, vocabulary(teacher), 4)
    check_space(work, pruned.nbytes + said_bytes, "the healed model, and the teacher's logits meanwhile,")
    with Spool(work / "logits.bin") as spool:
        reference = teach(cfg, teacher, said, [*train, *dev], judged, prompts, tokenizer, spool)
        judge = Judge(cfg, tokenizer, judged, prompts, spool)
        before = judge.measure(load(pruned, cfg, ()))
        console.row("before", before.line())
        current, stages = before, []
        accepted: list[Path] = []
        for name in cfg.stages:
            adapter = train_stage(cfg, name, pruned, accepted, said, train, dev, tokenizer, work)
            if adapter is None:
                after, decision = current, nothing_gained(name, current)
            else:
                after = judge.measure(load(pruned, cfg, (*accepted, adapter)))
                decision = decide(name, current, after)
                console.row(name, after.line())
            stages.append(decision)
            console.row("" if adapter else name, said_of(decision))
            if adapter and decision["accepted"]:
                accepted.append(adapter)
                current = after
    facts = {
        "command": "heal",
        "accepted": [d["stage"] for d in stages if d["accepted"]],
        "stages": stages,
        "teacher": teacher.facts(),
        "pruned": pruned.facts(),
        "before": before.divergence.facts(),
        "after": current.divergence.facts(),
        "config": cfg.model_dump(mode="json"),
        "how": how(cfg, teacher, pruned, judged),
        "seconds": round(time.perf_counter() - started, 1),
    }
    write(cfg, pruned, accepted, tokenizer, facts, report_facts(facts, reference, current))
    shutil.rmtree(work)
    where = "model and report" if accepted else f"report alone: {cfg.pruned} stays as it is"
    console.row("written", f"{cfg.out} ({where})")
    if accepted:
        console.next_command(f"moesmith verify {cfg.teacher} {cfg.out}", f"moesmith chat {cfg.out}")
    else:
        profile = cfg.profile or "prof"
        console.next_command(f"moesmith compare {cfg.teacher} --profile {profile} --out compared")
    console.emit({"out": str(cfg.out), **facts})


# ---------------------------------------------------------------- text


def read_text(cfg: Config, tokenizer: Any, teacher: Side) -> tuple[list[Document], list[Document]]:
    """(to learn from, to judge on), disjoint."""
    from moesmith.data import leaks
    from moesmith.data.corpora import encode, parse_corpora, read_documents, read_held_out
    from moesmith.jobs._cut import in_turn
    from moesmith.jobs._pair import check_ids
    from moesmith.prune.stats import ROUTERS_ONLY, Profile, same_model

    if cfg.profile is not None:
        if not same_model(Profile.read(cfg.profile), teacher.folder):
            console.warn(ROUTERS_ONLY.format(model=cfg.teacher))
        learned = read_held_out(cfg.profile / "documents.jsonl")
        judged = read_held_out(cfg.profile)
        check_ids(tokenizer, [*learned, *judged], cfg.profile)
        leaks.check_disjoint(leaks.read(cfg.profile), judged)
    else:
        corpora = parse_corpora(cfg.corpus)
        learned, judged, _ = read_documents(corpora, tokenizer, cfg.max_length, cfg.tokens, held_out=0.2)
        leaks.check_disjoint(leaks.collect(learned), judged)
    for document in (*learned, *judged):
        if not document.ids:
            document.ids = encode(tokenizer, [document], cfg.max_length)[0].ids
        document.ids = document.ids[: cfg.max_length]
    learned, judged = ([d for d in side if len(d.ids) > 1] for side in (learned, judged))
    if not judged:
        raise UserError("nothing is held out to judge on", "moesmith profile --held-out 0.2")
    return in_turn(learned, cfg.tokens), in_turn(judged, cfg.judge_tokens)


def examples(documents: Sequence[Document]) -> tuple[list[Example], list[Example]]:
    """(train, dev): every token is learned; one document in ten of every domain chooses the best step."""
    import numpy as np

    from moesmith.data.masks import IGNORED, Example

    sides: tuple[list[Example], list[Example]] = [], []
    seen: dict[str, int] = {}
    for row, document in enumerate(documents, 1):
        number = seen[document.domain] = seen.get(document.domain, 0) + 1
        ids = np.asarray(document.ids, dtype=np.int32)
        labels = ids.copy()
        labels[0] = IGNORED  # nothing predicts the first token
        sides[number % DEV_EVERY == 2].append(Example(row, ids, labels))
    train, dev = sides
    if not train or not dev:
        raise UserError(
            f"{len(documents)} documents to learn from: too few to train on some and choose by others",
            "give more text",
        )
    return train, dev


def vocabulary(side: Side) -> int:
    """Entries of the vocabulary, wherever the config keeps it."""
    config = side.checkpoint.config
    return int(config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size") or 0)


# ---------------------------------------------------------------- the folder that a stopped run goes on in


def start_work(cfg: Config) -> Path:
    """`<out>.work`, as an unfinished run of the same options left it, or new."""
    work = cfg.out.with_name(cfg.out.name + ".work")
    options = {key: value for key, value in cfg.model_dump(mode="json").items() if key != "overwrite"}
    file = work / "options.json"
    if file.is_file() and not cfg.overwrite:
        before = json.loads(file.read_text(encoding="utf-8"))
        changed = [key for key in options if options[key] != before.get(key)]
        if changed:
            raise UserError(
                f"{work} holds an unfinished run with another {changed[0]} "
                f"({before.get(changed[0])}, now {options[changed[0]]})",
                "give the same options to go on with it, or --overwrite to start anew",
            )
        console.note(f"going on with {work}")
        return work
    if work.exists():
        if not file.is_file():
            raise UserError(f"{work} is in the way", "move it, or choose another --out")
        shutil.rmtree(work)
    work.mkdir(parents=True)
    write_atomically(file, json.dumps(options, indent=1) + "\n")
    return work


# ---------------------------------------------------------------- the teacher and the judge


def teach(
    cfg: Config,
    side: Side,
    said: Teacher,
    rows: Sequence[Example],
    judged: Sequence[Document],
    prompts: list[list[int]],
    tokenizer: Any,
    spool: Spool,
) -> Measured | None:
    """Let the teacher read everything once, and leave memory. Its answers, for the report."""
    from moesmith.eval.canary import canary
    from moesmith.eval.divergence import Divergence
    from moesmith.jobs import _pair

    rows = sorted(rows, key=lambda example: example.row)
    model = _pair.load(side, device=cfg.device)
    if said.missing(rows):
        with console.bar("teacher reads", total=len(rows)) as bar:
            said.record(model, rows, cfg.kept, bar.update)
    said.load(rows)
    with console.bar("teacher is recorded", total=sum(len(d.ids) - 1 for d in judged)) as bar:
        spool.record(model, judged, bar.update, cfg.batch_tokens, "the teacher")
    answers = None
    if prompts:
        with console.bar("teacher answers", total=len(prompts)) as bar:
            answers = canary(model, tokenizer, prompts, cfg.new_tokens, on_batch=bar.update)
    del model
    gc.collect()
    return Measured(Divergence.empty(judged), answers) if answers else None


@dataclass
class Judge:
    """Measures a student against what the teacher said."""

    cfg: Config
    tokenizer: Any
    documents: Sequence[Document]
    prompts: list[list[int]]
    spool: Spool

    def measure(self, model: Any) -> Measured:
        """Divergence on the held-out text, and the canary's answers. The model is not needed afterwards."""
        from moesmith.eval.canary import canary
        from moesmith.eval.divergence import divergence

        total = sum(len(document.ids) - 1 for document in self.documents)
        with console.bar("judging", total=total) as bar:
            found = divergence(
                self.spool, model, self.documents, bar.update, self.cfg.batch_tokens, ("teacher", "student")
            )
        answers = None
        if self.prompts:
            with console.bar("canary", total=len(self.prompts)) as bar:
                answers = canary(
                    model, self.tokenizer, self.prompts, self.cfg.new_tokens, on_batch=bar.update
                )
        return Measured(found, answers)


def decide(stage: str, before: Measured, after: Measured) -> dict[str, Any]:
    """Whether a stage is kept: KL falls, the interval of its change stays below 0, answers get no worse."""
    from moesmith.eval.bootstrap import ratio_interval
    from moesmith.eval.canary import worse

    per_row = before.divergence.per_row
    tokens = per_row(before.divergence.tokens)
    change = per_row(after.divergence.kl_sums - before.divergence.kl_sums)
    mean, interval = float(change.sum() / tokens.sum()), ratio_interval(change, tokens)
    reasons = []
    if mean >= 0:
        reasons.append(f"the divergence rose by {mean:.4f}")
    elif interval is None or interval[1] >= 0:
        said = "cannot be told from one document" if interval is None else f"may be {interval[1]:+.4f}"
        reasons.append(f"the change of divergence, {mean:+.4f}, {said}")
    if before.canary is not None and after.canary is not None:
        reasons += worse(before.canary, after.canary)
    return {
        "stage": stage,
        "accepted": not reasons,
        "reasons": reasons,
        "kl_before": mean_kl(before),
        "kl_after": mean_kl(after),
        "change": mean,
        "change_ci": interval,
        "answers_compared": before.canary is not None,
    }


def mean_kl(measured: Measured) -> float:
    """Nats per token."""
    return float(measured.divergence.kl_sums.sum() / measured.divergence.tokens.sum())


def nothing_gained(stage: str, before: Measured) -> dict[str, Any]:
    """The decision on a stage whose best step was worse than none, on the documents that choose it."""
    kl = mean_kl(before)
    reason = "no step came nearer to the teacher, on the documents that choose the step"
    return {"stage": stage, "accepted": False, "reasons": [reason], "kl_before": kl, "kl_after": kl}


def said_of(decision: dict[str, Any]) -> str:
    """A decision in words."""
    if not decision["accepted"]:
        return "reverted: " + "; ".join(decision["reasons"])
    low, high = decision["change_ci"]
    answers = "answers no worse" if decision["answers_compared"] else "answers not compared"
    return f"kept: KL {decision['change']:+.4f} [{low:+.4f}, {high:+.4f}], {answers}"


# ---------------------------------------------------------------- the student


def train_stage(
    cfg: Config,
    name: str,
    side: Side,
    accepted: Sequence[Path],
    said: Teacher,
    train: Sequence[Example],
    dev: Sequence[Example],
    tokenizer: Any,
    work: Path,
) -> Path | None:
    """Train one stage on top of the accepted ones. The folder of its best adapter; None if none is better
    than before.
    """
    from moesmith.train.distill import DistillSession
    from moesmith.train.folder import RunFolder

    stage: Stage = cfg.router if name == "router" else cfg.lora
    targets: list[Placement] = ["router"] if name == "router" else cfg.lora.targets
    model = load(side, cfg, accepted)
    relative = router_rms(model) / ROUTER_RMS if name == "router" else 1.0
    settings = RunSettings(
        out=str(work / name),
        seed=cfg.seed,
        lora=LoraSettings(r=stage.r, alpha=stage.alpha * relative, targets=targets),
        train=TrainSettings(
            **{key: value for key, value in vars(stage).items() if key in TrainSettings.model_fields}
        ),
    )
    folder = RunFolder(settings.out)
    if not folder.result.exists():
        settings.resume = folder.newest_checkpoint() is not None
        settings.overwrite = not settings.resume
        session = DistillSession(model, tokenizer, train, dev, settings, teacher=said)
        counts = ", ".join(f"{place} {n:,}" for place, n in session.plan.adapters.trainable.items())
        console.note(f"{name}: {session.plan.steps} steps, parameters {counts}")
        if not session.train().finished:
            raise UserError("stopped; nothing is lost", "the same command goes on")
        del session
    del model
    gc.collect()
    result = json.loads(folder.result.read_text(encoding="utf-8"))
    better = folder.best.is_dir() and result["best_eval_loss"] < result["first_eval_loss"]
    return folder.best if better else None


def router_rms(model: Any) -> float:
    """Root mean square of the routers' weights, median over layers: what an update is large or small against.

    A model whose routers are scaled down (one made from a dense model, where they only choose) would lose its
    routing to updates of the usual size.
    """
    import torch

    from moesmith.models.layers import submodule, text_layers

    found = [
        parameter.detach().float().square().mean().sqrt()
        for layer in text_layers(model)
        for parameter in submodule(model, layer.router).parameters()
        if parameter.ndim == 2 and parameter.shape[0] >= layer.num_experts
    ]
    return float(torch.stack(found).median())


def load(side: Side, cfg: Config, adapters: Sequence[Path]) -> Any:
    """The student with adapters on it: merged wherever the weights are not packed."""
    from peft import PeftModel

    from moesmith.jobs import _pair

    model = _pair.load(side, device=cfg.device)
    for folder in adapters:
        model = PeftModel.from_pretrained(model, str(folder))
        if mergeable(side, folder):
            model = model.merge_and_unload()
    return model.eval()


def mergeable(side: Side, adapter: Path) -> bool:
    """Whether the adapter can become part of the weights: packed experts cannot take one."""
    if not side.checkpoint.is_packed:
        return True
    return adapter.parent.name == "router"


# ---------------------------------------------------------------- what is written


def write(
    cfg: Config,
    side: Side,
    accepted: Sequence[Path],
    tokenizer: Any,
    facts: dict[str, Any],
    page: dict[str, Any],
) -> None:
    """The folder: record and report always, the healed model if a stage was kept."""
    from moesmith.jobs._folder import finish_folder, start_folder
    from moesmith.jobs._healed import files_beside, keep_what_was_not_loaded, logits, say_healed
    from moesmith.jobs.quantize import proof_ids, save
    from moesmith.report import write_report

    temporary = start_folder(cfg.out)
    if accepted:
        merged = [folder for folder in accepted if mergeable(side, folder)]
        model = load(side, cfg, merged)
        ids = proof_ids(side.folder, model)
        expected = logits(model, ids)
        save(model, temporary, files_beside(side.folder))
        facts["not_loaded"] = keep_what_was_not_loaded(side.folder, temporary)
        if len(merged) < len(accepted):
            save_on_top(model, accepted[-1], temporary / "adapter", tokenizer, cfg)
            facts["adapter"] = "adapter"
        kind, device = type(model), model.device
        del model
        gc.collect()
        if not expected.equal(logits(kind.from_pretrained(temporary, dtype="auto").to(device).eval(), ids)):
            raise RuntimeError("the healed model was saved and read back with other logits")
        facts["proof"] = {"tokens": ids.shape[1], "logits": "bit-equal"}
        say_healed(temporary, facts)
    write_atomically(temporary / RECORD, json.dumps(facts, indent=1) + "\n")
    write_report(temporary, page)
    finish_folder(temporary, cfg.out)


def save_on_top(model: Any, adapter: Path, folder: Path, tokenizer: Any, cfg: Config) -> None:
    """An adapter that packed experts cannot take, saved beside the healed model as its base."""
    from peft import PeftModel

    from moesmith.models.checkpoint import base_record
    from moesmith.train.adapters import save_adapter

    base = base_record(model, cfg.out.absolute())
    running = PeftModel.from_pretrained(model, str(adapter))
    save_adapter(folder, running, tokenizer, base, {"stage": "lora"})


def command_line(cfg: Config) -> str:
    """The command of these options, without those that are defaults."""
    words = ["moesmith", "heal", cfg.pruned]

    def add(values: dict[str, Any], prefix: str) -> None:
        for name, value in values.items():
            flag = f"{prefix}{name.replace('_', '-')}"
            if isinstance(value, dict):
                add(value, f"{flag}.")
            elif isinstance(value, list):
                words.extend(("--" + flag, ",".join(map(str, value))))
            elif name not in ("pruned", "overwrite"):
                words.extend(("--" + flag, str(value)))

    add(cfg.model_dump(mode="json", exclude_defaults=True), "")
    return shlex.join(words)


def how(cfg: Config, teacher: Side, pruned: Side, judged: Sequence[Document]) -> dict[str, Any]:
    """What a reader needs to repeat it."""
    from moesmith.data.corpora import corpus_hash

    names = ("torch", "transformers", "peft", "trl")
    return {
        "command": command_line(cfg),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"moesmith": moesmith.__version__, **{name: metadata.version(name) for name in names}},
        "teacher": str(teacher.folder),
        "pruned": str(pruned.folder),
        "held_out_hash": corpus_hash(judged),
        "seed": cfg.seed,
    }


def report_facts(facts: dict[str, Any], teacher: Measured | None, after: Measured) -> dict[str, Any]:
    """The page: what was tried, what was kept, answers side by side."""
    from moesmith.eval.canary import compare, report_section
    from moesmith.eval.divergence import report_row

    kept = facts["accepted"]
    kl = [part["kl"]["mean"] for part in (facts["before"], facts["after"])]
    if kept:
        sentence = (
            f"Healing by {' and '.join(kept)} was kept: the divergence from the original fell from "
            f"{kl[0]:.4f} to {kl[1]:.4f} nats per token on text it was not trained on."
        )
    else:
        sentence = "No stage of healing was kept: the pruned model stays as it is."
    page: dict[str, Any] = {
        "title": f"Healing {Path(facts['config']['pruned']).name}",
        "subtitle": f"distilled from {facts['config']['teacher']}",
        "verdict": {
            "level": "info" if kept else "caution",
            "sentence": sentence,
            "points": [f"{d['stage']}: {said_of(d)}" for d in facts["stages"]],
        },
        "divergence": [report_row("pruned", facts["before"])],
        "how": facts["how"],
    }
    if kept:
        page["divergence"].append(report_row("healed", facts["after"]))
    if teacher is not None and teacher.canary and after.canary:
        name = "healed" if kept else "pruned"
        page["canary"] = report_section(("teacher", name), compare(teacher.canary, after.canary))
    return page
