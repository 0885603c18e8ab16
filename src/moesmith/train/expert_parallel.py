"""Train adapters on a model whose experts are shared by several processes, each computing with its own.

transformers does the sharing (`DistributedConfig(ep_size=...)`): every rank holds all of the model but only a
contiguous part of every layer's experts, sees the same rows, and a layer's output is the sum over the ranks.
Here is what training needs beside that, for adapters that are split like their experts (`experts/lora.py`):
one gradient norm over all of them, and checkpoints that are those of a single process, so that a run may go
on with another number of ranks, or with one.

transformers' own Trainer refuses checkpoints of such a model and would copy rank 0's experts to the others.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from moesmith.errors import UserError
from moesmith.experts.lora import ParamWrapper, Share
from moesmith.experts.quantizer import check_divides
from moesmith.models.surgery import CONFIG_COUNTS

if TYPE_CHECKING:
    from .careful import Careful

# Optimizers whose state has the shape of the parameter; the others' cannot be cut between experts.
JOINABLE = ("adamw_torch", "adamw_torch_fused", "sgd", "rmsprop", "adagrad")


# ---------------------------------------------------------------- loading


def check(config: Mapping[str, Any], processes: int) -> None:
    """Refuse a number of processes that cannot share this model's experts, before anything is loaded.

    Args:
        config: the checkpoint's config.json.

    Raises:
        UserError: the experts do not divide evenly; the run has another number of processes.
    """
    text = config.get("text_config") or config
    experts = next((text[name] for name in CONFIG_COUNTS if isinstance(text.get(name), int)), None)
    if experts is not None:
        check_divides(experts, processes, str(text.get("model_type", "the model")))
    running = int(os.environ.get("WORLD_SIZE", 1))
    if running != processes:
        raise UserError(
            f"train.expert_parallel={processes}, and the run has "
            f"{f'{running} processes' if running > 1 else 'one process'}",
            f"torchrun --nproc-per-node {processes} -m moesmith sft ...",
        )


def loading(processes: int) -> dict[str, Any]:
    """What `from_pretrained` needs so that so many processes share the experts; nothing for one."""
    if processes == 1:
        return {}
    from transformers.distributed import DistributedConfig

    # all_reduce: every rank has the same rows, and a step is bit for bit the same with any number of them
    shared = DistributedConfig(tp_size=processes, ep_size=processes, ep_implementation="all_reduce")
    return {"distributed_config": shared, "device_map": None}


# ---------------------------------------------------------------- what is shared


def _is_sharded(model: Any) -> bool:
    """Whether transformers loaded it for several processes; its adapters may be elsewhere than on experts."""
    return bool(getattr(model, "is_distributed_loading_by_transformers", False))


def shared_factors(model: nn.Module) -> Iterator[tuple[ParamWrapper, str, str, nn.Parameter]]:
    """(module, name in its state dict, "lora_A" or "lora_B", parameter) of every factor of some experts only.

    The same order on every rank. Empty for a model that a single process holds.
    """
    for module in model.modules():
        if isinstance(module, ParamWrapper) and module.share is not None:
            for name, factor, parameter in module.factors():
                yield module, name, factor, parameter


@contextmanager
def whole(model: nn.Module, optimizer: Any = None) -> Iterator[None]:
    """Within: rank 0's state dicts of model and optimizer hold all experts, and nobody has to wait for it.

    Every rank has to enter. Does nothing for a model that one process holds.

    Raises:
        UserError: the optimizer's state is not one value per parameter.
    """
    inner: Any = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
    states: dict[nn.Parameter, dict[str, Tensor]] = {}
    touched: list[ParamWrapper] = []
    hook = None
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    processes = getattr(plain, "_tp_size", None)
    try:
        if _is_sharded(model):
            plain._tp_size = None  # else PEFT gathers the frozen experts too, whenever it saves an adapter
        for module, name, factor, parameter in shared_factors(model):
            share = _share(module)
            if module.gathered is None:
                module.gathered = {}
                touched.append(module)
            if (joined := share.gather(factor, parameter)) is not None:
                module.gathered[name] = joined
            if inner is not None and parameter in inner.state:
                states[parameter] = _gather_state(share, factor, parameter, inner.state[parameter])
        if states:
            hook = inner.register_state_dict_post_hook(
                lambda optimizer, state: _with_states(optimizer, state, states)
            )
        yield
    finally:
        if _is_sharded(model):
            plain._tp_size = processes
        for module in touched:
            module.gathered = None
        if hook is not None:
            hook.remove()


def _gather_state(
    share: Share, factor: str, parameter: nn.Parameter, state: dict[str, Any]
) -> dict[str, Tensor]:
    """The tensors of one parameter's optimizer state, whole, on rank 0; empty on the others."""
    found = {}
    for key in sorted(state):
        value = state[key]
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            joined = share.gather(factor, value)
            if joined is not None:
                found[key] = joined
        elif isinstance(value, Tensor) and value.numel() > 1:
            raise _unjoinable(f"an optimizer whose state {key} is {tuple(value.shape)}")
    return found


def _unjoinable(what: str) -> UserError:
    return UserError(
        f"{what} cannot be split between the experts of several processes", "train.optim=adamw_torch"
    )


def _with_states(optimizer: Any, state: dict[str, Any], states: dict[nn.Parameter, Any]) -> dict[str, Any]:
    """The optimizer's state dict with these parameters' states in place of its own."""
    filled = dict(state["state"])
    for index, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        if states.get(parameter):
            filled[index] = {**filled[index], **states[parameter]}
    return {**state, "state": filled}


def cut_state(model: nn.Module, optimizer: Any, state: dict[str, Any]) -> dict[str, Any]:
    """A whole optimizer state dict, cut to this rank's experts."""
    owners = {parameter: (_share(m), factor) for m, _, factor, parameter in shared_factors(model)}
    filled = dict(state["state"])
    for index, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        if parameter not in owners or index not in filled:
            continue
        share, factor = owners[parameter]
        size = parameter.numel() * share.mesh.size()
        filled[index] = {
            key: share.cut(factor, value) if isinstance(value, Tensor) and value.numel() == size else value
            for key, value in filled[index].items()
        }
    return {**state, "state": filled}


def clip_grad_norm(model: nn.Module, largest: float) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_` over the adapters of all ranks. The norm is the same on every rank.

    Every rank has to call it.
    """
    own = {parameter: _share(module) for module, _, _, parameter in shared_factors(model)}
    parameters = [p for p in model.parameters() if p.grad is not None]
    device = parameters[0].device if parameters else torch.device("cpu")
    squares = torch.zeros((), dtype=torch.float64, device=device)
    if mine := [p.grad for p in parameters if p in own]:
        squares += get_total_norm(mine).double() ** 2
    if own:
        group = next(iter(own.values())).mesh.get_group()
        torch.distributed.all_reduce(squares, group=group)
    if others := [p.grad for p in parameters if p not in own]:
        squares += get_total_norm(others).double() ** 2
    norm = squares.sqrt().float()
    if largest != float("inf"):
        clip_grads_with_norm_(parameters, largest, norm)
    return norm


def _share(module: ParamWrapper) -> Share:
    assert module.share is not None, "not a shared factor"
    return module.share


# ---------------------------------------------------------------- the trainer


def trainer_class(trainer: type[Careful], model: nn.Module) -> type[Careful]:
    """`trainer` itself, or for a model whose experts are shared the same with what this file adds."""
    if not _is_sharded(model):
        return trainer
    return type(f"SharedExperts{trainer.__name__}", (_SharedExperts, trainer), {})


class _SharedExperts:
    """Mixed in before a trainer of ours."""

    model: Any
    optimizer: Any
    accelerator: Any
    args: Any

    def __init__(self, model: Any, *args: Any, **kwargs: Any):
        arguments = kwargs["args"]
        if str(getattr(arguments.optim, "value", arguments.optim)) not in JOINABLE:
            raise _unjoinable(
                f"the state of train.optim={getattr(arguments.optim, 'value', arguments.optim)}"
            )
        plain = model.get_base_model()
        kept, processes = arguments.save_only_model, plain._tp_size
        arguments.save_only_model = True  # else refused: it cannot know that the state is gathered here
        plain._tp_size = 1  # else accelerate makes a mesh of its own, which it cannot on CPUs
        try:
            super().__init__(model, *args, **kwargs)  # type: ignore[call-arg]
        finally:
            plain._tp_size = processes
        self.args.save_only_model = arguments.save_only_model = kept

    def _sync_replicated_trainable_parameters(self, model: nn.Module) -> None:
        """What all ranks hold stays the same on all; experts are each rank's own."""
        own = {parameter for _, _, _, parameter in shared_factors(model)}
        everywhere = nn.Module()
        for index, parameter in enumerate(p for p in model.parameters() if p not in own):
            everywhere.register_parameter(str(index), parameter)
        super()._sync_replicated_trainable_parameters(everywhere)  # type: ignore[misc]

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        self.accelerator.unscale_gradients()
        return clip_grad_norm(model, self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        if grad_norm is None:
            self.accelerator.unscale_gradients()
            grad_norm = clip_grad_norm(model, float("inf"))
        return super()._get_grad_norm(model, grad_norm)  # type: ignore[misc]

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with whole(self.model, self.optimizer):
            super()._save_checkpoint(model, trial)  # type: ignore[misc]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        inner: Any = getattr(self.optimizer, "optimizer", self.optimizer)
        hook = inner.register_load_state_dict_pre_hook(
            lambda optimizer, state: cut_state(self.model, optimizer, state)
        )
        try:
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        finally:
            hook.remove()
