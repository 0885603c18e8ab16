"""`moesmith profile` in several processes: each takes a share of the batches, and rank 0 writes one folder.

The batches are those of a single process, so what one of them adds up is the same bits wherever it is run.
Counts and largest values come out equal, and so does all that is kept per document, because a document is in
one batch; sums over documents differ by the order of a float64 addition.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesmith import console, ranks

if TYPE_CHECKING:
    from moesmith.data.corpora import Source
    from moesmith.jobs._answers import Settings


def own(path: Path) -> Path:
    """Where this process keeps what a stopped run goes on from: a name of its own when there are several."""
    if ranks.world() == 1:
        return path
    return path.with_name(f"{path.stem}-{ranks.rank()}-of-{ranks.world()}{path.suffix}")


def all_of(path: Path) -> list[Path]:
    """Such files or folders of every process, of runs with any number of them."""
    return [path, *path.parent.glob(f"{path.stem}-*-of-*{path.suffix}")]


def answer_together(
    model: Any, tokenizer: Any, sources: list[Source], folder: Path, settings: Settings
) -> int | None:
    """Answer the prompts that have no answer on the disk yet, a share in each process; then all are there.

    Returns:
        how many prompts had an answer before; None in a single process, which has nothing to share.
    """
    from moesmith.data.corpora import ids_key
    from moesmith.jobs._answers import GENERATED, answer_batch, append, cannot_answer, groups, read_answers
    from moesmith.jobs._answers import stop_ids as ends

    if ranks.world() == 1:
        return None
    if not model.can_generate():
        raise cannot_answer(model)
    asking = [source for source in sources if source.question is not None]
    batches = groups([len(source.ids) + settings.new_tokens for source in asking], settings.batch_tokens)
    mine, stops = own(folder / GENERATED), ends(model, tokenizer)
    known: dict[Any, Any] = {}
    for path in sorted(all_of(folder / GENERATED)):  # also what a stopped run has not handed over
        known |= read_answers(path)
    known = ranks.gather(known)[0]
    left = [
        (number, [asking[i] for i in group])
        for number, group in enumerate(batches)
        if not all((asking[i].id, ids_key(asking[i].ids)) in known for i in group)
    ]
    found = len(asking) - sum(len(batch) for _, batch in left)
    with console.bar("answering", total=len(ranks.share(left))) as bar:
        for number, batch in ranks.share(left):
            append(mine, answer_batch(model, tokenizer, batch, stops, settings, number))
            bar.advance(1)
    rows = {**known, **{key: row for part in ranks.gather(read_answers(mine)) for key, row in part.items()}}
    if ranks.is_main():
        there = read_answers(folder / GENERATED)
        append(folder / GENERATED, [row for key, row in rows.items() if key not in there])
    ranks.barrier()
    mine.unlink(missing_ok=True)
    return found
