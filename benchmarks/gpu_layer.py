"""One MoE layer of packed experts on a GPU: forward, QLoRA step, and peak memory.

Shapes of Gemma-4-26B-A4B, Qwen3-30B-A3B and OLMoE-1B-7B, NF4 experts, bf16, LoRA r=16 on the experts for
the step. In the same run, in turns: transformers' grouped_mm on the same layer in 16 bits (forward only).
Times are CUDA events around each call. Without CUDA the script says so and ends with status 1.

    python benchmarks/gpu_layer.py [--small] [--rounds 30] [--tokens 1 512 4096] [--layers gemma4 qwen3 olmoe]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from common import arguments, emit, in_turns, say, summary, table

# E experts, H model dim, I expert hidden dim, K experts per token, r adapter rank, T tokens
LAYERS = {
    "gemma4": {"E": 128, "H": 2816, "I": 704, "K": 8},
    "qwen3": {"E": 128, "H": 2048, "I": 768, "K": 8},
    "olmoe": {"E": 64, "H": 2048, "I": 1024, "K": 8},
}
SMALL = {"E": 8, "H": 256, "I": 128, "K": 2}


def dense_experts(E: int, H: int, I: int, device: str) -> nn.Module:  # noqa: E741
    """A stock experts module with random 16-bit weights, computed by transformers' grouped_mm."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config = MixtralConfig(hidden_size=H, intermediate_size=I, num_local_experts=E)
    config._experts_implementation = "grouped_mm"
    with torch.device(device):
        experts = MixtralExperts(config).bfloat16().requires_grad_(False)
    for parameter in experts.parameters():
        parameter.normal_(0, 0.02)
    return experts


def timed(call: Callable[[], Any], device: str) -> dict[str, float]:
    """Seconds of one call on the device."""
    if device == "cpu":
        start = time.perf_counter()
        call()
        return {"seconds": time.perf_counter() - start}
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return {"seconds": begin.elapsed_time(end) / 1e3}


def peak_bytes(call: Callable[[], Any], device: str) -> int | None:
    """Most device memory that one call adds to what is resident."""
    if device == "cpu":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--small", action="store_true", help="a tiny layer, to see that the script runs")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 512, 4096])
    parser.add_argument("--layers", nargs="+", default=list(LAYERS), choices=list(LAYERS))
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument(
        "--device", default="cuda", choices=["cuda", "cpu"], help="cpu only tries the script out"
    )
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit(f"gpu_layer: torch {torch.__version__} sees no CUDA device; nothing measured")

    from moesmith import ExpertsLoRA, ExpertsNbit

    torch.manual_seed(0)
    lines = []
    for name in args.layers:
        sizes = SMALL if args.small else LAYERS[name]
        dense = dense_experts(sizes["E"], sizes["H"], sizes["I"], args.device)
        packed = ExpertsNbit.from_float(dense.gate_up_proj, dense.down_proj, "nf4", torch.bfloat16)
        adapted = ExpertsLoRA(packed, args.rank, 2 * args.rank)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data.normal_(0, 0.02)
        for tokens in args.tokens:
            x = torch.randn(tokens, sizes["H"], device=args.device, dtype=torch.bfloat16)
            weights, index = torch.rand(tokens, sizes["E"], device=args.device).softmax(-1).topk(sizes["K"])
            weights = weights.bfloat16()
            x_grad = x.clone().requires_grad_()

            @torch.no_grad()
            def forward(module: nn.Module, x=x, index=index, weights=weights) -> torch.Tensor:
                return module(x, index, weights)

            def step(module: nn.Module = adapted, x=x_grad, index=index, weights=weights) -> None:
                module.zero_grad(set_to_none=True)
                x.grad = None
                module(x, index, weights).backward(x)

            calls = {
                "forward": lambda: forward(packed),  # noqa: B023
                "dense_forward": lambda: forward(dense),  # noqa: B023
                "step": step,
            }
            sides = {key: lambda call=call: timed(call, args.device) for key, call in calls.items()}
            times = in_turns(sides, args.rounds, warmup=3)
            figures: dict[str, Any] = {}
            for key, call in calls.items():
                figures |= {f"{key}_{k}": v for k, v in summary(times[key], "seconds").items()}
                figures[f"{key}_peak_bytes"] = peak_bytes(call, args.device)
            flops = 2 * tokens * sizes["K"] * 3 * sizes["H"] * sizes["I"]
            figures["forward_flops_per_second"] = flops / figures["forward_seconds_median"]
            figures["times_dense"] = (
                figures["dense_forward_seconds_median"] / figures["forward_seconds_median"]
            )
            figures["packed_bytes"] = sum(p.nbytes for p in packed.parameters())
            setting = {
                "layer": name,
                **sizes,
                "tokens": tokens,
                "r": args.rank,
                "dtype": "bf16",
                "scheme": "nf4",
            }
            emit("gpu_layer", setting | {"device": args.device}, figures, rounds=args.rounds)
            milliseconds = [figures[f"{key}_seconds_median"] * 1e3 for key in calls]
            lines.append((name, tokens, *milliseconds, figures["forward_flops_per_second"] / 1e12))
    say("milliseconds, median of the rounds")
    table(("layer", "tokens", "forward", "16-bit forward", "QLoRA step", "forward TFLOP/s"), lines)


if __name__ == "__main__":
    main()
