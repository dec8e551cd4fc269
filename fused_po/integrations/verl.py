"""verl's log-probs computed by fused_po, and our policy losses in verl's registry.

    import fused_po.integrations.verl as fused
    fused.install()          # in each worker, before or after verl's engines are imported

The replaced functions can also be called without `install`, with verl's arguments. docs/integrations.md lists what is
replaced and what is not. Written for verl 0.9.1.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor, nn

from fused_po import checks, losses
from fused_po.integrations.swap import Swap
from fused_po.lm_head.logps import linear_logps
from fused_po.losses.policy import clip_sides, importance_ratio, sequence_mean
from fused_po.ops.logps import logps_from_logits
from fused_po.ops.outputs import TokenStats
from fused_po.parallel.vocab import VocabParallel
from fused_po.schedule import Schedule

REPLACED = {
    "logprobs_from_logits": "verl.utils.torch_functional",
    "linear_cross_entropy": "verl.utils.kernel.linear_cross_entropy",
    "FusedLinearForPPO": "verl.utils.experimental.torch_functional",
}
_swap = Swap()


def install() -> None:
    """Replace the functions of verl in REPLACED, and register our policy losses. A second call does nothing.

    Raises:
        ImportError: verl is not installed, or its modules cannot be imported.
        RuntimeError: verl does not have one of the names. Nothing is replaced then.
    """
    register_policy_losses()
    _swap.replace((module, name, globals()[name]) for name, module in REPLACED.items())


def uninstall() -> None:
    """Restore verl's functions. The policy losses stay registered; they replaced nothing."""
    _swap.undo()


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """Log-probs of the labels, fp32. Replaces verl.utils.torch_functional.logprobs_from_logits.

    Args:
        logits: [..., V]. labels: [...], integers in [0, V), or -100, which gives 0 as in flash-attn's kernel.
        inplace_backward: the backward overwrites the logits with their gradient, as flash-attn's kernel does in verl. A
            leaf is never overwritten.
    """
    leaf = logits.is_leaf and logits.requires_grad
    return logps_from_logits(logits, labels.long(), inplace_backward=inplace_backward and not leaf).logps


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    """(log-probs, entropy), fp32, [N] each; with a reduction the log-probs are one number, as in verl.

    Replaces verl.utils.kernel.linear_cross_entropy.linear_cross_entropy. It supports any vocabulary and hidden size,
    and runs on CPU.

    Args:
        hidden: [..., H], N rows. weight: [V, H]. labels: [...], integers in [0, V), or -100.
        temperature: > 0. reduction: of the log-probs, "none", "mean" or "sum".
        dist_process_group: the ranks over which the vocabulary is sharded in equal parts. As in verl, the gradient of
            hidden is this rank's partial sum; Megatron's gather_from_sequence_parallel_region adds the parts.
    """
    reduction = str(reduction).lower()
    checks.choice("reduction", reduction, ("none", "mean", "sum"))
    group = None if dist_process_group is None else VocabParallel(dist_process_group, partial_grad=True)
    stats = _score(hidden, weight, labels, temperature, group=group)
    logps, entropy = stats.logps.flatten(), stats.entropy.flatten()
    return {"none": logps, "mean": logps.mean(), "sum": logps.sum()}[reduction], entropy


class FusedLinearForPPO(nn.Module):
    """(log-probs, entropy), fp32, shaped like the labels.

    Replaces verl.utils.experimental.torch_functional.FusedLinearForPPO.

    Args:
        chunk_size: the number of tokens to compute at a time. None: by memory, see `Schedule`.
        impl_backend: "torch" or "liger", the values verl passes. Both run fused_po's default backend.
    """

    def __init__(self, chunk_size: Optional[int] = None, impl_backend: str = "torch") -> None:
        super().__init__()
        checks.choice("impl_backend", impl_backend, ("torch", "liger"))
        if chunk_size is not None and not (isinstance(chunk_size, int) and chunk_size > 0):
            raise ValueError(f"chunk_size: got {chunk_size!r}, allowed are integers > 0, or None")
        self.chunk_size, self.impl_backend = chunk_size, impl_backend

    def forward(
        self, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """hidden_states [..., H], vocab_weights [V, H], input_ids [...] (aligned)."""
        stats = _score(hidden_states, vocab_weights, input_ids, temperature, self.chunk_size)
        return stats.logps, stats.entropy


def _score(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float,
    rows: Optional[int] = None,
    group: Optional[VocabParallel] = None,
) -> TokenStats:
    schedule = None
    if rows is not None:
        schedule = Schedule(
            tile_bytes=4 * rows * weight.shape[0]
        )  # at most so many rows of fp32 logits, with padding and basis fewer
    labels, how = labels.long().view(hidden.shape[:-1]), dict(outputs=("logps", "entropy"), schedule=schedule)
    return linear_logps(hidden, weight, labels, temperature=float(temperature), process_group=group, **how)


def _clip(config: Any) -> dict[str, float]:
    low, high = config.clip_ratio_low, config.clip_ratio_high
    both = config.clip_ratio
    return {"epsilon": both if low is None else low, "epsilon_high": both if high is None else high}


# name -> (loss of log-probs, old log-probs, advantages, mask; a function that reads its settings from ActorConfig)
POLICY_LOSSES = {
    "ppo": (losses.ppo_clip, lambda c: {**_clip(c), "dual_clip": c.get("clip_ratio_c", 3.0)}),
    "gspo": (losses.gspo, lambda c: {**_clip(c), "token_level": True}),  # verl's form, for advantages per token
    "luspo": (losses.luspo, _clip),
    "cispo": (losses.cispo, _clip),
    "sapo": (losses.sapo, lambda c: {"temperature_pos": c.tau_pos, "temperature_neg": c.tau_neg}),
    "vespo": (losses.vespo, lambda c: {}),
}


def register_policy_losses() -> None:
    """Add the losses in POLICY_LOSSES to verl's registry, as policy_loss.loss_mode "fused_po_ppo" and so on.

    Settings come from verl's actor config, with verl's names; VESPO uses the paper's. verl aggregates the token losses.
    Metrics are "actor/ppo_kl" and "actor/pg_clipfrac": the share of tokens outside the clip range on the side towards
    which the advantage pushes them.
    """
    from verl.trainer.ppo.core_algos import agg_loss, register_policy_loss

    for name in POLICY_LOSSES:
        register_policy_loss(f"fused_po_{name}")(_policy_loss(name, agg_loss))


def _policy_loss(name: str, agg_loss: Any) -> Any:
    loss, settings = POLICY_LOSSES[name]

    def policy_loss(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Optional[Tensor] = None,
    ) -> tuple[Tensor, dict[str, float]]:
        if config is None:
            raise ValueError("config: got None, expected verl's actor config, which has the clip range")
        mask, how = response_mask.bool(), settings(config)
        token_losses = loss(log_prob, old_log_prob, advantages, mask, **how)
        if rollout_is_weights is not None:
            token_losses = token_losses * rollout_is_weights
        log_ratio = torch.where(mask, log_prob.detach() - old_log_prob, 0)
        metrics = {"actor/ppo_kl": losses.masked_mean(-log_ratio, mask).item()}
        if "epsilon" in how:
            if name in ("gspo", "luspo"):  # one ratio per answer
                log_ratio = sequence_mean(log_ratio, mask)
            ratio = importance_ratio(log_ratio, 20.0)
            below, above = clip_sides(ratio, advantages, how["epsilon"], how["epsilon_high"])
            metrics["actor/pg_clipfrac"] = losses.masked_mean((below | above).float(), mask).item()
        aggregated = agg_loss(
            loss_mat=token_losses.expand_as(mask),
            loss_mask=mask,
            loss_agg_mode=loss_agg_mode,
            **config.global_batch_info,
        )
        return aggregated, metrics

    policy_loss.__name__ = f"fused_po_{name}"
    return policy_loss
