"""Measure which experts matter: what each one did, per layer and domain, while the model ran over text.

Prompts are answered by the model itself first, unobserved; then every document (prompt and answer, or a
corpus as it is) goes through the model once, observed from inside the experts call. A share of the text is
held out and never observed: `prune`, `compare` and `verify` judge on it. The folder holds all they need; an
interrupted run goes on when the same command is given again.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pydantic

from moesmith import console, ranks
from moesmith.config import JobConfig, no_such_file, save, write_atomically
from moesmith.errors import UserError

if TYPE_CHECKING:
    from moesmith.data.corpora import Counts, Document, Source
    from moesmith.prune.stats import Profile

POSITIONAL = ("model",)
JSON = True
RANKS = True
EXAMPLE = "moesmith profile olmoe-nf4 --corpus code=a.jsonl --corpus math=b.jsonl --out prof"
OUT_OF_MEMORY = "lower --batch-tokens; profile the packed model; or --stream, which holds one layer at a time"

PROFILE = "profile.json"  # written last: a folder with it is a whole profile
UNFINISHED = "unfinished.json"  # there while a profile is not whole: what it is made of
STATE = "replay.safetensors"  # what the replay has added up so far
SPOOL = "stream"  # folder of what --stream keeps on disk
# Options that do not change what is measured; whether it is the same model is told by its hash.
FREE = ("overwrite", "out", "model")
OF_ANSWERS = ("new_tokens", "thinking", "sample", "seed")


class Config(JobConfig):
    model: str
    """Model folder or hub name, in 16 bits or packed."""
    out: Path
    """Folder to create; one of an interrupted run with the same options is continued."""
    corpus: list[str] = []
    """name=path of a domain: .jsonl, .json, .parquet, text, a folder of them, or a hub name; repeatable."""
    prompts: str | None = None
    """Prompts to answer, rows with domain and prompt; without --corpus, 50 shipped ones by default."""
    tokens: int = pydantic.Field(20_000, ge=1)
    """Tokens per domain to take from a corpus, those held out included (200k is understood)."""
    max_length: int = pydantic.Field(512, ge=16)
    """Longest document in tokens: a longer row becomes several, a longer prompt is dropped."""
    held_out: float = pydantic.Field(0.2, ge=0, lt=0.9)
    """Share of each domain that is not observed, for judging; 0 for none."""
    generate: bool | None = None
    """The model answers: prompts without an answer (default), every prompt (on), none (off)."""
    new_tokens: int = pydantic.Field(128, ge=1)
    """Longest answer, in tokens."""
    thinking: bool = True
    """Switch thinking on for answers, where the chat template has a switch."""
    sample: bool = False
    """Draw the answers with the model's own generation settings and --seed, instead of greedily."""
    seed: int = 0
    """Of sampled answers and of resampling in the report."""
    batch_tokens: int = pydantic.Field(4096, ge=16)
    """Tokens in one forward pass, padding included."""
    stream: bool = False
    """One layer in memory at a time, for a model larger than memory; it cannot answer prompts."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Dtype of everything that is not packed. Norms are always taken in fp32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto uses the GPU if there is one."""
    overwrite: bool = False
    """Replace an earlier profile, or an interrupted one with other options."""

    @pydantic.field_validator("tokens", mode="before")
    @classmethod
    def _short_number(cls, value: Any) -> Any:
        """200k, 1M."""
        units = {"k": 1_000, "m": 1_000_000}
        if isinstance(value, str) and value[:-1].replace(".", "", 1).isdigit() and value[-1].lower() in units:
            return int(float(value[:-1]) * units[value[-1].lower()])
        return value


def check(cfg: Config) -> None:
    """Refuse what needs no model to be refused: no such text, no such folder, a place that is taken."""
    from moesmith.data.corpora import check_there, parse_corpora
    from moesmith.models.checkpoint import local_folder

    if cfg.corpus and cfg.prompts is not None:
        raise UserError(
            "--corpus and --prompts are both given",
            "prompts can be a corpus too: --corpus math=prompts.jsonl",
        )
    check_there(parse_corpora(cfg.corpus))
    if cfg.prompts is not None and not Path(cfg.prompts).expanduser().exists():
        raise no_such_file(cfg.prompts, "prompts")
    if cfg.stream and cfg.generate:
        raise UserError("--stream holds one layer at a time: it cannot generate", "leave --generate out")
    folder = local_folder(cfg.model)
    if folder is not None and cfg.out.resolve() == folder.resolve():
        raise UserError(f"--out {cfg.out} is the model itself")
    check_place(cfg)


def run(cfg: Config) -> None:
    from moesmith.data import leaks
    from moesmith.data.corpora import HELD_OUT, check_enough, corpus_hash, hold_out, write_documents
    from moesmith.jobs._memory import PeakMemory
    from moesmith.jobs._profile_words import meta, say_profile, say_text, side_facts, versions
    from moesmith.jobs._ranked import own
    from moesmith.jobs._replay import replay, replay_batches
    from moesmith.jobs._streamed import open_streamed, replay_streamed, text_layers
    from moesmith.models.checkpoint import resolve
    from moesmith.prune.observe import Collector

    folder = resolve(cfg.model)
    tokenizer, layers, positions = look_at(folder, cfg)
    streamed = open_streamed(folder, cfg.dtype, device(cfg)) if cfg.stream else None
    sources, counts = read_text(cfg, tokenizer, positions)
    hold_out(sources, cfg.held_out)
    say_text(counts)
    ranks.barrier()  # every process has seen that the place is free
    started_as = start_folder(cfg, folder, {layer.num_experts for layer in layers}) if ranks.is_main() else {}
    hashes = ranks.gather(started_as)[0]

    started = time.perf_counter()
    with PeakMemory() as peak:
        model = None if streamed else load(folder, cfg)
        answers = answer_prompts(model, tokenizer, sources, cfg)
        used, held_out = both_sides(sources, tokenizer, cfg)
        check_enough(used, counts)
        ngrams = leaks.collect(source for source in sources if not source.held_out)
        held_out, alike = leaks.disjoint(ngrams, held_out)
        if ranks.is_main():
            write_documents(cfg.out / "documents.jsonl", used)
            write_documents(cfg.out / HELD_OUT, held_out)
            leaks.write(cfg.out / leaks.NGRAMS, ngrams)

        about = {**hashes, "corpus_hash": corpus_hash(used)}
        run_of = {**about, **versions()}  # another version may compute other bits: sums are not mixed
        batches = ranks.share(replay_batches([document.ids for document in used], cfg.batch_tokens))
        replayed_at = time.perf_counter()
        if streamed:
            collector = Collector(text_layers(streamed), records(used))
            if batches:
                replay_streamed(streamed, collector, batches, spool(cfg.out, run_of))
        else:
            collector = Collector(layers, records(used))
            replay(model, collector, batches, own(cfg.out / STATE), run_of)
        collector.add_up()
        seconds = {"replay": time.perf_counter() - replayed_at, "all": time.perf_counter() - started}

    facts = {
        "tokens": sum(len(document.ids) for document in used),
        "held_out": side_facts(held_out),
        "rows": {name: count.facts() for name, count in counts.items()},
        "answers": answers,
        "held_out_dropped": [overlap.document.id for overlap in alike],
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "peak_bytes": peak.nbytes,
        **({"processes": ranks.world()} if ranks.world() > 1 else {}),
    }
    if not ranks.is_main():
        return
    profile = collector.finish(meta(cfg, folder, about, facts))
    finish_folder(profile, cfg)
    say_profile(profile, cfg, facts)


# ---------------------------------------------------------------- the folder


def check_place(cfg: Config) -> None:
    """Raise UserError unless --out is free, or an interrupted run of these very options.

    With --overwrite an earlier profile, whole or not, may stand there.
    """
    out = cfg.out
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    whole, begun = (out / PROFILE).is_file(), (out / UNFINISHED).is_file()
    if cfg.overwrite:
        if not (whole or begun):
            raise UserError(f"{out} holds no profile, so --overwrite leaves it alone", "choose another --out")
        return
    if whole or not begun:
        raise UserError(f"{out} exists", "choose another --out, or --overwrite to replace a profile")
    other = other_options(cfg)
    if other and holds_work(out):
        raise UserError(
            f"{out} holds an interrupted profile with other options ({', '.join(other)})",
            "give those to go on with it, --overwrite to start over, or another --out",
        )


def other_options(cfg: Config) -> list[str]:
    """The options of the interrupted run in --out, as key=value, where they are not those of this one."""
    earlier = json.loads((cfg.out / UNFINISHED).read_text(encoding="utf-8"))["config"]
    mine = options(cfg)
    keys = sorted(key for key in {*earlier, *mine} if earlier.get(key) != mine.get(key))
    return [f"{key}={earlier.get(key)}" for key in keys]


def holds_work(out: Path) -> bool:
    """Whether an interrupted run left anything that took time: answers, sums or hidden states."""
    from moesmith.jobs._answers import GENERATED
    from moesmith.jobs._ranked import all_of

    return any(path.exists() for name in (GENERATED, STATE, SPOOL) for path in all_of(out / name))


def options(cfg: Config) -> dict[str, Any]:
    """The options that change what is measured, as JSON values; a path is one however it is written."""
    from moesmith.data.corpora import parse_corpora

    unused = [] if cfg.generate is not False and not cfg.stream else [*OF_ANSWERS]
    unused += [] if cfg.sample else ["seed"]
    found = cfg.model_dump(mode="json", exclude={*FREE, *unused})
    found["corpus"] = {name: _real(path) for name, path in parse_corpora(cfg.corpus).items()}
    found["prompts"] = cfg.prompts and _real(cfg.prompts)
    return found


def _real(path: str) -> str:
    """The whole path of a local file or folder; a hub name as it is."""
    local = Path(path).expanduser()
    return str(local.resolve()) if local.exists() else path


def start_folder(cfg: Config, folder: Path, num_experts: set[int]) -> dict[str, str]:
    """Make --out, or take it up again; returns the hashes of the model.

    Raises:
        UserError: the place is taken, or the model is another one than when the run was interrupted.
    """
    from moesmith.prune.stats import identity

    check_place(cfg)
    out = cfg.out
    hashes = identity(folder, num_experts)
    begun = (out / UNFINISHED).is_file() and not (out / PROFILE).is_file()
    if begun and holds_work(out) and not other_options(cfg):
        earlier = json.loads((out / UNFINISHED).read_text(encoding="utf-8"))
        if earlier["model_hash"] == hashes["model_hash"]:
            console.note(f"going on with the interrupted profile in {out}")
            return hashes
        if not cfg.overwrite:
            raise UserError(
                f"{cfg.model} is another model, or has changed since the profile in {out} was interrupted",
                "--overwrite starts over",
            )
    clear(out)
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / UNFINISHED, json.dumps({"config": options(cfg), **hashes}, indent=2) + "\n")
    save(cfg, out / "config.yaml")
    return hashes


def clear(out: Path) -> None:
    """Take an earlier profile away, that which makes it whole first; other files stay."""
    from moesmith.data.corpora import HELD_OUT
    from moesmith.data.leaks import NGRAMS
    from moesmith.jobs._answers import GENERATED
    from moesmith.jobs._ranked import all_of

    names = (PROFILE, "stats.safetensors", "documents.jsonl", HELD_OUT, NGRAMS)
    for name in (*names, "config.yaml", "report.html", "report.json", "report.png"):
        (out / name).unlink(missing_ok=True)
    for path in (*all_of(out / STATE), *all_of(out / GENERATED)):
        path.unlink(missing_ok=True)
    for path in all_of(out / SPOOL):
        shutil.rmtree(path, ignore_errors=True)
    (out / UNFINISHED).unlink(missing_ok=True)


def spool(out: Path, about: dict[str, str]) -> Path:
    """A folder for what --stream keeps on disk: emptied when it belongs to other text or another model."""
    from moesmith.jobs._ranked import own

    folder = own(out / SPOOL)
    mark = folder / "about.json"
    if not (mark.is_file() and json.loads(mark.read_text(encoding="utf-8")) == about):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_atomically(mark, json.dumps(about))
    return folder


def finish_folder(profile: Profile, cfg: Config) -> None:
    """Write the profile; with it the folder is a whole one, and what only served the run goes."""
    from moesmith.jobs._ranked import all_of

    profile.write(cfg.out)
    for name in (STATE, STATE + ".tmp"):
        for path in all_of(cfg.out / name):
            path.unlink(missing_ok=True)
    for path in all_of(cfg.out / SPOOL):
        shutil.rmtree(path, ignore_errors=True)
    (cfg.out / UNFINISHED).unlink()


# ---------------------------------------------------------------- model and text


def look_at(folder: Path, cfg: Config) -> tuple[Any, list[Any], int | None]:
    """Tokenizer, MoE layers and longest input of a model, before any weight is read.

    Raises:
        UserError: no tokenizer, no MoE layers, or weights that neither torch nor moesmith holds.
    """
    from transformers import AutoTokenizer

    from moesmith.models.anatomy import meta_model
    from moesmith.models.checkpoint import Checkpoint, check_architecture
    from moesmith.models.layers import text_layers

    checkpoint = Checkpoint.open(folder)
    check_architecture(checkpoint.config)
    if not checkpoint.has_tokenizer:
        raise UserError(
            f"{folder} has no tokenizer", "copy tokenizer.json and tokenizer_config.json of the model there"
        )
    if checkpoint.quantization is not None and not checkpoint.is_packed:
        method = checkpoint.quantization.get("quant_method", "an unnamed method")
        raise UserError(f"{cfg.model} is quantised with {method}", "profile its 16-bit version")
    model = meta_model(checkpoint.config)
    if model.config.is_encoder_decoder:
        raise UserError(f"{cfg.model} is an encoder-decoder model", "only decoders can be profiled")
    layers = text_layers(model)
    if not layers:
        raise UserError(f"{cfg.model} has no MoE layers: there are no experts to profile")
    first = layers[0]
    counts = "/".join(map(str, sorted({layer.num_experts for layer in layers})))
    console.row(
        "model", f"{Path(cfg.model).name} · {len(layers)} layers x {counts} experts, top-{first.top_k}"
    )
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return AutoTokenizer.from_pretrained(folder), layers, positions


def read_text(cfg: Config, tokenizer: Any, positions: int | None) -> tuple[list[Source], dict[str, Counts]]:
    """Every row to use, rendered for this model, and the counts per domain.

    Raises:
        UserError: a corpus without a usable row, or prompts that nothing can answer.
    """
    from moesmith.data.corpora import Reader, parse_corpora, read_corpus, read_prompts
    from moesmith.jobs._answers import check_room
    from moesmith.jobs._streamed import refuse_answers

    sources: list[Source] = []
    counts: dict[str, Counts] = {}
    reader = Reader(tokenizer, cfg.max_length, None, cfg.generate, cfg.thinking)
    if cfg.corpus:
        reader.tokens = cfg.tokens
        for domain, path in parse_corpora(cfg.corpus).items():
            found, counts[domain] = reader.read(domain, read_corpus(path, cfg.max_length))
            sources += found
    else:
        for domain, rows in read_prompts(cfg.prompts).items():
            found, counts[domain] = reader.read(domain, rows)
            sources += found
    asking = sum(source.question is not None for source in sources)
    if cfg.stream:
        refuse_answers(asking)
    check_room(positions, cfg.max_length, cfg.new_tokens if asking else 0)
    return sources, counts


def load(folder: Path, cfg: Config) -> Any:
    """The model as it lies on disk, ready to run."""
    import torch

    from moesmith.models.checkpoint import Checkpoint, model_class

    if not console.stderr().is_terminal:
        from transformers.utils import logging

        logging.disable_progress_bar()
    model = model_class(Checkpoint.open(folder).config).from_pretrained(
        folder,
        dtype=getattr(torch, cfg.dtype),
        device_map={"": torch.cuda.current_device()} if device(cfg) == "cuda" else None,
    )
    return model.eval()


def device(cfg: Config) -> str:
    """cpu or cuda."""
    import torch

    if cfg.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return cfg.device


def answer_prompts(model: Any, tokenizer: Any, sources: list[Source], cfg: Config) -> dict[str, Any] | None:
    """Phase 1, and its counts; None when every row came with its answer."""
    from moesmith.jobs._answers import Settings, answer
    from moesmith.jobs._ranked import answer_together

    if not any(source.question is not None for source in sources):
        return None
    settings = Settings(cfg.new_tokens, cfg.batch_tokens, cfg.sample, cfg.seed)
    begun = time.perf_counter()
    before = answer_together(model, tokenizer, sources, cfg.out, settings)
    facts = answer(model, tokenizer, sources, cfg.out, settings)
    if before is not None:
        facts |= {"found": before, "seconds": round(time.perf_counter() - begun, 2)}
    found = f", {facts['found']:,} of them from before" if facts["found"] else ""
    console.row(
        "answers",
        f"{facts['answers']:,} of at most {cfg.new_tokens} tokens{found} · {facts['tokens']:,} tokens, "
        f"{facts['ended']:,} ended by themselves · {console.duration(facts['seconds'])}",
    )
    if facts["repeating"]:
        say = console.warn if 2 * facts["repeating"] > facts["answers"] else console.note
        say(
            f"{facts['repeating']:,} of {facts['answers']:,} answers went round in circles and were cut "
            "where they repeat themselves; --sample makes others, --corpus takes text as it is"
        )
    return facts


def both_sides(sources: list[Source], tokenizer: Any, cfg: Config) -> tuple[list[Document], list[Document]]:
    """(to observe, held out)."""
    from moesmith.data.corpora import cut

    sides: tuple[list[Document], list[Document]] = [], []
    for source in sources:
        sides[source.held_out].extend(cut(source, cfg.max_length, tokenizer))
    return sides


def records(documents: Sequence[Document]) -> list[Any]:
    """The documents as the profile remembers them."""
    from moesmith.data.corpora import content_key
    from moesmith.prune.stats import Document as Record

    return [
        Record(d.id, d.domain, len(d.ids), content_key(" ".join(map(str, d.ids))).hex()) for d in documents
    ]
