"""Pairwise losses by the names of TRL's DPO trainer, one or a weighted mixture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional, Union

import torch
from torch import Tensor

from fused_po import checks
from fused_po.losses import anchored, pairwise
from fused_po.losses.pairwise import Beta

# name -> (function, the optional arguments it takes)
PREFERENCE_LOSSES = {
    "sigmoid": (pairwise.dpo, {"label_smoothing"}),
    "robust": (pairwise.robust_dpo, {"label_smoothing"}),
    "hinge": (pairwise.hinge, set()),
    "ipo": (pairwise.ipo, {"lengths"}),
    "sigmoid_norm": (pairwise.sigmoid_norm, {"lengths"}),
    "exo_pair": (pairwise.exo_pair, {"label_smoothing"}),
    "discopop": (pairwise.discopop, {"tau"}),
    "sft": (None, {"lengths"}),
    "nca_pair": (anchored.nca_pair, set()),
    "bco_pair": (anchored.bco_pair, set()),
    "sppo_hard": (anchored.sppo_hard, set()),
    "apo_zero": (anchored.apo_zero, set()),
    "apo_down": (anchored.apo_down, set()),
    "aot": (anchored.aot, {"label_smoothing"}),
    "aot_unpaired": (anchored.aot_unpaired, {"label_smoothing"}),
}
_score = checks.called(alpha="f_alpha")(pairwise.f_divergence_score)
OF_DIFFERENCES = {"sigmoid", "robust", "hinge", "ipo", "sigmoid_norm", "exo_pair", "discopop", "sft"}


def _sft(chosen: Tensor, length: Tensor) -> Tensor:
    """[B] whose mean is the NLL of all the chosen answers' tokens, averaged over tokens."""
    return -chosen * (chosen.numel() / length.to(chosen).sum().clamp(min=1))


def _one(name: str, logps: tuple, scores: tuple, beta: Beta, label_smoothing: float, lengths: tuple, tau: float):
    """The loss of one name; `scores` are logps, or an f-divergence's scores."""
    function, takes = PREFERENCE_LOSSES[name]
    if function is None:
        return _sft(logps[0], lengths[0])
    how: dict = {"beta": beta}
    if "label_smoothing" in takes and label_smoothing:
        how["label_smoothing"] = label_smoothing
    if "lengths" in takes:
        how |= {"chosen_length": lengths[0], "rejected_length": lengths[1]}
    if "tau" in takes:
        how["tau"] = tau
    return function(*(scores if name in OF_DIFFERENCES else logps), **how)


def _refuse_unused(types: list, label_smoothing: float, f_divergence: str, lengths: tuple) -> None:
    """An argument that none of the losses takes is an error; so is one missing that some loss needs."""
    smooth = {name for name, (_, takes) in PREFERENCE_LOSSES.items() if "label_smoothing" in takes}
    if label_smoothing and not smooth & set(types):
        raise ValueError(f"label_smoothing: got {label_smoothing}, but of {types} none takes it; {sorted(smooth)} do")
    if f_divergence != "reverse_kl" and not set(types) <= OF_DIFFERENCES:
        wrong = sorted(set(types) - OF_DIFFERENCES)
        raise ValueError(f"f_divergence: got {f_divergence!r}, but {wrong} must have 'reverse_kl': see losses.anchored")
    for name, length in checks.given(chosen_length=lengths[0], rejected_length=lengths[1]).items():
        checks.tensor(name, length)  # whether a loss of the list reads it or not
    missing = [name for name in types if "lengths" in PREFERENCE_LOSSES[name][1]]
    if missing and (lengths[0] is None or lengths[1] is None):
        raise ValueError(
            f"chosen_length, rejected_length: got None; loss_type {missing[0]!r} divides by them as TRL does: pass "
            "the answers' numbers of tokens [B]" + ("; losses.ipo without them is IPO on sums" * (missing[0] == "ipo"))
        )


def preference_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Optional[Tensor] = None,
    ref_rejected: Optional[Tensor] = None,
    *,
    loss_type: Union[str, Sequence[str]] = "sigmoid",
    loss_weights: Optional[Sequence[float]] = None,
    beta: Beta = 0.1,
    label_smoothing: float = 0.0,
    f_divergence: str = "reverse_kl",
    f_alpha: float = 0.5,
    chosen_length: Optional[Tensor] = None,
    rejected_length: Optional[Tensor] = None,
    discopop_tau: float = 0.05,
) -> Tensor:
    """A loss of the DPO family by TRL's name, or a sum of several, weighted.

    The formulas are those of the functions in `losses`. On purpose not as TRL: "sigmoid" takes the label smoothing
    (cDPO) where TRL drops it; an argument that no loss of the list takes is an error. "exo_pair" without smoothing
    takes the paper's 1e-3.

    Args:
        chosen, rejected, ref_chosen, ref_rejected: [B], log-probs summed over tokens. A reference of None is 0.
        loss_type: "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot",
            "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"; or a list of them, as MPO's
            ["sigmoid", "bco_pair", "sft"] (Wang et al. 2024, arXiv:2411.10442).
        loss_weights: one number each. None: all 1.
        beta: > 0, a number or [B]. label_smoothing: in [0, 0.5).
        f_divergence, f_alpha: see `f_divergence_score`; for the losses of the difference of rewards.
        chosen_length, rejected_length: [B], numbers of tokens: for "ipo", "sigmoid_norm" and "sft".
        discopop_tau: in (0, 1].

    Returns:
        [B], unreduced. The mean of "sft" is the NLL's mean over all the chosen answers' tokens, as in TRL.
    """
    types = [loss_type] if isinstance(loss_type, str) else [*checks.several("loss_type", loss_type, "names")]
    if not types:
        raise ValueError("loss_type: got an empty list, expected at least one name")
    for name in types:
        checks.choice("loss_type", name, PREFERENCE_LOSSES)
    weights = [1.0] * len(types) if loss_weights is None else checks.several("loss_weights", loss_weights, "numbers")
    if len(weights) != len(types):
        raise ValueError(f"loss_weights: got {len(weights)}, expected {len(types)}, one for each loss_type")
    for weight in weights:
        checks.number("loss_weights", weight, "finite numbers", lambda v: True)
    logps, lengths = (chosen, rejected, ref_chosen, ref_rejected), (chosen_length, rejected_length)
    checks.choice("f_divergence", f_divergence, pairwise.F_DIVERGENCES)
    pairwise.smoothing(label_smoothing)
    checks.only_with("f_alpha", f_alpha, 0.5, f_divergence == "alpha_divergence", 'f_divergence="alpha_divergence"')
    checks.only_with("discopop_tau", discopop_tau, 0.05, "discopop" in types, 'loss_type="discopop"')
    _refuse_unused(types, label_smoothing, f_divergence, lengths)
    pairwise.log_ratios(*logps)  # looks at the shapes before anything is computed
    scores = logps
    if f_divergence != "reverse_kl":
        both = (chosen, ref_chosen), (rejected, ref_rejected)
        scores = tuple(_score(*pair, f_divergence, alpha=f_alpha) for pair in both)
    total = torch.zeros_like(chosen)
    for name, weight in zip(types, weights):
        total = total + weight * _one(name, logps, scores, beta, label_smoothing, lengths, discopop_tau)
    return total
