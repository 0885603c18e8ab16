"""Fit routers layer by layer while a dense model streams by, and measure each on text it has not seen.

    fit = RouterFit(texts, num_experts, ["probe", "embed"], embedding)
    capture(folder, [*texts, *negatives], fit.visit, state)
    routers = fit.routers()             # routers.weights["probe"][layer]: (E, H) fp32, temperature inside

Every method is fitted from the same inputs in the one pass; what stays of a layer are (E, H) rows and a few
figures. The first token of a text is left out of fits and figures: it has read nothing, and in many models
it is an attention sink with an input of its own kind.

What is measured, and the temperature, come from tokens that were not fitted on (facts["measured_on"]):
- "held-out documents": texts with `fit=False`, where they cover every expert;
- "left-out documents": otherwise each document (in up to FOLDS groups) is judged by rows fitted without it
  (pieces of one row of text are one document),
  which is what four prompts per expert allow. Prompts of one hand are alike: SmolLM2-135M with 4 prompts of
  7 tokens in each of 4 domains said .53-.67 for the probe where long unseen text gave .40-.57;
- "fitted tokens": where an expert has a single document. Then the temperature is held to a spread of 1,
  since few tokens and many dimensions are always told apart.
Rows are centred over the experts, which changes no softmax and no top-k, and keeps logits exact in bf16:
their common part can be 100 times what tells experts apart.
"""

# T tokens, H hidden size, E experts, V vocabulary

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moesmith.build import estimators
from moesmith.data.pieces import row_numbers
from moesmith.errors import UserError

if TYPE_CHECKING:
    from moesmith.build.capture import LayerInputs, Text

METHODS = ("embed", "hidden", "centered", "lda", "probe", "loss", "random")

TOKEN_LIMIT = 20_000
"""Tokens of a layer that are fitted on, and that are judged on; of more, every n-th is taken."""

FOLDS = 4

HELD_OUT, LEFT_OUT, FITTED = "held-out documents", "left-out documents", "fitted tokens"

MOMENTS = {"hidden": estimators.hidden, "centered": estimators.centered, "lda": estimators.lda}

UNSURE = 1.0
"""Greatest spread of the logits when the temperature had to be fitted on fitted tokens."""


@dataclass
class Routers:
    """Rows per method and layer, (E, H) fp32 with the temperature multiplied in, and what was measured."""

    weights: dict[str, list[Tensor]]
    temperature: dict[str, list[float]]
    facts: dict[str, Any]


@dataclass
class _Tokens:
    """Tokens of one layer, on the device they are fitted on."""

    x: Tensor
    """(T, H) fp32"""
    label: Tensor
    document: Tensor
    """(T,) index into the texts"""
    row: Tensor
    """(T,) the same for pieces of one row of text: what may not be on both sides of a judgement"""
    losses: Tensor | None
    """(T, E)"""

    def take(self, mask: Tensor) -> _Tokens:
        """Copies of the tokens in `mask`, every n-th where there are more than TOKEN_LIMIT."""
        index = mask.nonzero()[:, 0]
        index = index[:: max(1, -(-len(index) // TOKEN_LIMIT))]
        losses = None if self.losses is None else self.losses[index]
        return _Tokens(
            self.x[index].float(), self.label[index], self.document[index], self.row[index], losses
        )


class RouterFit:
    """Collects routers layer by layer; `visit` is what `capture` calls.

    `embedding` (V, H): of the base. `losses` (T, E): nats of the next token under each source model, one row
    for each row of LayerInputs.inputs, NaN where unknown. `negatives`: texts an expert (their label) is not
    for, captured after `texts`. Texts of label -1 serve `loss` alone.

    Raises:
        UserError: an unknown method, an expert without text, `loss` without losses.
    """

    def __init__(
        self,
        texts: Sequence[Text],
        num_experts: int,
        methods: Sequence[str],
        embedding: Tensor,
        losses: Tensor | None = None,
        negatives: Sequence[Text] | None = None,
        seed: int = 0,
    ):
        unknown = [method for method in methods if method not in METHODS]
        if unknown:
            raise UserError(f"unknown routing method {unknown[0]!r}", f"known: {', '.join(METHODS)}")
        if "loss" in methods and losses is None:
            raise UserError("route: loss needs the per-token losses of every source model, got none")
        self.texts = list(texts)
        self.negatives = list(negatives or ())
        self.num_experts = num_experts
        self.methods = [method for method in METHODS if method in methods]  # random last: it copies a norm
        self.embedding = embedding
        self.losses = losses
        self.seed = seed
        everything = [*self.texts, *self.negatives]
        self._label = torch.tensor([text.label for text in everything], dtype=torch.int64)
        self._row = torch.tensor(row_numbers(f"{text.domain}\n{text.id}" for text in everything))
        self._fit = torch.tensor([text.fit for text in everything], dtype=torch.bool)
        self._negative = torch.arange(len(everything)) >= len(self.texts)
        self._embed: dict[tuple[int, ...], Tensor] = {}
        self._weights: dict[int, dict[str, Tensor]] = {}
        self._figures: dict[int, dict[str, dict[str, Any]]] = {}
        self._clipped: dict[int, int] = {}
        self._facts: dict[str, Any] = {}
        if set(self.methods) - {"loss", "random"}:
            self._want_text_for_every_expert()

    def _want_text_for_every_expert(self) -> None:
        has = {text.label for text in self.texts if text.fit and len(text.ids) > 1}
        missing = [e for e in range(self.num_experts) if e not in has]
        if missing:
            raise UserError(
                f"no text to fit the router of expert {', '.join(map(str, missing))}, wanted at least one of "
                "two tokens for each",
                "give every expert positive_prompts or a corpus",
            )

    @torch.no_grad()
    def visit(self, inputs: LayerInputs) -> None:
        """Fit every method to one layer.

        Raises:
            UserError: the inputs hold NaN or infinity, or no token to fit on.
        """
        device = inputs.inputs.device
        document = inputs.document.to(device)
        if not inputs.inputs.isfinite().all():
            bad = int((~inputs.inputs.isfinite().all(dim=1)).sum())
            raise UserError(
                f"the FFN of layer {inputs.layer} reads NaN or infinity at {bad} of {len(document)} tokens",
                "try a wider dtype (bfloat16 or float32) for the base model",
            )
        losses = None
        if self.losses is not None:
            if self.losses.shape != (len(document), self.num_experts):
                raise ValueError(
                    f"losses are {tuple(self.losses.shape)}, wanted {(len(document), self.num_experts)}"
                )
            losses = self.losses.to(device)
        label, row = (of_text.to(device)[document] for of_text in (self._label, self._row))
        tokens = _Tokens(inputs.inputs, label, document, row, losses)
        usable = inputs.position.to(device) > 0
        fitted, negative = (mask.to(device)[document] for mask in (self._fit, self._negative))
        fit = tokens.take(usable & fitted & ~negative)
        unseen = tokens.take(usable & ~fitted & ~negative)
        against = tokens.take(usable & negative) if negative.any() else None
        if not len(fit.x):
            raise UserError(
                f"none of {len(self.texts)} texts to fit has a second token", "give the experts more text"
            )
        self._describe(inputs.layer, fit, unseen, int((~usable).sum()))
        fit.x = estimators.clip_rows(fit.x)
        if against is not None:
            against.x = estimators.clip_rows(against.x)
        weights: dict[str, Tensor] = {}
        figures: dict[str, dict[str, Any]] = {}
        self._weights[inputs.layer], self._figures[inputs.layer] = weights, figures
        for method in self.methods:
            began = time.perf_counter()
            if method == "random":
                rows, temperature = self._random(inputs.layer, fit, weights), 1.0
                judged, measured_on = (unseen, HELD_OUT) if len(unseen.x) else (fit, FITTED)
                logits = judged.x @ rows.T
            else:
                rows, judged, logits, measured_on = self._fit_method(method, fit, unseen, against)
                temperature = self._temperature(method, judged, logits, measured_on)
            rows = temperature * rows
            weights[method] = (rows - rows.mean(dim=0)).float().cpu()
            figures[method] = {
                **self._judge(method, judged, logits, temperature),
                "temperature": temperature,
                "measured_on": measured_on,
                "seconds": time.perf_counter() - began,
            }

    def routers(self) -> Routers:
        """Everything fitted so far, layers in order."""
        layers = sorted(self._weights)
        assert layers == list(range(len(layers))), f"layers {layers} were visited"
        figures = [self._figures[layer] for layer in layers]
        fitted = [method for method in self.methods if method != "random"] or self.methods
        measured_on = sorted({layer[method]["measured_on"] for layer in figures for method in fitted})
        return Routers(
            weights={m: [self._weights[layer][m] for layer in layers] for m in self.methods},
            temperature={m: [layer[m]["temperature"] for layer in figures] for m in self.methods},
            facts={
                **self._facts,
                "clipped_tokens": [self._clipped[layer] for layer in layers],
                "measured_on": ", ".join(measured_on),
                "layers": figures,
            },
        )

    def _describe(self, layer: int, fit: _Tokens, unseen: _Tokens, first: int) -> None:
        """Note how many tokens there are; the same in every layer, but for those with huge norms."""
        norm = torch.linalg.vector_norm(fit.x, dim=1)
        self._clipped[layer] = int((norm > estimators.CLIP * norm.median()).sum())
        self._facts = {
            "experts": self.num_experts,
            "fitted_tokens": self._per_expert(fit),
            "unseen_tokens": self._per_expert(unseen),
            "first_tokens_left_out": first,
            "token_limit": TOKEN_LIMIT,
            "negatives": len(self.negatives),
        }

    def _per_expert(self, tokens: _Tokens) -> list[int]:
        labelled = tokens.label[tokens.label >= 0]
        return torch.bincount(labelled, minlength=self.num_experts).tolist()

    def _fit_method(
        self, method: str, fit: _Tokens, unseen: _Tokens, against: _Tokens | None
    ) -> tuple[Tensor, _Tokens, Tensor, str]:
        """(E, H) rows, tokens to judge by, (T, E) logits of those from rows that have not seen them, and
        where they are from."""
        train, judged = self._serving(method, fit), self._serving(method, unseen)
        if not len(train.x):
            raise UserError(f"route: {method} has no token to fit on", "give the experts more text")
        rows = self._rows(method, train, against)
        covered = len(judged.x) > 0 if method == "loss" else all(self._per_expert(judged))
        if covered:
            return rows, judged, judged.x @ rows.T, HELD_OUT
        fold = estimators.fold_of(train.row, train.label, FOLDS)
        if method == "loss":
            possible = fold.unique().numel() > 1
        else:
            possible = all(torch.bincount(train.label[fold == 1], minlength=self.num_experts).tolist())
        if not possible:
            return rows, train, train.x @ rows.T, FITTED
        logits = torch.empty(len(train.x), self.num_experts, device=train.x.device)
        for number in fold.unique().tolist():
            out = fold == number
            logits[out] = train.x[out] @ self._rows(method, train.take(~out), against).T
        return rows, train, logits, LEFT_OUT

    def _serving(self, method: str, tokens: _Tokens) -> _Tokens:
        """The tokens that a method can use: with a label, or with losses."""
        if method == "loss":
            assert tokens.losses is not None
            mask = tokens.losses.isfinite().all(dim=1)
        else:
            mask = tokens.label >= 0
        return tokens if mask.all() else tokens.take(mask)

    def _rows(self, method: str, tokens: _Tokens, against: _Tokens | None) -> Tensor:
        """(E, H) fp32, before the temperature."""
        negatives = None if against is None else (against.x, against.label)
        if method == "embed":
            return self._embed_rows(tokens.document).to(tokens.x.device)
        if method == "loss":
            assert tokens.losses is not None
            return estimators.loss(tokens.x, tokens.losses, tokens.row)
        if method == "probe":
            return estimators.probe(tokens.x, tokens.label, self.num_experts, negatives, tokens.row)
        return MOMENTS[method](tokens.x, tokens.label, self.num_experts, negatives)

    def _embed_rows(self, document: Tensor) -> Tensor:
        """From all tokens of these documents: no FFN input is read, so the first token counts too."""
        documents = tuple(document.unique().tolist())
        if documents not in self._embed:
            ids: list[list[int]] = [[] for _ in range(self.num_experts)]
            against: list[list[int]] = [[] for _ in range(self.num_experts)]
            for d in documents:
                ids[self.texts[d].label] += self.texts[d].ids
            for text in self.negatives:
                against[text.label] += text.ids
            self._embed[documents] = estimators.embed(
                self.embedding, [torch.tensor(i) for i in ids], [torch.tensor(i) for i in against]
            )
        return self._embed[documents]

    def _random(self, layer: int, fit: _Tokens, weights: dict[str, Tensor]) -> Tensor:
        """Rows as long as the probe's are in the median, tempered; of the next method if there is no probe;
        with logits of spread 1 if there is none at all."""
        rows = estimators.random_rows(self.num_experts, fit.x.shape[1], self.seed * 1_000_003 + layer)
        rows = rows.to(fit.x.device)
        for method in ("probe", "loss", "lda", "centered", "hidden", "embed"):
            if method in weights:
                return rows * float(weights[method].norm(dim=1).median())
        return rows / max(estimators.spread(fit.x @ rows.T), 1e-30)

    def _temperature(self, method: str, judged: _Tokens, logits: Tensor, measured_on: str) -> float:
        if method == "loss":
            assert judged.losses is not None
            temperature = estimators.fit_mixture_temperature(logits, judged.losses)
        else:
            temperature = estimators.fit_temperature(logits, judged.label)
        if measured_on == FITTED:
            temperature = min(temperature, UNSURE / max(estimators.spread(logits), 1e-30))
        return temperature

    def _judge(self, method: str, judged: _Tokens, logits: Tensor, temperature: float) -> dict[str, Any]:
        """Accuracy, and nats of the labels before (unit rows: at SEED_SCALE) and after the temperature, per
        token with classes weighing equally (so that chance is 1/E for any amounts of text); spread of the
        logits; nats of the mixture of the sources and what they are with equal weights, where the losses are
        known."""
        found: dict[str, Any] = {
            "tokens": len(judged.x),
            "accuracy": None,
            "nll_before": None,
            "nll": None,
            "spread": temperature * estimators.spread(logits),
        }
        labelled = judged.label >= 0
        if labelled.any():
            label, z = judged.label[labelled], logits[labelled].double()
            weight = estimators.class_weights(label, self.num_experts)
            before = estimators.SEED_SCALE if method in ("embed", "hidden", "centered") else 1.0
            found["accuracy"] = float((weight * (z.argmax(dim=1) == label)).double().mean())
            for key, scale in (("nll_before", before), ("nll", temperature)):
                found[key] = float((weight * F.cross_entropy(scale * z, label, reduction="none")).mean())
        if judged.losses is not None:
            known = judged.losses.isfinite().all(dim=1)
            losses, z = judged.losses[known].double(), logits[known].double()
            if len(losses):
                found["mixture_loss"] = float(estimators.mixture_loss(temperature * z, losses))
                found["uniform_mixture_loss"] = float(estimators.mixture_loss(0 * z, losses))
        return found
