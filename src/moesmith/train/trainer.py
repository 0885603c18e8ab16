"""TRL's SFTTrainer with our promises: those of `careful.py`, and a held-out loss that is a mean over tokens.

The held-out loss is the mean over all held-out tokens, however they were batched.
The loss is TRL's fused output head: per-token log-probabilities in float32 from tiles of the vocabulary, so
logits are never whole. TRL scores every position on a CPU; here only the learned ones reach the head.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from trl import SFTTrainer

from moesmith import ranks
from moesmith.data.masks import IGNORED
from moesmith.errors import UserError

from .careful import Careful, NonFinite, RunState

__all__ = ["NonFinite", "RunState", "Trainer"]


class Trainer(Careful, SFTTrainer):
    """See the module's docstring."""

    # --- the loss ---

    @contextmanager
    def _scoring(self, inputs: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The batch without what the model does not take, and the hook told which positions are learned."""
        taken = {key: value for key, value in inputs.items() if key not in ("learned", "rows", "spare")}
        with self._only(inputs["learned"].to(self.args.device)):
            yield taken

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        with self._scoring(inputs) as taken:
            return super().compute_loss(model, taken, *args, **kwargs)

    @torch.no_grad()
    def check_loss(self, batch: dict[str, Any]) -> float:
        """The fused head against cross entropy of the model's own logits, on one batch.

        Returns:
            their difference in nats per token.

        Raises:
            UserError: the architecture does something to its logits that the fused head does not know.
        """
        training = self.model.training
        self.model.eval()
        inputs = self._prepare_inputs(dict(batch))
        with self.compute_loss_context_manager():
            fused, tokens = self._summed_loss(self.model, inputs)
            names = ("input_ids", "attention_mask", "position_ids")
            logits = self.model(**{n: inputs[n] for n in names if n in inputs}, use_cache=False).logits
        chosen = logits.reshape(-1, logits.shape[-1])[inputs["learned"]].float()
        own = cross_entropy(chosen, inputs["shift_labels"][0])
        self.model.train(training)
        difference = abs(float(own) - float(fused) / tokens)
        if not difference <= 0.02 * max(1.0, abs(float(own))):
            raise UserError(
                f"{type(self._plain).__name__}: the chunked loss is {float(fused) / tokens:.4f}, "
                f"cross entropy of the model's own logits is {float(own):.4f}",
                "this architecture changes its logits in a way TRL's fused output head does not know",
            )
        return difference

    def _summed_loss(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, int]:
        """Summed negative log-likelihood of a batch's learned tokens, and how many they are."""
        with self._scoring(inputs) as taken:
            outputs = model(**taken, fused_lm_head=True, use_cache=False)
        return -outputs.log_probs.double().sum(), int((inputs["shift_labels"] != IGNORED).sum())

    # --- evaluation ---

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Mean loss over all held-out tokens, in float64."""
        started = time.time()
        model = self._wrap_model(self.model, training=False)
        model.eval()
        total = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        with torch.no_grad():
            for batch in self.get_eval_dataloader(eval_dataset):
                inputs = self._prepare_inputs(batch)
                with self.compute_loss_context_manager():
                    loss, tokens = self._summed_loss(model, inputs)
                total += torch.stack(
                    [loss, torch.tensor(float(tokens), dtype=torch.float64, device=total.device)]
                )
        loss_sum, token_sum = (ranks.add(total.cpu()) / self.get_tp_size()).tolist()
        metrics = {
            f"{metric_key_prefix}_loss": loss_sum / token_sum,
            f"{metric_key_prefix}_tokens": int(token_sum),
            f"{metric_key_prefix}_seconds": round(time.time() - started, 3),
        }
        self._evaluated(metrics)
        return metrics
