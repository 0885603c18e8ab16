"""Put a model's experts where a policy wants them, and everything else on the device that computes.

`attach` is called by name and has a way back, `detach`. In between each experts module has a lender,
`experts_residency`, from which the experts function gets the experts of a call; its own parameters stay the
whole packed tensors in their home, so state_dict and save_pretrained give what they always gave.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from ...errors import UserError
from ..storage import SCALE_SUFFIXES, scheme_of, stack, weight_names
from .lender import Lender
from .link import CpuLink, CudaLink
from .mapped import Mapped
from .pool import Residency
from .predict import Prediction, router_of

if TYPE_CHECKING:
    from .link import Link
    from .policy import Policy


def attach(
    model: nn.Module,
    policy: Policy,
    device: torch.device | str | None = None,
    link: Link | None = None,
) -> Residency | Mapped | None:
    """Give the experts of `model` their homes. What was attached before is taken off first.

    Args:
        model: packed by moesmith, in memory or memory-mapped, adapters on it or not. Its packed experts
            modules are layers 0, 1, ... in the order of `named_modules`.
        policy: where they lie, and how many are kept on the device.
        device: what computes; None: where the model's other parameters are.
        link: how bytes get to the device; None: `CudaLink` on a GPU; on a CPU `CpuLink` if a home is "ram",
            and if all are "disk" none: mapped experts are computed with where they lie.

    Returns:
        what lends the experts; None when every layer's home is the device, and the model is plainly there.

    Raises:
        UserError: no packed experts, a policy that does not fit the model, homes too large for the memory.
    """
    detach(model)
    layers = packed_experts(model)
    if not layers:
        raise UserError(
            f"{type(model).__name__} has no experts that moesmith loaded: there is nothing to give a home",
            "load it with quantization_config=ExpertsConfig(...), or from a folder of `moesmith quantize`",
        )
    policy.check(len(layers))
    away = [i for i in range(len(layers)) if policy.home(i) != "device"]
    residency: Residency | Mapped | None = None
    try:
        for i in away:
            _stay_at_home(layers[i][1])
        if device is not None:
            model.to(device)
        if not away:
            return None
        device = torch.device(device) if device is not None else _other_device(model, layers)
        # the tensors are the modules' parameters: what pinning does to them, the modules see
        homes = {name: stacks(module) for name, module in layers}
        if link is None and device.type == "cpu" and all(policy.home(i) == "disk" for i in away):
            residency = Mapped(homes, policy)
        else:
            residency = Residency(homes, policy, link or _link(device))
        for i in away:
            prediction = _prediction(model, layers, i, residency) if policy.prefetch else None
            cast(Any, layers[i][1]).experts_residency = Lender(residency, i, policy, prediction)
    except BaseException:
        if residency is not None:
            residency.close()
        detach(model)
        raise
    return residency


def detach(model: nn.Module) -> None:
    """Take the lenders off, end their threads; the experts stay in their homes. Nothing if none is attached.

    Moving the model to one device afterwards is `model.to(device)`.
    """
    residency = residency_of(model)
    for module in model.modules():
        lender = module.__dict__.pop("experts_residency", None)
        if lender is not None and lender.prediction is not None:
            lender.prediction.remove()
        if isinstance(module.__dict__.get("_apply"), _AllButTheHomes):
            del module.__dict__["_apply"]
    if residency is not None:
        residency.close()


def residency_of(model: nn.Module) -> Residency | Mapped | None:
    """What `attach` returned for this model, adapters around it or not; None if nothing is attached."""
    for module in model.modules():
        lender = module.__dict__.get("experts_residency")
        if lender is not None:
            return lender.residency
    return None


def names_at_home(model: nn.Module) -> list[str]:
    """Parameters of an attached model that lie at home: for what would move, shard or broadcast them all."""
    return [
        f"{name}.{parameter}" if name else parameter
        for name, module in model.named_modules()
        if isinstance(module.__dict__.get("_apply"), _AllButTheHomes)
        for parameter in _home_names(module)
    ]


def packed_experts(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name in the plain model, module) of the experts that moesmith loaded."""
    return [
        (name.replace(".base_layer", "").removeprefix("base_model.model."), module)
        for name, module in model.named_modules()
        if "experts_scheme" in module.__dict__ and scheme_of(module) is not None
    ]


def stacks(module: nn.Module) -> dict[str, Any]:
    """Weight name -> `storage.stack`, for every stacked weight."""
    return {name: stack(module, name) for name in weight_names(module)}


# ---------------------------------------------------------------- the module's own parameters


def _home_names(module: nn.Module) -> Iterator[str]:
    """The parameters that lie at home: codes and scales, not the biases."""
    for name in weight_names(module):
        for suffix in ("", *SCALE_SUFFIXES):
            if name + suffix in module._parameters:
                yield name + suffix


class _AllButTheHomes:
    """Stands in for a module's `_apply`, which model.to(), .cuda() and .half() go through."""

    def __init__(self, module: nn.Module):
        self.module = module

    def __call__(self, fn: Callable, recurse: bool = True) -> nn.Module:
        module, everything = self.module, dict(self.module._parameters)
        for name in list(_home_names(module)):
            del module._parameters[name]
        try:
            return type(module)._apply(module, fn, recurse)
        finally:
            changed = dict(module._parameters)
            module._parameters.clear()  # and back in their order, which state_dict has too
            module._parameters.update({name: changed.get(name, held) for name, held in everything.items()})


def _stay_at_home(module: nn.Module) -> None:
    """Codes and scales are on the CPU, and stay there whatever happens to the model around them."""
    for name in _home_names(module):
        parameter = module._parameters[name]
        assert parameter is not None, "named because it is there"
        if parameter.device.type != "cpu":
            parameter.data = parameter.data.cpu()
    module.__dict__["_apply"] = _AllButTheHomes(module)


def _other_device(model: nn.Module, layers: list[tuple[str, nn.Module]]) -> torch.device:
    """Where the parameters lie that are not packed experts."""
    homes = {id(module._parameters[name]) for _, module in layers for name in _home_names(module)}
    for parameter in model.parameters():
        if id(parameter) not in homes:
            return parameter.device
    return torch.device("cpu")


def _link(device: torch.device) -> Link:
    return CudaLink(device) if device.type == "cuda" else CpuLink()


# ---------------------------------------------------------------- routers


def _prediction(
    model: nn.Module, layers: list[tuple[str, nn.Module]], layer: int, residency: Residency | Mapped
) -> Prediction | None:
    """What asks the router of the next layer; None if that lies on the device, or one of the two has none."""
    if layer + 1 >= len(layers) or residency.policy.home(layer + 1) == "device":
        return None
    blocks: dict[int, nn.Module] = {}
    for block in model.modules():  # outermost first: PEFT's wrappers are not the block
        for child in block.children():
            blocks.setdefault(id(_bare(child)), block)
    here, following = (blocks.get(id(layers[i][1])) for i in (layer, layer + 1))
    before = None if here is None else router_of(here)
    if before is None or following is None or router_of(following) is None:
        return None
    return Prediction(before, following, layers[layer + 1][1], layer + 1, residency.wants_prediction)


def _bare(module: nn.Module) -> nn.Module:
    """The module inside PEFT's wrappers."""
    while isinstance(inner := module._modules.get("base_layer"), nn.Module):
        module = inner
    return module
