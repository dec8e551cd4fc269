"""Losses from hidden states and heads, called as Liger's fused linear losses of version 0.8.5: docs/api.md, "Modules".

Log-probs come from `linear_logps`, formulas from `losses`. Of Liger's constructors, `compiled` and `chunk_size` are not
taken: how it is computed is decided elsewhere. What stands behind `compiled` there is given by name, so that nothing
lands in another's place.

Results are (loss, aux). Log-probs and NLLs in aux carry gradients, where Liger's look as if they did; rewards and
metrics carry none. Means and sums of logits are over all positions and the vocabulary, as there, without any logits. A
sequence without scored tokens has log-prob 0, not NaN.
"""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
from torch import Tensor, nn

from fused_po import checks, losses
from fused_po.lm_head.logps import linear_logps
from fused_po.reduce import mean, sequence_logps

DPO_LOSSES = (
    "sigmoid", "hinge", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "discopop",
)  # fmt: skip
READERS: dict[str, tuple[object, tuple[str, ...]]] = {  # as liger_grpo's, of DPO
    "label_smoothing": (0.0, ("sigmoid", "robust", "exo_pair")),
    "discopop_tau": (0.05, ("discopop",)),
}
Result = tuple[Tensor, tuple[Tensor, ...]]

# The names that users of these modules know, of the arguments of the functions below them.
named_as_ligers = checks.called(hidden="_input", weight="lin_weight", labels="target")
named_as_references = checks.called(hidden="ref_input", weight="ref_weight", bias="ref_bias", labels="target")


class Scored(NamedTuple):
    """Sequences [S] scored under one head."""

    tokens: Tensor  # [S, T] log-probs, 0 where nothing is scored
    mask: Tensor  # [S, T]
    sequences: Tensor  # [S], sums or means over tokens
    mean_logits: Tensor  # [S], over all positions, scored or not, and the vocabulary

    def halves(self) -> tuple[Tensor, Tensor]:
        """(chosen [B], rejected [B])"""
        return self.sequences.chunk(2)

    def logits_means(self) -> tuple[Tensor, Tensor]:
        """Of the chosen and of the rejected answers."""
        chosen, rejected = self.mean_logits.chunk(2)
        return mean(chosen), mean(rejected)

    def chosen_nll(self) -> Tensor:
        """The mean over the chosen answers' tokens."""
        tokens, mask = self.tokens.chunk(2)[0], self.mask.chunk(2)[0]
        return losses.sft(tokens).sum() / mask.sum().clamp(min=1)


@named_as_ligers
def score(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Optional[Tensor], ignore_index: int, average: bool
) -> Scored:
    if checks.floating("hidden", hidden).ndim != 3:
        raise ValueError(f"hidden: got shape {tuple(hidden.shape)}, expected [B, T, H]")
    logps = linear_logps(hidden, weight, target, bias, ignore_index=ignore_index).logps
    mask = target != ignore_index
    return Scored(logps, mask, sequence_logps(logps, mask, average=average), mean_logits(hidden, weight, bias))


@torch.no_grad()
def mean_logits(hidden: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
    """[S] means over positions and vocabulary: the mean of hidden times the mean of the head's rows."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    means = (hidden.mean(1, dtype=dtype) * weight.mean(0, dtype=dtype)).sum(-1)
    means = means if hidden.shape[1] else torch.zeros_like(means)
    return means if bias is None else means + bias.mean(dtype=dtype)


def score_pairs(hidden: Tensor, *rest) -> Scored:
    """The same of chosen sequences, then as many rejected ones."""
    if checks.tensor("_input", hidden).ndim != 3:
        raise ValueError(f"_input: got shape {tuple(hidden.shape)}, expected [2B, T, H], chosen first")
    if len(hidden) % 2:
        raise ValueError(f"_input: got {len(hidden)} sequences, expected an even number, chosen first")
    return score(hidden, *rest)


@named_as_references
def score_reference(
    like: Scored, target: Tensor, reference: tuple, used: bool, ignore_index: int, average: bool
) -> Tensor:
    """[S] under the reference's (input, weight, bias), without gradients; zeros unless it is used."""
    if not used:
        return torch.zeros_like(like.sequences)
    if reference[0] is None or reference[1] is None:
        raise ValueError("ref_input, ref_weight: got None; pass both, or construct with use_ref_model=False")
    with torch.no_grad():
        logps = linear_logps(*reference[:2], target, reference[2], ignore_index=ignore_index).logps
    return sequence_logps(logps, like.mask, average=average)


def pair_result(
    pairs: Scored, loss: Tensor, nll: Optional[Tensor], alpha: float, rewards: tuple, more: tuple = ()
) -> Result:
    """(mean loss + alpha NLL, (chosen_logps, rejected_logps, chosen_logits_mean, rejected_logits_mean, nll, chosen
    rewards, rejected rewards, ...))"""
    loss = mean(loss)
    if nll is not None:
        loss = loss + alpha * nll
    nll = loss.new_zeros(()) if nll is None else nll
    results = *pairs.halves(), *pairs.logits_means(), nll, *(r.detach() for r in rewards), *more
    return loss, tuple(value.clone() for value in results)  # apart from what the backward reads: all_reduce edits them


class FusedLinearDPOLoss(nn.Module):
    """A loss of DPO's family, as LigerFusedLinearDPOLoss. Math: `losses.preference_loss`.

    Unlike Liger's, "sigmoid" takes the label smoothing (Liger drops it without a word); one that the loss does not
    take is an error; "exo_pair" without smoothing takes the paper's 1e-3, where Liger's is an error.

    Args:
        ignore_index: the label of positions that do not count.
        beta: > 0.
        alpha, compute_nll_loss: add alpha * (mean NLL of the chosen answers' tokens) to the loss.
        use_ref_model: False takes a reference of log-prob 0, and does not look at the one that is passed.
        average_log_prob: log-probs of sequences are means over tokens, not sums.
        loss_type: "sigmoid", "hinge", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "apo_zero",
            "apo_down" or "discopop".
        label_smoothing: in [0, 0.5), for "sigmoid", "robust" and "exo_pair". discopop_tau: in (0, 1].
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        compute_nll_loss: bool = False,
        *,
        use_ref_model: bool = True,
        average_log_prob: bool = False,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        discopop_tau: float = 0.05,
    ) -> None:
        super().__init__()
        checks.choice("loss_type", loss_type, DPO_LOSSES)
        checks.flags(compute_nll_loss=compute_nll_loss, use_ref_model=use_ref_model, average_log_prob=average_log_prob)
        checks.whole("ignore_index", ignore_index)
        self.ignore_index, self.compute_nll_loss = ignore_index, compute_nll_loss
        self.alpha = checks.number("alpha", alpha, "finite numbers", lambda v: True)
        self.use_ref_model, self.average_log_prob, self.beta = use_ref_model, average_log_prob, beta
        self.how = dict(loss_type=loss_type, beta=beta, label_smoothing=label_smoothing, discopop_tau=discopop_tau)
        losses.preference_loss(*torch.zeros(4, 0), **self.how)  # settings that cannot be are errors here already

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Optional[Tensor] = None,
        ref_input: Optional[Tensor] = None,
        ref_weight: Optional[Tensor] = None,
        ref_bias: Optional[Tensor] = None,
    ) -> Result:
        """(loss, (chosen_logps, rejected_logps, chosen_logits_mean, rejected_logits_mean, nll_loss, chosen_rewards,
        rejected_rewards)) from lin_weight [V, H], _input [2B, T, H] (chosen first), target [2B, T] (aligned), and the
        reference's like."""
        how = self.ignore_index, self.average_log_prob
        pairs = score_pairs(_input, lin_weight, target, bias, *how)
        reference = score_reference(pairs, target, (ref_input, ref_weight, ref_bias), self.use_ref_model, *how).chunk(2)
        loss = losses.preference_loss(*pairs.halves(), *reference, **self.how)
        rewards = tuple(self.beta * (ours - theirs) for ours, theirs in zip(pairs.halves(), reference))
        return pair_result(pairs, loss, pairs.chosen_nll() if self.compute_nll_loss else None, self.alpha, rewards)


class FusedLinearCPOLoss(nn.Module):
    """CPO, as LigerFusedLinearCPOLoss. Math: `losses.cpo`.

    Args:
        ignore_index: the label of positions that do not count. beta: > 0.
        alpha, compute_nll_loss: add alpha * (mean NLL of the chosen answers' tokens) to the loss.
        label_smoothing: in [0, 0.5). average_log_prob: log-probs of sequences are means over tokens, not sums.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        *,
        average_log_prob: bool = False,
    ) -> None:
        super().__init__()
        checks.flags(compute_nll_loss=compute_nll_loss, average_log_prob=average_log_prob)
        checks.whole("ignore_index", ignore_index)
        self.ignore_index, self.average_log_prob = ignore_index, average_log_prob
        self.compute_nll_loss, self.beta = compute_nll_loss, beta
        self.alpha = checks.number("alpha", alpha, "finite numbers", lambda v: True)
        self.how = dict(beta=beta, label_smoothing=label_smoothing)
        losses.cpo(*torch.zeros(2, 0), **self.how)

    def forward(self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Optional[Tensor] = None) -> Result:
        """(loss, (chosen_logps, rejected_logps, chosen_logits_mean, rejected_logits_mean, nll_loss, chosen_rewards,
        rejected_rewards)) from lin_weight [V, H], _input [2B, T, H] (chosen first), target [2B, T] (aligned)."""
        pairs = score_pairs(_input, lin_weight, target, bias, self.ignore_index, self.average_log_prob)
        loss = losses.cpo(*pairs.halves(), **self.how)
        nll = pairs.chosen_nll() if self.compute_nll_loss else None
        return pair_result(pairs, loss, nll, self.alpha, tuple(self.beta * v for v in pairs.halves()))


class FusedLinearSimPOLoss(nn.Module):
    """SimPO, as LigerFusedLinearSimPOLoss: of log-probs averaged over tokens. Math: `losses.simpo`.

    Args:
        ignore_index: the label of positions that do not count. beta: > 0 (the paper's is 2 to 2.5).
        alpha, compute_nll_loss: add alpha * (mean NLL of the chosen answers' tokens) to the loss: Liger's default, not
            the paper's.
        label_smoothing: in [0, 0.5). gamma: the target margin, >= 0.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        *,
        gamma: float = 0.5,
    ) -> None:
        super().__init__()
        checks.flags(compute_nll_loss=compute_nll_loss)
        checks.whole("ignore_index", ignore_index)
        self.ignore_index, self.compute_nll_loss, self.beta = ignore_index, compute_nll_loss, beta
        self.alpha = checks.number("alpha", alpha, "finite numbers", lambda v: True)
        self.how = dict(beta=beta, gamma=gamma, label_smoothing=label_smoothing)
        losses.simpo(*torch.zeros(2, 0), **self.how)

    def forward(self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Optional[Tensor] = None) -> Result:
        """(loss, (chosen_logps, rejected_logps, chosen_logits_mean, rejected_logits_mean, nll_loss, chosen_rewards,
        rejected_rewards)) from lin_weight [V, H], _input [2B, T, H] (chosen first), target [2B, T] (aligned)."""
        pairs = score_pairs(_input, lin_weight, target, bias, self.ignore_index, True)
        loss = losses.simpo(*pairs.halves(), **self.how)
        nll = pairs.chosen_nll() if self.compute_nll_loss else None
        return pair_result(pairs, loss, nll, self.alpha, tuple(self.beta * v for v in pairs.halves()))


class FusedLinearORPOLoss(nn.Module):
    """ORPO, as LigerFusedLinearORPOLoss: of log-probs averaged over tokens. Math: `losses.orpo`.

    Unlike Liger's it stays finite where an answer's probability rounds to 1.

    Args:
        ignore_index: the label of positions that do not count. beta: > 0.
        compute_nll_loss: add the mean NLL of the chosen answers' tokens to the loss.
    """

    def __init__(self, ignore_index: int = -100, beta: float = 0.1, compute_nll_loss: bool = True) -> None:
        super().__init__()
        checks.flags(compute_nll_loss=compute_nll_loss)
        checks.whole("ignore_index", ignore_index)
        self.ignore_index, self.compute_nll_loss = ignore_index, compute_nll_loss
        self.beta = checks.positive("beta", beta)

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Optional[Tensor] = None,
        nll_target: Optional[Tensor] = None,
    ) -> Result:
        """(loss, (chosen_logps, rejected_logps, chosen_logits_mean, rejected_logits_mean, nll_loss, chosen_rewards,
        rejected_rewards, log_odds_ratio, log_odds_chosen)) from lin_weight [V, H], _input [2B, T, H] (chosen first),
        target [2B, T] (aligned).

        nll_target: [2B, T], other labels for the NLL, prompts included, say; only the chosen half is looked at, and
        scored in a pass of its own.
        """
        pairs = score_pairs(_input, lin_weight, target, bias, self.ignore_index, True)
        chosen, rejected = pairs.halves()
        loss = losses.orpo(chosen, rejected, beta=self.beta, nll_coef=0.0)
        nll = None
        if self.compute_nll_loss and nll_target is None:
            nll = pairs.chosen_nll()
        elif self.compute_nll_loss:
            checks.integer("nll_target", nll_target, target.shape, target.device, "that of target")
            labels, hidden = nll_target.chunk(2)[0], _input.chunk(2)[0]
            logps = linear_logps(hidden, lin_weight, labels, bias, ignore_index=self.ignore_index).logps
            nll = losses.sft(logps).sum() / (labels != self.ignore_index).sum().clamp(min=1)
        elif nll_target is not None:
            raise ValueError("nll_target: given, but constructed with compute_nll_loss=False; leave it out")
        metrics = losses.odds_ratio_metrics(chosen, rejected)
        more = metrics["log_odds_ratio"], metrics["log_odds_chosen"]
        return pair_result(pairs, loss, nll, 1.0, (self.beta * chosen, self.beta * rejected), more)


class FusedLinearKTOLoss(nn.Module):
    """KTO, as LigerFusedLinearKTOLoss, with the weights of the classes, which that has not. Math: `losses.kto`.

    Args:
        ignore_index: the label of positions that do not count. beta: > 0.
        use_ref_model: False takes a reference of log-prob 0, and does not look at the one that is passed.
        average_log_prob: log-probs of sequences are means over tokens, not sums.
        desirable_weight, undesirable_weight: >= 0.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        *,
        use_ref_model: bool = False,
        average_log_prob: bool = False,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
    ) -> None:
        super().__init__()
        checks.flags(use_ref_model=use_ref_model, average_log_prob=average_log_prob)
        checks.whole("ignore_index", ignore_index)
        self.ignore_index, self.beta = ignore_index, beta
        self.use_ref_model, self.average_log_prob = use_ref_model, average_log_prob
        self.how = dict(beta=beta, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)
        losses.kto(torch.zeros(0), None, torch.zeros(0, dtype=torch.bool), 0.0, **self.how)

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        target: Tensor,
        bias: Optional[Tensor] = None,
        preference_labels: Optional[Tensor] = None,
        ref_input: Optional[Tensor] = None,
        ref_weight: Optional[Tensor] = None,
        ref_bias: Optional[Tensor] = None,
        kl: Optional[Tensor] = None,
    ) -> Result:
        """(loss, sums of the (chosen_logps, rejected_logps, chosen_logits, rejected_logits, chosen_rewards,
        rejected_rewards)) from _input [B, T, H], lin_weight [V, H], target [B, T] (aligned), preference_labels [B],
        booleans (required), and the reference's like. kl: z0, a scalar or [B], see `losses.kto_kl`; None: 0."""
        known = isinstance(preference_labels, Tensor)
        batch = checks.tensor("target", target).shape[:1]
        if not known or preference_labels.dtype != torch.bool or preference_labels.shape != batch:
            got = f"{preference_labels.dtype} {[*preference_labels.shape]}" if known else repr(preference_labels)
            raise ValueError(f"preference_labels: got {got}, expected booleans [B], True for desirable answers")
        how = self.ignore_index, self.average_log_prob
        ours = score(_input, lin_weight, target, bias, *how)
        reference = score_reference(ours, target, (ref_input, ref_weight, ref_bias), self.use_ref_model, *how)
        logps, chosen = ours.sequences, preference_labels
        loss = mean(losses.kto(logps, reference, chosen, 0.0 if kl is None else kl, **self.how))
        logits = ours.mean_logits * (target.shape[1] * len(lin_weight))
        rewards = self.beta * (logps - reference).detach()
        sums = (torch.where(side, v, 0).sum() for v in (logps, logits, rewards) for side in (chosen, ~chosen))
        return loss, tuple(sums)
