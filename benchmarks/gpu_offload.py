"""One packed model on a GPU of 8, 12 and 24 GB: experts resident, in RAM, on disk; training and decoding.

A random model of a published width and depth is made, packed by layers (`true_shape.py`). For each cap and
each home of the experts the planner fills in how many experts are kept and cached on the card, and says the
peak; where it says that nothing fits, that is the answer. Else a process of its own holds itself to the cap
(torch.cuda.set_per_process_memory_fraction), attaches the experts where they shall lie, trains some steps of
QLoRA or decodes some tokens, and says its peak, its speed and its transfer statistics. Losses and tokens are
compared between homes: they are the same bits.

    python benchmarks/gpu_offload.py [--only olmoe qwen3 gemma4] [--caps 8 12 24] [--packed DIR] [--keep]
    python benchmarks/gpu_offload.py --device cpu --small      # a smoke test: copies through memory, no cap

Needs up to 21 GB of disk, and of RAM what the packed experts take (OLMoE 3.6 GB, Qwen3 16.3, Gemma-4 12.8).
Unmeasured so far: written without a GPU.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import arguments, emit, say, table
from true_shape import GB, SHAPES, Bench, random_ids, watched

HOMES = ("device", "ram", "disk")
PROMPT = 32


def plan(args: argparse.Namespace) -> dict[str, Any]:
    """What the planner makes of one home within one cap: its choice and footprint, or why nothing fits."""
    from moesmith.errors import UserError
    from moesmith.models.checkpoint import Checkpoint
    from moesmith.plan.choose import Budget, best
    from moesmith.plan.footprint import Work
    from moesmith.plan.machine import ram_bytes
    from moesmith.plan.shape import Shape

    shape = Shape.of_checkpoint(Checkpoint.open(args.path))
    on_gpu = args.device == "cuda"
    if args.what == "train":
        work = Work("train", seq=args.seq, batch=1, lora_r=args.lora_r)
    else:
        work = Work("decode", seq=PROMPT, lora_targets=(), context=PROMPT + args.tokens + 1)
    budget = Budget(int(args.cap * GB) if on_gpu else ram_bytes(), ram_bytes(), True, on_gpu)
    fixed = {"scheme": "nf4", "double_quant": False, "linears": None, "homes": args.home, "batch_size": 1}
    try:
        planned = best(shape, work, budget, None, fixed)
    except UserError as error:
        return {"problem": str(error)}
    return planned.facts()


def policy_of(choice: dict[str, Any], device: str) -> Any:
    """The planner's choice as a policy. On a CPU without a cap: slots of its own, so that copies are made."""
    from moesmith.experts.residency.policy import Policy

    policy = Policy(choice["homes"], choice["kept"], choice["cache"], choice["slots"])
    return policy if device == "cuda" else replace(policy, slots=2, cache=max(policy.cache, 4))


def work(args: argparse.Namespace) -> dict[str, Any]:
    """Train or decode within the cap, experts where the plan says."""
    import torch
    from transformers import AutoModelForCausalLM

    import moesmith  # noqa: F401
    from moesmith.experts.residency.attach import attach, detach
    from moesmith.experts.residency.link import CpuLink

    cuda = args.device == "cuda"
    if cuda:
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, args.cap * GB / whole))
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(args.path)
    policy = policy_of(json.loads(args.choice), args.device)
    link = CpuLink() if not cuda and policy.homes != "device" else None
    lender = attach(model, policy, args.device, link)
    loaded = time.perf_counter() - start
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    try:
        figures = train(args, model, lender) if args.what == "train" else decode(args, model, lender)
    except torch.cuda.OutOfMemoryError as error:
        figures = {"problem": f"out of memory: {str(error).splitlines()[0]}"}
    if cuda:
        figures["peak_device_bytes"] = torch.cuda.max_memory_allocated()
        figures["peak_reserved_bytes"] = torch.cuda.max_memory_reserved()
    if lender is not None:
        figures["statistics"] = {k: v for k, v in lender.statistics().items() if k != "layers"}
        detach(model)
    return figures | {"load_seconds": loaded}


def train(args: argparse.Namespace, model: Any, lender: Any) -> dict[str, Any]:
    """Losses and seconds of some steps."""
    import torch

    from moesmith.train.adapters import attach as add_adapter
    from moesmith.train.adapters import trainable
    from moesmith.train.settings import LoraSettings

    model = add_adapter(model, LoraSettings(r=args.lora_r, alpha=2 * args.lora_r), seed=0)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.config.use_cache = False
    weights = trainable(model)
    for parameter in weights.values():
        parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(weights.values(), lr=1e-4)
    model.train()
    losses, seconds = [], []
    for step in range(args.steps):
        if step == 1 and lender is not None:
            lender.reset_statistics()
        start = time.perf_counter()
        ids = random_ids(model, args.seq, seed=step).to(args.device)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())  # waits for the step
        seconds.append(time.perf_counter() - start)
    after = sorted(seconds[1:]) or seconds
    return {
        "seconds": after[len(after) // 2], "tokens_per_second": args.seq / after[len(after) // 2],
        "losses": losses, "result": hashlib.sha256(str(losses).encode()).hexdigest()[:16],
    }  # fmt: skip


def decode(args: argparse.Namespace, model: Any, lender: Any) -> dict[str, Any]:
    """Greedy tokens and the median of their seconds."""
    import torch

    model.eval()
    ids, past, tokens, seconds = random_ids(model, PROMPT).to(args.device), None, [], []
    with torch.no_grad():
        for position in range(args.tokens + 1):
            if position == 1 and lender is not None:
                lender.reset_statistics()
            start = time.perf_counter()
            out = model(input_ids=ids, past_key_values=past, use_cache=True, logits_to_keep=1)
            past, ids = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
            tokens.append(int(ids))  # waits for the token
            seconds.append(time.perf_counter() - start)
    after = sorted(seconds[1:])
    return {
        "seconds": after[len(after) // 2], "tokens_per_second": len(after) / sum(after),
        "prompt_seconds": seconds[0], "result": hashlib.sha256(str(tokens).encode()).hexdigest()[:16],
    }  # fmt: skip


ROLES = {"plan": plan, "work": work}


def measure(name: str, packed: Path, args: argparse.Namespace) -> list[tuple[Any, ...]]:
    """Every cap, work and home of one model."""
    rows, results = [], dict[str, set[str]]()
    words = [sys.executable, __file__, "--path", str(packed), "--device", args.device]
    for key in ("steps", "seq", "tokens", "lora-r"):
        words += [f"--{key}", str(getattr(args, key.replace("-", "_")))]
    for cap in args.caps if args.device == "cuda" else [0.0]:
        for what in ("train", "decode"):
            for home in HOMES:
                these = [*words, "--what", what, "--home", home, "--cap", str(cap)]
                planned = watched([*these, "--role", "plan"], args.threads)
                setting = {"shape": name, "cap_gb": cap, "what": what, "home": home, "device": args.device}
                setting |= {"small": args.small, "steps": args.steps, "seq": args.seq, "tokens": args.tokens}
                if "problem" in planned:
                    emit("gpu_offload", setting, {"fits": False, "why": planned["problem"]})
                    rows.append((name, cap, what, home, "does not fit", "", "", ""))
                    continue
                choice = json.dumps(planned["choice"])
                figures = watched([*these, "--role", "work", "--choice", choice], args.threads)
                peak = figures.get("peak_device_bytes", figures["peak_anonymous_bytes"])
                plan_peak = planned["footprint"]["peak"]
                figures |= {"planned_bytes": plan_peak, "choice": planned["choice"], "peak_bytes": peak}
                figures |= {"planned_seconds": planned["times"]["seconds"], "peak_to_plan": peak / plan_peak}
                emit("gpu_offload", setting, figures)
                if "result" in figures:
                    results.setdefault(what, set()).add(figures["result"])
                speed = figures.get("tokens_per_second", figures.get("problem", ""))
                rows.append((name, cap, what, home, speed, peak / GB, plan_peak / GB, choice_words(planned)))
    for what, found in results.items():
        emit("gpu_offload", {"shape": name, "what": f"{what}: homes"}, {"same_result": len(found) == 1})
        if len(found) > 1:
            say(f"{name}: {what} gave different results between homes or caps")
    return rows


def choice_words(planned: dict[str, Any]) -> str:
    choice = planned["choice"]
    return f"kept {choice['kept']} cache {choice['cache']} slots {choice['slots']}"


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--small", action="store_true", help="narrow models, to see that the script runs")
    parser.add_argument("--only", nargs="+", default=["olmoe"], choices=list(SHAPES))
    parser.add_argument("--caps", nargs="+", type=float, default=[8.0, 12.0, 24.0], help="GB of the card")
    parser.add_argument("--packed", type=Path, help="a packed model of the one shape in --only")
    parser.add_argument("--scheme", default="nf4", help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--lora-r", type=int, default=8)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--folder", type=Path, help="where the models go (default: the temporary folder)")
    parser.add_argument("--keep", action="store_true", help="leave the packed models in --folder/NAME/packed")
    parser.add_argument("--role", choices=list(ROLES), help=argparse.SUPPRESS)
    parser.add_argument("--path", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--what", help=argparse.SUPPRESS)
    parser.add_argument("--home", help=argparse.SUPPRESS)
    parser.add_argument("--cap", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--choice", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role:
        return print(json.dumps(ROLES[args.role](args)))

    rows = []
    for name in args.only:
        if args.packed is not None:
            rows += measure(name, args.packed, args)
            continue
        path = args.folder / name if args.folder else Path(tempfile.mkdtemp(prefix=f"moesmith-{name}-"))
        keep = args.keep or (path / "packed").exists()
        path.mkdir(parents=True, exist_ok=True)
        try:
            if not (path / "packed").exists():
                Bench(name, path, args).packed_by_layer()
            rows += measure(name, path / "packed", args)
        finally:
            if not keep:
                shutil.rmtree(path)
    table(("shape", "cap GB", "what", "experts", "tokens/s", "peak GB", "plan GB", "choice"), rows)


if __name__ == "__main__":
    main()
