"""Export a model for another program, and prove that it says the same there.

merged  the model and its adapters as one 16-bit folder, for transformers, vLLM and everything that loads it
lora    the adapter alone, in the form that --for names: peft, vllm or gguf
gguf    files for llama.cpp and Ollama, in 16 bits or quantised, with a Modelfile
card    a model card of any folder: where it comes from and what was measured

A packed base is dequantised exactly; an adapter goes onto what it was trained on. Every export ends with
parity: the next token's log-probabilities of the source in transformers against the export in its own
program, on 16 prompts or more. Beyond the tolerance of its route nothing is kept; docs/export.md has them.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pydantic

from moesmith import config, console
from moesmith.config import JobConfig
from moesmith.errors import UserError

if TYPE_CHECKING:
    from moesmith.export.llama_cpp import LlamaCpp
    from moesmith.jobs._export import Judged, Source
    from moesmith.jobs._export_ask import Prompts, Said

POSITIONAL = ("action", "model")
JSON = True
EXAMPLE = "moesmith export gguf --adapter run1/best --quant q4_k_m --out run1-gguf"
OUT_OF_MEMORY = "compare layer by layer: --stream"


class Config(JobConfig):
    action: Literal["merged", "lora", "gguf", "card"]
    """merged, lora, gguf or card."""
    model: str | None = None
    """Model folder or hub name, packed or 16-bit; without it, the base that the adapter names."""
    adapter: list[Path] = []
    """An adapter on the model; several are added up."""
    out: Path
    """Folder to create."""
    for_: Literal["peft", "vllm", "gguf"] = "peft"
    """lora: whose form the adapter gets."""
    base_name: str | None = None
    """lora: the base that adapter_config.json names, a hub name or a folder; else the one trained on."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """merged, lora, gguf: dtype of merged weights, and of the GGUF that is quantised."""
    shard_gb: float = pydantic.Field(5.0, gt=0)
    """merged: most GB in one file."""
    quant: list[str] = []
    """gguf: quantisations, as llama-quantize names them (q4_k_m,q8_0); none keeps 16 bits."""
    imatrix: str | None = None
    """gguf: an importance matrix for quantising: a file, or auto to make one from text that is there."""
    llama_cpp: str | None = None
    """lora, gguf: a llama.cpp folder, or fetch to get one; else $LLAMA_CPP, PATH, or one fetched before."""
    pre_tokenizer: str | None = None
    """lora, gguf: llama.cpp's name of the pre-tokenizer, for a vocabulary the converter does not know."""
    threads: int | None = pydantic.Field(None, ge=1)
    """lora, gguf: threads of llama.cpp; without it, all cores."""
    prompts: Path | None = None
    """merged, lora, gguf: rows to compare on (`prompt`, `messages` or `text`), instead of ours."""
    tolerance: float | None = pydantic.Field(None, gt=0)
    """merged, lora, gguf: largest mean difference of log-probabilities, instead of the route's bounds."""
    stream: bool = False
    """merged, lora, gguf: compare layer by layer; by itself where the model would not fit in memory."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """merged, lora, gguf: where transformers computes; auto uses the GPU if there is one."""
    overwrite: bool = False
    """Replace an earlier output of this command."""
    dry_run: bool = False
    """Say what would be done, and write nothing."""


ACTIONS = ("merged", "lora", "gguf", "card")


def actions_of(key: config.Key) -> list[str]:
    """The actions that use a key, as its help begins; all of them for a key that names none."""
    named = key.help.partition(": ")[0].split(", ")
    return named if set(named) <= set(ACTIONS) else list(ACTIONS)


def check(cfg: Config) -> None:
    """Refuse keys of another action, files that are not there, and a place that is taken."""
    from moesmith.jobs._folder import check_place
    from moesmith.jobs.chat import recorded_base
    from moesmith.models.checkpoint import local_folder

    for key in config.keys(Config):
        if key.name in cfg.model_fields_set and key.name != "action" and cfg.action not in actions_of(key):
            owners = " and ".join(f"`export {action}`" for action in actions_of(key))
            raise UserError(f"{config.flag(key.name)} belongs to {owners}, not to `export {cfg.action}`")
    if cfg.action == "lora" and not cfg.adapter:
        raise UserError("export lora: missing --adapter", "the folder of an adapter: --adapter run1/best")
    for name in ("llama_cpp", "pre_tokenizer", "threads"):
        if getattr(cfg, name) is not None and cfg.action == "lora" and cfg.for_ != "gguf":
            raise UserError(f"{config.flag(name)} goes with --for gguf")
    bases = [recorded_base(adapter) for adapter in cfg.adapter]
    given = cfg.model or next((base["path"] for base in bases if base and base.get("path")), None)
    if given is None:
        raise UserError(
            "missing MODEL",
            f"moesmith export {cfg.action} MODEL, or --adapter with a folder that names its base",
        )
    folder = local_folder(given)
    for path in (folder, *cfg.adapter):
        check_place(cfg.out, path, cfg.overwrite)
    for flag, file in (("prompts", cfg.prompts), ("imatrix", named_file(cfg.imatrix))):
        if file is not None and not file.is_file():
            raise config.no_such_file(file, flag)
    if cfg.imatrix is not None and not cfg.quant:
        raise UserError("--imatrix is for quantising", "--quant q4_k_m")


def named_file(imatrix: str | None) -> Path | None:
    """The file that --imatrix names."""
    return None if imatrix in (None, "auto") else Path(str(imatrix))


def run(cfg: Config) -> None:
    {"merged": merged, "lora": lora, "gguf": gguf, "card": card}[cfg.action](cfg)


# ---------------------------------------------------------------- merged


def merged(cfg: Config) -> None:
    """Base and adapters as one folder of 16-bit weights."""
    from dataclasses import asdict

    from moesmith.export.merge import merged_bytes
    from moesmith.jobs._export import making, record_of, say_merged, write_record
    from moesmith.jobs._memory import PeakMemory

    source = opened(cfg)
    if source.plain:
        raise UserError(
            f"{source.given} has 16-bit weights and there is no --adapter: nothing to merge",
            "give --adapter, or a model that moesmith packed",
        )
    space(cfg, merged_bytes(source.folder, cfg.dtype), "the merged model")
    prompts = asked(cfg, source)
    if cfg.dry_run:
        return done_dry(cfg, source)
    record = record_of(cfg, source)
    started = time.perf_counter()
    with making(cfg.out) as folder:
        with PeakMemory() as peak:
            result = merge(cfg, source, folder)
        merging = time.perf_counter() - started
        say_merged(result, bool(source.adapters))
        console.row("memory", f"peak {console.size(peak.ram - peak.start)} above the start of merging")
        said = ask_source(cfg, source, prompts)
        seconds = time.perf_counter()
        export = ask_folder(cfg, folder, [], prompts, said)
        judged = judge_one(cfg, cfg.dtype, source, said, export, prompts, time.perf_counter() - seconds)
        record |= {
            "merged": {**asdict(result), "peak_bytes": peak.ram - peak.start, "seconds": round(merging, 2)},
            "prompts": prompts.facts(),
            "parity": [judged.facts()],
        }
        write_record(folder, record)
        write_card(folder, source, record)
    written(
        cfg, record, f"moesmith chat {cfg.out} --scheme none", f"moesmith export gguf {cfg.out} --out ..."
    )


def merge(cfg: Config, source: Source, folder: Path, adapters: bool = True) -> Any:
    """Merge into an existing folder, with a bar."""
    from moesmith.export.merge import merge_checkpoint, merged_bytes

    with console.bar("merging", total=merged_bytes(source.folder, cfg.dtype)) as bar:
        return merge_checkpoint(
            source.folder, source.adapters if adapters else [], folder, dtype=cfg.dtype,
            shard_bytes=int(cfg.shard_gb * 1e9), on_bytes=bar.advance,
        )  # fmt: skip


# ---------------------------------------------------------------- lora


def lora(cfg: Config) -> None:
    """The adapter alone, in another program's form."""
    from moesmith.export.merge import merged_bytes
    from moesmith.jobs._export import making, record_of, write_record
    from moesmith.jobs._export_gguf import needed
    from moesmith.jobs._export_lora import export_in_form, own_record

    source = opened(cfg)
    llama = llama_of(cfg) if cfg.for_ == "gguf" else None
    if llama is not None:
        check_gguf(source, llama)
        space(cfg, needed(cfg, source), "the comparison")
    if cfg.for_ == "vllm":
        space(cfg, merged_bytes(source.folder, "float32"), "the comparison, in 32 bits,")
    prompts = asked(cfg, source)
    if cfg.dry_run:
        return done_dry(cfg, source)
    record = record_of(cfg, source)
    with making(cfg.out) as folder:
        counts, judged = export_in_form(cfg, source, folder, prompts, llama)
        record |= {"lora": counts, "prompts": prompts.facts(), "parity": [one.facts() for one in judged]}
        write_record(folder, record, own_record(source) if cfg.for_ == "peft" else None)
        write_card(folder, source, record)
    following = {
        "peft": f"moesmith chat {source.given} --adapter {cfg.out}",
        "vllm": f"vllm serve MERGED_BASE --enable-lora --lora-modules mine={cfg.out}",
        "gguf": f"llama-server -m BASE.gguf --lora {cfg.out}/{cfg.out.name}.gguf",
    }
    written(cfg, record, following[cfg.for_])


# ---------------------------------------------------------------- gguf


def gguf(cfg: Config) -> None:
    """Files for llama.cpp: merge, convert, quantise, compare in llama-server."""
    from moesmith.jobs._export import making, record_of, write_record
    from moesmith.jobs._export_gguf import check_kinds, make_files, needed, write_modelfile

    llama = llama_of(cfg)
    check_kinds(cfg, llama)
    source = opened(cfg)
    check_gguf(source, llama)
    space(cfg, needed(cfg, source), "the export")
    prompts = asked(cfg, source)
    if cfg.dry_run:
        return done_dry(cfg, source)
    record = record_of(cfg, source)
    with making(cfg.out) as folder:
        facts, judged = make_files(cfg, source, folder, prompts, llama)
        facts["modelfile"] = write_modelfile(folder, facts["files"], source)
        record |= {"gguf": facts, "prompts": prompts.facts(), "parity": [one.facts() for one in judged]}
        write_record(folder, record)
        write_card(folder, source, record)
    file = facts["files"][-1]["file"]
    following = [f"llama-server -m {cfg.out}/{file}"]
    if facts["modelfile"]:
        following.append(f"ollama create {cfg.out.name.lower()} -f {cfg.out}/Modelfile")
    written(cfg, record, *following)


def llama_of(cfg: Config) -> LlamaCpp:
    """llama.cpp, found or fetched."""
    from moesmith.export.llama_cpp import LlamaCpp

    if cfg.llama_cpp == "fetch":
        return LlamaCpp.fetch(console.note)
    return LlamaCpp.find(Path(cfg.llama_cpp) if cfg.llama_cpp is not None else None)


def check_gguf(source: Source, llama: LlamaCpp) -> None:
    """Raise UserError for a model that llama.cpp would refuse, or run wrongly."""
    from moesmith.export.gguf import check_gguf as refuse
    from moesmith.export.gguf import remarks

    refuse(source.checkpoint.config, source.folder, llama)
    for remark in remarks(source.checkpoint.config):
        console.note(remark)


# ---------------------------------------------------------------- card


def card(cfg: Config) -> None:
    """A model card of a folder, from the records that lie in it and in what it was made of."""
    from moesmith.jobs._export import making, record_of, write_record

    source = opened(cfg)
    if cfg.dry_run:
        return done_dry(cfg, source)
    record = record_of(cfg, source)
    with making(cfg.out) as folder:
        write_record(folder, record)
        (folder / "parity.json").unlink()
        text = write_card(folder, source, None)
    console.row("card", f"{len(text.splitlines()):,} lines")
    written(cfg, record)


def write_card(folder: Path, source: Source, record: dict[str, Any] | None) -> str:
    """README.md beside what was exported."""
    from moesmith.config import write_atomically
    from moesmith.jobs._export_card import card_text

    text = card_text(folder, source, record)
    write_atomically(folder / "README.md", text)
    return text


# ---------------------------------------------------------------- what every action does


def opened(cfg: Config) -> Source:
    """The model and its adapters, found, allowed and named aloud."""
    from moesmith.jobs._export import open_source

    source = open_source(cfg.model, cfg.adapter, cfg.action)
    console.row("source", source.words())
    return source


def space(cfg: Config, needed: int, what: str) -> None:
    """Say how much is written; raise UserError where the disk has no room for it."""
    from moesmith.jobs._folder import check_space

    check_space(cfg.out, needed, what)
    free = shutil.disk_usage(next(one for one in cfg.out.resolve().parents if one.exists())).free
    console.row("disk", f"{what} takes up to {console.size(needed)}, {console.size(free)} are free")


def asked(cfg: Config, source: Source) -> Prompts:
    """What both sides are asked."""
    from moesmith.jobs._export import read_tokenizer
    from moesmith.jobs._export_ask import read_prompts

    prompts = read_prompts(cfg.prompts, read_tokenizer(source), source.checkpoint.config)
    cut = f" · {prompts.cut} cut to their end" if prompts.cut else ""
    console.row("prompts", f"{prompts.what} of up to {prompts.longest:,} tokens{cut}")
    if len(prompts.ids) < 16:
        console.warn(f"{len(prompts.ids)} prompts are few: parity may miss what 16 would show")
    return prompts


def ask_source(cfg: Config, source: Source, prompts: Prompts) -> Said:
    """What the source says, adapter running, and what it says without."""
    from moesmith.jobs._export_ask import ask

    started = time.perf_counter()
    exact = cfg.action == "lora" and cfg.for_ != "gguf"
    wide = cfg.action == "gguf" and cfg.quant and cfg.dtype == "float32"  # quantised files need the scale
    said = ask(
        source.folder, source.adapters, prompts, stream=cfg.stream, device=cfg.device,
        also_in="float32" if exact else "bfloat16" if wide else cfg.dtype, label="asking the source",
    )  # fmt: skip
    way = "layer by layer" if said.streamed else "in memory"
    console.note(f"asked the source {way} in {console.duration(time.perf_counter() - started)}")
    return said


def ask_folder(cfg: Config, folder: Path, adapters: list[Path], prompts: Prompts, said: Said) -> Any:
    """What an exported folder says in transformers, of the tokens that the source found likely."""
    from moesmith.jobs._export_ask import ask

    return ask(
        folder,
        adapters,
        prompts,
        also=said.full,
        stream=cfg.stream,
        device=cfg.device,
        label="asking the export",
    ).full


def judge_one(
    cfg: Config, route: str, source: Source, said: Said, export: Any, prompts: Prompts, seconds: float
) -> Judged:
    """The export against the source."""
    from moesmith.jobs._export import judge

    return judge(route, "the source", said, export, prompts, cfg.tolerance, seconds, dtype=cfg.dtype)


def done_dry(cfg: Config, source: Source) -> None:
    """The end of a dry run."""
    console.row("dry run", f"{cfg.out} was not written")
    console.emit({"out": str(cfg.out), "dry_run": True, **source.facts()})


def written(cfg: Config, record: dict[str, Any], *following: str) -> None:
    """The last lines."""
    from moesmith.jobs._export import bytes_of

    files = sorted(path.name for path in cfg.out.iterdir() if path.is_file())
    shown = ", ".join(files[:8]) + (f" and {len(files) - 8} more" if len(files) > 8 else "")
    console.row("written", f"{cfg.out} ({console.size(bytes_of(cfg.out))}): {shown}")
    if following:
        console.next_command(*following)
    console.emit({"out": str(cfg.out), "bytes": bytes_of(cfg.out), **record})
