"""`policy_loss_from_logits`: the loss of a batch for PPO, GRPO and related methods, from existing logits."""

from __future__ import annotations

import math
from typing import NamedTuple, Optional, Union

import torch
from torch import Tensor

from fused_po import checks
from fused_po.backend import choose as backends
from fused_po.backend.interface import Form, PolicyRow, SavedRow, Scaling, TokenInputs, stats_dtype
from fused_po.losses.divergence import kl_loss
from fused_po.losses.entropy import entropy_bonus
from fused_po.losses.group_relative import ratio_of
from fused_po.losses.numerics import weighted
from fused_po.losses.policy import clipped_surrogate
from fused_po.losses.policy import tokens as checked_tokens
from fused_po.ops.autograd import public, transforms_active
from fused_po.ops.logps import GradientSettings, logits_gradient, logps_from_logits
from fused_po.ops.policy_forms import (
    IGNORE,
    TYPES,
    WITHOUT_RATIO,
    counted_labels,
    form_of,
    inputs_of,
    kl_and_entropy_terms,
)
from fused_po.ops.register import custom_op, differentiable
from fused_po.ops.rows import as_rows
from fused_po.reference.dpo import times


class PolicyOutput(NamedTuple):
    """A policy loss and its per-token values, [B, T], fp32 (float64 for float64 logits), 0 where masked.

    loss: scalar, the weighted sum of losses. The only field with gradients.
    losses: per token, with KL and entropy bonus. logps, entropy: of the policy, in nats.
    kl: the estimate, multiplied by the ratio if requested. None without kl.
    ratio: pi / pi_old (of the answer, at sequence level). None for reinforce and sft.
    clipped: -1 where the ratio is below the range and A < 0, 1 where it is above and A > 0, else 0. None for reinforce,
        sft and sapo.
    """

    loss: Tensor
    losses: Tensor
    logps: Tensor
    entropy: Tensor
    kl: Optional[Tensor] = None
    ratio: Optional[Tensor] = None
    clipped: Optional[Tensor] = None


class PolicySettings(NamedTuple):
    """How the loss of tokens is computed."""

    form: Form
    outer: float  # 1 / temperature
    inplace_backward: bool
    backend: str


class PolicyResults(NamedTuple):
    """What the op returns."""

    loss: Tensor  # []
    tokens: Tensor  # [PolicyRow.COUNT, N]
    saved: Tensor  # [len(SAVED), N], what the backward reads


class Overwritten(NamedTuple):
    """What the op that writes the gradient over the logits returns."""

    loss: Tensor
    tokens: Tensor


SAVED = PolicyRow.SHIFT, PolicyRow.NORM, PolicyRow.LOGP, PolicyRow.ENTROPY, PolicyRow.SLOPE


def _losses(
    logits: Tensor, labels: Tensor, inputs: TokenInputs, settings: PolicySettings, overwrite: bool
) -> Overwritten:
    """The batch's loss, and its tokens; with overwrite their gradient in the logits replaces the logits."""
    checks.overwritable(logits, overwrite or settings.inplace_backward)
    checks.label_range(labels, logits.shape[-1], IGNORE)
    rows = as_rows(logits)
    inputs = TokenInputs(*(None if v is None else v.contiguous() for v in inputs))
    run = backends.get(settings.backend)
    tokens = run.policy(rows, labels.contiguous(), inputs, settings.form, settings.outer, IGNORE, overwrite)
    if overwrite and rows.data_ptr() != logits.data_ptr():  # the rows had to be copied
        logits.copy_(rows.view(logits.shape))
    return Overwritten(times(inputs.weights, tokens[PolicyRow.LOSS]).sum(), tokens)


def _fake(logits: Tensor, labels: Tensor, *n_rows: int) -> list[Tensor]:
    new = {"dtype": stats_dtype(logits.dtype)}
    return [logits.new_empty((), **new), *(logits.new_empty((n, labels.numel()), **new) for n in n_rows)]


@custom_op("fused_po::policy_fwd")
def _forward(
    logits: Tensor,
    labels: Tensor,
    advantages: Tensor,
    weights: Tensor,
    old_logps: Optional[Tensor],
    ref_logps: Optional[Tensor],
    settings: PolicySettings,
) -> PolicyResults:
    """The backward is that of `logps_from_logits`, with the losses' slopes."""
    inputs = TokenInputs(advantages, weights, old_logps, ref_logps)
    loss, tokens = _losses(logits, labels, inputs, settings, overwrite=False)
    # A copy: the other rows go to callers.
    saved = torch.cat((tokens[: PolicyRow.ENTROPY + 1], tokens[PolicyRow.SLOPE :]))
    return PolicyResults(loss, tokens, saved)


@_forward.register_fake
def _(logits, labels, *others):
    return PolicyResults(*_fake(logits, labels, PolicyRow.COUNT, len(SAVED)))


def _setup_context(ctx, inputs, results):
    logits, labels, _, weights, _, _, ctx.settings = inputs
    ctx.save_for_backward(logits, labels, weights, results.saved)
    ctx.set_materialize_grads(False)


def _autograd(ctx, g_loss, *g_others):
    if g_loss is None:
        return ()
    logits, labels, weights, saved = ctx.saved_tensors
    entropy, slope = saved[SavedRow.COUNT :]
    entropy_coef, settings = ctx.settings.form.entropy_coef, ctx.settings
    g_entropy = weights * (-entropy_coef * g_loss) if entropy_coef else None
    how = GradientSettings(Scaling(settings.outer), settings.backend)
    arguments = labels, saved[: SavedRow.COUNT], entropy, slope * g_loss, g_entropy, None, how
    return (logits_gradient(settings.inplace_backward, logits, *arguments),)


_scored = differentiable(_forward, _autograd, _setup_context)


@custom_op("fused_po::policy_fwd_", mutates_args=("logits",))
def _write_forward(
    logits: Tensor,
    labels: Tensor,
    advantages: Tensor,
    weights: Tensor,
    old_logps: Optional[Tensor],
    ref_logps: Optional[Tensor],
    settings: PolicySettings,
) -> Overwritten:
    """Writes the gradient over the logits at once: a row is read while it is still in the cache. See `_link`."""
    inputs = TokenInputs(advantages, weights, old_logps, ref_logps)
    return _losses(logits, labels, inputs, settings, overwrite=True)


@_write_forward.register_fake
def _(logits, labels, *others):
    return Overwritten(*_fake(logits, labels, PolicyRow.COUNT))


@custom_op("fused_po::policy_link")
def _link(grad: Tensor, loss: Tensor, backend: str) -> Tensor:
    """The loss of logits that `_write_forward` has replaced by their gradient; its backward hands that on.

    It multiplies by the loss's own gradient, which mostly is 1.
    """
    return loss.clone()


@_link.register_fake
def _(grad, loss, backend):
    return torch.empty_like(loss)


@custom_op("fused_po::policy_scale_", mutates_args=("grad",))
def _scale(grad: Tensor, factor: Tensor, backend: str) -> None:
    backends.get(backend).scale(grad, factor)


def _link_context(ctx, inputs, results):
    ctx.backend = inputs[2]
    ctx.save_for_backward(inputs[0])
    ctx.set_materialize_grads(False)


def _link_autograd(ctx, g_loss):
    if g_loss is None:
        return ()
    grad = ctx.saved_tensors[0].detach()
    _scale(grad, g_loss, ctx.backend)
    return (grad,)


_linked = differentiable(_link, _link_autograd, _link_context)


def token_level(logits: Tensor, labels: Tensor, inputs: TokenInputs, settings: PolicySettings) -> tuple[Tensor, Tensor]:
    """(loss, tokens) by the ops.

    In place, one kernel scores a row and writes its gradient; except in fp16, whose range needs the loss scaler's
    factor first, which is known in the backward.
    """
    flat = [None if value is None else value.flatten() for value in inputs]
    at_once = settings.inplace_backward and logits.requires_grad and torch.is_grad_enabled() and not transforms_active()
    if at_once and logits.dtype != torch.float16:
        loss, tokens = _write_forward(logits.detach(), labels.flatten(), *flat, settings)
        return _linked(logits, loss, settings.backend), tokens
    results = _scored(logits, labels.flatten(), *flat, settings)
    return results.loss, results.tokens


def answer_level(
    logits: Tensor, labels: Tensor, inputs: TokenInputs, settings: PolicySettings, temperature: float
) -> PolicyOutput:
    """Losses with one ratio per answer: a statistics pass, the losses in plain PyTorch, and a gradient pass."""
    mask, outputs = labels != IGNORE, ("logps", "entropy")
    stats = logps_from_logits(
        logits,
        labels,
        temperature=temperature,
        outputs=outputs,
        inplace_backward=settings.inplace_backward,
        backend=settings.backend,
    )
    form = settings.form
    old = stats.logps.detach() if inputs.old_logps is None else inputs.old_logps
    t = checked_tokens(stats.logps, old, inputs.advantages, mask)
    ratio = ratio_of(t, "sequence", 20.0)
    low, high = 1 - form.low, form.high - 1
    losses = clipped_surrogate(ratio, t.advantages, low, high, None if form.bound == math.inf else form.bound)
    kl = None
    if form.kl is not None:
        kl = kl_loss(stats.logps, inputs.ref_logps, form.kl)
        kl = weighted(ratio, kl) if form.kl_times_ratio else kl
        losses = losses + weighted(form.kl_coef, kl)
    if form.entropy_coef:
        losses = losses + entropy_bonus(stats.entropy, mask, coef=form.entropy_coef)
    losses = torch.where(mask, losses, 0)
    above, below = (ratio > form.high) & (t.advantages > 0), (ratio < form.low) & (t.advantages < 0)
    clipped = torch.where(mask, above.to(ratio.dtype) - below.to(ratio.dtype), 0)
    rest = losses, stats.logps, stats.entropy, kl, torch.where(mask, ratio, 0), clipped
    loss = weighted(inputs.weights, losses).sum()
    return PolicyOutput(loss, *(None if v is None else v.detach().clone() for v in rest))


def policy_output(loss: Tensor, tokens: Tensor, loss_type: str, with_kl: bool) -> PolicyOutput:
    """What a caller gets, from tokens [PolicyRow.COUNT, B, T]: copies, which may be edited."""

    def field(row: int, wanted: bool = True) -> Optional[Tensor]:
        return tokens[row].clone() if wanted else None

    with_ratio = loss_type not in WITHOUT_RATIO
    return PolicyOutput(
        loss,
        losses=field(PolicyRow.LOSS),
        logps=field(PolicyRow.LOGP),
        entropy=field(PolicyRow.ENTROPY),
        kl=field(PolicyRow.KL, with_kl),
        ratio=field(PolicyRow.RATIO, with_ratio),
        clipped=field(PolicyRow.CLIPPED, with_ratio and loss_type != "sapo"),
    )


@public
def policy_loss_from_logits(
    logits: Tensor,
    labels: Tensor,
    advantages: Optional[Tensor],
    old_logps: Optional[Tensor] = None,
    ref_logps: Optional[Tensor] = None,
    mask: Optional[Tensor] = None,
    *,
    loss_type: str,
    weights: Optional[Tensor] = None,
    kl: Optional[str] = None,
    kl_coef: float = 0.0,
    entropy_coef: float = 0.0,
    temperature: float = 1.0,
    inplace_backward: bool = False,
    backend: Optional[str] = None,
    **settings: Union[float, str, bool, None],
) -> PolicyOutput:
    """A policy-gradient loss from logits: sum_t weights_t (L_t + kl_coef KL_t - entropy_coef H_t).

    L is the loss of this function in `fused_po.losses`:

        ppo                                                ppo_clip
        grpo, bnpo, dr_grpo, dapo, luspo, cispo, sapo      grpo(loss_type=...)
        gspo; others at importance_sampling_level="sequence": one ratio per answer, separate passes for statistics and
                                                           gradient
        reinforce, sft                                     -A log pi, -log pi

    Log-ratios are clamped to [-20, 20]; the ratio has no gradient beyond that. Every L is proportional to |A|, so
    importance weights >= 0 (`losses.importance_weights`) may be multiplied into the advantages.

    Without `inplace_backward`, the forward reads the logits once, and the backward reads them and writes the gradient.
    With it, the forward overwrites each row with its gradient while the row is in the cache. The backward then only
    multiplies by the incoming gradient of the loss, and does nothing if that is 1. For fp16, whose range is too small
    for this, and for one ratio per answer, the backward writes the gradient over the logits.

    Args:
        logits: [B, T, V], as in `logps_from_logits`. labels: [B, T], integers in [0, V), or -100 to ignore.
        advantages: [B], one per answer, or [B, T]; no gradient. None for sft.
        old_logps: [B, T], of the old policy in the ratio. None: the policy itself, so that the ratio is 1.
        ref_logps: [B, T], of the reference; required with kl, otherwise it must be None.
        mask: [B, T], non-zero where a token counts. None: where labels are not -100.
        loss_type: one of the above.
        weights: [B, T], the weights of the tokens in the loss: `token_weights` with the counts of the whole step. None:
            those of the loss_type's mode in `losses.GRPO_MODES` over this batch ("token-mean" for types without one).
        kl: "k2", "k3" or None, as in `losses.kl_loss`. It is multiplied by the ratio, through which gradients flow
            (TRL's use_bias_correction_kl), unless the setting use_bias_correction_kl is False.
        kl_coef, entropy_coef: >= 0. A KL with coefficient 0 is only reported.
        temperature: > 0.
        inplace_backward: overwrite the logits with their gradient. Do not use them afterwards.
        backend: "triton", "cuda" or "reference"; None selects one by device. See `backends`.
        settings: epsilon, epsilon_high, delta, and for ppo dual_clip: as in `losses.ppo_clip` and `losses.grpo`;
            importance_sampling_level, sapo_temperature_pos, sapo_temperature_neg; use_bias_correction_kl.

    Returns:
        PolicyOutput. `losses.policy_metrics(out.logps, old_logps, advantages, mask, ...)` computes TRL's metrics from
        it.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape, device or range, or would not be used.
    """
    if checks.floating("logits", logits).ndim != 3 or logits.shape[-1] == 0:
        raise ValueError(f"logits: got shape {tuple(logits.shape)}, expected [B, T, V] with V >= 1")
    labels = checks.integer("labels", labels, logits.shape[:-1], logits.device, "the shape of logits without V")
    checks.choice("loss_type", loss_type, TYPES)
    checks.inplace(inplace_backward, logits)
    settings = dict(settings)
    rest = kl_and_entropy_terms(kl, kl_coef, entropy_coef, ref_logps, settings)
    form, per_answer = form_of(loss_type, settings, rest)
    temperature = checks.positive("temperature", temperature)
    name = backends.resolve(backend, logits.device, logits.dtype)
    labels, counted = counted_labels(labels, mask)
    reads_old = loss_type not in WITHOUT_RATIO or (kl is not None and form.kl_times_ratio)
    numbers = {"weights": weights, "old_logps": old_logps, "ref_logps": ref_logps}
    inputs = inputs_of(advantages, numbers, counted, loss_type, reads_old, stats_dtype(logits.dtype))
    how = PolicySettings(form, 1.0 / temperature, inplace_backward, name)
    if per_answer:
        return answer_level(logits, labels, inputs, how, temperature)
    loss, tokens = token_level(logits, labels, inputs, how)
    return policy_output(loss, tokens.detach().view(tokens.shape[0], *labels.shape), loss_type, kl is not None)
