"""The plan for a vocabulary split over 2 processes: FLOPs, memory and sent bytes per rank against counted ones."""

import counting
import pytest
import torch
import torch.distributed as dist
from numerics import DEVICE, fresh_seed
from rank_pool import Ranks
from test_planned_costs import CASES, ROW, SCRATCH, Case

import fused_po
from fused_po.planner.communication import all_reduce_bytes, scatter_bytes
from fused_po.planner.cost import TOKEN_BYTES, ours

RANKS = 2
FP32, BF16 = torch.float32, torch.bfloat16
QUICK = [
    *(
        (name, FP32)
        for name in ("no gradients", "head frozen", "half kept", "dpo", "kl, half kept", "dpo-kl, head frozen")
    ),
    *((name, BF16) for name in ("all kept", "entropy")),
]
REST = [
    (name, dtype)
    for name in CASES
    for dtype in (FP32, BF16)
    if name not in ("bias", "dpo, head frozen", "hidden frozen", "head frozen, all tokens")
    and (name, dtype) not in QUICK
]


def counted(name: str, dtype: torch.dtype, seed: int) -> tuple:
    """(the plan, FLOPs, peak bytes, collectives) of one rank."""
    torch.manual_seed(seed)
    case = Case(dtype, **CASES[name], group=dist.group.WORLD)
    fused_po.reference.rows.BLOCK_BYTES = ROW // RANKS
    case()  # allocate what is allocated only once
    with counting.Collectives() as said:
        case()
    kept = []
    return case.work, counting.flops(case), counting.peak_bytes(lambda: kept.append(case()), DEVICE), said.calls


@pytest.fixture(scope="module")
def ranks():
    made = Ranks(RANKS)
    yield made
    made.close()


def sent_bytes(calls: list[tuple[str, int]]) -> tuple[int, int]:
    """The bytes that a rank sends in fp32 all_gathers and all_reduces, by the formulas for rings."""
    gathered = sum(scatter_bytes(4 * size, RANKS) for name, size in calls if "gather" in name)
    return gathered, sum(all_reduce_bytes(4 * size, RANKS) for name, size in calls if "reduce" in name)


@pytest.mark.parametrize("name, dtype", [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in REST)])
def test_a_rank(name, dtype, ranks, request):
    for work, flops, peak, calls in ranks.run(counted, name, dtype, fresh_seed(request.node.nodeid)):
        planned = ours(work)
        steps = {step.name: step for step in planned.steps}
        gathers = [step for at, step in steps.items() if at.endswith("statistics gathered")]
        reduced = steps["hidden's gradient summed"].sent if work.needs[0] else 0
        assert {"gather" in at or "reduce" in at for at, _ in calls} == {True}, calls
        assert sent_bytes(calls) == (sum(step.sent for step in gathers), reduced), calls
        assert sum("gather" in at for at, _ in calls) == sum(step.count for step in gathers)
        assert planned.flops == flops
        assert planned.peak - work.tokens * TOKEN_BYTES <= peak <= planned.peak + SCRATCH, name
