"""One optimizer step over several processes: rows, loss and log are those of a run in one process.

Each process takes every N-th of the `grad_accum` forward passes of a step, so a step sees the same rows
however many processes there are, and the sum of what they do is the step of one process but for the order of
additions. A process that has nothing left while another still has gets a spare
batch, one row whose loss counts for nothing: sharded weights want as many forward passes from everyone.

TRL gathers its metrics in every forward pass; here each process keeps its own and they meet once per log.
"""

# N shares: processes with different rows. Processes of one expert-parallel group have the same rows.

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import transformers
from accelerate import PartialState
from accelerate.data_loader import DataLoaderShard
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, str_to_bool
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from moesmith import ranks
from moesmith.errors import UserError

from .batches import Share, WithSpares


class Together(transformers.Trainer):
    """See the module's docstring. In a single process it does nothing.

    Args:
        window: forward passes of one optimizer step, in all processes together.
    """

    _metrics: dict[str, Any]  # TRL's: mode -> name -> one value per forward pass since the last log

    def __init__(self, *args: Any, window: int, **kwargs: Any):
        self._step_passes = self._window_passes = window
        self._spare = False
        self.unused: list[str] = []
        """trainable tensors of modules that the model never runs"""
        super().__init__(*args, **kwargs)

    @property
    def together(self) -> bool:
        """Whether there are several processes."""
        return self.accelerator.num_processes > 1

    @property
    def shares(self) -> tuple[int, int]:
        """How many processes have different rows, and which of them this one is."""
        same = self.get_tp_size()
        return self.accelerator.num_processes // same, self.accelerator.process_index // same

    # --- rows ---

    def get_train_dataloader(self) -> Any:
        return self._share_of(super().get_train_dataloader(), self._window_passes)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        return self._share_of(super().get_eval_dataloader(eval_dataset), self.shares[0])

    def _share_of(self, loader: Any, window: int) -> Any:
        """This process's part of what a single process would read, in place of accelerate's own split.

        accelerate repeats rows until every process has as many: a row that counts twice is another loss.
        """
        if not self.together:
            return loader
        everything = getattr(loader.batch_sampler, "batch_sampler", loader.batch_sampler)
        return DataLoaderShard(
            WithSpares(loader.dataset),
            device=loader.device,
            batch_sampler=Share(everything, window, *self.shares),
            collate_fn=loader.collate_fn,
            num_workers=loader.num_workers,
            pin_memory=loader.pin_memory,
            _drop_last=True,  # nothing was added that would have to be cut from what is gathered
        )

    # --- a step ---

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        samples, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.together:
            mine = torch.tensor(float(sum("spare" not in batch for batch in samples)))
            self._step_passes = int(ranks.add(mine)) // self.get_tp_size()
        return samples, items

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        if not self.together:
            return super().training_step(model, inputs, num_items_in_batch)
        # What a loss that is a mean over forward passes is divided by; gradients are averaged over processes.
        self.current_gradient_accumulation_steps: Any = self._step_passes / self.shares[0]
        self._spare = bool(inputs.pop("spare", False))
        metrics = self._metrics["train"]
        before = {name: len(values) for name, values in metrics.items()}
        tokens = getattr(self, "_total_train_tokens", 0)
        try:
            loss = super().training_step(model, inputs, num_items_in_batch)
        finally:
            if self._spare:
                self._total_train_tokens = tokens
                for name in metrics:
                    metrics[name] = metrics[name][: before.get(name, 0)]
            self._spare = False
        return loss

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        with self._alone(), self.compute_loss_context_manager():
            loss = super().compute_loss(model, inputs, *args, **kwargs)
        return loss * 0 if self._spare else loss

    def compute_loss_context_manager(self) -> ExitStack:
        """With autocast where the weights are split: accelerate puts it around any other model's forward."""
        stack = super().compute_loss_context_manager()
        if isinstance(self.model, FSDPModule) and self.args.bf16:
            stack.enter_context(torch.autocast(self.args.device.type, torch.bfloat16))
        return stack

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Within: TRL's metrics are this process's own."""
        if not self.together:
            yield
            return
        accelerator: Any = self.accelerator
        accelerator.gather = accelerator.gather_for_metrics = lambda value: value
        try:
            yield
        finally:
            del accelerator.gather, accelerator.gather_for_metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.together:
            self._merge_metrics("train" if self.model.training else "eval")
        super().log(logs, start_time)

    def _merge_metrics(self, mode: str) -> None:
        """The values of all processes, in the order in which a single one would have met them."""
        mine = self._metrics[mode]
        parts = ranks.gather(
            {**mine, "num_tokens": [self.num_tokens()]} if "num_tokens" in mine else dict(mine)
        )
        parts = parts[:: self.get_tp_size()]
        mine.clear()
        for name in dict.fromkeys(name for part in parts for name in part):
            values = ranks.in_order([part.get(name, []) for part in parts])
            mine[name] = [sum(values)] if name == "num_tokens" else values

    def num_tokens(self) -> float:
        """Tokens that this process adds to those of the log."""
        return getattr(self, "_total_train_tokens", 0)

    def dropped_rows(self, *rows: list[int]) -> list[list[int]]:
        """The same lists of row numbers, of all processes."""
        parts = ranks.gather(rows)[:: self.get_tp_size()]
        return [[row for part in parts for row in part[i]] for i in range(len(rows))]

    # --- the model ---

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        """What is trained keeps its dtype, and DDP compares and sends only that.

        The rest comes from the same files everywhere. accelerate would make 16-bit adapters float32 before it
        splits a model, unless it thinks that nothing is cast.
        """
        model: Any = self.model
        state: Any = self.accelerator.state
        precision = state._mixed_precision
        if self.is_fsdp_enabled:
            state._mixed_precision = "no"
        elif self.together:
            frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
            buffers = [name for name, _ in model.named_buffers()]
            model._ddp_params_and_buffers_to_ignore = [*frozen, *buffers]
        try:
            return super()._prepare_for_training(*args, **kwargs)
        finally:
            state._mixed_precision = precision
            model.__dict__.pop("_ddp_params_and_buffers_to_ignore", None)

    @contextmanager
    def freezing_unused(self) -> Iterator[None]:
        """Around a forward pass: adapters on modules that do not run are frozen: DDP would wait for them."""
        if not self.together:
            yield
            return
        ran: set[str] = set()
        hooks = [
            module.register_forward_hook(lambda *_, name=name: ran.add(name))
            for name, module in self.model.named_modules()
            if isinstance(module, BaseTunerLayer)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and name.partition(".lora_")[0] not in ran:
                parameter.requires_grad_(False)
                self.unused.append(name)

    def create_accelerator_and_postprocess(self) -> None:
        """FSDP2 between CPUs too, which accelerate leaves to DDP without a word; and as one process computes.

        Weights are cast by autocast alone, never when they are gathered: a cast of everything to 16 bits
        would round the scales of the packed experts too.
        """
        from torch.distributed.fsdp import MixedPrecisionPolicy

        super().create_accelerator_and_postprocess()
        state: Any = self.accelerator.state
        plugin = getattr(state, "fsdp_plugin", None)
        if state.distributed_type == DistributedType.MULTI_CPU and str_to_bool(
            os.environ.get("ACCELERATE_USE_FSDP", "false")
        ):
            plugin = FullyShardedDataParallelPlugin(**(self.args.fsdp_plugin_args or {}))
            # also where every new AcceleratorState, such as that of the optimizer, takes it from
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            state.fsdp_plugin, state.distributed_type = plugin, DistributedType.FSDP
            self.is_fsdp_enabled = True
        if plugin is None:
            return
        if getattr(plugin, "fsdp_version", 1) != 2:
            raise UserError(
                "accelerate's configuration asks for FSDP 1, which cannot hold packed weights",
                "set fsdp_version: 2 there, or leave FSDP to train.sharding=fsdp2",
            )
        if plugin.cpu_ram_efficient_loading:
            raise UserError(
                "accelerate's configuration asks for weights on one process only while the model is loaded",
                "set fsdp_cpu_ram_efficient_loading: false there; packed weights are small",
            )
        plugin.mixed_precision_policy = MixedPrecisionPolicy()


def local_passes(window: int, shares: int) -> int:
    """Forward passes of one process in a step of `window`, spare ones included."""
    return math.ceil(window / shares)


def gathered(model: nn.Module) -> dict[str, Tensor] | None:
    """The adapters' tensors whole and on the CPU, by name, where they are split over processes; else None.

    Every process has to call it.
    """
    tensors = {name: p for name, p in model.named_parameters() if ".lora_" in name}
    if not any(isinstance(p, DTensor) for p in tensors.values()):
        return None
    whole = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in tensors.items()}
    return {name: tensor.detach().cpu() for name, tensor in whole.items()}
