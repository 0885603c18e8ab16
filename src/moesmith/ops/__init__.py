"""Floor 1: tensors in, tensors out. Knows torch, no model.

`quantize` and `dequantize` blocks of weights, `PackedStack` for one layer's expert matrices, `sort_by_expert`
for routed rows and `grouped_linear` for the products. `cpu` holds the native kernels, `cuda` the GPU road,
`reference` says in plain PyTorch what all of them compute.
"""

from .blockwise import dequantize, dequantize_absmax, pick_blocksize, quantize, quantize_absmax
from .codebook import BITS, SCHEMES, codebook
from .grouped import Lora, grouped_linear
from .routing import Routing, sort_by_expert, unsort
from .stack import PackedStack

__all__ = [
    "BITS", "SCHEMES", "Lora", "PackedStack", "Routing", "codebook", "dequantize", "dequantize_absmax",
    "grouped_linear", "pick_blocksize", "quantize", "quantize_absmax", "sort_by_expert", "unsort",
]  # fmt: skip
