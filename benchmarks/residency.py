"""What residency moves and costs: decoding and training with experts that are not on the device.

A Qwen3-30B-A3B of few layers at full width (128 experts, top-8, NF4 codes at random: products cost what they
cost with trained ones) runs with its experts in RAM behind `CpuLink`, which stages them for real: memcpy in a
thread, into an arena of the same CPU. Everything is timed in turns with the same model resident; `cpu` is
processor time of all threads, the link's included, which a busy machine does not stretch.

Decoding: expert bytes moved per token, against whole layers staged for every token; hit rate; tokens per
second. Training: step time with whole layers staged through one or two slots (LoRA r=16 on the experts,
gradient checkpointing). The text is random and so are the routers, which prefer few experts more than trained
ones do and follow no topic: hit rates here are no forecast. `--model` takes a packed checkpoint instead.

    python benchmarks/residency.py [--layers 4] [--tokens 48] [--rounds 5] [--small] [--model FOLDER]
"""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from common import arguments, emit, in_turns, number, say, summary, table
from moesmith.experts.forward import EXPERTS_FUNCTION
from moesmith.experts.residency.attach import attach, detach, packed_experts, stacks
from moesmith.experts.residency.link import CpuLink
from moesmith.experts.residency.policy import Policy
from moesmith.experts.storage import mark, named_experts, packed_parameters, packed_placeholder, weight_names
from moesmith.models.layers import adapter_targets

FULL = {"hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8}
SMALL = {"hidden_size": 128, "moe_intermediate_size": 64, "num_experts": 32, "num_experts_per_tok": 4}
Resident = None
WARM = 16  # tokens decoded before the figures: they fill the caches


def build(layers: int, small: bool) -> nn.Module:
    """Packed experts of random codes, everything else random bf16; no dense expert ever exists."""
    config = Qwen3MoeConfig(
        **(SMALL if small else FULL), num_hidden_layers=layers, vocab_size=4096, num_attention_heads=32,
        num_key_value_heads=4, head_dim=16 if small else 128, intermediate_size=256,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM._from_config(config, dtype=torch.bfloat16)
    config._experts_implementation_internal = EXPERTS_FUNCTION
    for _, module in list(named_experts(model)):
        holder: Any = module
        for name in weight_names(module):
            packed = packed_placeholder(getattr(holder, name).shape, "nf4", 64, False, "cpu")
            packed.codes.random_(256)
            assert packed.absmax is not None
            packed.absmax.uniform_(0.03, 0.05)
            delattr(module, name)
            for key, parameter in packed_parameters(name, packed).items():
                module.register_parameter(key, parameter)
        mark(module, "nf4")
    at_home = {id(p) for _, module in packed_experts(model) for p in module.parameters()}
    for module in model.modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in at_home:
                value = torch.ones(parameter.shape) if "norm" in key or parameter.ndim == 1 else None
                value = torch.randn(parameter.shape) * 0.02 if value is None else value
                setattr(module, key, nn.Parameter(value.to(torch.bfloat16), requires_grad=False))
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval()


class Clock:
    """Runs from its making."""

    def __init__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        return {"seconds": time.perf_counter() - self.wall, "cpu_seconds": time.process_time() - self.cpu}


def layer_bytes(model: nn.Module) -> list[int]:
    """Packed bytes of each layer's experts."""
    return [sum(s.nbytes for s in stacks(module).values()) for _, module in packed_experts(model)]


@torch.inference_mode()
def decode(model: Any, ids: Tensor, tokens: int, start: Any = None) -> dict[str, float]:
    """Time of the last `tokens` of ids (1, T), one at a time; `start` is called before them.

    The text is given: what a random model would say is one loop, whose experts any cache holds.
    """
    first = ids.shape[1] - tokens
    cache = model(input_ids=ids[:, : first - WARM], use_cache=True).past_key_values
    clock = Clock()
    for i in range(first - WARM, ids.shape[1]):
        if i == first:
            if start is not None:
                start()
            clock = Clock()
        model(input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True)
    return clock.read()


class Asked:
    """How often each layer's experts are asked for while decoding: a profile of the run's own kind."""

    def __init__(self, model: nn.Module):
        self.counts = [Counter[int]() for _ in packed_experts(model)]
        self.hooks = [
            module.register_forward_pre_hook(self._hook(counts), with_kwargs=True)
            for (_, module), counts in zip(packed_experts(model), self.counts, strict=True)
        ]

    def _hook(self, counts: Counter[int]) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            chosen = next(t for t in (*args, *kwargs.values()) if t.dtype == torch.int64)
            counts.update(chosen.reshape(-1).tolist())

        return hook

    def hottest(self) -> dict[int, list[int]]:
        for hook in self.hooks:
            hook.remove()
        return {i: [e for e, _ in counts.most_common()] for i, counts in enumerate(self.counts)}


def bench_decode(model: Any, setting: dict[str, Any], tokens: int, rounds: int) -> None:
    """Bytes and time per token for several policies, in turns with resident experts."""
    generator = torch.Generator().manual_seed(1)
    other, ids = (
        torch.randint(model.config.vocab_size, (1, 16 + WARM + tokens), generator=generator) for _ in range(2)
    )
    asked = Asked(model)
    decode(model, other, tokens)
    hot = asked.hottest()
    sizes = layer_bytes(model)
    experts: int = packed_experts(model)[0][1].num_experts  # type: ignore[assignment]
    policies: dict[str, Policy | None] = {
        "resident": Resident,
        "routed experts only": Policy("ram", slots=1, prefetch=False),
        "cache E/8": Policy("ram", slots=1, cache=experts // 8, prefetch=False),
        "cache E/4": Policy("ram", slots=1, cache=experts // 4, prefetch=False),
        "cache E/4, prefetch": Policy("ram", slots=1, cache=experts // 4),
        "kept E/4": Policy("ram", slots=1, kept=experts // 4, hot=hot, prefetch=False),
        "kept E/4, cache E/8, prefetch": Policy(
            "ram", slots=1, kept=experts // 4, cache=experts // 8, hot=hot
        ),
    }
    records: dict[str, dict[str, Any]] = {}

    def side(name: str, policy: Policy | None) -> Any:
        def run() -> dict[str, float]:
            if policy is None:
                return decode(model, ids, tokens)
            residency = attach(model, policy, "cpu", CpuLink())
            assert residency is not None
            times = decode(model, ids, tokens, residency.reset_statistics)
            records[name] = residency.statistics()
            detach(model)
            return times

        return run

    times = in_turns({name: side(name, policy) for name, policy in policies.items()}, rounds, warmup=0)
    rows = []
    for name in policies:
        seconds = summary(times[name], "seconds") | summary(times[name], "cpu_seconds")
        figures: dict[str, Any] = {"tokens_per_second": tokens / seconds["seconds"], **seconds}
        if name in records:
            record = records[name]
            moved = record["bytes"] / tokens
            figures |= {
                "moved_bytes_per_token": moved,
                "whole_layers_bytes_per_token": sum(sizes),
                "times_fewer": sum(sizes) / moved if moved else None,
                **{
                    k: record[k] for k in ("hit_rate", "stall_s", "bandwidth", "predicted", "predicted_right")
                },
            }
        emit("residency-decode", {**setting, "policy": name, "tokens": tokens}, figures)
        hits = "-" if name not in records else f"{records[name]['hit_rate']:.0%}"
        moved_mb = figures.get("moved_bytes_per_token", 0) / 1e6
        milliseconds = seconds["cpu_seconds"] / tokens * 1000
        fewer = figures.get("times_fewer") or "-"
        rows.append([name, figures["tokens_per_second"], milliseconds, moved_mb, fewer, hits])
    say(f"\ndecode; whole layers staged per token would be {sum(sizes) / 1e6:,.0f} MB")
    table(["policy", "tokens/s", "cpu ms/token", "MB moved/token", "times fewer", "hits"], rows)


def bench_train(model: Any, setting: dict[str, Any], seq: int, rounds: int) -> None:
    """Step time of LoRA training with checkpointing: resident, one slot, two slots, two slots without
    looking ahead."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    modules, parameters = adapter_targets(model, ["experts"])
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=modules, target_parameters=parameters)
    tuned: Any = get_peft_model(model, lora)
    tuned.train()
    tuned.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids = torch.randint(model.config.vocab_size, (1, seq))
    policies = {
        "resident": Resident,
        "one slot": Policy("ram", slots=1),
        "two slots": Policy("ram", slots=2),
        "two slots, no prefetch": Policy("ram", slots=2, prefetch=False),
    }
    records: dict[str, dict[str, Any]] = {}
    losses: dict[str, float] = {}

    def step() -> dict[str, float]:
        clock = Clock()
        loss = tuned(input_ids=ids, labels=ids).loss
        loss.backward()
        times = clock.read()
        tuned.zero_grad(set_to_none=True)
        losses["last"] = loss.item()
        return times

    def side(name: str, policy: Policy | None) -> Any:
        def run() -> dict[str, float]:
            residency = None if policy is None else attach(tuned, policy, "cpu", CpuLink())
            step()  # first touch; the second step starts where a running training would
            if residency is not None:
                residency.reset_statistics()
            times = step()
            losses[name] = losses["last"]
            if residency is not None:
                records[name] = residency.statistics()
                detach(tuned)
            return times

        return run

    times = in_turns({name: side(name, policy) for name, policy in policies.items()}, rounds, warmup=1)

    def timed(name: str) -> dict[str, float]:
        return summary(times[name], "seconds") | summary(times[name], "cpu_seconds")

    plain = timed("resident")
    rows = []
    for name in policies:
        if losses[name] != losses["resident"]:
            raise AssertionError(f"{name}: loss {losses[name]!r}, resident {losses['resident']!r}")
        seconds = timed(name)
        figures: dict[str, Any] = {
            **seconds,
            **{key.replace("seconds", "overhead"): seconds[key] / plain[key] - 1 for key in seconds},
        }
        if name in records:
            record = records[name]
            figures |= {k: record[k] for k in ("bytes", "stall_s", "slack_s", "bandwidth", "fetches")}
        emit("residency-train", {**setting, "policy": name, "seq": seq}, figures)
        rows.append([
            name, seconds["seconds"], seconds["seconds_median"], f"{figures['overhead']:+.1%}",
            f"{figures['cpu_overhead']:+.1%}",
            figures.get("bytes", 0) / 1e9, figures.get("stall_s", 0.0),
        ])  # fmt: skip
    say("\ntraining step")
    table(["policy", "best s", "median s", "overhead", "cpu overhead", "GB moved", "stall s"], rows)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--small", action="store_true", help="a tiny model, to see that the script runs")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=48, help="decoded in each visit")
    parser.add_argument("--seq", type=int, default=512, help="tokens of a training step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of the computation; the link has its own")
    parser.add_argument("--parts", nargs="+", default=["decode", "train"], choices=["decode", "train"])
    parser.add_argument("--model", help="a packed checkpoint instead of random weights; decoding only")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    setting: dict[str, Any] = {"threads": args.threads}
    if args.model:
        model: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16).eval()
        setting |= {"model": args.model}
    else:
        model = build(args.layers, args.small)
        setting |= {**(SMALL if args.small else FULL), "layers": args.layers}
    say(f"{len(layer_bytes(model))} layers of {number(layer_bytes(model)[0] / 1e6)} MB of packed experts")
    if "decode" in args.parts:
        bench_decode(model, setting, args.tokens, args.rounds)
    if "train" in args.parts and not args.model:
        bench_train(model, setting, args.seq, args.rounds)


if __name__ == "__main__":
    main()
