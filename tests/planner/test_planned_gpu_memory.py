"""The head's memory on a GPU, counted without one: meta tensors, and GEMMs and kernels that compute nothing.

On a GPU the operands of the GEMMs and the basis have a narrower dtype than the logits. GEMMs write into existing
buffers, and the kernels allocate only statistics.
"""

import contextlib

import pytest
import torch
from test_planned_costs import CASES
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fused_po.backend.interface import Divergence, Grads, KLRow, Outputs, SavedRow, Scaling
from fused_po.lm_head import backward, forward, gemm, kl, logps
from fused_po.lm_head.head import Head, Operands
from fused_po.lm_head.kl_tiles import KLHead
from fused_po.lm_head.plan import Dtypes, Needs
from fused_po.planner.cost import ours
from fused_po.planner.work import Work

N, SCORED, H, V, TILE = 512, 256, 1024, 8192, 1 << 21
ROW = 2 * V  # bytes of a row of the basis


class Allocations(TorchDispatchMode):
    """Records the peak of the bytes of all tensors created inside the context."""

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.known = {t.untyped_storage()._cdata for t in known}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                if storage._cdata not in self.known:
                    self.live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.live = {key: (ref, size) for key, (ref, size) in self.live.items() if not ref.expired()}
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return result


def score(logits, labels, outer, inner, ignore_index, outputs, basis):
    return tuple(logits.new_empty(n) for n in (len(labels), len(labels) * bool(outputs & 2), 0, 0)) + (
        logits.new_empty(SavedRow.COUNT, len(labels)),
    )


def compare(logits, ref_logits, labels, *how):
    return logits.new_empty(KLRow.COUNT, len(labels))


def nothing(*arguments, **how):
    """Stands for a GEMM that writes into an existing buffer."""


class Stub:
    """A backend that allocates its results and computes nothing."""

    score, kl = staticmethod(score), staticmethod(compare)
    gradient = from_basis = kl_gradient = staticmethod(nothing)


def run(work: Work, one_head: bool) -> int:
    """The peak of a forward and a backward on fake tensors."""
    new = dict(device="meta")
    hidden = torch.empty(N, H, dtype=torch.bfloat16, **new)
    weight, labels = torch.empty(V, H, dtype=torch.bfloat16, **new), torch.empty(N, dtype=torch.int64, **new)
    rows = torch.empty(work.scored, dtype=torch.int64, **new) if work.scored < N else None
    grads, needs = [torch.empty(N, **new) for _ in range(3)], Needs(*work.needs, False)
    plan, operands = work.plan, Operands(hidden, weight)
    outputs = Outputs(logps=True, entropy=work.entropy)
    limits = plan.keep, plan.tile_bytes, plan.budget, "reference"
    head = Head(Scaling(), plan.dtypes, -100, outputs, *limits)
    with Allocations([hidden, weight, labels, *grads, *([] if rows is None else [rows])]) as counted:
        if one_head:
            stats, kept = logps.forward(head, operands, labels, rows, work.scored)
            saved = logps.Saved(labels, rows, stats.saved, stats.entropy, kept)
            incoming = Grads(grads[0], grads[1] if work.entropy else None)
            call = logps.backward, head, operands, saved, incoming, needs, False
        else:
            divergence = Divergence(Scaling(), Scaling(), "reverse", 0.5, work.kl_bases == 2)
            both = head, operands, operands, KLHead(head, plan.dtypes, divergence)
            saved = kl.Saved(labels, rows, *kl.forward(*both, labels, rows, work.scored))
            incoming = [grads[0], grads[1] if work.kl_bases > 1 else None, None]
            call = kl.backward, *both, saved, incoming, needs, False
        result = call[0](*call[1:]) if work.keep != "nothing" else None
    del result
    return counted.peak


@pytest.mark.parametrize("how", CASES.values(), ids=CASES)
def test_peak_on_a_gpu(how, monkeypatch):
    how = dict(loss="logps", needs=(True, True), entropy=False, share=1.0, scored=0.5) | how
    if how.get("bias") or how["loss"] == "dpo":
        pytest.skip("a bias or DPO plans the same memory")
    sizes = N, int(N * how["scored"]), V, H, H, torch.bfloat16
    work = Work(*sizes, False, how["loss"], how["needs"], how["entropy"], TILE, 0, torch.device("cuda"))
    work = work._replace(budget=int(how["share"] * work.scored) * ROW * max(1, work.kl_bases))
    monkeypatch.setattr(torch, "autocast", lambda *a, **k: contextlib.nullcontext())
    monkeypatch.setattr(Dtypes, "gemm", lambda dtypes, device: dtypes.compute)
    for name in ("mm", "back_project"):
        for module in (gemm, forward, backward):
            monkeypatch.setattr(module, name, nothing, raising=False)
    monkeypatch.setattr("fused_po.backend.choose.get", lambda name: Stub)
    counted = run(work, how["loss"] == "logps")
    planned = ours(work)
    assert abs(planned.peak - counted) <= N * 64
