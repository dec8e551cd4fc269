"""`dpo_from_logits` and `linear_dpo`: DPO with a per-token KL penalty, from logits or from hidden states."""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
from torch import Tensor

from fused_po import checks
from fused_po.ops import backend as backends
from fused_po.ops import preference
from fused_po.ops.autograd import public
from fused_po.ops.kl import KLStats, kl_from_logits
from fused_po.ops.linear_kl import linear_kl
from fused_po.ops.linear_logps import linear_logps
from fused_po.parallel import ProcessGroupLike
from fused_po.reference import stats_dtype
from fused_po.schedule import Schedule

KL_ESTIMATORS = ("k1", "k2", "k3", "full")


class DPOOutput(NamedTuple):
    """What a fused DPO loss returns. fp32 (float64 for float64 inputs); B pairs.

    loss: scalar, mean(losses) + kl_coef * kl. Carries gradients, as do the next three.
    losses: [B], the DPO loss of each pair.
    chosen_logps, rejected_logps: [B], the policy's log-probs of the answers, summed over tokens.
    chosen_rewards, rejected_rewards: [B], the implicit rewards beta * (log pi - log pi_ref).
    margins: [B], chosen_rewards - rejected_rewards. accuracy: [B], 1 where the margin is above 0.
    kl: scalar, mean of kl_per_token [2B, T] over scored tokens. Both None unless `kl` names an estimator.
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


def _output(results: tuple[Tensor, ...], labels: Tensor, kl: Optional[str]) -> DPOOutput:
    loss, losses, chosen, rejected, mean_kl, kl_tokens, *metrics = results[:10]
    kl_values = (mean_kl.detach(), kl_tokens.detach().view(labels.shape)) if kl else (None, None)
    return DPOOutput(loss, losses, chosen, rejected, *(value.detach() for value in metrics), *kl_values)


def _with_exact_kl(
    stats: KLStats, labels: Tensor, numbers: tuple[float, float, float], ignore_index: int, backend: Optional[str]
) -> DPOOutput:
    """The loss from log-probs, plus the KL that came with them; autograd joins the two at the log-probs' own op."""
    beta, smoothing, coef = numbers
    logps, ref_logps = stats.logps, stats.ref_logps
    name = backends.resolve(backend, logps.device, logps.dtype)
    results = preference.from_logps(logps, labels, ref_logps, beta, smoothing, None, 0.0, ignore_index, name)
    out = _output(results, labels, None)
    mean_kl = stats.kl.sum() / (labels != ignore_index).sum().clamp(min=1)
    loss = out.loss + coef * mean_kl if coef else out.loss
    return out._replace(loss=loss, kl=mean_kl.detach(), kl_per_token=stats.kl.detach())


_reference_logps = checks.called(hidden="ref_hidden", weight="ref_weight", bias="ref_bias")(linear_logps)


def _check_stacked(name: str, value: Tensor, dims: int) -> None:
    checks.floating(name, value)
    if value.ndim != dims or value.shape[0] % 2 or value.shape[-1] == 0:
        last = "V" if name.endswith("logits") else "H"
        raise ValueError(
            f"{name}: got shape {tuple(value.shape)}, expected [2B, T, {last}] with {last} >= 1: an even number of "
            "sequences, the B chosen answers first, then the B rejected ones"
        )


def _check_loss(beta, label_smoothing, kl, kl_coef, ref_logps, labels, device) -> tuple[float, float, float]:
    """(beta, label_smoothing, kl_coef), and what holds between the arguments of the loss."""
    beta = checks.positive("beta", beta)
    smoothing = checks.number("label_smoothing", label_smoothing, "0 <= label_smoothing < 0.5", lambda v: 0 <= v < 0.5)
    coef = checks.number("kl_coef", kl_coef, "finite numbers >= 0", lambda v: v >= 0)
    checks.choice("kl", kl, (None, *KL_ESTIMATORS))
    if kl is None and coef:
        raise ValueError(f"kl_coef: got {kl_coef} without an estimator; name one with kl=, of {KL_ESTIMATORS}")
    if ref_logps is None:
        return beta, smoothing, coef
    if kl == "full":
        raise ValueError("kl: got 'full' with ref_logps; the exact KL needs the reference's logits, or hidden and head")
    checks.same_device("ref_logps", checks.floating("ref_logps", ref_logps), device)
    if ref_logps.shape not in (labels.shape, labels.shape[:1]):
        allowed = f"{tuple(labels.shape)} per token or {tuple(labels.shape[:1])} summed over tokens"
        raise ValueError(f"ref_logps: got shape {tuple(ref_logps.shape)}, expected {allowed}")
    if kl is not None and ref_logps.ndim == 1:
        raise ValueError(f"kl: got {kl!r} with ref_logps summed over tokens; it needs them per token, [2B, T]")
    return beta, smoothing, coef


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
    """The DPO loss from logits of policy and reference, with an optional per-token KL penalty. Fused end to end.

    loss = mean_b [-(1 - e) log s(h_b) - e log s(-h_b)] + kl_coef * mean over scored tokens of the KL estimate,
    h = beta * [(log pi(y_w) - log pi_ref(y_w)) - (log pi(y_l) - log pi_ref(y_l))], s the sigmoid, e label_smoothing.
    DPO: Rafailov et al. 2023, arXiv:2305.18290, eq. 7; label smoothing (cDPO): Mitchell 2023. The estimators, with
    r = log pi - log pi_ref of a token: k1 = r, k2 = r^2 / 2, k3 = e^-r - 1 + r (Schulman 2020). As a loss, k1's
    gradient averages to nothing on the policy's own samples; k2's is the reverse KL's. "full" is no estimate: the exact
    KL(pi || pi_ref) of each position's whole distribution, see `kl_from_logits`, in the same read of the logits.

    Args:
        logits: [2B, T, V], the policy's, chosen answers first. Its processing and dtypes: see `logps_from_logits`.
        labels: [2B, T], aligned with the logits; ignore_index on prompts and padding, which are not read.
        ref_logits: [2B, T, V], the reference's; no gradient flows to them. Or else:
        ref_logps: [2B, T] the reference's log-probs of the labels, or [2B] their sums (then there is no per-token KL).
        beta: > 0. label_smoothing: the share of flipped preferences, in [0, 0.5).
        kl: "k1", "k2", "k3", "full" (with ref_logits), or None for no KL.
        kl_coef: its weight in the loss, >= 0; with 0 it is only reported.
        inplace_backward: the backward overwrites the logits with their gradient. They must not be used afterwards.
        backend: "triton" or "reference"; None chooses by device.

    Returns:
        DPOOutput. A pair without scored tokens has log-probs of 0, the loss log 2, and no gradient.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, device or range, by name.
    """
    _check_stacked("logits", logits, 3)
    labels = checks.integer("labels", labels, logits.shape[:-1], logits.device, "the logits' [2B, T]")
    if (ref_logits is None) == (ref_logps is None):
        raise ValueError(
            "ref_logits, ref_logps: expected exactly one of them; a loss without a reference takes "
            "ref_logps=torch.zeros(2B)"
        )
    if ref_logits is not None:
        checks.same_device("ref_logits", checks.floating("ref_logits", ref_logits), logits.device)
        if ref_logits.shape != logits.shape:
            got, expected = tuple(ref_logits.shape), tuple(logits.shape)
            raise ValueError(f"ref_logits: got shape {got}, expected {expected}, the policy's")
        ref_logits = ref_logits.detach()
    loss_numbers = _check_loss(beta, label_smoothing, kl, kl_coef, ref_logps, labels, logits.device)
    checks.inplace(inplace_backward, logits)
    checks.whole("ignore_index", ignore_index)
    if kl == "full":
        how = dict(temperature=temperature, logit_scale=logit_scale, softcap=softcap, ignore_index=ignore_index)
        how |= dict(inplace_backward=inplace_backward, backend=backend)
        stats = kl_from_logits(logits, ref_logits, labels, **how)
        return _with_exact_kl(stats, labels, loss_numbers, ignore_index, backend)
    outer, inner = checks.scaling(temperature, logit_scale, softcap)
    name = backends.resolve(backend, logits.device, logits.dtype)
    if ref_logits is not None and ref_logits.dtype != logits.dtype:
        backends.resolve(name, ref_logits.device, ref_logits.dtype)
    ref_logps = None if ref_logps is None else ref_logps.detach().to(stats_dtype(logits.dtype))
    beta, smoothing, coef = loss_numbers
    results = preference.from_logits(
        logits, labels, ref_logits, ref_logps, beta, smoothing, kl, coef, outer, inner, ignore_index,
        inplace_backward, name,
    )  # fmt: skip
    return _output(results, labels, kl)


@public
def linear_dpo(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ref_hidden: Optional[Tensor] = None,
    ref_weight: Optional[Tensor] = None,
    ref_logps: Optional[Tensor] = None,
    *,
    bias: Optional[Tensor] = None,
    ref_bias: Optional[Tensor] = None,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    kl: Optional[str] = None,
    kl_coef: float = 0.0,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: Optional[float] = None,
    ignore_index: int = -100,
    process_group: ProcessGroupLike = None,
    backend: Optional[str] = None,
    schedule: Optional[Schedule] = None,
) -> DPOOutput:
    """The DPO loss from hidden states and LM heads of policy and reference; no [2B, T, V] logits exist.

    The loss, `beta`, `label_smoothing`, `kl` and `kl_coef`: see `dpo_from_logits`. The projection, `bias`,
    `process_group` and `schedule`: see `linear_logps`. The reference's hidden size may differ from the policy's; its
    vocabulary may not.

    Args:
        hidden: [2B, T, H], the policy's, chosen answers first. weight: [V, H]. bias: [V].
        labels: [2B, T], aligned with hidden; ignore_index on prompts and padding, which cost nothing.
        ref_hidden: [2B, T, H'], ref_weight: [V, H'], ref_bias: [V]: the reference's, without gradients. Or else:
        ref_logps: [2B, T] the reference's log-probs of the labels, or [2B] their sums (then there is no per-token KL).

    Returns:
        DPOOutput. A pair without scored tokens has log-probs of 0, the loss log 2, and no gradient.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or range, by name.
    """
    _check_stacked("hidden", hidden, 3)
    labels = checks.integer("labels", labels, hidden.shape[:-1], hidden.device, "hidden's [2B, T]")
    if (ref_hidden is None) == (ref_logps is None) or (ref_hidden is None) != (ref_weight is None):
        raise ValueError(
            "ref_hidden, ref_weight, ref_logps: expected ref_hidden with ref_weight, or ref_logps alone; a loss "
            "without a reference takes ref_logps=torch.zeros(2B)"
        )
    if ref_bias is not None and ref_hidden is None:
        raise ValueError("ref_bias: given without ref_hidden and ref_weight, which it belongs to")
    numbers = _check_loss(beta, label_smoothing, kl, kl_coef, ref_logps, labels, hidden.device)
    how = dict(temperature=temperature, logit_scale=logit_scale, softcap=softcap, ignore_index=ignore_index)
    how |= dict(process_group=process_group, backend=backend, schedule=schedule)
    if kl == "full":
        stats = linear_kl(hidden, weight, ref_hidden, ref_weight, labels, bias=bias, ref_bias=ref_bias, **how)
        return _with_exact_kl(stats, labels, numbers, ignore_index, backend)
    logps = linear_logps(hidden, weight, labels, bias, **how).logps
    if ref_hidden is not None and ref_weight is not None:
        if checks.tensor("ref_weight", ref_weight).shape[:1] != weight.shape[:1]:
            got, expected = tuple(ref_weight.shape), weight.shape[0]
            raise ValueError(f"ref_weight: got shape {got}, expected [{expected}, H'], the policy's vocabulary")
        with torch.no_grad():
            ref_logps = _reference_logps(ref_hidden, ref_weight, labels, ref_bias, **how).logps
    beta, smoothing, coef = numbers
    name = backends.resolve(backend, logps.device, logps.dtype)
    ref_logps = ref_logps.detach().to(logps.dtype)
    results = preference.from_logps(logps, labels, ref_logps, beta, smoothing, kl, coef, ignore_index, name)
    return _output(results, labels, kl)
