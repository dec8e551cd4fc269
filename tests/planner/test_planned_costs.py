"""The planner's figures against counted ones: exact FLOPs, and bytes up to terms that grow only with the tokens."""

import counting
import pytest
import torch
from numerics import DEVICE, IGNORE

import fused_po
from fused_po import Schedule
from fused_po.planner.cost import TOKEN_BYTES, Sizes, ours
from fused_po.planner.work import Work

ROW = 4 * 2048  # bytes of a row of logits; in these tests the reference backend takes one row at a time
SCRATCH = 10 * ROW  # memory that such a pass may use: less than the smallest planned tensor, fp32 [scored, H]


class Case:
    """A small batch and its plan."""

    def __init__(
        self, dtype=torch.float32, share=1.0, n=96, h=512, v=2048, tile=1 << 18, scored=0.5, group=None, **how
    ):
        """group: the process group over whose ranks the vocabulary is split evenly."""
        self.how = dict(loss="logps", needs=(True, True), entropy=False, bias=False) | how
        self.scored, self.group = int(n * scored), group
        tp, rank = (group.size(), group.rank()) if group else (1, 0)
        row = 4 * v // tp * max(1, {"kl": 1, "dpo-kl": 2}.get(self.how["loss"], 1))
        budget = int(share * self.scored) * row
        sizes = (n, self.scored, v, h, h, dtype)
        device = torch.device(DEVICE)
        self.work = Work(
            *sizes,
            self.how["bias"],
            self.how["loss"],
            self.how["needs"],
            self.how["entropy"],
            tile,
            budget,
            device,
            tp=tp,
        )
        self.schedule = Schedule(logits_budget=budget, tile_bytes=tile)
        needs = self.how["needs"]
        self.hidden = torch.randn(n, h, device=DEVICE).to(dtype).requires_grad_(needs[0])
        whole = (torch.randn(v, h, device=DEVICE) / h**0.5).to(dtype)
        self.weight = whole.chunk(tp)[rank].clone().requires_grad_(needs[1])
        self.ref_hidden, self.ref_weight = self.hidden.detach() + 0.1, self.weight.detach() * 0.9
        self.bias = (
            torch.zeros(v // tp, device=DEVICE, dtype=dtype).requires_grad_(needs[1]) if self.how["bias"] else None
        )
        self.labels = torch.randint(v, (n,), device=DEVICE)
        self.labels[torch.randperm(n, device=DEVICE)[: n - self.scored]] = IGNORE

    def __call__(self):
        """One forward, and a backward if something requires grad; returns the gradients."""
        own = self.hidden, self.weight
        settings = dict(bias=self.bias, schedule=self.schedule) | ({"process_group": self.group} if self.group else {})
        loss = self.how["loss"]
        if loss == "logps":
            outputs = ("logps", "entropy") if self.how["entropy"] else ("logps",)
            stats = fused_po.linear_logps(*own, self.labels, **settings, outputs=outputs)
            value = stats.logps.sum() + (stats.entropy.sum() if self.how["entropy"] else 0)
        elif loss == "dpo":
            pairs = [x.view(2, -1, x.shape[-1]) for x in (self.hidden, self.ref_hidden)]
            labels = self.labels.view(2, -1)
            value = fused_po.linear_dpo(pairs[0], own[1], labels, pairs[1], self.ref_weight, **settings).loss
        else:
            labels = dict(labels=self.labels) if loss == "dpo-kl" else dict(mask=self.labels != IGNORE)
            stats = fused_po.linear_kl(*own, self.ref_hidden, self.ref_weight, **labels, **settings)
            value = stats.kl.sum() + (stats.logps.sum() if loss == "dpo-kl" else 0)
        leaves = [x for x in (*own, self.bias) if x is not None and x.requires_grad]
        return torch.autograd.grad(value, leaves) if leaves else []


def rule(work: Work) -> int:
    """The limit in bytes beyond the results: the budget, a tile (of both sides), an fp32 block of the head, O(N H).

    A CPU also casts a block of a 16-bit head; the KL casts one of each head.
    """
    plan = Sizes(work)
    block = 4 * plan.block * work.hidden * (1 + plan.cast * (1 + plan.kl))
    return work.budget + (1 + plan.kl) * work.tile_bytes + block + work.tokens * (5 * 4 * work.hidden + TOKEN_BYTES)


CASES = {
    "no gradients": dict(needs=(False, False)),
    "head frozen": dict(needs=(True, False)),
    "head frozen, all tokens": dict(needs=(True, False), scored=1.0),
    "head frozen, entropy": dict(needs=(True, False), entropy=True),
    "head frozen, entropy, nothing kept": dict(needs=(True, False), entropy=True, share=0.0),
    "all kept": dict(),
    "all kept, all tokens": dict(scored=1.0),
    "half kept": dict(share=0.5),
    "nothing kept": dict(share=0.0),
    "hidden frozen": dict(needs=(False, True), share=0.3),
    "entropy": dict(entropy=True, share=0.7),
    "bias": dict(bias=True, share=0.4),
    "dpo": dict(loss="dpo", share=0.5),
    "dpo, head frozen": dict(loss="dpo", needs=(True, False)),
    "kl": dict(loss="kl"),
    "kl, half kept": dict(loss="kl", share=0.5),
    "kl, head frozen": dict(loss="kl", needs=(True, False)),
    "kl, no gradients": dict(loss="kl", needs=(False, False)),
    "dpo-kl": dict(loss="dpo-kl"),
    "dpo-kl, half kept": dict(loss="dpo-kl", share=0.5),
    "dpo-kl, nothing kept": dict(loss="dpo-kl", share=0.0),
    "dpo-kl, head frozen": dict(loss="dpo-kl", needs=(True, False)),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("how", CASES.values(), ids=CASES)
def test_flops_equal_the_counted_ones(how, dtype, seed):
    case = Case(dtype, **how)
    assert ours(case.work).flops == counting.flops(case)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("how", CASES.values(), ids=CASES)
def test_peak_equals_the_counted_one(how, dtype, seed, monkeypatch):
    """The peak equals the counted one, and beyond the results it is never more than the rule allows."""
    monkeypatch.setattr(fused_po.reference.rows, "BLOCK_BYTES", ROW)
    case, kept = Case(dtype, **how), []
    case()  # allocate what is allocated only once
    counted = counting.peak_bytes(lambda: kept.append(case()), DEVICE)
    planned = ours(case.work)
    assert planned.peak - case.work.tokens * TOKEN_BYTES <= counted <= planned.peak + SCRATCH
    results = sum(g.nbytes for g in kept[0])
    assert counted - results <= rule(case.work) + SCRATCH
