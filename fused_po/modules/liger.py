"""Losses from hidden states and LM heads, with the signatures of Liger 0.8.5's fused linear losses.

docs/api.md, "Modules", describes them. Log-probs come from `linear_logps`, formulas from `losses`. Liger's arguments
`compiled` and `chunk_size` do not exist here, because a `Schedule` controls the computation. Arguments that follow
`compiled` in Liger are keyword-only, so that positional calls cannot assign them to the wrong name.

Results are (loss, aux). Log-probs and NLLs in aux have gradients (Liger's only appear to); rewards and metrics have
none. Means and sums of logits are over all positions and the vocabulary, as in Liger, and are computed without logits.
A sequence without scored tokens has log-prob 0, not NaN.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor, nn

from fused_po import checks, losses
from fused_po.lm_head.logps import linear_logps
from fused_po.modules.liger_scoring import Result, pair_result, score, score_pairs, score_reference
from fused_po.reduce import mean

DPO_LOSSES = (
    "sigmoid",
    "hinge",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "discopop",
)
# argument -> (its default, the loss_types that use it)
USED_BY: dict[str, tuple[object, tuple[str, ...]]] = {
    "label_smoothing": (0.0, ("sigmoid", "robust", "exo_pair")),
    "discopop_tau": (0.05, ("discopop",)),
}


class FusedLinearDPOLoss(nn.Module):
    """Losses of the DPO family, like LigerFusedLinearDPOLoss. Math: `losses.preference_loss`.

    Differences from Liger: "sigmoid" applies the label smoothing, which Liger ignores. A label smoothing that the loss
    does not use is an error. "exo_pair" without smoothing uses the paper's 1e-3, where Liger raises.

    Args:
        ignore_index: the label of positions that do not count.
        beta: > 0.
        alpha, compute_nll_loss: add alpha * (mean NLL over the tokens of the chosen answers) to the loss.
        use_ref_model: False uses a reference log-prob of 0 and ignores a reference that is passed.
        average_log_prob: log-probs of sequences are means over tokens instead of sums.
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
        checks.whole_number("ignore_index", ignore_index)
        self.ignore_index, self.compute_nll_loss = ignore_index, compute_nll_loss
        self.alpha = checks.number("alpha", alpha, "finite numbers", lambda v: True)
        self.use_ref_model, self.average_log_prob, self.beta = use_ref_model, average_log_prob, beta
        self.how = dict(loss_type=loss_type, beta=beta, label_smoothing=label_smoothing, discopop_tau=discopop_tau)
        losses.preference_loss(*torch.zeros(4, 0), **self.how)  # raises for invalid settings

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
        """Compute the loss.

        Args:
            lin_weight: [V, H]. _input: [2B, T, H], chosen first. target: [2B, T], aligned with _input. bias: [V].
            ref_input, ref_weight, ref_bias: those of the reference.

        Returns:
            (loss, (chosen_logps, rejected_logps, chosen_logits_mean, rejected_logits_mean, nll_loss, chosen_rewards,
            rejected_rewards)).
        """
        how = self.ignore_index, self.average_log_prob
        pairs = score_pairs(_input, lin_weight, target, bias, *how)
        reference = score_reference(pairs, target, (ref_input, ref_weight, ref_bias), self.use_ref_model, *how).chunk(2)
        loss = losses.preference_loss(*pairs.halves(), *reference, **self.how)
        rewards = tuple(self.beta * (ours - theirs) for ours, theirs in zip(pairs.halves(), reference))
        return pair_result(pairs, loss, pairs.chosen_nll() if self.compute_nll_loss else None, self.alpha, rewards)


class FusedLinearCPOLoss(nn.Module):
    """CPO, like LigerFusedLinearCPOLoss. Math: `losses.cpo`.

    Args:
        ignore_index: the label of positions that do not count. beta: > 0.
        alpha, compute_nll_loss: add alpha * (mean NLL over the tokens of the chosen answers) to the loss.
        label_smoothing: in [0, 0.5). average_log_prob: log-probs of sequences are means over tokens instead of sums.
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
        checks.whole_number("ignore_index", ignore_index)
        self.ignore_index, self.average_log_prob = ignore_index, average_log_prob
        self.compute_nll_loss, self.beta = compute_nll_loss, beta
        self.alpha = checks.number("alpha", alpha, "finite numbers", lambda v: True)
        self.how = dict(beta=beta, label_smoothing=label_smoothing)
        losses.cpo(*torch.zeros(2, 0), **self.how)  # raises for invalid settings

    def forward(self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Optional[Tensor] = None) -> Result:
        """Compute the loss.

        Args:
            lin_weight: [V, H]. _input: [2B, T, H], chosen first. target: [2B, T], aligned with _input. bias: [V].

        Returns:
            (loss, (chosen_logps, rejected_logps, chosen_logits_mean, rejected_logits_mean, nll_loss, chosen_rewards,
            rejected_rewards)).
        """
        pairs = score_pairs(_input, lin_weight, target, bias, self.ignore_index, self.average_log_prob)
        loss = losses.cpo(*pairs.halves(), **self.how)
        nll = pairs.chosen_nll() if self.compute_nll_loss else None
        return pair_result(pairs, loss, nll, self.alpha, tuple(self.beta * v for v in pairs.halves()))


class FusedLinearSimPOLoss(nn.Module):
    """SimPO on log-probs averaged over tokens, like LigerFusedLinearSimPOLoss. Math: `losses.simpo`.

    Args:
        ignore_index: the label of positions that do not count. beta: > 0 (2 to 2.5 in the paper).
        alpha, compute_nll_loss: add alpha * (mean NLL over the tokens of the chosen answers) to the loss. On by
            default, as in Liger; the paper has no such term.
        label_smoothing: in [0, 0.5). gamma: the target reward margin, >= 0.
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
        checks.whole_number("ignore_index", ignore_index)
        self.ignore_index, self.compute_nll_loss, self.beta = ignore_index, compute_nll_loss, beta
        self.alpha = checks.number("alpha", alpha, "finite numbers", lambda v: True)
        self.how = dict(beta=beta, gamma=gamma, label_smoothing=label_smoothing)
        losses.simpo(*torch.zeros(2, 0), **self.how)  # raises for invalid settings

    def forward(self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Optional[Tensor] = None) -> Result:
        """Compute the loss. Arguments and results as in `FusedLinearCPOLoss.forward`."""
        pairs = score_pairs(_input, lin_weight, target, bias, self.ignore_index, True)
        loss = losses.simpo(*pairs.halves(), **self.how)
        nll = pairs.chosen_nll() if self.compute_nll_loss else None
        return pair_result(pairs, loss, nll, self.alpha, tuple(self.beta * v for v in pairs.halves()))


class FusedLinearORPOLoss(nn.Module):
    """ORPO on log-probs averaged over tokens, like LigerFusedLinearORPOLoss. Math: `losses.orpo`.

    Unlike Liger's, it stays finite where the probability of an answer rounds to 1.

    Args:
        ignore_index: the label of positions that do not count. beta: > 0.
        compute_nll_loss: add the mean NLL over the tokens of the chosen answers to the loss.
    """

    def __init__(self, ignore_index: int = -100, beta: float = 0.1, compute_nll_loss: bool = True) -> None:
        super().__init__()
        checks.flags(compute_nll_loss=compute_nll_loss)
        checks.whole_number("ignore_index", ignore_index)
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
        """Compute the loss.

        Args:
            lin_weight: [V, H]. _input: [2B, T, H], chosen first. target: [2B, T], aligned with _input. bias: [V].
            nll_target: [2B, T], other labels for the NLL, for example with the prompts. Only the chosen half is used;
                it is scored in a second pass.

        Returns:
            (loss, (chosen_logps, rejected_logps, chosen_logits_mean, rejected_logits_mean, nll_loss, chosen_rewards,
            rejected_rewards, log_odds_ratio, log_odds_chosen)).
        """
        pairs = score_pairs(_input, lin_weight, target, bias, self.ignore_index, True)
        chosen, rejected = pairs.halves()
        loss = losses.orpo(chosen, rejected, beta=self.beta, nll_coef=0.0)
        nll = None
        if self.compute_nll_loss and nll_target is None:
            nll = pairs.chosen_nll()
        elif self.compute_nll_loss:
            checks.integer("nll_target", nll_target, target.shape, target.device, "the shape of target")
            labels, hidden = nll_target.chunk(2)[0], _input.chunk(2)[0]
            logps = linear_logps(hidden, lin_weight, labels, bias, ignore_index=self.ignore_index).logps
            nll = losses.sft(logps).sum() / (labels != self.ignore_index).sum().clamp(min=1)
        elif nll_target is not None:
            raise ValueError("nll_target: not used with compute_nll_loss=False in the constructor; leave it out")
        metrics = losses.odds_ratio_metrics(chosen, rejected)
        more = metrics["log_odds_ratio"], metrics["log_odds_chosen"]
        return pair_result(pairs, loss, nll, 1.0, (self.beta * chosen, self.beta * rejected), more)


class FusedLinearKTOLoss(nn.Module):
    """KTO, like LigerFusedLinearKTOLoss, plus weights of the two classes, which Liger's does not have.

    Math: `losses.kto`.

    Args:
        ignore_index: the label of positions that do not count. beta: > 0.
        use_ref_model: False uses a reference log-prob of 0 and ignores a reference that is passed.
        average_log_prob: log-probs of sequences are means over tokens instead of sums.
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
        checks.whole_number("ignore_index", ignore_index)
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
        """Compute the loss.

        Args:
            _input: [B, T, H]. lin_weight: [V, H]. target: [B, T], aligned with _input. bias: [V].
            preference_labels: [B], booleans, True for desirable answers. Required.
            ref_input, ref_weight, ref_bias: those of the reference.
            kl: z0, a scalar or [B], see `losses.kto_kl`. None: 0.

        Returns:
            (loss, (chosen_logps, rejected_logps, chosen_logits, rejected_logits, chosen_rewards, rejected_rewards)),
            where aux holds sums over the batch.
        """
        is_tensor = isinstance(preference_labels, Tensor)
        batch = checks.tensor("target", target).shape[:1]
        if not is_tensor or preference_labels.dtype != torch.bool or preference_labels.shape != batch:
            got = f"{preference_labels.dtype} {[*preference_labels.shape]}" if is_tensor else repr(preference_labels)
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
