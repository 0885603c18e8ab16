"""Facts of built models as `moesmith build` gives them, made up: 4 experts, 16, a split, a degenerate one."""

from __future__ import annotations

import math
import random

METHODS = {
    "embed": 0.34, "hidden": 0.55, "centered": 0.71, "lda": 0.82, "probe": 0.87, "loss": 0.8, "random": 0.0,
}  # fmt: skip
DOMAINS = ["code", "math", "science", "prose"]
EXPERTS = ["Coding Expert", "math", "science-lora", "prose"]


def moe(**changes) -> dict:
    """4 specialists of a 30-layer base, routed by a probe: everything there."""
    sources = [f"{name} (dense)" for name in EXPERTS[:3]]
    build = {
        "class": "MixtralForCausalLM", "model_type": "mixtral", "top_k": 2, "num_experts": 4, "init": "copy",
        "route": "probe", "route_reason": "best accuracy on held-out documents", "seed": 0,
        "base": "HuggingFaceTB/SmolLM2-135M", "dtype": "bfloat16", "identical": False,
        "experts": [
            {"name": name, "source": f"specialists/{domain}", "documents": 240 + 7 * i,
             "adapter": "adapters/science-r32" if domain == "science" else None, "tokens": 61_234 + 1_777 * i}
            for i, (name, domain) in enumerate(zip(EXPERTS, DOMAINS, strict=True))
        ],
        "parameters": {"total": 372_412_800, "active": 213_867_840}, "bytes": 744_920_576,
        "bytes_copied": 664_805_376, "bytes_made": 80_115_200, "seconds": 412.3, "peak_bytes": 1_012_400_128,
        "judging_peak_bytes": 1_950_000_000,
        "modes": {
            "matrices_copied": 270, "matrices_made": 90,
            "adapters": [{"expert": 2, "folder": "adapters/science-r32", "merged": 90,
                          "left_out": {"k_proj": 30, "q_proj": 30}}],
        },
        "proof": {"what": "each expert alone == its source's FFNs in the base", "equal": True, "tokens": 64,
                  "difference": 3.1e-6, "tolerance": 1e-3, "kl": 2e-12, "dtype": "float32",
                  "unit": "largest logit difference of a token, as a share of the deviation of its logits"},
        "routing": routing(30, 4, 2, seed=1),
        "perplexity": perplexity(
            {"probe (this model)": ("router", 1.06), "embed": ("control", 1.28),
             "random (mean of 3)": ("control", 1.46), "uniform (all experts)": ("control", 1.33),
             "oracle (own expert)": ("oracle", 1.0), "base (dense)": ("source", 1.17),
             sources[0]: ("source", 1.62), sources[1]: ("source", 1.55), sources[2]: ("source", 1.41)},
            DOMAINS, own=[*sources, "base (dense)"],
        ),
    }  # fmt: skip
    return page("tiny-specialists: a MoE of four", build, **changes)


def many(**changes) -> dict:
    """16 experts with long names and 16 domains: what has to fit."""
    names = [f"specialist-{i:02d}-of-a-long-name" for i in range(16)]
    domains = [f"domain {i}" for i in range(16)]
    facts = moe()
    facts["build"] |= {
        "experts": [{"name": name, "source": f"/models/{name}"} for name in names],
        "routing": routing(24, 16, 4, seed=2),
        "perplexity": perplexity(
            {"lda (this model)": ("router", 1.3), "random (mean of 3)": ("control", 31.0),
             "uniform (all experts)": ("control", 7.0), "oracle (own expert)": ("oracle", 1.0),
             **{f"{name} (dense)": ("source", 1.6 + 0.2 * i) for i, name in enumerate(names)}},
            domains, own=[f"{name} (dense)" for name in names],
        ),
        "route": "lda", "top_k": 4,
    }  # fmt: skip
    return facts | {"title": "sixteen specialists"} | changes


def divided(**changes) -> dict:
    """A dense model split into 16 experts: no labels, so no accuracy and no oracle."""
    rng = random.Random(3)
    layers = [
        {"layer": f"model.layers.{i}", "kept": 0.81 + 0.1 * math.sin(i / 9) + 0.02 * rng.random(),
         "best": 0.95 + 0.02 * rng.random(), "random": 0.5 + 0.001 * rng.random(), "picked": 0.7}
        for i in range(30)
    ]  # fmt: skip
    unlabelled = routing(30, 16, 8, seed=2) | {"positions": [], "tokens": 0}
    for row in (unlabelled, *unlabelled["layers"]):
        row |= dict.fromkeys(("accuracy", "share", "in_top_k", "majority", "confusion", "accuracy_ci"))
        row |= {"by_method": {}}
    table = perplexity(
        {"ridge (this model)": ("router", 1.3), "random (mean of 3)": ("control", 31.0),
         "base (dense)": ("source", 1.0)}, ["code", "math"], own=[],
    )  # fmt: skip
    table |= {"gap_closed_embed": None, "verdict": None}
    table["gap_closed"] = {"mean": None, "ci": None, "by_domain": {}, "reason": "no oracle was measured"}
    build = {
        "class": "Qwen2MoeForCausalLM", "model_type": "qwen2_moe", "top_k": 8, "num_experts": 16,
        "init": "split", "route": "ridge", "base": "Qwen/Qwen2.5-0.5B", "dtype": "bfloat16", "seed": 0,
        "experts": [{"name": "Qwen2.5-0.5B", "source": "Qwen/Qwen2.5-0.5B", "documents": 96}],
        "parameters": {"total": 494_032_768, "active": 362_000_000}, "bytes": 988_065_536,
        "bytes_copied": 272_000_000, "bytes_made": 716_065_536, "seconds": 51.0, "peak_bytes": 611_000_000,
        "routing": unlabelled, "perplexity": table,
        "split": {"layers": layers, "held_out": True, "text_loss": {"dense": 2.713, "split": 2.981}},
        "modes": {"rank": 64, "energy": {
            kind: [0.6 + 0.3 * rng.random() ** 2 - 0.005 * i for i in range(30)]
            for kind in ("gate", "up", "down")
        }},
    }  # fmt: skip
    return page("Qwen2.5-0.5B in 16 parts", build, **changes)


def degenerate(**changes) -> dict:
    """One layer, identical experts, figures that are not there: what a first try looks like."""
    layer = {
        "layer": 0, "accuracy": math.nan, "share": None, "in_top_k": 0.5, "load": [1.0, 0.0], "entropy": 0.0,
        "temperature": math.inf, "by_method": {"embed": None, "random": math.nan},
    }  # fmt: skip
    rows = [
        {"name": name, "kind": kind, "mean": 9.0, "mean_ci": [9.0, 9.0], "by_domain": {"text": 9.0}}
        for name, kind in (("embed (this model)", "router"), ("random", "control"), ("oracle", "oracle"))
    ]
    rows.append(
        {"name": "base", "kind": "source", "mean": math.nan, "mean_ci": None, "by_domain": {"text": None}}
    )
    build = {
        "class": "MixtralForCausalLM", "top_k": 1, "identical": True, "parameters": {}, "seconds": None,
        "experts": [{"name": None}, {"name": "b"}],
        "proof": {"what": "identical experts equal the dense model", "difference": 0.2, "tolerance": 1e-5},
        "routing": {
            "chance": 0.5, "held_out": False, "layers": [layer], "confusion": [[1.0, 0.0], [None, math.nan]],
            "positions": [{"from": 0, "to": None, "accuracy": None, "tokens": 0}],
        },
        "perplexity": {
            "domains": ["text"], "rows": rows, "verdict": "there is nothing for a router to gain",
            "gap_closed": {"mean": None, "ci": None, "reason": "random routing is not above the oracle"},
        },
    }  # fmt: skip
    return {"title": "one layer", "build": build, **changes}


def page(title: str, build: dict, **changes) -> dict:
    return {
        "title": title,
        "subtitle": f"{build['model_type']} · {build['num_experts']} experts, top-{build['top_k']} ",
        "verdict": {
            "level": "safe",
            "sentence": "The router closes 83 % [79, 87] of the gap between random and oracle routing.",
            "points": ["8 documents share passages with the fitted text and are left out"],
        },
        "build": build,
        "how": {"command": "moesmith build recipe.yaml --out moe", "date": "2026-11-21 17:20", "seed": "0"},
        **changes,
    }


def routing(layers: int, experts: int, top_k: int, seed: int) -> dict:
    rng = random.Random(seed)
    chance = 1 / experts

    def accuracy(layer: int, quality: float) -> float:
        rise = (
            1 - math.exp(-(layer + 1) / 5) - 0.1 * (layer / layers) ** 3
        )  # early layers see tokens, not text
        return min(max(chance + (quality - chance) * rise + rng.gauss(0, 0.012), 0.02), 0.99)

    rows = []
    for layer in range(layers):
        weights = [rng.lognormvariate(0, 0.35) for _ in range(experts)]
        if layer < 3:
            weights[-1] = 0.01
        if layer == 7:
            weights[0] = 0.015
        load = [w / sum(weights) for w in weights]
        by_method = {
            name: accuracy(layer, quality) if quality else chance for name, quality in METHODS.items()
        }
        own = by_method["probe"]
        rows.append(
            {
                "layer": layer, "accuracy": own - 0.01, "share": own * 0.9, "majority": min(1.0, own + 0.2),
                "in_top_k": min(0.995, own + 0.09), "load": load, "load_top1": load,
                "entropy": -sum(p * math.log(p) for p in load) / math.log(experts),
                "temperature": 0.4 + 0.6 * rng.random(), "by_method": by_method,
            }
        )  # fmt: skip
    mean = sum(row["accuracy"] for row in rows) / layers
    confusion = []
    for i in range(experts):
        row = [rng.random() ** 2 for _ in range(experts)]
        rest = sum(row) - row[i]
        confusion.append([mean if j == i else (1 - mean) * x / rest for j, x in enumerate(row)])
    edges = [0, 1, 4, 16, 64, 256, 512]
    return {
        "chance": top_k / experts, "chance_top1": chance, "tokens": 16_248, "documents": 96, "held_out": True,
        "accuracy": mean, "accuracy_ci": [mean - 0.03, mean + 0.02], "share": mean * 0.9, "majority": 0.991,
        "confusion": confusion, "layers": rows,
        "positions": [
            {"from": a, "to": b - 1, "accuracy": mean * (1 - 0.55 * math.exp(-i)), "tokens": 41 * (b - a)}
            for i, (a, b) in enumerate(zip(edges, edges[1:], strict=False))
        ],
    }  # fmt: skip


def perplexity(kinds: dict[str, tuple[str, float]], domains: list[str], own: list[str]) -> dict:
    """`kinds`: name -> (kind, factor over the best); a source is good at the domain it stands at in `own`."""
    base = {d: (4.3, 3.1, 11.2, 24.5)[i % 4] for i, d in enumerate(domains)}
    rows = []
    for name, (kind, factor) in kinds.items():
        by = {
            d: base[d] * (1.01 if i < len(own) and own[i] == name else factor ** (1 + 0.1 * (i % 4)))
            for i, d in enumerate(domains)
        }
        mean = math.exp(sum(map(math.log, by.values())) / len(by))
        interval = [mean * 0.94, mean * 1.07]
        rows.append({"name": name, "key": name.split()[0], "kind": kind, "mean": mean, "mean_ci": interval,
                     "by_domain": by})  # fmt: skip
    closed = {d: 0.95 - 0.04 * (i % 4) for i, d in enumerate(domains)}
    embed = {d: 0.5 - 0.2 * (i % 4) for i, d in enumerate(domains)}
    return {
        "domains": domains, "documents": 96, "tokens": 16_248, "rows": rows,
        "gap_closed": {"mean": 0.83, "ci": [0.79, 0.87], "by_domain": closed, "reason": None},
        "gap_closed_embed": {"mean": 0.41, "ci": [0.36, 0.47], "by_domain": embed, "reason": None},
        "differences": [{"what": "oracle - base", "nats": -0.157, "ci": [-0.19, -0.13]},
                        {"what": "router - base", "nats": -0.099, "ci": [-0.13, -0.07]}],
        "verdict": "the router closes 83 % [79, 87] of the gap between random and oracle routing",
    }  # fmt: skip
