"""A checkpoint's experts packed and written one decoder layer at a time: the packed model need not fit RAM.

Every decoder layer becomes a file of its own; so do the head and, as one, everything else. The tensors are
those that `from_pretrained(..., quantization_config=...)` and `save_pretrained` give, bit for bit; only how
they are spread over files differs. Whether the folder is whole, and what belongs beside the weights, is the
caller's business.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from moesmith.errors import UserError

from .checksums import digest
from .headers import INDEX, SINGLE, TensorHeader, read_header
from .partial import FillStack, PartialModel, _quiet

if TYPE_CHECKING:
    from moesmith.experts.quantizer import ExpertsConfig


class LayerPacker(PartialModel):
    """A model that is packed as it is read, written part by part.

    packer = LayerPacker.start(folder, ExpertsConfig("nf4"), torch.bfloat16)
    for part in packer.write(out): ...
    """

    sums: dict[str, str]
    """tensor, as the model names it -> SHA-256 of its bytes in memory, for the parts written so far"""

    @classmethod
    def start(
        cls,
        folder: str | Path,
        config: ExpertsConfig,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> Self:
        """Build the model and read what is no decoder layer and no head, vision and audio towers included.

        Raises:
            UserError: not a readable checkpoint, or a model whose layers cannot be read one at a time.
        """
        packer = cls.open(folder, dtype, device, config)
        packer.sums = {}
        return packer

    def _assign(self, headers: Mapping[str, TensorHeader]) -> None:
        super()._assign(headers)
        placed = {name for place in self._places.values() for made in place.values() for name in made}
        mapping = self._load.weight_mapping or []
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        known, prefix = self.model.state_dict(), self.model.base_model_prefix
        rest = self._places.setdefault("", {})
        for name in headers.keys() - placed:
            target, _ = rename_source_key(name, renamings, converters, prefix, known)
            if target in known:  # of a tower: text never meets it, but the model holds it
                rest.setdefault(target, []).append(name)
        for made in rest.values():
            made.sort(key=list(headers).index)

    @property
    def parts(self) -> list[str]:
        """What is written, in order: "" is all that is in no other part."""
        return [part for part in ("", *self.decoder_layers, self.head_name) if part in self._places]

    @torch.no_grad()
    def write(self, out: Path, before: Callable[[str], None] | None = None) -> Iterator[str]:
        """Write config, index and a file per part into the folder `out`; gives each part when it is written.

        Args:
            before: called with the name of a decoder layer or the head just before it is read.

        Raises:
            UserError: weights that cannot be packed or are not there, or the disk refuses.
        """
        parts, total = self.parts, 0
        files: dict[str, str] = {}
        for number, part in enumerate(parts, start=1):
            file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
            with ExitStack() as stack:
                if part:
                    if before is not None:
                        before(part)
                    stack.enter_context(self._part(part))
                tensors = self._tensors(part)
                self._refuse_damaged()
                self.sums |= {name: digest(tensor) for name, tensor in tensors.items()}
                self._save(tensors, out, file)
                del tensors
            headers = read_header(out / file)
            files |= dict.fromkeys(headers, file)
            total += sum(header.nbytes for header in headers.values())
            yield part
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}
        (out / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def _tensors(self, part: str) -> dict[str, Tensor]:
        """What `state_dict` has of a part that is in memory."""
        others = [name for name in (*self.decoder_layers, self.head_name) if name and name != part]
        tensors = {
            name: tensor
            for name, tensor in self.model.state_dict().items()
            if (name.startswith(f"{part}.") if part else not name.startswith(tuple(f"{o}." for o in others)))
            and isinstance(tensor, Tensor)
        }
        empty = [name for name, tensor in tensors.items() if tensor.is_meta]
        if empty:
            raise UserError(f"{self.folder}: the checkpoint has no {empty[0]}", "fetch it again")
        return tensors

    def _refuse_damaged(self) -> None:
        """Raise UserError for weights that are not finite."""
        damaged = self._load.hf_quantizer.damaged
        if damaged:
            raise UserError(damaged[0], "the checkpoint is damaged: fetch or convert it again")

    def _save(self, tensors: dict[str, Tensor], out: Path, file: str) -> None:
        """One file, with the names and shapes that the architecture's checkpoints have."""
        used = getattr(self.model, "_weight_conversions", None)
        self.model._weight_conversions = [_stock(entry) for entry in used or []]
        scratch = out / ".part"  # of its own: save_pretrained removes shards that it did not write
        # What a quantizer gives here goes before `state_dict=`, and stock ones give the whole model.
        quantizer = self._load.hf_quantizer
        vars(quantizer)["get_state_dict_and_metadata"] = lambda _model: (tensors, {})
        try:
            with _quiet():
                self.model.save_pretrained(scratch, max_shard_size="1000TB")
            os.replace(scratch / SINGLE, out / file)
            for beside in scratch.iterdir():  # configs, and the code of a class that is not transformers'
                os.replace(beside, out / beside.name)
        except SafetensorError as error:  # what safetensors makes of a full disk
            raise UserError(
                f"writing {out} failed: {error}", "the unfinished folder can be deleted"
            ) from None
        finally:
            del vars(quantizer)["get_state_dict_and_metadata"]
            self.model._weight_conversions = used
            shutil.rmtree(scratch, ignore_errors=True)


def _stock(entry: Any) -> Any:
    """The loader's own merging, which has a way back, for the one that `partial` put in its place."""
    operations = getattr(entry, "operations", ())
    if not any(isinstance(op, FillStack) for op in operations):
        return entry
    sources, targets = entry._original_source_patterns, entry._original_target_patterns
    merged = [MergeModulelist(dim=0), *([Concatenate(dim=1)] if len(sources) > 1 else [])]
    return entry.copy(sources, targets, operations=merged)
