"""Drop the experts that matter least, write the smaller model, and say how good it still is.

A profile says what every expert contributed, so a plan takes no time and no model: look with --dry-run, cut
again at another ratio. The checkpoint is made by copying byte ranges. Then the original, masked, is measured
against itself on text that the profile has not seen, beside as many experts dropped at random, and what was
written has to give the logits of that mask. The folder appears whole or not at all.
"""

from __future__ import annotations

import gc
import json
import math
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pydantic

from moesmith import console
from moesmith.config import JobConfig, no_such_file, write_atomically
from moesmith.errors import UserError

if TYPE_CHECKING:
    from moesmith.jobs._cut import Evidence
    from moesmith.models.rewrite import Rewritten
    from moesmith.prune.plan import Keep, Plan
    from moesmith.prune.sizes import Sizes
    from moesmith.prune.stats import Profile

POSITIONAL = ("model",)
JSON = True
SEAMS = False  # a plan needs no model: the seams are put in when one is loaded
EXAMPLE = "moesmith prune Qwen/Qwen3-30B-A3B --profile prof/ --retain 99% --out small/"
OUT_OF_MEMORY = "--evidence none writes the model without loading it; `moesmith verify` measures it later"

WISHES = ("keep", "cut", "retain", "fit")


class Config(JobConfig):
    model: str
    """Model folder or hub name, in 16 bits or packed."""
    profile: Path
    """Folder that `moesmith profile` made of this model."""
    out: Path | None = None
    """Folder to create; not needed with --dry-run."""
    keep: int | None = None
    """Experts that stay in every layer. This, or one of the next three."""
    cut: str | None = None
    """Share of the experts to drop, at most: 15%."""
    retain: str | None = None
    """Share of weighted output norm that every layer keeps: 99% takes the smallest count that does."""
    fit: str | None = None
    """Size to fit, and how the result will be stored: 14GB@q4 (bf16, q8, q4 or nf4)."""
    score: Literal[
        "auto", "contribution", "reap", "prompt_norm", "easyep", "relative", "man", "msan", "ean", "ean_ca",
        "max_norm", "frequency", "gate", "esft_gate", "esft_token", "random",
    ] = "contribution"  # fmt: skip
    """What ranks the experts; auto loads the model, measures the main ones and takes the best."""
    domains: str = "mean"
    """How domains become one score: mean, max, or weights: code=2,math=1."""
    protect: int = pydantic.Field(0, ge=0)
    """The best N experts of every layer and every domain stay."""
    super_experts: bool = True
    """Experts with massive activations stay."""
    budget: Literal["uniform", "layer"] = "uniform"
    """layer: a count of its own for each, for moesmith's own runtime only: writes the plan, no checkpoint."""
    multiple: int = pydantic.Field(1, ge=1)
    """Round kept counts up to a multiple, for servers that split experts."""
    seed: int = 0
    """Of --score random, the random control and the intervals."""
    dry_run: bool = False
    """Print the plan and write nothing."""
    evidence: Literal["auto", "always", "none"] = "auto"
    """Measure the result on held-out text; auto does it when the model fits into memory."""
    tokens: int = pydantic.Field(20_000, ge=2)
    """Held-out tokens to measure on."""
    canary: int = pydantic.Field(16, ge=0)
    """Prompts that both models answer; 0 for none."""
    new_tokens: int = pydantic.Field(64, ge=1)
    """Longest answer of the canary."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to measure; auto uses the GPU if there is one."""
    overwrite: bool = False
    """Replace an earlier output of this command."""


def check(cfg: Config) -> None:
    """Refuse what needs no model to be refused: wishes that exclude each other, a place that is taken."""
    from moesmith.jobs._folder import check_place
    from moesmith.models.checkpoint import Checkpoint, local_folder
    from moesmith.prune.plan import FILE

    given = [name for name in WISHES if getattr(cfg, name) is not None]
    if len(given) != 1:
        said = f"both --{given[0]} and --{given[1]}" if given else "no size"
        raise UserError(f"{said} given", "give one of --keep 109, --cut 15%, --retain 99%, --fit 14GB@q4")
    for name in ("cut", "retain"):
        if getattr(cfg, name) is not None:
            share(getattr(cfg, name), name)
    if not cfg.profile.is_dir():
        raise no_such_file(cfg.profile, "profile")
    if cfg.out is None and not cfg.dry_run:
        raise UserError("missing --out", "the folder to create; --dry-run writes nothing")
    folder = local_folder(cfg.model)
    if folder is not None:
        refuse_foreign(Checkpoint.open(folder), cfg.model)
    if cfg.out is not None and not cfg.dry_run:
        check_place(cfg.out, folder, cfg.overwrite, FILE)


def run(cfg: Config) -> None:
    from moesmith.jobs._cut import enough_tokens
    from moesmith.jobs._cut_words import arguments, plan_facts, say_layers, say_plan, say_result
    from moesmith.models.checkpoint import Checkpoint, resolve
    from moesmith.prune.sizes import measure
    from moesmith.prune.stats import ROUTERS_ONLY, Profile, same_model
    from moesmith.prune.summary import profile_facts, reliability_facts

    started = time.perf_counter()
    source = resolve(cfg.model)
    checkpoint = Checkpoint.open(source)
    refuse_foreign(checkpoint, cfg.model)
    profile = Profile.read(cfg.profile)
    if not same_model(profile, source):
        console.warn(ROUTERS_ONLY.format(model=cfg.model))
    enough_tokens(profile)
    sizes = measure(checkpoint.tensors, profile.layers[0].num_experts, checkpoint.quantization)
    measuring = Measuring(cfg, source, checkpoint.nbytes)
    plan = choose(cfg, profile, sizes, measuring)
    took = {"plan": time.perf_counter() - started}
    say_plan(plan, profile, sizes, reliability_facts(profile, cfg.seed, halves=0))
    facts = plan_facts(plan, sizes)
    if cfg.dry_run:
        say_layers(plan, profile)
        console.row("time", f"{console.duration(took['plan'])}, nothing written", 10)
        console.next_command(arguments(cfg, dry_run=False, out=cfg.out or Path("small")))
        console.emit({**facts, "seconds": took})
        return

    assert cfg.out is not None
    summary = profile_facts(profile, plan, cfg.seed)
    written = write(cfg, source, plan, profile, measuring, summary)
    took |= written.seconds
    say_result(cfg.out, written.evidence, written.verdict, written.weights, took)
    verify = f"moesmith verify {cfg.model} {cfg.out} --profile {cfg.profile}"
    if "selected" in plan.meta:
        verify += " --corpus NAME=FILE"
    if written.weights is None:
        console.next_command(f"moesmith compare {cfg.model} --profile {cfg.profile}")
    elif written.evidence is None:
        console.next_command(verify)
    else:
        console.next_command(f"moesmith heal {cfg.out} --teacher {cfg.model}", verify)
    console.emit(
        {
            **facts,
            "out": str(cfg.out),
            "report": str(cfg.out / "report.html"),
            "verdict": written.verdict,
            "evidence": written.evidence.facts() if written.evidence else None,
            "written": asdict(written.weights) if written.weights else None,
            "seconds": {name: round(value, 3) for name, value in took.items()},
        }
    )


# ---------------------------------------------------------------- the plan


def share(text: str, name: str) -> float:
    """ "15%" or "0.15" -> 0.15. Raises UserError for what is neither."""
    match = re.fullmatch(r"\s*(\d*\.?\d+)\s*(%?)\s*", text)
    value = float(match[1]) / (100 if match[2] else 1) if match else -1.0
    if not 0 < value < 1:
        example = "15%" if name == "cut" else "99%"
        raise UserError(
            f"--{name} {text} is no share", f"a percentage above 0 and below 100: --{name} {example}"
        )
    return value


def refuse_foreign(checkpoint: Any, model: str) -> None:
    """Raise UserError for weights that another tool quantised."""
    if checkpoint.quantization is not None and not checkpoint.is_packed:
        method = checkpoint.quantization.get("quant_method", "an unnamed method")
        raise UserError(f"{model} is quantised with {method}", "prune its 16-bit version")


def choose(cfg: Config, profile: Profile, sizes: Sizes, measuring: Measuring) -> Plan:
    """The plan that was asked for; with --score auto by the score that does least harm."""
    from moesmith.jobs import _plans

    why = None
    if cfg.score == "auto":
        if cfg.budget == "layer":
            raise UserError(
                "--score auto compares plans of one count for all layers", "--budget uniform, or name a score"
            )
        plan, rows = measuring.best_plan(profile, lambda score: plan_with(cfg, profile, sizes, score))
        plan.meta["chosen_from"] = [{key: row[key] for key in ("series", "keep", "kl")} for row in rows]
        why = "--score auto chose this score"
    else:
        plan = plan_with(cfg, profile, sizes, cfg.score)
        why = _plans.selected(cfg.profile, profile, plan.score, plan.count)
    plan.meta["asked"] = {name: getattr(cfg, name) for name in WISHES if getattr(cfg, name) is not None}
    if why is not None:
        plan.meta["selected"] = (
            f"{why} on the held-out text that also judges the result, so the figures are optimistic: judge "
            "it with `moesmith verify` on other text (--corpus NAME=FILE)"
        )
    return plan


def plan_with(cfg: Config, profile: Profile, sizes: Sizes, score: str) -> Plan:
    """The plan with this score."""
    from moesmith.prune.criteria import parse_domains
    from moesmith.prune.plan import fewest_to_route, make_plan
    from moesmith.prune.sizes import parse_fit

    keep = cfg.keep
    if cfg.fit is not None:
        limit, storage = parse_fit(cfg.fit)
        step = math.lcm(cfg.multiple, *(layer.n_group for layer in profile.layers))
        fewest = math.ceil(max(fewest_to_route(layer) for layer in profile.layers) / step) * step
        keep = sizes.largest_count(limit, storage, step, fewest)
    return make_plan(
        profile,
        keep=keep,
        cut=None if cfg.cut is None else share(cfg.cut, "cut"),
        retain=None if cfg.retain is None else share(cfg.retain, "retain"),
        score=score,
        domains=parse_domains(cfg.domains),
        protect=cfg.protect,
        per_layer=cfg.budget == "layer",
        super_experts=cfg.super_experts,
        multiple=cfg.multiple,
        seed=cfg.seed,
    )


def smallest_step(profile: Profile) -> int:
    """Fewest experts that can be dropped at once: one of every group."""
    return math.lcm(*(layer.n_group for layer in profile.layers))


def smallest_cut(cfg: Config, profile: Profile, plan: Plan) -> Keep | None:
    """The smallest cut by the same score; None if the plan is that already."""
    from moesmith.prune.criteria import parse_domains
    from moesmith.prune.plan import make_plan

    experts, step = profile.layers[0].num_experts, smallest_step(profile)
    if plan.count is None or plan.count >= experts - step:
        return None
    least = make_plan(
        profile, keep=experts - step, score=plan.score, domains=parse_domains(cfg.domains), seed=cfg.seed,
        super_experts=cfg.super_experts,
    )  # fmt: skip
    return least.keep


# ---------------------------------------------------------------- the evidence


def holds_text(profile: Path) -> bool:
    """Whether a profile held out anything to judge on."""
    from moesmith.data.corpora import HELD_OUT

    path = profile / HELD_OUT
    return path.is_file() and path.stat().st_size > 0


class Measuring:
    """The original model and the held-out text, loaded when they are first needed, once."""

    def __init__(self, cfg: Config, source: Path, nbytes: int):
        self.cfg, self.source, self.nbytes = cfg, source, nbytes
        self._model: Any = None
        self._tokenizer: Any = None
        self._texts: list[Any] | None = None

    def why_not(self) -> str | None:
        """Why nothing is measured; None if it is."""
        from moesmith.jobs._cut import no_room

        if self.cfg.evidence == "none":
            return "--evidence none"
        if self.cfg.evidence == "auto" and not holds_text(self.cfg.profile):
            return f"{self.cfg.profile} holds out no text"
        if self.cfg.evidence == "auto" and self._model is None:
            return no_room(self.nbytes, self.cfg.device)
        return None

    def texts(self) -> list[Any]:
        """Held-out documents; the tokenizer is read along."""
        from moesmith.jobs._cut import held_out, tokenizer_of

        if self._texts is None:
            self._texts = held_out(self.cfg.profile, self.cfg.tokens)
            self._tokenizer = tokenizer_of(self.source)
        return self._texts

    def model(self) -> Any:
        """The original."""
        from moesmith.jobs._cut import load

        if self._model is None:
            self._model = load(self.source, self.cfg.device)
        return self._model

    def free(self) -> None:
        """Let the original go."""
        import torch

        self._model = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def best_plan(
        self, profile: Profile, plan_of: Callable[[str], Plan]
    ) -> tuple[Plan, list[dict[str, Any]]]:
        """The plan with the lowest KL of those the scores would write, and what was compared, best first.

        Taken from what `moesmith compare` has measured on this model if that has every plan, else measured
        here: figures on different text cannot be compared.
        """
        from moesmith.jobs import _plans
        from moesmith.models.identity import model_hash

        there: dict[str, list[dict[str, Any]]] = {}
        for row in _plans.read_evidence(self.cfg.profile, profile, model_hash(self.source)) or []:
            if row["kind"] == "prune":
                there.setdefault(row["series"], []).append(row)
        plans: dict[str, Plan] = {}
        rows: list[dict[str, Any]] = []
        refused: UserError | None = None
        for score in dict.fromkeys([*_plans.SCORES, *there]):
            try:
                plan = plan_of(score)
            except UserError as error:  # this score cannot meet the wish; another may
                refused = error
                console.note(f"{score} left out: {error.message}")
                continue
            # Another count, other domains, other protected experts: another plan. The kept have to be these.
            same = [row for row in there.get(score, ()) if row["keeps"] == plan.keep]
            rows += same[:1]
            if same or score in _plans.SCORES:
                plans[score] = plan
        if refused is not None and not plans:
            raise refused
        if len(rows) < len(plans):
            candidates = [
                _plans.Candidate(score, "prune", plan.count or 0, plan.keep, plan.domains, plan=plan)
                for score, plan in plans.items()
            ]
            rows = self._compare(profile, candidates)
        rows.sort(key=lambda row: row["kl"])
        several = len({row["keep"] for row in rows}) > 1
        said = [f"{row['series']} {row['kl']:.3g}" + f" ({row['keep']})" * several for row in rows]
        where = "by count" if several else f"at {rows[0]['keep']} experts"
        shares = _plans.win_shares(rows) if len(rows) > 1 else {}
        first = shares.get(rows[0]["series"])
        sure = "" if first is None else f" · first in {100 * first:.0f} % of resamples"
        n = len(rows[0]["documents"]["nats"])
        console.row("auto", f"KL {where}, {n} documents: {' · '.join(said)}{sure}", 10)
        return plans[rows[0]["series"]], rows

    def _compare(self, profile: Profile, candidates: list[Any]) -> list[dict[str, Any]]:
        from moesmith.jobs import _plans

        reason = self.why_not()
        if reason is not None:
            raise UserError(
                f"--score auto has to measure and cannot: {reason}",
                "name a --score, or compare on a larger machine",
            )
        texts, model = self.texts(), self.model()
        with console.bar("comparing") as bar:

            def on_batch(done: int, total: int, text: str) -> None:
                bar.total = total
                bar.update(done, text)

            return _plans.compare_plans(model, texts, candidates, profile=profile, on_batch=on_batch)

    def evidence(self, plan: Plan, profile: Profile) -> Evidence | None:
        """What the plan does to the model; None where nothing can be measured."""
        from moesmith.jobs import _cut as measured
        from moesmith.jobs._pair import canary_prompts
        from moesmith.prune.plan import random_like

        cfg, skipped = self.cfg, []
        if self.why_not() is not None:
            return None
        texts, model = self.texts(), self.model()
        plans = {
            measured.PLAN: plan.keep,
            measured.RANDOM: random_like(profile, plan, cfg.seed + 1_000_000),
        }
        found = measured.Evidence(measured.measure(model, texts, plans))
        prompts = canary_prompts(self._tokenizer, texts, cfg.canary) if self._tokenizer and cfg.canary else []
        if prompts:
            found.canary = measured.answers(model, self._tokenizer, plan.keep, prompts, cfg.new_tokens)
        else:
            why = "the model has no tokenizer" if not self._tokenizer else "--canary 0"
            skipped.append(f"no answers were compared ({why}): loops do not show in perplexity")
        least = smallest_cut(cfg, profile, plan)
        if least is not None and measured.grade(found.rows[measured.PLAN], None) != "safe":
            found.rows |= measured.measure(model, texts, {measured.SMALLEST: least}, measured.SMALLEST)
        found.skipped, found.selected = skipped, plan.meta.get("selected")
        return found


# ---------------------------------------------------------------- writing


@dataclass
class Written:
    """What came of it."""

    evidence: Evidence | None
    verdict: dict[str, Any]
    weights: Rewritten | None
    seconds: dict[str, float]


def write(
    cfg: Config,
    source: Path,
    plan: Plan,
    profile: Profile,
    measuring: Measuring,
    summary: dict[str, Any],
) -> Written:
    """Measure, then write everything under a temporary name, compare, and give it its place."""
    from moesmith.jobs import _cut as measured
    from moesmith.jobs._cut_words import kept_words
    from moesmith.jobs._folder import check_place, check_space, finish_folder, start_folder
    from moesmith.models.rewrite import plan_tensors, rewrite_checkpoint
    from moesmith.prune.plan import FILE

    assert cfg.out is not None
    check_place(cfg.out, source, cfg.overwrite, FILE)
    reason = measuring.why_not()
    if reason is not None:
        console.note(f"nothing is measured: {reason} · moesmith verify can do it later")
    tensors = None
    if cfg.budget == "uniform":
        tensors = plan_tensors(source, plan.keep)  # refuses what cannot be written, before the long part
        check_space(cfg.out, tensors.nbytes, "the smaller model")

    clock = Clock()
    evidence, expected, ids = None, None, []
    if reason is None:
        evidence = measuring.evidence(plan, profile)
        ids = max((document.ids for document in measuring.texts()), key=len)
        expected = measured.masked_logits(measuring.model(), plan.keep, ids)
        clock.lap("evidence")
    measuring.free()

    temporary = start_folder(cfg.out)
    try:
        weights = None
        if tensors is not None:
            with console.bar("writing", total=tensors.nbytes) as bar:
                weights = rewrite_checkpoint(source, temporary, plan.keep, on_bytes=bar.advance, plan=tensors)
            clock.lap("copy")
            if evidence is not None and expected is not None:
                evidence.parity = measured.same_logits(temporary, expected, ids, cfg.device)
                clock.lap("mask == slice")
        experts = profile.layers[0].num_experts
        smallest = f"keeping {experts - smallest_step(profile)} of {experts}"
        verdict = measured.verdict(evidence, kept_words(plan), smallest)
        written = Written(evidence, verdict, weights, clock.seconds)
        write_beside(temporary, cfg, source, plan, profile, written, summary, reason)
    except (UserError, OSError):  # a full disk wants its space back, and a wrong model is of no use
        shutil.rmtree(temporary)
        raise
    finish_folder(temporary, cfg.out)
    return written


def write_beside(
    folder: Path,
    cfg: Config,
    source: Path,
    plan: Plan,
    profile: Profile,
    written: Written,
    summary: dict[str, Any],
    reason: str | None,
) -> None:
    """Plan, record, report and model card."""
    from moesmith import __version__
    from moesmith.data.leaks import NGRAMS
    from moesmith.jobs._cut_words import arguments, card, report_facts
    from moesmith.models.checkpoint import RECORD
    from moesmith.prune.plan import FILE
    from moesmith.report import write_report

    evidence = written.evidence
    plan.meta["profile"]["folder"] = str(cfg.profile.resolve())  # `verify` finds what the cut was chosen on
    plan.meta |= {
        "command": arguments(cfg),
        "evidence": evidence.facts() if evidence else {"skipped": [reason]},
    }
    plan.write(folder / FILE)
    if (cfg.profile / NGRAMS).is_file():  # so that a moved or shared model still knows what it was chosen on
        shutil.copyfile(cfg.profile / NGRAMS, folder / NGRAMS)
    record = {
        "command": "prune",
        "config": cfg.model_dump(mode="json"),
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "safetensors")},
        "moesmith": __version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "source": str(source),
        "written": asdict(written.weights) if written.weights else None,
        "seconds": {name: round(value, 2) for name, value in written.seconds.items()},
    }
    write_atomically(folder / RECORD, json.dumps(record, indent=2) + "\n")
    notes = [f"nothing was measured: {reason}"] if reason else []
    write_report(folder, report_facts(cfg, plan, profile, evidence, written.verdict, summary, record, notes))
    path = folder / "README.md"
    before = path.read_text(encoding="utf-8").rstrip() if path.is_file() else f"# {folder.stem}"
    path.write_text(f"{before}\n\n{card(cfg, plan, evidence, written.verdict)}", encoding="utf-8")


class Clock:
    """Seconds of each step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """The step that ends now."""
        now = time.perf_counter()
        self.seconds[name] = now - self._last
        self._last = now
