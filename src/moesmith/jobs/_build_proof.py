"""Is what was written what was asked for? Each expert alone has to be the base with that source's FFNs.

The base runs with one source's FFN matrices after the other over a few tokens; then the written model is
loaded as anyone would load it, and the same expert is forced in every layer. It is a test of everything
between the two: byte ranges, names, order of gate and up, folded factors, config, the code of the class.
Where the weights were changed on purpose (drop, noise, lora) nothing has to be equal, and the difference is
reported as a figure.
"""

# E entries of the recipe, T tokens, V vocabulary

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesmith import console
from moesmith.errors import UserError
from moesmith.jobs._build_parts import EXACT

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from moesmith.jobs._build_parts import Parts

TOKENS = 64
# Difference that is rounding, as a share of the spread (standard deviation) of a token's logits: of the
# median token and of the worst. In fp32 the sums differ in their order alone; in 16 bits every layer rounds
# what the one before rounded differently. Measured on SmolLM2-135M on a CPU: 0 in all three, because the same
# rows meet the same matrices; gate and up swapped in one layer of 30: 0.65 and 2.8 at least.
TOLERANCE = {"float32": (1e-4, 1e-3), "float16": (5e-3, 0.05), "bfloat16": (0.04, 0.4)}


def reference(parts: Parts, ids: list[int], dtype: torch.dtype, device: str) -> list[Tensor]:
    """Logits (T, V) in fp32 of the base with each entry's FFNs in turn; of a split, of its one source."""
    import torch

    from moesmith.build.adapter import read_adapter

    adapters = [
        entry.adapter and read_adapter(entry.adapter, entry.source) for entry in parts.expert_sources()
    ]
    model = load(parts.base.folder, device, dtype)
    found: list[Tensor] = []
    with torch.no_grad(), console.bar("reference", total=parts.entries) as bar:
        for entry in range(parts.entries):
            for layer, ffn in enumerate(ffns(model, parts)):
                for kind in ("gate", "up", "down"):
                    matrix = _matrix(parts, adapters, layer, entry, kind)
                    linear = getattr(ffn, f"{kind}_proj")
                    linear.weight.data = matrix.to(device=linear.weight.device, dtype=dtype)
            with _beside(model, parts, dtype):
                found.append(_logits(model, ids))
            if not found[-1].isfinite().all():
                raise UserError(
                    f"{parts.recipe.experts[entry].name}: the base with the FFNs of "
                    f"{parts.sources[entry].name} gives NaN or infinite logits",
                    f"its weights are damaged, or those of {parts.base.name}, or their numbers too large for "
                    f"{str(parts.dtype).removeprefix('torch.')}; nothing was kept",
                )
            bar.advance()
    return found


def prove(model: Any, parts: Parts, wanted: list[Tensor], ids: list[int]) -> dict[str, Any]:
    """Facts of the proof: `model` with each entry forced against the reference.

    Raises:
        UserError: an expert is not what its source is, where it has to be.
    """
    from moesmith.eval.routed import Forced, routed, uniform

    name = str(model.dtype).removeprefix("torch.")
    typical, worst = TOLERANCE[name if _bits_kept(parts) else _coarser(name, parts)]
    differences, divergences = [], []
    for entry, logits in enumerate(wanted):
        if parts.mode == "split":
            choose: Any = uniform(parts.num_experts, scale=parts.num_experts / parts.top_k)
        else:
            choose = Forced(expert=entry, group=parts.group)
        with routed(model, choose):
            got = _logits(model, ids)
        spread = logits.std(dim=-1).clamp_min(1e-12)
        share = (got - logits).abs().amax(dim=-1) / spread  # (T,)
        differences.append((float(share.median()), float(share.max())))
        divergences.append(_divergence(logits, got))
        named = parts.recipe.experts[entry].name
        if parts.exact and (differences[-1][0] > typical or not differences[-1][1] <= worst):
            raise UserError(
                f"{named}: alone it is not the base with the FFNs of its source: logits differ by "
                f"{differences[-1][1]:.2g} of their spread ({differences[-1][0]:.2g} on the median token), "
                f"at most {worst:g} ({typical:g}) is rounding",
                "nothing was kept; this is a fault of moesmith: please report it with the recipe",
            )
    return {
        "what": _what(parts),
        "equal": parts.exact,
        "difference": max(worst_one for _, worst_one in differences),
        "median_difference": max(median for median, _ in differences),
        "tolerance": worst if parts.exact else None,
        "median_tolerance": typical if parts.exact else None,
        "unit": "largest logit difference of a token, as a share of the standard deviation of its logits",
        "kl": max(divergences),
        "tokens": len(ids),
        "dtype": name,
        "by_expert": {
            str(entry.name): difference[1]
            for entry, difference in zip(parts.recipe.experts, differences, strict=True)
        },
    }


def _what(parts: Parts) -> str:
    if parts.mode == "split":
        return "all experts on == the dense model"
    alone = "each group of experts alone" if parts.group > 1 else "each expert alone"
    if parts.exact:
        return f"{alone} == its source's FFNs in the base"
    by = f"init {parts.recipe.init}" if parts.mode not in EXACT else "noise_scale"
    return f"{alone} against its source's FFNs in the base (changed on purpose by {by})"


def _bits_kept(parts: Parts) -> bool:
    """Whether the weights are those of the source to the bit, so that fp32 can tell rounding from a fault."""
    import math

    if parts.shared is not None and parts.shared.weight != 0.5:
        return False
    factor = parts.top_k if parts.mode == "split" else parts.group
    return math.log2(factor).is_integer()  # a factor folded into down_proj that is no power of two rounds it


def _coarser(name: str, parts: Parts) -> str:
    stored = str(parts.dtype).removeprefix("torch.")
    return max(name, stored, key=lambda dtype: TOLERANCE[dtype])


def _matrix(parts: Parts, adapters: list[Any], layer: int, entry: int, kind: Any) -> Tensor:
    """One FFN matrix as the recipe wants it, read from the source, not from what was written."""
    import torch

    source, scale = parts.sources[entry], parts.recipe.experts[entry].residual_scale
    matrix = source.read(source.ffn(layer, kind))
    adapter = adapters[entry]
    if adapter is None and (kind != "down" or scale == 1):
        return matrix.to(parts.dtype)
    matrix = matrix.to(torch.float32, copy=True)
    if adapter is not None:
        adapter.merge(layer, kind, matrix)
    return (matrix * scale if kind == "down" else matrix).to(parts.dtype)


def ffns(model: nn.Module, parts: Parts) -> list[nn.Module]:
    """The FFN of every layer of the text model, in order."""
    shape = (parts.base.ffn_width, parts.base.hidden_size)
    found = [
        module
        for name, module in model.named_modules()
        if name.endswith(".mlp")
        and hasattr(module, "gate_proj")
        and tuple(module.gate_proj.weight.shape) == shape
    ]
    assert len(found) == parts.base.num_layers, f"{len(found)} FFNs of shape {shape}"
    return found


@contextmanager
def _beside(model: nn.Module, parts: Parts, dtype: torch.dtype) -> Iterator[None]:
    """Inside, every FFN adds what the shared expert of the recipe writes."""
    if parts.shared is None:
        yield
        return
    handles = []
    source, weight = parts.shared.source, parts.shared.weight
    for layer, ffn in enumerate(ffns(model, parts)):
        handles.append(ffn.register_forward_hook(_adding(source, layer, weight, dtype)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _adding(source: Any, layer: int, weight: float, dtype: torch.dtype) -> Callable[..., Tensor]:
    from torch.nn.functional import linear

    def hook(ffn: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = args[0]
        gate, up, down = (
            source.read(source.ffn(layer, kind)).to(device=x.device, dtype=dtype)
            for kind in ("gate", "up", "down")
        )
        return (1 - weight) * output + weight * linear(ffn.act_fn(linear(x, gate)) * linear(x, up), down)

    return hook


def _logits(model: Any, ids: list[int]) -> Tensor:
    """(T, V) fp32 on the CPU."""
    import torch

    with torch.no_grad():
        rows = torch.tensor([ids], device=model.device)
        return model(input_ids=rows, use_cache=False).logits[0].float().cpu()


def _divergence(wanted: Tensor, got: Tensor) -> float:
    """Mean KL of the next token, nats."""
    from torch.nn.functional import kl_div, log_softmax

    per_token = kl_div(log_softmax(got, -1), log_softmax(wanted, -1), reduction="none", log_target=True)
    return max(0.0, float(per_token.double().sum(-1).mean()))


def load(folder: Path, device: str, dtype: torch.dtype | str = "auto") -> Any:
    """A model of any class, ready to run."""
    from moesmith.jobs._pair import on_gpu
    from moesmith.models.checkpoint import model_class, read_config

    if not console.stderr().is_terminal:
        from transformers.utils import logging

        logging.disable_progress_bar()
    load_model = model_class(read_config(folder)).from_pretrained
    return load_model(folder, dtype=dtype, device_map={"": 0} if on_gpu(device) else None).eval()


def free() -> None:
    """Give back what a dropped model held."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
