"""Threads, forks, CUDA streams and CUDA graphs do not change the results of the ops."""

import multiprocessing
import os
import subprocess
import sys
import threading

import pytest
import torch
from numerics import BACKENDS, DEVICE, IGNORE, REHEARSAL
from repository import SUPPORT

import fused_po

N, V, H = 12, 70, 6
needs_graphs = pytest.mark.skipif(REHEARSAL, reason="a rehearsal captures no graphs")
needs_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
LABELS = torch.where(torch.arange(N) % 4 == 1, IGNORE, torch.arange(N)).to(DEVICE)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def with_gradients(call, *leaves: torch.Tensor) -> list[torch.Tensor]:
    """A value and its gradients in the leaves."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    value = call(*leaves)
    return [value.detach(), *torch.autograd.grad(value.sum(), leaves)]


def of_logits(x: torch.Tensor, **how) -> torch.Tensor:
    return sum(fused_po.logps_from_logits(x, LABELS, outputs=("logps", "entropy", "lse"), **how)[:3])


def of_kl(x: torch.Tensor, **how) -> torch.Tensor:
    return fused_po.kl_from_logits(x, x.detach().flip(1), LABELS, **how).kl


def of_dpo(x: torch.Tensor, **how) -> torch.Tensor:
    reference = torch.zeros(4, 3, device=x.device)
    return fused_po.dpo_from_logits(x.view(4, 3, V), LABELS.view(4, 3), ref_logps=reference, kl="k3", **how).loss


def of_head(hidden: torch.Tensor, weight: torch.Tensor, **how) -> torch.Tensor:
    return fused_po.linear_logps(hidden, weight, LABELS, **how).logps


OPS = {"logps_from_logits": of_logits, "kl_from_logits": of_kl, "dpo_from_logits": of_dpo, "linear_logps": of_head}


def leaves_of(name: str, seed: int) -> list[torch.Tensor]:
    return [normal(N, H, seed=seed), normal(V, H, seed=seed)] if name == "linear_logps" else [normal(N, V, seed=seed)]


def run(name: str, seed: int, **how) -> list[torch.Tensor]:
    return with_gradients(lambda *leaves: OPS[name](*leaves, **how), *leaves_of(name, seed))


@pytest.mark.parametrize("backend", BACKENDS)
def test_threads_at_once(backend):
    """Each thread runs forwards and backwards of its own problems, with the results of a single thread."""
    interpreted = backend == "triton" and DEVICE == "cpu"  # takes seconds
    names, times = (["logps_from_logits", "linear_logps"], 1) if interpreted else (list(OPS), 20)
    alone = {(name, seed): run(name, seed, backend=backend) for name in names for seed in range(2)}
    wrong, start = [], threading.Barrier(2)

    def work(seed: int) -> None:
        start.wait()
        try:
            for name in names * times:
                found = run(name, seed, backend=backend)
                wrong.extend(name for a, b in zip(found, alone[name, seed], strict=True) if not torch.equal(a, b))
        except BaseException as error:  # errors in a thread do not fail a test by themselves
            wrong.append(repr(error))

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []


def test_one_backward_through_all_ops_in_many_threads():
    """One graph with all ops, parts of which autograd may run in its own threads."""
    losses, truth = [], []
    for name in OPS:
        leaves = [leaf.requires_grad_() for leaf in leaves_of(name, 3)]
        losses.append((OPS[name](*leaves).sum(), leaves))
        truth += run(name, 3)[1:]
    together = threading.Thread(target=lambda: torch.autograd.backward([loss for loss, _ in losses]))
    together.start()
    together.join()
    assert all(torch.equal(leaf.grad, g) for leaf, g in zip((v for _, vs in losses for v in vs), truth, strict=True))


FORK = """
import os, sys, torch
sys.path[:0] = {paths!r}
import test_threads_and_forks as here

LABELS = here.LABELS.cpu()

def child(gradients):
    number = os.fork()
    if number == 0:
        here.DEVICE, here.LABELS = "cpu", LABELS
        values = lambda name: [here.OPS[name](*here.leaves_of(name, 0))]
        torch.save([here.run(name, 0) if gradients else values(name) for name in here.OPS], sys.argv[1])
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]), torch.load(sys.argv[1], weights_only=True)

unused = child(gradients=True)
used = [here.run(name, 0) for name in here.OPS]
again = child(gradients=here.DEVICE == "cpu")  # PyTorch refuses a child's backward after one on a GPU
assert unused[0] == again[0] == 0 and len(used) == 4
for first, second, parent in zip(unused[1], again[1], used, strict=True):
    assert len(first) == len(parent) and all(torch.allclose(a, b.cpu(), atol=1e-4) for a, b in zip(first, parent))
    assert all(torch.equal(a, b) for a, b in zip(first, second)) and second
"""


def test_fork_after_import_and_after_use(tmp_path):
    """The child computes on the CPU, like the workers of a data loader, whatever the parent has used.

    One thread is used, since PyTorch's own operators hang in a child of a process that has used OpenMP threads.
    """
    command = [
        sys.executable,
        "-c",
        FORK.format(paths=[os.path.dirname(__file__), str(SUPPORT)]),
        str(tmp_path / "results"),
    ]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr


def test_results_can_be_sent_to_spawned_processes():
    """Results and schedules can be pickled and sent between processes."""
    schedule = fused_po.Schedule(logits_budget=1 << 20)
    stats = fused_po.logps_from_logits(normal(N, V).cpu(), LABELS.cpu())
    received, sent = multiprocessing.get_context("spawn").Pipe()
    sent.send((schedule, stats))
    again = received.recv()
    assert again[0] == schedule and torch.equal(again[1].logps, stats.logps) and again[1].entropy is None


# Tests that need a GPU.


@needs_gpu
@pytest.mark.parametrize("name", OPS)
def test_streams_other_than_the_default(name):
    """The ops wait for unfinished work on the stream, and later work on the stream sees their results."""
    truth, stream = run(name, 4), torch.cuda.Stream()
    leaves = leaves_of(name, 4)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        late = []
        for leaf in leaves:
            torch.cuda._sleep(20_000_000)
            late.append(leaf.clone())
        found = [value.clone() for value in with_gradients(OPS[name], *late)]
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, truth, strict=True))


@needs_gpu
@needs_graphs
@pytest.mark.parametrize("name", OPS)
def test_cuda_graphs(name):
    """Forward and backward are captured once and replayed on other inputs; linear_logps needs num_scored."""
    how = {}
    if name == "linear_logps":
        how["schedule"] = fused_po.Schedule(num_scored=int((LABELS != IGNORE).sum()))
    inputs = leaves_of(name, 5)
    warm_up = torch.cuda.Stream()
    warm_up.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm_up):
        for _ in range(3):
            with_gradients(lambda *leaves: OPS[name](*leaves, **how), *inputs)
    torch.cuda.current_stream().wait_stream(warm_up)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = with_gradients(lambda *leaves: OPS[name](*leaves, **how), *inputs)
    for seed in (6, 7):
        for held, new in zip(inputs, leaves_of(name, seed)):
            held.copy_(new)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(found, run(name, seed, **how), strict=True)), seed


@needs_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_a_gpu_that_is_not_the_current_one():
    truth, there = run("logps_from_logits", 8), torch.device("cuda", 1)
    x = normal(N, V, seed=8).to(there).requires_grad_()
    value = sum(fused_po.logps_from_logits(x, LABELS.to(there), outputs=("logps", "entropy", "lse"))[:3])
    (grad,) = torch.autograd.grad(value.sum(), x)
    assert torch.equal(value.to(DEVICE), truth[0]) and torch.equal(grad.to(DEVICE), truth[1])


@needs_gpu
@pytest.mark.parametrize("bad", (V, -1, 2**40))
def test_labels_out_of_range_cause_no_illegal_access_under_debug(bad, monkeypatch):
    """An error is raised before any kernel reads them, and the GPU keeps working."""
    monkeypatch.setenv("FUSED_PO_DEBUG", "1")
    wrong = LABELS.clone()
    wrong[3] = bad
    x, (hidden, weight) = normal(N, V), leaves_of("linear_logps", 9)
    for call in (
        lambda: fused_po.logps_from_logits(x, wrong),
        lambda: fused_po.kl_from_logits(x, x, wrong),
        lambda: fused_po.linear_logps(hidden, weight, wrong),
        lambda: fused_po.linear_kl(hidden, weight, hidden, weight, wrong),
        lambda: fused_po.dpo_from_logits(x.view(4, 3, V), wrong.view(4, 3), ref_logps=torch.zeros(4, 3, device=DEVICE)),
        lambda: fused_po.linear_dpo(
            hidden.view(4, 3, H), weight, wrong.view(4, 3), ref_logps=torch.zeros(4, 3, device=DEVICE)
        ),
    ):
        with pytest.raises(ValueError, match=f"labels: got {bad} at flat position 3"):
            call()
    torch.cuda.synchronize()
    run("logps_from_logits", 9)
