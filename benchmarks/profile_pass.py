"""What observing the experts adds to a forward pass, and what computing every expert on every token costs.

A random bf16 OLMoE-1B-7B of 2 layers at full width (64 experts, top-8) runs over 1,024 tokens without its
head, in turns: plain; observed by moesmith's collector; and with the activations of every expert on every
token, which is how REAP's observer gets its norms (written down here from its published method: the
activations of all experts in fp32, then the norms of the routed ones; none of its other statistics).

    python benchmarks/profile_pass.py [--threads 1 2] [--rounds 7] [--tokens 1024] [--layers 2]
"""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor, nn
from transformers import OlmoeConfig, OlmoeForCausalLM
from transformers.integrations.moe import grouped_mm_experts_forward

from common import arguments, emit, say, table
from moesmith.models.layers import moe_layers, submodule
from moesmith.prune.observe import Collector
from moesmith.prune.stats import Document

SIZES = {"hidden_size": 2048, "intermediate_size": 1024, "num_experts": 64, "num_experts_per_tok": 8}


def build(layers: int) -> nn.Module:
    """Random bf16 weights; made in bf16, so that the fp32 model never exists."""
    config = OlmoeConfig(
        **SIZES, vocab_size=50304, num_hidden_layers=layers, num_attention_heads=16, num_key_value_heads=16
    )
    torch.manual_seed(0)
    return OlmoeForCausalLM._from_config(config, dtype=torch.bfloat16).eval()


@torch.no_grad()
def every_expert(model: nn.Module, ids: Tensor) -> None:
    """A forward pass; beside each MoE block all experts on all tokens, for the norms of the routed ones."""

    def hook(block: nn.Module, args: tuple, _output: object) -> None:
        x = args[0].reshape(-1, args[0].shape[-1])
        experts = block.experts.num_experts
        activations = torch.zeros(experts, *x.shape)
        for expert in range(experts):
            chosen = torch.full((len(x), 1), expert)
            activations[expert] = grouped_mm_experts_forward(block.experts, x, chosen, x.new_ones(len(x), 1))
        _, weights, index = block.gate(x)
        for expert in range(experts):
            token, slot = (index == expert).nonzero(as_tuple=True)
            norm = activations[expert, token].norm(dim=-1)
            (norm.sum(), (norm * weights[token, slot]).sum())

    hooks = [submodule(model, layer.name).register_forward_hook(hook) for layer in moe_layers(model)]
    try:
        model.model(input_ids=ids, use_cache=False)
    finally:
        for one in hooks:
            one.remove()


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=2)
    args = parser.parse_args()
    model = build(args.layers)
    rows = 4
    ids = torch.randint(0, 50000, (rows, args.tokens // rows), generator=torch.Generator().manual_seed(0))
    index = torch.arange(rows)[:, None].expand_as(ids)
    documents = [Document(str(row), f"domain {row}", ids.shape[1]) for row in range(rows)]
    collector = Collector(moe_layers(model), documents)

    @torch.no_grad()
    def plain() -> None:
        model.model(input_ids=ids, use_cache=False)

    @torch.no_grad()
    def observed() -> None:
        with collector.attach(model), collector.batch(index):
            model.model(input_ids=ids, use_cache=False)

    lines = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        plain(), observed()
        seconds: dict[str, list[float]] = {"plain": [], "observed": []}
        for _ in range(args.rounds):
            for name, call in (("plain", plain), ("observed", observed)):
                start = time.perf_counter()
                call()
                seconds[name].append(time.perf_counter() - start)
        start = time.perf_counter()
        every_expert(model, ids)
        whole = time.perf_counter() - start
        ratios = [b / a for a, b in zip(seconds["plain"], seconds["observed"], strict=True)]
        best = {name: min(values) for name, values in seconds.items()}
        figures = {
            "plain_seconds": best["plain"],
            "observed_seconds": best["observed"],
            "every_expert_seconds": whole,
            "observed_over_plain": best["observed"] / best["plain"],
            "observed_over_plain_median": statistics.median(ratios),
            "every_expert_over_observed": whole / best["observed"],
        }
        emit("profile_pass", {**SIZES, **vars(args), "threads": threads}, figures, rounds=args.rounds)
        lines.append((threads, *figures.values()))
    say("seconds, best of the rounds; every expert: one round")
    table(("threads", "plain", "observed", "every", "obs/plain", "median", "every/obs"), lines)


if __name__ == "__main__":
    main()
