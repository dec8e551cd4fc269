"""The peers' own code: finds and imports it, and calls it as the releases in peer_wheels.py require.

A score takes (hidden [n, H], weight [V, H], labels [n]) and returns log-probs [n], 0 where the label is IGNORE. If a
peer's definition differs, it is adapted here, and the docstring says how. A loss takes a Problem.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.machinery
import importlib.metadata
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import torch
from cases import BETA, EPSILON, GAMMA, IGNORE, KTO_KL, SEQUENCES, Case, Problem, desirable
from torch import Tensor
from torch.nn import functional as F


class Peer(NamedTuple):
    """Where to find the code of a peer."""

    package: str  # its name on a package index, and in peer_wheels.RELEASES
    module: str
    bare: tuple[str, ...] = ()  # packages whose __init__ is skipped: it imports or patches more than the kernels need
    stand_ins: tuple[str, ...] = ()  # modules that are imported, but that the kernels do not use
    later: tuple[str, ...] = ()  # modules that would be imported at the first call; imported with the peer instead


PEERS = {
    "liger": Peer("liger-kernel", "liger_kernel.ops"),
    "liger losses": Peer("liger-kernel", "liger_kernel.chunked_loss"),
    "trl": Peer("trl", "trl.kernels.chunked_logprob", stand_ins=("pandas", "datasets"), later=("trl.trainer.utils",)),
    "trl divergence": Peer("trl", "trl.kernels.chunked_divergence", stand_ins=("pandas", "datasets")),
    "cce": Peer("cut-cross-entropy", "cut_cross_entropy"),
    "quack": Peer("quack-kernels", "quack.linear_cross_entropy"),
    "unsloth": Peer(
        "unsloth_zoo",
        "unsloth_zoo.fused_losses.fused_linear",
        bare=("unsloth_zoo", "unsloth_zoo.fused_losses", "unsloth_zoo.temporary_patches"),
    ),
    "verl": Peer("verl", "verl.utils.kernel.linear_cross_entropy", bare=("verl", "verl.utils")),
}


def bare_package(name: str) -> None:
    """Make `name` importable without running its __init__; its modules are found in their folder."""
    if name in sys.modules:
        return
    parent = name.rpartition(".")[0]
    spec = importlib.machinery.PathFinder.find_spec(name, sys.modules[parent].__path__ if parent else None)
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    package = ModuleType(name)
    package.__spec__, package.__path__ = spec, list(spec.submodule_search_locations)
    sys.modules[name] = package


class StandIn(ModuleType):
    """An empty module: every name in it is an empty class, enough for an annotation."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


@contextlib.contextmanager
def standing_in(names: tuple[str, ...]) -> Iterator[None]:
    """Empty modules for those of `names` that are not installed, during an import."""
    missing = [n for n in names if n not in sys.modules and importlib.machinery.PathFinder.find_spec(n) is None]
    for name in missing:
        module = StandIn(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        sys.modules[name] = module
    try:
        yield
    finally:
        for name in missing:
            del sys.modules[name]


@functools.cache
def imported(key: str) -> ModuleType | Exception:
    """The module of PEERS[key], or the exception of its import."""
    peer = PEERS[key]
    try:
        for package in peer.bare:
            bare_package(package)
        with standing_in(peer.stand_ins):
            module = importlib.import_module(peer.module)
            for name in peer.later:
                importlib.import_module(name)
        return module
    except Exception as error:  # the import of a peer may raise anything
        return error


def first_line(error: Exception) -> str:
    """An exception in one line: its first line, and the second if the first only introduces it."""
    lines = str(error).strip().splitlines()
    words = " ".join(lines[:2]) if lines and lines[0].endswith(":") else "".join(lines[:1])
    return f"{type(error).__name__}: {words}" if words else type(error).__name__


def absent(name: str) -> str | None:
    """Why a peer cannot be called, in one line, or None."""
    found, peer = imported(name), PEERS[name]
    if not isinstance(found, Exception):
        return None
    top = peer.module.partition(".")[0]
    if isinstance(found, ModuleNotFoundError) and found.name == top:
        return f"{peer.package} is not installed"
    return f"{peer.package} cannot be imported: {first_line(found)}"


def code(name: str) -> ModuleType:
    """The module of PEERS[name]; raises the exception of its import."""
    found = imported(name)
    if isinstance(found, Exception):
        raise found
    return found


def version(package: str) -> str | None:
    """The version of a package; 'unknown' if it can be imported but has no metadata; None if it is not installed."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    tops = {peer.module.partition(".")[0] for peer in PEERS.values() if peer.package == package}
    found = any(importlib.machinery.PathFinder.find_spec(top) for top in tops)
    return "unknown" if found else None


def trl(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """TRL's built-in head, as its models call it: it drops the prompt first on a GPU, not on a CPU."""
    scored = labels != IGNORE
    compact = hidden.is_cuda
    rows = (hidden[scored], labels[scored]) if compact else (hidden, labels.clamp(min=0))
    logps = code("trl").ChunkedLogProbFunction.apply(rows[0], weight, None, rows[1], 1.0, 32768, None, 1.0, ())[0]
    return logps.new_zeros(labels.shape).masked_scatter(scored, logps) if compact else logps * scored


def torch_fused(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """torch.nn.functional.linear_cross_entropy; in chunks where its documentation recommends them."""
    options = torch.nn.LinearCrossEntropyOptions() if hidden.shape[0] >= hidden.shape[1] else None
    return -F.linear_cross_entropy(hidden, weight, labels, reduction="none", ignore_index=IGNORE, options=options)


def torch_refuses(case: Case, device: str) -> str | None:
    """Without LinearCrossEntropyOptions it always computes all logits at once."""
    there = hasattr(F, "linear_cross_entropy") and hasattr(torch.nn, "LinearCrossEntropyOptions")
    return None if there else f"torch {torch.__version__} has no linear_cross_entropy with options"


def liger_scaled(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Liger's LigerFusedLinearScaledCrossEntropyFunction: -log p of every row, the ignored ones too."""
    return -code("liger").LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, labels, 1.0, IGNORE)


def liger_scaled_refuses(case: Case, device: str) -> str | None:
    """On compute capability 9.0 it uses a kernel in CuTe DSL, for bf16; otherwise chunks of 512 rows in PyTorch."""
    if device != "cuda" or torch.cuda.get_device_capability() != (9, 0):
        return None
    if case.dtype != "bf16":
        return "its kernel for compute capability 9.0 takes only bf16"
    try:
        importlib.import_module("liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90")
    except Exception as error:  # not installed, or another release
        return f"its kernel for compute capability 9.0 needs nvidia-cutlass-dsl: {first_line(error)}"
    return None


def liger_cross_entropy(p: Problem) -> Tensor:
    """Liger's fused linear cross entropy in Triton: a mean, its gradients computed in the forward."""
    function = code("liger").LigerFusedLinearCrossEntropyFunction
    return function.apply(p.hidden, p.weight, p.labels, None, None, IGNORE, 0.0, 0.0, "mean")[0]


def liger_cross_entropy_values(p: Problem) -> Tensor:
    """The same with reduction "none", whose backward would compute the logits again."""
    function = code("liger").LigerFusedLinearCrossEntropyFunction
    return -function.apply(p.hidden, p.weight, p.labels, None, None, IGNORE, 0.0, 0.0, "none")[0]


def liger_chunked(p: Problem) -> Tensor:
    """Liger's chunked losses, one pair or answer at a time under torch.compile. DPO and KTO get the reference's hidden
    states. The losses without a reference are called without the NLL of the chosen answers that they add by default."""
    losses = code("liger losses")
    if p.case.task == "grpo":
        return liger_grpo(losses, p)
    reference = {"ref_input": p.ref_hidden, "ref_weight": p.ref_weight}
    if p.case.task == "kto":
        loss = losses.LigerFusedLinearKTOLoss(ignore_index=IGNORE, beta=BETA, use_ref_model=True)
        kl = torch.full((), KTO_KL, device=p.hidden.device)
        return loss(p.hidden, p.weight, p.labels, preference_labels=desirable(p), kl=kl, **reference)[0]
    if p.case.task == "dpo":
        loss = losses.LigerFusedLinearDPOLoss(ignore_index=IGNORE, beta=BETA)
        return loss(p.weight, p.hidden, p.labels, **reference)[0]
    made = {
        "cpo": (losses.LigerFusedLinearCPOLoss, {}),
        "simpo": (losses.LigerFusedLinearSimPOLoss, {"gamma": GAMMA}),
        "orpo": (losses.LigerFusedLinearORPOLoss, {}),
    }
    loss_class, options = made[p.case.task]
    loss = loss_class(ignore_index=IGNORE, beta=BETA, compute_nll_loss=False, **options)
    return loss(p.weight, p.hidden, p.labels)[0]


def liger_grpo(losses: ModuleType, p: Problem) -> Tensor:
    """Liger's GRPO as "dapo" without a KL. It scores every row, and its backward multiplies in fp32."""
    scored = p.labels != IGNORE
    options = {"epsilon_low": EPSILON, "epsilon_high": EPSILON, "loss_type": "dapo"}
    loss = losses.LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, **options)
    return loss(p.hidden, p.weight, p.labels.clamp(min=0), scored, p.advantages, old_per_token_logps=p.old_logps)[0]


def liger_chunked_refuses(case: Case, device: str) -> str | None:
    if case.task not in SEQUENCES:
        return "its chunked losses are for sequences"
    cached = case.task == "dpo" and case.reference != "live"
    return "its DPO does not take cached reference log-probs" if cached else None


def cut(hidden: Tensor, weight: Tensor, labels: Tensor, filter_eps: str | None = "high") -> Tensor:
    """Apple's cut-cross-entropy, per token. By default it drops gradients below 2^-12."""
    function = code("cce").linear_cross_entropy
    return -function(hidden, weight, labels, ignore_index=IGNORE, reduction="none", filter_eps=filter_eps)


def cut_unfiltered(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The same with every gradient."""
    return cut(hidden, weight, labels, None)


def cut_refuses(case: Case, device: str) -> str | None:
    if device != "cuda":
        return "cut-cross-entropy needs a GPU"
    return None if case.dtype == "bf16" else "its backward takes only bf16 and fp16"


def quack(p: Problem) -> Tensor:
    """quack's chunked linear cross entropy: a mean; with scaled exponentials in bf16 on compute capability 9.0."""
    function = code("quack").chunked_linear_cross_entropy
    return function(p.hidden, p.weight, p.labels, chunk_size=4096, ignore_index=IGNORE, reduction="mean")


def quack_refuses(case: Case, device: str) -> str | None:
    """Its GEMMs copy tiles of 16 bytes, so sizes must be multiples of 8."""
    if device != "cuda":
        return "quack needs a GPU"
    if case.task != "logps":
        return f"it has no {case.task} loss"
    odd = [size for size in (case.tokens, case.vocabulary, case.width) if size % 8]
    return f"it takes multiples of 8, not {odd[0]}" if odd else None


def unsloth(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """unsloth_zoo's fused_linear_logprobs: drops prompt rows; computes a frozen head's gradient in the forward."""
    return code("unsloth").fused_linear_logprobs(hidden, weight, labels, mask=labels != IGNORE)


def unsloth_cross_entropy(p: Problem) -> Tensor:
    """unsloth_zoo's fused_linear_cross_entropy: a sum over a divisor, its gradients computed in the forward."""
    function = code("unsloth").fused_linear_cross_entropy
    divisor = (p.labels != IGNORE).sum()
    return function(p.hidden, p.weight, None, p.labels, divisor=divisor, ignore_index=IGNORE)


def verl(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """verl's log-probs of every row: it has no ignored label. It also returns the entropy, without a gradient."""
    logps, _ = code("verl").linear_cross_entropy(hidden, weight, labels.clamp(min=0), 1.0, "none")
    return logps * (labels != IGNORE)


def verl_refuses(case: Case, device: str) -> str | None:
    if device != "cuda":
        return "verl needs a GPU"
    return None if case.width % 128 == 0 else f"it takes multiples of 128 for the hidden size, not {case.width}"
