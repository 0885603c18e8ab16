"""Phase 1 of a profile: the model answers the prompts, in batches, and every batch is kept on disk.

Nothing is observed here. An interrupted run goes on at the first batch that is not whole; the batches are the
same then, so the answers are too.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesmith import console
from moesmith.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from moesmith.data.corpora import Source

GENERATED = "generated.jsonl"
CIRCLE = 24  # runs of four known tokens in a row: what follows is repetition


@dataclass
class Settings:
    """How answers are made."""

    new_tokens: int
    batch_tokens: int
    sample: bool = False
    seed: int = 0


def groups(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Indices of sequences in batches of similar length, longest first, each at most `tokens` with padding.

    A sequence that is longer than that is a batch of its own.
    """
    found: list[list[int]] = []
    widest = 0
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if not found or (len(found[-1]) + 1) * widest > tokens:
            found.append([])
            widest = lengths[i]
        found[-1].append(i)
    return found


def answer(
    model: Any, tokenizer: Any, sources: list[Source], folder: Path, settings: Settings
) -> dict[str, Any]:
    """Let the model answer every source that has a question; text and ids of the answer are added to it.

    Returns:
        facts: answers, their tokens, how many ended by themselves, how many went round in circles and were
        cut there, how many were on disk already, seconds.

    Raises:
        UserError: the model writes no text.
    """
    from moesmith.data.corpora import ids_key

    asking = [source for source in sources if source.question is not None]
    if not model.can_generate():
        raise cannot_answer(model)
    batches = groups([len(source.ids) + settings.new_tokens for source in asking], settings.batch_tokens)
    done, stops = read_answers(folder / GENERATED), stop_ids(model, tokenizer)
    facts = {"answers": len(asking), "tokens": 0, "ended": 0, "repeating": 0, "found": 0}
    started = time.perf_counter()
    with console.bar("answering", total=len(asking) * settings.new_tokens) as bar:
        for number, group in enumerate(batches):
            batch = [asking[i] for i in group]
            rows = [done[key] for source in batch if (key := (source.id, ids_key(source.ids))) in done]
            if len(rows) == len(batch):
                facts["found"] += len(rows)
            else:
                tick = _Ticker(bar, len(batch))
                rows = answer_batch(model, tokenizer, batch, stops, settings, number, tick)
                append(folder / GENERATED, rows)
            for source, row in zip(batch, rows, strict=True):
                said = row["response_ids"][: row["repeats_from"]]
                source.ids = [*source.ids, *said]
                source.text += tokenizer.decode(said)
                source.generated = True
                facts["tokens"] += len(said)
                facts["ended"] += row["ended"]
                facts["repeating"] += row["repeats_from"] is not None
            bar.update(sum(map(len, batches[: number + 1])) * settings.new_tokens)
    return {**facts, "seconds": round(time.perf_counter() - started, 2)}


def answer_batch(
    model: Any, tokenizer: Any, batch: list[Source], stops: list[int], settings: Settings, number: int,
    tick: _Ticker | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Rows of generated.jsonl for one batch, padded on the left."""
    import torch
    from transformers import StoppingCriteriaList

    from moesmith.data.corpora import ids_key

    ids, mask = padded([source.ids for source in batch], pad_id(tokenizer, stops), left=True)
    chosen = {"do_sample": True} if settings.sample else GREEDY
    torch.manual_seed(settings.seed + number)  # so that a resumed run draws the same
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=settings.new_tokens,
            eos_token_id=stops or None,
            pad_token_id=pad_id(tokenizer, stops),
            stopping_criteria=StoppingCriteriaList([tick] if tick else []),
            **chosen,
        )
    if not isinstance(out, torch.Tensor):  # diffusion_gemma denoises a canvas
        raise cannot_answer(model)
    rows = []
    for source, answered in zip(batch, out[:, ids.shape[1] :].tolist(), strict=True):
        end = next((i + 1 for i, token in enumerate(answered) if token in stops), None)
        response = answered[:end]
        rows.append(
            {
                "id": source.id,
                "domain": source.domain,
                "prompt": source.question,
                "response": tokenizer.decode(response, skip_special_tokens=True).strip(),
                "response_ids": response,
                "ended": end is not None,
                "repeats_from": repeats_from(response),
                "key": ids_key(source.ids),
            }
        )
    return rows


def cannot_answer(model: Any) -> UserError:
    """What to do with a model that is no plain language model."""
    return UserError(
        f"{type(model).__name__} cannot answer prompts: it does not write a text token by token",
        "give text as it is with --corpus, or --no-generate",
    )


GREEDY: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


class _Ticker:
    """Moves the bar by one token per row; generate asks it whether to stop, and it never says so."""

    def __init__(self, bar: console.Bar, rows: int):
        self.bar, self.rows, self.done = bar, rows, bar.done
        self.steps = 0
        self.begun = time.perf_counter()

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        import torch

        self.steps += 1
        rate = self.steps * self.rows / max(time.perf_counter() - self.begun, 1e-6)
        self.bar.update(self.done + self.steps * self.rows, f"{rate:.0f} tok/s")
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def repeats_from(ids: Sequence[int]) -> int | None:
    """Where an answer stops saying anything new, None if it never does.

    From there on `CIRCLE` runs of four tokens, one after the other, have all occurred in it before. Greedy
    answers of small models often end that way, and a text that goes round in circles would weigh the experts
    by one sentence.
    """
    seen: set[tuple[int, ...]] = set()
    known = 0
    for i in range(len(ids) - 3):
        gram = tuple(ids[i : i + 4])
        known = known + 1 if gram in seen else 0
        if known == CIRCLE:
            return i + 1 - CIRCLE
        seen.add(gram)
    return None


def padded(rows: Sequence[Sequence[int]], pad: int, left: bool) -> tuple[Tensor, Tensor]:
    """Ids and mask of sequences of different length, int64 (B, S) each."""
    import torch

    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        part = slice(longest - len(row), longest) if left else slice(0, len(row))
        ids[i, part] = torch.tensor(row)
        mask[i, part] = 1
    return ids, mask


def stop_ids(model: Any, tokenizer: Any) -> list[int]:
    """Token ids that end an answer: the model's own, and the one its template closes a turn with."""
    from moesmith.jobs.chat import end_of_turn

    own = getattr(model.generation_config, "eos_token_id", None)
    own = own if isinstance(own, list) else [own]
    end = end_of_turn(tokenizer)
    ends = tokenizer.encode(end, add_special_tokens=False) if end else []
    found = {*own, tokenizer.eos_token_id, *(ends if len(ends) == 1 else [])}
    return sorted(token for token in found if token is not None)


def pad_id(tokenizer: Any, stops: Sequence[int] = ()) -> int:
    """A token to pad with; it is masked, so any of the vocabulary would do."""
    if tokenizer.pad_token_id is not None:
        return int(tokenizer.pad_token_id)
    return stops[0] if stops else 0


# ---------------------------------------------------------------- the file


def read_answers(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """(source id, prompt key) -> row, of every whole line; a torn last line is left out."""
    if not path.is_file():
        return {}
    found = {}
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:  # the empty end, or a line that a kill tore
            continue
        found[row["id"], row["key"]] = row
    return found


def append(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Add rows and wait until they are on the disk; a line that a kill tore is closed first."""
    torn = path.is_file() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" * torn + text)
        file.flush()
        os.fsync(file.fileno())


def check_room(positions: int | None, max_length: int, new_tokens: int) -> None:
    """Raise UserError when prompt and answer together are more than the model can see."""
    if positions is not None and max_length + new_tokens > positions:
        raise UserError(
            f"--max-length {max_length} + --new-tokens {new_tokens}: the model sees only {positions} tokens",
            "lower one of them",
        )
