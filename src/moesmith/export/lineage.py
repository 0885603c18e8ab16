"""Where a model or an adapter comes from, read from the records that lie beside it and its ancestors.

Every moesmith command leaves a record in what it writes: moesmith.json beside models and adapters,
config.yaml, data.json and result.json beside a training run, eval.json beside answers. A record names what it
was made from; following those names back gives the steps. Reads JSON, YAML and file names, no weights. What
is not there any more is a step too, without a command: nothing is guessed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from moesmith.errors import UserError
from moesmith.models.anatomy import dissect, meta_model
from moesmith.models.checkpoint import RECORD, read_config

Step = dict[str, Any]
"""command, made (the folder's name), options, figures (words), data, date, version, folder, hub, section"""

HANDLING = (
    "out", "overwrite", "dry_run", "preview", "resume", "json", "device", "loggers", "eval_steps",
    "save_steps", "keep_checkpoints", "max_nonfinite", "unpackable",
)  # fmt: skip
"""options that say how a run was handled and nothing about what came of it"""

SECTIONS = ("## Pruned", "## Healed")
"""parts of an ancestor's README.md that hold its evidence"""


def lineage(folder: str | Path) -> list[Step]:
    """The steps that led to a folder, oldest first.

    Args:
        folder: a model, an adapter, a training run or an export.

    Returns:
        one dict per step; the first may be {"command": None, "made": name}: the model it all began with.
    """
    return list(_walk(Path(folder).expanduser(), None, set()))


def _walk(named: str | Path, below: Path | None, seen: set[Path]) -> Iterator[Step]:
    """Steps up to and including the one that made `named`, a path as a record gives it."""
    folder = _find(named, below)
    if folder is None:
        yield {"command": None, "made": _hub_name(named) or _name(named), "hub": _hub_name(named)}
        return
    if folder.resolve() in seen:
        return
    seen.add(folder.resolve())
    step = _step(folder)
    for parent in step.pop("parents"):
        yield from _walk(parent, folder, seen)
    yield {**step, "folder": folder, "hub": _hub_name(folder)}


def _find(named: str | Path, below: Path | None) -> Path | None:
    """The folder that a record names: as it stands, or relative to a folder above the one that names it."""
    path = Path(named).expanduser()
    if path.is_dir():
        return path
    if below is not None and not path.is_absolute():
        for above in below.resolve().parents:
            if (above / path).is_dir():
                return above / path
    return None


def _name(path: str | Path) -> str:
    return Path(str(path)).name or str(path)


def _hub_name(path: str | Path) -> str | None:
    """owner/name of a folder in the hub's cache, or of a text that is no path here but can be a hub name."""
    found = re.search(r"models--([\w.-]+?)--([\w.-]+)", str(path))
    if found:
        return "/".join(found.groups())
    if isinstance(path, str) and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path):
        return path
    return None


# ---------------------------------------------------------------- one step


def _step(folder: Path) -> Step:
    """What made a folder, with `parents`: the paths it was made from."""
    record = _json(folder / RECORD)
    record = (
        record.get("export") or record
    )  # a PEFT folder keeps the adapter's record, and the export's in it
    if (folder / "adapter_config.json").is_file() and record.get("command") != "export":
        loop = _json(folder.parent / "loop.json")
        return _loop(folder, record, loop) if loop else _training(folder, record)
    if (folder / "heal.json").is_file():
        return _healing(folder, _json(folder / "heal.json"))
    command = record.get("command")
    parents = [_path(record[key]) for key in ("source",) if record.get(key)]
    parents += [_path(one) for one in record.get("adapters") or ()]
    if command == "build":
        build = record.get("build") or {}
        parents = [build.get("base"), *(expert.get("source") for expert in build.get("experts") or ())]
    step: Step = {
        "command": command,
        "made": _name(folder.resolve()),
        "options": _options(record.get("config"), without=("model", "adapter", "action")),
        "date": record.get("date"),
        "version": record.get("moesmith"),
        "figures": [],
        "parents": list(dict.fromkeys(parent for parent in parents if parent)),
    }
    step["figures"] += _figures(command, record)
    split = _json(folder / "split.json")
    if command is None and split:
        step["command"] = "build"
        step["options"] = {"experts": split.get("experts"), "top_k": split.get("top_k")}
        loss = split.get("text_loss") or {}
        if loss:
            losses = [f"{loss.get(name, 0):.3f} {name}" for name in ("dense", "split")]
            step["figures"].append(f"each FFN split into experts; loss on text {', '.join(losses)}")
        beside = folder.parent / "dense"
        step["parents"] = [str(beside)] if beside.is_dir() else []
    sections = _sections(folder / "README.md") if command in ("prune", "heal") else ""
    return {**step, "section": sections} if sections else step


def _training(folder: Path, record: Mapping[str, Any]) -> Step:
    """A trained adapter: its run's options, data and result lie in the folder above."""
    run = folder.parent
    config = _yaml(run / "config.yaml")
    result, data = _json(run / "result.json"), _json(run / "data.json")
    base = record.get("base") or {}
    under = config.get("adapter")
    figures = []
    if result:
        first, best = result.get("first_eval_loss"), result.get("best_eval_loss")
        if first is not None and best is not None:
            figures.append(f"eval loss {first:.3f} before, {best:.3f} at step {result.get('best_step')}")
    elif record.get("eval_loss") is not None:
        figures.append(f"eval loss {record['eval_loss']:.3f} at step {record.get('step')}")
    if record.get("parts"):
        figures.append("the sum of two adapters: the one it was trained over, and its own")
    return {
        "command": "dpo" if "dpo" in record else ("sft" if config or record else None),
        "made": _name(folder.resolve()),
        "options": _options(config, without=("model", "data", "quant")),
        "data": _data(config, data, run),
        "figures": figures,
        "version": record.get("moesmith"),
        "parents": [path for path in (_path(base), under) if path],
    }


def _loop(folder: Path, record: Mapping[str, Any], loop: Mapping[str, Any]) -> Step:
    """The adapter that a loop of rounds ended with; each round's figures, kept or not."""
    figures = []
    for stage in loop.get("stages") or ():
        held = stage.get("held-out") or {}
        score = f"{held['right']} of {held['n']} held-out requests right" if held else "not measured"
        figures.append(f"{stage.get('name')}: {score}{'' if stage.get('kept') else ', rolled back'}")
    base = _path(record.get("base"))
    return {
        "command": "loop",
        "made": _name(folder.resolve()),
        "options": _options(loop.get("config"), without=("model", "tools", "requests", "held_out")),
        "figures": figures,
        "version": record.get("moesmith"),
        "parents": [base] if base else [],
    }


def _healing(folder: Path, facts: Mapping[str, Any]) -> Step:
    before, after = facts.get("before") or {}, facts.get("after") or {}
    words = []
    if before.get("kl") and after.get("kl"):
        kl = [f"{one['kl']['mean']:.4f}" for one in (before, after)]
        words.append(f"KL to the original on held-out text {kl[0]} before, {kl[1]} after")
    config = facts.get("config") or {}
    model = _path(facts.get("model")) or config.get("model")
    return {
        "command": "heal",
        "made": _name(folder.resolve()),
        "options": _options(config, without=("model",)),
        "figures": words,
        "date": (facts.get("how") or {}).get("date"),
        "section": _sections(folder / "README.md"),
        "parents": [model] if model else [],
    }


def _figures(command: str | None, record: Mapping[str, Any]) -> list[str]:
    """What a record of `quantize`, `build` or `prune` says in figures."""
    if command == "quantize":
        counts, proof = record.get("counts") or {}, record.get("proof") or {}
        matrices = ", ".join(
            f"{n:,} expert matrices in {s}" for s, n in (counts.get("matrices") or {}).items()
        )
        left = len(counts.get("not_packed") or ())
        words = [f"{matrices}; {left} stacks left in 16 bits"] if matrices else []
        if proof:
            words.append(f"reloaded bit-equal: {proof.get('tensors')} tensors")
        return words
    if command == "build":
        sentence = (record.get("verdict") or {}).get("sentence")
        return [sentence] if sentence else []
    return []


def _options(config: Mapping[str, Any] | None, without: Sequence[str] = ()) -> dict[str, Any]:
    """Options worth reading: set, and not about how the run was handled. Nested ones get dotted names."""
    found: dict[str, Any] = {}
    for name, value in (config or {}).items():
        if name in HANDLING or name in without or value in (None, False, [], {}, ""):
            continue
        if isinstance(value, Mapping):
            found |= {f"{name}.{key}": inner for key, inner in _options(value).items()}
        else:
            found[name] = value
    return found


def _data(config: Mapping[str, Any], data: Mapping[str, Any], run: Path) -> dict[str, Any] | None:
    """What was trained on: the file's name, a hash of the examples, counted rows."""
    path = (config.get("data") or {}).get("path")
    if not data and not path:
        return None
    rows = data.get("rows") or {}
    return {
        "name": _hub_name(path) if path and _find_file(path, run) is None else path and _name(path),
        "hub": _hub_name(path) if path and _find_file(path, run) is None and "." not in _name(path) else None,
        "hash": data.get("fingerprint"),
        "rows": rows.get("kept") or data.get("train"),
        "read": rows.get("read"),
        "tokens": rows.get("tokens"),
        "learned": rows.get("learned"),
        "held_out": data.get("held_out"),
    }


def _find_file(named: str, below: Path) -> Path | None:
    path = Path(named).expanduser()
    places = [path, *(above / path for above in below.resolve().parents if not path.is_absolute())]
    return next((place for place in places if place.exists()), None)


# ---------------------------------------------------------------- everything a card says


def collect(
    model: Path, adapter: Path | None = None, record: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The facts of a model card.

    Args:
        model: the base that was exported, or the model itself.
        adapter: the adapter on it.
        record: what `export` says about what it wrote: action, lora or gguf or merged, parity...; None for a
            card of the model or adapter itself.

    Returns:
        name, kind (model, packed, adapter, merged, lora, gguf), base, base_hub, steps, shape, license,
        evaluations, record, form, source_name, adapter_name.
    """
    model = Path(model)
    adapter = None if adapter is None else Path(adapter)
    own = _json((adapter or model) / RECORD)
    own = own.get("export") or own
    exported = record is None and own.get("command") == "export"
    steps = lineage(model)
    if adapter is not None:
        known = {step["folder"].resolve() for step in steps if step.get("folder")}
        steps += [step for step in lineage(adapter) if _is_new(step, known)]
    if exported:  # the card of an export has its step from the record
        record, steps = own, steps[:-1]
    record = dict(record or {})
    config = read_config(model)
    packed = (config.get("quantization_config") or {}).get("quant_method") == "moesmith"
    kind = record.get("action") or ("adapter" if adapter else "packed" if packed else "model")
    folders = [step["folder"] for step in steps if step.get("folder")]
    name = (record.get("config") or {}).get("out") or adapter or model
    if adapter is not None and not record and _name(name) in ("best", "last"):
        name = "-".join(Path(name).resolve().parts[-2:])
    first = steps[0] if steps else {}
    source = (_find(_path(own.get("source")) or "", model) or model) if exported else model
    if exported and own.get("adapters"):
        adapter = Path(_path(own["adapters"][0]) or "")
    return {
        "name": _name(name),
        "kind": kind,
        "form": (record.get("lora") or {}).get("form"),
        "base": first.get("hub") or first.get("made") or _name(model),
        "base_hub": next((step["hub"] for step in steps if step.get("hub")), None),
        "source_name": _hub_name(source.resolve()) or _name(source.resolve()),
        "source_packed": packed or bool((record.get("source") or {}).get("scheme")),
        "plain_name": _before_packing(steps),
        "adapter_name": adapter and _name(adapter),
        "steps": steps,
        "shape": _shape(config),
        "license": next(filter(None, (_license(folder / "README.md") for folder in folders)), None),
        "evaluations": _evaluations(model, adapter, record),
        "record": record,
    }


def _before_packing(steps: Sequence[Step]) -> str | None:
    """Name of the 16-bit model that was packed."""
    packing = next((i for i, step in enumerate(steps) if step.get("command") == "quantize"), 0)
    return (steps[packing - 1].get("hub") or steps[packing - 1]["made"]) if packing else None


def _is_new(step: Step, known: set[Path]) -> bool:
    return step.get("command") is not None and step["folder"].resolve() not in known


def _shape(config: dict[str, Any]) -> dict[str, Any]:
    """Sizes, from config.json alone; {} for a class that cannot be built here."""
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    try:
        model = dissect(meta_model(plain))
    except UserError:
        return {}
    return {
        "class": next(iter(config.get("architectures") or ()), None),
        "total": model.total,
        "active": model.active,
        "layers": model.layers,
        "moe_layers": model.moe_layers,
        "experts": sorted(set(model.num_experts)),
        "top_k": sorted(set(model.top_k)),
        "own_code": "auto_map" in config,
    }


def _evaluations(model: Path, adapter: Path | None, record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every eval.json near by that is of exactly this model, or of exactly this adapter."""
    digests = {one.get("digest") for one in record.get("adapters") or ()} - {None}
    about = (adapter or model).resolve()
    places = [about, *about.parents[:2]]
    files = {file for place in places for file in (*place.glob("eval.json"), *place.glob("*/eval.json"))}
    found = []
    for file in sorted(files):
        facts = _json(file)
        theirs = facts.get("adapter") or {}
        if adapter is None:
            folder = (facts.get("model") or {}).get("folder")
            same = not theirs and folder is not None and _same(folder, model, file.parent)
        else:
            same = bool(theirs) and (
                theirs.get("digest") in digests or _same(theirs.get("folder") or "", adapter, file.parent)
            )
        if same:
            found += [{**row, "run": file.parent.name} for row in _rows(facts)]
    loop = _json(about.parent / "loop.json") if adapter is not None else {}
    best: dict[str, Any] = next(
        (one for one in loop.get("stages") or () if one.get("name") == loop.get("best")), {}
    )
    for kind in ("held-out", "validation"):
        if best.get(kind):
            row = {key: best[kind].get(key) for key in ("n", "rate", "interval")}
            found.append(
                {"what": f"right tool calls, {kind} requests", "how": None, "run": best["name"], **row}
            )
    return found


def _same(named: str, folder: Path, below: Path) -> bool:
    there = _find(named, below) if named else None
    return there is not None and there.resolve() == folder.resolve()


def _rows(facts: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Scores of one eval.json: what, n, rate, interval."""
    calls, gpqa, tasks = facts.get("tool_calls"), facts.get("gpqa"), facts.get("tasks")
    how = (facts.get("how") or {}).get("decoding")
    if calls:
        what = f"right tool calls, {_name((facts.get('requests') or {}).get('path') or 'requests')}"
        yield {"what": what, "how": how, **{key: calls.get(key) for key in ("n", "rate", "interval")}}
    for kind in ("strict", "flexible"):
        if gpqa and gpqa.get(kind):
            row = gpqa[kind]
            what = f"{_name((facts.get('questions') or {}).get('path') or 'GPQA')}, {kind} reading"
            yield {"what": what, "how": how, **{key: row.get(key) for key in ("n", "rate", "interval")}}
    for row in (tasks or {}).get("scores") or ():
        value = row.get("value", row.get("score"))
        if value is not None:
            yield {
                "what": f"{row.get('task')}, {row.get('metric')}",
                "how": how,
                "n": row.get("n"),
                "rate": value,
                "interval": _ends(row.get("interval")),
            }


def _ends(interval: Any) -> Any:
    """[low, high] of an interval in either spelling."""
    if isinstance(interval, Mapping):
        return [interval.get("low"), interval.get("high")]
    return interval


def _license(readme: Path) -> str | None:
    """`license` in a README's front matter; `license_name` where that is "other"."""
    if not readme.is_file():
        return None
    found = re.match(r"---\n(.*?)\n---", readme.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    try:
        head = yaml.safe_load(found.group(1)) if found else None
    except yaml.YAMLError:
        return None
    if not isinstance(head, Mapping):
        return None
    value = head.get("license")
    return str(value) if value else None


def _sections(readme: Path) -> str:
    """The parts of a README that moesmith wrote about pruning and healing."""
    if not readme.is_file():
        return ""
    parts = re.split(r"(?m)^(?=## )", readme.read_text(encoding="utf-8"))
    return "\n".join(part.strip() + "\n" for part in parts if part.startswith(SECTIONS))


# ---------------------------------------------------------------- small things


def _path(value: Any) -> str | None:
    """A path in a record: a text, or a dict that has one."""
    if isinstance(value, Mapping):
        value = value.get("path") or value.get("folder") or value.get("given")
    return str(value) if value else None


def _json(path: Path) -> dict[str, Any]:
    """A record; {} when it is not there or is none."""
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return read if isinstance(read, dict) else {}


def _yaml(path: Path) -> dict[str, Any]:
    try:
        read = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return {}
    return read if isinstance(read, dict) else {}
