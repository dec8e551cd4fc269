"""Losses of single answers that are labeled desirable or undesirable: KTO, APO-zero and BCO.

All take `logps, ref_logps, desirable`: sequence log-probs [B] in nats (sums over tokens) of the policy and of the
reference, and booleans [B]. The reference gets no gradient; None means a log-prob of 0. They return [B], unreduced;
TRL's trainers take the mean. Below, s is the sigmoid, r = logps - ref_logps, and sign is +1 for desirable answers and
-1 for undesirable ones.
"""

from __future__ import annotations

from typing import Optional, Union

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fused_po import checks
from fused_po.losses.numerics import weighted

KTO_LOSSES = ("kto", "apo_zero_unpaired")
Number = Union[float, Tensor]


def log_ratio(logps: Tensor, ref_logps: Optional[Tensor]) -> Tensor:
    """Check the shapes and return r, with the reference detached."""
    checks.per_sequence(logps=logps, **checks.not_none(ref_logps=ref_logps))
    return logps if ref_logps is None else logps - ref_logps.detach()


def check_desirable(desirable: Tensor, logps: Tensor) -> Tensor:
    """Return `desirable` if it is boolean and has the shape of logps."""
    if checks.tensor("desirable", desirable).dtype != torch.bool:
        raise TypeError(f"desirable: got dtype {desirable.dtype}, expected torch.bool")
    return checks.mask_like("desirable", desirable, logps, "logps")


def _number_or_scalar(name: str, value: Number, like: Tensor) -> Number:
    """Return `value` if it is a finite number, or a tensor with one element or the shape of `like`, detached."""
    if not isinstance(value, Tensor):
        return checks.number(name, value, "finite numbers", lambda v: True)
    checks.floating(name, value)
    if value.numel() != 1 and value.shape != like.shape:
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected a scalar or {tuple(like.shape)}")
    checks.same_device(name, value, like.device)
    checks.finite(name, value)
    return value.detach().reshape(()) if value.numel() == 1 else value.detach()


def kto(
    logps: Tensor,
    ref_logps: Optional[Tensor],
    desirable: Tensor,
    kl: Optional[Number] = None,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    loss_type: str = "kto",
) -> Tensor:
    """KTO: L = weight (1 - s(sign beta (r - z0))); "apo_zero_unpaired" has z0 = 0.

    Ethayarajh et al. 2024, arXiv:2402.01306, eqs. 7 and 8 without the additive constant; the weights are the paper's
    lambda_D and lambda_U. TRL computes the same, and so did OpenRLHF's KTOLoss (until March 2026). Liger has no
    weights.

    Args:
        logps, ref_logps: [B]. desirable: [B], booleans. beta: > 0.
        kl: z0 >= 0, as estimated by `kto_kl`: a number, a scalar tensor or [B]; no gradient. Required for "kto", not
            allowed for "apo_zero_unpaired".
        desirable_weight, undesirable_weight: >= 0. Eq. 9 recommends weights such that weight times number of answers
            has a ratio from 1 to 4 / 3 between the two classes.
        loss_type: "kto" or "apo_zero_unpaired", TRL's names.
    """
    checks.choice("loss_type", loss_type, KTO_LOSSES)
    r = log_ratio(logps, ref_logps)
    desirable = check_desirable(desirable, logps)
    weights = [
        checks.number(name, value, "finite numbers >= 0", lambda v: v >= 0)
        for name, value in (("desirable_weight", desirable_weight), ("undesirable_weight", undesirable_weight))
    ]
    if loss_type == "kto":
        if kl is None:
            raise ValueError(
                'kl: got None, but loss_type="kto" needs it; pass kto_kl(...), or 0.0 for no reference point'
            )
        r = r - _number_or_scalar("kl", kl, logps)
    elif kl is not None:
        raise ValueError('kl: not used with loss_type="apo_zero_unpaired"; leave it out')
    gain = checks.positive("beta", beta) * r
    return torch.where(desirable, weights[0] * torch.sigmoid(-gain), weights[1] * torch.sigmoid(gain))


def apo_zero_unpaired(
    logps: Tensor,
    ref_logps: Optional[Tensor],
    desirable: Tensor,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """APO-zero of single answers: L = weight s(-sign beta r).

    D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 7, for one answer. The same as `kto` with
    loss_type="apo_zero_unpaired", TRL's name.

    Args:
        logps, ref_logps: [B]. desirable: [B], booleans. beta: > 0. desirable_weight, undesirable_weight: >= 0.
    """
    weights = dict(desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)
    return kto(logps, ref_logps, desirable, beta=beta, loss_type="apo_zero_unpaired", **weights)


@torch.no_grad()
def kto_kl(kl_logps: Tensor, ref_kl_logps: Tensor, *, clamp: bool = True) -> Tensor:
    """KTO's reference point: z0 = max(0, mean(kl_logps - ref_kl_logps)), a scalar without gradient.

    arXiv:2402.01306, section 4.1: a biased estimate of KL(policy || reference) from prompts paired with answers to
    other prompts of the batch. TRL (when the batch has such pairs) and OpenRLHF do the same, and average over all ranks
    before the clamp: for that pass `clamp=False`, all-reduce, then clamp. Liger takes it as an argument and does not
    clamp.

    Args:
        kl_logps, ref_kl_logps: [B'], sequence log-probs of the mismatched pairs. B' = 0 gives 0.
        clamp: whether to clamp the mean at 0 from below.
    """
    checks.per_sequence(kl_logps=kl_logps, ref_kl_logps=ref_kl_logps)
    checks.flags(clamp=clamp)
    ratios = log_ratio(kl_logps, ref_kl_logps)
    mean = ratios.sum() / max(1, ratios.numel())
    return mean.clamp(min=0) if clamp else mean


def bco(
    logps: Tensor,
    ref_logps: Optional[Tensor],
    desirable: Tensor,
    delta: Number,
    *,
    beta: float = 0.1,
    weights: Optional[Tensor] = None,
) -> Tensor:
    """BCO: L = -weight log s(sign (beta r - delta)), the cross-entropy of a classifier whose logit is the reward.

    Jung et al. 2024, arXiv:2404.04656. delta, the shift of the rewards, is their running mean: `RunningMean`. As in
    TRL's BCOTrainer (removed by 1.16), which updated the mean before it computed the loss. For pairs, without the
    shift: `bco_pair`.

    Args:
        logps, ref_logps: [B]. desirable: [B], booleans. beta: > 0.
        delta: a number, a scalar tensor or [B]; no gradient. 0.0: no shift.
        weights: [B], >= 0, one per answer: `udm_weights`. None: 1.
    """
    r = log_ratio(logps, ref_logps)
    desirable = check_desirable(desirable, logps)
    logit = checks.positive("beta", beta) * r - _number_or_scalar("delta", delta, logps)
    loss = -logsigmoid(torch.where(desirable, logit, -logit))
    if weights is None:
        return loss
    checks.same_shape(logps=logps, **checks.not_none(weights=weights))
    checks.finite("weights", weights)
    return weighted(weights.detach(), loss)


@torch.no_grad()
def udm_weights(
    prob_desirable: Tensor, desirable: Optional[Tensor] = None, *, min_ratio: float = 0.5, max_ratio: float = 10.0
) -> Tensor:
    """BCO's weights for undesirable answers, p / (1 - p) between two bounds; 1 for desirable ones.

    p is the probability, from a classifier that sees only the prompt, that the answer is desirable. The weights make
    the prompt distribution of undesirable answers match that of desirable ones ("underlying distribution matching",
    arXiv:2404.04656). The bounds are those of TRL's BCOTrainer (min_density_ratio, max_density_ratio).

    Args:
        prob_desirable: p, [B] in [0, 1]. desirable: [B], booleans. None: all are undesirable.
        min_ratio, max_ratio: 0 <= min_ratio <= max_ratio.

    Returns:
        [B], the weights for `bco`.
    """
    p = checks.floating("prob_desirable", prob_desirable)
    if checks.values_checked(p) and not bool(((p >= 0) & (p <= 1)).all()):
        raise ValueError(f"prob_desirable: got values from {p.min().item()} to {p.max().item()}, allowed are 0 to 1")
    low = checks.number("min_ratio", min_ratio, "finite numbers >= 0", lambda v: v >= 0)
    high = checks.number("max_ratio", max_ratio, "finite numbers >= min_ratio, {}", lambda v: v >= low, low)
    weights = (p / (1 - p)).clamp(min=low, max=high)  # p = 1 gives inf, which is clamped
    return weights if desirable is None else torch.where(check_desirable(desirable, p), 1.0, weights)


class RunningMean:
    """The mean of all rewards so far, for BCO's delta (TRL's RunningMoments), on the device and without a sync.

    It has state but is not an nn.Module, because a model's `.to(bfloat16)` must not round it. state_dict and
    load_state_dict checkpoint it (Accelerate's register_for_checkpointing accepts it). All examples have equal weight,
    old and new. With several ranks, update with the rewards gathered from all of them.

        delta = running.update(beta * (logps - ref_logps))     # in training; running.mean in evaluation
        loss = losses.bco(logps, ref_logps, desirable, delta, beta=beta).mean()
    """

    def __init__(self) -> None:
        self.mean, self.count = torch.zeros((), dtype=torch.float64, device="cpu"), 0

    @torch.no_grad()
    def update(self, rewards: Tensor) -> Tensor:
        """Add rewards of any shape and return the new mean, a float64 scalar on their device."""
        checks.finite("rewards", checks.floating("rewards", rewards))
        checks.refuse_without_values("rewards", rewards)
        self.count += rewards.numel()
        self.mean = self.mean.to(rewards.device)
        if rewards.numel():
            self.mean = self.mean + (rewards.double() - self.mean).sum() / self.count
        return self.mean

    def state_dict(self) -> dict:
        """{"mean": scalar tensor, "count": int}."""
        return {"mean": self.mean.clone(), "count": self.count}

    def load_state_dict(self, state: dict) -> None:
        """Restore the state from a state_dict."""
        if not isinstance(state, dict) or {"mean", "count"} - set(state):
            got = f"a dict with keys {sorted(map(str, state))}" if isinstance(state, dict) else type(state).__name__
            raise TypeError(f"state: got {got}, expected the result of state_dict, with 'mean' and 'count'")
        self.mean, self.count = checks.floating("mean", state["mean"]).clone().double(), int(state["count"])
