"""`moesmith export lora`: the adapter in the form of PEFT, vLLM or llama.cpp, and what was written, run."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesmith import console

if TYPE_CHECKING:
    from moesmith.export.llama_cpp import LlamaCpp
    from moesmith.jobs._export import Judged, Source
    from moesmith.jobs._export_ask import Prompts, Said


def export_in_form(
    cfg: Any, source: Source, folder: Path, prompts: Prompts, llama: LlamaCpp | None
) -> tuple[dict[str, Any], list[Judged]]:
    """Write the adapter into `folder` and compare it.

    Returns:
        facts for the record, the comparisons.

    Raises:
        UserError: an adapter without this form, or parity out of bounds.
    """
    from moesmith.export.lora import export_lora
    from moesmith.jobs._export_ask import one_adapter
    from moesmith.jobs._export_gguf import WORK
    from moesmith.jobs.export import ask_source

    place = folder / WORK / "adapter" if cfg.for_ == "gguf" else folder
    place.mkdir(parents=True, exist_ok=True)
    with one_adapter(source.adapters) as adapter:
        assert adapter is not None
        made = export_lora(
            adapter, place, form=cfg.for_, base=source.folder, base_name=base_name(cfg, source)
        )
    facts = {"form": cfg.for_, **asdict(made)}
    placements = ", ".join(f"{name} {count:,}" for name, count in made.placements.items())
    console.row(
        "adapter",
        f"{made.tensors:,} tensors of rank {made.rank}, {console.size(made.bytes)} · places: {placements}"
        + (f" · {made.experts:,} expert matrices" if made.experts else ""),
    )
    said = ask_source(cfg, source, prompts)
    if cfg.for_ == "gguf":
        assert llama is not None
        more, judged = _through_llama(cfg, source, folder, place, prompts, said, llama)
        return facts | more, [judged]
    if cfg.for_ == "peft":
        return facts, [_through_peft(cfg, source, folder, prompts, said)]
    work = folder / WORK
    compared = _by_name(cfg, source, folder, prompts, said, work)
    shutil.rmtree(work)
    return facts, [compared] if compared is not None else []


def base_name(cfg: Any, source: Source) -> str | None:
    """What adapter_config.json says of the base: as asked, else the model as it was given."""
    return cfg.base_name or cfg.model or None


def own_record(source: Source) -> Mapping[str, Any] | None:
    """The adapter's own moesmith.json, which the exported one keeps."""
    from moesmith.models.checkpoint import RECORD, read_json

    path = source.adapters[0] / RECORD
    return read_json(path) if path.is_file() else None


def _through_peft(cfg: Any, source: Source, folder: Path, prompts: Prompts, said: Said) -> Judged:
    """What was written, on the base again, by stock PEFT."""
    from moesmith.jobs.export import ask_folder, judge_one

    started = time.perf_counter()
    export = ask_folder(cfg, source.folder, [folder], prompts, said)
    return judge_one(cfg, "peft", source, said, export, prompts, time.perf_counter() - started)


def _by_name(
    cfg: Any, source: Source, folder: Path, prompts: Prompts, said: Said, work: Path
) -> Judged | None:
    """vLLM's form, applied as vLLM reads it: each pair of factors to the tensor of the checkpoint it names.

    vLLM itself is not run. None, and a word about it, for classes whose names in vLLM are no names on disk.
    """
    from moesmith.export.merge import merge_checkpoint
    from moesmith.jobs.export import ask_folder, judge_one

    started = time.perf_counter()
    base = work / "base"
    base.mkdir(parents=True)
    merge_checkpoint(source.folder, [], base, dtype="float32")
    left = add_by_name(base, folder)
    if left:
        console.warn(
            f"not compared: {len(left):,} names are vLLM's own and not the checkpoint's ({left[0]}); "
            "try it in vLLM before you rely on it"
        )
        return None
    export = ask_folder(cfg, base, [], prompts, said)
    console.note("vLLM was not run: every pair was added to the tensor of the 16-bit model that it names")
    return judge_one(cfg, "vllm", source, said, export, prompts, time.perf_counter() - started)


def add_by_name(base: Path, adapter: Path) -> list[str]:
    """Add B @ A of every pair to the tensor it names, in the files of `base`.

    Args:
        base: a checkpoint in float32 that may be changed.
        adapter: alpha = r, every pair 2-D.

    Returns:
        names of the adapter that are no tensor of the checkpoint; nothing is changed then.
    """
    from safetensors.torch import load_file, save_file

    from moesmith.models.headers import read_headers
    from moesmith.models.lora_factors import PREFIX, WEIGHTS, A, B

    pairs = load_file(adapter / WEIGHTS)
    names = [key.removeprefix(PREFIX).removesuffix(A) for key in pairs if key.endswith(A)]
    headers = read_headers(base)
    left = [name for name in names if f"{name}.weight" not in headers]
    if left:
        return left
    by_file: dict[str, list[str]] = {}
    for name in names:
        by_file.setdefault(headers[f"{name}.weight"].file, []).append(name)
    for file, inside in by_file.items():
        tensors = load_file(base / file)
        for name in inside:
            a, b = pairs[f"{PREFIX}{name}{A}"].float(), pairs[f"{PREFIX}{name}{B}"].float()
            tensors[f"{name}.weight"] += b @ a
        save_file(tensors, base / file, metadata={"format": "pt"})
    return []


def _through_llama(
    cfg: Any, source: Source, folder: Path, form: Path, prompts: Prompts, said: Said, llama: LlamaCpp
) -> tuple[dict[str, Any], Judged]:
    """Convert adapter and base; ask llama-server with both. The base's file is not kept."""
    from moesmith.export.parity import quant_route
    from moesmith.jobs._export import OUTTYPES, say_merged
    from moesmith.jobs._export_gguf import WORK, ask_server
    from moesmith.jobs.export import judge_one, merge

    outtype = OUTTYPES[cfg.dtype]
    work, base = folder / WORK, source.folder
    if source.packed:
        base = work / "base"
        base.mkdir(parents=True)
        say_merged(merge(cfg, source, base, adapters=False), False)
    file = folder / f"{cfg.out.name}.gguf"
    wide = work / f"base-{outtype}.gguf"
    with console.bar("converting with llama.cpp", total=1) as bar:
        llama.convert_lora(form, base, file)
        llama.convert(base, wide, outtype, cfg.pre_tokenizer, on_share=bar.update)
    export, seconds = ask_server(llama, wide, prompts, cfg.threads, lora=file)
    judged = judge_one(cfg, quant_route(outtype), source, said, export, prompts, seconds)
    facts = {"file": file.name, "bytes": file.stat().st_size, "llama_cpp": llama.version()}
    shutil.rmtree(work)
    return facts, judged
