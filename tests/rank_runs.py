"""What the tests of several processes run on every rank; imported once, by the fork server of `processes`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import moesmith
import pairs_runs
import runs
import tiny
from moesmith.data.masks import Example
from moesmith.models.layers import text_layers
from moesmith.prune.observe import Collector
from moesmith.prune.stats import Document
from moesmith.train.settings import LoraSettings
from moesmith.train.trainer import Trainer

moesmith.register()

EXPERTS = LoraSettings(r=4, alpha=8, targets=["experts", "attention"])


def sft(
    out: Path,
    rows: int = 30,
    held_out: int = 5,
    lora: LoraSettings = EXPERTS,
    poisoned: int | None = None,
    resume: bool = False,
    **train: Any,
) -> dict[str, Any]:
    """A short run; what every rank has to agree on.

    Args:
        poisoned: number of a row whose loss is not a number.
    """
    cfg = runs.settings(out, lora=lora, **train)
    compute = Trainer.compute_loss

    def poison(self: Any, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        loss = compute(self, model, inputs, *args, **kwargs)
        return loss * float("nan") if poisoned in inputs["rows"] else loss

    Trainer.compute_loss = poison  # type: ignore[method-assign]
    try:
        data = runs.examples(rows), runs.examples(held_out, start=40)
        result = runs.run(out, *data, cfg, resume=resume)
    finally:
        Trainer.compute_loss = compute  # type: ignore[method-assign]
    return {"best": result.best_step, "tokens": result.tokens, "skipped": result.skipped}


def dpo(
    out: Path, rows: int = 9, held_out: int = 5, lora: LoraSettings = EXPERTS, dpo: Any = None, **train: Any
) -> dict[str, Any]:
    """A short run on pairs; what every rank has to agree on. Each rank looks at the spot checks itself."""
    cfg = pairs_runs.settings(out, lora=lora, dpo=dpo, **train)
    result = pairs_runs.run(out, pairs_runs.pairs(rows), pairs_runs.pairs(held_out, start=40), cfg)
    passes = {name: n for name, n in result.passes.items() if name != "check"}
    return {"best": result.best_step, "passes": passes, "tokens": result.tokens}


def packed_sequences(out: Path, **train: Any) -> dict[str, Any]:
    """A run on rows that lie end to end."""
    cfg = runs.settings(out, lora=EXPERTS, batch_size=1, **train)
    result = runs.run(out, runs.examples(20), runs.examples(3, start=40), cfg, pack_to=80)
    return {"best": result.best_step, "tokens": result.tokens}


def observe(documents: list[Example]) -> dict[str, Tensor]:
    """What the collectors of all ranks have added up: every rank sees its share of the documents."""
    from moesmith import ranks

    model = tiny.build("olmoe")
    records = [Document(str(i), "ab"[i % 2], len(d), str(i)) for i, d in enumerate(documents)]
    collector = Collector(text_layers(model), records)
    with collector.attach(model), torch.no_grad():
        for i, document in ranks.share(list(enumerate(documents))):
            ids = torch.tensor(document.input_ids)[None].long()
            with collector.batch(torch.full_like(ids, i)):
                model(input_ids=ids)
    collector.add_up()
    return collector.state_dict()


def assert_same_run(one: Path, several: Path) -> None:
    """Every logged loss, and both adapters, but for the order in which rows were added up."""
    alone, shared = runs.losses(one), runs.losses(several)
    assert alone.keys() == shared.keys()
    for key, value in alone.items():
        assert shared[key] == pytest.approx(value, rel=1e-5, abs=1e-6), key
    for name in ("best", "last"):
        a, b = (load_file(out / name / "adapter_model.safetensors") for out in (one, several))
        assert a.keys() == b.keys()
        for key in a:  # where a gradient is all rounding, Adam makes a step of it
            assert (b[key] - a[key]).norm() <= 1e-4 * a[key].norm(), key


def stopped(out: Path, step: int, **options: Any) -> None:
    """A run that the second rank is asked to stop after a step: both do."""
    from moesmith import ranks
    from moesmith.train import sft as journey

    make = journey.Session._trainer

    def asked(self: Any, *args: Any, **kwargs: Any) -> Any:
        made = make(self, *args, **kwargs)

        def ask() -> None:
            if ranks.rank() == 1:
                self.stop.reason = "interrupted"

        made[0].callback_handler.callbacks.insert(0, runs.At(step, ask))
        return made

    journey.Session._trainer = asked  # type: ignore[method-assign]
    result = sft(out, **options)
    assert not result["best"] or result["best"] <= step
    assert not (out / "result.json").exists()


def with_rows_of_its_own(out: Path) -> None:
    """Every rank with other rows."""
    from moesmith import ranks

    sft(out, rows=20 + ranks.rank())
