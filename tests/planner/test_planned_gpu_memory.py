"""The head's memory on a GPU, counted without one: meta tensors, and GEMMs and kernels that compute nothing.

On a GPU the operands of the GEMMs and the basis have a narrower dtype than the logits. GEMMs write into existing
buffers, and the kernels allocate only statistics.
"""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from test_planned_costs import CASES
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fused_po.ops import gemm, head_backward, kl_head
from fused_po.ops import head as schedules
from fused_po.planner.cost import ours
from fused_po.planner.work import Work
from fused_po.reference import SAVED_FIELDS
from fused_po.reference.divergence import TOKEN_FIELDS

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
        logits.new_empty(SAVED_FIELDS, len(labels)),
    )


def kl(logits, ref_logits, labels, *how):
    return logits.new_empty(TOKEN_FIELDS, len(labels))


def nothing(*arguments, **how):
    """Stands for a GEMM that writes into an existing buffer."""


def run(work: Work, logps: bool) -> int:
    """The peak of a forward and a backward on fake tensors."""
    new = dict(device="meta")
    hidden = torch.empty(N, H, dtype=torch.bfloat16, **new)
    weight, labels = torch.empty(V, H, dtype=torch.bfloat16, **new), torch.empty(N, dtype=torch.int64, **new)
    rows = torch.empty(work.scored, dtype=torch.int64, **new) if work.scored < N else None
    grads, needs = [torch.empty(N, **new) for _ in range(3)], [*work.needs, False]
    policy, reference = (kl_head.Side(hidden, weight, None) for _ in range(2))
    with Allocations([hidden, weight, labels, *grads, *([] if rows is None else [rows])]) as counted:
        if logps:
            made = schedules.forward(work.head, hidden, weight, None, labels, rows, work.scored)
            saved = schedules.Saved(hidden, weight, None, labels, rows, made[4], made[1], made[5])
            incoming = grads[0], grads[1] if work.entropy else None, None
            call = head_backward.backward, work.head, saved, *incoming, needs, False
        else:
            made = kl_head.forward(work.head, hidden, work.other, policy, reference, labels, rows, work.scored)
            saved = kl_head.Saved(policy, reference, labels, rows, *made)
            incoming = [grads[0], grads[1] if work.kl_bases > 1 else None, None]
            call = kl_head.backward, work.head, saved, work.other, incoming, needs, False
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
    stand_ins = {"mm": nothing, "back_project": nothing, "gemm_dtype": lambda device, compute, wide: compute}
    for name, stand_in in stand_ins.items():
        for module in (gemm, schedules, head_backward, kl_head):
            monkeypatch.setattr(module, name, stand_in, raising=False)
    fake = SimpleNamespace(score=score, gradient=nothing, from_basis=nothing, kl=kl, kl_gradient=nothing)
    monkeypatch.setattr("fused_po.ops.backend.get", lambda name: fake)
    counted = run(work, how["loss"] == "logps")
    planned = ours(work)
    assert abs(planned.peak - counted) <= N * 64
