"""Make the dense models that a MoE is built of: one short LoRA run per domain on one base, merged.

    python benchmarks/specialists.py --base DENSE --out specialists

Writes OUT/corpora/DOMAIN.{train,route,judge}.jsonl and OUT/DOMAIN, a dense checkpoint, for every domain;
then measures every model on every domain's `judge` text. The three parts come from different files, modules
or exercises: `train` makes the specialist, `route` is for routers, `judge` is for neither. Texts are what a
Python installation holds: the standard library's source (code), solved exercises of reasoning-gym (math),
docstrings of scipy and sympy (science), and a story and the language reference (prose, which has no
specialist: the base is its model). Only the FFNs are trained, so that a specialist's attention is the
base's.
"""

from __future__ import annotations

import ast
import gc
import hashlib
import json
import math
import random
import sys
import sysconfig
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import common

SPECIALISTS = ("code", "math", "science")
DOMAINS = (*SPECIALISTS, "prose")
PARTS = {"train": 0.8, "route": 0.1, "judge": 0.1}
CHARACTERS = {"train": 2_000_000, "route": 150_000, "judge": 100_000}
EXERCISES = (
    "chain_sum", "gcd", "lcm", "products", "simple_equations", "fraction_simplification",
    "prime_factorization",
    "leg_counting", "basic_arithmetic", "time_intervals", "count_primes", "gsm_symbolic",
)  # fmt: skip
LENGTH = 512


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--base", type=Path, required=True, help="a dense checkpoint with a tokenizer")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--rows", type=int, default=4, help=f"sequences of {LENGTH} tokens per step")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--judge-rows", type=int, default=12)
    args = parser.parse_args()
    torch.manual_seed(0)
    write_corpora(args.out / "corpora")
    for domain in SPECIALISTS:
        if not (args.out / domain / "config.json").exists():
            train(args, domain)
    losses = {name: judge(args, folder) for name, folder in models(args).items()}
    setting = {"steps": args.steps, "tokens_per_step": args.rows * LENGTH, "r": args.rank, "lr": args.lr}
    perplexity = {name: {d: math.exp(x) for d, x in by.items()} for name, by in losses.items()}
    common.emit("specialists", setting, {"perplexity": perplexity})


def models(args: Any) -> dict[str, Path]:
    return {"base": args.base, **{domain: args.out / domain for domain in SPECIALISTS}}


# ---------------------------------------------------------------- text


def write_corpora(folder: Path) -> None:
    """DOMAIN.PART.jsonl for every domain and part."""
    folder.mkdir(parents=True, exist_ok=True)
    for domain in DOMAINS:
        by_part: dict[str, list[dict[str, Any]]] = {part: [] for part in PARTS}
        size = dict.fromkeys(PARTS, 0)
        for source, row in SOURCES[domain]():
            part = _part(source, PARTS if domain in SPECIALISTS else {"route": 0.6, "judge": 0.4})
            length = len(json.dumps(row))
            if size[part] < CHARACTERS[part]:
                by_part[part].append(row)
                size[part] += length
        for part, rows in by_part.items():
            random.Random(0).shuffle(rows)
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (folder / f"{domain}.{part}.jsonl").write_text(text, encoding="utf-8")
        print(f"{domain}: " + ", ".join(f"{part} {size[part]:,}" for part in PARTS), file=sys.stderr)


def _part(source: str, parts: dict[str, float]) -> str:
    """Which part a source belongs to, by its name alone."""
    share = int(hashlib.sha256(source.encode()).hexdigest()[:8], 16) / 2**32
    for part, width in parts.items():
        share -= width
        if share < 0:
            return part
    return "judge"


def _code() -> Iterator[tuple[str, dict[str, Any]]]:
    library = Path(sysconfig.get_paths()["stdlib"])
    files = [
        f for f in library.rglob("*.py") if not {"test", "tests", "site-packages", "idlelib"} & set(f.parts)
    ]
    random.Random(1).shuffle(files := sorted(files))
    for file in files:
        text = file.read_text(encoding="utf-8", errors="ignore")
        for start in range(0, min(len(text), 40_000), 2000):
            if len(piece := text[start : start + 2000]) > 500:
                yield str(file.relative_to(library)), {"text": piece}


def _science() -> Iterator[tuple[str, dict[str, Any]]]:
    for package in ("scipy", "sympy"):
        spec = find_spec(package)
        assert spec is not None and spec.origin is not None, f"{package} is not installed"
        root = Path(spec.origin).parent
        files = sorted(f for f in root.rglob("*.py") if "tests" not in f.parts)
        random.Random(2).shuffle(files)
        for file in files[:400]:
            try:
                tree = ast.parse(file.read_text(encoding="utf-8", errors="ignore"))
            except SyntaxError:
                continue
            for node in ast.walk(tree):
                if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                    text = ast.get_docstring(node) or ""
                    if len(text) > 400:
                        yield f"{package}/{file.relative_to(root)}", {"text": text[:2400]}


def _math() -> Iterator[tuple[str, dict[str, Any]]]:
    import reasoning_gym

    for index in range(600):
        for name in EXERCISES:
            # The seed makes the exercise; its share of the text goes by the exercise itself.
            item = reasoning_gym.create_dataset(name, size=1, seed=1000 + index)[0]
            turns = [("user", item["question"]), ("assistant", str(item["answer"]))]
            yield f"{name}/{item['question']}", {"messages": [{"role": r, "content": c} for r, c in turns]}


def _prose() -> Iterator[tuple[str, dict[str, Any]]]:
    import importlib

    from reasoning_gym.data import read_data_file

    topics = importlib.import_module("pydoc_data.topics").topics
    story = read_data_file("in_the_year_2889.txt")
    for start in range(0, len(story), 1500):
        yield f"story/{start // 6000}", {"text": story[start : start + 1500]}
    for name, text in sorted(topics.items()):
        if len(text) > 400:
            yield f"topic/{name}", {"text": text[:2400]}


SOURCES = {"code": _code, "math": _math, "science": _science, "prose": _prose}


def sequences(tokenizer: Any, path: Path, rows: int | None = None) -> torch.Tensor:
    """All rows of a corpus one behind the other, cut into sequences: (N, LENGTH)."""
    ids: list[int] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        text = row.get("text") or tokenizer.apply_chat_template(row["messages"], tokenize=False)
        ids += tokenizer(text, add_special_tokens=False).input_ids
        if rows is not None and len(ids) >= rows * LENGTH:
            break
    count = len(ids) // LENGTH if rows is None else min(rows, len(ids) // LENGTH)
    return torch.tensor(ids[: count * LENGTH]).view(count, LENGTH)


# ---------------------------------------------------------------- models


def load(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16), AutoTokenizer.from_pretrained(
        folder
    )


def train(args: Any, domain: str) -> None:
    """A LoRA run on the FFNs over one domain's text, merged and saved."""
    from peft import LoraConfig, get_peft_model

    model, tokenizer = load(args.base)
    ids = sequences(tokenizer, args.out / "corpora" / f"{domain}.train.jsonl", args.steps * args.rows)
    targets = ["gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(model, LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=targets))
    weights = [p for p in model.parameters() if p.requires_grad]
    for weight in weights:
        weight.data = weight.data.float()
    optimizer = torch.optim.AdamW(weights, lr=args.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 5, 1.0) * max(1 - step / args.steps, 0.05)
    )
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))
    start = time.perf_counter()
    for step in range(args.steps):
        batch = ids[order[torch.arange(step * args.rows, (step + 1) * args.rows) % len(ids)]]
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 10 == 9 or step == 0:
            took = time.perf_counter() - start
            print(
                f"{domain} step {step + 1}: loss {loss.item():.3f}, {took:.0f} s", file=sys.stderr, flush=True
            )
    merged = model.merge_and_unload()
    merged.save_pretrained(args.out / domain)
    tokenizer.save_pretrained(args.out / domain)
    del model, merged
    gc.collect()


@torch.no_grad()
def judge(args: Any, folder: Path) -> dict[str, float]:
    """Mean nats per token on every domain's held-out text."""
    model, tokenizer = load(folder)
    model.eval()
    found = {}
    for domain in DOMAINS:
        ids = sequences(tokenizer, args.out / "corpora" / f"{domain}.judge.jsonl", args.judge_rows)
        found[domain] = sum(model(row[None], labels=row[None]).loss.item() for row in ids) / len(ids)
    print(f"{folder.name}: " + ", ".join(f"{d} {math.exp(x):.2f}" for d, x in found.items()), file=sys.stderr)
    return found


if __name__ == "__main__":
    main()
