"""Greedy continuations of a batch of prompts, as token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


@torch.inference_mode()
def continuations(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> list[tuple[list[int], bool]]:
    """Greedy new token ids of each prompt up to the end token, and whether there was one.

    Rows are padded on the left and masked, so a row's answer does not depend on its neighbours.
    Repetition penalties of the model's generation settings are off: they would hide loops.
    """
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, width - len(prompt) :] = torch.tensor(prompt)
        mask[i, width - len(prompt) :] = 1
    stops = stop_ids(model, tokenizer)
    out = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        temperature=None,
        top_p=None,
        top_k=None,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        eos_token_id=stops or None,
        pad_token_id=pad,
    )
    results = []
    for new in out[:, width:].tolist():
        end = next((i for i, token in enumerate(new) if token in stops), None)
        results.append((new[:end], end is not None))
    return results


def stop_ids(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end an answer: the model's own, and the tokenizer's."""
    own = model.generation_config.eos_token_id
    ids = [*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id]
    return sorted({token for token in ids if token is not None})
