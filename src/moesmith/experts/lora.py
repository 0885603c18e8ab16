"""LoRA on packed experts, in the stock PEFT format.

PEFT's `ParamWrapper` adds B @ A of every expert to the whole weight stack in each forward. The subclass
here hands the two factors to the experts function instead, which applies them to the rows an expert
received. Parameters, names and file format stay PEFT's, so `get_peft_model`, `PeftModel.from_pretrained`,
TRL and resume work unchanged, and stock PEFT loads the adapter on the 16-bit model.

PEFT stores lora_A as (E*r, in) with the expert slowest and lora_B as (out, r*E) with the expert fastest.

Under transformers' expert parallelism (a model loaded with `DistributedConfig(ep_size=...)`) a rank has the
factors of its own experts only. They start as slices of what one process would draw, saving gathers them to
the same stock format, and loading takes this rank's slices from it.
"""

# E experts, e of them on this rank, r rank

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import peft.tuners.lora.model as peft_lora
import torch
from peft.tuners.lora import layer as peft_layer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..errors import UserError
from ..ops.grouped import Lora
from .storage import scheme_of, stack, weight_names

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

FACTORS = ("lora_A", "lora_B")


@dataclass(frozen=True)
class Share:
    """This rank's part of the experts: neighbours, the same number on every rank of `mesh`."""

    experts: int
    """on all ranks together"""
    mesh: DeviceMesh
    """one dimension: the ranks that share the experts"""

    @property
    def own(self) -> int:
        """Experts on this rank."""
        return self.experts // self.mesh.size()

    def cut(self, factor: str, whole: Tensor) -> Tensor:
        """A whole lora_A (E*r, in) or lora_B (out, r*E), or its optimizer state, to this rank's (e*r, in) or
        (out, r*e).
        """
        first = self.mesh.get_local_rank() * self.own
        if factor == "lora_A":
            r = len(whole) // self.experts
            return whole[first * r : (first + self.own) * r].clone()
        by_expert = whole.reshape(len(whole), -1, self.experts)
        return by_expert[..., first : first + self.own].reshape(len(whole), -1)

    def join(self, factor: str, parts: Sequence[Tensor]) -> Tensor:
        """The parts of all ranks, in their order, to the whole; undoes `cut`."""
        if factor == "lora_A":
            return torch.cat(list(parts))
        by_expert = [part.view(len(part), -1, self.own) for part in parts]
        return torch.cat(by_expert, dim=2).view(len(parts[0]), -1)

    def gather(self, factor: str, part: Tensor) -> Tensor | None:
        """The whole on the CPU of the first rank, None on the others. Every rank has to call it."""
        group, first = self.mesh.get_group(), self.mesh.get_local_rank() == 0
        part = part.detach().contiguous()
        parts = [torch.empty_like(part) for _ in range(self.mesh.size())] if first else None
        torch.distributed.gather(part, parts, group=group, group_dst=0)
        return self.join(factor, [p.cpu() for p in parts]) if parts is not None else None

    def as_dtensor(self, factor: str, part: Tensor) -> Tensor:
        """The part as a DTensor of the whole's shape: what gathers those gathers it too. No communication."""
        from torch.distributed.tensor import DTensor, Shard
        from torch.distributed.tensor.placement_types import _StridedShard

        part = part.detach()
        ranks = self.mesh.size()
        if factor == "lora_A":
            return DTensor.from_local(part, self.mesh, [Shard(0)], run_check=False)
        shape = torch.Size((len(part), part.shape[1] * ranks))
        per_rank = _StridedShard(1, split_factor=part.shape[1] // self.own)
        return DTensor.from_local(
            part, self.mesh, [per_rank], run_check=False, shape=shape, stride=(shape[1], 1)
        )


class ParamWrapper(peft_layer.ParamWrapper):  # PEFT recognises nested wrappers by this class name
    """One stacked weight of a packed experts module with its adapters.

    Raises (on merge):
        ValueError: the stack is packed, and a low-rank delta cannot be added to codes; or it is shared by
            several ranks, or lies elsewhere than it is computed with.
    """

    share: Share | None = None
    """Which experts this rank has; None when it has all."""
    gathered: dict[str, Tensor] | None = None
    """name in the state dict -> whole factor, for the time in which one rank saves what all have given it"""

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        base = self.get_base_layer()
        self.num_experts, rows, columns = stack(base, self.parameter_name).shape
        self._param_ndim = 3
        mesh = getattr(getattr(base, self.parameter_name), "device_mesh", None)  # of a DTensor
        if mesh is not None and "ep" in mesh.mesh_dim_names:
            if mesh.ndim > 1:
                raise UserError(
                    f"{self.parameter_name} is split by expert parallelism and FSDP at once: no adapter fits",
                    "DistributedConfig(tp_size=N, ep_size=N)",
                )
            self.share = Share(self.num_experts, mesh)
            self.register_state_dict_post_hook(_say_whole)
            self.register_load_state_dict_pre_hook(_take_own)
        return rows, columns  # PEFT swaps them unless the module is transposed

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().update_layer(adapter_name, *args, **kwargs)
        if self.share is None:
            return
        # PEFT has drawn the factors of all experts, so every rank has used up the same random numbers.
        for factor in FACTORS:
            linear = getattr(self, factor)[adapter_name]
            own = self.share.cut(factor, linear.weight.detach())
            linear.weight = nn.Parameter(own, requires_grad=linear.weight.requires_grad)
            linear.out_features, linear.in_features = own.shape

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        lender = getattr(self.get_base_layer(), "experts_residency", None)
        if lender is not None:  # the weights it adapts lie elsewhere than they are computed with
            for factor in FACTORS:
                getattr(self, factor)[adapter_name].to(lender.device)

    def factors(self) -> Iterator[tuple[str, str, nn.Parameter]]:
        """(name in this module's state dict, "lora_A" or "lora_B", parameter) of all its adapters."""
        for factor in FACTORS:
            for adapter, linear in getattr(self, factor).items():
                yield f"{factor}.{adapter}.weight", factor, linear.weight

    def expert_lora(self, adapter: str) -> Lora:
        """The adapter's factors as views, A (E, r, in) and B (E, out, r), of the experts on this rank."""
        A, B = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        experts = self.num_experts if self.share is None else self.share.own
        A = A.view(experts, -1, A.shape[-1])
        B = B.view(B.shape[0], -1, experts).permute(2, 0, 1)
        return Lora(A, B, self.scaling[adapter])

    @contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        adapters = [self.expert_lora(name) for name in active_adapters if name in self.lora_A]
        running: dict[str, list[Lora]] = self.get_base_layer().experts_lora
        running[self.parameter_name] = adapters
        try:
            yield
        finally:
            running.pop(self.parameter_name, None)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        if self.share is not None:
            raise ValueError(
                f"{self.parameter_name} is shared by {self.share.mesh.size()} ranks: an adapter is merged in "
                "one process, from the 16-bit model and the saved adapter."
            )
        if self.get_param().dtype == torch.uint8:
            scheme = scheme_of(self.get_base_layer())
            raise ValueError(
                f"{self.parameter_name} is packed to {scheme}: an adapter cannot be merged into it. "
                "Load the 16-bit model (scheme='bf16') with this adapter and merge there."
            )
        if getattr(self.get_base_layer(), "experts_residency", None) is not None:
            raise ValueError(
                f"{self.parameter_name}: the experts lie elsewhere, and copies of them would not follow. "
                "Call experts.residency.attach.detach(model) first."
            )
        super().merge(safe_merge=safe_merge, adapter_names=adapter_names)


def _say_whole(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """After a state dict was made: factors of some experts say which whole they are a part of."""
    assert isinstance(module, ParamWrapper)
    if module.share is None:
        return
    for name, factor, parameter in module.factors():
        if module.gathered is None:
            state[prefix + name] = module.share.as_dtensor(factor, parameter)
        elif name in module.gathered:
            state[prefix + name] = module.gathered[name]


def _take_own(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before a state dict is loaded: whole factors are cut to this rank's experts."""
    assert isinstance(module, ParamWrapper)
    if module.share is None:
        return
    for name, factor, parameter in module.factors():
        value = state.get(prefix + name)
        if value is not None and value.numel() == parameter.numel() * module.share.mesh.size():
            state[prefix + name] = module.share.cut(factor, value)


_stock_dispatch = peft_lora.dispatch_default


def _dispatch(
    target: nn.Module, adapter_name: str, config: Any, parameter_name: str | None = None, **kwargs: Any
) -> nn.Module | None:
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if parameter_name is not None and scheme_of(base) is not None and parameter_name in weight_names(base):
        return ParamWrapper(target, adapter_name, parameter_name=parameter_name, config=config, **kwargs)
    return _stock_dispatch(target, adapter_name, config=config, parameter_name=parameter_name, **kwargs)


def register() -> None:
    """Let PEFT choose the wrapper for packed experts; every other target reaches its own dispatcher.

    `LoraConfig._register_custom_module` would do this too, but is not saved with an adapter: loading one by
    its folder would build the stock wrapper and fail.
    """
    peft_lora.dispatch_default = _dispatch


def unregister() -> None:
    """Put PEFT's own dispatcher back."""
    peft_lora.dispatch_default = _stock_dispatch
