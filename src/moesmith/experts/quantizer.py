"""Seam 1: a transformers quantizer that packs experts while the model streams from disk.

On the meta model each stacked experts weight becomes packed placeholders of the same name (see `storage`).
The quantise operation then runs inside transformers' own loader, one expert at a time, so that peak memory
is the packed model plus at most one layer's tensors. `save_pretrained` writes the packed form; loading that
is a memory map. `nn.Linear` is left to bitsandbytes, when asked for.
"""

from __future__ import annotations

import re
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    MergeModulelist,
    Transpose,
    WeightConverter,
    _IdentityOp,
)
from transformers.distributed.parallel_utils import replace_layer_number_by_wildcard as _place
from transformers.integrations.bitsandbytes import (
    Bnb4bitDeserialize,
    Bnb4bitQuantize,
    Bnb8bitDeserialize,
    Bnb8bitQuantize,
    replace_with_bnb_linear,
)
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..errors import UserError
from ..ops.blockwise import SCHEMES, pick_blocksize, quantize, quantize_absmax
from ..ops.stack import PackedStack
from .forward import EXPERTS_FUNCTION
from .linears import kept_linears
from .storage import (
    PASSTHROUGH,
    SCALE_SUFFIXES,
    is_experts,
    mark,
    named_experts,
    packed_parameters,
    packed_placeholder,
    scheme_of,
    stack,
    weight_names,
)

QUANT_METHOD = "moesmith"
LINEARS = (None, "nf4", "int8")


class ExpertsConfig(QuantizationConfigMixin):
    """How `from_pretrained(..., quantization_config=ExpertsConfig("nf4"))` stores a MoE model.

    Args:
        scheme: storage of the stacked experts: nf4, fp4, int8, fp8 (packed in blocks) or bf16, fp16 (kept
            whole).
        linears: what happens to `nn.Linear`: None leaves them, "nf4" or "int8" hands them to bitsandbytes.
            Routers, gates, embeddings and heads are never touched.
        double_quant: store the block scales in 8 bits too (4.13 instead of 4.5 bits per weight for nf4).
        blocksize: weights per scale. Halved, down to 16, for a stack whose last dimension it does not divide.
        unpackable: "error" refuses a stack that no block size divides, "keep" leaves it in 16 bits.
    """

    quant_method = QUANT_METHOD

    def __init__(
        self,
        scheme: str = "nf4",
        linears: str | None = None,
        double_quant: bool = False,
        blocksize: int = 64,
        unpackable: str = "error",
        **unknown: Any,
    ):
        unknown.pop("quant_method", None)
        if unknown:
            raise ValueError(f"ExpertsConfig does not know {', '.join(sorted(unknown))}")
        if scheme not in SCHEMES:
            raise ValueError(f"scheme={scheme!r} is not one of {', '.join(SCHEMES)}")
        if linears not in LINEARS:
            raise ValueError(f"linears={linears!r} is not one of None, 'nf4', 'int8'")
        if blocksize not in (32, 64, 128, 256, 512, 1024, 2048, 4096):
            raise ValueError(f"blocksize={blocksize} is not a power of two from 32 to 4096")
        if unpackable not in ("error", "keep"):
            raise ValueError(f"unpackable={unpackable!r} is not one of 'error', 'keep'")
        if double_quant and scheme in PASSTHROUGH:
            raise ValueError(f"double_quant has no scales to quantise with scheme={scheme!r}")
        self.quant_method = QUANT_METHOD
        self.scheme = scheme
        self.linears = linears
        self.double_quant = double_quant
        self.blocksize = blocksize
        self.unpackable = unpackable

    # What transformers' bitsandbytes quantizers and `replace_with_bnb_linear` read.
    load_in_4bit = property(lambda self: self.linears == "nf4")
    load_in_8bit = property(lambda self: self.linears == "int8")
    llm_int8_skip_modules = None
    llm_int8_enable_fp32_cpu_offload = False
    llm_int8_has_fp16_weight = False
    llm_int8_threshold = 6.0
    bnb_4bit_quant_type = "nf4"
    bnb_4bit_quant_storage = torch.uint8
    bnb_4bit_compute_dtype = None  # bitsandbytes takes the dtype of the first input
    bnb_4bit_use_double_quant = property(lambda self: self.double_quant)

    def quantization_method(self) -> str | None:
        return {"nf4": "nf4", "int8": "llm_int8", None: None}[self.linears]

    def get_loading_attributes(self) -> dict[str, Any]:
        return {}


class ExpertsQuantizer(Bnb4BitHfQuantizer):
    """Packs experts; `nn.Linear` goes to the bitsandbytes quantizer of the chosen kind."""

    quantization_config: ExpertsConfig
    quantized_element_size = None  # placeholders already have their packed size

    def __init__(self, quantization_config: ExpertsConfig, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self.damaged: list[str] = []  # stacks with weights that are not finite, told when all is read
        if quantization_config.linears == "int8":
            self.serialized_names = Bnb8BitHfQuantizer.serialized_names
        elif quantization_config.linears is None:
            self.serialized_names = {}

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if self.quantization_config.linears is not None:
            super().validate_environment(*args, **kwargs)

    def adjust_max_memory(self, max_memory: dict) -> dict:
        return max_memory

    # --- the meta model -----------------------------------------------------------------------------------

    def _process_model_before_weight_loading(self, model: nn.Module, device_map: Any = None, **kwargs: Any):
        config = self.quantization_config
        experts = list(named_experts(model))
        if not experts:
            raise UserError(
                f"{type(model).__name__} has no experts module that transformers dispatches: nothing to pack",
                "for a dense model use transformers' own BitsAndBytesConfig",
            )
        for name, module in experts:
            mark(module, config.scheme)
            for weight in weight_names(module):
                self._place(module, weight, f"{name}.{weight}")
        self._tie_scales(model)
        model.set_experts_implementation(EXPERTS_FUNCTION)
        if config.linears is not None:
            skip = [*kept_linears(model), *(name for name, _ in experts)]
            replace_with_bnb_linear(model, skip, config, self.pre_quantized)
        return model

    def _place(self, module: nn.Module, weight: str, full_name: str) -> None:
        """Swap one stacked weight for placeholders of its stored form."""
        config = self.quantization_config
        dense = getattr(module, weight)
        if config.scheme in PASSTHROUGH:
            kept = torch.empty_like(dense, dtype=PASSTHROUGH[config.scheme])
            module.register_parameter(weight, nn.Parameter(kept, requires_grad=False))
            return
        blocksize = pick_blocksize(dense.shape[-1], config.blocksize)
        if blocksize is None:
            if config.unpackable == "keep":
                dense.requires_grad_(False)
                return
            raise UserError(
                f"{full_name}: last dimension {dense.shape[-1]} is no multiple of 16: no block fits",
                "keep such stacks in 16 bits with unpackable='keep', or choose scheme='bf16'",
            )
        packed = packed_placeholder(dense.shape, config.scheme, blocksize, config.double_quant, dense.device)
        for name, parameter in packed_parameters(weight, packed).items():
            module.register_parameter(name, parameter)

    def update_parallel_plan(self, model: nn.Module, plan: dict[str, str]) -> None:
        """Expert parallelism shards every tensor of an experts module, scales and biases included.

        The rest of the model is held whole by every rank: its linears may be packed by bitsandbytes or carry
        adapters. `DistributedConfig(tp_plan="auto")` leaves them to the model's own tensor-parallel plan.

        Raises:
            UserError: the experts do not divide evenly among the ranks.
        """
        config = getattr(model.config, "distributed_config", None)
        if config is None or config.ep_size == 1:
            super().update_parallel_plan(model, plan)
            return
        if plan is not cast(Any, model).ep_plan:
            if config.tp_plan is None:
                plan.clear()
                # transformers refuses an empty plan; a rule of the experts' own plan wins over this one
                plan.update({_place(name): "ep_dispatch_experts" for name, _ in named_experts(model)})
            return
        plan.clear()
        for name, module in named_experts(model):
            experts = getattr(module, weight_names(module)[0]).shape[0]
            check_divides(experts, config.ep_size, name)
            for tensor, parameter in module.named_parameters(recurse=False):
                if parameter.shape[0] == experts:
                    plan[f"{_place(name)}.{tensor}"] = "grouped_gemm"  # their name for slices of dimension 0
            plan[_place(name)] = "ep_dispatch_experts"

    def _tie_scales(self, model: nn.Module) -> None:
        """Experts that share weights share their scales."""
        names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        for target, source in list(model.all_tied_weights_keys.items()):
            for suffix in SCALE_SUFFIXES:
                if target + suffix in names and source + suffix in names:
                    model.all_tied_weights_keys[target + suffix] = source + suffix

    # --- the loader ---------------------------------------------------------------------------------------

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        module, name = get_module_from_name(model, param_name)
        if is_experts(module):
            return _is_packed(module, name)
        return self.quantization_config.linears is not None and _is_bnb_linear(module) and name == "weight"

    def get_quantize_ops(self) -> ConversionOps:
        return PackOnLoad(self)

    def update_weight_conversions(self, weight_conversions: list, model: nn.Module) -> list:
        conversions = [
            c for c in weight_conversions if not (self.pre_quantized and self._builds_packed(c, model))
        ]
        conversions = super().update_weight_conversions(conversions, model)
        return [self._for_packed(c) if self._builds_packed(c, model) else c for c in conversions]

    def get_load_operations(self) -> dict:
        deserialize = {"nf4": Bnb4bitDeserialize, "int8": Bnb8bitDeserialize}
        linears = self.quantization_config.linears
        return {} if linears is None else {"deserialize": deserialize[linears]}

    def _builds_packed(self, conversion: Any, model: nn.Module) -> bool:
        """Whether a converter of the checkpoint ends in a stack that is held packed."""
        if not isinstance(conversion, WeightConverter):
            return False
        targets = "|".join(re.escape(target.lstrip(".")) for target in conversion.target_patterns)
        ends = re.compile(rf"(^|\.)({targets})$")
        return any(
            ends.search(f"{name}.{weight}") and _is_packed(module, weight)
            for name, module in named_experts(model)
            for weight in weight_names(module)
        )

    def _for_packed(self, conversion: WeightConverter) -> WeightConverter:
        """The same conversion, ending in a packed stack.

        Per-expert checkpoints pack each expert as it is read instead of building the 16-bit stack first; a
        transpose that looks at the shape of the model's parameter looks at the logical one.
        """
        operations = conversion.operations
        kinds = [type(op) for op in operations]
        merged = kinds[:1] == [MergeModulelist] and operations[0].dim == 0
        joined = kinds[1:] == [] or (kinds[1:] == [Concatenate] and operations[1].dim == 1)
        if merged and joined and len(conversion.target_patterns) == 1:
            operations = [PackWhileMerging(self)]
        elif Transpose in kinds:
            operations = [TransposeToLogical(op) if isinstance(op, Transpose) else op for op in operations]
        else:
            return conversion
        sources, targets = conversion._original_source_patterns, conversion._original_target_patterns
        return conversion.copy(sources, targets, operations=operations)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any):
        super()._process_model_after_weight_loading(model, **kwargs)
        if self.damaged:
            more = f" (and {len(self.damaged) - 1} more)" if len(self.damaged) > 1 else ""
            raise UserError(self.damaged[0] + more, "the checkpoint is damaged: fetch or convert it again")
        # Saving reverses the converters that were used: a packed stack must stay one tensor.
        used = model._weight_conversions or []
        model._weight_conversions = [c for c in used if not self._builds_packed(c, model)]
        for _, module in named_experts(model):
            for name, parameter in module.named_parameters(recurse=False):
                if name.removesuffix("_bias") == name:
                    parameter.requires_grad_(False)
        for module in model.modules():
            # On CPUs with AVX512-BF16 bitsandbytes repacks a Linear4bit in eval mode for good, and from
            # then on adapters around it silently receive no gradient.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        return model

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None):
        raise UserError(
            "a packed model is not unpacked in place",
            "load the original checkpoint, or packed.stack(module, name).dense(dtype) for one stack",
        )


class PackOnLoad(ConversionOps):
    """The quantise step of the loader: experts here, linears in bitsandbytes."""

    def __init__(self, quantizer: ExpertsQuantizer):
        self.quantizer = quantizer

    def convert(
        self, input_dict: dict[str, Any], model: Any = None, full_layer_name: Any = None, **kwargs: Any
    ):
        result: dict[str, Tensor] = {}
        for name, value in input_dict.items():
            value = value[0] if isinstance(value, list) else value
            module, weight = get_module_from_name(model, name)
            if not is_experts(module):
                op = {"nf4": Bnb4bitQuantize, "int8": Bnb8bitQuantize}[
                    self.quantizer.quantization_config.linears or ""
                ]
                result |= op(self.quantizer).convert(
                    {name: value}, model=model, full_layer_name=name, **kwargs
                )
            elif isinstance(value, nn.Parameter):  # packed while merging
                result[name] = value
            else:
                prefix = name.removesuffix(weight)
                packed = pack_stack(value, self.quantizer.quantization_config, name, self.quantizer.damaged)
                result |= {prefix + key: p for key, p in packed_parameters(weight, packed).items()}
        return result


class TransposeToLogical(Transpose):
    """`Transpose` that compares with a packed stack's logical shape instead of the shape of its codes."""

    def __init__(self, op: Transpose):
        super().__init__(op.dim0, op.dim1, op.check_dims)

    def convert(
        self,
        input_dict: dict[str, Any],
        *args: Any,
        model: Any = None,
        full_layer_name: str = "",
        **kwargs: Any,
    ):
        tensor = next(iter(input_dict.values()))
        tensor = tensor[0] if isinstance(tensor, list) else tensor
        wanted = stack(*get_module_from_name(model, full_layer_name)).shape
        self_or_turned = Transpose(self.dim0, self.dim1) if tuple(tensor.shape) != wanted else _IdentityOp()
        return self_or_turned.convert(
            input_dict, *args, model=model, full_layer_name=full_layer_name, **kwargs
        )


class PackWhileMerging(ConversionOps):
    """Packs a checkpoint's per-expert matrices (gate and up, or one of a kind) one expert at a time."""

    def __init__(self, quantizer: ExpertsQuantizer):
        self.quantizer = quantizer

    def __deepcopy__(self, memo: Any) -> PackWhileMerging:
        return self  # the loader copies converters for every layer; this one keeps nothing between layers

    def convert(
        self,
        input_dict: dict[str, list[Tensor]],
        target_patterns: list[str],
        full_layer_name: str = "",
        **_: Any,
    ):
        groups = [input_dict.pop(pattern) for pattern in list(input_dict)]
        counts = {len(group) for group in groups}
        if len(counts) != 1:
            raise ValueError(
                f"{full_layer_name}: the checkpoint has {sorted(counts)} matrices for gate and up"
            )
        packer = StackPacker(
            counts.pop(), self.quantizer.quantization_config, full_layer_name, self.quantizer.damaged
        )
        for index in range(packer.num_experts):
            matrices = [group[index] for group in groups]
            packer.add(index, matrices[0] if len(matrices) == 1 else torch.cat(matrices, dim=0))
            for group in groups:
                group[index] = None  # type: ignore[call-overload]
        target = target_patterns[0]
        return {target + name: p for name, p in packed_parameters("", packer.stack).items()}


class StackPacker:
    """Fills a packed stack expert by expert, without ever holding the 16-bit stack.

    An expert that cannot be packed raises, or is noted in `damaged`: transformers' loader swallows what is
    raised inside it and reports it as a conversion problem of its own.
    """

    def __init__(self, num_experts: int, config: ExpertsConfig, name: str, damaged: list[str] | None = None):
        self.num_experts = num_experts
        self.config = config
        self.name = name
        self.damaged = damaged
        self.stack: PackedStack = None  # type: ignore[assignment]

    def add(self, index: int, matrix: Tensor) -> None:
        """Pack one expert's matrix (N, D)."""
        rows, columns = matrix.shape
        blocksize = pick_blocksize(columns, self.config.blocksize)
        if blocksize is None:
            raise ValueError(f"{self.name}: last dimension {columns} is no multiple of 16, blocks do not fit")
        if self.stack is None:
            shape = torch.Size((self.num_experts, rows, columns))
            self.stack = packed_placeholder(
                shape, self.config.scheme, blocksize, self.config.double_quant, matrix.device
            )
        try:
            codes, absmax = quantize(matrix, self.config.scheme, blocksize)
        except ValueError as error:
            message = f"{self.name}, expert {index}: {error}"
            if self.damaged is None:
                raise ValueError(message) from None
            self.damaged.append(message)
            return
        parts = [codes, absmax]
        if self.config.double_quant:
            assert absmax is not None, "passthrough schemes have no double quantisation"
            parts = [codes, *(part[0] for part in quantize_absmax(absmax.unsqueeze(0)))]
        held = (self.stack.codes, self.stack.absmax, self.stack.scale, self.stack.offset)
        for place, part in zip(held, parts, strict=False):
            if place is not None and part is not None:
                place[index] = part


def pack_stack(
    dense: Tensor, config: ExpertsConfig, name: str = "experts", damaged: list[str] | None = None
) -> PackedStack:
    """Pack a stack (E, N, D) of 16- or 32-bit weights.

    Raises:
        ValueError: a weight is not finite (names the stack and the expert).
    """
    packer = StackPacker(dense.shape[0], config, name, damaged)
    for index, matrix in enumerate(dense):
        packer.add(index, matrix)
    return packer.stack


def elements(tensor: Tensor, index: Tensor) -> Tensor:
    """Values of the flattened tensor at these positions, on the CPU.

    Of a DTensor (experts shared by several ranks) each rank gives what it has; every rank has to call it.
    """
    from torch.distributed.tensor import DTensor

    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return tensor.reshape(-1)[index.to(tensor.device)].cpu()
    local, mesh = tensor.to_local().reshape(-1), tensor.device_mesh
    place = index.to(local.device) - mesh.get_local_rank() * local.numel()
    here = (place >= 0) & (place < local.numel())
    found = local.new_zeros(len(index))
    found[here] = local[place[here]]
    # as bytes: one rank has the value, the others have zeros, and -0.0 stays what it is
    torch.distributed.all_reduce(found.view(torch.uint8), group=mesh.get_group())
    return found.cpu()


def check_divides(experts: int, ranks: int, what: str) -> None:
    """Refuse expert parallelism that would give ranks different numbers of experts.

    Raises:
        UserError: it would.
    """
    if experts % ranks:
        fitting = [str(n) for n in range(2, experts + 1) if experts % n == 0]
        raise UserError(
            f"{what}: {experts} experts do not divide evenly among {ranks} processes",
            f"processes that fit: {', '.join(fitting[:8])}",
        )


def _is_packed(module: nn.Module, name: str) -> bool:
    parameter = getattr(module, name, None)
    return (
        scheme_of(module) is not None
        and name in weight_names(module)
        and parameter is not None
        and parameter.dtype == torch.uint8
    )


def _is_bnb_linear(module: nn.Module) -> bool:
    return type(module).__name__ in ("Linear4bit", "Linear8bitLt")
