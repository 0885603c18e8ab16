"""Which score ranks experts best? Each expert is removed alone, and every score is held against what it cost.

Removing one expert: its row leaves the router, which sends its tokens elsewhere (a mask; no weight changes).
Cost is measured on the profile's held-out text, which no score has seen: the rise of the mean next-token
loss, and KL(original || without it), both in nats per token. Spearman's rank correlation of every score with
the cost, per layer and over all experts of the model; a score that ranks perfectly has 1.

Over all experts a score competes across layers too. `scores` divides each domain by its sum over a layer's
experts, so layers weigh alike there; how much a layer matters is none of a score's business as long as every
layer keeps the same number. Intervals: documents drawn again with replacement (the cost's noise only).

    python benchmarks/knockout.py MODEL PROFILE [--domains mean|max] [--tokens 20000]
    python benchmarks/knockout.py --corpora DIR    # the five corpora that docs/compare.md profiles the tiny
                                                   # OLMoE fixture on, then:
    moesmith profile MODEL --corpus math=DIR/math.jsonl --corpus logic=... --out PROFILE
"""

from __future__ import annotations

import importlib
import inspect
import json
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common import arguments, emit, say, table

DOMAINS = ("math", "logic", "code", "science", "creative")
# Exercises with answers from reasoning-gym, functions of Python's library, docstrings of scipy and numpy, and
# a short story that comes with reasoning-gym: near the five domains the tiny OLMoE fixture was trained on.
TASKS = {
    "math": ("gsm_symbolic", "simple_equations", "lcm", "fraction_simplification", "chain_sum"),
    "logic": ("family_relationships", "syllogism", "aiw", "needle_haystack"),
}
CODE = (
    "statistics", "textwrap", "fractions", "heapq", "calendar", "shlex", "csv", "bisect", "argparse",
    "difflib", "json.decoder", "random", "collections", "functools", "string",
)  # fmt: skip
SCIENCE = (
    "scipy.stats",
    "scipy.signal",
    "scipy.integrate",
    "scipy.constants",
    "scipy.optimize",
    "numpy.linalg",
)


# ---------------------------------------------------------------- text


def write_corpora(folder: Path, rows: int = 300) -> None:
    """One JSONL file per domain, `rows` rows each at most, the same for the same packages."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {"code": code(), "science": science(), "creative": story()}
    for domain in DOMAINS:
        if domain in TASKS:
            found = exercises(TASKS[domain], rows)
        else:
            found = [{"text": text} for text in texts[domain][:rows]]
        path = folder / f"{domain}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
        say(f"{path}: {len(found)} rows")


def exercises(names: tuple[str, ...], rows: int) -> list[dict[str, Any]]:
    """Questions and answers as chats, the kinds in turn.

    The generators fill in forms. Of rows that share 13 words in a row only the first is taken, or text held
    out would leak.
    """
    from moesmith.data.leaks import hash_ngrams
    from moesmith.data.tasks import Task, draw

    seen: set[int] = set()
    kinds = []
    for name in names:
        kept: list[dict[str, Any]] = []
        for drawn in draw(Task(name), 3 * rows, seed=4242):
            ngrams, _ = hash_ngrams(drawn.question)
            if len(kept) < rows and seen.isdisjoint(ngrams.tolist()):
                seen |= set(ngrams.tolist())
                asked, answer = {"role": "user", "content": drawn.question}, {"content": drawn.answer}
                kept.append({"messages": [asked, {"role": "assistant", **answer}]})
        kinds.append(kept)
    mixed = [row for group in zip_longest(*kinds) for row in group if row is not None]
    return mixed[:rows]


def code() -> list[str]:
    """Functions and classes of the standard library, 300 to 2,000 characters each."""
    found = []
    for name in CODE:
        module = importlib.import_module(name)
        for _, thing in sorted(vars(module).items()):
            if (inspect.isfunction(thing) or inspect.isclass(thing)) and thing.__module__ == name:
                try:
                    source = inspect.getsource(thing)
                except OSError:  # a class made by a call has no source
                    continue
                if len(source) >= 300:
                    found.append(source[:2000])
    return _mixed(found)


def science() -> list[str]:
    """Docstrings of scientific functions, without their examples."""
    found = []
    for name in SCIENCE:
        module = importlib.import_module(name)
        for key in sorted(getattr(module, "__all__", dir(module))):
            text = inspect.getdoc(getattr(module, key, None)) or ""
            text = text.split("Examples\n----")[0].strip()
            if len(text) >= 300:
                found.append(text[:2000])
    return _mixed(list(dict.fromkeys(found)))


def story() -> list[str]:
    """Paragraphs of Jules Verne's In the Year 2889, joined to 600 characters or more."""
    from reasoning_gym.data import read_data_file

    from moesmith.data.calibration import STORY, STORY_END, STORY_START
    from moesmith.data.corpora import paragraphs

    text = read_data_file(STORY)
    return list(paragraphs(text[text.index(STORY_START) : text.index(STORY_END)], 600))


def _mixed(texts: list[str]) -> list[str]:
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))
    return [texts[i] for i in order.tolist()]


# ---------------------------------------------------------------- knocking out


def knock_out(model: Any, documents: list[Any], layers: list[Any]) -> dict[tuple[int, int], Any]:
    """(layer index, expert) -> Divergence of the model without that expert."""
    from moesmith.eval.divergence import divergences
    from moesmith.models.surgery import masked

    def without(name: str, count: int, expert: int) -> Any:
        keep = {name: [e for e in range(count) if e != expert]}
        return lambda: masked(model, keep)

    contexts = {
        f"{index}/{expert}": without(layer.layer, layer.num_experts, expert)
        for index, layer in enumerate(layers)
        for expert in range(layer.num_experts)
    }
    total = sum(len(d.ids) - 1 for d in documents)
    found = divergences(
        model, documents, contexts, on_batch=lambda done: say(f"{done:,} of {total:,} tokens")
    )
    return {(int(k.split("/")[0]), int(k.split("/")[1])): value for k, value in found.items()}


def costs(found: dict[tuple[int, int], Any], counts: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """{"loss", "kl"} -> (experts,) nats per token; `counts` (documents,) draws documents again."""
    some = next(iter(found.values()))
    weight = np.ones(len(some.tokens)) if counts is None else counts
    tokens = (some.tokens * weight).sum()
    return {
        "loss": np.array([((d.nll_b - d.nll_a) * weight).sum() / tokens for d in found.values()]),
        "kl": np.array([(d.kl_sums * weight).sum() / tokens for d in found.values()]),
    }


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation, equal values share a rank; NaN where one side is constant."""
    from scipy.stats import rankdata

    a, b = rankdata(a) - (len(a) + 1) / 2, rankdata(b) - (len(b) + 1) / 2
    norm = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / norm if norm else float("nan")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("model", nargs="?")
    parser.add_argument("profile", nargs="?")
    parser.add_argument("--corpora", type=Path, help="write the fixture's corpora there and stop")
    parser.add_argument("--domains", default="mean")
    parser.add_argument("--tokens", type=int, help="held-out tokens at most, per domain")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rounds", type=int, default=500, help="of the bootstrap")
    args = parser.parse_args()
    if args.corpora:
        write_corpora(args.corpora)
        return
    if not args.profile:
        parser.error("MODEL and PROFILE, or --corpora DIR")

    from transformers import AutoTokenizer

    import moesmith
    from moesmith.data.corpora import encode, read_held_out
    from moesmith.errors import UserError
    from moesmith.eval.bootstrap import draws
    from moesmith.jobs._pair import first_tokens, load, open_side
    from moesmith.prune.criteria import CRITERIA, parse_domains, scores
    from moesmith.prune.stats import Profile, same_model

    moesmith.register()
    side = open_side("A", args.model, anatomy=False)
    profile = Profile.read(Path(args.profile))
    same_model(profile, side.folder)
    documents = read_held_out(args.profile)
    if args.tokens:
        documents = first_tokens(documents, args.tokens)
    encoded = encode(AutoTokenizer.from_pretrained(side.folder), documents)
    model = load(side, args.dtype, "auto")
    found = knock_out(model, encoded, profile.layers)
    cost = costs(found)
    drawn = [costs(found, count) for block in draws(len(encoded), args.rounds) for count in block]
    layer_of = np.array([index for index, _ in found])

    ranked: dict[str, np.ndarray] = {}
    for name in CRITERIA:
        try:
            by_layer = scores(profile, name, parse_domains(args.domains))
        except UserError as error:
            say(f"{name} left out: {error.message}")
            continue
        ranked[name] = torch.cat([by_layer[layer.layer] for layer in profile.layers]).numpy()

    setting = {
        "model": side.folder.name,
        "experts": [layer.num_experts for layer in profile.layers],
        "top_k": profile.layers[0].top_k,
        "domains": args.domains,
        "profiled_tokens": int(profile.domain_tokens().sum()),
        "held_out_tokens": int(next(iter(found.values())).tokens.sum()),
        "held_out_documents": len(encoded),
    }
    original = next(iter(found.values()))
    loss = {
        domain: float(part.nll_a.sum() / part.tokens.sum())
        for domain in dict.fromkeys(original.domains)
        for part in [original.select(domain)]
    }
    emit(
        "knockout_cost",
        setting,
        {
            "loss_of_original": loss,
            "loss_more": [round(float(x), 6) for x in cost["loss"]],
            "kl": [round(float(x), 6) for x in cost["kl"]],
            "cost_less_than_0.002": int((cost["loss"] < 0.002).sum()),
            "spearman_loss_kl": spearman(cost["loss"], cost["kl"]),
        },
    )
    rows = []
    for name, score in ranked.items():
        figures: dict[str, Any] = {}
        for what in ("loss", "kl"):
            per_layer = [
                spearman(score[layer_of == i], cost[what][layer_of == i]) for i in range(len(profile.layers))
            ]
            again = np.array(
                [[spearman(score, one[what]), _mean_of_layers(score, one[what], layer_of)] for one in drawn]
            )
            low, high = np.nanquantile(again, [0.025, 0.975], axis=0)
            figures |= {
                f"{what}_per_layer": [round(x, 3) for x in per_layer],
                f"{what}_mean_of_layers": float(np.nanmean(per_layer)),
                f"{what}_mean_of_layers_ci": [round(float(low[1]), 3), round(float(high[1]), 3)],
                f"{what}_pooled": spearman(score, cost[what]),
                f"{what}_pooled_ci": [round(float(low[0]), 3), round(float(high[0]), 3)],
            }
        emit("knockout", setting | {"score": name, "unit": CRITERIA[name].unit}, figures)
        rows.append((name, figures))
    rows.sort(key=lambda row: -row[1]["kl_mean_of_layers"])
    say("Spearman of score and cost of removing the expert; 95 % intervals over documents; best first")
    table(
        ("score", "KL, mean of layers", "", "loss, mean of layers", "", "KL, pooled", "loss, pooled"),
        [
            (
                name,
                f"{f['kl_mean_of_layers']:.2f}",
                "[{:.2f}, {:.2f}]".format(*f["kl_mean_of_layers_ci"]),
                f"{f['loss_mean_of_layers']:.2f}",
                "[{:.2f}, {:.2f}]".format(*f["loss_mean_of_layers_ci"]),
                f"{f['kl_pooled']:.2f}",
                f"{f['loss_pooled']:.2f}",
            )
            for name, f in rows
        ],
    )


def _mean_of_layers(score: np.ndarray, cost: np.ndarray, layer_of: np.ndarray) -> float:
    each = [spearman(score[layer_of == i], cost[layer_of == i]) for i in np.unique(layer_of)]
    return float(np.nanmean(each))


if __name__ == "__main__":
    main()
