"""Bitwise equal results in every run: each op with each schedule, values and gradients, under load."""

import threading

import pytest
import torch
from numerics import BACKENDS, DEVICE, IGNORE, random_labels

import fused_po
from fused_po import Schedule

N, V, H = 12, 500, 16
REPEATS = 100
ROW = 4 * (V + 12)  # bytes of a padded fp32 row
SCHEDULES = {
    "kept": Schedule(),
    "recomputed": Schedule(logits_budget=0, tile_bytes=5 * ROW),
    "half kept": Schedule(logits_budget=5 * ROW, tile_bytes=3 * ROW),
    "all rows computed": Schedule(compact=False, tile_bytes=5 * ROW),
}


@pytest.fixture
def busy():
    """Run matrix products and random numbers in another thread (on a GPU in another stream) during the test."""
    done = threading.Event()

    def work() -> None:
        stream = torch.cuda.Stream() if DEVICE == "cuda" else None
        with torch.cuda.stream(stream):
            a = torch.randn(300, 300, device=DEVICE)
            while not done.wait(1e-3):  # releases the GIL between products
                a = (a @ a).tanh_() + torch.rand_like(a)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    yield
    done.set()
    thread.join()


def tensors(dtype=torch.bfloat16) -> dict[str, torch.Tensor]:
    shapes = {"hidden": (N, H), "weight": (V, H), "ref_hidden": (N, H), "ref_weight": (V, H), "logits": (N, V)}
    found = {name: torch.randn(shape, device=DEVICE).to(dtype) for name, shape in shapes.items()}
    found["ref_logits"] = (found["logits"] + 0.3 * torch.randn(N, V, device=DEVICE)).to(dtype)
    labels = random_labels(N, V)
    labels[0] = IGNORE
    return found | {"labels": labels, "bias": torch.randn(V, device=DEVICE).to(dtype)}


def linear_logps(t, **how):
    stats = fused_po.linear_logps(
        t["hidden"], t["weight"], t["labels"], t["bias"], outputs=("logps", "entropy", "lse"), **how
    )
    return [stats.logps, stats.entropy, stats.lse]


def linear_kl(t, **how):
    return list(fused_po.linear_kl(t["hidden"], t["weight"], t["ref_hidden"], t["ref_weight"], t["labels"], **how))


def linear_dpo(t, **how):
    hidden, labels, ref_hidden = (t[name].unflatten(0, (4, -1)) for name in ("hidden", "labels", "ref_hidden"))
    out = fused_po.linear_dpo(hidden, t["weight"], labels, ref_hidden, t["ref_weight"], kl="k3", kl_coef=0.1, **how)
    return [out.loss, out.losses, out.chosen_logps]


def chunked_loss(t, **how):
    groups = torch.arange(N, device=DEVICE) // 3
    if not how["schedule"].compact:
        pytest.skip("chunked_loss always drops ignored tokens")
    return [
        fused_po.chunked_loss(
            lambda stats, rows: stats.logps.square().sum(), t["hidden"], t["weight"], t["labels"], groups, **how
        )
    ]


def logps_from_logits(t, **how):
    return list(fused_po.logps_from_logits(t["logits"], t["labels"], outputs=("logps", "entropy", "lse"), **how)[:3])


def kl_from_logits(t, **how):
    return list(fused_po.kl_from_logits(t["logits"], t["ref_logits"], t["labels"], direction="js", **how))


def dpo_from_logits(t, **how):
    logits, labels, ref_logits = (t[name].unflatten(0, (4, -1)) for name in ("logits", "labels", "ref_logits"))
    out = fused_po.dpo_from_logits(logits, labels, ref_logits, kl="k3", kl_coef=0.1, **how)
    return [out.loss, out.losses, out.chosen_logps]


def gae(t, **how):
    return list(fused_po.gae(t["logits"], t["ref_logits"], t["logits"] > 0, lam=0.9, **how))


def reductions(t, **how):
    logps, bounds = t["bias"].float(), torch.tensor([0, 3, 3, 200, V], device=DEVICE)
    mask = logps > -1
    values = [fused_po.sequence_logps(logps, mask, bounds, average=True, ld_alpha=0.3)]
    return values + [fused_po.aggregate(logps, mask, mode, cu_seqlens=bounds) for mode in fused_po.reduce.MODES[:3]]


FROM_LOGITS = (logps_from_logits, kl_from_logits, dpo_from_logits, gae)
FROM_HIDDEN = (linear_logps, linear_kl, linear_dpo, chunked_loss)


def once(run, t, leaves, **how) -> list[torch.Tensor]:
    """Values and gradients."""
    t = t | {name: t[name].clone().requires_grad_() for name in leaves}
    values = run(t, **how)
    total = sum((i + 1) * value.sum() for i, value in enumerate(values) if value.requires_grad)
    grads = torch.autograd.grad(total, [t[name] for name in leaves], allow_unused=True) if leaves else []
    return [*(v.detach() for v in values), *(g for g in grads if g is not None)]


def repeat(run, leaves, repeats, **how) -> None:
    t = tensors()
    first = once(run, t, leaves, **how)
    assert len(first) > len(leaves) // 3 and all(value.isfinite().all() for value in first)
    for i in range(repeats - 1):
        again = once(run, t, leaves, **how)
        assert all(map(torch.equal, first, again)), f"repeat {i + 1} differs"


# Interpreted kernels take seconds: the ordinary tests run them a few times, the slow ones 100 times.
INTERPRETED = [
    pytest.param("triton", 3, id="triton, 3 times"),
    pytest.param("triton", REPEATS, id="triton", marks=pytest.mark.slow),
]
EVERY = [pytest.param(backend, REPEATS, id=backend) for backend in BACKENDS]
BY_BACKEND = EVERY if DEVICE == "cuda" else [EVERY[0], *INTERPRETED]
HEADS_BY_BACKEND = EVERY if DEVICE == "cuda" else [EVERY[0], INTERPRETED[1]]


@pytest.mark.parametrize("backend, repeats", BY_BACKEND)
@pytest.mark.parametrize("run", FROM_LOGITS, ids=lambda run: run.__name__)
def test_from_logits(run, backend, repeats, busy, seed):
    repeat(run, () if run is gae else ("logits",), repeats, backend=backend)


@pytest.mark.parametrize("backend, repeats", HEADS_BY_BACKEND)
@pytest.mark.parametrize("leaves", (("hidden",), ("hidden", "weight", "bias")), ids=("frozen", "trainable"))
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("run", FROM_HIDDEN, ids=lambda run: run.__name__)
def test_from_hidden_states(run, schedule, leaves, backend, repeats, busy, seed):
    leaves = leaves if run is linear_logps else leaves[:2]
    repeat(run, leaves, repeats, schedule=schedule, backend=backend)


def test_reductions(busy, seed):
    repeat(reductions, ("bias",), REPEATS)


def test_a_changed_bit_is_noticed(seed):
    def uncertain(t, **how):
        return [t["hidden"] + torch.rand(()) * 1e-2]

    with pytest.raises(AssertionError, match="repeat 1 differs"):
        repeat(uncertain, ("hidden",), 3)
