"""What the routers of a build do with text, and what that is worth: two measurements on one loaded model.

Each text's own expert is the oracle, rows drawn at random the floor; the fitted routers lie somewhere
between, and the dense models say what the experts could do with their own attention.
"""

# E entries of the recipe, H hidden size, L layers

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesmith import console

if TYPE_CHECKING:
    from torch import Tensor

    from moesmith.build.capture import Text
    from moesmith.data.corpora import Document
    from moesmith.eval.routing import Labelled, Losses
    from moesmith.jobs._build_parts import Parts

RANDOM_SEEDS = 3


@dataclass
class Judged:
    """Documents to judge on, and what the dense models make of them."""

    texts: list[Labelled]
    dense: dict[str, Losses]
    """"base" and the name of every other dense model"""


def labelled(places: Sequence[tuple[int, Document]], labels: Sequence[int]) -> list[Labelled]:
    """The documents as the measurements take them."""
    from moesmith.eval.routing import Labelled

    return [Labelled(ids=d.ids, domain=d.domain, id=d.id, label=labels[n]) for n, d in places]


def dense_losses(
    parts: Parts,
    texts: Sequence[Labelled],
    device: str,
    state: Path,
    known: dict[Path, Tensor],
    where: Sequence[tuple[int, int]],
) -> dict[str, Losses]:
    """Losses of the base and of every other dense model, one at a time, one layer of it in memory.

    Args:
        known: per-token losses of all texts that were measured before (by folder).
        where: start and end of each of `texts` among the tokens of those all.
    """
    from moesmith.build.token_losses import token_losses

    folders = {"base": parts.base.folder, **parts.folders}
    found: dict[str, Losses] = {}
    for name, folder in folders.items():
        if folder in known:
            per_text = [known[folder][start:end] for start, end in where]
        else:
            with console.bar(f"{name} reads", total=1) as bar:
                nats = token_losses(folder, as_texts(texts), on_text=moving(bar), device=device, state=state)
            per_text = list(nats.split([len(text.ids) for text in texts]))
        found[name] = [(float(row[:-1].double().sum()), len(row) - 1) for row in per_text]
    return found


def as_texts(texts: Sequence[Labelled]) -> list[Text]:
    """The same for a streamed pass."""
    from moesmith.build.capture import Text

    return [Text(ids=t.ids, label=t.label, fit=False, id=t.id, domain=t.domain) for t in texts]


def moving(bar: console.Bar) -> Callable[[int, int], None]:
    """A callback of (done, total) that moves a bar whose total is 1."""
    return lambda done, total: bar.update(done / total)


def routing(
    model: Any, parts: Parts, texts: Sequence[Labelled], held_out: bool, fitted: dict[str, Any]
) -> dict[str, Any]:
    """Facts of `measure_routing`, with what the fit says of each layer beside it."""
    from moesmith.eval.routing import measure_routing

    entries = parts.num_experts if parts.mode == "split" else parts.entries
    with console.bar("routing", total=len(texts)) as bar:
        facts = measure_routing(model, texts, entries, lambda done, _: bar.update(done), parts.group)
    facts["held_out"] = held_out
    for layer, own in zip(facts["layers"], fitted["layers"], strict=True):
        layer["temperature"] = own.get("temperature")
        layer["by_method"] = own.get("by_method", {})
    return facts


def perplexity(
    model: Any, parts: Parts, judged: Judged, embed: Sequence[Tensor] | None, seed: int
) -> dict[str, Any]:
    """The decisive table: this model, its controls, the oracle, and every dense model."""
    from moesmith.build.modes import repeat_rows
    from moesmith.eval.decisive import decisive
    from moesmith.eval.routed import Forced, by_rows, uniform
    from moesmith.eval.routing import losses

    split = parts.mode == "split"
    choices: dict[str, Any] = {"router": None}
    if embed is not None and parts.route != "embed":
        rows = [repeat_rows(row, parts.group).to(model.dtype) for row in embed]
        choices["embed"] = by_rows(rows, parts.top_k)
    for n in range(RANDOM_SEEDS):
        choices[f"random {n}"] = by_rows(random_rows(model, parts, seed + n), parts.top_k)
    if not split:
        choices["uniform"] = uniform(parts.num_experts)
        choices["oracle"] = Forced(group=parts.group)
    measured: dict[str, Losses] = {}
    with console.bar("judging", total=len(choices) * len(judged.texts)) as bar:
        for name, choose in choices.items():
            before = len(measured) * len(judged.texts)

            def on_text(done: int, _: int, before: int = before, name: str = name) -> None:
                bar.update(before + done, name)

            measured[name] = losses(model, judged.texts, on_text, choose)
    names = {
        "router": f"{parts.route} (this model)",
        "oracle": "oracle (own expert)",
        "uniform": "uniform (all experts)",
        "base": "base (dense)",
        **{name: f"{name} (dense)" for name in judged.dense if name != "base"},
    }
    return decisive({**measured, **judged.dense}, judged.texts, names)


def random_rows(model: Any, parts: Parts, seed: int) -> list[Tensor]:
    """Seeded router rows of the size of this model's own, so that only their direction is left to chance."""
    import torch

    from moesmith.build.modes import repeat_rows
    from moesmith.models.layers import submodule, text_layers

    generator = torch.Generator().manual_seed(1_000_003 + seed)
    found = []
    for layer in text_layers(model):
        own: Tensor = submodule(model, layer.router).weight.detach()
        rows = torch.randn(parts.num_experts // parts.group, own.shape[1], generator=generator)
        rows *= (own.float() - own.float().mean(0)).norm() / (rows.norm() * parts.group**0.5)
        found.append(repeat_rows(rows, parts.group).to(own.dtype))
    return found


def weigh(facts: dict[str, Any], texts: Any, same: bool, experts: int, why_not: str | None) -> dict[str, Any]:
    """(level, sentence, points) for the top of the report and the last line of the terminal."""
    table = facts.get("perplexity")
    points = list(texts.notes)
    if same:
        points.insert(
            0,
            f"{experts} identical experts: exactly the dense model at {experts}x the FFN memory until it is "
            "trained, whatever the router does",
        )
    if why_not is not None:
        points.append(f"nothing was measured: {why_not}")
    if table is None:
        sentence = "Built; what its routing is worth was not measured."
        return {"level": "caution" if same else "info", "sentence": sentence, "points": points}
    said = table.get("verdict") or _against_base(table)
    worth = table["useful"] and texts.held_out and not same
    level = {"level": "safe", "word": "Works"} if worth else {"level": "caution"}
    return {**level, "sentence": f"{said[:1].upper()}{said[1:]}.", "points": points}


def _against_base(table: dict[str, Any]) -> str:
    """A split has no oracle: what is left of the dense model is all that counts."""
    rows = {row["key"]: row["mean"] for row in table["rows"]}
    base = rows.get("base")
    if base is None:
        return f"perplexity {rows['router']:,.2f}"
    random = f", {rows['random']:,.2f} with random routers" if "random" in rows else ""
    return f"perplexity {rows['router']:,.2f} against {base:,.2f} of the dense model{random}"
