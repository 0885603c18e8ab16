"""Options of a training run that do not depend on what is trained on."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pydantic

from moesmith.config import JobConfig

Placement = Literal["experts", "attention", "router", "shared_experts", "dense_mlp"]
Home = Literal["device", "ram", "disk"]


def _as_list(value: Any) -> Any:
    """One word stands for all layers."""
    return [value] if isinstance(value, str) else value


def _as_word(value: list[str]) -> str | list[str]:
    """The same way round."""
    return value[0] if len(set(value)) == 1 else list(value)


class LoraSettings(JobConfig):
    """The adapter: where it sits and how large it is."""

    r: int = pydantic.Field(16, ge=1)
    """Rank, per expert and per linear."""
    alpha: float = pydantic.Field(32, gt=0)
    """The update is scaled by alpha / r."""
    targets: Annotated[list[Placement], pydantic.Field(min_length=1)] = ["experts", "attention"]
    """Any of experts, attention, router, shared_experts, dense_mlp; the model must have those named."""
    rslora: bool = False
    """Scale by alpha / sqrt(r) instead."""
    dropout: float = pydantic.Field(0.0, ge=0, lt=1)
    """Dropout on the adapter's input; not on experts, on routers that are no nn.Linear, and in dpo."""


class TrainSettings(JobConfig):
    """The optimisation."""

    epochs: float = pydantic.Field(1, gt=0)
    """Passes over the rows; max_steps wins over it."""
    max_steps: int | None = pydantic.Field(None, ge=1)
    """Optimizer steps."""
    batch_size: int = pydantic.Field(1, ge=1)
    """Rows (with packing: sequences) per forward pass."""
    grad_accum: int = pydantic.Field(16, ge=1)
    """Forward passes per optimizer step; the loss is the mean over all tokens of a step."""
    lr: float = pydantic.Field(1e-4, gt=0)
    """Highest learning rate."""
    min_lr_ratio: float = pydantic.Field(0.1, ge=0, le=1)
    """The cosine ends at this share of lr; 1 keeps it constant."""
    warmup: float = pydantic.Field(0.03, ge=0)
    """Steps of linear warm-up, or their share of all steps when below 1."""
    weight_decay: float = pydantic.Field(0.0, ge=0)
    """Weight decay of AdamW."""
    max_grad_norm: float = pydantic.Field(1.0, ge=0)
    """Gradients are clipped to this norm; 0 leaves them."""
    optim: str = "adamw_torch"
    """Optimizer, by the name transformers gives it (paged_adamw_8bit keeps its state in 8 bits on a GPU)."""
    gradient_checkpointing: bool = True
    """Compute activations again in backward instead of keeping them: a third more time, far less memory."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """What is not packed is loaded and computed in this; the loss is always summed in float32."""
    adapter_dtype: Literal["float32", "bfloat16"] = "float32"
    """The adapter and its optimizer state."""
    router_aux_loss: float = pydantic.Field(0.0, ge=0)
    """Weight of the architecture's load-balancing loss; only worth it when the router is trained."""
    eval_steps: int | None = pydantic.Field(None, ge=1)
    """Evaluate every so many steps; none: ten times. Always before the first step and after the last too."""
    save_steps: int | None = pydantic.Field(None, ge=1)
    """Write a checkpoint to resume from every so many steps; none: ten times in the run."""
    keep_checkpoints: int = pydantic.Field(2, ge=1)
    """How many of them are kept."""
    early_stop: int | None = pydantic.Field(None, ge=1)
    """Stop after so many evaluations without a better held-out loss."""
    max_nonfinite: int = pydantic.Field(3, ge=1)
    """Stop after so many steps in a row that were skipped for a loss or gradient that is not finite."""
    loggers: list[Literal["tensorboard", "trackio"]] = []
    """Also log to any of tensorboard, trackio."""
    layer_major: bool = False
    """All rows of a step go through each layer in turn: experts that are staged come once per step."""
    sharding: Literal["fsdp2"] | None = None
    """Run over several processes (torchrun): none gives each the whole model, fsdp2 splits its weights."""
    expert_parallel: int = pydantic.Field(1, ge=1)
    """Processes that share the experts, each holding its own (torchrun --nproc-per-node N); 1: none do."""


class ExpertsPlace(JobConfig):
    """Where packed experts wait when it is not the device that trains."""

    home: Annotated[
        list[Home], pydantic.BeforeValidator(_as_list), pydantic.PlainSerializer(_as_word)
    ] = ["device"]  # fmt: skip
    """device, ram (pinned, for a GPU) or disk (the packed files, memory-mapped); a list: layer by layer."""
    kept: int = pydantic.Field(0, ge=0)
    """Experts of each layer that never leave the device; the others are staged a layer at a time."""
    slots: int | None = pydantic.Field(None, ge=1)
    """Layers that there is room to stage; none: 2 on a GPU, and on a CPU experts are used where they lie."""
    profile: str | None = None
    """Folder of `moesmith profile`: the experts it found hottest are the ones kept; none: the first."""
    statistics: bool = False
    """Count what is moved and what is waited for, into OUT/transfers.json."""
    verify: bool = False
    """Compare the packed files with their checksums first."""

    @property
    def homes(self) -> str | tuple[str, ...]:
        """One word for all MoE layers, or one for each."""
        return self.home[0] if len(set(self.home)) == 1 else tuple(self.home)

    @property
    def offloaded(self) -> bool:
        """Whether any experts are not on the device."""
        return set(self.home) != {"device"}


class RunSettings(JobConfig):
    """One training run: its folder, its seed, its adapter and its optimisation."""

    out: str
    """Folder for everything the run writes."""
    seed: int = 0
    """Seed of the adapter's first weights, the order of the rows and the held-out split."""
    lora: LoraSettings = LoraSettings()
    train: TrainSettings = TrainSettings()
    experts: ExpertsPlace = ExpertsPlace()
    fit: Literal["auto", "none"] = "none"
    """auto takes the fastest plan that fits for whatever was not given; what it chose is in config.yaml."""
    vram: str | None = None
    """GPU memory to stay under, such as 12GB; none: all there is."""
    ram: str | None = None
    """RAM to stay under, such as 32GB; none: all there is."""
    resume: bool = False
    """Continue the run in `out` from its newest whole checkpoint."""
    overwrite: bool = False
    """Start anew in a folder that already holds a run, removing what that run wrote."""


class DPOSettings(JobConfig):
    """The loss on pairs, and the model it is relative to."""

    loss: Annotated[list[str], pydantic.Field(min_length=1)] = ["sigmoid_norm"]
    """TRL's names, several are summed: sigmoid_norm (per token, so length buys nothing), sigmoid, ipo..."""
    loss_weights: list[float] | None = None
    """Weight of each loss; none: 1 each."""
    beta: float | None = pydantic.Field(None, gt=0)
    """How much a reward is for one nat away from the reference; none: 5 for sigmoid_norm, else 0.1."""
    label_smoothing: float = pydantic.Field(0.0, ge=0, lt=1)
    """Share of pairs expected to be the wrong way round; only for robust, exo_pair, aot, aot_unpaired."""
    reference: Literal["cached", "recompute"] = "cached"
    """Log-probabilities of the model before training: from a file, computed once, or anew in every step."""
    reference_cache: str | None = None
    """Folder of that file; none: moesmith/reference in the user's cache folder."""


class DPOTrain(TrainSettings):
    """The optimisation of a run on pairs."""

    lr: float = pydantic.Field(2e-5, gt=0)
    """Highest learning rate."""
    batch_size: int = pydantic.Field(1, ge=1)
    """Pairs per forward pass; each is two sequences."""
    grad_accum: int = pydantic.Field(16, ge=1)
    """Forward passes per optimizer step; the loss is the mean over all pairs of a step."""


class DPORunSettings(RunSettings):
    """One run on pairs: its folder, its seed, its adapter, its loss and its optimisation."""

    dpo: DPOSettings = DPOSettings()
    train: DPOTrain = DPOTrain()
