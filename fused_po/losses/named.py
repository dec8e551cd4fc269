"""`preference_loss`: pairwise losses selected by the names of TRL's DPO trainer, one or a weighted sum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional, Union

import torch
from torch import Tensor

from fused_po import checks
from fused_po.losses import anchored, pairwise
from fused_po.losses.pairwise import Beta

# loss name -> (function, its optional arguments)
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
_score = checks.rename_in_errors(alpha="f_alpha")(pairwise.f_divergence_score)
OF_DIFFERENCES = {"sigmoid", "robust", "hinge", "ipo", "sigmoid_norm", "exo_pair", "discopop", "sft"}


def _sft(chosen: Tensor, length: Tensor) -> Tensor:
    """[B] whose mean is the NLL averaged over all tokens of the chosen answers."""
    return -chosen * (chosen.numel() / length.to(chosen).sum().clamp(min=1))


def _loss(name: str, logps: tuple, scores: tuple, beta: Beta, label_smoothing: float, lengths: tuple, tau: float):
    """The loss of this name. `scores` are the log-probs, or the scores of an f-divergence."""
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
    """Raise for an argument that none of the losses uses, and for a missing one that some loss needs."""
    smooth = {name for name, (_, takes) in PREFERENCE_LOSSES.items() if "label_smoothing" in takes}
    if label_smoothing and not smooth & set(types):
        users, others = (", ".join(map(repr, names)) for names in (sorted(smooth), types))
        raise ValueError(
            f"label_smoothing: got {label_smoothing}, used only with loss_type {users}; leave it at 0 with {others}"
        )
    if f_divergence != "reverse_kl" and not set(types) <= OF_DIFFERENCES:
        wrong = sorted(set(types) - OF_DIFFERENCES)
        raise ValueError(
            f"f_divergence: got {f_divergence!r}, allowed with {wrong} is only 'reverse_kl', since these losses use "
            "more than the difference of the log-ratios"
        )
    for name, length in checks.not_none(chosen_length=lengths[0], rejected_length=lengths[1]).items():
        checks.tensor(name, length)  # checked even if no loss of the list uses it
    missing = [name for name in types if "lengths" in PREFERENCE_LOSSES[name][1]]
    if missing and (lengths[0] is None or lengths[1] is None):
        raise ValueError(
            f"chosen_length, rejected_length: got None; loss_type {missing[0]!r} divides by them as TRL does: pass "
            "the number of tokens of each answer [B]"
            + ("; losses.ipo without them is IPO on sums" * (missing[0] == "ipo"))
        )


def _types_and_weights(loss_type: object, loss_weights: object) -> tuple[list[str], Sequence[float]]:
    """The loss names and their weights as sequences of one length."""
    types = [loss_type] if isinstance(loss_type, str) else [*checks.as_tuple("loss_type", loss_type, "names")]
    if not types:
        raise ValueError("loss_type: got an empty list, expected at least one name")
    for name in types:
        checks.choice("loss_type", name, PREFERENCE_LOSSES)
    weights = [1.0] * len(types) if loss_weights is None else checks.as_tuple("loss_weights", loss_weights, "numbers")
    if len(weights) != len(types):
        raise ValueError(f"loss_weights: got length {len(weights)}, expected {len(types)}, one per loss_type")
    for weight in weights:
        checks.number("loss_weights", weight, "finite numbers", lambda v: True)
    return types, weights


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
    """A loss of the DPO family by TRL's name, or a weighted sum of several.

    The formulas are those of the functions in `losses`. Differences from TRL: "sigmoid" applies the label smoothing
    (cDPO), which TRL ignores; an argument that no loss of the list uses is an error; "exo_pair" without smoothing
    uses the paper's 1e-3.

    Args:
        chosen, rejected, ref_chosen, ref_rejected: [B], log-probs summed over tokens. A reference of None is 0.
        loss_type: "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot",
            "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"; or a list of them, as MPO's
            ["sigmoid", "bco_pair", "sft"] (Wang et al. 2024, arXiv:2411.10442).
        loss_weights: one number per loss. None: all 1.
        beta: > 0, a number or [B]. label_smoothing: in [0, 0.5).
        f_divergence, f_alpha: see `f_divergence_score`; for losses of the difference of the log-ratios.
        chosen_length, rejected_length: [B], numbers of tokens: for "ipo", "sigmoid_norm" and "sft".
        discopop_tau: in (0, 1].

    Returns:
        [B], unreduced. The mean of "sft" is the NLL averaged over all tokens of the chosen answers, as in TRL.
    """
    types, weights = _types_and_weights(loss_type, loss_weights)
    logps, lengths = (chosen, rejected, ref_chosen, ref_rejected), (chosen_length, rejected_length)
    checks.choice("f_divergence", f_divergence, pairwise.F_DIVERGENCES)
    pairwise.smoothing(label_smoothing)
    checks.only_with("f_alpha", f_alpha, 0.5, f_divergence == "alpha_divergence", 'f_divergence="alpha_divergence"')
    checks.only_with("discopop_tau", discopop_tau, 0.05, "discopop" in types, 'loss_type="discopop"')
    _refuse_unused(types, label_smoothing, f_divergence, lengths)
    pairwise.log_ratios(*logps)  # checks the shapes before anything is computed
    scores = logps
    if f_divergence != "reverse_kl":
        both = (chosen, ref_chosen), (rejected, ref_rejected)
        scores = tuple(_score(*pair, f_divergence, alpha=f_alpha) for pair in both)
    total = torch.zeros_like(chosen)
    for name, weight in zip(types, weights):
        total = total + weight * _loss(name, logps, scores, beta, label_smoothing, lengths, discopop_tau)
    return total
