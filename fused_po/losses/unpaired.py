"""Losses of single answers, each known to be desirable or undesirable: KTO, APO-zero and BCO.

All take `logps, ref_logps, desirable`: sequence log-probs [B] in nats (sums over tokens) under the policy and the
reference, which gets no gradient (None: log-prob 0), and booleans [B]. They return [B], unreduced: TRL's trainers take
the mean. Below, s is the sigmoid, r = logps - ref_logps, and sign is +1 for desirable answers, -1 for undesirable ones.
"""

from __future__ import annotations

from typing import Optional, Union

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fused_po import checks
from fused_po.losses.numerics import weighed

KTO_LOSSES = ("kto", "apo_zero_unpaired")
Number = Union[float, Tensor]


def log_ratio(logps: Tensor, ref_logps: Optional[Tensor]) -> Tensor:
    """r, after a look at shapes; the reference detached."""
    checks.sequences(logps=logps, **checks.given(ref_logps=ref_logps))
    return logps if ref_logps is None else logps - ref_logps.detach()


def check_desirable(desirable: Tensor, logps: Tensor) -> Tensor:
    """`desirable` as it is, if it is boolean and of the log-probs' shape."""
    if checks.tensor("desirable", desirable).dtype != torch.bool:
        raise TypeError(f"desirable: got dtype {desirable.dtype}, expected torch.bool")
    return checks.mask_like("desirable", desirable, logps, "logps")


def _number_or_scalar(name: str, value: Number, like: Tensor) -> Number:
    """A finite number, or a tensor of one element or of like's shape, without its gradient."""
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

    Ethayarajh et al. 2024, arXiv:2402.01306, eqs. 7 and 8, less the constant weight; the weights are its lambda_D and
    lambda_U. TRL agrees, and OpenRLHF's KTOLoss did (till March 2026). Liger has no weights.

    Args:
        logps, ref_logps: [B]. desirable: [B], booleans. beta: > 0.
        kl: z0 >= 0 as `kto_kl` estimates it: a number, a scalar tensor or [B]; used as it is, without a gradient. For
            "kto" only, where it must be given.
        desirable_weight, undesirable_weight: >= 0. Eq. 9 wants (weight x number) of the two classes at a ratio of 1 to
            4 / 3.
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
            raise ValueError('kl: got None, but "kto" is held against it; pass kto_kl(...), or 0.0 to do without')
        r = r - _number_or_scalar("kl", kl, logps)
    elif kl is not None:
        raise ValueError('kl: given, but "apo_zero_unpaired" does not read it; leave it out')
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

    D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 7, one answer at a time. `kto` by its loss_type, as in TRL.

    Args:
        logps, ref_logps: [B]. desirable: [B], booleans. beta: > 0. desirable_weight, undesirable_weight: >= 0.
    """
    weights = dict(desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)
    return kto(logps, ref_logps, desirable, beta=beta, loss_type="apo_zero_unpaired", **weights)


@torch.no_grad()
def kto_kl(kl_logps: Tensor, ref_kl_logps: Tensor, *, clamp: bool = True) -> Tensor:
    """KTO's reference point: z0 = max(0, mean(kl_logps - ref_kl_logps)), a scalar without gradient.

    arXiv:2402.01306, section 4.1: of prompts with answers to other prompts of the batch, which estimates KL(policy ||
    reference) with a bias. TRL (when the batch has such answers) and OpenRLHF do the same, and take the mean over all
    ranks before the clamp: pass `clamp=False`, all-reduce, then clamp. Liger is handed it, and does not clamp.

    Args:
        kl_logps, ref_kl_logps: [B'], sequence log-probs of the mismatched pairs. None of them: 0.
        clamp: at 0 from below.
    """
    checks.sequences(kl_logps=kl_logps, ref_kl_logps=ref_kl_logps)
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
    """BCO: L = -weight log s(sign (beta r - delta)), a classifier's cross-entropy with the reward as its logit.

    Jung et al. 2024, arXiv:2404.04656; delta, the shift of the rewards, is a running mean of them, `RunningMean`. As
    TRL's BCOTrainer (gone by 1.16), which fed it before it took the loss. For pairs, without the shift: `bco_pair`.

    Args:
        logps, ref_logps: [B]. desirable: [B], booleans. beta: > 0.
        delta: a number, a scalar tensor or [B]; no gradient. 0.0 does without.
        weights: [B], >= 0, of all the answers: `udm_weights`. None: 1.
    """
    r = log_ratio(logps, ref_logps)
    desirable = check_desirable(desirable, logps)
    logit = checks.positive("beta", beta) * r - _number_or_scalar("delta", delta, logps)
    loss = -logsigmoid(torch.where(desirable, logit, -logit))
    if weights is None:
        return loss
    checks.alike(logps=logps, **checks.given(weights=weights))
    checks.finite("weights", weights)
    return weighed(weights.detach(), loss)


@torch.no_grad()
def udm_weights(
    prob_desirable: Tensor, desirable: Optional[Tensor] = None, *, min_ratio: float = 0.5, max_ratio: float = 10.0
) -> Tensor:
    """BCO's weights for undesirable answers, p / (1 - p) between two bounds; 1 for desirable ones.

    p is a classifier's probability, from the prompt alone, that the answer is a desirable one. The weights make the
    prompts of the undesirable answers look like those of the desirable ones ("underlying distribution matching",
    arXiv:2404.04656). The bounds are those of TRL's BCOTrainer (min_density_ratio, max_density_ratio).

    Args:
        prob_desirable: p, [B] in [0, 1]. desirable: [B], booleans. None: all are undesirable.
        min_ratio, max_ratio: 0 <= min_ratio <= max_ratio.

    Returns:
        [B], for `bco`'s weights.
    """
    p = checks.floating("prob_desirable", prob_desirable)
    if checks.looked_at(p) and not bool(((p >= 0) & (p <= 1)).all()):
        raise ValueError(f"prob_desirable: got {p.min().item()} to {p.max().item()}, allowed are 0 to 1")
    low = checks.number("min_ratio", min_ratio, "finite numbers >= 0", lambda v: v >= 0)
    high = checks.number("max_ratio", max_ratio, "finite numbers >= min_ratio, {}", lambda v: v >= low, low)
    weights = (p / (1 - p)).clamp(min=low, max=high)  # p = 1 is inf, and so the bound
    return weights if desirable is None else torch.where(check_desirable(desirable, p), 1.0, weights)


class RunningMean:
    """The mean of all rewards so far: BCO's delta, TRL's RunningMoments, on the device and without a sync.

    The one thing here that has a state, and no nn.Module: a model's `.to(bfloat16)` must not round it. It is
    checkpointed by state_dict and load_state_dict (Accelerate's register_for_checkpointing takes it). Every example
    counts the same, however old. Over ranks: update with the rewards gathered from all of them.

        delta = running.update(beta * (logps - ref_logps))     # when training; running.mean in evaluation
        loss = losses.bco(logps, ref_logps, desirable, delta, beta=beta).mean()
    """

    def __init__(self) -> None:
        self.mean, self.count = torch.zeros((), dtype=torch.float64, device="cpu"), 0

    @torch.no_grad()
    def update(self, rewards: Tensor) -> Tensor:
        """Take in rewards of any shape; the new mean, a float64 scalar on their device."""
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
        """Go on from a state_dict."""
        if not isinstance(state, dict) or {"mean", "count"} - set(state):
            got = f"a dict with {sorted(map(str, state))}" if isinstance(state, dict) else type(state).__name__
            raise TypeError(f"state: got {got}, expected what state_dict gives, with 'mean' and 'count'")
        self.mean, self.count = checks.floating("mean", state["mean"]).clone().double(), int(state["count"])
