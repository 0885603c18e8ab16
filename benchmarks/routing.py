"""How much of the routing gap does each way of initialising routers close, and at which depth?

    python benchmarks/specialists.py --base DENSE --out specialists
    python benchmarks/routing.py --base DENSE --specialists specialists --out routing

Builds a copy MoE of the specialists on the base's attention, fits every method's routers in one pass over
the `route` text, and measures the same MoE under each of them, and under controls, on the `judge` text,
which neither routers nor specialists have seen. Gap closed: (PPL_random - PPL) / (PPL_random - PPL_oracle),
where the oracle sends every token to its domain's expert alone. `embed, scale 5` is the predecessor's
router: its constant in the place of a fitted temperature. By depth: one third of the layers uses a method's
routers, the others send tokens to the label's expert, or the other way round. Prints a JSON line and
Markdown tables on stderr.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch

import common
import specialists
from common import say

LENGTH = 256
FIXED = "embed, scale 5"


def texts_of(tokenizer: Any, corpora: Path, part: str, documents: int) -> list[tuple[list[int], str]]:
    """(ids, domain) of the first rows of every domain that fill documents of up to LENGTH tokens."""
    found = []
    for domain in specialists.SPECIALISTS:
        taken = 0
        for line in (corpora / f"{domain}.{part}.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            text = row.get("text") or tokenizer.apply_chat_template(row["messages"], tokenize=False)
            ids = tokenizer(text, add_special_tokens=False).input_ids[:LENGTH]
            if len(ids) < 32:
                continue
            found.append((ids, domain))
            taken += len(ids)
            if taken >= documents * LENGTH:
                break
    return found


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--specialists", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--top-k", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--fit", type=int, default=30, help=f"times {LENGTH} tokens per domain to fit on")
    parser.add_argument("--judge", type=int, default=12, help=f"times {LENGTH} tokens per domain to judge on")
    args = parser.parse_args()
    experts = [args.specialists / domain for domain in specialists.SPECIALISTS]
    labels = {domain: number for number, domain in enumerate(specialists.SPECIALISTS)}

    from transformers import AutoModelForCausalLM, AutoTokenizer

    from moesmith.build.assemble import assemble, write_model
    from moesmith.build.capture import Text, capture
    from moesmith.build.estimators import SEED_SCALE
    from moesmith.build.modes import ExpertSource, make_experts
    from moesmith.build.native import target_config
    from moesmith.build.routers import METHODS, RouterFit
    from moesmith.build.sources import open_source
    from moesmith.build.token_losses import token_losses
    from moesmith.eval.decisive import by_depth, decisive
    from moesmith.eval.routed import Forced, by_rows, uniform
    from moesmith.eval.routing import Labelled, losses

    tokenizer = AutoTokenizer.from_pretrained(args.base)
    corpora = args.specialists / "corpora"
    texts = [
        Text(ids, labels[domain], number % 5 != 4, f"{domain}/{number}", domain)
        for number, (ids, domain) in enumerate(texts_of(tokenizer, corpora, "route", args.fit))
    ]
    judged = [
        Labelled(ids, domain, f"{domain}/{number}", labels[domain])
        for number, (ids, domain) in enumerate(texts_of(tokenizer, corpora, "judge", args.judge))
    ]
    shutil.rmtree(args.out, ignore_errors=True)
    (args.out / "moe").mkdir(parents=True)

    start = time.perf_counter()
    token_loss = torch.stack([token_losses(folder, texts) for folder in experts], dim=1)
    say(f"token losses of {len(experts)} sources: {time.perf_counter() - start:.0f} s")
    sources = [open_source(str(folder)) for folder in experts]
    base, num_experts = open_source(str(args.base)), len(experts)
    fit = RouterFit(texts, num_experts, METHODS, base.read("model.embed_tokens.weight"), token_loss)
    start = time.perf_counter()
    capture(args.base, texts, fit.visit, args.out / "state")
    routers = fit.routers()
    say(f"capture and {len(METHODS)} fits: {time.perf_counter() - start:.0f} s")

    made = make_experts("copy", [ExpertSource(source, base) for source in sources], base.dtype, 0)
    config = target_config(base.config, "mixtral", num_experts, args.top_k[0], base.ffn_width)
    write_model(base, args.out / "moe", config, assemble(base, config, made, routers.weights["probe"]))
    dense = {}
    for folder in [args.base, *experts]:
        name = "base" if folder == args.base else folder.name
        source = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
        dense[name] = losses(source, judged, name=name)
    model = AutoModelForCausalLM.from_pretrained(args.out / "moe", dtype="auto").eval()
    dense |= {
        name: losses(model, judged, choose=choose)
        for name, choose in (("uniform", uniform(num_experts)), ("oracle", Forced()))
    }
    accuracy = {
        name: by_third([layer[name]["accuracy"] for layer in routers.facts["layers"]]) for name in METHODS
    }
    for top_k in args.top_k:
        routed = {name: rows for name, rows in routers.weights.items() if name != "random"}
        routed[FIXED] = [SEED_SCALE * unit(rows) for rows in routers.weights["embed"]]
        chooses = {name: by_rows(rows, top_k) for name, rows in routed.items()}
        controls = {f"random {seed}": by_rows(rows, top_k) for seed, rows in enumerate(randoms(routers, 3))}
        measured = dense | {
            name: losses(model, judged, choose=choose, name=name)
            for name, choose in {**chooses, **controls}.items()
        }
        parts = {"random": controls["random 0"], "embed": chooses["embed"], "probe": chooses["probe"]}
        depth = by_depth(model, judged, parts, Forced())
        rest = {name: found for name, found in measured.items() if name not in chooses}
        tables = {name: decisive({"router": measured[name], **rest}, judged) for name in chooses}
        say(f"\ntop-{top_k} of {num_experts}\n")
        show(tables, accuracy, depth)
        rows = {
            name: next(row for row in table["rows"] if row["key"] == "router")
            for name, table in tables.items()
        }
        others = next(iter(tables.values()))["rows"]
        common.emit(
            "routing",
            {"top_k": top_k, "experts": num_experts, "fit_tokens": sum(len(text.ids) for text in texts),
             "judge_tokens": sum(len(text.ids) for text in judged)},
            {"perplexity": {name: row["mean"] for name, row in rows.items()}
             | {row["key"]: row["mean"] for row in others if row["key"] != "router"},
             "by_domain": {name: row["by_domain"] for name, row in rows.items()},
             "gap_closed": {name: table["gap_closed"] for name, table in tables.items()},
             "accuracy_by_third": accuracy,
             "one_third": {name: [part["perplexity"] for part in parts] for name, parts in depth.items()}},
        )  # fmt: skip


def unit(rows: torch.Tensor) -> torch.Tensor:
    """Rows of length 1, as the embed router's are before its temperature."""
    return torch.nn.functional.normalize(rows, dim=-1)


def randoms(routers: Any, seeds: int) -> list[list[torch.Tensor]]:
    """Random rows as long as the probe's, with other seeds than the method `random` has."""
    found = []
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        rows = [torch.randn(w.shape, generator=generator) for w in routers.weights["random"]]
        lengths = [w.norm(dim=1, keepdim=True) for w in routers.weights["random"]]
        found.append([unit(row) * length for row, length in zip(rows, lengths, strict=True)])
    return found


def by_third(values: list[float]) -> list[float]:
    """Means over the early, the middle and the late third of the layers."""
    edges = [round(i * len(values) / 3) for i in range(4)]
    return [sum(values[a:b]) / (b - a) for a, b in zip(edges, edges[1:], strict=False)]


def show(tables: dict[str, Any], accuracy: dict[str, list[float]], depth: dict[str, Any]) -> None:
    """The decisive table and the one by depth, as Markdown."""
    domains = specialists.SPECIALISTS
    say(f"| router | {' | '.join(domains)} | mean | gap closed | token accuracy early, middle, late |")
    say("|---|" + "---|" * (len(domains) + 3))
    lines = []
    for name, table in tables.items():
        row = next(row for row in table["rows"] if row["key"] == "router")
        gap = table["gap_closed"]
        closed = "–" if gap["mean"] is None else f"{gap['mean']:.0%}"
        closed += f" [{gap['ci'][0]:.0%}, {gap['ci'][1]:.0%}]" if gap["ci"] else ""
        lines.append((row["mean"], name, row, closed))
    for row in next(iter(tables.values()))["rows"]:
        if row["key"] != "router":
            lines.append((row["mean"], row["name"], row, ""))
    for mean, name, row, closed in sorted(lines, key=lambda line: line[0]):
        cells = " | ".join(f"{row['by_domain'][domain]:.2f}" for domain in domains)
        thirds = ", ".join(f"{share:.0%}" for share in accuracy.get(name, []))
        say(f"| {name} | {cells} | {mean:.2f} | {closed} | {thirds} |")
    say("\n| in one third of the layers, oracle in the others | early | middle | late |\n|---|---|---|---|")
    for name, parts in depth.items():
        say(f"| {name} | " + " | ".join(f"{part['perplexity']:.2f}" for part in parts) + " |")


if __name__ == "__main__":
    main()
