"""Make a Mixture-of-Experts model out of dense ones, with routing that is fitted to text and measured.

A recipe names a base, which gives attention, norms, embeddings and tokenizer, and the experts: fine-tunes of
it, LoRA adapters, or the base itself. Their FFNs are copied byte for byte into a class that transformers has
(or, for Gemma, one of ours). Every layer gets a router, fitted to what that layer reads on each expert's own
text. Then it is proved that each expert alone is what its source is, and measured where tokens go and what
that is worth in perplexity. One layer is in memory at a time; the folder appears whole or not at all.

A recipe is a YAML file like

    base_model: MODEL
    experts:
      - {source_model: MODEL-CODE, corpus: code.jsonl}
      - {source_model: MODEL-MATH, corpus: math.jsonl}
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pydantic
import yaml

from moesmith import console
from moesmith.config import JobConfig, no_such_file, write_atomically
from moesmith.errors import UserError

if TYPE_CHECKING:
    from moesmith.build.recipe import Recipe
    from moesmith.jobs._build_fit import Routers
    from moesmith.jobs._build_parts import Parts
    from moesmith.jobs._build_text import Texts

POSITIONAL = ("recipe",)
JSON = True
EXAMPLE = "moesmith build examples/build.yaml --out my-moe"
OUT_OF_MEMORY = (
    "--judge-tokens 0 does not load the result; a shorter --max-length and fewer --tokens take less"
)

RECIPE = "recipe.yaml"
STATE = "state"  # hidden states of the streamed pass, in the unfinished folder
OVER = ("route", "init", "num_experts_per_tok", "dtype", "output", "seed")  # flags that win over the recipe


class Config(JobConfig):
    recipe: Path
    """YAML file: base_model, experts and what is wanted of them (docs/build.md)."""
    out: Path
    """Folder to create."""
    route: (
        Literal["auto", "embed", "hidden", "centered", "lda", "probe", "loss", "ridge", "random"] | None
    ) = None
    """How the routers are made, instead of what the recipe says."""
    init: str | None = None
    """copy, split, drop:0.5, noise:0.01, virtual-group:4 or lora:64, instead of what the recipe says."""
    num_experts_per_tok: int | None = pydantic.Field(None, ge=1)
    """Experts that a token uses, instead of what the recipe says."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Of what is written, instead of what the recipe says."""
    output: str | None = None
    """model_type of the result, instead of what the recipe says."""
    seed: int | None = pydantic.Field(None, ge=0, lt=1 << 32)
    """Of everything that is drawn, instead of what the recipe says."""
    tokens: int = pydantic.Field(20_000, ge=64)
    """Tokens to take of each expert's corpus, those held out included."""
    held_out: float = pydantic.Field(0.2, ge=0, lt=0.9)
    """Share of each corpus that no router is fitted to, for judging; 0 for none."""
    max_length: int = pydantic.Field(512, ge=16)
    """Longest document in tokens: a longer row becomes several."""
    judge_tokens: int = pydantic.Field(4096, ge=0)
    """Tokens to judge routing and perplexity on; 0 for neither."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto uses the GPU if there is one."""
    overwrite: bool = False
    """Replace an earlier output of this command."""


def check(cfg: Config) -> None:
    """Refuse what needs no model to be refused: the recipe, its files, a place that is taken."""
    from moesmith.jobs._build_text import check_there
    from moesmith.jobs._folder import check_place
    from moesmith.models.checkpoint import local_folder

    recipe, _ = read(cfg)
    check_there(recipe)
    models = {recipe.base_model, *(str(expert.source_model) for expert in recipe.experts)}
    models |= {recipe.shared_expert.source_model} if recipe.shared_expert else set()
    for expert in recipe.experts:
        if expert.adapter is not None and not Path(expert.adapter).expanduser().is_dir():
            raise no_such_file(expert.adapter, f"adapter of {expert.name}")
    for model in sorted(models):
        check_place(cfg.out, local_folder(model), cfg.overwrite)


def read(cfg: Config) -> tuple[Recipe, list[str]]:
    """The recipe with the flags that win over it, and what was translated in it."""
    from moesmith.build.recipe import read_recipe

    over = {name: getattr(cfg, name) for name in OVER if getattr(cfg, name) is not None}
    return read_recipe(cfg.recipe, over)


def run(cfg: Config) -> None:
    from moesmith.jobs._build_parts import any_split, open_parts, placeholder, say_parts
    from moesmith.jobs._build_text import read_texts, say_texts
    from moesmith.jobs._build_words import say_result
    from moesmith.jobs._folder import check_space, start_folder

    started = time.perf_counter()
    recipe, translated = read(cfg)
    parts = open_parts(recipe)
    planned = placeholder(parts, parts.experts(any_split(parts)))
    nbytes = sum(tensor.nbytes for tensor in planned)
    say_parts(parts, translated, nbytes)
    texts = read_texts(parts.recipe, tokenizer_of(parts), cfg.max_length, cfg.tokens, cfg.held_out)
    say_texts(texts)
    check_space(cfg.out, nbytes + state_bytes(parts, texts), "the new model")

    facts = build(cfg, parts, texts, nbytes, start_folder(cfg.out), started)
    say_result(cfg, parts, facts)
    console.emit({"out": str(cfg.out), "report": str(cfg.out / "report.html"), **facts})


# ---------------------------------------------------------------- steps


def build(
    cfg: Config, parts: Parts, texts: Texts, nbytes: int, temporary: Path, started: float
) -> dict[str, Any]:
    """Everything that is written, then its name; returns what the record says."""
    from moesmith.jobs._build_fit import fit
    from moesmith.jobs._build_words import record, write_papers
    from moesmith.jobs._folder import finish_folder
    from moesmith.jobs._memory import PeakMemory

    try:
        made = Made()
        with PeakMemory() as peak:
            routers = fit(parts, texts, temporary / STATE, cfg.device)
            made.seconds["fit"] = routers.seconds
            write(parts, routers, temporary, made)
        made.peak, made.before = peak.nbytes, peak.start if peak.device is None else 0
        with PeakMemory() as judging:
            measure(cfg, parts, texts, routers, temporary, made)
        made.judging_peak = judging.nbytes
        shutil.rmtree(temporary / STATE, ignore_errors=True)
        made.seconds["all"] = time.perf_counter() - started
        facts = record(parts, texts, routers, made, nbytes)
        write_papers(temporary, cfg, parts, texts, facts)
    except (UserError, OSError, KeyboardInterrupt):  # nothing can go on from here
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finish_folder(temporary, cfg.out)
    return facts


@dataclass
class Made:
    """What the steps leave for the record."""

    experts: dict[str, Any] = field(default_factory=dict)
    proof: dict[str, Any] | None = None
    routing: dict[str, Any] | None = None
    perplexity: dict[str, Any] | None = None
    why_not: str | None = None
    """why nothing was proved or measured"""
    files: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    peak: int = 0
    before: int = 0
    """anonymous memory of the process, torch itself included, before the first layer was read"""
    judging_peak: int = 0


def tokenizer_of(parts: Parts) -> Any:
    """The base's tokenizer. Raises UserError if it comes without one."""
    from moesmith.jobs import _cut

    tokenizer = _cut.tokenizer_of(parts.base.folder)
    if tokenizer is None:
        raise UserError(
            f"{parts.base.name} has no tokenizer",
            "copy tokenizer.json and tokenizer_config.json of the model there",
        )
    return tokenizer


def state_bytes(parts: Parts, texts: Texts) -> int:
    """Disk that the hidden states of the streamed pass take, twice."""
    return 2 * sum(len(d.ids) for d in texts.documents) * parts.base.hidden_size * 4


def write(parts: Parts, routers: Routers, folder: Path, made: Made) -> None:
    """The model's files."""
    from moesmith.build.assemble import assemble, write_model

    started = time.perf_counter()
    experts = parts.experts(routers.split)
    tensors = assemble(parts.base, parts.config, experts, routers.rows, parts.shared)
    with console.bar("writing", total=sum(tensor.nbytes for tensor in tensors)) as bar:
        made.files = write_model(parts.base, folder, parts.config, tensors, on_bytes=bar.advance)
    made.experts = {**experts.facts(), **bytes_of(tensors)}
    made.seconds["write"] = time.perf_counter() - started


def bytes_of(tensors: Sequence[Any]) -> dict[str, int]:
    """Bytes that were copied as they are, and bytes that were made."""
    from moesmith.models.ranges import Piece

    copied = sum(part.nbytes for t in tensors for part in t.parts if isinstance(part, Piece))
    return {"bytes_copied": copied, "bytes_made": sum(t.nbytes for t in tensors) - copied}


def measure(cfg: Config, parts: Parts, texts: Texts, routers: Routers, folder: Path, made: Made) -> None:
    """Prove what was written, then judge its routing; what needs memory that is not there is left out."""
    import torch

    from moesmith.jobs import _build_judge as judge
    from moesmith.jobs import _build_proof as proof
    from moesmith.jobs._cut import no_room

    nbytes = made.experts["bytes_copied"] + made.experts["bytes_made"]
    made.why_not = no_room(nbytes, cfg.device)
    if made.why_not is not None:
        console.warn(f"neither proved nor judged: {made.why_not}")
        return
    started = time.perf_counter()
    exact = no_room(nbytes * 4 // parts.dtype.itemsize, cfg.device) is None
    dtype = torch.float32 if exact else parts.dtype  # fp32 tells a fault from rounding
    ids = proof_ids(parts, texts)
    wanted = proof.reference(parts, ids, dtype, cfg.device)
    proof.free()
    made.proof = proof.prove(proof.load(folder, cfg.device, dtype), parts, wanted, ids)
    proof.free()
    made.seconds["proof"] = time.perf_counter() - started

    started = time.perf_counter()
    places = texts.to_judge(cfg.judge_tokens)
    if not places:
        why = "--judge-tokens 0" if not cfg.judge_tokens else "there is no text"
        console.note(f"routing and perplexity are not measured: {why}")
        return
    chosen = judge.labelled(places, texts.labels)
    dense = judge.dense_losses(
        parts, chosen, cfg.device, folder / STATE, routers.losses, spans(texts, places)
    )
    proof.free()
    model = proof.load(folder, cfg.device)
    made.routing = judge.routing(model, parts, chosen, texts.held_out, routers.fitted)
    judged = judge.Judged(chosen, dense)
    made.perplexity = judge.perplexity(model, parts, judged, routers.embed, parts.recipe.seed)
    made.seconds["judge"] = time.perf_counter() - started


def proof_ids(parts: Parts, texts: Texts) -> list[int]:
    """A few tokens, of text that is held out where there is any; drawn ones without text."""
    import torch

    from moesmith.jobs._build_proof import TOKENS

    places = texts.to_judge(10**9)
    if places:
        return max((document.ids for _, document in places), key=len)[:TOKENS]
    generator = torch.Generator().manual_seed(parts.recipe.seed)
    return torch.randint(parts.base.config.vocab_size, (TOKENS,), generator=generator).tolist()


def spans(texts: Texts, places: Sequence[tuple[int, Any]]) -> list[tuple[int, int]]:
    """Where each document starts and ends among the tokens of all."""
    starts = [0]
    for document in texts.documents:
        starts.append(starts[-1] + len(document.ids))
    return [(starts[n], starts[n + 1]) for n, _ in places]


def save_recipe(recipe: Recipe, path: Path) -> None:
    """The recipe with everything filled in; given again, it makes the same weights."""
    values = recipe.model_dump(mode="json", exclude_none=True)
    if recipe.init != "split":
        values.pop("num_experts", None)
    write_atomically(path, yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=110))


def stamp(cfg: Config) -> dict[str, Any]:
    """Command, versions and date, for the record."""
    import moesmith

    return {
        "command": "build",
        "config": cfg.model_dump(mode="json"),
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "safetensors")},
        "moesmith": moesmith.__version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def save_record(folder: Path, cfg: Config, facts: dict[str, Any]) -> dict[str, Any]:
    """moesmith.json; returns what it says."""
    from moesmith.models.checkpoint import RECORD

    found = {**stamp(cfg), **facts}
    write_atomically(folder / RECORD, json.dumps(found, indent=2, default=str) + "\n")
    return found
