"""How many bytes a checkpoint takes with fewer experts, and at another storage. Reads headers only.

Enough to choose a count by size; the file that is written later has its exact size. Router rows are counted
with the rest: they are thousands of times smaller than an expert.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moesmith.errors import UserError
from moesmith.models.headers import DTYPE_BITS, TensorHeader

# storage -> bits of (an expert's weight, another matrix's weight). q8 and q4 are GGUF's Q8_0 and Q4_0, 32
# weights and a 16-bit scale, for every matrix; nf4 is `moesmith quantize`, which leaves the rest in 16 bits.
STORAGE = {"bf16": (16.0, 16.0), "q8": (8.5, 8.5), "q4": (4.5, 4.5), "nf4": (4.5, 16.0)}
UNITS = {"TB": 1e12, "GB": 1e9, "MB": 1e6, "kB": 1e3, "GiB": 2**30, "MiB": 2**20}


@dataclass(frozen=True)
class Sizes:
    """What a checkpoint is made of. Weights are counted as they were before packing."""

    experts: int
    """experts per layer"""
    expert_weights: int
    """weights of all experts of all layers"""
    matrix_weights: int
    """weights of the other matrices: attention, embeddings, shared experts, routers"""
    other_weights: int
    """norms and biases, which every storage keeps in 16 bits"""
    expert_bytes: int
    """as stored now"""
    rest_bytes: int

    @property
    def stored(self) -> int:
        """Bytes of all tensors now."""
        return self.expert_bytes + self.rest_bytes

    def stored_with(self, keep: float) -> int:
        """Bytes with `keep` experts per layer (a mean, where layers differ), stored as now."""
        return round(self.rest_bytes + self.expert_bytes * keep / self.experts)

    def nbytes(self, keep: float, storage: str) -> int:
        """The same at a storage of STORAGE."""
        expert, rest = STORAGE[storage]
        weights = self.expert_weights * keep / self.experts
        return round((weights * expert + self.matrix_weights * rest + self.other_weights * 16) / 8)

    def largest_count(self, limit: float, storage: str | None, step: int = 1, fewest: int = 1) -> int:
        """Most experts per layer that `limit` bytes hold at a storage (None: as stored now).

        Raises:
            UserError: everything fits already, or not even `fewest` do.
        """

        def size(keep: int) -> int:
            return self.nbytes(keep, storage) if storage else self.stored_with(keep)

        at = f" at {storage}" if storage else ""
        if size(self.experts) <= limit:
            raise UserError(
                f"all {self.experts} experts fit already: {size(self.experts) / 1e9:.3g} GB{at}",
                "nothing has to be dropped",
            )
        for keep in range(self.experts // step * step, 0, -step):
            if keep < self.experts and keep >= fewest and size(keep) <= limit:
                return keep
        raise UserError(
            f"even {fewest} experts per layer take {size(fewest) / 1e9:.3g} GB{at}, more than the "
            f"{limit / 1e9:.3g} GB asked for",
            "fewer bits (q4, nf4) or a larger size",
        )


def measure(
    tensors: Mapping[str, TensorHeader], experts: int, quantization: Mapping[str, Any] | None = None
) -> Sizes:
    """Sort a checkpoint's tensors into experts and the rest.

    Experts are tensors under a module called `experts`, and stacks with one matrix per expert, whatever they
    are called on disk.
    """
    packed_bits = 4 if (quantization or {}).get("scheme") in ("nf4", "fp4") else 8
    counts = {"expert": 0, "matrix": 0, "other": 0}
    nbytes = {"expert": 0, "rest": 0}
    for name, tensor in tensors.items():
        shape = tensor.shape
        is_expert = re.search(r"(^|\.)experts\.", name) is not None or (
            len(shape) == 3 and shape[0] == experts
        )
        nbytes["expert" if is_expert else "rest"] += tensor.nbytes
        if re.search(r"absmax|quant_map|quant_state|_scale_inv$", name):
            continue  # belongs to the codes it is stored beside
        bits = DTYPE_BITS.get(tensor.dtype, 16)
        if quantization is not None and tensor.dtype == "U8":  # codes; linears are packed in nf4 or as I8
            bits = packed_bits if is_expert else 4
        weights = tensor.nbytes * 8 // bits
        kind = "expert" if is_expert else "matrix" if len(shape) > 1 else "other"
        counts[kind] += weights
    return Sizes(
        experts, counts["expert"], counts["matrix"], counts["other"], nbytes["expert"], nbytes["rest"]
    )


def parse_fit(text: str) -> tuple[float, str | None]:
    """ "14GB@q4" -> (14e9, "q4"); without a storage the checkpoint's own counts."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]+)\s*(?:@\s*(\w+))?\s*", text)
    units = {unit.lower(): value for unit, value in UNITS.items()}
    if match and match[2].lower() in units and (match[3] is None or match[3].lower() in STORAGE):
        return float(match[1]) * units[match[2].lower()], match[3].lower() if match[3] else None
    raise UserError(f"--fit {text}", f"a size and how it is stored: 14GB@q4; one of {', '.join(STORAGE)}")
