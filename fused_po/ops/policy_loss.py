"""`policy_loss_from_logits`: PPO, GRPO and their relatives from logits that exist already, down to the batch's loss."""

from __future__ import annotations

import math
from typing import NamedTuple, Optional, Union

import torch
from torch import Tensor

from fused_po import checks
from fused_po.losses.divergence import kl_loss
from fused_po.losses.entropy import entropy_bonus
from fused_po.losses.group_relative import CLIPPED, GRPO_MODES, plan, ratio_of
from fused_po.losses.numerics import weighed
from fused_po.losses.policy import broadcast_advantages, clip_range, clipped_surrogate, ratio_bound
from fused_po.losses.policy import tokens as checked_tokens
from fused_po.ops import backend as backends
from fused_po.ops import policy as ops
from fused_po.ops.autograd import public, transforms_active
from fused_po.ops.logps import logps_from_logits
from fused_po.reduce import token_weights
from fused_po.reference import stats_dtype
from fused_po.reference.policy import CLIPPED as CLIPPED_FIELD
from fused_po.reference.policy import ENTROPY, KL, LOGP, LOSS, RATIO, Form, Given

IGNORE = -100
TYPES = ("ppo", "grpo", "bnpo", "dr_grpo", "dapo", "luspo", "gspo", "cispo", "sapo", "reinforce", "sft")
WITHOUT_RATIO = ("reinforce", "sft")
KLS = (None, "k2", "k3")
SAPO_TEMPERATURES = {"temperature_pos": 1.0, "temperature_neg": 1.05}  # those of losses.sapo


class PolicyOutput(NamedTuple):
    """A policy loss and its tokens, [B, T] each, fp32 (float64 for float64 logits), 0 where nothing counts.

    loss: scalar, the weighted sum of losses. Carries gradients, it alone.
    losses: of tokens, KL and entropy bonus included. logps, entropy: of the policy, nats.
    kl: the estimate, times the ratio if asked for; None without kl.
    ratio: pi / pi_old (of an answer, at sequence level). None for reinforce and sft, as is
    clipped: -1 where the ratio lies below the range and A < 0, 1 where above and A > 0, else 0. None for sapo too.
    """

    loss: Tensor
    losses: Tensor
    logps: Tensor
    entropy: Tensor
    kl: Optional[Tensor] = None
    ratio: Optional[Tensor] = None
    clipped: Optional[Tensor] = None


def refuse_unknown(settings: dict, allowed: tuple[str, ...], loss_type: str) -> None:
    for name, value in settings.items():
        if name not in allowed:
            raise ValueError(f"{name}: got {value}, allowed for loss_type={loss_type!r} are {list(allowed) or 'none'}")


def form_of(loss_type: str, settings: dict, rest: dict) -> tuple[Form, bool]:
    """(what a token's loss is, whether an answer has one ratio); refuses settings that the loss_type does not take."""
    bounds = {name: settings.pop(name, None) for name in ("epsilon", "epsilon_high", "delta") if name in settings}
    if loss_type in WITHOUT_RATIO:
        refuse_unknown(bounds | settings, (), loss_type)
        return Form("weight", 1.0, 1.0, **rest), False
    if loss_type == "ppo":
        dual_clip = settings.pop("dual_clip", None)
        refuse_unknown(settings, ("epsilon", "epsilon_high", "delta", "dual_clip"), loss_type)
        low, high = clip_range(bounds.get("epsilon", 0.2), bounds.get("epsilon_high"))
        bound, per_answer = ratio_bound(high, dual_clip, bounds.get("delta")), False
    else:
        level = settings.pop("importance_sampling_level", None)
        p = plan(loss_type, *(bounds.get(name) for name in ("epsilon", "epsilon_high", "delta")), level, settings)
        low, high, bound, per_answer = p.low, p.high, p.bound, p.level == "sequence"
        if per_answer and loss_type not in CLIPPED:
            raise ValueError(f"importance_sampling_level: got 'sequence' with {loss_type!r}, which takes 'token' here")
        if loss_type == "cispo":
            return Form("weight", 0.0, checks.positive("epsilon_high", high), **rest), False
        if loss_type == "sapo":
            taus = SAPO_TEMPERATURES | p.settings
            low, high = (checks.positive(f"sapo_{name}", taus[name]) for name in SAPO_TEMPERATURES)
            return Form("gate", low, high, **rest), False
    return Form("clip", 1 - low, 1 + high, math.inf if bound is None else bound, **rest), per_answer


def terms_besides(kl: Optional[str], kl_coef: float, entropy_coef: float, ref_logps: object, settings: dict) -> dict:
    """The KL and the entropy bonus of a Form."""
    checks.choice("kl", kl, KLS)
    kl_coef = checks.number("kl_coef", kl_coef, "finite numbers >= 0", lambda v: v >= 0)
    if kl is None and kl_coef:
        raise ValueError(f"kl_coef: got {kl_coef} without an estimator; name one, such as kl='k3'")
    if (kl is None) != (ref_logps is None):
        got = "None" if ref_logps is None else "a tensor"
        raise ValueError(f"ref_logps: got {got} with kl={kl!r}; a KL needs both, and kl=None has none")
    times_ratio = settings.pop("use_bias_correction_kl", True)
    checks.choice("use_bias_correction_kl", times_ratio, (True, False))
    checks.only_with("use_bias_correction_kl", times_ratio, True, kl is not None, "a KL")
    entropy_coef = checks.number("entropy_coef", entropy_coef, "finite numbers >= 0", lambda v: v >= 0)
    return {"kl": kl, "kl_coef": kl_coef, "kl_times_ratio": times_ratio, "entropy_coef": entropy_coef}


def default_weights(mask: Tensor, loss_type: str) -> Tensor:
    """[B, T], those of the loss_type's own mode over this batch."""
    mode = GRPO_MODES.get(loss_type, "token-mean")
    if mode == "seq-mean-token-sum-norm":
        raise ValueError(
            f"weights: got None with {loss_type!r}, which divides by a fixed length; pass "
            f"fused_po.token_weights(mask, {mode!r}, max_length=...)"
        )
    return token_weights(mask, mode)


def per_token(name: str, value: object, mask: Tensor, dtype: torch.dtype) -> Optional[Tensor]:
    """[B, T] numbers of tokens as constants, 0 where nothing counts; None stays None."""
    if value is None:
        return None
    if checks.floating(name, value).shape != mask.shape:
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected {tuple(mask.shape)}, that of labels")
    checks.same_device(name, value, mask.device)
    checks.finite(name, value, mask)
    return torch.where(mask, value.detach(), 0).to(dtype)


def token_level(
    logits: Tensor, labels: Tensor, given: Given, form: Form, temperature: float, inplace: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """(loss, tokens) by the ops. In place, one kernel scores a row and writes its gradient, but in fp16, whose range
    wants the loss scaler's factor, known in the backward, first."""
    flat = [None if value is None else value.flatten() for value in given]
    outer = 1.0 / temperature
    at_once = inplace and logits.requires_grad and torch.is_grad_enabled() and not transforms_active()
    if at_once and logits.dtype != torch.float16:
        grad = logits.detach()
        loss, tokens = ops.write_forward(grad, labels.flatten(), *flat, *form, outer, IGNORE, backend)
        return ops.link(logits, loss, backend), tokens
    return ops.losses(logits, labels.flatten(), *flat, *form, outer, IGNORE, inplace, backend)[:2]


def answer_level(
    logits: Tensor, labels: Tensor, given: Given, form: Form, temperature: float, inplace: bool, backend: str
) -> PolicyOutput:
    """Losses whose ratio is an answer's: a statistics pass, the losses in plain PyTorch, a gradient pass."""
    mask, outputs = labels != IGNORE, ("logps", "entropy")
    how = {"temperature": temperature, "outputs": outputs, "inplace_backward": inplace, "backend": backend}
    stats = logps_from_logits(logits, labels, **how)
    old = stats.logps.detach() if given.old_logps is None else given.old_logps
    t = checked_tokens(stats.logps, old, given.advantages, mask)
    ratio = ratio_of(t, "sequence", 20.0)
    low, high = 1 - form.low, form.high - 1
    losses = clipped_surrogate(ratio, t.advantages, low, high, None if form.bound == math.inf else form.bound)
    kl = None
    if form.kl is not None:
        kl = kl_loss(stats.logps, given.ref_logps, form.kl)
        kl = weighed(ratio, kl) if form.kl_times_ratio else kl
        losses = losses + weighed(form.kl_coef, kl)
    if form.entropy_coef:
        losses = losses + entropy_bonus(stats.entropy, mask, coef=form.entropy_coef)
    losses = torch.where(mask, losses, 0)
    above, below = (ratio > form.high) & (t.advantages > 0), (ratio < form.low) & (t.advantages < 0)
    clipped = torch.where(mask, above.to(ratio.dtype) - below.to(ratio.dtype), 0)
    rest = losses, stats.logps, stats.entropy, kl, torch.where(mask, ratio, 0), clipped
    loss = weighed(given.weights, losses).sum()
    return PolicyOutput(loss, *(None if v is None else v.detach().clone() for v in rest))


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

    L is that of `fused_po.losses` by the same name, formula and paper:

        ppo                                                ppo_clip
        grpo, bnpo, dr_grpo, dapo, luspo, cispo, sapo      grpo(loss_type=...)
        gspo; others at importance_sampling_level="sequence": one ratio an answer, statistics and gradient passes
        reinforce, sft                                     -A log pi, -log pi

    with log-ratios within +-20, where the gradient of the ratio ends. Every L is proportional to |A|: importance
    weights >= 0 (`losses.importance_weights`) may be multiplied into the advantages.

    Without `inplace_backward` the logits are read once forward, and read and written once more backward. With it a
    row's gradient is written over it by the forward already, while it is in the cache, and the backward is left with
    multiplying by the loss's incoming gradient, which costs nothing where that is 1. (fp16, whose range is too small
    for that, and one ratio an answer: over the logits too, but by the backward.)

    Args:
        logits: [B, T, V], as in `logps_from_logits`. labels: [B, T], integers in [0, V), or -100: does not count.
        advantages: [B], one an answer, or [B, T]; constants. None for sft.
        old_logps: [B, T], of the policy whose ratio the loss takes. None: the policy itself, the ratio is 1.
        ref_logps: [B, T], the reference's; needed with kl, and not taken without.
        mask: [B, T], non-zero where a token counts. None: wherever labels are not -100.
        loss_type: one of the above.
        weights: [B, T], of the tokens in the loss: `token_weights`, with the counts of the whole step. None: by the
            loss_type's own mode over this batch, `losses.GRPO_MODES` ("token-mean" for the other types).
        kl: "k2", "k3" or None, as `losses.kl_loss` has them; times the ratio (TRL's use_bias_correction_kl), through
            which gradients flow, unless the setting use_bias_correction_kl=False says no.
        kl_coef, entropy_coef: >= 0; a KL with coefficient 0 is reported only.
        temperature: > 0.
        inplace_backward: the logits are overwritten with their gradient. They must not be used afterwards.
        backend: "triton", "cuda" or "reference"; None chooses by device. See `backends`.
        settings: epsilon, epsilon_high, delta, and ppo's dual_clip: as in `losses.ppo_clip` and `losses.grpo`;
            importance_sampling_level, sapo_temperature_pos, sapo_temperature_neg; use_bias_correction_kl.

    Returns:
        PolicyOutput. `losses.policy_metrics(out.logps, old_logps, advantages, mask, ...)` makes TRL's metrics of it.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, device or range, or one that nothing would read.
    """
    if checks.floating("logits", logits).ndim != 3 or logits.shape[-1] == 0:
        raise ValueError(f"logits: got shape {tuple(logits.shape)}, expected [B, T, V] with V >= 1")
    labels = checks.integer("labels", labels, logits.shape[:-1], logits.device, "the logits' shape without the last")
    checks.choice("loss_type", loss_type, TYPES)
    checks.inplace(inplace_backward, logits)
    settings = dict(settings)
    rest = terms_besides(kl, kl_coef, entropy_coef, ref_logps, settings)
    form, per_answer = form_of(loss_type, settings, rest)
    temperature = checks.positive("temperature", temperature)
    name = backends.resolve(backend, logits.device, logits.dtype)
    counted = labels != IGNORE
    if mask is not None:
        counted = counted & checks.mask_like("mask", mask, labels, "labels")
    counted = counted.contiguous()  # sums over tokens go in the same order, whatever the arguments' layouts
    # labels.where(labels != IGNORE, IGNORE) would be the labels; Inductor 2.13 makes wrong code of it for AVX 2.
    labels = labels if mask is None else torch.where(counted, labels, IGNORE)
    labels, dtype = labels.contiguous(), stats_dtype(logits.dtype)
    if (advantages is None) != (loss_type == "sft"):
        got = "None" if advantages is None else "a tensor"
        raise ValueError(f"advantages: got {got} with {loss_type!r}; sft has none, the others need [B] or [B, T]")
    reads_old = loss_type not in WITHOUT_RATIO or (kl is not None and form.kl_times_ratio)
    checks.only_with("old_logps", None if old_logps is None else "a tensor", None, reads_old, "a ratio")
    a = counted if advantages is None else broadcast_advantages(advantages, counted)
    weights = default_weights(counted, loss_type) if weights is None else weights
    numbers = {"weights": weights, "old_logps": old_logps, "ref_logps": ref_logps}
    given = Given(a.expand(labels.shape).to(dtype), *(per_token(k, v, counted, dtype) for k, v in numbers.items()))
    arguments = logits, labels, given, form, temperature, inplace_backward, name
    if per_answer:
        return answer_level(*arguments)
    loss, tokens = token_level(*arguments)

    fields = tokens.detach().view(tokens.shape[0], *labels.shape)  # -1 would be ambiguous without tokens

    def field(index: int, wanted: bool = True) -> Optional[Tensor]:
        return fields[index].clone() if wanted else None

    with_ratio = loss_type not in WITHOUT_RATIO
    return PolicyOutput(
        loss, field(LOSS), field(LOGP), field(ENTROPY), field(KL, kl is not None), field(RATIO, with_ratio),
        field(CLIPPED_FIELD, with_ratio and loss_type != "sapo"),
    )  # fmt: skip
