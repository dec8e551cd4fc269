"""Who is measured: fused_po, plain PyTorch, and the peers that are installed, behind one signature."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from typing import NamedTuple

import torch
from cases import BETA, IGNORE, Case, Problem, loss_of
from torch import Tensor
from torch.nn import functional as F

import fused_po
from fused_po import Schedule
from fused_po.schedule import logits_budget


def always(case: Case, device: str) -> str | None:
    """Serves every case."""
    return None


class Provider(NamedTuple):
    """`loss`: the task's loss, for a backward. `values`: [N] log-probs (or KLs), 0 at the prompt; None without."""

    name: str
    loss: Callable[[Problem], Tensor]
    values: Callable[[Problem], Tensor] | None = None
    package: str | None = None
    refuses: Callable[[Case, str], str | None] = always

    def absent(self) -> str | None:
        """Why it cannot be measured here, or None."""
        if self.package is None:
            return None
        try:
            importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return f"{self.package} is not installed"
        return None


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
    """As one writes it: the whole matrix of logits, and of log-probs."""
    logps = (hidden @ weight.T).float().log_softmax(-1)
    return logps.gather(-1, labels.clamp(min=0)[:, None]).squeeze(-1) * (labels != IGNORE)


compiled_eager = torch.compile(eager, dynamic=False)


def trl(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """TRL's built-in head, as its models call it: on a GPU the prompt is dropped first, on a CPU it is not."""
    function = importlib.import_module("trl.kernels.chunked_logprob").ChunkedLogProbFunction
    scored = labels != IGNORE
    compact = hidden.is_cuda
    rows = (hidden[scored], labels[scored]) if compact else (hidden, labels.clamp(min=0))
    logps = function.apply(rows[0], weight, None, rows[1], 1.0, 32768, None, 1.0, ())[0]
    return logps.new_zeros(labels.shape).masked_scatter(scored, logps) if compact else logps * scored


def torch_fused(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """torch.nn.functional.linear_cross_entropy; in chunks where its documentation says that they pay."""
    options = torch.nn.LinearCrossEntropyOptions() if hidden.shape[0] >= hidden.shape[1] else None
    return -F.linear_cross_entropy(hidden, weight, labels, reduction="none", options=options)


def liger_loss(p: Problem) -> Tensor:
    """Liger's fused DPO; and, where there are Triton kernels for it, its fused linear cross entropy."""
    if p.case.task == "dpo":
        loss_class = importlib.import_module("liger_kernel.chunked_loss").LigerFusedLinearDPOLoss
        return loss_class(beta=BETA)(p.weight, p.hidden, p.labels, ref_input=p.ref_hidden, ref_weight=p.ref_weight)[0]
    loss_class = importlib.import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss
    return loss_class()(p.weight, p.hidden, p.labels)


def cut(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Apple's cut-cross-entropy, per token. Written from its documentation, not run yet."""
    function = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    return -function(hidden, weight, labels, ignore_index=IGNORE, reduction="none")


def quack(p: Problem) -> Tensor:
    """quack's chunked linear cross entropy. Written from its documentation, not run yet."""
    function = importlib.import_module("quack.linear_cross_entropy").chunked_linear_cross_entropy
    return function(p.hidden, p.weight, p.labels, chunk_size=4096, ignore_index=IGNORE)


def only(task: str = "logps", cuda: bool = False) -> Callable[[Case, str], str | None]:
    """Refuses other tasks, and CPUs where it has kernels for GPUs alone."""

    def refuses(case: Case, device: str) -> str | None:
        if cuda and device != "cuda":
            return "it needs a GPU"
        return None if case.task == task else f"it has no {case.task} loss"

    return refuses


def liger_refuses(case: Case, device: str) -> str | None:
    if case.task == "dpo":
        return None if case.reference == "live" else "its DPO takes no cached reference log-probs"
    return None if device == "cuda" else "its cross entropy needs a GPU"


def torch_refuses(case: Case, device: str) -> str | None:
    return None if hasattr(F, "linear_cross_entropy") else "this torch has no linear_cross_entropy"


def cuda_only(case: Case, device: str) -> str | None:
    return None if device == "cuda" else "it needs a GPU"


PROVIDERS = [
    ours("fused_po"),
    ours("fused_po, all kept", logits_budget="all"),
    ours("fused_po, none kept", logits_budget=0),
    Provider("eager", **from_logps(eager)),
    Provider("torch.compile", **from_logps(compiled_eager)),
    Provider("F.linear_cross_entropy", **from_logps(torch_fused), refuses=torch_refuses),
    Provider("TRL", **from_logps(trl), package="trl"),
    Provider("Liger", liger_loss, package="liger-kernel", refuses=liger_refuses),
    Provider("cut-cross-entropy", **from_logps(cut), package="cut-cross-entropy", refuses=cuda_only),
    Provider("quack", quack, package="quack-kernels", refuses=only(cuda=True)),
]


def versions() -> dict[str, str | None]:
    """Of torch, Triton and the peers; None for what is absent."""
    found = {"fused_po": fused_po.__version__}
    for package in ("torch", "triton", *(p.package for p in PROVIDERS if p.package)):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found
