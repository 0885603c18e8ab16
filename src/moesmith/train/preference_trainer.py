"""TRL's DPOTrainer with our promises: those of `careful.py`, and two more.

- The reference is exactly the model before training. Nothing of the model is random while it trains: no
  dropout, no noise in the router (PhiMoE), so what differs from the reference is what was learned.
- Held-out figures are means over pairs, however they were batched.

TRL would copy an adapter that is on the model, or hash the whole model to keep its reference: so it is given
a stand-in for a reference model, and batches that carry the reference's log-probabilities.
"""

# B pairs, 2B sequences (all chosen, then all rejected), T positions, N of them scored, K tokens kept of each

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from torch import Tensor, nn
from torch.nn.functional import pad as pad_tensor
from trl import DPOTrainer

from moesmith import console, ranks
from moesmith.data.masks import IGNORED
from moesmith.errors import UserError

from .adapters import trainable
from .careful import Careful
from .distill import divergence
from .margins import Judged, summary
from .reference import Logps, differs
from .stack import TRAINED

KL_PAIRS, KL_TOKENS, KL_KEPT = 64, 256, 64
"""The divergence is measured on so many held-out pairs, the first so many tokens of each completion, over the
reference's so many likeliest tokens; it costs one more forward pass of these pairs in every evaluation."""


class _StandIn(nn.Module):
    """In the place of a reference model, while TRL is constructed; never asked anything."""

    def __init__(self, config: Any):
        super().__init__()
        self.config = config

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the reference's log-probabilities come with the batch")


class PreferenceTrainer(Careful, DPOTrainer):
    """See the module's docstring. `references`, by a pair's digest, is filled before training."""

    FIELDS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")

    def __init__(self, model: PeftModel, **kwargs: Any):
        plain: Any = model.get_base_model()
        self._forward_before = plain.__dict__.get("forward")
        self._start: list[tuple[nn.Parameter, Tensor]] | None = None
        self._phase = "policy"
        self._said: list[_Said] = []
        self.references: dict[str, Logps] = {}
        try:
            super().__init__(model, ref_model=_StandIn(model.config), **kwargs)  # type: ignore[arg-type]
        except (ValueError, NotImplementedError) as error:
            raise UserError(" ".join(str(error).split())) from None
        self.ref_model, self.precompute_ref_logps = None, True
        fused = plain.forward

        @functools.wraps(fused)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._pick(fused, *args, **kwargs)

        plain.forward = forward

    def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
        """Rows are tokenized and masked already."""
        return dataset

    def release(self) -> None:
        """Leave the model to others: evaluation mode, its own forward, and no hook of ours on it."""
        super().release()
        if self._forward_before is None:
            del self._plain.forward
        else:
            self._plain.forward = self._forward_before

    # --- the forward pass ---

    def _pick(
        self,
        fused: Callable[..., Any],
        *args: Any,
        fused_lm_head: bool = False,
        labels: Any = None,
        **kwargs: Any,
    ) -> Any:
        """TRL's fused forward with only the completions in the head; its fields are (2B, T-1) as ever."""
        passes, ids = self.run_state.passes, kwargs.get("input_ids", args[0] if args else ())
        if not self._spare:
            passes[self._phase] = passes.get(self._phase, 0) + len(ids)
        if not fused_lm_head:
            return fused(*args, **kwargs)
        following = labels[:, 1:]
        mask = following != IGNORED
        learned = pad_tensor(mask, (0, 1)).reshape(-1).nonzero().squeeze(1)
        with self._only(learned):
            output = fused(*args, fused_lm_head=True, shift_labels=following[mask][None], **kwargs)
        for name in self.FIELDS:
            value = getattr(output, name)
            if value is not None:
                place = mask.to(value.device)
                setattr(output, name, value.new_zeros(place.shape).masked_scatter(place, value))
        output.label_mask = mask
        return output

    @contextmanager
    def _counted_as(self, phase: str) -> Iterator[None]:
        before, self._phase = self._phase, phase
        try:
            yield
        finally:
            self._phase = before

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        taken = {key: value for key, value in inputs.items() if key not in ("rows", "spare")}
        if "ref_chosen_logps" not in taken:
            taken["ref_chosen_logps"], taken["ref_rejected_logps"] = self.reference_logps(taken)
        if self.model.training:
            self._hold_still()
        return super().compute_loss(model, taken, return_outputs, num_items_in_batch)

    def _hold_still(self) -> None:
        """Evaluation mode for all of the model but the layers that compute their activations again."""
        for module in self._plain.modules():
            module.training = bool(getattr(module, "gradient_checkpointing", False))

    # --- the reference ---

    def remember_start(self) -> None:
        """Keep the trained parameters as they are now: with these values the model is the reference."""
        self._start = [(p, p.detach().clone()) for p in trainable(self.model).values()]

    @contextmanager
    def _as_reference(self) -> Iterator[None]:
        """Within: the model before training, in evaluation mode, no gradients, the policy's autocast."""
        training = self.model.training
        self.model.eval()
        now = [p.data for p, _ in self._start or ()]
        for parameter, value in self._start or ():
            parameter.data = value
        try:
            with torch.no_grad(), self.accelerator.autocast():
                yield
        finally:
            for (parameter, _), value in zip(self._start or (), now, strict=True):
                parameter.data = value
            self.model.train(training)

    def reference_logps(self, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Summed log-probabilities (B,) of the chosen and of the rejected completions before training."""
        with self._as_reference(), self._counted_as("reference"):
            return self._logps(inputs)

    def _logps(self, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, IGNORED)
        output = self.model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], labels=labels,
            fused_lm_head=True, use_cache=False,
        )  # fmt: skip
        chosen, rejected = output.log_probs.sum(dim=1).chunk(2)
        return chosen, rejected

    def check_logps(self, batch: dict[str, Any]) -> float:
        """The log-probabilities the losses see against those from the model's own logits, on one batch.

        Returns:
            their largest difference in nats per token.

        Raises:
            UserError: the architecture does something to its logits that the fused head does not know.
        """
        inputs = self._prepare_inputs(dict(batch))
        with self._as_reference(), self._counted_as("check"):
            fused = torch.cat(self._logps(inputs)).double()
            logits = self.model(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False
            ).logits
        each = logits[:, :-1].float().log_softmax(-1).gather(-1, inputs["input_ids"][:, 1:, None])[..., 0]
        mask = inputs["completion_mask"][:, 1:]
        own, tokens = (each.double() * mask).sum(1), mask.sum(1)
        difference = float(((fused - own).abs() / tokens).max())
        if not difference <= 0.02 * max(1.0, float((own.abs() / tokens).max())):
            raise UserError(
                f"{type(self._plain).__name__}: the chunked log-probabilities are off by {difference:.2g} "
                "nats per token from those of the model's own logits",
                "this architecture changes its logits in a way TRL's fused output head does not know",
            )
        return difference

    # --- evaluation ---

    def remember_said(self, batches: Sequence[dict[str, Any]]) -> None:
        """Keep what the reference says at every position of these completions, each a batch of one pair.

        Each process keeps its share, or the first pair as a spare where it has one less than others.
        """
        mine = ranks.share(batches)
        real = len(mine)
        if batches and ranks.world() > 1:
            mine += [batches[0]] * (math.ceil(len(batches) / ranks.world()) - real)
        for number, batch in enumerate(mine):
            self._spare = number >= real
            inputs = self._prepare_inputs(dict(batch))
            for i in range(len(inputs["input_ids"])):
                line = {name: inputs[name][i : i + 1] for name in ("input_ids", "attention_mask")}
                learned = (
                    pad_tensor(inputs["completion_mask"][i, 1:], (0, 1)).nonzero().squeeze(1)[:KL_TOKENS]
                )
                with self._as_reference(), self._counted_as("kl"):
                    logits = self._logits(line, learned)
                values, tokens = logits.log_softmax(-1).topk(min(KL_KEPT, logits.shape[-1]))
                self._said.append(_Said(line, learned, tokens.int(), values, self._spare))
        self._spare = False

    def _logits(self, line: dict[str, Tensor], learned: Tensor) -> Tensor:
        with self._only(learned):
            return self.model(**line, use_cache=False).logits[0].float()

    @torch.no_grad()
    def kl(self) -> float | None:
        """KL(reference || policy) in nats per token, over the reference's likeliest tokens and "any other".

        Of the first KL_PAIRS held-out pairs, both completions of each, the first KL_TOKENS tokens; a lower
        bound of the KL over the whole vocabulary. None without held-out pairs.
        """
        total, positions = 0.0, 0
        for said in self._said:
            self._spare = said.spare
            with self._counted_as("kl"), self.accelerator.autocast(), self.compute_loss_context_manager():
                logits = self._logits(said.line, said.learned)
            each = divergence(logits, said.tokens.long(), said.logprobs)
            if not said.spare:
                total, positions = total + float(each.double().sum()), positions + len(each)
        self._spare = False
        if self.together:
            total, positions = ranks.add(torch.tensor([total, positions], dtype=torch.float64)).tolist()
        return total / positions if positions else None

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, Any]:
        """Means over held-out pairs, one pair at a time, so that nothing depends on how they are batched.

        Raises:
            UserError: before the first step the margins are not 0: the cached reference is not this model.
        """
        started = time.time()
        self.model.eval()
        seen, found = self._metrics["eval"], []
        for batch in self.get_eval_dataloader(eval_dataset):
            inputs = self._prepare_inputs(batch)
            seen.clear()
            self._spare = "spare" in inputs
            with torch.no_grad(), self._counted_as("evaluation"):
                loss = self.compute_loss(self.model, inputs)
            if self._spare:
                self._spare = False
                continue
            chosen, rejected = inputs["completion_mask"].sum(dim=1).tolist()
            found.append(
                Judged(
                    loss=float(loss),
                    reward_chosen=seen["rewards/chosen"][0],
                    reward_rejected=seen["rewards/rejected"][0],
                    logps_chosen=seen["logps/chosen"][0],
                    logps_rejected=seen["logps/rejected"][0],
                    length_chosen=chosen,
                    length_rejected=rejected,
                )
            )
        seen.clear()
        if self.together:
            found = ranks.in_order(ranks.gather(found))
        if self.state.global_step == 0:
            self._check_start(found)
        values = {**summary(found, self.loss_types), "kl": self.kl()}
        metrics: dict[str, Any] = {f"{metric_key_prefix}_{name}": value for name, value in values.items()}
        metrics[f"{metric_key_prefix}_seconds"] = round(time.time() - started, 3)
        self._evaluated(metrics)
        return metrics

    def _check_start(self, found: Sequence[Judged]) -> None:
        """Before the first step the policy is the reference: every log-probability must be the cached one."""
        for pair in found:
            for now, reward in (
                (pair.logps_chosen, pair.reward_chosen), (pair.logps_rejected, pair.reward_rejected),
            ):  # fmt: skip
                if differs(now - reward / self.beta, now):
                    raise UserError(
                        f"before training, an answer's log-probability is {now:.2f}, its reference's "
                        f"{now - reward / self.beta:.2f}: the reference is not this model",
                        "remove the folder of dpo.reference_cache and start again",
                    )
        off = max(abs(pair.margin) for pair in found) / self.beta
        if off > 1e-3:
            console.warn(f"margins before training are up to {off:.2g} nats instead of 0: rounding")

    def num_tokens(self) -> int:
        return self.run_state.tokens if ranks.is_main() else 0  # they are counted over all processes

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        seen = self._metrics["train"]
        if "num_tokens" in seen:  # TRL counts from the start of the session
            seen["num_tokens"] = [self.run_state.tokens]
        super().log(logs, start_time)

    # --- checkpoints ---

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Only the trained adapter: what is frozen under it comes back with the model."""
        if not self.args.should_save:
            return
        model: Any = self.accelerator.unwrap_model(self.model)
        gathered: dict[str, Any] = {} if state_dict is None else {"state_dict": state_dict}
        model.save_pretrained(
            output_dir or self.args.output_dir, selected_adapters=[TRAINED], save_embedding_layers=False,
            **gathered,
        )  # fmt: skip

    def _load_weights(self, checkpoint: str, model: nn.Module | None = None) -> None:
        """Only the trained adapter; which adapters are active and what is trained stay as they are."""
        if self.is_fsdp_enabled:
            super()._load_weights(checkpoint, model)
            return
        target: Any = self.accelerator.unwrap_model(model or self.model)
        weights = load_peft_weights(checkpoint, device="cpu")
        loaded = set_peft_model_state_dict(target, weights, adapter_name=TRAINED)
        if loaded.unexpected_keys:
            raise UserError(
                f"{checkpoint} has weights of another adapter, {loaded.unexpected_keys[0]}",
                "--overwrite starts anew",
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        mine = self.run_state.passes
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        before = self.run_state.passes if ranks.is_main() else {}  # of all processes together
        self.run_state.passes = {k: mine.get(k, 0) + before.get(k, 0) for k in {**mine, **before}}


@dataclass
class _Said:
    """What the reference says after each token of a completion."""

    line: dict[str, Tensor]
    learned: Tensor
    tokens: Tensor
    """(N, K) its likeliest next tokens"""
    logprobs: Tensor
    """(N, K) fp32"""
    spare: bool = False
    """another process counts it"""
