"""Out of memory and Ctrl-C at every step of every op: the error is raised, memory is freed, later calls work.

A step is an operator that creates or writes a tensor, inside the ops too. The fault is raised at the first, the second
and every later step of a forward and its backward.
"""

import gc
import time
import weakref
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from counting import run_inside
from numerics import DEVICE, IGNORE
from torch.utils._python_dispatch import TorchDispatchMode

import fused_po
from fused_po import Schedule

N, V, H = 12, 70, 6
ROW = 4 * 80  # bytes of a padded row of fp32 logits
FEWEST = 2 if DEVICE == "cuda" else 40  # steps of an op; operators inside a kernel are not counted
FAULTS = ((torch.OutOfMemoryError, 1), (KeyboardInterrupt, 11))  # (error, raised at every n-th step)


def count_when_settled(count: Callable[[], int], allowed: int = 0) -> int:
    """count(), after waiting until it is allowed: autograd's GPU thread frees an error shortly after the caller."""
    for _ in range(100 if DEVICE == "cuda" else 0):
        if count() <= allowed:
            break
        time.sleep(0.01)
    return count()


class FaultAt(TorchDispatchMode):
    """Raises instead of operator number `at` (not counting views); keeps weak references to all created memory."""

    def __init__(self, at: int, error: type[BaseException]) -> None:
        super().__init__()
        self.at, self.error, self.steps, self.made = at, error, 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and "fused_po" not in func._schema.name:
            self.steps += 1
            if self.steps == self.at:
                raise self.error("tried to allocate 1 TiB")
        result = run_inside(self, func, args, kwargs or {})
        given = {
            v.untyped_storage().data_ptr() for v in (*args, *(kwargs or {}).values()) if isinstance(v, torch.Tensor)
        }
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() not in given:
                self.made.append(weakref.ref(value.untyped_storage()))
        return result

    def alive(self) -> int:
        """The created memory that is still alive."""
        return count_when_settled(lambda: sum(storage() is not None for storage in self.made))


class Case(NamedTuple):
    """call(leaves, how) returns tensors; gradients are taken with respect to leaves that require grad."""

    call: object
    leaves: dict[str, torch.Tensor]
    how: dict = {}  # noqa: RUF012, never written

    def results(self, leaves: dict) -> tuple[torch.Tensor, ...]:
        found = self.call(**leaves, **self.how)
        values = [found] if isinstance(found, torch.Tensor) else [v for v in found if v is not None]
        return tuple(v for v in values if v.requires_grad) or tuple(values)


def normal(*shape: int, grad: bool = True, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    value = torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))
    return value.to(DEVICE, dtype).requires_grad_(grad)


def labels(*shape: int) -> torch.Tensor:
    found = torch.arange(torch.Size(shape).numel(), device=DEVICE).remainder(V).view(shape)
    return torch.where(found % 4 == 1, IGNORE, found)


def share(stats: fused_po.TokenStats, rows: torch.Tensor) -> torch.Tensor:
    return (stats.logps * (rows + 1)).sum()


HIDDEN, HEAD, ALL = normal(N, H), normal(V, H), ("logps", "entropy", "lse")
PAIRS = dict(hidden=normal(4, 3, H), weight=HEAD, labels=labels(4, 3))
REFERENCE = dict(ref_hidden=normal(N, H, grad=False), ref_weight=normal(V, H, grad=False))
LOGITS = dict(logits=normal(N, V), labels=labels(N))
LINEAR = dict(hidden=HIDDEN, weight=HEAD, labels=labels(N))
SMALL = Schedule(tile_bytes=5 * ROW)
CASES = {
    "logps_from_logits": Case(fused_po.logps_from_logits, LOGITS, dict(outputs=ALL)),
    "linear_logps, kept": Case(fused_po.linear_logps, LINEAR | dict(bias=normal(V)), dict(schedule=SMALL)),
    "linear_logps, part kept": Case(
        fused_po.linear_logps, LINEAR, dict(schedule=Schedule(logits_budget=4 * ROW, tile_bytes=5 * ROW), outputs=ALL)
    ),
    "linear_logps, none kept, bf16 head": Case(
        fused_po.linear_logps,
        LINEAR | dict(weight=normal(V, H, dtype=torch.bfloat16)),
        dict(schedule=Schedule(logits_budget=0, tile_bytes=5 * ROW)),
    ),
    "linear_logps, head frozen": Case(fused_po.linear_logps, LINEAR | dict(weight=HEAD.detach()), dict(schedule=SMALL)),
    "linear_logps, low rank": Case(
        lambda u, low, **rest: fused_po.linear_logps(low_rank=(u, low), **rest),
        LINEAR | dict(weight=HEAD.detach(), u=normal(N, 2), low=normal(V, 2)),
        dict(schedule=SMALL),
    ),
    "kl_from_logits": Case(fused_po.kl_from_logits, LOGITS | dict(ref_logits=normal(N, V, grad=False))),
    "linear_kl": Case(fused_po.linear_kl, LINEAR | REFERENCE, dict(schedule=Schedule(tile_bytes=12 * ROW))),
    "linear_kl, none kept": Case(
        fused_po.linear_kl, LINEAR | REFERENCE, dict(schedule=Schedule(logits_budget=0, tile_bytes=12 * ROW))
    ),
    "dpo_from_logits": Case(
        fused_po.dpo_from_logits,
        dict(logits=normal(4, 3, V), ref_logits=normal(4, 3, V, grad=False), labels=labels(4, 3)),
        dict(kl="k3", kl_coef=0.1),
    ),
    "linear_dpo": Case(fused_po.linear_dpo, PAIRS | dict(ref_logps=normal(4, 3, grad=False)), dict(schedule=SMALL)),
    "chunked_loss": Case(
        fused_po.chunked_loss,
        LINEAR | dict(groups=torch.arange(N, device=DEVICE) // 3),
        dict(loss_fn=share, schedule=Schedule(logits_budget=4 * ROW, tile_bytes=5 * ROW)),
    ),
    "gae": Case(fused_po.gae, dict(rewards=normal(3, 9, grad=False), values=normal(3, 9, grad=False))),
}


def step(case: Case) -> tuple[torch.Tensor, ...]:
    """Values and gradients; the graph of the values is freed."""
    wanted = [leaf for leaf in case.leaves.values() if leaf.requires_grad]
    values = case.results(case.leaves)
    if not wanted:
        return values
    grads = torch.autograd.grad(values, wanted, [torch.ones_like(v) for v in values])
    return *(v.detach() for v in values), *grads


def fault(case: Case, at: int, error: type[BaseException]) -> tuple[FaultAt, str | None]:
    """The outcome of one step with a fault; the error is freed when this returns."""
    mode = FaultAt(at, error)
    try:
        with mode:
            step(case)
    except error as raised:
        return mode, str(raised)
    return mode, None


SLOW = ("linear_kl, none kept",)
EVERY = [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in CASES]


@pytest.mark.parametrize("error, stride", FAULTS, ids=("memory", "ctrl-c"))
@pytest.mark.parametrize("name", EVERY)
def test_a_fault_at_every_step(name, error, stride):
    case = CASES[name]
    before = {leaf: value.detach().clone() for leaf, value in case.leaves.items()}
    truth = step(case)
    gc.collect()
    allocated = torch.cuda.memory_allocated() if DEVICE == "cuda" else 0
    gc.disable()
    try:
        at, messages = 1, []
        while True:
            mode, said = fault(case, at, error)
            if said is None:
                break
            messages.append(said)
            assert "tried to allocate 1 TiB" in said, said
            assert mode.alive() == 0, f"step {at}: {mode.alive()} of {len(mode.made)} tensors are left behind"
            at += stride
    finally:
        gc.enable()
    assert mode.steps < at <= mode.steps + stride and mode.steps > FEWEST, "the faults have reached the last step"
    if error is torch.OutOfMemoryError and ("linear" in name or "chunked" in name):
        helpful = sum("Lower Schedule.logits_budget" in said for said in messages)
        assert helpful > len(messages) / 2, "most errors say what to lower"
    for leaf, value in case.leaves.items():
        assert torch.equal(value, before[leaf]) and value.grad is None, f"{leaf} was changed"
    assert all(torch.equal(a, b) for a, b in zip(step(case), truth, strict=True)), "the next call gives other results"
    gc.collect()
    assert DEVICE == "cpu" or count_when_settled(torch.cuda.memory_allocated, allocated) <= allocated


SHORT = dict(logits=normal(4, 20), labels=torch.arange(4, device=DEVICE))
OF_KERNELS = {
    "logps_from_logits": Case(fused_po.logps_from_logits, SHORT, dict(outputs=ALL)),
    "kl_from_logits": Case(fused_po.kl_from_logits, SHORT | dict(ref_logits=normal(4, 20, grad=False))),
    "linear_logps": Case(
        fused_po.linear_logps, dict(hidden=normal(4, H), weight=normal(20, H), labels=SHORT["labels"])
    ),
}


@pytest.mark.parametrize("name", OF_KERNELS)
def test_a_fault_at_every_allocation_around_the_kernels(name, monkeypatch):
    """Faults in the torch.empty calls of Triton's launchers; with FaultAt the interpreter would take minutes."""
    case = OF_KERNELS[name]._replace(how=OF_KERNELS[name].how | dict(backend="triton"))
    truth, empty, made = step(case), torch.empty, []

    def short_of_memory(*arguments, **options):
        made.append(None)
        if len(made) == at:
            raise torch.OutOfMemoryError("tried to allocate 1 TiB")
        value = empty(*arguments, **options)
        made[-1] = weakref.ref(value.untyped_storage())
        return value

    monkeypatch.setattr(torch, "empty", short_of_memory)
    for at in range(1, 100):
        made.clear()
        try:
            step(case)
            break
        except torch.OutOfMemoryError:
            pass
        gc.collect()  # reference cycles of the interpreter
        assert not [storage for storage in made if storage is not None and storage() is not None], f"allocation {at}"
    monkeypatch.undo()
    assert at >= 2 and all(torch.equal(a, b) for a, b in zip(step(case), truth, strict=True))


IN_PLACE = {
    "logps_from_logits": CASES["logps_from_logits"],
    "kl_from_logits": CASES["kl_from_logits"],
    "dpo_from_logits": CASES["dpo_from_logits"],
}


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("gae", "chunked_loss")])
def test_a_failed_backward_can_run_again(name):
    """The graph is intact: the same gradients after a fault at any step."""
    case = CASES[name]
    wanted = [leaf for leaf in case.leaves.values() if leaf.requires_grad]
    values = case.results(case.leaves)
    ones = [torch.ones_like(v) for v in values]
    truth = torch.autograd.grad(values, wanted, ones, retain_graph=True)
    for at in range(1, 1000, 3):
        try:
            with FaultAt(at, torch.OutOfMemoryError):
                torch.autograd.grad(values, wanted, ones, retain_graph=True)
            break
        except torch.OutOfMemoryError:
            again = torch.autograd.grad(values, wanted, ones, retain_graph=True)
            assert all(torch.equal(a, b) for a, b in zip(again, truth, strict=True)), f"after a fault at step {at}"
    assert at > (1 if DEVICE == "cuda" else 4)


@pytest.mark.parametrize("backend", ("reference", "triton"))
@pytest.mark.parametrize("name", IN_PLACE)
def test_a_failed_in_place_backward_never_gives_a_wrong_gradient(name, backend):
    """The logits may be half overwritten; then a second backward is an error."""
    case = IN_PLACE[name]
    truth = step(case)[-1]
    outcomes = set()
    for at in range(1, 200, 3 if backend == "reference" else 37):
        x = case.leaves["logits"].detach().clone().requires_grad_()
        values = Case(case.call, case.leaves, case.how | dict(inplace_backward=True, backend=backend)).results(
            case.leaves | dict(logits=x + 0)
        )
        ones = [torch.ones_like(v) for v in values]
        try:
            with FaultAt(at, torch.OutOfMemoryError):
                torch.autograd.grad(values, x, ones, retain_graph=True)
            break
        except torch.OutOfMemoryError:
            pass
        try:
            (again,) = torch.autograd.grad(values, x, ones)
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)
            outcomes.add("error")
        else:
            torch.testing.assert_close(again, truth, rtol=1e-5, atol=1e-6, msg=f"after a fault at step {at}")
            outcomes.add("right")
    assert at > 5 and outcomes
