"""One MoE layer of packed experts with LoRA, timed in a process of its own: `layer_worker.py ours|rival`.

Both sides get the same packed bytes, adapters, inputs and routing; all that differs is the module that
computes. `ours` is moesmith.ExpertsNbit + ExpertsLoRA, `rival` the reference loop of experts4bit-qlora in its
own environment (so this file imports nothing of moesmith before it knows which side it is on).
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from torch import Tensor, nn

from common import serve

# E experts, H model dim, I expert hidden dim, K experts per token, r adapter rank, T tokens
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
BLOCKSIZE = 64


def normal(*shape: int, seed: int, std: float = 1.0) -> Tensor:
    """The same numbers in every process with the same torch."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * std


def pack_layer(path: str, E: int, H: int, I: int) -> int:  # noqa: E741
    """Write a random layer's NF4 bytes, and the first dense matrix of each stack; returns packed bytes."""
    from moesmith.ops.blockwise import quantize

    tensors: dict[str, Tensor] = {}
    for number, (name, rows, columns) in enumerate((("gate_up_proj", 2 * I, H), ("down_proj", H, I))):
        parts = []
        for expert in range(E):
            weight = normal(rows, columns, seed=1000 * number + expert + 1, std=0.02).bfloat16()
            parts.append(quantize(weight, "nf4", BLOCKSIZE))
            if expert == 0:
                tensors[name + "_first"] = weight
        tensors[name], tensors[name + "_absmax"] = (torch.stack(side) for side in zip(*parts, strict=True))
    torch.save(tensors, path)
    return sum(tensor.nbytes for name, tensor in tensors.items() if not name.endswith("_first"))


def our_experts(stacks: dict[str, Tensor], E: int, H: int, I: int) -> nn.Module:  # noqa: E741
    """moesmith's module around packed bytes."""
    from moesmith.experts.standalone import ExpertsNbit
    from moesmith.experts.storage import mark, packed_parameters
    from moesmith.ops.stack import PackedStack

    experts = ExpertsNbit(E)
    mark(experts, "nf4")
    for name in ("gate_up_proj", "down_proj"):
        packed = PackedStack(stacks[name], stacks[name + "_absmax"], None, None, "nf4")
        for key, parameter in packed_parameters(name, packed).items():
            experts.register_parameter(key, parameter)
    return experts


def rival_experts(stacks: dict[str, Tensor], E: int, H: int, I: int) -> nn.Module:  # noqa: E741
    """The rival's module around the same bytes, after checking that bitsandbytes packs to them."""
    from experts4bit_qlora import ExpertsNbit

    experts = ExpertsNbit(E, H, I, quant_type="nf4", blocksize=BLOCKSIZE)
    for ours, theirs in (("gate_up_proj", "gate_up"), ("down_proj", "down")):
        first = experts._quantize_stack(stacks[ours + "_first"][None])
        for got, want in zip(first, (stacks[ours][:1], stacks[ours + "_absmax"][:1]), strict=True):
            if not torch.equal(got.flatten(), want.flatten()):
                raise AssertionError(f"{ours}: packed bytes differ from bitsandbytes'")
        getattr(experts, theirs + "_proj").data = stacks[ours].reshape(E, -1)
        setattr(experts, theirs + "_absmax", stacks[ours + "_absmax"].reshape(E, -1))
    return experts


class Layer:
    """The operations a benchmark asks for."""

    def __init__(self, side: str):
        self.side = side

    def setup(self, packed: str, E: int, H: int, I: int, K: int, r: int, threads: int) -> dict[str, Any]:  # noqa: E741
        """Build the layer around the packed bytes in the file `packed`."""
        torch.set_num_threads(threads)
        stacks = torch.load(packed, mmap=True, weights_only=True)
        stacks = {name: tensor.clone() for name, tensor in stacks.items()}  # in memory, not paged from disk
        build = our_experts if self.side == "ours" else rival_experts
        self.experts = build(stacks, E, H, I)
        if self.side == "ours":
            from moesmith.experts.standalone import ExpertsLoRA
        else:
            from experts4bit_qlora import ExpertsLoRA
        self.layer = ExpertsLoRA(self.experts, r, 2 * r)
        for seed, (_, adapter) in enumerate(sorted(self.adapters())):
            adapter.data = normal(*adapter.shape, seed=100 + seed, std=0.02)
        self.sizes = (E, H, K)
        return {"adapter_parameters": sum(p.numel() for _, p in self.adapters())}

    def adapters(self) -> list[tuple[str, nn.Parameter]]:
        """Named LoRA parameters."""
        return [(name, p) for name, p in self.layer.named_parameters() if "lora" in name]

    def inputs(self, tokens: int, dtype: str) -> dict[str, Any]:
        """Make the tokens, routing and output gradient for the steps that follow."""
        E, H, K = self.sizes
        self.dtype = DTYPES[dtype]
        self.experts.compute_dtype = self.dtype
        self.x = normal(tokens, H, seed=1).to(self.dtype).requires_grad_()
        weights, self.index = normal(tokens, E, seed=2).softmax(-1).topk(K)
        self.weights = weights.to(self.dtype).requires_grad_()
        self.grad = normal(tokens, H, seed=3).to(self.dtype)
        return {"rows_per_expert": tokens * K / E}

    def step(self) -> dict[str, Any]:
        """Seconds of one forward and one backward in training mode."""
        self.layer.train()
        self.layer.zero_grad(set_to_none=True)
        self.x.grad = self.weights.grad = None
        start = time.perf_counter()
        self.out = self.layer(self.x, self.index, self.weights)
        middle = time.perf_counter()
        self.out.backward(self.grad)
        end = time.perf_counter()
        return {"forward": middle - start, "backward": end - middle, "step": end - start}

    @torch.no_grad()
    def decode(self, calls: int) -> dict[str, Any]:
        """Seconds of one token's forward, mean over `calls`; each call reads the next K experts."""
        self.layer.eval()
        E, H, K = self.sizes
        x = self.x[:1].detach()
        weights = torch.full((1, K), 1 / K, dtype=self.dtype)
        routes = torch.arange(E).reshape(-1, K)  # every group of K experts once per E/K calls
        start = time.perf_counter()
        for call in range(calls):
            self.out = self.layer(x, routes[call % len(routes)][None], weights)
        return {"seconds": (time.perf_counter() - start) / calls}

    def save(self, path: str, gradients: bool) -> dict[str, Any]:
        """Write the last output, and the last step's gradients, for comparison."""
        tensors = {"out": self.out.detach()}
        if gradients:
            tensors |= {"x.grad": self.x.grad, "weights.grad": self.weights.grad}
            tensors |= {name + ".grad": p.grad for name, p in self.adapters()}
        torch.save({name: tensor.float() for name, tensor in tensors.items()}, path)
        return {"dtype": next(name for name, dtype in DTYPES.items() if dtype == self.dtype)}

    def gemm(self, rows: int, matrices: int, dtype: str, size: int = 2048) -> dict[str, Any]:
        """Rate of plain torch.mm, (rows, size) @ (size, size), FLOP/s, a new matrix each time.

        The better of x @ W and x @ W^T: a library may like one layout more.
        """
        if getattr(self, "gemm_key", None) != (dtype, matrices):
            self.gemm_key = (dtype, matrices)
            self.gemm_weights = [normal(size, size, seed=i).to(DTYPES[dtype]) for i in range(matrices)]
        x = normal(rows, size, seed=9).to(DTYPES[dtype])
        best = 0.0
        for weights in (self.gemm_weights, [weight.T for weight in self.gemm_weights]):
            start = time.perf_counter()
            for weight in weights:
                torch.mm(x, weight)
            seconds = time.perf_counter() - start
            best = max(best, 2 * rows * size * size * matrices / seconds)
        return {"flops_per_second": best}

    def read_rate(self, buffer_bytes: int, buffers: int) -> dict[str, Any]:
        """Memory read rate, bytes/s: the best of three ways to read every byte of `buffers` buffers once."""
        shape = (buffers, buffer_bytes // 4 // 1024, 1024)
        if getattr(self, "read_shape", None) != shape:
            self.read_shape = shape
            self.read_buffers = torch.ones(shape)
        best = 0.0
        vector = torch.ones(1024)
        for read in (torch.sum, lambda b: torch.mv(b, vector), lambda b: torch.dot(b.view(-1), b.view(-1))):
            start = time.perf_counter()
            for buffer in self.read_buffers:
                read(buffer)
            best = max(best, self.read_buffers.nbytes / (time.perf_counter() - start))
        return {"bytes_per_second": best}


if __name__ == "__main__":
    worker = Layer(sys.argv[1])
    names = ("setup", "inputs", "step", "decode", "save", "gemm", "read_rate")
    serve({name: getattr(worker, name) for name in names})
