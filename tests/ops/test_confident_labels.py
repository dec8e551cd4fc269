"""Labels with a probability near 1: the log-prob and its gradient keep their relative precision, in every op.

The expected value sums over the other tokens only: log p = -log1p(sum of exp(z_v - z_y) over v != y). log_softmax
rounds log p to a multiple of 6e-8, and the gradient with it.
"""

import importlib

import pytest
import torch
from numerics import BACKENDS, DEVICE, IGNORE, Scaling, assert_below

import fused_po
from fused_po.backend import choose as backends
from fused_po.backend import interface
from fused_po.backend.interface import Outputs, stats_dtype
from fused_po.parallel.row_passes import KL_RECORD, SplitRows

GAPS = (0.0, 1e-3, 0.5, 3.0, 10.0, 20.0, 40.0, 70.0)  # nats between label and next token; fp32 underflows at e^-87
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PLAIN = Scaling()
CAP = Scaling(temperature=0.9, logit_scale=0.5, softcap=200.0)


def problem(v: int, dtype: torch.dtype, scaling: Scaling = PLAIN):
    """(logits [N, V], labels [N]): each label leads by one of GAPS; labels are at both ends and in between."""
    n = len(GAPS)
    labels = torch.randint(0, v, (n,), device=DEVICE)
    labels[1], labels[3], labels[5] = 0, v - 1, min(1, v - 1)
    z = torch.randn(n, v, device=DEVICE, dtype=torch.float64) * 2 - 8
    top = z.scatter(1, labels[:, None], -torch.inf).amax(1)
    z.scatter_(1, labels[:, None], (top.clamp(min=-99) + torch.tensor(GAPS, device=DEVICE).double())[:, None])
    z = z * scaling.temperature
    if scaling.softcap is not None:
        z = scaling.softcap * torch.atanh(z / scaling.softcap)
    return (z / scaling.logit_scale).to(dtype), labels


def truth(logits, labels, scaling: Scaling = PLAIN):
    """(log-probs [N], their gradient [N, V]) in float64."""
    x = logits.double().requires_grad_()
    z = scaling.apply(x)
    apart = z - z.gather(1, labels[:, None])
    logps = -torch.log1p(apart.exp().scatter(1, labels[:, None], 0.0).sum(1))
    (grad,) = torch.autograd.grad(logps.sum(), x)
    return logps.detach(), grad


def assert_relative(name, ours, exact, dtype, slack: float = 1.0):
    """The relative error is what rounding the logits' differences (up to some 80 nats) causes, and a few units more.

    slack: a factor on the bound, for values rounded to fewer digits or summed over more terms.
    """
    info = torch.finfo(dtype)
    bound = (slack * 200 * info.eps) * exact.abs() + info.smallest_normal
    error = (ours.double() - exact).abs()
    worst = (error / bound).argmax()
    assert (error <= bound).all(), f"{name}: {ours.flatten()[worst]}, expected {exact.flatten()[worst]}"


def at(values, labels):
    return values.gather(-1, labels[:, None]).squeeze(-1)


def check(name, logps, grad, logits, labels, scaling=PLAIN):
    """Log-probs and their gradient against the truth, the gradient in its own dtype."""
    exact, exact_grad = truth(logits, labels, scaling)
    wide = stats_dtype(logits.dtype)
    slack = 1.0 if scaling.softcap is None else 10.0  # the rounding of tanh is multiplied by the cap
    if logps is not None:
        assert_relative(name, logps, exact, wide, slack)
        theirs = at(scaling.apply(logits.to(wide)).log_softmax(-1), labels)
        # A scaled logit is a rounded product; half a unit of each logit changes the log-prob by this much.
        size = logits.double().abs() + logits.double().gather(1, labels[:, None]).abs()
        of_products = 0.0 if scaling == PLAIN or scaling.softcap else (exact_grad.abs() * size).nan_to_num().sum(1) / 2
        rounding = torch.finfo(wide).eps * (4 * slack * exact.abs() + of_products)
        allowed = (theirs - exact).abs() + rounding + torch.finfo(wide).smallest_normal
        share = ((logps - exact).abs() / allowed).max().item()
        assert_below(share, 1.0, f"{name}: log_softmax is better, its error and a rounding are 1/{share:.2f} of ours")
    if grad is not None:
        assert_relative(f"{name}, label's gradient", at(grad, labels), at(exact_grad, labels), grad.dtype, 2 * slack)
        assert_relative(f"{name}, gradient", grad, exact_grad, grad.dtype, 2 * slack)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scaling", [Scaling(), Scaling(temperature=0.7), CAP], ids=["plain", "temperature", "softcap"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_logits(backend, scaling, dtype, seed):
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("only the reference backend takes float64")
    for v in (2, 9, 300, 2061):
        logits, labels = problem(v, dtype, scaling)
        x = logits.clone().requires_grad_()
        out = fused_po.logps_from_logits(x, labels, **scaling._asdict(), backend=backend)
        (grad,) = torch.autograd.grad(out.logps.sum(), x)
        check(f"V={v}", out.logps.detach(), grad, logits, labels, scaling)
        basis = torch.empty_like(logits)[None]
        inner = None if scaling.softcap is None else scaling.logit_scale / scaling.softcap
        outer = (scaling.softcap or scaling.logit_scale) / scaling.temperature
        backends.get(backend).score(logits[None], labels, outer, inner, IGNORE, 1, basis)
        check(f"basis, V={v}", None, basis[0], logits, labels, scaling)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_label_anywhere_in_a_row(backend, seed):
    """Labels before and after 16-byte boundaries, in a full block and in the last block; all outputs."""
    whole = torch.randn(9, 531, device=DEVICE)
    for begin, column in [(0, 0), (0, 255), (0, 256), (0, 530), (1, 0), (1, 2), (1, 3), (3, 300), (3, 526), (3, 527)]:
        logits = whole[:, begin:]
        labels = torch.full((9,), column, device=DEVICE)
        logits[:8, column] = 20.0
        logits[6, max(0, column - 2)] = logits[7, min(column + 3, logits.shape[1] - 1)] = 20.0  # ties
        logits[8, column] = -torch.inf
        outputs = fused_po.TokenStats._fields
        out = fused_po.logps_from_logits(logits, labels, outputs=outputs, backend=backend)
        exact = logits.double()
        logp = exact.log_softmax(-1)
        assert torch.equal(out.is_top1, logits.argmax(-1) == labels), (begin, column)
        assert_relative("logps", out.logps[:8], truth(logits, labels)[0][:8], torch.float32)
        assert out.logps[8] == -torch.inf
        values = {
            "entropy": -(logp.exp() * logp.clamp(min=-1e4)).sum(-1),
            "lse": exact.logsumexp(-1),
            "log_sum_sq_probs": (2 * logp).logsumexp(-1),
            "mean_logits": exact.mean(-1),
        }
        for name, value in values.items():
            torch.testing.assert_close(getattr(out, name).double(), value, rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_entropy_of_confident_rows(backend, seed):
    """The entropy keeps its relative precision too: without the label's term its two parts are positive."""
    logits, labels = problem(300, torch.float32)
    apart = (logits.double() - at(logits.double(), labels)[:, None]).scatter(1, labels[:, None], -torch.inf)
    others = apart.exp()
    weighed = (others * apart.clamp(min=-1e4)).sum(1)
    exact = others.sum(1).log1p() - weighed / (1 + others.sum(1))
    out = fused_po.logps_from_logits(logits, labels, outputs=("entropy",), backend=backend)
    assert_relative("entropy", out.entropy, exact, torch.float32, 2.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_vocabulary_of_one_token(backend):
    for logits in (torch.tensor([[3.0]]), torch.tensor([[7.0, -torch.inf, -torch.inf]])):
        x = logits.to(DEVICE).requires_grad_()
        outputs = ("logps", "entropy", "is_top1")
        out = fused_po.logps_from_logits(
            x, torch.zeros(1, dtype=torch.long, device=DEVICE), outputs=outputs, backend=backend
        )
        (out.logps + out.entropy).sum().backward()
        assert out.logps.item() == 0 and out.entropy.item() == 0 and out.is_top1.item()
        assert not torch.signbit(out.logps).any() and (x.grad == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_heads(backend, seed):
    """`linear_logps` with its basis kept in fp32, kept in bf16 or recomputed. hidden is the identity: exact logits."""
    for dtype in (torch.float32, torch.bfloat16):
        logits, labels = problem(300, dtype)
        for share in (0.0, 1.0):
            weight = logits.T.contiguous().requires_grad_()
            hidden = torch.eye(len(labels), device=DEVICE, dtype=dtype).requires_grad_()
            schedule = fused_po.Schedule(logits_budget=int(share * 1e9), logits_dtype=dtype)
            out = fused_po.linear_logps(hidden, weight, labels, schedule=schedule, backend=backend)
            (grad,) = torch.autograd.grad(out.logps.sum(), weight)
            check(f"{dtype}, {share}", out.logps.detach(), grad.T, logits, labels)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dpo(backend, seed):
    logits, labels = problem(40, torch.float32)
    x = logits.clone().view(2, -1, 40).requires_grad_()
    ref = torch.zeros(2, device=DEVICE)
    out = fused_po.dpo_from_logits(x, labels.view(2, -1), ref_logps=ref, backend=backend)
    tokens = out.chosen_logps.sum() + out.rejected_logps.sum()
    (grad,) = torch.autograd.grad(tokens, x)
    check("dpo", None, grad.view(-1, 40), logits, labels)
    out = fused_po.dpo_from_logits(logits.view(2, -1, 40), labels.view(2, -1), x.detach(), kl="k1", backend=backend)
    assert (out.kl_per_token == 0).all() and (out.margins == 0).all()
    out = fused_po.dpo_from_logits(
        logits.view(2, -1, 40), labels.view(2, -1), ref_logps=x.detach()[..., 0] * 0, kl="k1", backend=backend
    )
    check("dpo's log-probs", out.kl_per_token.flatten(), None, logits, labels)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("inplace", [False, True])
def test_policy(backend, inplace, seed):
    logits, labels = problem(40, torch.float32)
    x = logits.clone()[None].requires_grad_()
    loss_x = x * 1.0 if inplace else x
    how = {"loss_type": "sft", "weights": torch.ones_like(labels[None], dtype=torch.float32)}
    out = fused_po.policy_loss_from_logits(loss_x, labels[None], None, **how, inplace_backward=inplace, backend=backend)
    (grad,) = torch.autograd.grad(out.loss, x)
    check("policy", out.logps[0], -grad[0], logits, labels)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("direction", ["reverse", "forward", "js"])
def test_kl(backend, direction, seed):
    """Log-probs and their gradients; for equal rows the KL and its gradient are exactly 0."""
    for v in (9, 2061):
        logits, labels = problem(v, torch.float32)
        other = problem(v, torch.float32)[0] + 1
        x = logits.clone().requires_grad_()
        out = fused_po.kl_from_logits(x, other, labels, direction=direction, backend=backend)
        (grad,) = torch.autograd.grad(out.logps.sum(), x)
        check("kl's log-probs", out.logps.detach(), grad, logits, labels)
        exact = other.double().log_softmax(-1)
        torch.testing.assert_close(out.ref_logps.double(), at(exact, labels), rtol=1e-5, atol=1e-7)
        x = logits.clone().requires_grad_()
        out = fused_po.kl_from_logits(x, logits, labels, direction=direction, backend=backend)
        (grad,) = torch.autograd.grad(out.kl.sum(), x)
        assert (out.kl == 0).all() and (grad == 0).all() and torch.equal(out.logps, out.ref_logps)


@pytest.mark.parametrize("backend", BACKENDS)
def test_kl_of_two_confident_rows(backend, seed):
    """Policy and reference both give the label a probability near 1: the KL is far below the rounding of 1."""
    logits, labels = problem(300, torch.float32)
    ref = logits.clone().scatter_add_(1, labels[:, None], torch.full_like(labels[:, None], 2.0, dtype=torch.float32))
    out = fused_po.kl_from_logits(logits, ref, labels, backend=backend)
    p, q = (torch.cat([truth(x, labels)[0][:, None], x.double().log_softmax(-1)], 1) for x in (logits, ref))
    for log in (p, q):
        log.scatter_(1, 1 + labels[:, None], -torch.inf)  # the label's term, which is exact, comes first
    exact = (p.exp() * (p - q).nan_to_num(nan=0.0)).sum(1)
    assert_relative("kl", out.kl[4:], exact[4:], torch.float32, 20.0)


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU splits rows anyway")
def test_split_rows(monkeypatch, seed):
    kernels = importlib.import_module("fused_po.kernels.triton.statistics")
    monkeypatch.setattr(kernels, "multiprocessors", lambda device: 1000)
    shape = {"BLOCK": 256, "GROUP": 4, "num_warps": 1}
    monkeypatch.setattr(kernels, "launch_shape", lambda *_: shape)
    logits, labels = problem(1503, torch.float32)
    assert kernels.row_parts(len(labels), 1503, 256, 1000)[0] == 6
    logits[2, labels[2] - 1 if labels[2] else 1] = logits[2, labels[2]]
    out = fused_po.logps_from_logits(logits, labels, outputs=("logps", "is_top1"), backend="triton")
    check("parts", out.logps, None, logits, labels)
    assert torch.equal(out.is_top1, logits.argmax(-1) == labels)


class Ranks:
    """A backend that splits the columns into parts and runs them one after another in this process."""

    def __init__(self, backend: str, sizes: tuple[int, ...]) -> None:
        self.run, self.sizes = backends.get(backend), sizes
        self.starts = [sum(sizes[:i]) for i in range(len(sizes))]

    def score(self, logits, labels, outputs):
        """`merge_scores` of the parts."""
        owner = torch.bucketize(labels, torch.tensor(self.sizes, device=DEVICE).cumsum(0), right=True)
        parts = []
        for rank, (begin, size) in enumerate(zip(self.starts, self.sizes)):
            here = torch.where(owner == rank, labels - begin, 0)
            parts.append(
                SplitRows.record(
                    self, logits[None, :, begin : begin + size], here, interface.Scaling(), Outputs.of(outputs)
                )
            )
        return self.run.merge_scores(torch.stack(parts), owner, logits.shape[1], outputs)

    def kl(self, logits, ref_logits, labels, direction):
        """`merge_kl` of the parts."""
        owner = torch.bucketize(labels, torch.tensor(self.sizes, device=DEVICE).cumsum(0), right=True)
        parts = []
        for rank, (begin, size) in enumerate(zip(self.starts, self.sizes)):
            here, columns = torch.where(owner == rank, labels - begin, 0), slice(begin, begin + size)
            both = logits[None, :, columns], ref_logits[None, :, columns]
            parts.append(self.run.kl(*both, here, (1.0, None), (1.0, None), direction, True)[KL_RECORD])
        return self.run.merge_kl(torch.stack(parts), owner, direction)


@pytest.mark.parametrize("backend", BACKENDS)
def test_vocabulary_over_ranks(backend, seed):
    for v, sizes in ((9, (2, 4, 3)), (300, (100, 1, 199))):
        logits, labels = problem(v, torch.float32)
        ranks = Ranks(backend, sizes)
        logps, *_, saved = ranks.score(logits, labels, 1)
        grad = torch.empty_like(logits)
        for begin, size in zip(ranks.starts, sizes):
            columns = logits[None, :, begin : begin + size].contiguous()
            out = torch.empty_like(columns)
            ranks.run.gradient(columns, labels, saved, logps[:0], None, None, None, 1.0, None, out, begin)
            grad[:, begin : begin + size] = out[0]
        check(f"{sizes}", logps, grad, logits, labels)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("apart", [60.0, 88.0, 100.0, 1e3, 1e4])
def test_a_label_far_below_another_ranks_best(backend, apart):
    """Nothing overflows when ranks are merged: log-probs, entropy, KL and gradients match the unsplit vocabulary."""
    logits = torch.tensor([[apart, apart - 1, 0.0, 1.0], [0.0, 1.0, apart, apart - 1]], device=DEVICE)
    logits = logits.repeat_interleave(4, 0)
    labels = torch.arange(4, device=DEVICE).repeat(2)
    ranks, outputs = Ranks(backend, (2, 2)), 1 | 2 | 4 | 32
    logps, entropy, lse, aux, _ = ranks.score(logits, labels, outputs)
    whole = fused_po.logps_from_logits(
        logits.double(), labels, outputs=("logps", "entropy", "lse", "log_sum_sq_probs"), backend="reference"
    )
    found = {"logps": logps, "entropy": entropy, "lse": lse, "log_sum_sq_probs": aux[2]}
    for name, value in found.items():
        torch.testing.assert_close(value.double(), getattr(whole, name), rtol=1e-6, atol=1e-6)
    for direction in ("reverse", "forward"):
        tokens = ranks.kl(logits, logits / 2, labels, direction)
        one = fused_po.kl_from_logits(logits.double(), logits.double() / 2, labels, direction=direction)
        for row, value in zip((0, 1, 2, 3), (one.kl, one.logps, one.ref_logps, one.entropy)):
            torch.testing.assert_close(tokens[row].double(), value, rtol=2e-6, atol=1e-6)
