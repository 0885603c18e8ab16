"""What a build is made of: one YAML file, ours, the one of Gemma-2-MoE, or one of mergekit-moe.

`read_recipe` checks every key at any depth, translates what mergekit-moe calls by another name, and refuses
what has another meaning there, saying why. `filled` writes every default out, so that the recipe beside a
model says all that was asked for. Knows no weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pydantic

from moesmith.config import JobConfig, load_yaml, validate
from moesmith.errors import UserError

BEST = "probe"  # what `route: auto` takes where every expert has a corpus
WITHOUT_CORPUS = "centered"  # and where some have prompts alone
ROUTES = ("embed", "hidden", "centered", "lda", "probe", "loss", "ridge", "random")
NEED_NO_TEXT = ("random",)
TOP_K = 2
SEEDS = 1 << 32  # each layer and expert draws from a seed of its own, made of this one: it has to fit 64 bits
LONGEST_NAME = 60  # characters: an expert's name is a column of tables and an axis of charts
SPLIT_ON = (3, 4)  # of a split FFN's experts, so many are on by default: the rest of the FFN is missed

Route = Literal["auto", "embed", "hidden", "centered", "lda", "probe", "loss", "ridge", "random"]


class Expert(JobConfig):
    """One expert: where its FFNs come from, and text that is its business."""

    name: str | None = None
    """Default: the last part of source_model."""
    source_model: str | None = None
    """Folder or hub name of a dense model; default: base_model."""
    adapter: str | None = None
    """A PEFT LoRA of source_model; its FFN part is merged while the expert is made."""
    positive_prompts: list[str] = []
    """Prompts of this expert's domain."""
    negative_prompts: list[str] = []
    """Prompts that are none of its business."""
    corpus: list[str] = []
    """Text of its domain: .jsonl, .json, .parquet, text, a folder of them, or a hub name."""
    residual_scale: float = pydantic.Field(1.0, gt=0, allow_inf_nan=False)
    """Multiplies down_proj."""
    noise_scale: float = pydantic.Field(0.0, ge=0, allow_inf_nan=False)
    """Noise on every matrix."""

    @pydantic.field_validator("positive_prompts", "negative_prompts", "corpus", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        """A single string is a list of one; nothing is an empty list, and a blank one is nothing."""
        value = [] if value is None else [value] if isinstance(value, str) else value
        blank = isinstance(value, list) and any(isinstance(item, str) and not item.strip() for item in value)
        return [item for item in value if not isinstance(item, str) or item.strip()] if blank else value

    @pydantic.field_validator("name", mode="after")
    @classmethod
    def _one_short_line(cls, value: str | None) -> str | None:
        """A name on one line, or none; it stands in tables and charts."""
        name = " ".join((value or "").split())
        if not name.isprintable() or len(name) > LONGEST_NAME:
            raise UserError(
                f"{len(name)} characters{'' if name.isprintable() else ', some of them no text'}",
                f"a name is one line of at most {LONGEST_NAME} characters",
            )
        return name or None


class SharedExpert(JobConfig):
    """An FFN that every token passes, beside the routed experts."""

    source_model: str
    """Folder or hub name of a dense model."""
    weight: float = pydantic.Field(0.5, gt=0, lt=1)
    """Its share: a layer writes weight * shared + (1 - weight) * routed."""


class Recipe(JobConfig):
    """A MoE from dense models."""

    base_model: str
    """Folder or hub name of a dense model: attention, norms, embeddings, tokenizer."""
    num_experts_per_tok: int | None = pydantic.Field(None, ge=1)
    """Experts that a token uses; default 2, of a split three quarters."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Of what is written; default: the base's own."""
    output: str = "auto"
    """model_type of the MoE; auto takes the first that fits the base exactly."""
    route: Route = "auto"
    """How the routers are made."""
    init: str = "copy"
    """copy, split, drop:0.5, noise:0.01, virtual-group:4 or lora:64."""
    num_experts: int | None = pydantic.Field(None, ge=2)
    """Only of init: split; otherwise the experts are listed."""
    shared_expert: SharedExpert | None = None
    """Where the class has one."""
    seed: int = pydantic.Field(0, ge=0, lt=SEEDS)
    """Of everything that is drawn."""
    experts: list[Expert] = []
    """One entry each."""


# ---------------------------------------------------------------- what other tools write

RENAMED = {"experts_per_token": "num_experts_per_tok", "gate_mode": "route", "architecture": "output"}
GATES = {
    "cheap_embed": "embed", "hidden": "hidden", "hidden_avg": "hidden", "hidden_last": "hidden",
    "random": "random",
}  # fmt: skip
OUTPUTS = {"mixtral": "mixtral", "qwen": "qwen2_moe", "qwen2": "qwen2_moe", "qwen3": "qwen3_moe"}
LAST_TOKEN = ("hidden", "hidden_last")  # mergekit-moe looks at the last token of a prompt in these two

# Keys that tools for the same purpose know, and why they are refused here.
MEANT_ELSEWHERE = {
    "tokenizer": "the tokenizer is always the base's",
    "tokenizer_source": "the tokenizer is always the base's",
    "chat_template": "the chat template is always the base's",
    "load_in_4bit": "the base is read one layer at a time, so nothing has to be quantised to fit",
    "load_in_8bit": "the base is read one layer at a time, so nothing has to be quantised to fit",
    "quantization": "the result is written in 16 or 32 bits; `moesmith quantize` packs it afterwards",
    "device": "that is a flag: --device cuda",
    "out": "that is a flag: --out DIR",
    "output_dir": "that is a flag: --out DIR",
    "trust_remote_code": "no code of a model is run",
    "merge_method": "that belongs to a recipe that averages models; here each becomes an expert",
    "models": "that belongs to a recipe that averages models; here they are listed under experts",
    "slices": "that belongs to a recipe that stacks layers; here models are listed under experts",
    "parameters": "that belongs to a recipe that averages models; an expert has residual_scale, noise_scale",
}


def translate(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A recipe as its file has it -> with our keys, and what was translated, in words.

    Raises:
        UserError: a key of another tool that has no meaning here, or one thing said twice.
    """
    found = dict(values)
    said: list[str] = []
    for key, why in MEANT_ELSEWHERE.items():
        if key in found:
            raise UserError(f"unknown key {key}", why)
    if "architecture" in found:
        _rename(found, "architecture", _output(found["architecture"]), said)
    if "gate_mode" in found:
        mode = found["gate_mode"]
        _rename(found, "gate_mode", _route(mode), said)
        if mode in LAST_TOKEN:
            said[-1] += " (the mean over all tokens, not the last one)"
    if "experts_per_token" in found:
        _rename(found, "experts_per_token", found["experts_per_token"], said)
    if "shared_experts" in found:
        _rename(found, "shared_experts", _shared(found["shared_experts"]), said, "shared_expert")
        if found["shared_expert"] is None:
            del found["shared_expert"]
            said.pop()
        else:
            said[-1] += " (weight is its share; mergekit-moe adds half of it on top of the rest)"
    if isinstance(found.get("experts"), list):
        found["experts"] = [_with_adapter(entry, said) for entry in found["experts"]]
    return found, said


def _rename(found: dict[str, Any], key: str, value: Any, said: list[str], to: str | None = None) -> None:
    ours = to or RENAMED[key]
    if ours in found:
        raise UserError(f"{key} and {ours} are the same setting, and both are given", f"leave {key} out")
    there = found.pop(key)
    found[ours] = value
    plain = isinstance(there, (str, int, float))
    said.append(f"{key}: {there} → {ours}: {value}" if plain else f"{key} → {ours}")


def _output(name: Any) -> str:
    if name is None or str(name).lower() == "auto":
        return "auto"
    word = re.split(r"[ _-]?moe", str(name).lower())[0].strip()
    if word == "deepseek":
        raise UserError(
            f"architecture={name}: its class is no part of transformers, and its code is not written here",
            "output: auto takes the class that fits the base",
        )
    return OUTPUTS.get(word, str(name))


def _route(mode: Any) -> str:
    if mode == "uniform_random":
        raise UserError(
            "gate_mode=uniform_random: drawn from a box instead of a bell, which changes nothing that counts",
            "route: random draws normal rows",
        )
    if mode in GATES:
        return GATES[mode]
    if mode in ROUTES or mode == "auto":
        return str(mode)
    raise UserError(f"gate_mode={mode}: choose from {', '.join(GATES)}", f"or route: {', '.join(ROUTES)}")


def _shared(entries: Any) -> dict[str, Any] | None:
    """A list of at most one shared expert, as mergekit-moe has it, or the one itself."""
    if entries is None or entries == []:
        return None
    if isinstance(entries, list):
        if len(entries) > 1:
            raise UserError(f"shared_experts: {len(entries)} given, no class has more than 1")
        entries = entries[0]
    if not isinstance(entries, dict):
        raise UserError(f"shared_experts={entries}: wanted a list with source_model")
    entry = dict(entries)
    for key in ("positive_prompts", "negative_prompts"):
        if entry.pop(key, None):
            raise UserError(
                f"shared_experts[0].{key}: every token passes the shared expert, so nothing routes to it",
                "weight: says how much of it is added",
            )
    for key, plain in (("residual_scale", 1.0), ("noise_scale", 0.0)):
        if entry.pop(key, None) not in (None, plain):
            raise UserError(
                f"shared_experts[0].{key}: no such setting here",
                "weight: is its share; a layer writes weight * shared + (1 - weight) * routed",
            )
    return entry


def _with_adapter(entry: Any, said: list[str]) -> Any:
    """`source_model: MODEL+LORA`, as mergekit writes an adapter, in two keys."""
    if not isinstance(entry, dict) or not isinstance(entry.get("source_model"), str):
        return entry
    model, plus, adapter = entry["source_model"].partition("+")
    if not plus or Path(entry["source_model"]).expanduser().exists():
        return entry
    if entry.get("adapter"):
        raise UserError(f"source_model: {entry['source_model']} names an adapter, and adapter is given too")
    said.append(f"source_model: {entry['source_model']} → adapter: {adapter}")
    return {**entry, "source_model": model, "adapter": adapter}


# ---------------------------------------------------------------- reading


def read_recipe(path: str | Path, over: Mapping[str, Any] | None = None) -> tuple[Recipe, list[str]]:
    """A recipe file, with `over` in place of what it says; and what was translated, in words.

    Raises:
        UserError: an unreadable file, an unknown key, or settings that exclude each other.
    """
    values, said = translate(load_yaml(path))
    recipe = validate(Recipe, {**values, **(over or {})}, as_flags=False)
    return filled(recipe), said


def filled(recipe: Recipe) -> Recipe:
    """The same recipe with every default that another key decides written out, and checked as a whole.

    Raises:
        UserError: settings that exclude each other, or experts without text for a route that needs it.
    """
    mode, number = _init(recipe.init)
    experts = recipe.experts
    if mode == "split":
        _check_split(recipe)
        experts = experts or [Expert()]
        count = recipe.num_experts or 0
    else:
        if recipe.num_experts is not None:
            raise UserError(
                f"num_experts={recipe.num_experts}: only init: split makes experts that are not listed",
                f"leave it out: {len(experts)} are listed under experts",
            )
        if not experts:
            raise UserError("experts: none listed", "one entry for each, or init: split with num_experts")
        count = len(experts) * (int(number or 1) if mode == "virtual-group" else 1)
    if count < 2:
        raise UserError(
            "experts: one is no mixture",
            "add a second entry under experts: another fine-tune, or the base (no source_model); "
            "or make several of this one: init: virtual-group:4",
        )
    named = _named(experts, recipe.base_model)
    top_k = recipe.num_experts_per_tok or _top_k(mode, number, count)
    _check_top_k(top_k, count, mode, number)
    complete = recipe.model_copy(update={"experts": named, "num_experts_per_tok": top_k})
    choose_route(complete)
    return complete


def choose_route(recipe: Recipe) -> tuple[str, str]:
    """(route, why) of a recipe whose experts are named.

    Raises:
        UserError: experts lack the text that the route needs, or it is not for this init.
    """
    mode, _ = _init(recipe.init)
    route = recipe.route
    if mode == "split":
        if route not in ("auto", "ridge", "random"):
            raise UserError(
                f"route={route}: the experts of a split have no domains to tell apart",
                "route: ridge predicts which of them would write most",
            )
        return ("ridge", "the experts are one FFN's own neurons") if route == "auto" else (route, "asked for")
    if route == "ridge":
        raise UserError("route=ridge: only for init: split", f"choose from {', '.join(_others('ridge'))}")
    if route in NEED_NO_TEXT:
        return route, "asked for"
    bare = [str(e.name) for e in recipe.experts if not (e.corpus or e.positive_prompts)]
    if bare:
        needs = "routing is fitted to text" if route == "auto" else f"route={route} is fitted to text"
        raise UserError(
            f"{needs}, and there is none for {', '.join(bare)}",
            "give each a corpus or positive_prompts, or route: random",
        )
    if route == "loss" and any(e.adapter for e in recipe.experts):
        raise UserError(
            "route=loss asks every source model for its loss, and an adapter is no model",
            "merge the adapters first, or route: probe",
        )
    if route == "loss" and len({e.source_model for e in recipe.experts}) < len(recipe.experts):
        raise UserError(
            "route=loss tells experts apart by what their sources predict, and some have the same source",
            "route: probe tells them apart by their text",
        )
    if route != "auto":
        return route, "asked for"
    if all(e.corpus for e in recipe.experts):
        return BEST, "every expert has a corpus"
    return WITHOUT_CORPUS, "not every expert has a corpus, and prompts are too few for a finer fit"


def identical(recipe: Recipe) -> bool:
    """Whether all experts will hold the same weights."""
    mode, _ = _init(recipe.init)
    kinds = {
        (Path(str(e.source_model)).expanduser().resolve(), e.adapter, e.residual_scale)
        for e in recipe.experts
    }
    return mode == "copy" and len(kinds) == 1 and not any(e.noise_scale for e in recipe.experts)


def _others(left_out: str) -> list[str]:
    return [route for route in ROUTES if route != left_out]


def _init(text: str) -> tuple[str, float | int | None]:
    from .modes import parse_init

    return parse_init(text)


def _check_split(recipe: Recipe) -> None:
    if recipe.num_experts is None:
        raise UserError("init=split needs num_experts", "num_experts: 16 makes 16 experts of each FFN")
    if len(recipe.experts) > 1:
        raise UserError(
            f"init=split makes the experts out of one FFN, and {len(recipe.experts)} are listed",
            "leave experts out, or list one for its corpus",
        )
    if recipe.shared_expert is not None:
        raise UserError("shared_expert: every expert of a split is a part of one FFN, nothing is beside it")
    for entry in recipe.experts:
        if entry.source_model not in (None, recipe.base_model):
            raise UserError(
                f"experts[0].source_model={entry.source_model}: init: split cuts the FFNs of the base",
                "leave it out, or make that model the base",
            )
        odd = [key for key in ("adapter", "negative_prompts") if getattr(entry, key)]
        odd += [
            key
            for key, plain in (("residual_scale", 1.0), ("noise_scale", 0.0))
            if getattr(entry, key) != plain
        ]
        if odd:
            raise UserError(f"experts[0].{odd[0]}: not for init: split", "it uses source_model and corpus")


def _top_k(mode: str, number: float | int | None, count: int) -> int:
    if mode == "split":
        on, of = SPLIT_ON
        return max(1, count * on // of)
    group = int(number or 1) if mode == "virtual-group" else 1
    return min(TOP_K * group, count)


def _check_top_k(top_k: int, count: int, mode: str, number: float | int | None) -> None:
    if top_k > count:
        raise UserError(f"num_experts_per_tok={top_k}: there are only {count} experts")
    group = int(number or 1) if mode == "virtual-group" else 1
    if top_k % group:
        near = max(group, round(top_k / group) * group)
        raise UserError(
            f"num_experts_per_tok={top_k}: a multiple of {group} is wanted, so that whole groups are chosen",
            f"num_experts_per_tok: {near}",
        )


def _named(experts: list[Expert], base: str) -> list[Expert]:
    """Every expert with a source, and a name of its own."""
    sources = [expert.source_model or base for expert in experts]
    wanted = [expert.name or _short(expert, source) for expert, source in zip(experts, sources, strict=True)]
    names: list[str] = []
    for i, (expert, name) in enumerate(zip(experts, wanted, strict=True)):
        if expert.name and name in wanted[:i]:
            raise UserError(
                f"experts[{i}].name: two experts are called {name!r}", "give each a name of its own"
            )
        number = 2
        unique = name
        while unique in names or (unique != name and unique in wanted):
            unique, number = f"{name} {number}", number + 1
        names.append(unique)
    return [
        expert.model_copy(update={"name": name, "source_model": source})
        for expert, name, source in zip(experts, names, sources, strict=True)
    ]


def _short(expert: Expert, source: str) -> str:
    """The last part of the path or hub name of what tells this expert from the others."""
    path = Path(expert.adapter or source)
    return path.name or path.resolve().name or str(path)
