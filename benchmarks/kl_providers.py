"""The providers of the exact KL: fused_po, plain PyTorch and the peers, each with the divergence of the case.

The peers' beta is the weight of the teacher, our `js_weight` of the reference; 0 is KL(reference || policy), our
"forward", and 1 is KL(policy || reference), our "reverse". Differences between them:

- TRL's always returns the policy's entropy too. We return it with labels: "fused_po, with log-probs" also returns the
  log-probs of the labels under both models. Only the gradient of the KL is computed.
- Liger's and unsloth's return a mean, not the KL of each token, so only their gradients are checked. They compute the
  gradients in the forward, even of a frozen head and without a backward: their forward time is for both.
- Liger's chunked loss computes the softmax in the dtype of the projection, bf16 for bf16. No other provider does.
"""

from __future__ import annotations

import math

import peers
import torch
from cases import IGNORE, JS_WEIGHT, Case, Problem, loss_of
from providers import Provider, cuda_only
from torch import Tensor
from torch.nn import functional as F

import fused_po
from fused_po import Schedule


def beta(case: Case) -> float:
    """The divergence as TRL and Liger name it."""
    return {"forward": 0.0, "reverse": 1.0, "js": JS_WEIGHT}[case.direction]


def from_values(values) -> dict:
    """`loss` and `values` from values(problem) -> [N] KL, 0 at the prompt."""
    return {"loss": lambda p: loss_of(p, values(p)), "values": values}


def ours(name: str, labels: bool = False, **knobs) -> Provider:
    """fused_po with a schedule; with labels it also returns their log-probs and the entropy."""

    def values(p: Problem) -> Tensor:
        counted = {"labels": p.labels} if labels else {"mask": p.labels != IGNORE}
        weighted = {"js_weight": JS_WEIGHT} if p.case.direction == "js" else {}
        how = dict(direction=p.case.direction, schedule=Schedule(**knobs), **weighted)
        return fused_po.linear_kl(p.hidden, p.weight, p.ref_hidden, p.ref_weight, **counted, **how).kl

    def refuses(case: Case, device: str) -> str | None:
        return "the same as fused_po: the head is frozen" if knobs and case.head == "frozen" else None

    return Provider(name, **from_values(values), refuses=refuses)


def eager_kl(
    hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, labels: Tensor, direction: str
) -> Tensor:
    """The usual code: both whole matrices of logits, and of log-probs in fp32."""
    policy = (hidden @ weight.T).float().log_softmax(-1)
    reference = (ref_hidden @ ref_weight.T).float().log_softmax(-1)

    def kl(of: Tensor, against: Tensor) -> Tensor:
        return F.kl_div(against, of, reduction="none", log_target=True).sum(-1)

    if direction == "reverse":
        value = kl(policy, reference)
    elif direction == "forward":
        value = kl(reference, policy)
    else:
        mixed = torch.logaddexp(policy + math.log(1 - JS_WEIGHT), reference + math.log(JS_WEIGHT))
        value = JS_WEIGHT * kl(reference, mixed) + (1 - JS_WEIGHT) * kl(policy, mixed)
    return value * (labels != IGNORE)


compiled_eager_kl = torch.compile(eager_kl, dynamic=False)


def plain(function) -> dict:
    """`loss` and `values` from eager_kl, compiled or not."""
    return from_values(lambda p: function(p.hidden, p.weight, p.ref_hidden, p.ref_weight, p.labels, p.case.direction))


def trl(p: Problem) -> Tensor:
    """TRL's ChunkedDivergenceFunction as its trainer calls it: it drops the prompt first on a GPU, not on a CPU."""
    function = peers.code("trl divergence").ChunkedDivergenceFunction
    scored = p.labels != IGNORE
    compact = p.hidden.is_cuda
    hidden, ref_hidden = (h[scored] if compact else h for h in (p.hidden, p.ref_hidden))
    values = function.apply(hidden, p.weight, None, ref_hidden, p.ref_weight, None, beta(p.case))[0]
    return values.new_zeros(p.labels.shape).masked_scatter(scored, values) if compact else values * scored


def liger(p: Problem) -> Tensor:
    """Liger's chunked distillation loss, without its cross entropy."""
    loss_class = peers.code("liger losses").LigerFusedLinearJSDLoss
    loss = loss_class(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta(p.case), ignore_index=IGNORE)
    return loss(p.hidden, p.weight, p.ref_hidden, p.ref_weight, p.labels)


def liger_triton(p: Problem) -> Tensor:
    """Liger's fused linear JSD in Triton: a mean over the labels that count."""
    function = peers.code("liger").LigerFusedLinearJSDFunction
    return function.apply(
        p.hidden, p.weight, p.ref_hidden, p.ref_weight, p.labels, beta(p.case), IGNORE, 1.0, None, None, None
    )


def unsloth(p: Problem) -> Tensor:
    """unsloth_zoo's fused_linear_jsd: a mean over the labels that count, its gradients computed in the forward."""
    function = peers.code("unsloth").fused_linear_jsd
    inputs = p.hidden, p.weight, p.ref_hidden, p.ref_weight
    return function(*inputs, labels=p.labels, ignore_index=IGNORE, beta=beta(p.case))


KL_PROVIDERS = [
    ours("fused_po"),
    ours("fused_po, none kept", logits_budget=0),
    ours("fused_po, with log-probs", labels=True),
    Provider("eager", **plain(eager_kl)),
    Provider("torch.compile", **plain(compiled_eager_kl)),
    Provider("TRL", **from_values(trl), peer="trl divergence"),
    Provider("Liger", liger, peer="liger losses"),
    Provider("Liger, Triton", liger_triton, peer="liger", refuses=cuda_only),
    Provider("unsloth", unsloth, peer="unsloth"),
]
