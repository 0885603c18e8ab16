"""`moesmith export gguf`: merge, convert, quantise and ask llama-server, in a folder that is not named yet.

The 16-bit file is compared with the source, every quantised one with the 16-bit file: so what quantising
costs is told from what exporting broke.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesmith import console
from moesmith.config import write_atomically
from moesmith.errors import UserError

if TYPE_CHECKING:
    from moesmith.export.llama_cpp import LlamaCpp
    from moesmith.jobs._export import Judged, Source
    from moesmith.jobs._export_ask import Prompts

REPORTED = 1000
"""tokens that llama-server is asked to report: all of the source's likely ones are among them"""
IMATRIX_CHUNKS = 16
IMATRIX_PIECE = 2500
"""characters of one kind of text before the next kind follows"""
WORK = ".work"


def check_quants(cfg: Any) -> list[str]:
    """The quantisations that were asked for, as llama.cpp writes them; the kept 16-bit file is none of them.

    Raises:
        UserError: a 16- or 32-bit type that is not the one of --dtype, or one asked for twice.
    """
    from moesmith.jobs._export import OUTTYPES

    kinds = [kind.strip().upper() for kind in cfg.quant]
    for kind in kinds:
        if kind in ("BF16", "F16", "F32") and kind.lower() != OUTTYPES[cfg.dtype]:
            dtype = next(name for name, short in OUTTYPES.items() if short == kind.lower())
            raise UserError(f"--quant {kind.lower()}: the 16-bit file is in {cfg.dtype}", f"--dtype {dtype}")
        if kinds.count(kind) > 1:
            raise UserError(f"--quant {kind.lower()} is asked for twice")
    return kinds


NEED_MATRIX = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "Q2_K_S")
"""quantisations that llama-quantize refuses to make without an importance matrix"""


def check_kinds(cfg: Any, llama: LlamaCpp) -> None:
    """Raise UserError for a quantisation that this llama.cpp does not know, or that lacks its matrix."""
    known = llama.kinds()
    for kind in check_quants(cfg):
        if known and kind not in known | {"F32"}:
            raise UserError(
                f"--quant {kind.lower()}: llama-quantize does not know it",
                f"it knows {', '.join(sorted(known)).lower()}",
            )
        if kind in NEED_MATRIX and cfg.imatrix is None:
            raise UserError(f"--quant {kind.lower()} needs an importance matrix", "--imatrix auto")


def needed(cfg: Any, source: Source) -> int:
    """Bytes on disk at the worst moment."""
    from moesmith.export.merge import merged_bytes
    from moesmith.jobs._export import OUTTYPES, quant_bytes

    width = 4 if cfg.dtype == "float32" else 2
    wide = int(1.02 * merged_bytes(source.folder, cfg.dtype))
    quants = sum(
        quant_bytes(wide, kind, width) for kind in check_quants(cfg) if kind.lower() != OUTTYPES[cfg.dtype]
    )
    return wide + max(0 if source.plain else wide, quants)


def make_files(
    cfg: Any, source: Source, folder: Path, prompts: Prompts, llama: LlamaCpp
) -> tuple[dict[str, Any], list[Judged]]:
    """Write the GGUF files into `folder`, every one compared.

    Returns:
        facts for the record, the comparisons.

    Raises:
        UserError: a tool failed, or parity is out of bounds.
    """
    from moesmith.export.parity import compare, quant_route
    from moesmith.jobs._export import OUTTYPES, judge
    from moesmith.jobs._export_ask import Said
    from moesmith.jobs.export import ask_source

    kinds, outtype = check_quants(cfg), OUTTYPES[cfg.dtype]
    kept = not kinds or outtype.upper() in kinds
    work = folder / WORK
    work.mkdir()
    facts: dict[str, Any] = {"llama_cpp": llama.version(), "files": []}
    wide = (folder if kept else work) / f"{cfg.out.name}-{outtype.upper()}.gguf"
    facts |= convert(cfg, source, work, wide, llama)
    said = ask_source(cfg, source, prompts)
    whole, seconds = ask_server(llama, wide, prompts, cfg.threads)
    route = quant_route(outtype)
    scale = compare(said.full, said.rounded) if said.rounded is not None else None
    if cfg.dtype == "float32":
        said = replace(said, rounded=None)
    judged = [judge(route, "the source", said, whole, prompts, cfg.tolerance, seconds, dtype=cfg.dtype)]
    if kept:
        facts["files"].append({"file": wide.name, "kind": outtype.upper(), "bytes": wide.stat().st_size})
    quants = [kind for kind in kinds if kind != outtype.upper()]
    matrix = importance(cfg, source, work, folder, wide, llama, facts) if quants else None
    for kind in quants:
        file = folder / f"{cfg.out.name}-{kind}.gguf"
        with console.bar(f"quantising to {kind}", total=1) as bar:
            made = llama.quantize(wide, file, kind, imatrix=matrix, threads=cfg.threads, on_share=bar.update)
        say_quantised(kind, made)
        facts["files"].append({"file": file.name, **made})
        answers, seconds = ask_server(llama, file, prompts, cfg.threads)
        judged.append(
            judge(
                f"gguf {kind.lower()}", f"the {outtype} file", Said(whole), answers, prompts, None, seconds,
                bounds_of=quant_route(kind), own=scale,
                dtype="bfloat16" if cfg.dtype == "float32" else cfg.dtype,
            )
        )  # fmt: skip
    shutil.rmtree(work)
    return facts, judged


def convert(cfg: Any, source: Source, work: Path, out: Path, llama: LlamaCpp) -> dict[str, Any]:
    """The source as one 16-bit GGUF file, merged first where it is packed or has adapters."""
    from moesmith.jobs._export import say_merged
    from moesmith.jobs.export import merge

    facts: dict[str, Any] = {}
    folder = source.folder
    if not source.plain:
        folder = work / "merged"
        folder.mkdir()
        result = merge(cfg, source, folder)
        say_merged(result, bool(source.adapters))
        facts["merged"] = asdict(result)
    started = time.perf_counter()
    with console.bar("converting with llama.cpp", total=1) as bar:
        llama.convert(folder, out, _outtype(cfg), cfg.pre_tokenizer, on_share=bar.update)
    seconds = time.perf_counter() - started
    console.row(
        "convert", f"{console.size(out.stat().st_size)} of {_outtype(cfg)} in {console.duration(seconds)}"
    )
    if folder != source.folder:
        shutil.rmtree(folder)
    return facts | {"convert_seconds": round(seconds, 2)}


def _outtype(cfg: Any) -> str:
    from moesmith.jobs._export import OUTTYPES

    return OUTTYPES[cfg.dtype]


def ask_server(
    llama: LlamaCpp, file: Path, prompts: Prompts, threads: int | None, lora: Path | None = None
) -> tuple[list[dict[int, float]], float]:
    """What llama-server says after each prompt; and the seconds this took, loading included."""
    started = time.perf_counter()
    answers = []
    with console.bar(f"asking {file.name}", total=len(prompts.ids)) as bar:
        # a cache in 32 bits: what is compared is the weights
        with llama.serve(file, lora=lora, threads=threads, ctx=prompts.longest + 64, cache="f32") as server:
            for ids in prompts.ids:
                answers.append(server.next_logprobs(ids, REPORTED))
                bar.advance()
    return answers, time.perf_counter() - started


# ---------------------------------------------------------------- the importance matrix


def importance(
    cfg: Any, source: Source, work: Path, folder: Path, wide: Path, llama: LlamaCpp, facts: dict[str, Any]
) -> Path | None:
    """The matrix that --imatrix asks for: the file it names, or one made here and kept beside the models."""
    if cfg.imatrix is None:
        return None
    if cfg.imatrix != "auto":
        facts["imatrix"] = {"file": str(cfg.imatrix)}
        return Path(cfg.imatrix)
    from moesmith.jobs._export import read_tokenizer

    text = work / "calibration.txt"
    kinds = calibration_text(read_tokenizer(source))
    write_atomically(text, mixed(list(kinds.values())))
    out = folder / f"{cfg.out.name}.imatrix.gguf"
    started = time.perf_counter()
    with console.bar("making an importance matrix", total=1) as bar:
        made = llama.imatrix(wide, text, out, IMATRIX_CHUNKS, threads=cfg.threads, on_share=bar.update)
    seconds = time.perf_counter() - started
    console.row(
        "imatrix",
        f"{made['chunks']} chunks of 512 tokens ({', '.join(kinds)}) in {console.duration(seconds)}"
        + (f" · perplexity {made['perplexity']:.1f}" if made["perplexity"] else ""),
    )
    if made["partial"]:
        name, share = min(made["partial"].items(), key=lambda item: item[1])
        console.warn(
            f"{len(made['partial'])} expert tensors have experts that no token reached; the least: {name}, "
            f"{share:.0%} of its experts were seen: those are quantised without a matrix"
        )
    facts["imatrix"] = {"file": out.name, **made, "text": list(kinds), "seconds": round(seconds, 2)}
    return out


def calibration_text(tokenizer: Any | None) -> dict[str, str]:
    """Kind -> text that this machine has; Python's help alone where the package with the story is absent."""
    from moesmith.data import calibration

    if tokenizer is not None:
        try:
            return calibration.texts(tokenizer, held_out=False)
        except ImportError:
            console.note('more kinds of text with: pip install "moesmith[demo]"')
    from importlib import import_module

    topics: dict[str, str] = import_module("pydoc_data.topics").topics
    return {"reference": "\n\n".join(topics[name] for name in sorted(topics))[:400_000]}


def mixed(texts: Sequence[str]) -> str:
    """The texts in turn, piece by piece, so that any beginning holds all kinds; the shortest ends first."""
    pieces = [[text[i : i + IMATRIX_PIECE] for i in range(0, len(text), IMATRIX_PIECE)] for text in texts]
    longest = max(map(len, pieces))
    return "\n\n".join(one[i] for i in range(longest) for one in pieces if i < len(one))


# ---------------------------------------------------------------- words and the Modelfile


def say_quantised(kind: str, made: dict[str, Any]) -> None:
    """Size, bits, and what got another type than was asked for."""
    types = ", ".join(f"{n} {name}" for name, n in sorted(made["types"].items(), key=lambda item: -item[1]))
    bits = f"{made['bpw']:.2f}" if made.get("bpw") else "?"
    console.row(
        "quantise",
        f"{kind} {console.size(made['bytes'])}, {bits} bits per weight ({types})",
    )
    if made["fallback"]:
        count = sum(made["fallback"].values())
        console.warn(
            f"{count} tensors got another type, their rows do not divide into its blocks: "
            + ", ".join(f"{n} {change}" for change, n in made["fallback"].items())
        )


def write_modelfile(folder: Path, files: Sequence[dict[str, Any]], source: Source) -> bool:
    """Ollama's Modelfile for the first file; said where there is none."""
    from moesmith.export.gguf import modelfile
    from moesmith.jobs._export import read_tokenizer
    from moesmith.models.checkpoint import read_json

    tokenizer = read_tokenizer(source)
    if tokenizer is None:
        console.note("no tokenizer: no Modelfile")
        return False
    settings = source.folder / "generation_config.json"
    text = modelfile(files[0]["file"], tokenizer, read_json(settings) if settings.is_file() else {})
    write_atomically(folder / "Modelfile", text)
    if tokenizer.chat_template and "TEMPLATE" not in text:
        console.note("the Modelfile has no TEMPLATE: Ollama takes the one in the GGUF, or write one")
    return True
