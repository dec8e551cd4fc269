"""`dpo_from_logits`: DPO with a per-token KL penalty from logits, fused down to the loss.

The forward has two launches: the scores of policy and reference, and everything else up to the loss. The backward has
one. `linear_dpo` starts from log-probs of tokens and uses only the second launch.
"""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
from torch import Tensor

from fused_po import checks
from fused_po.backend import choose as backends
from fused_po.backend.interface import Backend, DPORow, PairRow, Scaling, stats_dtype
from fused_po.ops.autograd import public
from fused_po.ops.dpo_loss import DPOLoss, check_loss, check_stacked
from fused_po.ops.kl import KLStats, kl_from_logits
from fused_po.ops.register import custom_op, differentiable
from fused_po.ops.rows import GradientOps, as_rows, empty_gradient, on_rows
from fused_po.reference.dpo import dpo_token_gradient


class DPOOutput(NamedTuple):
    """The result of a fused DPO loss for B pairs, fp32 (float64 for float64 inputs).

    loss: scalar, mean(losses) + kl_coef * kl. loss, losses, chosen_logps and rejected_logps have gradients.
    losses: [B], the DPO loss of each pair.
    chosen_logps, rejected_logps: [B], log-probs of the answers under the policy, summed over tokens.
    chosen_rewards, rejected_rewards: [B], the implicit rewards beta * (log pi - log pi_ref).
    margins: [B], chosen_rewards - rejected_rewards. accuracy: [B], 1 where the margin is > 0, else 0.
    kl: scalar, the mean of kl_per_token [2B, T] over scored tokens. Both are None if the argument `kl` is None.
    """

    loss: Tensor
    losses: Tensor
    chosen_logps: Tensor
    rejected_logps: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    margins: Tensor
    accuracy: Tensor
    kl: Optional[Tensor]
    kl_per_token: Optional[Tensor]


class DPOResults(NamedTuple):
    """The results of the ops: those for callers, then separate tensors for the backward."""

    loss: Tensor
    losses: Tensor
    chosen_logps: Tensor
    rejected_logps: Tensor
    mean_kl: Tensor
    kl_tokens: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    margins: Tensor
    accuracy: Tensor
    pairs: Tensor  # [PairRow.COUNT, B]
    tokens: Tensor  # [DPORow.COUNT, N]
    weights: Tensor  # [2]: d loss / d one pair's loss, / d one token's KL


METRICS = PairRow.CHOSEN_REWARD, PairRow.REJECTED_REWARD, PairRow.MARGIN, PairRow.ACCURACY


class DPOSettings(NamedTuple):
    """How the loss is computed from log-probs of tokens."""

    loss: DPOLoss
    ignore_index: int
    backend: str


class DPOLogitsSettings(NamedTuple):
    """How the loss is computed from logits."""

    loss: DPOLoss
    scaling: Scaling
    ignore_index: int
    inplace_backward: bool
    backend: str

    @property
    def gradient(self) -> DPOGradientSettings:
        """How its gradient in the logits is formed."""
        return DPOGradientSettings(self.loss.kl, self.scaling, self.backend)


class DPOGradientSettings(NamedTuple):
    """How the gradient in the logits is formed."""

    kl: Optional[str]
    scaling: Scaling
    backend: str


def _finish(
    run: Backend, tokens: Tensor, labels: Tensor, ref_sums: Optional[Tensor], loss: DPOLoss, ignore_index: int
) -> DPOResults:
    """From per-token log-probs to the results."""
    losses, sequences, pairs, kl_tokens = run.dpo(
        tokens, labels, ref_sums, loss.beta, loss.label_smoothing, loss.kl, ignore_index
    )
    share = 1.0 / max(1, losses.numel())
    weights = losses.new_full((2,), share)
    total, mean_kl = losses.sum().mul_(share), losses.new_zeros(())
    if loss.kl is not None:
        count = pairs[PairRow.TOKENS].sum().clamp(min=1)
        weights[1] = loss.kl_coef / count
        mean_kl = pairs[PairRow.KL_SUM].sum() / count
        if loss.kl_coef:  # 0 times an infinite KL would be NaN
            total = total + loss.kl_coef * mean_kl
    halves, fields = (half.clone() for half in sequences.chunk(2)), pairs.unbind(0)
    metrics = (fields[i].clone() for i in METRICS)
    return DPOResults(total, losses, *halves, mean_kl, kl_tokens, *metrics, pairs, tokens, weights)


def _fake_results(values: Tensor, labels: Tensor, kl: Optional[str]) -> DPOResults:
    n, b = labels.numel(), labels.shape[0] // 2

    def new(*shape):
        return values.new_empty(shape, dtype=stats_dtype(values.dtype))

    metrics = (new(b) for _ in METRICS)
    private = new(PairRow.COUNT, b), new(DPORow.COUNT, n), new(2)
    return DPOResults(new(), new(b), new(b), new(b), new(), new(n if kl else 0), *metrics, *private)


@custom_op("fused_po::dpo_logits_fwd")
def _logits_forward(
    logits: Tensor,
    labels: Tensor,
    ref_logits: Optional[Tensor],
    ref_logps: Optional[Tensor],
    settings: DPOLogitsSettings,
) -> DPOResults:
    loss, scaling, ignore_index, inplace, backend = settings
    checks.overwritable(logits, inplace, ref_logits)
    checks.label_range(labels, logits.shape[-1], ignore_index)
    run = backends.get(backend)
    labels = labels.contiguous()
    ref_rows = None if ref_logits is None else as_rows(ref_logits)
    tokens = run.pair_statistics(as_rows(logits), ref_rows, labels.flatten(), *scaling, ignore_index)
    ref_sums = None
    if ref_logps is not None and ref_logps.ndim == 2:
        tokens[DPORow.REF_LOGP] = ref_logps.flatten()
    elif ref_logps is not None:
        ref_sums = ref_logps.contiguous()
    return _finish(run, tokens, labels, ref_sums, loss, ignore_index)


@_logits_forward.register_fake
def _(logits, labels, ref_logits, ref_logps, settings):
    return _fake_results(logits, labels, settings.loss.kl)


class PairGrads(NamedTuple):
    """Incoming gradients of the loss [], of the pairs' losses [B] and of the sequences' log-probs [2B], or None."""

    loss: Optional[Tensor]
    losses: Optional[Tensor]
    sequences: Optional[Tensor]

    @property
    def absent(self) -> bool:
        """Whether there is none at all."""
        return self.loss is None and self.losses is None and self.sequences is None

    @staticmethod
    def of(
        g_loss: Optional[Tensor], g_losses: Optional[Tensor], g_chosen: Optional[Tensor], g_rejected: Optional[Tensor]
    ) -> PairGrads:
        """From those of an op's first results."""
        if g_chosen is None and g_rejected is None:
            return PairGrads(g_loss, g_losses, None)
        like = g_rejected if g_chosen is None else g_chosen
        halves = (torch.zeros_like(like) if g is None else g for g in (g_chosen, g_rejected))
        return PairGrads(g_loss, g_losses, torch.cat([*halves]))


def _write_gradient(
    logits: Tensor,
    out: Tensor,
    labels: Tensor,
    tokens: Tensor,
    pairs: Tensor,
    weights: Tensor,
    grads: PairGrads,
    how: DPOGradientSettings,
) -> None:
    labels, run = labels.contiguous(), backends.get(how.backend)
    grads = [None if g is None else g.contiguous() for g in grads]

    def write(rows, target):
        run.dpo_gradient(rows, labels, tokens, pairs, weights, *grads, how.kl, *how.scaling, target)

    on_rows(write, logits, out)


@custom_op("fused_po::dpo_logits_bwd")
def _logits_backward(
    logits: Tensor,
    labels: Tensor,
    tokens: Tensor,
    pairs: Tensor,
    weights: Tensor,
    g_loss: Optional[Tensor],
    g_losses: Optional[Tensor],
    g_sequences: Optional[Tensor],
    how: DPOGradientSettings,
) -> Tensor:
    out, grads = empty_gradient(logits), PairGrads(g_loss, g_losses, g_sequences)
    _write_gradient(logits, out, labels, tokens, pairs, weights, grads, how)
    return out


_logits_backward.register_fake(empty_gradient)


@custom_op("fused_po::dpo_logits_bwd_", mutates_args=("logits",))
def _logits_backward_(
    logits: Tensor,
    labels: Tensor,
    tokens: Tensor,
    pairs: Tensor,
    weights: Tensor,
    g_loss: Optional[Tensor],
    g_losses: Optional[Tensor],
    g_sequences: Optional[Tensor],
    how: DPOGradientSettings,
) -> None:
    grads = PairGrads(g_loss, g_losses, g_sequences)
    _write_gradient(logits, logits, labels, tokens, pairs, weights, grads, how)


def _logits_context(ctx, inputs, results):
    logits, labels, _, _, ctx.settings = inputs
    ctx.save_for_backward(logits, labels, results.tokens, results.pairs, results.weights)
    ctx.set_materialize_grads(False)


def _logits_autograd(ctx, g_loss, g_losses, g_chosen, g_rejected, *g_detached):
    grads = PairGrads.of(g_loss, g_losses, g_chosen, g_rejected)
    if grads.absent:
        return ()
    logits, labels, tokens, pairs, weights = ctx.saved_tensors
    arguments = labels, tokens, pairs, weights, *grads, ctx.settings.gradient
    return (_logits_gradient(ctx.settings.inplace_backward, logits, *arguments),)


_logits_gradient = GradientOps(_logits_backward, _logits_backward_)
_from_logits = differentiable(_logits_forward, _logits_autograd, _logits_context)


@custom_op("fused_po::dpo_fwd")
def _forward(logps: Tensor, labels: Tensor, ref_logps: Tensor, settings: DPOSettings) -> DPOResults:
    loss, ignore_index, backend = settings
    labels = labels.contiguous()
    norm = torch.zeros_like(logps).masked_fill_(labels == ignore_index, torch.inf)
    ref_tokens = ref_logps.to(logps.dtype) if ref_logps.ndim == 2 else torch.zeros_like(logps)
    tokens = torch.stack([torch.zeros_like(logps), norm, logps, ref_tokens]).flatten(1)  # the rows of DPORow
    ref_sums = ref_logps.contiguous() if ref_logps.ndim == 1 else None
    return _finish(backends.get(backend), tokens, labels, ref_sums, loss, ignore_index)


@_forward.register_fake
def _(logps, labels, ref_logps, settings):
    return _fake_results(logps, labels, settings.loss.kl)


@custom_op("fused_po::dpo_bwd")
def _backward(
    labels: Tensor,
    tokens: Tensor,
    pairs: Tensor,
    weights: Tensor,
    g_loss: Optional[Tensor],
    g_losses: Optional[Tensor],
    g_sequences: Optional[Tensor],
    kl: Optional[str],
) -> Tensor:
    return dpo_token_gradient(labels, tokens, pairs, weights, g_loss, g_losses, g_sequences, kl)


@_backward.register_fake
def _(labels, tokens, *others):
    return tokens.new_empty(labels.shape)


def _setup_context(ctx, inputs, results):
    _, labels, _, ctx.settings = inputs
    ctx.save_for_backward(labels, results.tokens, results.pairs, results.weights)
    ctx.set_materialize_grads(False)


def _autograd(ctx, g_loss, g_losses, g_chosen, g_rejected, *g_detached):
    grads = PairGrads.of(g_loss, g_losses, g_chosen, g_rejected)
    return () if grads.absent else (_backward(*ctx.saved_tensors, *grads, ctx.settings.loss.kl),)


from_logps = differentiable(_forward, _autograd, _setup_context)


def dpo_output(results: DPOResults, labels: Tensor, kl: Optional[str]) -> DPOOutput:
    """What a caller gets; kl: the estimator, None for no KL."""
    r = results
    metrics = (v.detach() for v in (r.chosen_rewards, r.rejected_rewards, r.margins, r.accuracy))
    kl_values = (r.mean_kl.detach(), r.kl_tokens.detach().view(labels.shape)) if kl else (None, None)
    return DPOOutput(r.loss, r.losses, r.chosen_logps, r.rejected_logps, *metrics, *kl_values)


def with_exact_kl(
    stats: KLStats, labels: Tensor, loss: DPOLoss, ignore_index: int, backend: Optional[str]
) -> DPOOutput:
    """The loss from log-probs, plus the KL from the same op; autograd adds both gradients in that op's backward."""
    name = backends.resolve(backend, stats.logps.device, stats.logps.dtype)
    settings = DPOSettings(loss._replace(kl=None, kl_coef=0.0), ignore_index, name)
    out = dpo_output(from_logps(stats.logps, labels, stats.ref_logps, settings), labels, None)
    mean_kl = stats.kl.sum() / (labels != ignore_index).sum().clamp(min=1)
    total = out.loss + loss.kl_coef * mean_kl if loss.kl_coef else out.loss
    return out._replace(loss=total, kl=mean_kl.detach(), kl_per_token=stats.kl.detach())


@public
def dpo_from_logits(
    logits: Tensor,
    labels: Tensor,
    ref_logits: Optional[Tensor] = None,
    ref_logps: Optional[Tensor] = None,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    kl: Optional[str] = None,
    kl_coef: float = 0.0,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: Optional[float] = None,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    backend: Optional[str] = None,
) -> DPOOutput:
    """The DPO loss from logits of policy and reference, with an optional per-token KL penalty.

    loss = mean_b [-(1 - e) log s(h_b) - e log s(-h_b)] + kl_coef * mean over scored tokens of the KL estimate,
    h = beta * [(log pi(y_w) - log pi_ref(y_w)) - (log pi(y_l) - log pi_ref(y_l))], s the sigmoid, e label_smoothing.
    DPO: Rafailov et al. 2023, arXiv:2305.18290, eq. 7; label smoothing (cDPO): Mitchell 2023. The estimators, with
    r = log pi - log pi_ref of a token: k1 = r, k2 = r^2 / 2, k3 = e^-r - 1 + r (Schulman 2020). As a loss term, k1 has
    an expected gradient of zero over the policy's own samples, and k2 has the gradient of the reverse KL. "full" is not
    an estimate but the exact KL(pi || pi_ref) at each position, see `kl_from_logits`, computed in the same pass.

    Args:
        logits: [2B, T, V], of the policy, chosen answers first. Dtypes and strides: see `logps_from_logits`.
        labels: [2B, T], aligned with the logits; ignore_index at prompts and padding, which are not read.
        ref_logits: [2B, T, V], of the reference, without gradient. Pass either ref_logits or
        ref_logps: the reference's log-probs of the labels, [2B, T], or their sums [2B] (then kl must be None).
        beta: > 0. label_smoothing: the assumed share of flipped preferences, in [0, 0.5).
        kl: "k1", "k2", "k3", "full" (only with ref_logits), or None for no KL.
        kl_coef: the weight of the KL in the loss, >= 0. With 0 the KL is only reported.
        inplace_backward: overwrite the logits with their gradient in the backward. Do not use them afterwards.
        backend: "triton" or "reference" ("cuda" has no DPO); None selects one by device. See `backends`.

    Returns:
        DPOOutput. A pair without scored tokens has log-probs of 0, a loss of log 2, and no gradient.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, device or range, by name.
    """
    check_stacked("logits", logits, 3)
    labels = checks.integer("labels", labels, logits.shape[:-1], logits.device, "[2B, T] of logits")
    if (ref_logits is None) == (ref_logps is None):
        raise ValueError(
            "ref_logits, ref_logps: expected exactly one of them; for a loss without a reference pass "
            "ref_logps=torch.zeros(2B)"
        )
    if ref_logits is not None:
        checks.same_device("ref_logits", checks.floating("ref_logits", ref_logits), logits.device)
        if ref_logits.shape != logits.shape:
            got, expected = tuple(ref_logits.shape), tuple(logits.shape)
            raise ValueError(f"ref_logits: got shape {got}, expected {expected}, the shape of logits")
        ref_logits = ref_logits.detach()
    loss = check_loss(beta, label_smoothing, kl, kl_coef, ref_logps, labels, logits.device)
    checks.inplace(inplace_backward, logits)
    checks.whole_number("ignore_index", ignore_index)
    if kl == "full":
        how = dict(temperature=temperature, logit_scale=logit_scale, softcap=softcap, ignore_index=ignore_index)
        how |= dict(inplace_backward=inplace_backward, backend=backend)
        stats = kl_from_logits(logits, ref_logits, labels, **how)
        return with_exact_kl(stats, labels, loss, ignore_index, backend)
    scaling = Scaling(*checks.scaling(temperature, logit_scale, softcap))
    name = backends.resolve(backend, logits.device, logits.dtype)
    if ref_logits is not None and ref_logits.dtype != logits.dtype:
        backends.resolve(name, ref_logits.device, ref_logits.dtype)
    ref_logps = None if ref_logps is None else ref_logps.detach().to(stats_dtype(logits.dtype))
    settings = DPOLogitsSettings(loss, scaling, ignore_index, inplace_backward, name)
    return dpo_output(_from_logits(logits, labels, ref_logits, ref_logps, settings), labels, kl)
