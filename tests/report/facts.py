"""Facts as the jobs give them, made up but shaped like real ones: a small model and a big one."""

from __future__ import annotations

import math
import random

DOMAINS = ["math", "logic", "code", "science", "creative", "chat"]
STATISTICS = {
    "tokens": ("tokens routed", "tokens"),
    "gate": ("sum of gates", ""),
    "norm": ("sum of output norms", "‖f‖"),
    "contribution": ("contribution", "Σ g‖f‖"),
    "reap": ("REAP", "mean g‖f‖"),
    "prompt_norm": ("per-prompt norm", "Σ √Σ g²‖f‖²"),
    "easyep": ("EASY-EP", ""),
    "relative": ("relative", "share"),
    "max_norm": ("largest norm", "‖f‖"),
    "mean_gate": ("mean gate", ""),
}
CRITERIA = ["contribution", "reap", "man", "easyep", "frequency", "gate", "random"]
SCRIPT = '<script>document.title="pwned"</script><img src=x onerror="document.title=\'pwned\'">'


def small(**changes) -> dict:
    """4 layers x 16 experts, 6 domains: everything there."""
    return build(4, 16, 4, ["contribution", "tokens", "reap"], DOMAINS, "tiny-olmoe", **changes)


def big(**changes) -> dict:
    """30 layers x 128 experts x 10 statistics x 6 domains: the largest page there is to carry."""
    return build(30, 128, 8, list(STATISTICS), DOMAINS, "gemma-4-26B-A4B-it", **changes)


def build(layers, experts, top_k, statistics, domains, title, **changes) -> dict:
    rng = random.Random(7)
    keeps = [experts * 15 // 16, experts * 7 // 8, experts * 3 // 4, experts // 2]
    matrices = {key: by_domain(rng, key, layers, experts, domains) for key in statistics}
    contribution = matrices["contribution"]["all"]
    dropped = [sorted(sorted(range(experts), key=row.__getitem__)[: experts // 8]) for row in contribution]
    names = [str(layer) for layer in range(layers)]
    facts = {
        "title": f"{title}: which experts matter",
        "subtitle": f"{title} · {layers} layers × {experts} experts, top-{top_k}",
        "verdict": {
            "level": "caution",
            "sentence": f"Keep {keeps[1]} of {experts} experts: close to the original, but code changes.",
            "points": [
                "Held-out KL 0.021 nats per token [0.017, 0.026]; same top token at 93.4 % of positions.",
                "Perplexity +1.9 %; worst domain code, +4.1 %.",
                "Loops in 2 of 40 answers (original: 1 of 40).",
            ],
        },
        "pareto": pareto(rng, experts, keeps, domains),
        "heatmap": {
            "layers": names,
            "experts": experts,
            "statistics": {
                key: {"label": STATISTICS[key][0], "unit": STATISTICS[key][1], "by_domain": matrices[key]}
                for key in statistics
            },
            "dropped": dropped,
        },
        "retained": retained(rng, contribution, dropped, names),
        "concentration": concentration(contribution),
        "domains": {
            "names": domains,
            "overlap": square(rng, len(domains), 0.35, 0.75, diagonal=1.0, symmetric=True),
            "chance": 0.14,
            "regret": square(rng, len(domains), 0.005, 0.16, diagonal=0.004),
            "dropped_overlap": square(rng, len(domains), 0.05, 0.5, diagonal=1.0, symmetric=True),
            "top": experts // 4,
        },
        "reliability": {
            "split_half": [0.97 - 0.2 * rng.random() ** 2 for _ in names],
            "tokens_per_expert": {"min": 41, "median": 1830, "layer": names[-2], "expert": experts - 3},
            "warning": "the expert with the fewest tokens saw 41; below about 100 the last ranks are noise",
        },
        "agreement": {
            "criteria": CRITERIA,
            "spearman": square(rng, len(CRITERIA), -0.1, 0.98, diagonal=1.0, symmetric=True),
            "units": {name: f"what {name} adds up over the routed tokens" for name in CRITERIA},
            "dropped_jaccard": square(rng, len(CRITERIA), 0.08, 0.9, diagonal=1.0, symmetric=True),
        },
        "units": {
            "note": "contribution sums over tokens, prompt_norm over documents; 3 of 8 experts differ",
            "per_layer": [
                {"layer": n, "spearman": 0.9, "only_contribution_drops": [1], "only_prompt_norm_drops": [2]}
                for n in names
            ],
        },
        "similarity": {
            "layers": names,
            "raw": [0.02 + 0.03 * rng.random() for _ in names],
            "aligned": [0.12 + 0.08 * rng.random() for _ in names],
            "output": [0.25 + 0.3 * rng.random() for _ in names],
            "note": "Aligned weights are about as unlike as random ones: merging has little to hold on to.",
        },
        "canary": canary(),
        "divergence": [
            {
                "name": f"{kind}, {keeps[1]} of {experts}",
                "kl_mean": kl,
                "kl_ci": [kl * 0.84, kl * 1.2],
                "kl_median": kl / 7,
                "kl_p99": kl * 11,
                "top1": 1 - 3 * kl,
                "ppl_ratio": 1 + kl * 0.9,
                "ppl_ratio_ci": [1 + kl * 0.6, 1 + kl * 1.3],
                "per_domain": {
                    d: {
                        "kl_mean": kl * f, "kl_ci": [kl * f * 0.7, kl * f * 1.4], "kl_median": kl * f / 7,
                        "kl_p99": kl * f * 11,
                        "top1": 1 - 3 * kl * f, "ppl_a": 8.1, "ppl_b": 8.1 * (1 + kl * f),
                        "ppl_ratio": 1 + kl * f,
                        "ppl_ratio_ci": [1 + kl * f * 0.7, 1 + kl * f * 1.4], "tokens": 6214, "documents": 10,
                    }
                    for d, f in zip(domains, (0.5, 0.9, 1.8, 0.7, 0.3, 0.6), strict=False)
                },
            }
            for kind, kl in (("contribution", 0.0214), ("random", 0.163))
        ],
        "how": {
            "command": f"moesmith compare {title} --profile prof/ --keep {','.join(map(str, keeps))}",
            "date": "2026-11-21 14:02 UTC",
            "versions": {"moesmith": "0.1.0", "torch": "2.9.1", "transformers": "5.23.0"},
            "machine": "2 cores, 16 GB",
            "model_hash": "sha256:9c1f0b6b1c0f6d7f2e8a4f5b3a2d1c0e9f8a7b6c5d4e3f2a1b0c9d8e7f6a5b4c",
            "corpus_hash": "sha256:01ab23cd45ef67890123456789abcdef0123456789abcdef0123456789abcdef",
            "seed": 0,
            "held_out": "61 documents, 38,214 tokens, no 13-gram shared with the profile's text",
        },
        "notes": ["Greedy answers were cut at 128 tokens.", "Merging keeps one router row of each group."],
    }  # fmt: skip
    facts.update(changes)
    return facts


def by_domain(rng, key, layers, experts, domains) -> dict:
    every = {}
    taste = {
        d: [[rng.lognormvariate(0, 0.8) for _ in range(experts)] for _ in range(layers)] for d in domains
    }
    base = [[rng.lognormvariate(0, 0.7) * (1 + layer / 6) for _ in range(experts)] for layer in range(layers)]
    unit = {"tokens": 400, "relative": 0.004, "reap": 0.3, "mean_gate": 0.08}.get(key, 31.0)
    for domain in domains:
        every[domain] = [
            [unit * b * t for b, t in zip(bases, tastes, strict=True)]
            for bases, tastes in zip(base, taste[domain], strict=True)
        ]
    if key == "tokens":
        every = {d: [[int(v) for v in row] for row in rows] for d, rows in every.items()}
        every[domains[0]][0][1] = 0
    if key == "easyep":
        every[domains[0]][0] = [float("nan")] * experts  # a layer whose residual cannot be seen
    pooled = [[sum(every[d][i][j] for d in domains) for j in range(experts)] for i in range(layers)]
    return {"all": pooled, **every}


def pareto(rng, experts, keeps, domains) -> dict:
    def points(strength, jitter=0.0):
        found = []
        for keep in keeps:
            gone = 1 - keep / experts
            kl = strength * gone**1.6 * (1 + jitter * rng.random())
            found.append(
                {
                    "keep": keep, "kl": kl, "kl_ci": [kl * 0.85, kl * 1.18], "kl_median": kl / 6,
                    "kl_p99": kl * 9,
                    "top1": math.exp(-2.2 * kl), "ppl_ratio": math.exp(kl * 0.9),
                    "ppl": {d: math.exp(kl * (0.5 + 0.2 * i)) for i, d in enumerate(domains[:3])},
                }
            )  # fmt: skip
        return found

    random_points = points(4.4)
    return {
        "experts": experts,
        "original": {"ppl": {d: 7.2 for d in domains[:3]}},
        "series": [
            {"name": "contribution", "kind": "prune", "points": points(0.8)},
            {"name": "reap", "kind": "prune", "points": points(0.95, 0.1)},
            {"name": "easyep", "kind": "prune", "points": points(0.9, 0.3)},
            {"name": "frequency", "kind": "prune", "points": points(2.1, 0.2)},
            {"name": "merge average", "kind": "merge", "points": points(3.0)},
            {"name": "merge ream", "kind": "merge", "points": points(1.25)},
            {"name": "contribution + heal", "kind": "healed", "points": points(0.45)[1:3]},
        ],
        "random_band": [
            {"keep": p["keep"], "kl_lo": p["kl"] * 0.7, "kl_hi": p["kl"] * 1.5, "kl_median": p["kl"]}
            for p in random_points
        ],
    }


def retained(rng, contribution, dropped, names) -> list:
    rows = []
    for name, row, gone in zip(names, contribution, dropped, strict=True):
        share = 1 - sum(row[e] for e in gone) / sum(row)
        rows.append(
            {"layer": name, "norm": share, "ci": [share - 0.004, share + 0.003],
             "keep": len(row) - len(gone), "unit": "contribution",
             "tokens_min": rng.randrange(40, 300), "tokens_median": rng.randrange(1500, 2500)}
        )  # fmt: skip
    return rows


def concentration(contribution) -> dict:
    lorenz, gini, needed = {}, [], {share: [] for share in ("50", "80", "95", "99")}
    top8, bottom = [], []
    pooled = [sum(sorted(row)[j] for row in contribution) for j in range(len(contribution[0]))]
    for name, row in [("all", pooled), *((str(i), row) for i, row in enumerate(contribution))]:
        ordered, total, so_far, points = sorted(row), sum(row), 0.0, [[0.0, 0.0]]
        for index, value in enumerate(ordered, 1):
            so_far += value
            points.append([index / len(ordered), so_far / total])
        lorenz[name] = points
        if name == "all":
            continue
        gini.append(1 - 2 * sum(p[1] for p in points[1:]) / len(ordered) + 1 / len(ordered))
        for share, counts in needed.items():
            held, count = 0.0, 0
            for value in reversed(ordered):
                held, count = held + value, count + 1
                if held >= int(share) / 100 * total:
                    break
            counts.append(count)
        top8.append(sum(ordered[-8:]) / total)
        bottom.append(sum(ordered[: len(ordered) // 2]) / total)
    dead = [[] for _ in contribution]
    dead[1] = [3, 9]
    return {
        "lorenz": lorenz, "gini": gini, "experts_for": needed, "top8_share": top8,
        "bottom_half_share": bottom, "dead": dead,
    }  # fmt: skip


def square(rng, n, low, high, diagonal, symmetric=False) -> list:
    rows = [[low + (high - low) * rng.random() for _ in range(n)] for _ in range(n)]
    for i in range(n):
        rows[i][i] = diagonal
        for j in range(i):
            rows[i][j] = rows[j][i] if symmetric else rows[i][j]
    return rows


def canary() -> dict:
    answer = "To find the sum of the first n odd numbers, write them under each other: 1, 3, 5, 7. "
    return {
        "rows": [
            {"name": "original", "loop_rate": 0.025, "length_ratio": 1.0, "eos_rate": 0.9, "empty_rate": 0.0,
             "n": 40},
            {"name": "contribution, 14", "loop_rate": 0.05, "length_ratio": 1.04, "eos_rate": 0.875,
             "empty_rate": 0.0, "n": 40},
        ],
        "samples": [
            {"prompt": "Why is the sum of the first n odd numbers a square?", "a": answer * 3 + "It is n².",
             "b": answer * 12, "a_name": "original", "b_name": "14 of 16 experts", "loop_a": False,
             "loop_b": True},
            {"prompt": f"Write a page that greets me. {SCRIPT}",
             "a": f"Here it is:\n\n{SCRIPT}\n</pre></article><b>bold</b>",
             "b": "", "a_name": "original", "b_name": "14 of 16 experts", "loop_a": False, "loop_b": False},
            {"prompt": "Say hello in Arabic.", "a": "مرحبا بالعالم",
             "b": "A bell \x07, an escape \x1b[31m and a lone surrogate \ud800.",
             "a_name": "original", "b_name": "14 of 16 experts", "loop_a": False, "loop_b": False},
        ],
    }  # fmt: skip


def build_pareto(experts: int, points: list[tuple[int, float]], name: str = "one") -> dict:
    """One criterion with nothing but KL."""
    return {
        "experts": experts,
        "series": [{"name": name, "kind": "prune", "points": [{"keep": k, "kl": kl} for k, kl in points]}],
    }
