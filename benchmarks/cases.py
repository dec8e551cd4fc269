"""What is measured: shapes, dtypes, gradients, the share of prompt tokens, and the exact results in float64."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
IGNORE = -100
PAIRS = 4
BETA = 0.1
GAMMA = 0.5  # SimPO's margin
PAIRED = ("dpo", "cpo", "simpo", "orpo")
SEQUENCES = (*PAIRED, "grpo", "kto")  # tasks of 2 PAIRS sequences
EPSILON = 0.2  # GRPO's clip range
KTO_KL = 0.5  # KTO's reference point, a constant: the cost of estimating it is not measured
JS_WEIGHT = 0.25  # the weight of the reference; not 0.5, which would hide swapped sides


class Case(NamedTuple):
    """One problem. `tokens` counts all tokens; a share of them, `prompt`, is not scored."""

    tokens: int
    vocabulary: int
    width: int
    dtype: str = "fp32"
    head: str = "trainable"  # or "frozen"
    prompt: float = 0.0
    task: str = "logps"  # mean negative log-prob; or of SEQUENCES; or "kl": mean exact KL. "kl", "kto": always "live"
    reference: str = "cached"  # for "dpo": its log-probs are given; or "live": its hidden states and head
    direction: str = "reverse"  # for "kl"; or "forward", or "js" with JS_WEIGHT

    @property
    def name(self) -> str:
        task = {"dpo": f"dpo-{self.reference}", "kl": f"kl-{self.direction}"}.get(self.task, self.task)
        return f"{task}-N{self.tokens}-V{self.vocabulary}-H{self.width}-{self.dtype}-{self.head}-prompt{self.prompt:g}"


class Problem(NamedTuple):
    """The tensors of a case. Leading shape [2 PAIRS, T] for SEQUENCES, else [N]. KTO: the first PAIRS are desirable."""

    case: Case
    hidden: Tensor
    weight: Tensor
    labels: Tensor
    ref_hidden: Tensor | None
    ref_weight: Tensor | None
    ref_logps: Tensor | None
    old_logps: Tensor | None = None  # for "grpo", [2 PAIRS, T]
    advantages: Tensor | None = None  # for "grpo", [2 PAIRS]

    @property
    def scored(self) -> int:
        return int((self.labels != IGNORE).sum())

    @property
    def trained(self) -> list[Tensor]:
        return [t for t in (self.hidden, self.weight) if t.requires_grad]


def problem(case: Case, device: str) -> Problem:
    """Random tensors of a case; the label's probability ranges from 1e-6 to almost 1.

    The reference of a KL is the policy with noise, so that the KL ranges from 1e-3 to 1; that of DPO is another model.
    That of KTO is the policy with noise, less in longer sequences, so that its sigmoid does not saturate.
    """
    torch.manual_seed(0)
    n, v, h, dtype = case.tokens, case.vocabulary, case.width, DTYPES[case.dtype]
    shape = (2 * PAIRS, n // (2 * PAIRS)) if case.task in SEQUENCES else (n,)

    def heads():
        weight = (torch.randn(v, h, device=device) / h**0.5).to(dtype)
        pull = torch.rand(*shape, 1, device=device) * 16
        return weight, (torch.randn(*shape, h, device=device) + pull * weight[labels].float()).to(dtype)

    labels = torch.randint(0, v, shape, device=device)
    weight, hidden = heads()
    live = case.task == "dpo" and case.reference == "live"
    ref_weight, ref_hidden = heads() if live else (None, None)
    if case.task == "kl":
        ref_weight = (weight + 0.1 * torch.randn(v, h, device=device) / h**0.5).to(dtype)
        away = torch.rand(*shape, 1, device=device)
        ref_hidden = (hidden + away * torch.randn(*shape, h, device=device)).to(dtype)
    if case.task == "kto":
        noise = 4 / shape[-1] ** 0.5
        ref_weight = (weight + noise * torch.randn(v, h, device=device) / h**0.5).to(dtype)
        ref_hidden = (hidden + noise * torch.randn(*shape, h, device=device)).to(dtype)
    ref_logps = torch.full(shape, -9.0, device=device) if case.task == "dpo" and not live else None
    old = behaviour(hidden, weight, labels) if case.task == "grpo" else (None, None)
    labels[..., : int(case.prompt * shape[-1])] = IGNORE
    hidden.requires_grad_()
    weight.requires_grad_(case.head == "trainable")
    return Problem(case, hidden, weight, labels, ref_hidden, ref_weight, ref_logps, *old)


def behaviour(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(old log-probs, advantages) for GRPO: one ratio in eight is outside the clip range.

    None is near the ends of the range, where rounding would decide whether a token has a gradient.
    """
    parts = [
        (h @ weight.T).float().log_softmax(-1).gather(-1, y[:, None])
        for h, y in zip(hidden.flatten(0, -2).split(512), labels.flatten().split(512))
    ]
    moves = torch.tensor([-0.6, 0.6, *[-0.02, 0.02] * 7], device=labels.device)
    moved = moves[torch.randint(0, len(moves), labels.shape, device=labels.device)]
    return torch.cat(parts).view(labels.shape) - moved, torch.randn(len(labels), device=labels.device)


def loss_of(p: Problem, values: Tensor, ref_logps: Tensor | None = None) -> Tensor:
    """The task's loss from log-probs (or KLs) shaped like the labels, 0 at the prompt; for peers without a loss."""
    if p.case.task not in SEQUENCES:
        return (values.sum() if p.case.task == "kl" else -values.sum()) / p.scored
    scored = p.labels != IGNORE
    if p.case.task == "grpo":
        return clipped(p, values) / p.scored
    if p.case.task == "kto":
        gain = BETA * ((scored * (values - ref_logps)).sum(-1) - KTO_KL)
        return torch.where(desirable(p), torch.sigmoid(-gain), torch.sigmoid(gain)).mean()
    if p.case.task != "dpo":
        return without_reference(p.case.task, *sequences(p, values))
    chosen, rejected = (scored * (values - ref_logps)).sum(-1).chunk(2)
    return -torch.nn.functional.logsigmoid(BETA * (chosen - rejected)).mean()


def clipped(p: Problem, values: Tensor) -> Tensor:
    """GRPO's sum over scored tokens. Divided by their number it is the loss that TRL and Liger call "dapo". No KL."""
    ratio, advantages = (values - p.old_logps).exp(), p.advantages[:, None]
    bounded = torch.minimum(ratio * advantages, ratio.clamp(1 - EPSILON, 1 + EPSILON) * advantages)
    return -torch.where(p.labels != IGNORE, bounded, 0).sum()


def desirable(p: Problem) -> Tensor:
    """Which of KTO's answers are desirable: the first half."""
    return torch.arange(2 * PAIRS, device=p.labels.device) < PAIRS


def sequences(p: Problem, values: Tensor) -> tuple[Tensor, ...]:
    """(chosen, rejected) log-probs of sequences: sums for CPO, otherwise means over tokens."""
    scored = p.labels != IGNORE
    sums = (scored * values.view(p.labels.shape)).sum(-1)
    return (sums if p.case.task == "cpo" else sums / scored.sum(-1)).chunk(2)


def without_reference(task: str, chosen: Tensor, rejected: Tensor) -> Tensor:
    """The mean preference loss of pairs, without the NLL of the chosen answers that these losses may add."""
    if task == "orpo":
        chosen, rejected = (x - torch.log1p(-x.exp()) for x in (chosen, rejected))
        return -BETA * torch.nn.functional.logsigmoid(chosen - rejected).mean()
    margin = GAMMA if task == "simpo" else 0.0
    return -torch.nn.functional.logsigmoid(BETA * (chosen - rejected) - margin).mean()


class Exact(NamedTuple):
    """In float64: log-probs (or KLs) of some scored rows; the loss's gradient in them and in some rows of the head."""

    rows: Tensor
    values: Tensor
    d_hidden: Tensor
    columns: Tensor
    d_weight: Tensor


def exact(p: Problem, count: int = 64) -> Exact:
    """The exact results for `count` rows of hidden and of the head, in float64, a few rows of logits at a time."""
    if p.case.task == "kl":
        return exact_kl(p, count)
    device = p.hidden.device
    w64 = p.weight.detach().double()
    columns = torch.randperm(p.case.vocabulary, device=device)[:count]

    def scan(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        flat, labels = hidden.detach().flatten(0, -2), p.labels.flatten().clamp(min=0)
        lse = torch.cat([(part.double() @ weight.T).logsumexp(-1) for part in flat.split(128)])
        target = torch.cat([(a.double() * weight[b]).sum(-1) for a, b in zip(flat.split(128), labels.split(128))])
        return lse, target - lse

    lse, logps = scan(p.hidden, w64)
    scored = p.labels.flatten() != IGNORE
    ref = p.ref_logps
    if p.ref_hidden is not None:
        ref = scan(p.ref_hidden, p.ref_weight.double())[1].view(p.labels.shape)
    leaf = (logps * scored).view(p.labels.shape).requires_grad_()
    (g,) = torch.autograd.grad(loss_of(p, leaf, ref), leaf)
    g, h, labels = (g.flatten() * scored)[:, None], p.hidden.detach().flatten(0, -2), p.labels.flatten()
    some = (h.double() @ w64[columns].T - lse[:, None]).exp()
    d_weight = (((labels[:, None] == columns).double() - some) * g).T @ h.double()
    rows = scored.nonzero().squeeze(1)
    rows = rows[torch.randperm(len(rows), device=device)[:count]]
    prob = (h[rows].double() @ w64.T - lse[rows, None]).exp()
    d_hidden = g[rows] * (w64[labels[rows]] - prob @ w64)
    return Exact(rows, logps[rows], d_hidden, columns, d_weight)


def divergence(direction: str, log_p: Tensor, log_q: Tensor) -> Tensor:
    """The definitions, from the policy's log-probs p and the reference's q. Exact, not fast."""
    p, q, w = log_p.exp(), log_q.exp(), JS_WEIGHT
    if direction == "reverse":
        return (p * (log_p - log_q)).sum(-1)
    if direction == "forward":
        return (q * (log_q - log_p)).sum(-1)
    log_m = torch.logaddexp(log_q + math.log(w), log_p + math.log(1 - w))
    return (w * q * (log_q - log_m) + (1 - w) * p * (log_p - log_m)).sum(-1)


def kl_of_rows(p: Problem, rows: Tensor, weight: Tensor, ref_weight: Tensor) -> tuple[Tensor, Tensor]:
    """In float64: the KL of these rows, and its gradient in their logits. The weights are given in float64."""
    logits = (p.hidden.detach()[rows].double() @ weight.T).requires_grad_()
    reference = (p.ref_hidden[rows].double() @ ref_weight.T).log_softmax(-1)
    values = divergence(p.case.direction, logits.log_softmax(-1), reference)
    return values.detach(), torch.autograd.grad(values.sum(), logits)[0]


def exact_kl(p: Problem, count: int) -> Exact:
    """`exact` for the KL, its gradient from autograd in float64."""
    device = p.hidden.device
    scored = (p.labels != IGNORE).nonzero().squeeze(1)
    columns = torch.randperm(p.case.vocabulary, device=device)[:count]
    rows = scored[torch.randperm(len(scored), device=device)[:count]]
    weights = p.weight.detach().double(), p.ref_weight.double()
    d_weight = torch.zeros(len(columns), p.case.width, dtype=torch.float64, device=device)
    for some in scored.split(128):
        d_logits = kl_of_rows(p, some, *weights)[1][:, columns]
        d_weight += d_logits.T @ p.hidden.detach()[some].double() / p.scored
    values, d_logits = kl_of_rows(p, rows, *weights)
    return Exact(rows, values, d_logits @ weights[0] / p.scored, columns, d_weight)


def kl_suite(name: str) -> list[Case]:
    """The KL cases of a suite."""
    if name == "gpu":
        cases = []
        for vocabulary in (32000, 151936):
            main = Case(8192, vocabulary, 4096, "bf16", task="kl", reference="live")
            cases += [main._replace(head=h, direction=d) for h in ("trainable", "frozen") for d in ("reverse", "js")]
            cases += [main._replace(direction="forward"), main._replace(prompt=0.5)]
        return cases
    main = Case(*((96, 500, 32) if name == "tiny" else (512, 32000, 896)), task="kl", reference="live")
    cases = [main._replace(head=h, direction=d) for h in ("trainable", "frozen") for d in ("reverse", "js")]
    return [*cases, main._replace(direction="forward", prompt=0.5)] if name == "tiny" else cases


def suite(name: str) -> list[Case]:
    """The cases of a suite: "cpu", ten minutes on two cores; "gpu", under ten minutes on one GPU; "tiny", seconds."""
    if name == "tiny":
        heads = [Case(96, 500, 32, head=head, prompt=share) for head in ("trainable", "frozen") for share in (0.0, 0.5)]
        others = [Case(96, 500, 32, task=task, prompt=0.5) for task in ("cpo", "simpo", "orpo", "grpo")]
        others.append(Case(96, 500, 32, task="kto", reference="live", prompt=0.5))
        return [*heads, Case(96, 500, 32, task="dpo"), Case(96, 500, 32, task="dpo", reference="live"), *others]
    if name == "cpu":
        main = Case(2048, 32000, 896)
        cases = [main, main._replace(head="frozen"), main._replace(tokens=512), main._replace(tokens=512, prompt=0.5)]
        cases += [Case(256, v, 896) for v in (8192, 32000, 65536)] + [Case(128, 32000, 896, "bf16")]
        cases += [Case(512, 32000, 896, prompt=0.5, task="dpo", reference="live")]
        return cases
    shapes = [
        (8192, 32000, 4096),
        (8192, 128256, 4096),
        (16384, 151936, 3584),
        (8192, 262144, 2560),
        (32768, 128256, 2048),
    ]
    cases = []
    for shape in shapes:
        for head in ("trainable", "frozen"):
            cases += [Case(*shape, "bf16", head, share) for share in (0.0, 0.5)]
    for head in ("trainable", "frozen"):
        for reference in ("cached", "live"):
            cases += [Case(8192, 128256, 4096, "bf16", head, share, "dpo", reference) for share in (0.0, 0.5)]
    return cases


# The providers in a unit of `evidence`, by name or by the beginning of the name; "rest" has all others. Providers whose
# kernels take long to compile, or that could crash the process, have units of their own.
WHO = {
    "main": ("fused_po", "fused_po, all kept", "fused_po, none kept", "fused_po, bf16 tiles", "eager", "TRL"),
    "dpo": ("fused_po", "eager", "TRL", "Liger", "unsloth"),
    "grpo": ("fused_po", "eager", "TRL", "Liger"),
    "liger": ("fused_po", "eager", "Liger", "Liger, scaled"),
    "quack": ("fused_po", "quack", "cut-cross-entropy"),
    "rest": ("fused_po", "torch.compile", "F.linear_cross_entropy", "unsloth", "verl"),
}


def evidence(name: str) -> list[tuple[Case, str]]:
    """The heads and KLs that `make gpu-evidence` measures, most valuable first, and with which of WHO."""
    if name == "tiny":
        main = Case(96, 500, 32)
        dpo = Case(96, 500, 32, prompt=0.5, task="dpo", reference="live")
        grpo = main._replace(prompt=0.5, task="grpo")
        frozen = main._replace(head="frozen")
        return [
            (main, "main"),
            (frozen, "main"),
            (dpo, "dpo"),
            (grpo, "grpo"),
            (main, "liger"),
            (main, "quack"),
            (main, "rest"),
            (kl_suite("tiny")[0], "main"),
        ]
    main, wide = Case(8192, 128256, 4096, "bf16"), Case(16384, 151936, 3584, "bf16")
    square = Case(4096, 131072, 4096, "bf16")
    dpo = main._replace(prompt=0.5, task="dpo", reference="live")
    kl = Case(8192, 151936, 4096, "bf16", task="kl", reference="live")
    return [
        (main, "main"),
        (main._replace(head="frozen"), "main"),
        (dpo, "dpo"),
        (square, "liger"),
        (wide, "main"),
        (wide._replace(head="frozen"), "main"),
        (main._replace(prompt=0.5), "main"),
        (square, "quack"),
        (kl, "main"),
        (main._replace(tokens=4096, task="grpo"), "grpo"),
        (square, "rest"),
        (main._replace(vocabulary=32000), "main"),
    ]


# Tokens, width, vocabulary of the bare GEMMs that `make gpu-evidence` times as upper bounds.
PRODUCTS = {"gpu": [(8192, 4096, 128256), (16384, 3584, 151936), (4096, 4096, 131072)], "tiny": [(96, 32, 500)]}
