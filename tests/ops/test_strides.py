"""Every tensor argument of every op, in every layout: results and gradients are bitwise those of a contiguous copy.

Forms named "all rows" ignore no label: picking scored rows copies them, which would hide the layout.
"""

import contextlib
import inspect

import pytest
import torch
from numerics import BACKENDS, DEVICE

import fused_po
from fused_po import Schedule, kernels
from fused_po.backend import choose as backends

B, T, V, H = 4, 3, 5, 4
N = B * T
GEMM = ("hidden", "weight", "ref_hidden", "ref_weight", "u", "low")  # their strides may change the order of a sum


def step(value: torch.Tensor) -> torch.Tensor:
    """Every second element of a wider tensor; flattening keeps the stride."""
    return torch.stack([value, torch.full_like(value, 3)], -1).flatten(-2)[..., ::2]


def offset(value: torch.Tensor) -> torch.Tensor:
    """Contiguous, starting at the third element of its storage."""
    wide = torch.cat([value.new_full((3,), 2), value.flatten()])
    return wide[3:].view(value.shape)


def turned(value: torch.Tensor) -> torch.Tensor:
    """Stored with the dimensions in reverse order."""
    order = list(reversed(range(value.ndim)))
    return value.permute(order).contiguous().permute(order)


def column(value: torch.Tensor) -> torch.Tensor:
    """One column of a tensor with one more dimension at the end, like Y[..., d]."""
    return torch.stack([torch.zeros_like(value), value, torch.ones_like(value)], -1)[..., 1]


def expanded(value: torch.Tensor) -> torch.Tensor:
    """The first row for all rows: stride 0. The values differ from `value`."""
    return value[:1].expand(value.shape)


LAYOUTS = {layout.__name__: layout for layout in (step, offset, turned, column, expanded)}


def whole(*shape: int) -> torch.Tensor:
    """Small integers, whose products and sums are exact."""
    return torch.randint(-2, 3, shape, device=DEVICE).float()


def problem() -> dict[str, torch.Tensor]:
    normal = {"old_logps": (B, T), "ref_logps": (B, T), "advantages": (B, T), "rewards": (B, T), "values": (B, T)}
    t = {name: torch.randn(shape, device=DEVICE) for name, shape in normal.items()}
    t |= {"last_values": torch.randn(B, device=DEVICE), "ref_sums": torch.randn(B, device=DEVICE)}
    t |= {"logits": torch.randn(B, T, V, device=DEVICE), "ref_logits": torch.randn(B, T, V, device=DEVICE)}
    t |= {"hidden": whole(B, T, H), "weight": whole(V, H), "ref_hidden": whole(B, T, H), "ref_weight": whole(V, H)}
    t |= {"bias": torch.randn(V, device=DEVICE), "ref_bias": torch.randn(V, device=DEVICE), "u": whole(B, T, 2)}
    t |= {"low": whole(V, 2), "weights": torch.rand(B, T, device=DEVICE), "g": torch.randn(B, T, device=DEVICE)}
    t["labels"] = torch.randint(0, V, (B, T), device=DEVICE)
    t["some_labels"] = t["labels"].masked_fill(torch.arange(N, device=DEVICE).view(B, T) % 3 == 1, -100)
    t["mask"] = torch.arange(N, device=DEVICE).view(B, T) % 4 != 2
    t["groups"] = torch.arange(B, device=DEVICE)[:, None].expand(B, T).contiguous()
    t["cu_seqlens"] = torch.tensor([0, 2, 2, 7, N], device=DEVICE)
    return t


ALL = ("logps", "entropy", "lse", "mean_logits", "is_top1", "log_sum_sq_probs")
SCHEDULES = {
    "kept": Schedule(),
    "recomputed": Schedule(logits_budget=0),
    "in tiles": Schedule(tile_bytes=V * 4 * 5),
    "all rows": Schedule(compact=False),
    "bounded": Schedule(num_scored=N),
}


def linear(hidden, weight, labels, bias, u, low, *, schedule, **on):
    how = {"outputs": ALL, "low_rank": (u, low), "schedule": SCHEDULES[schedule]}
    return fused_po.linear_logps(hidden, weight, labels, bias, **how, **on)


def frozen(hidden, weight, labels, **on):
    return fused_po.linear_logps(hidden, weight.detach(), labels, outputs=("logps", "lse"), **on)


def kl(logits, ref_logits, labels, mask, **on):
    return fused_po.kl_from_logits(logits * 1.0, ref_logits, labels, mask, **on)


def kl_of_heads(hidden, weight, ref_hidden, ref_weight, labels, bias, ref_bias, *, schedule="kept", **on):
    how = {"bias": bias, "ref_bias": ref_bias, "schedule": SCHEDULES[schedule]}
    return fused_po.linear_kl(hidden, weight, ref_hidden, ref_weight, labels, **how, **on)


def dpo(logits, labels, ref_logits, **on):
    return fused_po.dpo_from_logits(logits, labels, ref_logits, kl="k3", kl_coef=0.3, **on)


def dpo_of_logps(logits, labels, ref_logps, **on):
    return fused_po.dpo_from_logits(logits, labels, ref_logps=ref_logps, kl="k2", kl_coef=0.3, **on)


def dpo_of_sums(logits, labels, ref_sums, **on):
    return fused_po.dpo_from_logits(logits, labels, ref_logps=ref_sums, **on)


def dpo_of_heads(hidden, weight, labels, ref_hidden, ref_weight, bias, ref_bias, *, estimator, **on):
    how = {"bias": bias, "ref_bias": ref_bias, "kl": estimator, "kl_coef": 0.2}
    return fused_po.linear_dpo(hidden, weight, labels, ref_hidden, ref_weight, **how, **on)


def dpo_of_head(hidden, weight, labels, ref_logps, **on):
    return fused_po.linear_dpo(hidden, weight, labels, ref_logps=ref_logps, kl="k1", kl_coef=0.2, **on)


def policy(logits, labels, advantages, old_logps, ref_logps, mask, weights, *, loss_type, inplace=False, **on):
    old_logps = None if loss_type == "reinforce" else old_logps
    ref, kl_form = (None, {}) if loss_type == "reinforce" else (ref_logps, {"kl": "k3", "kl_coef": 0.1})
    how = {"loss_type": loss_type, "weights": weights, "entropy_coef": 0.05, "inplace_backward": inplace, **kl_form}
    return fused_po.policy_loss_from_logits(logits * 1.0, labels, advantages, old_logps, ref, mask, **how, **on)


def chunked(hidden, weight, labels, groups, bias, g, **on):
    share = lambda stats, rows: (stats.logps * g.detach().reshape(-1)[rows]).sum()  # noqa: E731
    return (fused_po.chunked_loss(share, hidden, weight, labels, groups, bias, **on),)


def gae(rewards, values, mask, last_values, **on):
    return fused_po.gae(rewards, values, mask, last_values, **on)


def packed(old_logps, mask, cu_seqlens, *, backend):
    logps, mask = old_logps.reshape(N), mask.reshape(N)
    sums = fused_po.sequence_logps(logps, mask, cu_seqlens, ld_alpha=0.4)
    loss = fused_po.aggregate(logps, mask, "seq-mean-token-mean", cu_seqlens=cu_seqlens)
    return sums, loss, fused_po.token_weights(mask, "seq-mean-token-sum", cu_seqlens=cu_seqlens)


def scores(logits, labels, **on):
    return fused_po.logps_from_logits(logits, labels, outputs=ALL, **on)


POLICIES = (("ppo", False), ("ppo", True), ("gspo", False), ("reinforce", True))  # (loss_type, in place)
FORMS = {
    "logps_from_logits": (scores, {}),
    **{f"linear_logps {name}": (linear, {"schedule": name}) for name in SCHEDULES},
    "linear_logps frozen": (frozen, {}),
    "linear_kl": (kl_of_heads, {}),
    "linear_kl recomputed": (kl_of_heads, {"schedule": "recomputed", "direction": "forward"}),
    "kl_from_logits": (kl, {}),
    "kl_from_logits js": (kl, {"direction": "js", "inplace_backward": True}),
    "dpo_from_logits": (dpo, {}),
    "dpo_from_logits logps": (dpo_of_logps, {}),
    "dpo_from_logits sums": (dpo_of_sums, {}),
    "linear_dpo": (dpo_of_head, {}),
    "linear_dpo k3": (dpo_of_heads, {"estimator": "k3"}),
    "linear_dpo full": (dpo_of_heads, {"estimator": "full"}),
    "chunked_loss": (chunked, {}),
    "gae": (gae, {}),
    "packed": (packed, {}),
    **{
        f"policy_loss_from_logits {name}{' in place' * inplace}": (policy, {"loss_type": name, "inplace": inplace})
        for name, inplace in POLICIES
    },
}
# Interpreted kernels take seconds: the ordinary tests run only these forms, with two layouts.
QUICK = ("linear_logps kept", "linear_logps all rows", "linear_dpo", "gae", "policy_loss_from_logits ppo in place")


def by_backend(forms):
    """(form, backend) pairs; interpreted forms are slow, except the quick ones."""
    for form in forms:
        for backend in BACKENDS:
            slow = backend == "triton" and form not in QUICK and DEVICE == "cpu"
            yield pytest.param(form, backend, marks=[pytest.mark.slow] * slow)


@contextlib.contextmanager
def require_contiguous():
    """Fail if a kernel is given a non-contiguous tensor that it would read as contiguous."""
    if DEVICE == "cuda":
        yield
        return
    from triton.runtime.interpreter import GridExecutor

    original, by_strides = GridExecutor.__call__, ("x_ptr", "ref_ptr", "out_ptr", "basis_ptr", "parts_ptr")

    def call(self, *arguments, **options):
        for name, value in zip(self.arg_names, arguments):
            if isinstance(value, torch.Tensor) and name not in by_strides[: 2 + 3 * ("stride" in str(self.arg_names))]:
                assert value.is_contiguous(), f"{self.fn.__name__}: {name} has strides {value.stride()}"
        return original(self, *arguments, **options)

    GridExecutor.__call__ = call
    try:
        yield
    finally:
        GridExecutor.__call__ = original


def results(form: str, t: dict[str, torch.Tensor], expand_grads: bool, backend: str) -> dict[str, torch.Tensor]:
    """All results of a form and its gradients by argument, as contiguous tensors."""
    call, how = FORMS[form]
    names = [name for name in inspect.signature(call).parameters if name in t]
    leaves = {name: t[name].detach() for name in names}
    for name, value in leaves.items():
        value.requires_grad_(value.is_floating_point() and name != "mask")
    with require_contiguous() if backend == "triton" else contextlib.nullcontext():
        out = call(**leaves, **how, backend=backend)
        out = out._asdict() if hasattr(out, "_asdict") else dict(enumerate(out))
        found = {str(key): value for key, value in out.items() if value is not None}
        with_grads = [value for value in found.values() if value.requires_grad]
        if with_grads:
            # The gradient of a sum is an expanded number: stride 0.
            sums = [v.sum() if expand_grads else (v * torch.ones_like(v)).sum() for v in with_grads]
            torch.stack([s.double() for s in sums]).sum().backward()
    found |= {f"grad {name}": value.grad for name, value in leaves.items() if value.grad is not None}
    return {key: value.detach().contiguous() for key, value in found.items()}


def reordered(name: str, backend: str | None) -> bool:
    """Whether the layout changes the order of sums: threads read aligned groups of 16 bytes, wherever a row starts."""
    kernels = backend == "triton" or (backend is None and DEVICE == "cuda")
    return kernels and name in ("logits", "ref_logits")


def assert_same(what: str, got: dict, expected: dict, order_may_change: bool) -> None:
    assert got.keys() == expected.keys()
    for key, value in got.items():
        if order_may_change and value.is_floating_point():  # sums of at most N products in another order
            atol = N * torch.finfo(value.dtype).eps * float(expected[key].abs().max())
            torch.testing.assert_close(value, expected[key], rtol=0, atol=atol, msg=f"{what}: {key}")
        else:
            assert torch.equal(value, expected[key]), f"{what}: {key} differs by {(value - expected[key]).abs().max()}"


@pytest.mark.parametrize("form, backend", list(by_backend(FORMS)))
def test_every_argument_in_every_layout(form, backend, seed):
    t = problem()
    layouts = LAYOUTS if backend == "reference" or DEVICE == "cuda" else {"step": step, "expanded": expanded}
    names = [name for name in inspect.signature(FORMS[form][0]).parameters if name in t]
    base = results(form, t, False, backend)
    assert_same("expanded gradients", results(form, t, True, backend), base, False)
    for name in names:
        for layout, change in layouts.items():
            if layout == "expanded" and name == "cu_seqlens":
                continue
            changed = change(t[name])
            expected = results(form, t | {name: changed.contiguous()}, False, backend) if layout == "expanded" else base
            found = results(form, t | {name: changed}, True, backend)
            assert_same(f"{name} {layout}", found, expected, name in GEMM or reordered(name, backend))


LABELLED = [
    form for form in FORMS if "labels" in inspect.signature(FORMS[form][0]).parameters and "bounded" not in form
]


@pytest.mark.parametrize("form, backend", list(by_backend(LABELLED)))
def test_labels_with_ignored_ones_and_of_every_dtype(form, backend, seed):
    t = problem()
    for which in ("labels", "some_labels"):
        base = results(form, t | {"labels": t[which]}, False, backend)
        for layout in ("step", "column", "turned"):
            changed = {"labels": LAYOUTS[layout](t[which])}
            assert_same(f"{which} {layout}", results(form, t | changed, True, backend), base, False)
        unsigned = () if which == "some_labels" else (torch.uint8, torch.uint16, torch.uint32)
        for dtype in (torch.int32, torch.int16, torch.int8, *unsigned):
            changed = {"labels": step(t[which].to(torch.int64)).to(dtype)}
            assert_same(f"{which} {dtype}", results(form, t | changed, True, backend), base, False)


@pytest.mark.parametrize("backend", ("reference", pytest.param("triton", marks=pytest.mark.slow)))
def test_masks_of_every_dtype(backend, seed):
    t = problem()
    for form in ("policy_loss_from_logits ppo", "kl_from_logits", "gae", "packed"):
        base = results(form, t, False, backend)
        for dtype in (torch.int64, torch.int32, torch.uint8, torch.float32, torch.bfloat16):
            changed = t | {"mask": step(t["mask"].to(dtype) * 2)}
            assert_same(f"{form} {dtype}", results(form, changed, True, backend), base, False)


def test_every_launcher_gets_contiguous_arguments(seed):
    """Launchers added later too: all tensor arguments become contiguous, except rows, which are known by name."""
    run, seen = kernels.load("triton"), []
    for function in run.__all__:
        if function == "unsupported":
            continue
        names = inspect.signature(getattr(run, function)).parameters
        given = dict.fromkeys(names, step(torch.zeros(2, 3, device=DEVICE)))
        rows = {name: torch.zeros(2, 3, 4, device=DEVICE)[:, :, 1:3] for name in names if name in backends.STRIDED}
        taken = {}
        spy = lambda *a, taken=taken, names=tuple(names): taken.update(zip(names, a))  # noqa: E731
        spy.__signature__ = inspect.Signature(list(names.values()))
        backends._launcher("triton", spy)(*(given | rows).values())
        for name, value in taken.items():
            if name in backends.STRIDED:
                assert value is rows[name], f"{function}: {name}"
            elif name not in backends.AS_THEY_ARE:
                assert value.is_contiguous(), f"{function}: {name}"
        seen.append(function)
        for name in rows:
            turned_rows = rows[name].transpose(1, 2)
            with pytest.raises(ValueError, match=f"{name}: got stride"):
                backends._launcher("triton", spy)(*(given | rows | {name: turned_rows}).values())
    assert len(seen) == len(run.__all__) - 1 and backends.AS_THEY_ARE == ("grad",)
    assert "grad" in inspect.signature(run.scale).parameters
