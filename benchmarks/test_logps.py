"""Forward and backward of `linear_logps` against eager PyTorch and the bare GEMMs. `make bench`.

One real case until there is a suite. The providers run in turns, so that a machine whose speed drifts drifts for all;
the figure to quote is the ratio of medians. A provider whose log-probs are wrong is not timed.
"""

import statistics
import time

import pytest
import torch

import fused_po

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = {"cpu": (1024, 896, 32000, torch.float32), "cuda": (8192, 4096, 128256, torch.bfloat16)}  # N, H, V, dtype


def eager(hidden, weight, labels):
    return (hidden @ weight.T).float().log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)


def fused(hidden, weight, labels):
    return fused_po.linear_logps(hidden, weight, labels).logps


PROVIDERS = {"fused_po": fused, "eager": eager}


@pytest.fixture(scope="module")
def problem():
    n, h, v, dtype = SHAPES[DEVICE]
    torch.manual_seed(0)
    hidden = torch.randn(n, h, device=DEVICE).to(dtype).requires_grad_()
    weight = (torch.randn(v, h, device=DEVICE) / h**0.5).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, v, (n,), device=DEVICE)


def step(provider, hidden, weight, labels):
    hidden.grad = weight.grad = None
    provider(hidden, weight, labels).sum().backward()
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def gemms(hidden, weight, labels):
    """The four products that a head trained with recomputed logits cannot do without."""
    with torch.no_grad():
        tile = hidden @ weight.T
        torch.mm(hidden, weight.T, out=tile)
        tile @ weight, tile.T @ hidden
    if DEVICE == "cuda":
        torch.cuda.synchronize()


@pytest.mark.parametrize("name", PROVIDERS)
def test_forward_and_backward(benchmark, problem, name):
    hidden, weight, labels = problem
    with torch.no_grad():
        got = PROVIDERS[name](hidden, weight, labels)[:64]
        exact = eager(hidden[:64].double(), weight.double(), labels[:64])
    error = (got - exact).abs().max().item()
    assert error < (0.1 if hidden.dtype == torch.bfloat16 else 1e-4), f"{name} is wrong by {error}: not timed"
    benchmark.extra_info["log-prob error"] = error
    benchmark.pedantic(step, (PROVIDERS[name], *problem), warmup_rounds=1, rounds=3)


def test_ratio_to_eager_and_to_the_bare_gemms(benchmark, problem, capsys):
    times = {name: [] for name in (*PROVIDERS, "bare GEMMs (4)")}
    for turn in range(4):
        for name in times:
            begin = time.perf_counter()
            gemms(*problem) if name not in PROVIDERS else step(PROVIDERS[name], *problem)
            if turn:  # the first turn warms up
                times[name].append(time.perf_counter() - begin)
    medians = {name: statistics.median(values) for name, values in times.items()}
    benchmark.extra_info["median seconds"] = medians
    benchmark.pedantic(lambda: None, rounds=1)
    n, h, v, dtype = SHAPES[DEVICE]
    with capsys.disabled():
        print(f"\nforward + backward, N={n} H={h} V={v} {dtype} on {DEVICE}, medians of 3 interleaved:")
        for name, value in medians.items():
            print(f"  {name:16} {value:7.3f} s   fused_po takes {medians['fused_po'] / value:5.2f} x as long")
