"""Router rows from what a layer's FFN reads: seven ways, from token embeddings to fitted probes.

A native router has no bias: logits = x @ rows.T, with x the input of the FFN. Each estimator returns those
rows, (E, H) fp32; only their direction matters here, `fit_temperature` gives them their scale. Tokens carry
the label of the expert whose text they are from; `negatives` are (x, label) of text an expert is *not* for.
Adding one vector to every row changes no softmax and no top-k, so nothing here depends on a common part.

Which one: measured on SmolLM2-135M, text of code, arithmetic, science and Python documentation (96 documents
to fit, 48 unseen, 14k + 7k tokens, 2026-11), share of unseen tokens given to their own class:

    layer      embed   hidden   centered   lda    probe
    2 of 30    .357    .660     .667       .794   .817
    10         .270    .737     .745       .899   .910
    20         .330    .712     .710       .909   .912
    28         .416    .853     .851       .956   .960

With 4 prompts of 7 tokens per class: .27-.42, .39-.57, .40-.57, .40-.56, .40-.57 (chance is .25). Unit
norm does for `hidden` what centring is meant to do, so `centered` is no better; what helps is to know the
noise.

Shapes: T tokens, H hidden size, E experts, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

SEED_SCALE = 5.0
"""The constant that unit rows used to be multiplied with; a fitted temperature takes its place."""

NEGATIVE = 0.5
"""How much of the mean of its negatives is taken off a class mean."""

CLIP = 10.0
"""Rows longer than this many medians are shortened to it: some models have tokens of 1,000 times the norm."""

PENALTIES = (0.1, 0.03, 0.01, 0.003, 0.001)
"""L2 penalties tried by the probe, on inputs whose deviation from their mean has root mean square 1."""

PENALTY = 0.03
"""The penalty where no documents can be set aside to choose one."""

SPREAD = (0.01, 10.0)
"""Least and greatest spread of tempered logits: the root mean square around the mean of a token. Below,
a bf16 router ranks by rounding; above, one expert has all the weight and none of the gradient."""

CHUNK = 4096

Negatives = tuple[Tensor, Tensor]


def clip_rows(x: Tensor) -> Tensor:
    """x in fp32, rows longer than CLIP median norms scaled down to that: (T, H) -> (T, H)."""
    x = x.float()
    norm = torch.linalg.vector_norm(x, dim=1)
    return x * (CLIP * norm.median() / norm.clamp_min(1e-30)).clamp_max(1)[:, None]


def embed(
    embedding: Tensor, positives: Sequence[Tensor], negatives: Sequence[Tensor | None] | None = None
) -> Tensor:
    """Mean embedding of each expert's tokens less half that of its negatives, centred, unit norm: -> (E, H).

    `embedding` (V, H); `positives[e]` token ids of expert e. The rule of the first Gemma-2 builder: one
    matrix for all layers although no layer reads embeddings. The baseline, not a recommendation.
    """
    rows = torch.stack([_mean_embedding(embedding, ids) for ids in positives])
    for e, ids in enumerate(negatives or ()):
        if ids is not None and len(ids):
            rows[e] -= NEGATIVE * _mean_embedding(embedding, ids)
    return F.normalize(rows - rows.mean(dim=0), dim=1).float()


def _mean_embedding(embedding: Tensor, ids: Tensor) -> Tensor:
    """(H,) fp64; a token counts as often as it occurs, its row is read once."""
    unique, count = ids.to(embedding.device).unique(return_counts=True)
    total = torch.zeros(embedding.shape[1], dtype=torch.float64, device=embedding.device)
    for rows, n in zip(unique.split(CHUNK), count.split(CHUNK), strict=True):
        total += n.double() @ embedding[rows].double()
    return total / len(ids)


def hidden(x: Tensor, label: Tensor, num_experts: int, negatives: Negatives | None = None) -> Tensor:
    """Class means, unit norm: (T, H), (T,) -> (E, H). mergekit's rule, on the right inputs."""
    return F.normalize(_class_means(x, label, num_experts, negatives), dim=1).float()


def centered(x: Tensor, label: Tensor, num_experts: int, negatives: Negatives | None = None) -> Tensor:
    """Class means around their mean, with its direction projected out, unit norm: (T, H), (T,) -> (E, H)."""
    means = _class_means(x, label, num_experts, negatives)
    common = F.normalize(means.mean(dim=0), dim=0)
    rows = means - means.mean(dim=0)
    return F.normalize(rows - (rows @ common)[:, None] * common, dim=1).float()


def lda(x: Tensor, label: Tensor, num_experts: int, negatives: Negatives | None = None) -> Tensor:
    """Linear discriminants with a Ledoit-Wolf covariance and no bias: (T, H), (T,) -> (E, H).

    Row e is S^-1 (mu_e - mu) + c_e v. The discriminant needs the constant
    c_e = -(mu_e S^-1 mu_e - mu S^-1 mu) / 2 (equal priors), which a router cannot hold, so it rides on the
    linear functional v that is nearest to 1 on the data (least squares in the same S):
    v = S^-1 mu / (1 + mu S^-1 mu). FFN inputs have a strong mean, so v x is 1 within a few per cent.
    Measured on SmolLM2-135M, layer 10, four domains, unseen tokens: .63 without it, .90 with it, .90 with a
    true bias.
    """
    means = _class_means(x, label, num_experts, negatives)
    center = means.mean(dim=0)
    covariance = within_covariance(x, label, num_experts)
    solved = torch.cholesky_solve(
        torch.cat([means, center[None]]).T, torch.linalg.cholesky(covariance)
    ).T  # (E + 1, H): S^-1 mu_e, and S^-1 mu last
    rows, common = solved[:-1] - solved[-1], solved[-1]
    length = common @ center
    constant = -0.5 * ((solved[:-1] * means).sum(dim=1) - length)
    return (rows + constant[:, None] * (common / (1 + length))).float()


def within_covariance(x: Tensor, label: Tensor, num_experts: int) -> Tensor:
    """Pooled covariance around the class means, shrunk towards a multiple of 1: (T, H), (T,) -> (H, H) fp64.

    The weight of the shrinkage is Ledoit and Wolf's closed form (2004, J. Multivariate Analysis 88), so it
    is invertible for any T > E. Products of fp32 rows, sums in fp64.
    """
    means = _class_means(x, label, num_experts)
    size = x.shape[1]
    covariance = torch.zeros(size, size, dtype=torch.float64, device=x.device)
    fourth = torch.zeros((), dtype=torch.float64, device=x.device)
    for rows, labels in zip(x.split(CHUNK), label.split(CHUNK), strict=True):
        centred = (rows.double() - means[labels]).float()
        covariance += (centred.T @ centred).double()
        fourth += centred.double().square().sum(dim=1).square().sum()
    covariance /= len(x)
    scale = covariance.diagonal().mean()
    square = covariance.square().sum()
    error = fourth / len(x) ** 2 - square / len(x)  # E||S_n - S||^2: what the sample adds by chance
    distance = square - size * scale**2  # ||S_n - scale * 1||^2
    shrink = (error / distance.clamp_min(1e-300)).clamp(1e-6, 1)
    covariance *= 1 - shrink
    covariance.diagonal().add_(shrink * scale.clamp_min(1e-30))
    return covariance


def probe(
    x: Tensor,
    label: Tensor,
    num_experts: int,
    negatives: Negatives | None = None,
    document: Tensor | None = None,
) -> Tensor:
    """Multinomial logistic regression without bias, classes weighing equally: (T, H), (T,) -> (E, H).

    A negative of expert e counts half a token whose target is any other expert. `document` (T,) lets the
    fit choose its penalty on documents that it sets aside and takes back.
    """
    target, weight = F.one_hot(label, num_experts).float(), class_weights(label, num_experts)
    aside = None if document is None else _aside(document, label)
    if negatives is not None and num_experts > 1:
        x = torch.cat([x, negatives[0]])
        target = torch.cat([target, (1 - F.one_hot(negatives[1], num_experts).float()) / (num_experts - 1)])
        weight = torch.cat([weight, NEGATIVE * class_weights(negatives[1], num_experts)])
        if aside is not None:
            aside = torch.cat([aside, aside.new_zeros(len(negatives[0]))])

    def value(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        return -(weight * (target * logits.log_softmax(dim=1)).sum(dim=1)).sum() / weight.sum()

    return _regress(x, num_experts, value, (target, weight), aside)


def class_weights(label: Tensor, num_experts: int) -> Tensor:
    """Weights that make every class that occurs weigh the same, 1 on average: (T,) -> (T,) fp32."""
    count = torch.bincount(label, minlength=num_experts)
    return (len(label) / (count.count_nonzero() * count.clamp_min(1)))[label].float()


def fold_of(document: Tensor, group: Tensor, folds: int) -> Tensor:
    """Deal the documents of each group to `folds` in turn; whole documents: (T,), (T,) -> (T,) int64."""
    fold = torch.zeros_like(document)
    dealt: dict[int, int] = {}
    for d in document.unique().tolist():
        tokens = document == d
        g = int(group[tokens][0])
        fold[tokens] = dealt.setdefault(g, 0) % folds
        dealt[g] += 1
    return fold


def _aside(document: Tensor, group: Tensor) -> Tensor | None:
    """Every fourth document of each group, from the second on, (T,) bool; None if a group has only one."""
    aside = fold_of(document, group, 4) == 1
    return aside if group[aside].unique().equal(group.unique()) else None


def _regress(
    x: Tensor,
    num_experts: int,
    value: Callable[..., Tensor],
    targets: tuple[Tensor, ...],
    aside: Tensor | None,
) -> Tensor:
    """Rows that minimise value(logits, *targets) + an L2 penalty: (T, H) -> (E, H) fp32.

    Full-batch L-BFGS from zero: deterministic, no step size to choose. The penalty is the one of PENALTIES
    with the least value on the tokens in `aside` (T,) bool, walked from strong to weak as long as it helps,
    each from the last one's rows; then all tokens are fitted with it. About 150 passes over the tokens in
    all; twice the iterations changed unseen accuracy by less than .001. Whitened inputs were tried too: worse
    at any number of tokens (layer 10 of SmolLM2-135M, 1,472 tokens: .71 instead of .80).
    """
    scale = 1 / (x - x.mean(dim=0)).square().mean().sqrt().clamp_min(1e-30)
    rows = x.new_zeros(num_experts, x.shape[1])
    penalty = PENALTY
    if aside is not None:
        inner, outer = ([t[mask] for t in (x, *targets)] for mask in (~aside, aside))
        best = math.inf
        walked = rows
        for candidate in PENALTIES:
            walked = _minimise(inner[0], scale, walked, value, inner[1:], candidate, 15)
            seen = float(value(outer[0] @ walked.T * scale, *outer[1:]))
            if seen >= best:
                break
            best, penalty, rows = seen, candidate, walked
    return _minimise(x, scale, rows, value, targets, penalty, 40) * scale


def _minimise(
    x: Tensor,
    scale: Tensor,
    start: Tensor,
    value: Callable[..., Tensor],
    targets: Sequence[Tensor],
    penalty: float,
    iterations: int,
) -> Tensor:
    rows = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [rows],
        max_iter=iterations,
        history_size=10,
        tolerance_change=1e-6,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        total = value(x @ rows.T * scale, *targets) + 0.5 * penalty * rows.square().sum()
        total.backward()
        return total

    with torch.enable_grad():  # statistics are taken under no_grad
        optimizer.step(closure)
    return rows.detach()


def loss(x: Tensor, losses: Tensor, document: Tensor) -> Tensor:
    """Rows under which the source models together predict best: (T, H), (T, E), (T,) -> (E, H).

    `losses` are nats of the next token under each source model; tokens with a NaN are skipped. Minimised is
    the loss of the gated mixture of the sources (`mixture_loss`), so a token weighs by how much the choice
    matters, and hedging where nothing tells the sources apart is right.

    Measured on SmolLM2-135M and two fine-tunes of it (code, arithmetic), four domains, 14k tokens to fit and
    7k unseen, layer 10. Nats of the mixture at its best temperature, and of the top-1 source alone:

        objective                                   mixture   top-1
        this                                        2.301     2.323
        expected loss, sum_e gate_e loss_e          2.306     2.323
        best source, weighed by mean - best loss    2.311     2.350
        cross-entropy to softmax(-losses)           2.320     2.370
        best source, tokens weighing equally        2.341     2.450
        probe on the domains                        2.347     2.405
        equal weights; the best single source       2.396     2.547

    Layers 2 and 28 have the same order. Averaging the losses over 16 neighbouring tokens, which helps when
    planted differences are those of whole documents, made it worse here (2.309): which source wins depends on
    the token.
    """
    known = losses.isfinite().all(dim=1)
    x, losses, document = x[known], losses[known].float(), document[known]
    relative = losses - losses.mean(dim=1, keepdim=True)
    aside = _aside(document, torch.zeros_like(document))
    return _regress(x, losses.shape[1], mixture_loss, (relative,), aside)


def mixture_loss(logits: Tensor, losses: Tensor) -> Tensor:
    """Mean nats of the mixture of the sources, gated by softmax(logits): (T, E), (T, E) -> ()."""
    return -(logits.log_softmax(dim=1) - losses).logsumexp(dim=1).mean()


def random_rows(num_experts: int, hidden_size: int, seed: int) -> Tensor:
    """Unit rows in directions of chance, (E, H): a control."""
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(num_experts, hidden_size, generator=generator), dim=1)


def spread(logits: Tensor) -> float:
    """Root mean square of logits around the mean of their token: (T, E) -> scalar."""
    return float((logits - logits.mean(dim=1, keepdim=True)).double().square().mean().sqrt())


def fit_temperature(logits: Tensor, label: Tensor) -> float:
    """The scalar that makes `logits` fit the labels of tokens not fitted on: (T, E), (T,) -> scalar > 0.

    Least negative log-likelihood, classes weighing equally, with the spread of the product held within
    SPREAD. Targets are smoothed by 1 / T, so that a handful of tokens told apart without an error asks for
    confidence of about 1 - 1/T and no more.
    """
    weight = class_weights(label, logits.shape[1])
    logits = logits - logits.mean(dim=1, keepdim=True)
    target = (
        F.one_hot(label, logits.shape[1])
        .double()
        .lerp(torch.full_like(logits, 1 / logits.shape[1], dtype=torch.float64), 1 / len(label))
    )
    return _best_scale(
        lambda scale: float(
            -(weight * (target * (scale * logits.double()).log_softmax(dim=1)).sum(dim=1)).mean()
        ),
        spread(logits),
    )


def fit_mixture_temperature(logits: Tensor, losses: Tensor) -> float:
    """The scalar under which the gated sources predict best: (T, E), (T, E) nats -> scalar > 0.

    By `mixture_loss`. (The expected loss, linear in the weights, rewards no hedging: on every problem,
    planted or real, it asked for the largest scalar allowed, so it says nothing about scale.)
    """
    known = losses.isfinite().all(dim=1)
    logits, losses = logits[known].double(), losses[known].double()
    return _best_scale(lambda scale: float(mixture_loss(scale * logits, losses)), spread(logits))


def _best_scale(value: Callable[[float], float], unit: float) -> float:
    """argmin of value(scale) over SPREAD[0] <= scale * unit <= SPREAD[1]: a grid in logarithms, refined."""
    if unit == 0:
        return 1.0
    low, high = (math.log(bound / unit) for bound in SPREAD)
    for _ in range(4):  # each round narrows by 10: to about 1e-4 of the scale
        grid = [low + (high - low) * i / 20 for i in range(21)]
        seen = [value(math.exp(point)) for point in grid]
        best = seen.index(min(seen))
        low, high = grid[max(best - 1, 0)], grid[min(best + 1, 20)]
    return math.exp(grid[best])


def _class_means(x: Tensor, label: Tensor, num_experts: int, negatives: Negatives | None = None) -> Tensor:
    """(E, H) fp64, less NEGATIVE times what the expert's negatives have beside the common mean, if any.

    With the common mean in it, an expert with negatives would lose half of what all FFN inputs share, and
    with it its own tokens: in the tests' world LDA gave it none of them.
    """
    means = _means(x, label, num_experts)
    if negatives is not None:
        has = torch.bincount(negatives[1], minlength=num_experts) > 0
        means[has] -= NEGATIVE * (_means(*negatives, num_experts) - means.mean(dim=0))[has]
    return means


def _means(x: Tensor, label: Tensor, num_experts: int) -> Tensor:
    total = torch.zeros(num_experts, x.shape[1], dtype=torch.float64, device=x.device)
    for rows, labels in zip(x.split(CHUNK), label.split(CHUNK), strict=True):
        total += F.one_hot(labels, num_experts).double().T @ rows.double()  # index_add_ has no order on a GPU
    return total / torch.bincount(label, minlength=num_experts).clamp_min(1)[:, None]
