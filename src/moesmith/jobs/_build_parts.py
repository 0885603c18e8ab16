"""What a build is put together from: the opened models, the class they make, and sizes known beforehand."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesmith import console
from moesmith.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedConfig

    from moesmith.build.assemble import SharedSource
    from moesmith.build.modes import Experts, ExpertSource
    from moesmith.build.recipe import Recipe
    from moesmith.build.sources import Source
    from moesmith.models.ranges import NewTensor

RESERVED = ("router", "embed", "random", "uniform", "oracle", "base")  # rows of the table of perplexities
ALIGNMENT = 16  # bytes between rows that torch's grouped matrix multiplication wants
EXACT = ("copy", "virtual-group", "split")  # with these every expert computes what its source's FFN does


@dataclass
class Parts:
    """Everything that is opened before any text is read."""

    recipe: Recipe
    route: str
    route_reason: str
    base: Source
    sources: list[Source]
    """of every listed expert; one object for one model"""
    shared: SharedSource | None
    config: PreTrainedConfig
    mode: str
    number: float | int | None
    dtype: torch.dtype

    @property
    def entries(self) -> int:
        """Experts of the recipe: what labels count."""
        return len(self.sources)

    @property
    def group(self) -> int:
        """Experts of the model that an entry becomes."""
        return int(self.number or 1) if self.mode == "virtual-group" else 1

    @property
    def num_experts(self) -> int:
        """Experts of the model."""
        return int(self.recipe.num_experts or 0) if self.mode == "split" else self.entries * self.group

    @property
    def top_k(self) -> int:
        """Experts that a token uses."""
        return int(self.recipe.num_experts_per_tok or 0)

    @property
    def folders(self) -> dict[str, Path]:
        """Expert -> folder of its dense model, each once; not the base, nor what an adapter changes."""
        found: dict[str, Path] = {}
        for entry, source in zip(self.recipe.experts, self.sources, strict=True):
            if entry.adapter is None and source.folder not in (self.base.folder, *found.values()):
                name = str(entry.name)
                found[f"source {name}" if name.split(" ")[0] in RESERVED else name] = source.folder
        return found

    @property
    def exact(self) -> bool:
        """Whether every expert alone has to give what its source's FFNs do."""
        return self.mode in EXACT and not any(entry.noise_scale for entry in self.recipe.experts)

    def experts(self, split: list[Tensor] | None = None) -> Experts:
        """The maker of every expert's matrices. `split` is what `init: split` found; see `make_experts`."""
        from moesmith.build.modes import make_experts

        fold = float(self.top_k) if self.mode == "split" else 1.0  # the weights of a router add up to 1
        return make_experts(
            self.recipe.init, self.expert_sources(), self.dtype, self.recipe.seed, split, fold
        )

    def expert_sources(self) -> list[ExpertSource]:
        """The entries of the recipe as the modes take them."""
        from moesmith.build.modes import ExpertSource

        return [
            ExpertSource(
                source,
                self.base,
                Path(entry.adapter).expanduser() if entry.adapter else None,
                entry.residual_scale,
                entry.noise_scale,
            )
            for entry, source in zip(self.recipe.experts, self.sources, strict=True)
        ]

    def layer_bytes(self) -> int:
        """Bytes of one layer's experts: what a build has to be measured against."""
        width = self.base.ffn_width * (self.entries if self.mode != "split" else 1)
        return 3 * width * self.base.hidden_size * self.dtype.itemsize


def open_parts(recipe: Recipe) -> Parts:
    """Open every model of a recipe and find the class they make.

    Raises:
        UserError: a model that cannot be read, models that do not fit together, or no class for them.
    """
    import torch

    from moesmith.build.assemble import SharedSource
    from moesmith.build.modes import parse_init
    from moesmith.build.native import target_config
    from moesmith.build.recipe import choose_route
    from moesmith.build.sources import check_sources, open_source

    opened: dict[str, Source] = {}

    def source_of(model: str) -> Source:
        if model not in opened:
            opened[model] = open_source(model)
        return opened[model]

    base = source_of(recipe.base_model)
    sources = [source_of(str(expert.source_model)) for expert in recipe.experts]
    shared = recipe.shared_expert
    beside = source_of(shared.source_model) if shared else None
    different = {id(s): s for s in [*sources, *([beside] if beside else [])] if s is not base}
    for note in check_sources(base, list(different.values())):
        console.warn(note)
    route, reason = choose_route(recipe)
    mode, number = parse_init(recipe.init)
    groups = int(number or 1) if mode == "virtual-group" else 1
    experts = int(recipe.num_experts or 0) if mode == "split" else len(sources) * groups
    dtype = getattr(torch, recipe.dtype) if recipe.dtype else base.dtype
    width = _width(base, mode, experts if mode == "split" else groups, dtype)
    target = _target(recipe, base, shared is not None)
    config = target_config(
        base.config, target, experts, int(recipe.num_experts_per_tok or 0), width,
        base.ffn_width if beside else None,
    )  # fmt: skip
    config.dtype = dtype
    return Parts(
        recipe.model_copy(
            update={"route": route, "output": target, "dtype": str(dtype).removeprefix("torch.")}
        ),
        route,
        reason,
        base,
        sources,
        SharedSource(beside, shared.weight) if shared and beside else None,
        config,
        mode,
        number,
        dtype,
    )


def _width(base: Source, mode: str, parts: int, dtype: torch.dtype) -> int:
    """Neurons of one expert, where an FFN becomes so many `parts`.

    Raises:
        UserError: the FFN width does not divide, or rows of down_proj would not be ALIGNMENT bytes apart.
    """
    whole = base.ffn_width
    width, rest = divmod(whole, parts)
    if not rest and not width * dtype.itemsize % ALIGNMENT:
        return width
    fitting = [n for n in range(1, 257) if not whole % n and not whole // n * dtype.itemsize % ALIGNMENT]
    what = f"num_experts={parts}" if mode == "split" else f"init=virtual-group:{parts}"
    what = what if parts > 1 else base.name
    raise UserError(
        f"{what} does not divide the FFN width {whole}"
        if rest
        else f"{what} gives experts {width} neurons wide: rows of {width * dtype.itemsize} bytes, and the "
        f"kernels want multiples of {ALIGNMENT}",
        f"counts that do: {', '.join(map(str, fitting))}" if fitting else None,
    )


def _target(recipe: Recipe, base: Source, shared: bool) -> str:
    """The model_type to write. Raises UserError when nothing fits."""
    from moesmith.build.native import FITS, layout_of, targets

    fitting = targets(base.config.model_type)
    if not fitting:
        raise UserError(
            f"no MoE class is known to have the attention and norms of {base.config.model_type!r} "
            f"({recipe.base_model})",
            f"dense architectures that fit one: {', '.join(FITS)}",
        )
    if recipe.output != "auto":
        return recipe.output
    having = [target for target in fitting if layout_of(target).shared_expert is not None]
    return having[0] if shared and having else fitting[0]


def placeholder(parts: Parts, experts: Experts) -> list[NewTensor]:
    """The tensors that will be written, with empty routers: what they take is known before the long part."""
    import torch

    from moesmith.build.assemble import assemble

    empty = torch.zeros(parts.num_experts, parts.base.hidden_size)
    return assemble(parts.base, parts.config, experts, [empty] * parts.base.num_layers, parts.shared)


def any_split(parts: Parts) -> list[Tensor] | None:
    """Members of a split before it is known: the sizes are the same."""
    import torch

    if parts.mode != "split":
        return None
    members = torch.arange(parts.base.ffn_width).view(parts.num_experts, -1)
    return [members] * parts.base.num_layers


def say_parts(parts: Parts, translated: list[str], nbytes: int) -> None:
    """What will be built out of what."""
    base, recipe = parts.base, parts.recipe
    if translated:
        console.note(f"translated from the recipe: {' · '.join(translated)}")
    console.row(
        "base",
        f"{name_of(base.name)} · {base.config.model_type}, {base.num_layers} layers, FFNs of "
        f"{base.ffn_width:,} neurons on {base.hidden_size:,}",
    )
    names = [str(entry.name) for entry in recipe.experts]
    if parts.mode == "split":
        console.row("experts", f"{parts.num_experts} slices of each FFN")
    else:
        of = f" x {parts.group}, each 1/{parts.group} of an FFN" if parts.group > 1 else ""
        console.row("experts", f"{len(names)}{of}: {', '.join(names)}")
    kind = architecture(parts.config)
    shared = " · one shared expert" if parts.shared else ""
    console.row(
        "class",
        f"{kind} · top-{parts.top_k} of {parts.num_experts}{shared} · init {recipe.init} · "
        f"{str(parts.dtype).removeprefix('torch.')} · {console.size(nbytes)}",
    )
    console.row("route", f"{parts.route}: {parts.route_reason}")


def architecture(config: Any) -> str:
    """The class name of a MoE config."""
    from moesmith.models.checkpoint import model_class

    return model_class({"model_type": config.model_type}).__name__


def name_of(model: str) -> str:
    """The last part of a path or hub name."""
    return Path(model).name or model
