"""The providers that are measured, behind one signature: fused_po, plain PyTorch and the installed peers.

peers.py imports and calls each peer. They return different things:

- Log-probs of tokens, from which any loss follows: TRL, torch, unsloth, cut-cross-entropy, verl, Liger's scaled cross
  entropy. They work for every task.
- One mean: "Liger, cross entropy", "unsloth, cross entropy", quack. They compute the gradients in the forward, even
  without a backward, so their forward time is for both. quack and unsloth return no log-probs, so only their gradients
  are checked.
- One loss of sequences: "Liger", its chunked DPO, CPO, SimPO, ORPO, GRPO and KTO.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import peers
import torch
from cases import BETA, EPSILON, GAMMA, IGNORE, KTO_KL, Case, Problem, desirable, loss_of, sequences
from torch import Tensor

import fused_po
from fused_po import Schedule
from fused_po.schedule import logits_budget


def always(case: Case, device: str) -> str | None:
    """Works for every case."""
    return None


class Provider(NamedTuple):
    """`loss`: the task's loss, for a backward. `values`: [N] log-probs (or KLs), 0 at the prompt; None without."""

    name: str
    loss: Callable[[Problem], Tensor]
    values: Callable[[Problem], Tensor] | None = None
    peer: str | None = None  # of peers.PEERS; its module is imported on first use
    refuses: Callable[[Case, str], str | None] = always
    uncounted: bool = False  # on a GPU it multiplies in its own kernels, whose FLOPs are not counted

    def absent(self) -> str | None:
        """Why its code cannot be called here, or None."""
        return None if self.peer is None else peers.absent(self.peer)


def from_logps(score: Callable[[Tensor, Tensor, Tensor], Tensor]) -> dict:
    """`loss` and `values` from score(hidden [n, H], weight, labels [n]) -> log-probs [n], 0 at the prompt."""

    def logps(p: Problem, hidden: Tensor, weight: Tensor) -> Tensor:
        return score(hidden.flatten(0, -2), weight, p.labels.flatten()).view(p.labels.shape)

    def loss(p: Problem) -> Tensor:
        ref = p.ref_logps
        if p.ref_hidden is not None:
            with torch.no_grad():
                ref = logps(p, p.ref_hidden, p.ref_weight)
        return loss_of(p, logps(p, p.hidden, p.weight), ref)

    return {"loss": loss, "values": lambda p: logps(p, p.hidden, p.weight).flatten()}


def ours(name: str, **knobs) -> Provider:
    """fused_po with a schedule."""

    def schedule(p: Problem) -> Schedule:
        if knobs.get("logits_budget") == "all":
            return Schedule(logits_budget=4 * p.labels.numel() * (p.case.vocabulary + 16))
        return Schedule(**knobs)

    def logps(p: Problem) -> Tensor:
        return fused_po.linear_logps(p.hidden, p.weight, p.labels, schedule=schedule(p)).logps.flatten()

    def loss(p: Problem) -> Tensor:
        if p.case.task == "logps":
            return loss_of(p, logps(p))
        if p.case.task == "grpo":
            scored = p.labels != IGNORE
            given = logps(p).view(p.labels.shape), p.old_logps, p.advantages, scored
            return fused_po.aggregate(fused_po.losses.grpo(*given, loss_type="dapo", epsilon=EPSILON), scored)
        if p.case.task == "kto":
            with torch.no_grad():
                ref = fused_po.linear_logps(p.ref_hidden, p.ref_weight, p.labels, schedule=schedule(p)).logps
            ratios = fused_po.sequence_logps(logps(p).view(p.labels.shape) - ref)  # small numbers are summed
            return fused_po.losses.kto(ratios, None, desirable(p), KTO_KL, beta=BETA).mean()
        if p.case.task != "dpo":
            options = {"simpo": {"gamma": GAMMA}, "orpo": {"nll_coef": 0.0}}.get(p.case.task, {})
            return getattr(fused_po.losses, p.case.task)(*sequences(p, logps(p)), beta=BETA, **options).mean()
        how = dict(ref_hidden=p.ref_hidden, ref_weight=p.ref_weight, ref_logps=p.ref_logps)
        return fused_po.linear_dpo(p.hidden, p.weight, p.labels, **how, beta=BETA, schedule=schedule(p)).loss

    def refuses(case: Case, device: str) -> str | None:
        if knobs and case.head == "frozen":
            return "the same as fused_po: the head is frozen"
        default = logits_budget(None, torch.device(device))
        same = knobs.get("logits_budget") == "all" and 4 * case.tokens * (case.vocabulary + 16) <= default
        return "the same as fused_po: the default budget keeps all" if same else None

    return Provider(name, loss, logps, refuses=refuses)


def eager(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The usual code: the whole matrix of logits, and of log-probs."""
    logps = (hidden @ weight.T).float().log_softmax(-1)
    return logps.gather(-1, labels.clamp(min=0)[:, None]).squeeze(-1) * (labels != IGNORE)


compiled_eager = torch.compile(eager, dynamic=False)


def logps_only(case: Case, device: str) -> str | None:
    return None if case.task == "logps" else f"it has no {case.task} loss"


def cuda_only(case: Case, device: str) -> str | None:
    return None if device == "cuda" else "it needs a GPU"


def cuda_logps_only(case: Case, device: str) -> str | None:
    return cuda_only(case, device) or logps_only(case, device)


PROVIDERS = [
    ours("fused_po"),
    ours("fused_po, all kept", logits_budget="all"),
    ours("fused_po, none kept", logits_budget=0),
    Provider("eager", **from_logps(eager)),
    Provider("torch.compile", **from_logps(compiled_eager)),
    Provider("F.linear_cross_entropy", **from_logps(peers.torch_fused), refuses=peers.torch_refuses),
    Provider("TRL", **from_logps(peers.trl), peer="trl"),
    Provider("Liger", peers.liger_chunked, peer="liger losses", refuses=peers.liger_chunked_refuses),
    Provider(
        "Liger, scaled CE",
        **from_logps(peers.liger_scaled),
        peer="liger",
        refuses=peers.liger_scaled_refuses,
        uncounted=True,
    ),
    Provider(
        "Liger, cross entropy",
        peers.liger_cross_entropy,
        peers.liger_cross_entropy_values,
        peer="liger",
        refuses=cuda_logps_only,
    ),
    Provider("unsloth", **from_logps(peers.unsloth), peer="unsloth"),
    Provider("unsloth, cross entropy", peers.unsloth_cross_entropy, peer="unsloth", refuses=logps_only),
    Provider("cut-cross-entropy", **from_logps(peers.cut), peer="cce", refuses=peers.cut_refuses, uncounted=True),
    Provider(
        "cut-cross-entropy, exact",
        **from_logps(peers.cut_unfiltered),
        peer="cce",
        refuses=peers.cut_refuses,
        uncounted=True,
    ),
    Provider("verl", **from_logps(peers.verl), peer="verl", refuses=peers.verl_refuses, uncounted=True),
    Provider("quack", peers.quack, peer="quack", refuses=peers.quack_refuses, uncounted=True),
]


def versions() -> dict[str, str | None]:
    """Versions of torch, Triton and the peers; None for what is not installed."""
    packages = ("torch", "triton", *dict.fromkeys(peer.package for peer in peers.PEERS.values()))
    return {"fused_po": fused_po.__version__} | {package: peers.version(package) for package in packages}
