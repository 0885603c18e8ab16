"""A model card: what this is, what it was made of and how, what was measured, how to run it, where it ends.

Markdown with the YAML front matter that the hub reads. Everything in it comes from `lineage.collect`, so a
sentence without a record behind it is not there, and what was not measured is said to be so. No path of this
machine stays in it: names of files and folders only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from .lineage import collect, lineage

__all__ = ["collect", "lineage", "model_card"]

RELATION = {"gguf": "quantized", "packed": "quantized", "lora": "adapter", "adapter": "adapter"}
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""what vLLM takes for --max-lora-rank"""

# An absolute path, not a URL; its last part is what stays of it.
_ABSOLUTE = re.compile(r"(?<![\w:/.<~])~?/(?:[^\s/`'\"|)\],]+/)+([^\s/`'\"|)\],]*)")


def model_card(facts: Mapping[str, Any]) -> str:
    """README.md for what `facts` (of `collect`) describe."""
    body = "\n".join(
        line for part in (_what, _made, _data, _evidence, _parity, _run, _limits) for line in part(facts)
    )
    head = yaml.safe_dump(_front(facts), sort_keys=False, allow_unicode=True).strip()
    text = f"---\n{head}\n---\n\n# {facts['name']}\n\n{body}".rstrip() + "\n"
    return re.sub(r"\n{3,}", "\n\n", _ABSOLUTE.sub(r"\1", text))


def _front(facts: Mapping[str, Any]) -> dict[str, Any]:
    kind, steps = facts["kind"], facts["steps"]
    commands = [step.get("command") for step in steps]
    head: dict[str, Any] = {}
    if facts["base_hub"]:
        head["base_model"] = facts["base_hub"]
        relation = RELATION.get(kind)
        if relation is None and "build" in commands:
            relation = "merge"
        head["base_model_relation"] = relation or ("finetune" if len(steps) > 1 else None)
    if kind != "gguf" and facts["form"] != "gguf":
        head["library_name"] = "peft" if kind in ("lora", "adapter") else "transformers"
    head["pipeline_tag"] = "text-generation"
    if facts["license"]:
        head["license"] = facts["license"]
    datasets = [step["data"]["hub"] for step in steps if (step.get("data") or {}).get("hub")]
    if datasets:
        head["datasets"] = list(dict.fromkeys(datasets))
    tags = ["moe", "moesmith"]
    tags += ["lora"] if kind in ("lora", "adapter") else []
    tags += ["gguf"] if "gguf" in (kind, facts["form"]) else []
    tags += ["pruned"] if "prune" in commands else []
    head["tags"] = tags
    return {key: value for key, value in head.items() if value is not None}


# ---------------------------------------------------------------- the parts


def _what(facts: Mapping[str, Any]) -> Iterator[str]:
    record, shape = facts["record"], facts["shape"]
    of = f"`{facts['source_name']}`"
    on = f" with the adapter `{facts['adapter_name']}`" if facts["adapter_name"] else ""
    yield {
        "merged": f"{of}{on}, as one 16-bit checkpoint that any program for this architecture reads.",
        "gguf": f"{of}{on}, as GGUF files for llama.cpp and what is built on it.",
        "lora": f"An adapter for {of}, in the form that {_reader(facts['form'])} reads.",
        "adapter": f"An adapter for {of}, in PEFT's format.",
        "packed": f"{of}, its experts packed by moesmith.",
    }.get(facts["kind"], f"The model {of}.")
    yield ""
    if shape:
        experts, top = (_range(shape[key]) for key in ("experts", "top_k"))
        total, active = (_parameters(shape[key]) for key in ("total", "active"))
        yield (
            f"{shape['class']} · {total} parameters, {active} active per token · {shape['layers']} layers, "
            f"{shape['moe_layers']} with experts · {experts} experts, top-{top}"
        )
        yield ""
    merged = record.get("merged") or {}
    if merged.get("changed"):
        changed = ", ".join(f"{n:,} of {word}" for word, n in merged["changed"].items())
        yield f"Tensors that the adapter changed: {changed}."
        yield ""
    lora = record.get("lora") or {}
    if lora.get("placements"):
        places = ", ".join(f"{word} {n:,}" for word, n in lora["placements"].items())
        yield f"Rank {lora['rank']}, {lora['tensors']:,} tensors, on: {places}."
        yield ""


def _made(facts: Mapping[str, Any]) -> Iterator[str]:
    yield "## How it was made"
    yield ""
    number = 0
    for step in facts["steps"]:
        command = step.get("command")
        if command is None:
            yield f"- begins with `{step.get('hub') or step['made']}`"
            continue
        number += 1
        options = ", ".join(f"{name} {_value(value)}" for name, value in (step.get("options") or {}).items())
        when = (step.get("date") or "")[:10]
        version = f", moesmith {step['version']}" if step.get("version") else ""
        yield f"{number}. `moesmith {command}` → `{step['made']}`" + (
            f" ({when}{version})" if when else version
        )
        if options:
            yield f"   - options: {options}"
        for words in step.get("figures") or ():
            yield f"   - {words}"
    if facts["record"]:
        given = facts["record"].get("config") or {}
        asked = [
            f"{name} {_value(given[name])}"
            for name in ("for_", "quant", "dtype", "imatrix")
            if given.get(name)
        ]
        yield f"{number + 1}. `moesmith export {facts['kind']}`" + (
            f" ({', '.join(asked).replace('for_', 'for')})" if asked else ""
        )
    yield ""
    for step in facts["steps"]:
        if step.get("section"):
            yield re.sub(r"(?m)^## ", "### ", step["section"])
            yield ""


def _data(facts: Mapping[str, Any]) -> Iterator[str]:
    rows = [(step, step["data"]) for step in facts["steps"] if step.get("data")]
    if not rows:
        return
    yield "## Data"
    yield ""
    yield "| step | data | rows kept | tokens | of them learned | hash of the examples |"
    yield "|---|---|---|---|---|---|"
    for step, data in rows:
        kept = _count(data["rows"])
        if data.get("read") and data["read"] != data["rows"]:
            kept += f" of {_count(data['read'])}"
        yield (
            f"| {step['command']} | {data['name'] or '–'} | {kept} | {_count(data['tokens'])} | "
            f"{_count(data['learned'])} | `{data['hash'] or '–'}` |"
        )
    yield ""


def _evidence(facts: Mapping[str, Any]) -> Iterator[str]:
    rows = facts["evaluations"]
    if not rows:
        return
    yield "## What was measured"
    yield ""
    yield "| measured | run | n | score | 95 % interval |"
    yield "|---|---|---|---|---|"
    for row in rows:
        low, high = row["interval"] or (None, None)
        interval = f"{_share(low)} to {_share(high)}" if low is not None else "–"
        yield f"| {row['what']} | {row['run']} | {_count(row['n'])} | {_share(row['rate'])} | {interval} |"
    how = dict.fromkeys(row["how"] for row in rows if row.get("how"))
    if how:
        yield ""
        yield f"Decoding: {'; '.join(how)}. Measured before the export, on the model as it was trained."
    yield ""


def _parity(facts: Mapping[str, Any]) -> Iterator[str]:
    found = facts["record"].get("parity") or []
    if not found:
        return
    yield "## Is it the same model"
    yield ""
    yield (
        "Log-probabilities of the next token, over the 50 that the source finds most likely: what was "
        "exported, in its own runtime, against the source."
    )
    yield ""
    yield "| route | against | prompts | largest difference | mean | KL, nats | same first token |"
    yield "|---|---|---|---|---|---|---|"
    for row in found:
        one = row.get("parity") or {}
        largest, mean, kl = (_small(one.get(key)) for key in ("max", "mean", "kl"))
        same = _share(one.get("agreement"))
        yield (
            f"| {row.get('route')} | {row.get('against')} | {one.get('prompts')} | {largest} | {mean} | {kl} "
            f"| {same} |"
        )
    yield ""


def _run(facts: Mapping[str, Any]) -> Iterator[str]:
    kind, form, name = facts["kind"], facts["form"], facts["name"]
    record = facts["record"]
    served = kind == "lora" and form in ("vllm", "gguf")
    base = (facts["plain_name"] if served and facts["source_packed"] else None) or facts["source_name"]
    yield "## How to run it"
    yield ""
    code = " --trust-remote-code" if facts["shape"].get("own_code") else ""
    if kind == "gguf":
        files = (record.get("gguf") or {}).get("files") or [f"{name}.gguf"]
        file = files[-1]["file"] if isinstance(files[-1], dict) else files[-1]
        yield from _code(f"llama-server -m {file} -c 4096")
    elif kind == "lora" and form == "gguf":
        file = (record.get("lora") or {}).get("file") or f"{name}.gguf"
        yield from _code(f"llama-server -m {base}.gguf --lora {file}")
    elif kind == "lora" and form == "vllm":
        rank = (record.get("lora") or {}).get("rank", 8)
        limit = next((size for size in LORA_RANKS if size >= rank), rank)
        yield from _code(
            f"vllm serve {base} --enable-lora --max-lora-rank {limit} --lora-modules {name}={name}{code}"
        )
    elif kind in ("lora", "adapter"):
        if facts["source_packed"]:
            yield from _code(f"moesmith chat {base} --adapter {name}")
        yield from _code(
            "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
            f'model = AutoModelForCausalLM.from_pretrained("{base}")\n'
            f'model = PeftModel.from_pretrained(model, "{name}")',
            "python",
        )
        if facts["source_packed"]:
            yield f"`{base}` is packed: transformers loads it where `import moesmith` ran before."
            yield ""
    elif kind == "packed":
        yield from _code(f"moesmith chat {name}")
    else:
        trust = ", trust_remote_code=True" if code else ""
        yield from _code(
            "from transformers import AutoModelForCausalLM\n\n"
            f'model = AutoModelForCausalLM.from_pretrained("{name}"{trust})',
            "python",
        )
        yield from _code(f"moesmith serve {name}")


def _limits(facts: Mapping[str, Any]) -> Iterator[str]:
    yield "## Limits"
    yield ""
    kind, form, shape = facts["kind"], facts["form"], facts["shape"]
    rows = facts["evaluations"]
    if not rows:
        yield "- No evaluation of it was found beside it: how good its answers are was not measured."
    small = [row for row in rows if row["n"] and row["n"] < 200]
    if small:
        yield f"- {small[0]['what']} has {small[0]['n']} items: mind the interval."
    if facts["record"].get("parity"):
        yield "- Parity says that the export answers like the source, not that the source is right."
    if facts["record"] and not facts["record"].get("parity") and kind != "card":
        yield "- The export was not compared with its source."
    if kind in ("merged", "gguf") and facts["source_packed"]:
        yield "- Its experts went through packing: they are the dequantised ones, not the 16-bit originals."
    if kind == "merged" and facts["adapter_name"]:
        yield "- The sum of weight and update is rounded to 16 bits once."
    if form in ("vllm", "gguf") and facts["source_packed"]:
        yield (
            "- It was trained over packed experts. The model it was trained on, in 16 bits, is what "
            f"`moesmith export merged {facts['source_name']}` writes; over the original weights it answers a "
            "little differently."
        )
    if form == "vllm":
        yield "- Written after vLLM's source; try it in the version you serve with before you rely on it."
    if kind == "gguf" and (facts["record"].get("config") or {}).get("quant"):
        yield "- Quantised again for GGUF: the table above says how far that moved it."
    if shape.get("own_code"):
        yield "- The class is no part of transformers; its code is in this folder."
    gone = [step["made"] for step in facts["steps"] if step.get("command") is None and not step.get("folder")]
    if gone:
        yield f"- Nothing is recorded about how {', '.join(f'`{name}`' for name in gone)} was made."
    if not facts["license"]:
        yield "- The base's licence was not found beside it; it applies here too."
    yield "- Use in any language, domain or task that is not measured above is untested."


# ---------------------------------------------------------------- words


def _reader(form: str | None) -> str:
    return {"vllm": "vLLM", "gguf": "llama.cpp"}.get(form or "", "PEFT")


def _code(text: str, language: str = "bash") -> Iterator[str]:
    yield from (f"```{language}", text, "```", "")


def _value(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " + ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _parameters(count: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)


def _range(values: list[int]) -> str:
    return str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}" if values else "no"


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else "–"


def _share(value: Any) -> str:
    if value is None:
        return "–"
    return f"{100 * value:.1f} %" if 0 <= value <= 1 else f"{value:.3g}"


def _small(value: Any) -> str:
    return "–" if value is None else f"{value:.2g}"
