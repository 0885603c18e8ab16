"""What a build says: the facts that stay with the model, its report and card, the lines on the terminal."""

from __future__ import annotations

import platform
import shlex
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesmith import console
from moesmith.jobs._build_parts import name_of

if TYPE_CHECKING:
    from moesmith.jobs._build_fit import Routers
    from moesmith.jobs._build_parts import Parts
    from moesmith.jobs._build_text import Texts
    from moesmith.jobs.build import Config, Made


COLUMNS = 8  # of domains in the table on a terminal


def record(parts: Parts, texts: Texts, routers: Routers, made: Made, nbytes: int) -> dict[str, Any]:
    """Everything that was found: "build" and "verdict" for the report, and how the text was used."""
    from moesmith.build.recipe import identical
    from moesmith.data.corpora import corpus_hash
    from moesmith.jobs._build_judge import weigh
    from moesmith.jobs._build_parts import architecture

    recipe = parts.recipe
    same = identical(recipe)
    build = {
        "class": architecture(parts.config),
        "model_type": parts.config.model_type,
        "top_k": parts.top_k,
        "num_experts": parts.num_experts,
        "init": recipe.init,
        "route": parts.route,
        "route_reason": parts.route_reason,
        "base": parts.base.name,
        "shared_expert": recipe.shared_expert and recipe.shared_expert.model_dump(),
        "dtype": str(parts.dtype).removeprefix("torch."),
        "seed": recipe.seed,
        "experts": entries(parts, texts),
        "identical": same,
        "parameters": parameters(parts, nbytes),
        "bytes": nbytes,
        "bytes_copied": made.experts.get("bytes_copied"),
        "bytes_made": made.experts.get("bytes_made"),
        "modes": modes(made.experts),
        "layer_bytes": parts.layer_bytes(),
        "peak_bytes": made.peak,
        "before_bytes": made.before,
        "judging_peak_bytes": made.judging_peak,
        "seconds": round(made.seconds["all"], 2),
        "proof": made.proof,
        "routing": made.routing,
        "perplexity": made.perplexity,
    }
    if parts.route == "ridge":
        build["split"] = routers.fitted
    return {
        "build": {key: value for key, value in build.items() if value is not None},
        "verdict": weigh(build, texts, same, parts.num_experts, made.why_not),
        "text": {
            "origin": texts.origin,
            "documents": len(texts.documents),
            "fitted": texts.fit,
            "held_out": texts.held_out,
            "measured_on": routers.fitted.get("measured_on"),
            "rows": {name: count.facts() for name, count in texts.counts.items()},
            "corpus_hash": corpus_hash(texts.documents),
            "notes": texts.notes,
        },
        "files": made.files,
        "seconds": {name: round(value, 2) for name, value in made.seconds.items()},
    }


def entries(parts: Parts, texts: Texts) -> list[dict[str, Any]]:
    """One row for every expert of the recipe."""
    rows = []
    for label, expert in enumerate(parts.recipe.experts):
        mine = [d for d, own in zip(texts.documents, texts.labels, strict=True) if own == label]
        rows.append(
            {
                "name": str(expert.name),
                "source": str(expert.source_model),
                "adapter": expert.adapter,
                "documents": len(mine),
                "tokens": sum(len(d.ids) for d in mine),
            }
        )
    return rows


def parameters(parts: Parts, nbytes: int) -> dict[str, int]:
    """In all, and those that a token meets: all but the experts it is not sent to."""
    total = nbytes // parts.dtype.itemsize
    width = parts.base.ffn_width // (parts.num_experts if parts.mode == "split" else parts.group)
    idle = (parts.num_experts - parts.top_k) * 3 * width * parts.base.hidden_size * parts.base.num_layers
    return {"total": total, "active": total - idle}


def modes(facts: dict[str, Any]) -> dict[str, Any]:
    """What the init did, as figures; of low rank the share of energy in every layer."""
    found: dict[str, Any] = {
        name: value
        for name, value in facts.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and not name.startswith("bytes_")
    }
    kept = facts.get("kept")
    if isinstance(kept, list) and kept:
        kinds = [kind for kind in kept[0] if kind != "layer"]
        found["energy"] = {kind: [row.get(kind) for row in kept] for kind in kinds}
    if facts.get("adapters"):
        found["adapters"] = facts["adapters"]
    return found


# ---------------------------------------------------------------- beside the weights


def write_papers(folder: Path, cfg: Config, parts: Parts, texts: Texts, facts: dict[str, Any]) -> None:
    """Record, recipe, report and model card."""
    from moesmith.jobs.build import RECIPE, save_recipe, save_record
    from moesmith.report import write_report

    saved = save_record(folder, cfg, facts)
    save_recipe(parts.recipe, folder / RECIPE)
    name = cfg.out.name or str(cfg.out)
    with warnings.catch_warnings():  # a name in letters that the figures' font lacks: the tables have it
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        write_report(folder, report_facts(cfg, parts, texts, saved, name))
    (folder / "README.md").write_text(card(cfg, parts, saved, name), encoding="utf-8")


def report_facts(cfg: Config, parts: Parts, texts: Texts, saved: dict[str, Any], name: str) -> dict[str, Any]:
    """The build as the report wants it."""
    import torch

    from moesmith.eval.bootstrap import ROUNDS
    from moesmith.jobs._pair import on_gpu

    build = saved["build"]
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads"
    where = torch.cuda.get_device_name() if on_gpu(cfg.device) else machine
    notes = [f"text: {texts.origin}", *texts.notes]
    proof = build.get("proof")
    if proof:
        notes.append(f"proof: {proof_words(proof)}; difference: {proof['unit']}; in {proof['dtype']}")
    return {
        "title": name,
        "subtitle": subtitle(build),
        "verdict": saved["verdict"],
        "build": build,
        "how": {
            "command": arguments(cfg),
            "date": saved["date"],
            "versions": {"moesmith": saved["moesmith"], **saved["versions"]},
            "machine": where,
            "corpus_hash": saved["text"]["corpus_hash"],
            "seed": str(parts.recipe.seed),
            "intervals": f"95 %, percentile bootstrap over documents, {ROUNDS} rounds",
        },
        "notes": notes,
    }


def subtitle(build: dict[str, Any]) -> str:
    """One line that says what it is."""
    counts = build["parameters"]
    return " · ".join(
        [
            build["model_type"],
            f"{console.count(counts['total'])} parameters, {console.count(counts['active'])} active",
            f"{build['num_experts']} experts, top-{build['top_k']}",
            build["dtype"],
            console.size(build["bytes"]),
        ]
    )


def card(cfg: Config, parts: Parts, saved: dict[str, Any], name: str) -> str:
    """README.md of the new model."""
    build, verdict = saved["build"], saved["verdict"]
    hub = [build["base"]] if build["base"].count("/") == 1 and not Path(build["base"]).exists() else []
    head = ["---", *(f"base_model: {model}" for model in hub), "tags: [moe, moesmith]", "---"]
    lines = [*head, f"# {name}", "", verdict["sentence"], *(f"- {point}" for point in verdict["points"]), ""]
    lines.append(subtitle(build))
    lines += [f"base `{shown(build['base'])}`, init {build['init']}, routers by {build['route']}.", ""]
    lines += ["| expert | FFNs of | adapter |", "|---|---|---|"]
    lines += [
        f"| {row['name']} | `{shown(row['source'])}` | "
        f"{Path(row['adapter']).name if row['adapter'] else ''} |"
        for row in build["experts"]
    ]
    table = build.get("perplexity")
    if table:
        lines += ["", "| | perplexity | " + " | ".join(table["domains"]) + " |"]
        lines += ["|---" * (2 + len(table["domains"])) + "|"]
        lines += [
            f"| {row['name']} | {row['mean']:.2f} | "
            + " | ".join(f"{row['by_domain'][domain]:.2f}" for domain in table["domains"])
            + " |"
            for row in table["rows"]
        ]
    if build.get("proof"):
        lines += ["", f"Proof: {proof_words(build['proof'])}."]
    if own_code(parts):
        lines += [
            "",
            "The class is no part of transformers; its code is in this folder: load it with "
            "`trust_remote_code=True`, or after `import moesmith; moesmith.register()`.",
        ]
    lines += ["", f"Made by moesmith {saved['moesmith']} (`{arguments(cfg)}`); recipe.yaml makes it again."]
    return "\n".join(lines) + "\n"


def shown(model: str) -> str:
    """A hub name as it is; of a local folder the last part, since others cannot follow its path."""
    return name_of(model) if Path(model).expanduser().exists() else model


def own_code(parts: Parts) -> bool:
    """Whether the class comes with the weights."""
    from moesmith.models.custom import CUSTOM

    return parts.config.model_type in CUSTOM


def arguments(cfg: Config) -> str:
    """The command line that these options are."""
    words = ["moesmith", "build", str(cfg.recipe)]
    for name in type(cfg).model_fields:
        value = getattr(cfg, name)
        if name == "recipe" or name not in cfg.model_fields_set or value is None:
            continue
        flag = "--" + name.replace("_", "-")
        words += ([flag] if value else []) if isinstance(value, bool) else [flag, str(value)]
    return shlex.join(words)


def proof_words(proof: dict[str, Any]) -> str:
    """each expert alone == ...: 3e-06 of the spread of logits, 64 tokens."""
    words = f"{proof['what']}: logits differ by {proof['difference']:.2g} of their spread"
    if not proof["equal"]:
        return f"{words}, KL {proof['kl']:.3g} nats, {proof['tokens']} tokens"
    return f"{words} at most, {proof['tokens']} tokens"


# ---------------------------------------------------------------- the terminal


def say_result(cfg: Config, parts: Parts, facts: dict[str, Any]) -> None:
    """Routing, perplexity, proof, what was written and what to do next."""
    build, seconds = facts["build"], facts["seconds"]
    routing, table = build.get("routing"), build.get("perplexity")
    if routing:
        say_routing(parts, routing)
    if "split" in build:
        say_split(build["split"])
    if table:
        say_table(table)
    if build.get("proof"):
        console.row("proof", proof_words(build["proof"]))
    if build["identical"]:
        console.warn(facts["verdict"]["points"][0])
    console.row("verdict", facts["verdict"]["sentence"])
    console.row(
        "written",
        f"{cfg.out} ({console.size(build['bytes'])}: {made_words(build)}) · "
        f"report: {cfg.out / 'report.html'}",
    )
    steps = [f"{name} {console.duration(seconds[name])}" for name in seconds if name != "all"]
    console.row("time", f"{console.duration(seconds['all'])}: {' · '.join(steps)}")
    console.row(
        "memory",
        f"peak {console.size(build['peak_bytes'])} to build, {console.size(build['before_bytes'])} of it "
        f"before the first layer; one layer's experts are {console.size(build['layer_bytes'])}"
        + (f" · {console.size(build['judging_peak_bytes'])} to judge" if build.get("proof") else ""),
    )
    if own_code(parts):
        console.note("the class comes with the weights: other programs load it with trust_remote_code=True")
    out = shlex.quote(str(cfg.out))
    console.next_command(
        f"moesmith inspect {out}",
        f"moesmith quantize {out} --out {shlex.quote(str(cfg.out) + '-nf4')}",
        f"moesmith sft examples/sft.yaml --model {out}",
    )


def made_words(build: dict[str, Any]) -> str:
    """What of the written bytes stood in the sources."""
    if not build["bytes_copied"]:
        return f"all made, since the sources are not in {build['dtype']}"
    return f"{console.size(build['bytes_made'])} made, the rest copied byte for byte"


def say_routing(parts: Parts, routing: dict[str, Any]) -> None:
    """Where tokens go, in two lines."""
    if routing.get("accuracy") is None:
        return
    chance = routing.get("chance_top1", 1 / parts.entries)
    ci = routing.get("accuracy_ci")
    within = f" [{100 * ci[0]:.0f}, {100 * ci[1]:.0f}]" if ci else ""
    share = routing.get("share")
    console.row(
        "routing",
        f"{100 * routing['accuracy']:.0f} %{within} of {routing['tokens']:,} "
        f"{'held-out' if routing['held_out'] else 'fitted'} tokens go to their own expert first (chance "
        f"{100 * chance:.0f} %)" + (f", with {100 * share:.0f} % of the weight" if share is not None else ""),
    )
    layers = routing["layers"]
    known = [layer for layer in layers if layer.get("accuracy") is not None]
    best = max(known, key=lambda layer: layer["accuracy"])
    worst = min(known, key=lambda layer: layer["accuracy"])
    console.row(
        "",
        f"best layer {best['layer']}: {100 * best['accuracy']:.0f} % · worst layer {worst['layer']}: "
        f"{100 * worst['accuracy']:.0f} % · {100 * routing['majority']:.0f} % of documents use theirs most",
    )


def say_split(split: dict[str, Any]) -> None:
    """What the routers keep of what the FFNs write."""
    layers: Sequence[dict[str, Any]] = split["layers"]
    mean = {key: sum(layer[key] for layer in layers) / len(layers) for key in ("kept", "best", "random")}
    console.row(
        "split",
        f"the routers keep {100 * mean['kept']:.1f} % of what the experts write (best choice "
        f"{100 * mean['best']:.1f} %, random {100 * mean['random']:.1f} %)",
    )


def say_table(table: dict[str, Any]) -> None:
    """Perplexity of every row, by domain; of many domains the mean alone, the report has them."""
    domains = table["domains"] if len(table["domains"]) <= COLUMNS else []
    console.say()
    console.table(
        ("perplexity", "mean", "95 %", *domains),
        (
            (
                row["name"],
                f"{row['mean']:.2f}",
                f"{row['mean_ci'][0]:.2f} - {row['mean_ci'][1]:.2f}" if row["mean_ci"] else "",
                *(f"{row['by_domain'][domain]:.2f}" for domain in domains),
            )
            for row in table["rows"]
        ),
    )
    console.say()
