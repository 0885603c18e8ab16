"""Routers of a build, fitted in one streamed pass of the texts through the base."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesmith import console

if TYPE_CHECKING:
    from torch import Tensor

    from moesmith.jobs._build_parts import Parts
    from moesmith.jobs._build_text import Texts

FREE = ("embed", "hidden", "centered", "lda", "probe", "random")  # fitted from the same pass, to be compared


@dataclass
class Routers:
    """Rows of the chosen route and what was learned on the way."""

    rows: list[Tensor]
    """(E, H) fp32 of every layer"""
    split: list[Tensor] | None = None
    """of a split, the neurons of every expert, (E, I) for each layer"""
    fitted: dict[str, Any] = field(default_factory=dict)
    """what the fit says: of each layer temperature and accuracy by method; of a split, what is kept"""
    embed: list[Tensor] | None = None
    """rows of the first builder's rule, the control"""
    losses: dict[Path, Tensor] = field(default_factory=dict)
    """folder -> loss of every token of all texts, where the route asked for it"""
    seconds: float = 0.0


def fit(parts: Parts, texts: Texts, state: Path, device: str) -> Routers:
    """The routers of the recipe's route. `state` is a folder to make, for what waits on disk."""
    from moesmith.build.modes import repeat_rows

    started = time.perf_counter()
    state.mkdir()
    if parts.mode == "split":
        routers = fit_split(parts, texts, state, device)
    elif parts.route == "random" and set(texts.labels[: texts.fit]) != set(range(parts.entries)):
        rows = drawn(parts, [1.0] * parts.base.num_layers)
        routers = Routers(rows, fitted={"layers": [{} for _ in rows]})
    else:
        routers = fit_routers(parts, texts, state, device)
    if parts.group > 1:
        routers.rows = [repeat_rows(rows, parts.group) for rows in routers.rows]
    routers.seconds = time.perf_counter() - started
    return routers


def drawn(parts: Parts, norms: Sequence[float]) -> list[Tensor]:
    """Seeded rows, each of about the norm that its layer is given."""
    import torch

    generator = torch.Generator().manual_seed(parts.recipe.seed)
    experts = parts.num_experts // parts.group
    shape = (experts, parts.base.hidden_size)
    return [torch.randn(shape, generator=generator) * (norm / shape[1] ** 0.5) for norm in norms]


def fit_routers(parts: Parts, texts: Texts, state: Path, device: str) -> Routers:
    """Every method that costs nothing beside the one asked for, so that the report can compare them."""
    from moesmith.build.capture import Text
    from moesmith.build.routers import RouterFit

    negatives = [
        Text(ids=ids, label=label, fit=True, id=f"negative {label}/{n}", domain="negative")
        for label, prompts in enumerate(texts.negatives)
        for n, ids in enumerate(prompts)
    ]
    everything = [*texts.all(), *negatives]
    by_folder = source_losses(parts, everything, state, device) if parts.route == "loss" else {}
    collected = RouterFit(
        texts.all(),
        parts.entries,
        [*FREE, "loss"] if by_folder else FREE,
        parts.base.read("model.embed_tokens.weight"),
        columns(parts, by_folder),
        negatives or None,
        parts.recipe.seed,
    )
    stream(parts, everything, collected.visit, state, device)
    found = collected.routers()
    return Routers(
        found.weights[parts.route],
        fitted=by_method(found, parts.route),
        embed=found.weights["embed"],
        losses=by_folder,
    )


def by_method(found: Any, route: str) -> dict[str, Any]:
    """The facts of a fit, layer by layer, as the report has them."""
    layers = []
    for layer, methods in enumerate(found.facts["layers"]):
        accuracies = {
            name: facts["accuracy"]
            for name, facts in methods.items()
            if isinstance(facts, dict) and "accuracy" in facts
        }
        layers.append({"temperature": found.temperature[route][layer], "by_method": accuracies})
    return {"layers": layers, "measured_on": found.facts.get("measured_on")}


def fit_split(parts: Parts, texts: Texts, state: Path, device: str) -> Routers:
    """Which neurons make an expert, and the router that predicts which of them would write most."""
    from moesmith.build.split import SplitFit

    collected = SplitFit(texts.all(), parts.num_experts, parts.top_k, parts.recipe.seed, parts.dtype)
    stream(parts, texts.all(), collected.visit, state, device)
    rows = collected.routers
    if parts.route == "random":
        rows = drawn(parts, [float(row.norm(dim=1).mean()) for row in rows])
    return Routers(rows, collected.members, collected.facts())


def stream(
    parts: Parts, texts: Sequence[Any], visit: Callable[[Any], None], state: Path, device: str
) -> None:
    """One pass of the texts through the base, a layer at a time, with a bar that counts tokens."""
    from moesmith.build.capture import capture

    tokens = sum(len(text.ids) for text in texts)
    started = time.perf_counter()
    with console.bar("reading", total=1) as bar:

        def on_step(done: int, total: int) -> None:
            layers = parts.base.num_layers
            layer = min(layers, done * layers // total + 1)
            rate = tokens * done / total / max(time.perf_counter() - started, 1e-9)
            bar.update(done / total, f"layer {layer} of {layers} · {rate:,.0f} tok/s")

        capture(parts.base.folder, texts, visit, state, device=device, on_step=on_step)


def source_losses(parts: Parts, texts: Sequence[Any], state: Path, device: str) -> dict[Path, Tensor]:
    """Folder of every source -> its loss on every token of the texts, (T,)."""
    from moesmith.build.token_losses import token_losses
    from moesmith.jobs._build_judge import moving

    found: dict[Path, Tensor] = {}
    for source in parts.sources:
        if source.folder not in found:
            with console.bar(f"{Path(source.name).name} reads", total=1) as bar:
                found[source.folder] = token_losses(
                    source.folder, texts, on_text=moving(bar), device=device, state=state
                )
    return found


def columns(parts: Parts, by_folder: dict[Path, Tensor]) -> Tensor | None:
    """(T, E) losses in the order of the experts; None if they were not asked for."""
    import torch

    if not by_folder:
        return None
    return torch.stack([by_folder[source.folder] for source in parts.sources], dim=1)
