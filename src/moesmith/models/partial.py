"""A model of which one decoder layer at most is in memory, read from disk when it is wanted.

The model, a MoE or a dense one, is what `from_pretrained` builds before it loads: on the meta device,
quantizer included. Embeddings, norms and rotary tables are read at once; a decoder layer, or the output head,
is read by transformers' own loader, and dropped after use. Tensors stored in the dtype that is wanted are
views of the mapped files: they take no memory that the system could not have back.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel, initialization
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.utils import logging

from moesmith.errors import UserError

from .checkpoint import model_class, read_config
from .headers import TensorHeader, read_headers
from .identity import model_hash
from .layers import submodule, text_layers

NOT_ONE_AT_A_TIME = "profile it in memory, without --stream; for a build, choose another model"
"""What to do about a model that cannot be run layer by layer."""

DENSE_FFN = "mlp"
"""name of the FFN in a dense decoder layer"""
_GATED = ("gate_proj", "up_proj", "down_proj")


@dataclass
class PartialModel:
    """A transformers model with everything but its decoder layers in memory; see `open` and `layer`."""

    folder: Path
    model: PreTrainedModel
    stack: str
    """name of the decoder layers' ModuleList"""
    head_name: str
    """name of the module that makes logits, "" for a model without one"""
    _load: Any
    """transformers' LoadStateDictConfig"""
    _files: _Files
    _places: dict[str, dict[str, list[str]]]
    """decoder layer, head, or "" for what stays in memory -> parameter -> names on disk it is made from"""

    @classmethod
    def open(
        cls,
        folder: str | Path,
        dtype: torch.dtype | str = "auto",
        device: torch.device | str = "cpu",
        quantization_config: Any = None,
    ) -> Self:
        """Build the model and read everything but its decoder layers and its head.

        Args:
            dtype: "auto" for the checkpoint's own; another one costs a cast copy of what is read.
            quantization_config: pack each layer as it is read, as in `from_pretrained`; None for a checkpoint
                that is used as it is, packed or not.

        Raises:
            UserError: not a readable checkpoint, a model that cannot be run layer by layer.
        """
        folder = Path(folder)
        headers = read_headers(folder)
        model, load = _skeleton(folder, dtype, device, quantization_config)
        stack = _decoder_stack(model)
        for tied, source in model.all_tied_weights_keys.items():
            places = {_layer_of(name, stack) for name in (tied, source)}
            if len(places) > 1:
                raise UserError(
                    f"{type(model).__name__} ties {tied} to {source}: a layer cannot be read alone",
                    NOT_ONE_AT_A_TIME,
                )
        load = _lean(load)
        streamed = cls(folder, model, stack, _head_of(model), load, _Files(folder, headers), {})
        streamed._assign(headers)
        streamed._read("")
        return streamed

    # ---------------------------------------------------------------- what the model consists of

    @property
    def decoder_layers(self) -> list[str]:
        """Names of the decoder layers, in order."""
        return [f"{self.stack}.{index}" for index in range(len(self.layers))]

    @property
    def layers(self) -> Any:
        """The decoder layers themselves, an nn.ModuleList."""
        return submodule(self.model, self.stack)

    @property
    def device(self) -> torch.device:
        """Where layers are computed."""
        return torch.device(next(iter((self._load.device_map or {"": "cpu"}).values())))

    def layer_bytes(self, index: int) -> int:
        """Bytes that one decoder layer's tensors take on disk."""
        made_from = self._places[self.decoder_layers[index]].values()
        return sum(self._files.headers[name].nbytes for names in made_from for name in names)

    def identity(self) -> str:
        """What the outputs of the layers depend on beside the text: model, quantisation, dtype, device."""
        quantizer = self._load.hf_quantizer
        packing = quantizer and quantizer.quantization_config.to_dict()
        return f"{model_hash(self.folder)} {packing} {self._load.dtype} {self.device.type}"

    def _assign(self, headers: Mapping[str, TensorHeader]) -> None:
        """Find out to which part of the model each tensor on disk belongs."""
        mapping = self._load.weight_mapping or []
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        known = self.model.state_dict()
        prefix = self.model.base_model_prefix
        skipped = _towers(self.model, self.stack)
        for name in headers:
            target, _ = rename_source_key(name, renamings, converters, prefix, known)
            if target not in known and name in known:
                target, _ = rename_source_key(name, [], [], prefix, known)
            if target in known and not target.startswith(skipped):
                place = self._places.setdefault(self._place(target), {})
                place.setdefault(target, []).append(name)
        empty = [name for name in self.decoder_layers if name not in self._places]
        if empty:
            raise UserError(
                f"{self.folder}: no tensors for {empty[0]} ({len(empty)} of {len(self.layers)} layers)",
                "config.json and the weights are of different models",
            )

    # ---------------------------------------------------------------- reading a part and dropping it

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """Decoder layer `index`, read from disk; on the meta device again afterwards."""
        with self._part(self.decoder_layers[index]) as layer:
            yield layer

    @contextmanager
    def _part(self, name: str) -> Iterator[nn.Module]:
        """A decoder layer or the head, read from disk; on the meta device again afterwards."""
        above, _, key = name.rpartition(".")
        siblings = submodule(self.model, above)._modules
        module = siblings[key]
        assert module is not None
        # A copy, because quantizers leave more behind in a module than its parameters. It shares all that
        # reading does not change: meta tensors, configs, and what lies outside the part.
        inside = set(map(id, module.modules()))
        shared: list[Any] = [other for other in self.model.modules() if id(other) not in inside]
        shared += [other.config for other in self.model.modules() if hasattr(other, "config")]
        shared += [*module.parameters(), *module.buffers()]
        empty = copy.deepcopy(module, {id(thing): thing for thing in shared})
        try:
            self._read(name)
            module = siblings[key]
            assert module is not None
            yield module
        finally:
            used, siblings[key] = siblings[key], empty
            assert used is not None
            for inner in used.modules():  # now, whoever still holds the module
                inner._parameters.clear()
                inner._buffers.clear()

    def _read(self, place: str) -> None:
        """Read the tensors of a decoder layer, the head or what stays, and make the computed buffers."""
        # One parameter at a time: the loader would cast and hold the matrices of all of them.
        for names in self._places.get(place, {}).values():
            with _quiet(), self._files.slices(names) as slices:
                info, _ = convert_and_load_state_dict_in_model(self.model, slices, self._load, None)
            self._check(info)
        modules = list(self._modules(place))
        self._make_missing(modules)
        quantizer = self._load.hf_quantizer
        if quantizer is not None:  # raises for damaged weights
            quantizer.postprocess_model(self.model)

    def _place(self, name: str) -> str:
        """The decoder layer that a tensor belongs to, the head, or "" for what stays in memory."""
        if self.head_name and name.startswith(f"{self.head_name}."):
            return self.head_name
        return _layer_of(name, self.stack)

    def _check(self, info: Any) -> None:
        """Raise UserError for tensors that the loader could not put into the model."""
        if info.mismatched_keys:
            name, found, wanted = sorted(info.mismatched_keys)[0]
            raise UserError(
                f"{self.folder}: {name} is {list(found)}, config.json wants {list(wanted)}",
                "config.json and the weights are of different models",
            )
        if info.conversion_errors:
            name, error = next(iter(info.conversion_errors.items()))
            raise UserError(f"{self.folder}: {name} cannot be converted: {' '.join(str(error).split())}")

    def _modules(self, place: str) -> Iterator[tuple[str, nn.Module, PreTrainedModel]]:
        """(name, module, the model that initialises it) of a decoder layer, the head, or what stays."""
        skipped = _towers(self.model, self.stack)
        owners: dict[str, PreTrainedModel] = {}
        for name, module in self.model.named_modules():
            above = owners.get(name.rpartition(".")[0], self.model)
            owners[name] = module if isinstance(module, PreTrainedModel) else above
            if not f"{name}.".startswith(skipped) and self._place(f"{name}.") == place:
                yield name, module, owners[name]

    @torch.no_grad()
    def _make_missing(self, modules: list[tuple[str, nn.Module, PreTrainedModel]]) -> None:
        """Compute what no checkpoint stores: rotary tables and the like, as `from_pretrained` does."""
        ignored = "|".join(self.model._keys_to_ignore_on_load_missing or ())
        tied = self.model.all_tied_weights_keys
        for name, module, _ in modules:
            for kind, tensors in (("parameter", module._parameters), ("buffer", module._buffers)):
                for key, tensor in tensors.items():
                    if tensor is None or not tensor.is_meta:
                        continue
                    full = f"{name}.{key}".lstrip(".")
                    if full in tied:
                        continue
                    if kind == "parameter" and not (ignored and re.search(ignored, full)):
                        raise UserError(f"{self.folder}: the checkpoint has no {full}", "fetch it again")
                    empty = torch.empty_like(tensor, device=self.device)
                    is_parameter = kind == "parameter"
                    tensors[key] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
        with initialization.guard_torch_init_functions():
            for _, module, owner in modules:
                owner._init_weights(module)
        for name, module, _ in modules:
            for key in list(module._parameters):
                full = f"{name}.{key}".lstrip(".")
                if module._parameters[key] is not None and module._parameters[key].is_meta and full in tied:
                    module._parameters[key] = self.model.get_parameter(tied[full])


# ---------------------------------------------------------------- building and reading


def _skeleton(folder: Path, dtype: Any, device: Any, quantization_config: Any) -> tuple[PreTrainedModel, Any]:
    """The model as `from_pretrained` has it before it reads weights, and how it would read them."""
    wanted: list[Any] = []

    def postpone(model: Any, _state_dict: Any, _files: Any, load_config: Any, *_: Any) -> tuple[None, None]:
        wanted.append(load_config)
        model._weight_conversions = []  # quantizers read what the loader leaves there
        return None, None

    real = model_class(read_config(folder))
    without_weights = {
        "__module__": real.__module__,  # or transformers takes it for custom code
        "_load_pretrained_model": staticmethod(postpone),
        "_finalize_model_loading": staticmethod(lambda *_: None),
    }
    postponed = type(real.__name__, (real,), without_weights)
    place = None if torch.device(device).type == "cpu" else {"": str(device)}
    with _quiet():
        model = postponed.from_pretrained(  # type: ignore[attr-defined]
            folder, dtype=dtype, device_map=place, quantization_config=quantization_config
        )
    model.__class__ = real
    return model, wanted[0]


def _decoder_stack(model: PreTrainedModel) -> str:
    """Name of the ModuleList of the text's decoder layers: they hold experts, or each a gated FFN."""
    stacks = sorted({_list_above(layer.name) for layer in text_layers(model)}) or _dense_stacks(model)
    name = type(model).__name__
    if not stacks:
        raise UserError(
            f"{name} has no MoE layers, nor decoder layers with an FFN `{DENSE_FFN}` of {', '.join(_GATED)}"
        )
    if len(stacks) > 1:
        raise UserError(
            f"{name} has its decoder layers in {len(stacks)} stacks ({', '.join(stacks)}), not in one",
            NOT_ONE_AT_A_TIME,
        )
    return stacks[0]


def _dense_stacks(model: PreTrainedModel) -> list[str]:
    """ModuleLists of the text model whose members all have a gated FFN; towers may have such layers too."""
    text = model.config.get_text_config().model_type
    owners: dict[str, str] = {}
    stacks = []
    for name, module in model.named_modules():
        above = owners.get(name.rpartition(".")[0], text)
        owners[name] = module.config.model_type if isinstance(module, PreTrainedModel) else above
        gated = isinstance(module, nn.ModuleList) and len(module) and all(map(_has_gated_ffn, module))
        if gated and owners[name] == text:
            stacks.append(name)
    return stacks


def _has_gated_ffn(layer: nn.Module) -> bool:
    ffn = getattr(layer, DENSE_FFN, None)
    return all(hasattr(ffn, kind) for kind in _GATED)


def _head_of(model: PreTrainedModel) -> str:
    """Name of the module that makes logits."""
    head = model.get_output_embeddings()
    return next((name for name, module in model.named_modules() if module is head), "")


def _list_above(name: str) -> str:
    """model.layers.3.mlp -> model.layers"""
    parts = name.split(".")
    while parts and not parts[-1].isdigit():
        parts.pop()
    return ".".join(parts[:-1])


def _lean(load: Any) -> Any:
    """Merge a checkpoint's per-expert matrices without copies on the way."""
    mapping = []
    for entry in load.weight_mapping or []:
        kinds = [type(op) for op in getattr(entry, "operations", ())]
        merged = kinds[:1] == [MergeModulelist] and entry.operations[0].dim == 0
        joined = kinds[1:] == [] or (kinds[1:] == [Concatenate] and entry.operations[1].dim == 1)
        if merged and joined and len(entry.target_patterns) == 1:
            sources, targets = entry._original_source_patterns, entry._original_target_patterns
            entry = entry.copy(sources, targets, operations=[FillStack()])
        mapping.append(entry)
    return replace(load, weight_mapping=mapping)


class FillStack(ConversionOps):
    """Per-expert matrices (gate and up, or one of a kind) to one stack, each copied once.

    The stock operations stack gates, stack ups and then join the two: twice the memory.
    """

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **_: Any
    ) -> dict[str, Tensor]:
        groups = [input_dict.pop(pattern) for pattern in source_patterns if pattern in input_dict]
        if len({len(group) for group in groups}) != 1:
            raise ValueError(f"{[len(group) for group in groups]} matrices for {target_patterns[0]}")
        first = [group[0] for group in groups]
        rows = [len(matrix) for matrix in first]
        filled = first[0].new_empty(len(groups[0]), sum(rows), *first[0].shape[1:])
        for expert in range(len(filled)):
            for part, group in zip(filled[expert].split(rows), groups, strict=True):
                part.copy_(group[expert])
                group[expert] = None
        return {target_patterns[0]: filled}


@dataclass
class _Files:
    """The safetensors files of a folder."""

    folder: Path
    headers: dict[str, TensorHeader]

    @contextmanager
    def slices(self, names: list[str]) -> Iterator[dict[str, Any]]:
        """name -> what reads the tensor when it is sliced: a view of the mapped file."""
        with ExitStack() as stack:
            files: dict[str, Any] = {}
            found = {}
            for name in names:
                file = self.headers[name].file
                if file not in files:
                    files[file] = stack.enter_context(safe_open(self.folder / file, framework="pt"))
                found[name] = files[file].get_slice(name)
            yield found


def _layer_of(name: str, stack: str) -> str:
    """The decoder layer that a tensor belongs to, "" for one outside the decoder layers."""
    match = re.match(rf"{re.escape(stack)}\.\d+(?=\.)", name)
    return match.group(0) if match else ""


def _towers(model: PreTrainedModel, stack: str) -> tuple[str, ...]:
    """Prefixes of what text never meets: models beside its decoder."""
    return tuple(
        f"{name}."
        for name, module in model.named_modules()
        if isinstance(module, PreTrainedModel) and not f"{stack}.".startswith(f"{name}." if name else "")
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar and no report from transformers for every layer."""
    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()
