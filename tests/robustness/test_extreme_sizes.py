"""The largest and smallest sizes: offsets beyond 2^31 elements, N = 1 and 10^6, V = 1 and 2^20."""

import importlib

import pytest
import torch
from logps_checks import check_linear, check_logits
from numerics import BACKENDS, DEVICE, IGNORE, Scaling, random_labels
from plain_ops import gae_loop

import fused_po
from fused_po.backend import choose as backends

APART = 2**31 + 16  # elements between rows; the memory in between is never touched
V = 300


def far_apart(*values: torch.Tensor) -> list[torch.Tensor]:
    """The same rows [2, v], APART elements apart in one bf16 storage."""
    room = sum(value.shape[1] for value in values)
    storage, views, begin = torch.empty(APART + room, dtype=torch.bfloat16, device=DEVICE), [], 0
    for value in values:
        view = storage.as_strided((2, value.shape[1]), (APART, 1), begin)
        views.append(view.copy_(value))
        begin += value.shape[1]
    return views


def near(*values: torch.Tensor) -> list[torch.Tensor]:
    return [value.bfloat16().clone() for value in values]


def both(run, *values: torch.Tensor) -> None:
    """Check that run(*rows) gives the same result for adjacent rows and for rows far apart."""
    for got, expected in zip(run(*far_apart(*values)), run(*near(*values)), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("inplace", (False, True))
@pytest.mark.parametrize("split", (False, True), ids=("a program a row", "rows split"))
@pytest.mark.parametrize("backend", BACKENDS)
def test_offsets_of_log_probs(backend, split, inplace, seed, monkeypatch):
    if split and backend == "triton":
        statistics = importlib.import_module("fused_po.kernels.triton.statistics")
        monkeypatch.setattr(statistics, "multiprocessors", lambda device: 64)
    labels, width = random_labels(2, V, "none"), 9000 if split else V

    def run(logits):
        leaf = logits.detach().requires_grad_()
        # the gradient of as_strided would be a tensor of the whole storage
        how = dict(outputs=("logps", "entropy"), backend=backend)
        stats = fused_po.logps_from_logits(leaf, labels, **how)
        grads = torch.autograd.grad(stats.logps.sum() + stats.entropy.sum(), leaf)
        if inplace:
            with torch.no_grad():
                rows = logits[None]
                _, entropy, _, _, saved = backends.get(backend).statistics(rows, labels, 1.0, None, IGNORE, 3)
                one = torch.ones(2, device=DEVICE)
                backends.get(backend).gradient(rows, labels, saved, entropy, one, one, None, 1.0, None, rows)
            grads = (logits.clone(),)
        return [*(v.detach() for v in stats[:2]), *(g.float() for g in grads)]

    both(run, torch.randn(2, width, device=DEVICE))


@pytest.mark.parametrize("backend", BACKENDS)
def test_offsets_of_a_kept_basis(backend, seed):
    labels, one = random_labels(2, V, "none"), torch.ones(2, device=DEVICE)
    logps, saved = -torch.rand(2, device=DEVICE), torch.rand(2, 2, device=DEVICE)

    def run(basis):
        out = torch.empty(2, V, dtype=torch.bfloat16, device=DEVICE)
        backends.get(backend).from_basis(basis, labels, saved, logps, one, one, one, None, 1.0, out)
        return [out.float()]

    both(run, -torch.rand(2, V, device=DEVICE))


@pytest.mark.parametrize("backend", BACKENDS)
def test_offsets_of_the_kl(backend, seed):
    labels = random_labels(2, V, "none")

    def run(logits, ref_logits):
        leaf = logits.detach().requires_grad_()
        stats = fused_po.kl_from_logits(leaf, ref_logits, labels, backend=backend)
        (grad,) = torch.autograd.grad(stats.kl.sum() + stats.entropy.sum(), leaf)
        return [*(v.detach() for v in stats), grad.float()]

    both(run, *torch.randn(2, 2, V, device=DEVICE))


@pytest.mark.parametrize("backend", BACKENDS)
def test_offsets_of_dpo(backend, seed):
    labels = random_labels(2, V, "none")[:, None]

    def run(logits, ref_logits):
        leaf = logits[:, None].detach().requires_grad_()
        out = fused_po.dpo_from_logits(leaf, labels, ref_logits[:, None], kl="k3", kl_coef=0.1, backend=backend)
        (grad,) = torch.autograd.grad(out.loss, leaf)
        return [out.loss.detach(), out.losses.detach(), out.kl_per_token, grad.float()]

    both(run, *torch.randn(2, 2, V, device=DEVICE))


@pytest.mark.parametrize("backend", BACKENDS)
def test_offsets_of_gae(backend, seed):
    both(lambda r, v: fused_po.gae(r, v, lam=0.9, backend=backend), *torch.randn(2, 2, V, device=DEVICE))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("v", (1, 2))
@pytest.mark.parametrize("scaling", (Scaling(), Scaling(0.7, 2.0, 5.0)), ids=("plain", "capped"))
def test_the_smallest_vocabularies(scaling, v, backend, seed, poison):
    """With one token the log-prob is 0 and the gradient is 0, up to the rounding of a probability of 1."""
    logits = torch.randn(256, v, device=DEVICE) * 3
    if v == 2:
        return check_logits(logits, random_labels(256, v), scaling, backend, n=5)
    x = logits[:5].clone().requires_grad_()
    stats = fused_po.logps_from_logits(
        x, random_labels(5, 1), outputs=("logps", "entropy"), backend=backend, **scaling._asdict()
    )
    (grad,) = torch.autograd.grad(stats.logps.sum() + stats.entropy.sum(), x)
    rounding = torch.finfo(torch.float32).eps / 2 * (scaling.steepest if backend == "triton" else 1)
    assert max(stats.logps.abs().max(), stats.entropy.abs().max(), grad.abs().max()) <= rounding


@pytest.mark.parametrize(
    "backend", ("reference", pytest.param("triton", marks=pytest.mark.slow if DEVICE == "cpu" else []))
)
def test_one_row_with_a_vocabulary_of_a_million(backend, seed, poison):
    v = 2**20
    logits = torch.randn(6, v, device=DEVICE)
    logits[:, ::7] = -torch.inf
    labels = torch.tensor([v - 2, v - 3, 4, 5, 6, 8], device=DEVICE)
    check_logits(logits, labels, Scaling(), backend, n=1)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_head_with_a_vocabulary_of_a_million(backend, seed, poison):
    v = 2**20
    hidden, weight = torch.randn(16, 4, device=DEVICE), torch.randn(v, 4, device=DEVICE) / 2
    labels = random_labels(16, v, "none")
    labels[0] = v - 1
    schedule = fused_po.Schedule(tile_bytes=2 * 4 * v, logits_budget=4 * v)
    check_linear(hidden, weight, None, labels, Scaling(), backend, schedule, n=2)


def test_a_million_rows(seed, poison):
    """With the reference backend on a CPU, since interpreted kernels take about 10 ms per row."""
    n = 10**6
    check_logits(torch.randn(n, 3, device=DEVICE), random_labels(n, 3), Scaling(), None)


@pytest.mark.slow
def test_a_head_of_a_million_rows(seed, poison):
    n = 10**6
    hidden, weight = torch.randn(n, 2, device=DEVICE), torch.randn(5, 2, device=DEVICE)
    check_linear(hidden, weight, None, random_labels(n, 5), Scaling(), None)


def test_a_million_tokens_in_a_sequence_and_a_million_sequences(seed):
    n = 10**6
    x = torch.randn(n, device=DEVICE)
    exact = x.double()
    bounds = torch.tensor([0, n], device=DEVICE)
    # adding one by one the worst error is n times as large
    rounding = torch.finfo(torch.float32).eps * exact.abs().cumsum(0)[-1]
    assert (fused_po.sequence_logps(x, cu_seqlens=bounds).double() - exact.sum()).abs() <= rounding
    assert torch.equal(fused_po.sequence_logps(x, cu_seqlens=torch.arange(n + 1, device=DEVICE)), x)
    each = fused_po.aggregate(x, None, "seq-mean-token-mean", cu_seqlens=torch.arange(n + 1, device=DEVICE))
    assert (each.double() - exact.mean()).abs() <= rounding / n


def test_gae_of_a_million_steps(seed):
    """10^6 steps in one row, and in 10^6 rows."""
    rewards, values = torch.randn(2, 10**6, dtype=torch.float64, device=DEVICE)
    steps = fused_po.gae(rewards[None, :20000], values[None, :20000], gamma=0.9, lam=0.9)
    for got, expected in zip(steps, gae_loop(rewards[None, :20000], values[None, :20000], None, None, 0.9, 0.9)):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    row = fused_po.gae(rewards[None], values[None], gamma=0.9, lam=0.9)[0]
    torch.testing.assert_close(
        row[:, -9000:], fused_po.gae(rewards[None, -9000:], values[None, -9000:], gamma=0.9, lam=0.9)[0]
    )
    columns = fused_po.gae(rewards[:, None], values[:, None], gamma=0.9, lam=0.9)[0]
    assert torch.equal(columns[:, 0], rewards - values)
