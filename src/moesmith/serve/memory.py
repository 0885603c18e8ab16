"""What the paged caches will take, and what is free, before they are made.

A cache that is too large is not refused by a CPU: its pages are taken while it fills, hours later, and the
system then kills the process.
"""

from __future__ import annotations

from typing import Any

import torch

from .. import ram

PAGE = 64  # tokens of one cache page


def pages(context: int, slots: int) -> int:
    """Pages of one name's cache. Two more per slot, because layers of different kinds round up separately."""
    return slots * (-(-context // PAGE) + 2)


def context_of(taken: int, slots: int) -> int:
    """The context that so many pages are enough for; the inverse of `pages`."""
    return (taken // slots - 2) * PAGE


def cache_bytes(model: Any, context: int, slots: int) -> int | None:
    """Bytes of one name's cache; None for a class whose keys and values are not shaped as usual."""
    from transformers.generation.continuous_batching.utils import find_head_dim, find_num_key_value_heads

    config = model.config.get_text_config()
    try:
        row = find_num_key_value_heads(config) * find_head_dim(config)
        layers = int(config.num_hidden_layers)
    except (AttributeError, TypeError, ValueError):
        return None
    itemsize = model.get_input_embeddings().weight.dtype.itemsize
    return int(2 * layers * row * itemsize * PAGE * pages(context, slots))


def free(device: torch.device) -> int:
    """Bytes that can be taken now: of the GPU, or of the machine's or the container's RAM."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return ram.available()
