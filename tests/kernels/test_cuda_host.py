"""The CUDA kernels' arithmetic on the host: rows reduced in the kernels' order, losses, the layout of structures."""

import contextlib
import ctypes
import importlib
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from evidence import tools
from numerics import DEVICE, IGNORE, Scaling, assert_close, oracle, plain, random_labels
from policy_problems import LOSSES, given, problem
from repository import ROOT, SUPPORT

import fused_po
from fused_po import selfcheck
from fused_po.backend.interface import Form, TokenInputs
from fused_po.reference.policy import token_terms

cuda = importlib.import_module("fused_po.kernels.cuda")


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """The library compiled from tests/support/cuda_host.cpp."""
    missing = [tool for tool in ("c++", "ninja") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"needs {' and '.join(missing)} to compile kernels/cuda/row.h for the host")
    from torch.utils import cpp_extension

    folder = tmp_path_factory.mktemp("cuda_host")
    how = {"extra_include_paths": [str(ROOT / "kernels" / "cuda")], "extra_cflags": ["-O2"]}
    source = str(SUPPORT / "cuda_host.cpp")
    cpp_extension.load("cuda_host", [source], build_directory=str(folder), is_python_module=False, **how)
    (built,) = folder.glob("*.so")  # PyTorch appends a number to the name if this process has already built it
    return ctypes.CDLL(str(built))


def pointer(tensor):
    return ctypes.c_void_p(tensor.data_ptr())


def score(host, x, labels, g, itemsize=2, before=0, blocks=1, outer=1.0):
    """(logps, entropy, lse, gradient, number of reads of each column) of rows x [N, V] in fp32."""
    rows, n_cols = x.shape
    results, grad = torch.full((rows, 3), torch.nan), torch.full_like(x, torch.nan)
    visited = torch.zeros(x.shape, dtype=torch.int32)
    sizes = ctypes.c_int64(rows), ctypes.c_int64(n_cols), itemsize, before, blocks, ctypes.c_float(outer)
    host.host_rows(pointer(x), pointer(labels), *sizes, *map(pointer, (g, results, grad, visited)))
    return results[:, 0], results[:, 1], results[:, 2] * math.log(2), grad, visited


NAMES = ("logps", "entropy", "lse")


@pytest.mark.parametrize("v", (2, 3, 17, 511, 4099, 50257))
@pytest.mark.parametrize("itemsize, before, blocks", ((2, 0, 1), (2, 3, 16), (4, 1, 4), (2, 7, 2), (4, 3, 8)))
@pytest.mark.parametrize("hidden", (False, True))
def test_rows_against_float64(host, v, itemsize, before, blocks, hidden, seed):
    rows, n = 64, 4 if v > 5000 else 32  # plain PyTorch's errors are taken over all rows
    x = torch.randn(rows, v) * 4
    labels = random_labels(rows, v, "none").cpu()
    if hidden:
        masked = torch.rand(rows, v) < 0.5
        masked[0] = True
        masked[1, : v - 2] = True
        x = x.masked_fill(masked.scatter(1, labels[:, None], False), -torch.inf)
    g = torch.randint(0, 2, (rows, 3)) * 2.0 - 1
    scaling = Scaling(temperature=0.7)
    *stats, grad, visited = score(host, x[:n].clone(), labels[:n], g[:n].clone(), itemsize, before, blocks, 1 / 0.7)
    assert (visited == 1).all()
    grads = {name: g[:, i] for i, name in enumerate(NAMES)}
    exact, exact_grad = oracle(x, labels, scaling, grads)
    leaf = x.clone().requires_grad_()
    theirs = plain(leaf, labels, scaling)
    sum((theirs[name] * g).sum() for name, g in grads.items()).backward()
    for name, ours in zip(NAMES, stats):
        assert_close(name, ours, exact[name][:n], [(theirs[name].detach(), exact[name])])
    plain_grad = leaf.grad.masked_fill(x == -torch.inf, 0)
    assert_close("gradient", grad, exact_grad[:n], [(plain_grad, exact_grad)])


def test_nan_and_infinity_stay_in_their_row(host):
    x = torch.zeros(4, 100)
    x[0, 5], x[1, 99], x[2] = torch.nan, torch.inf, -torch.inf
    logps, entropy, _, _, _ = score(host, x, torch.zeros(4, dtype=torch.long), torch.ones(4, 3), 2, 0, 2)
    assert logps[:3].isnan().all() and entropy[:3].isnan().all()
    torch.testing.assert_close(logps[3], torch.tensor(-math.log(100)))
    assert host.host_live(ctypes.c_float(math.inf), ctypes.c_float(1.0)) == 0
    assert host.host_live(ctypes.c_float(1.0), ctypes.c_float(0.0)) == 0
    assert host.host_live(ctypes.c_float(1.0), ctypes.c_float(0.5)) == 1


FORMS = [
    Form("clip", 0.8, 1.2),
    Form("clip", 0.8, 1.2, 1.1),  # a dual clip below the clip range
    Form("clip", 0.8, 1.28, 2.0, "k3", 0.3, True, 0.1),
    Form("weight", 0.0, 2.0, kl="k2", kl_coef=0.3, kl_times_ratio=False),
    Form("weight", 1.0, 1.0, entropy_coef=0.2),
    Form("gate", 1.0, 1.05, kl="k2", kl_coef=0.3),
]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form.kind}-{form.kl}")
@pytest.mark.parametrize("with_old", (True, False))
def test_losses_against_float64(host, form, with_old, seed):
    """Against the reference backend in float64, which other tests check; its own fp32 error bounds ours."""
    n = 4000
    logps = -3 * torch.rand(n)
    ratio = torch.tensor([0.3, 0.9, 1.1, 1.5, 3.0, 1e-12, 1e12])[torch.randint(0, 7, (n,))] * (1 + 0.01 * torch.rand(n))
    entropy, a, weights = torch.rand(n), torch.randn(n), torch.rand(n)
    a[:9] = 0
    ref = logps + torch.where(torch.rand(n) < 0.1, 40.0, 0.5) * torch.randn(n)
    given = TokenInputs(a, weights, (logps - ratio.log()) if with_old else None, ref if form.kl else None)
    p = cuda.Problem()
    for name, value in given._asdict().items():
        setattr(p, name, None if value is None else value.data_ptr())
    for name in ("low", "high", "bound", "kl_coef", "entropy_coef", "kl_times_ratio"):
        setattr(p, name, getattr(form, name))
    p.kind, p.estimator = cuda.KINDS[form.kind], cuda.ESTIMATORS[form.kl]
    ours = torch.full((5, n), torch.nan)
    host.host_terms(ctypes.byref(p), pointer(logps), pointer(entropy), ctypes.c_int64(n), pointer(ours))
    doubles = TokenInputs(*(None if v is None else v.double() for v in given))
    exact = token_terms(logps.double(), entropy.double(), doubles, form)
    theirs = token_terms(logps, entropy, given, form)
    for name, mine, truth, plain_value in zip(("loss", "kl", "ratio", "clipped", "slope"), ours, exact, theirs):
        unit = (1 + truth.abs()).log2().round().exp2()
        assert_close(name, mine / unit.float(), truth / unit, [(plain_value / unit.float(), truth / unit)])


def test_the_structure_matches_the_header(host):
    expected = [getattr(cuda.Problem, name).offset for name, _ in cuda.Problem._fields_]
    found = (ctypes.c_int64 * (len(expected) + 1))()
    host.host_offsets(found)
    assert list(found) == [*expected, ctypes.sizeof(cuda.Problem)]


# From the public functions to the launchers, which the host library implements too.


@pytest.fixture
def gpu(host, monkeypatch):
    """gpu(major, on_chip): the host acts as a GPU of this generation and shared memory; a real GPU is used as it is."""
    if DEVICE == "cuda":
        return lambda major, on_chip=0: None

    def pretend(major: int, on_chip: int = 233472) -> None:
        about = SimpleNamespace(major=major, shared_memory_per_multiprocessor=on_chip)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: about)

    monkeypatch.setattr(cuda.build, "library", lambda: host)
    monkeypatch.setattr(cuda, "unsupported", lambda device, dtype: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    return pretend


def close(ours, theirs):
    """Equal up to rounding: bf16 gradients up to a unit in the last place, since sums are in another order."""
    for a, b in zip(ours, theirs, strict=True):
        bounds = {"rtol": 2**-7, "atol": 1e-6} if a.dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 2e-6}
        torch.testing.assert_close(a, b, **bounds)


@pytest.mark.parametrize("name", ("ppo, dual clip", "cispo", "sapo", "sft"))
@pytest.mark.parametrize(
    "major, on_chip, dtype", ((9, 233472, torch.bfloat16), (9, 5000, torch.float32), (8, 1, torch.float32))
)
def test_policy_loss_from_logits(gpu, host, name, major, on_chip, dtype, seed, poison):
    gpu(major, on_chip)
    t = problem(dtype, 3, 4, 333, LOSSES[name][0], "k3")
    how = {"loss_type": LOSSES[name][0], **LOSSES[name][1], "kl": "k3", "kl_coef": 0.3, "entropy_coef": 0.1}
    found = []
    for backend, inplace in (("reference", False), ("cuda", False), ("cuda", True)):
        x = torch.cat([t["logits"]] * 2, 1).requires_grad_()
        before = host.host_one_reads()
        out = fused_po.policy_loss_from_logits(
            (x * 1)[:, 4:], *given(t), **how, inplace_backward=inplace, backend=backend
        )
        (out.loss * 2).backward()
        found.append((*(v.detach() for v in out if v is not None), x.grad))
        assert DEVICE == "cuda" or host.host_one_reads() - before == (inplace and major == 9)
    for ours in found[1:]:
        close(ours, found[0])


@pytest.mark.parametrize("major", (8, 9))
@pytest.mark.parametrize("inplace", (False, True))
def test_logps_from_logits(gpu, major, inplace, seed, poison):
    gpu(major)
    names, labels = ("logps", "entropy", "lse"), random_labels(12, 333).view(3, 4)
    base = torch.randn(3, 5, 333, device=DEVICE)
    found = []
    for backend in ("reference", "cuda"):
        x = base.clone().requires_grad_()
        how = {"outputs": names, "temperature": 0.7, "inplace_backward": inplace, "backend": backend}
        stats = fused_po.logps_from_logits((x * 1)[:, 1:], labels, **how)
        (stats.logps.sum() - stats.entropy.square().sum() + 0.1 * stats.lse.sum()).backward()
        found.append((*(v.detach() for v in stats[:3]), x.grad))
    close(found[1], found[0])
    assert (found[1][0][labels == IGNORE] == 0).all()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("frozen", (False, True))
@pytest.mark.parametrize("major", (8, 9))
def test_linear_logps(gpu, host, dtype, frozen, major, seed, poison):
    gpu(major)
    hidden, head = (torch.randn(n, 16, device=DEVICE).to(dtype) for n in (9, 333))
    labels = random_labels(9, 333)
    found = []
    for backend in ("reference", "cuda"):
        h, w = hidden.clone().requires_grad_(), head.clone().requires_grad_(not frozen)
        before = host.host_one_reads()
        logps = fused_po.linear_logps(h, w, labels, backend=backend).logps
        (logps * torch.linspace(-1, 1, 9, device=DEVICE)).sum().backward()
        found.append((logps.detach(), h.grad, *([] if frozen else [w.grad])))
    assert DEVICE == "cuda" or (host.host_one_reads() > before) == (major == 9)
    close(found[1], found[0])


@pytest.mark.parametrize("v", (2, 9, 4099))
def test_sure_labels_to_relative_precision(host, v, seed):
    """The sum leaves out the label, so log-prob and gradient are right far below the rounding of 1."""
    gaps = torch.tensor([0.0, 0.5, 3.0, 10.0, 20.0, 40.0, 70.0])
    n = len(gaps)
    labels = torch.randint(0, v, (n,))
    labels[0], labels[2] = 0, v - 1
    x = torch.randn(n, v)
    top = x.scatter(1, labels[:, None], -torch.inf).amax(1)
    x.scatter_(1, labels[:, None], (top + gaps)[:, None])
    g = torch.tensor([[1.0, 0.0, 0.0]]).repeat(n, 1)
    for itemsize, before, blocks in ((2, 3, 1), (4, 1, 4)):
        logps, entropy, _, grad, visited = score(host, x.clone(), labels, g, itemsize, before, blocks)
        leaf = x.double().requires_grad_()
        apart = (leaf - leaf.gather(1, labels[:, None])).scatter(1, labels[:, None], -torch.inf)
        others = apart.exp()
        exact = -others.sum(1).log1p()
        (exact_grad,) = torch.autograd.grad(exact.sum(), leaf, retain_graph=True)
        exact_entropy = -exact - (others * apart.clamp(min=-1e4)).sum(1) / (1 + others.sum(1))
        assert (visited == 1).all()
        for ours, truth in ((logps, exact), (grad, exact_grad), (entropy, exact_entropy)):
            torch.testing.assert_close(ours.double(), truth.detach(), rtol=5e-5, atol=1e-37)


def test_estimates_and_terms_of_infinities(host):
    """Forbidden tokens: k3 is inf at both ends; terms with a coefficient or an advantage of 0 add 0."""
    logps = torch.tensor([-math.inf, -1.0, -math.inf, -1.0])
    a, one = torch.tensor([0.0, 0.0, 1.0, 1.0]), torch.ones(4)
    ref, entropy = torch.tensor([-1.0, -math.inf, -1.0, -1.0]), torch.zeros(4)
    for kind in ("clip", "weight", "gate"):
        p = cuda.Problem()
        given = {"advantages": a, "weights": one, "old_logps": one * -2, "ref_logps": ref}
        for name, value in given.items():
            setattr(p, name, value.data_ptr())
        p.low, p.high, p.bound, p.kl_coef, p.kl_times_ratio = 0.5, 2.0, math.inf, 0.0, 0
        p.kind, p.estimator = cuda.KINDS[kind], cuda.ESTIMATORS["k3"]
        ours = torch.full((5, 4), torch.nan)
        host.host_terms(ctypes.byref(p), *map(pointer, (logps, entropy)), ctypes.c_int64(4), pointer(ours))
        assert ours[1].tolist()[:3] == [math.inf, math.inf, math.inf] and ours[1, 3] == 0
        assert ours[0, :2].isfinite().all() and ours[4].isfinite().all()


@pytest.mark.parametrize("name", tools.SERVED)
def test_the_cuda_backend_passes_its_selfcheck(gpu, name):
    """Runs the kernels' arithmetic on the host, or the kernels themselves on a GPU."""
    gpu(9)
    (check,) = (c for c in selfcheck.checks("cuda") if c.name == name)
    values = selfcheck.problem(selfcheck.Size(64, 37, 8), torch.float32, DEVICE, 1)
    assert selfcheck.compare(check, values, "fp32").share <= 2
