"""Which Mixture-of-Experts class a dense model fits into, its config, and what it calls its tensors.

A class fits when attention, norms, positions and head are the same, so that only the FFN changes and engines
that know the class run the result. That is checked here on the config, and on every tensor when weights are
filled in. Two tables: `LAYOUTS` says what a MoE class calls things, `FITS` which dense type fits where. A
row stands in them when identical experts gave the dense model's logits (`tests/build/test_native.py`).
"""

# H hidden size, E experts, K top-k, I expert width, S width of a shared expert

from __future__ import annotations

import copy
import difflib
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

from moesmith.errors import UserError

Kind = Literal["gate", "up", "down"]
KINDS: tuple[Kind, Kind, Kind] = ("gate", "up", "down")

# Width of a shared expert of zeros, for a class that always has one. A multiple of the 32 weights that
# engines quantise together.
ZERO_WIDTH = 64


@dataclass(frozen=True)
class SharedExpert:
    """An FFN that every token goes through, inside the MoE block; what it writes is added to the experts'."""

    name: str
    """its module in the block"""
    width: str
    """config field: its neurons"""
    gate: str | None = None
    """a tensor (1, H) of the block, whose sigmoid multiplies what the shared expert writes"""
    counts: bool = False
    """the field counts experts of width I instead of neurons"""
    always: bool = False
    """the class cannot do without"""


@dataclass(frozen=True)
class Layout:
    """A MoE class: config fields, and names of tensors as its own checkpoints have them.

    What is no FFN matrix is called as in the dense model. Experts are stored apart (`experts` with a {} for
    the number), or stacked (`stacks`).
    """

    model_type: str
    num_experts: str = "num_experts"
    """config field"""
    width: str = "moe_intermediate_size"
    """config field: I"""
    top_k: str = "num_experts_per_tok"
    """config field"""
    fixed: dict[str, Any] = field(default_factory=dict)
    """config fields that a MoE made of dense layers needs"""
    per_layer: dict[str, Any] = field(default_factory=dict)
    """config fields that are lists of this value, one for each layer"""
    block: str = "mlp"
    router_name: str = "gate.weight"
    experts: str | None = "experts.{}."
    matrices: tuple[str, str, str] = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")
    """gate, up and down of one expert"""
    stacks: tuple[str, str] = ("experts.gate_up_proj", "experts.down_proj")
    """where `experts` is None"""
    shared_expert: SharedExpert | None = None
    score_bias: str | None = None
    """a bias (1, E) in fp32 that is added to the scores before the top-k: zeros here"""

    def router(self, layer: int) -> str:
        """(E, H)."""
        return f"{self._block(layer)}.{self.router_name}"

    def matrix(self, layer: int, expert: int, kind: Kind) -> str | None:
        """(I, H) or, down, (H, I); None where stacks are stored."""
        if self.experts is None:
            return None
        return f"{self._block(layer)}.{self.experts.format(expert)}{self.matrices[KINDS.index(kind)]}"

    def stack(self, layer: int, kind: Literal["gate_up", "down"]) -> str | None:
        """(E, 2I, H), rows of gate before those of up, or (E, H, I); None where experts are stored apart."""
        return None if self.experts else f"{self._block(layer)}.{self.stacks[kind == 'down']}"

    def shared(self, layer: int, kind: Kind) -> str | None:
        """(S, H) or, down, (H, S); None for a class without."""
        shared = self.shared_expert
        return None if shared is None else f"{self._block(layer)}.{shared.name}.{kind}_proj.weight"

    def shared_gate(self, layer: int) -> str | None:
        """(1, H); None where the shared expert is simply added."""
        shared = self.shared_expert
        return None if shared is None or shared.gate is None else f"{self._block(layer)}.{shared.gate}"

    def extra(self, layer: int) -> str | None:
        """Name of the score bias."""
        return self.score_bias and f"{self._block(layer)}.{self.score_bias}"

    def shared_width(self, config: PreTrainedConfig) -> int:
        """S that a config of this class gives its shared expert, 0 for none."""
        if self.shared_expert is None:
            return 0
        width = getattr(config, self.shared_expert.width)
        return width * getattr(config, self.width) if self.shared_expert.counts else width

    def _block(self, layer: int) -> str:
        return f"model.layers.{layer}.{self.block}"


_QWEN_SHARED = SharedExpert(
    "shared_expert", "shared_expert_intermediate_size", "shared_expert_gate.weight", always=True
)
_EVERY_LAYER = {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True}

LAYOUTS = {
    layout.model_type: layout
    for layout in (
        Layout("mixtral", "num_local_experts", "intermediate_size", block="block_sparse_moe",
               matrices=("w1.weight", "w3.weight", "w2.weight")),
        Layout("qwen2_moe", fixed=_EVERY_LAYER, shared_expert=_QWEN_SHARED),
        Layout("qwen3_moe", fixed=_EVERY_LAYER),
        Layout("qwen3_5_moe_text", experts=None, shared_expert=_QWEN_SHARED),
        Layout("flex_olmo", width="intermediate_size", fixed={"norm_topk_prob": True}),
        Layout("granitemoe", "num_local_experts", "intermediate_size", block="block_sparse_moe",
               router_name="router.layer.weight", experts=None,
               stacks=("input_linear.weight", "output_linear.weight")),
        Layout("ernie4_5_moe", "moe_num_experts", top_k="moe_k",
               fixed={"moe_layer_start_index": 0, "moe_layer_end_index": -1, "moe_layer_interval": 1},
               shared_expert=SharedExpert("shared_experts", "moe_num_shared_experts", counts=True),
               score_bias="gate.moe_statics.e_score_correction_bias"),
        Layout("cohere2_moe", width="intermediate_size", per_layer={"mlp_layer_types": "sparse"},
               fixed={"expert_selection_fn": "softmax", "shared_expert_combination_strategy": "sum"},
               shared_expert=SharedExpert("shared_experts", "num_shared_experts", counts=True)),
        Layout("gemma2_moe", experts=None),
        Layout("gemma3_moe_text", experts=None),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Fit:
    """A dense type in a MoE class."""

    target: str
    fixed: dict[str, Any] = field(default_factory=dict)
    """config fields that make the class compute what this dense type computes"""
    renamed: dict[str, str] = field(default_factory=dict)
    """dense config field -> the class's name for it"""


_PLAIN = (Fit("mixtral"), Fit("qwen2_moe", {"qkv_bias": False}))

# dense model_type -> classes it fits, best first: the one without a shared expert, which most engines know
FITS: dict[str, tuple[Fit, ...]] = {
    "llama": _PLAIN,
    "mistral": _PLAIN,
    "ministral": _PLAIN,
    "qwen2": (Fit("qwen2_moe", {"qkv_bias": True}),),
    "seed_oss": (Fit("qwen2_moe", renamed={"attention_bias": "qkv_bias"}),),
    "qwen3": (Fit("qwen3_moe"),),
    "qwen3_5_text": (Fit("qwen3_5_moe_text"),),
    "olmo2": (Fit("flex_olmo"),),
    "granite": (Fit("granitemoe"),),
    "ernie4_5": (Fit("ernie4_5_moe"),),
    "cohere2": (Fit("cohere2_moe"),),
    "gemma2": (Fit("gemma2_moe"),),
    "gemma3_text": (Fit("gemma3_moe_text"),),
}

# What `split.py` can do to a live model: experts and router are all that is new, under their live names.
NATIVE = {name: LAYOUTS[FITS[name][0].target] for name in ("llama", "mistral", "qwen3")}

# Fields that are another config's own, and those that say nothing about what the model computes or that
# other fields repeat.
OWN = {"_name_or_path", "architectures", "dtype", "model_type", "quantization_config", "transformers_version"}
HARMLESS = OWN | {"max_window_layers", "pretraining_tp", "residual_dropout"}
WINDOWS = {"layer_types", "sliding_window", "use_sliding_window"}


def targets(model_type: str) -> list[str]:
    """MoE classes (model_type) that a dense type fits, best first; [] if none is known."""
    return [fit.target for fit in FITS.get(model_type, ())]


def layout_of(target: str) -> Layout:
    """What a MoE class calls things. Raises UserError for one that is not in the table."""
    if target not in LAYOUTS:
        near = difflib.get_close_matches(target, LAYOUTS, n=1)
        raise UserError(
            f"{target!r} is no MoE class that moesmith builds",
            f"did you mean {near[0]!r}?" if near else f"known: {', '.join(LAYOUTS)}",
        )
    return LAYOUTS[target]


def native_config(dense: PreTrainedConfig, num_experts: int, top_k: int) -> PreTrainedConfig:
    """Config of the MoE whose experts are equal slices of `dense`'s FFN.

    Raises:
        UserError: no class fits, or counts that do not divide; see the message.
    """
    target = NATIVE.get(dense.model_type)
    if target is None:
        known = ", ".join(f"{name} → {moe.model_type}" for name, moe in NATIVE.items())
        raise UserError(
            f"no native MoE class is known to have the attention and norms of {dense.model_type!r}",
            f"dense architectures that can be split: {known}",
        )
    _check_top_k(num_experts, top_k)
    width, rest = divmod(dense.intermediate_size, num_experts)
    if rest:
        raise UserError(
            f"num_experts={num_experts} does not divide the FFN width {dense.intermediate_size}",
            f"counts that do: {', '.join(str(n) for n in _divisors(dense.intermediate_size))}",
        )
    return target_config(dense, target.model_type, num_experts, top_k, width)


def target_config(
    dense: PreTrainedConfig,
    target: str,
    num_experts: int,
    top_k: int,
    width: int,
    shared_width: int | None = None,
) -> PreTrainedConfig:
    """Config of a MoE of class `target` (see `targets`) that is `dense` in everything but its FFNs.

    Args:
        width: neurons of one expert.
        shared_width: neurons of the shared expert; None for no shared expert. A class that always has one
            gets ZERO_WIDTH neurons, to be filled with zeros.

    Raises:
        UserError: the class does not fit, has no shared expert, or has no field for something that the
            dense config uses; or top_k is out of range.
    """
    fit, layout = _fit(dense.model_type, target), layout_of(target)
    _check_top_k(num_experts, top_k)
    config_class = CONFIG_MAPPING[target]
    taken = set(config_class().to_dict())
    plain = type(dense)(num_hidden_layers=dense.num_hidden_layers).to_dict()
    # A field that the dense class does not know is not read by it, but might be by the other.
    known = {key: value for key, value in dense.to_dict().items() if key in plain}
    values = {fit.renamed.get(key, key): value for key, value in known.items()}
    _check_nothing_lost(dense.model_type, fit, known, plain, taken)
    carried = {key: value for key, value in values.items() if key in taken and key not in OWN | WINDOWS}
    carried |= _windows(dense.model_type, known, target, taken)
    carried |= copy.deepcopy(layout.fixed | fit.fixed)
    carried |= {key: [value] * dense.num_hidden_layers for key, value in layout.per_layer.items()}
    carried |= {layout.width: width, layout.num_experts: num_experts, layout.top_k: top_k}
    carried |= _shared_field(dense.model_type, layout, width, shared_width)
    # Said outright where it is unusual: the classes read it, not all of them declare it.
    usual = dense.hidden_size // dense.num_attention_heads
    head_dim = getattr(dense, "head_dim", None) or usual
    if "head_dim" in taken or head_dim != usual:
        carried["head_dim"] = head_dim
    config = config_class(**carried)
    config.dtype = dense.dtype
    return config


def model_class(config: PreTrainedConfig) -> Any:
    """The causal language model that a text config belongs to. Raises UserError if transformers has none."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"transformers has no language model for {config.model_type!r}")
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a text config on the meta device: every name and shape, no memory."""
    with torch.device("meta"):
        return model_class(config)._from_config(copy.deepcopy(config))  # it writes its dtype into the config


def _fit(model_type: str, target: str) -> Fit:
    fits = {fit.target: fit for fit in FITS.get(model_type, ())}
    if target in fits:
        return fits[target]
    if fits:
        layout_of(target)  # a name that is no class at all is answered with the nearest
        raise UserError(
            f"{model_type!r} does not fit into {target!r}: the result would differ from the dense model",
            f"{model_type} fits into {' or '.join(fits)}",
        )
    raise UserError(
        f"no MoE class is known to have the attention and norms of {model_type!r}",
        f"dense architectures that fit one: {', '.join(FITS)}",
    )


def _check_top_k(num_experts: int, top_k: int) -> None:
    if not 1 <= top_k <= num_experts:
        raise UserError(f"top_k={top_k} must be between 1 and num_experts={num_experts}")


def _check_nothing_lost(
    model_type: str, fit: Fit, known: dict[str, Any], plain: dict[str, Any], taken: set[str]
) -> None:
    """Refuse a model that uses something its MoE class has no field for.

    Args:
        known: fields of the dense config.
        plain: their defaults.
    """
    carried = taken | HARMLESS | WINDOWS | fit.renamed.keys() | {"head_dim", "intermediate_size"}
    lost = {key: value for key, value in known.items() if key not in carried and value != plain[key]}
    if lost:
        uses = ", ".join(f"{key}={value}" for key, value in sorted(lost.items()))
        raise UserError(f"{model_type} with {uses}: {fit.target} has no such option, the result would differ")


def _windows(model_type: str, known: dict[str, Any], target: str, taken: set[str]) -> dict[str, Any]:
    """Fields that give every layer the attention window it has in the dense model.

    Configs disagree on what says so: a window alone, a window and a switch, or the types of all layers.

    Args:
        known: fields that the dense class reads. A Llama made of a Mistral may still have the window.
    """
    window, count = known.get("sliding_window"), known["num_hidden_layers"]
    kinds = known.get("layer_types") or ["sliding_attention" if window else "full_attention"] * count
    slides = "sliding_attention" in kinds
    if "layer_types" in taken:
        fields = {"layer_types": list(kinds), "sliding_window": window, "use_sliding_window": slides}
    elif slides and ("sliding_window" not in taken or len(set(kinds)) > 1):
        has = "one window for all layers" if "sliding_window" in taken else "no windows"
        raise UserError(f"{model_type} with layer_types={kinds}: {target} has {has}, the result would differ")
    else:
        fields = {"sliding_window": window if slides else None, "use_sliding_window": slides}
    return {key: value for key, value in fields.items() if key in taken}


def _shared_field(model_type: str, layout: Layout, width: int, shared_width: int | None) -> dict[str, int]:
    shared = layout.shared_expert
    if shared is None:
        if shared_width is None:
            return {}
        having = [target for target in targets(model_type) if LAYOUTS[target].shared_expert]
        raise UserError(
            f"{layout.model_type} has no shared expert",
            f"output: {having[0]} has one" if having else f"no class that {model_type} fits into has one",
        )
    wanted = (ZERO_WIDTH if shared.always else 0) if shared_width is None else shared_width
    if not shared.counts:
        return {shared.width: wanted}
    count, rest = divmod(wanted, width)
    if rest:
        raise UserError(
            f"a shared expert of width {wanted} in {layout.model_type} must be a multiple of the experts' "
            f"width {width}"
        )
    return {shared.width: count}


def _divisors(number: int) -> list[int]:
    return [n for n in range(2, 257) if number % n == 0]
