"""What is measured: shapes, dtypes, which gradients, how much of a batch is prompt, and the exact answers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
IGNORE = -100
PAIRS = 4
BETA = 0.1


class Case(NamedTuple):
    """One problem. `tokens` counts all, the prompt's too; a share of them is prompt, which is not scored."""

    tokens: int
    vocabulary: int
    width: int
    dtype: str = "fp32"
    head: str = "trainable"  # or "frozen"
    prompt: float = 0.0
    task: str = "logps"  # mean negative log-prob; or "dpo": PAIRS pairs
    reference: str = "cached"  # for "dpo": its log-probs are there; or "live": its hidden states and head

    @property
    def name(self) -> str:
        task = self.task if self.task == "logps" else f"dpo-{self.reference}"
        return f"{task}-N{self.tokens}-V{self.vocabulary}-H{self.width}-{self.dtype}-{self.head}-prompt{self.prompt:g}"


class Problem(NamedTuple):
    """The tensors of a case. Leading shape [2 PAIRS, T] for "dpo", [N] for "logps"."""

    case: Case
    hidden: Tensor
    weight: Tensor
    labels: Tensor
    ref_hidden: Tensor | None
    ref_weight: Tensor | None
    ref_logps: Tensor | None

    @property
    def scored(self) -> int:
        return int((self.labels != IGNORE).sum())

    @property
    def trained(self) -> list[Tensor]:
        return [t for t in (self.hidden, self.weight) if t.requires_grad]


def problem(case: Case, device: str) -> Problem:
    """Random tensors of a case; the label's probability spreads from 1e-6 to almost 1."""
    torch.manual_seed(0)
    n, v, h, dtype = case.tokens, case.vocabulary, case.width, DTYPES[case.dtype]
    shape = (n,) if case.task == "logps" else (2 * PAIRS, n // (2 * PAIRS))

    def heads():
        weight = (torch.randn(v, h, device=device) / h**0.5).to(dtype)
        pull = torch.rand(*shape, 1, device=device) * 16
        return weight, (torch.randn(*shape, h, device=device) + pull * weight[labels].float()).to(dtype)

    labels = torch.randint(0, v, shape, device=device)
    weight, hidden = heads()
    live = case.task == "dpo" and case.reference == "live"
    ref_weight, ref_hidden = heads() if live else (None, None)
    ref_logps = torch.full(shape, -9.0, device=device) if case.task == "dpo" and not live else None
    labels[..., : int(case.prompt * shape[-1])] = IGNORE
    hidden.requires_grad_()
    return Problem(
        case, hidden, weight.requires_grad_(case.head == "trainable"), labels, ref_hidden, ref_weight, ref_logps
    )


def loss_of(p: Problem, logps: Tensor, ref_logps: Tensor | None) -> Tensor:
    """The task's loss from log-probs shaped like the labels, 0 at the prompt: for whoever has no loss of its own."""
    if p.case.task == "logps":
        return -logps.sum() / p.scored
    scored = p.labels != IGNORE
    chosen, rejected = (scored * (logps - ref_logps)).sum(-1).chunk(2)
    return -torch.nn.functional.logsigmoid(BETA * (chosen - rejected)).mean()


class Exact(NamedTuple):
    """float64: log-probs of some scored rows, the loss's gradient for them and for some rows of the head."""

    rows: Tensor
    logps: Tensor
    d_hidden: Tensor
    columns: Tensor
    d_weight: Tensor


def exact(p: Problem, count: int = 64) -> Exact:
    """The truth for `count` rows of hidden and of the head, in float64, a few rows of logits at a time."""
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


def suite(name: str) -> list[Case]:
    """The cases of a suite: "cpu", ten minutes on two cores; "gpu", under ten on one GPU; "tiny", seconds."""
    if name == "tiny":
        heads = [Case(96, 500, 32, head=head, prompt=share) for head in ("trainable", "frozen") for share in (0.0, 0.5)]
        return [*heads, Case(96, 500, 32, task="dpo"), Case(96, 500, 32, task="dpo", reference="live")]
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
