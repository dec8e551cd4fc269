"""`policy_loss_from_logits` against plain PyTorch in float64: losses, statistics, gradients, in place or not."""

import pytest
import torch
from numerics import BACKENDS, DEVICE, IGNORE, assert_close
from policy_problems import ANSWERS, LOSSES, given, ours_of, problem, torch_of

import fused_po
from fused_po import losses

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MOST = [name for name in LOSSES if name not in ("bnpo, two-sided", "dapo", "sapo, sharp", "luspo")]  # no variants
SOME = ("ppo, dual clip", "cispo", "sapo", "gspo")  # one of each kind, for tests where all take too long


def units(key, exact):
    """Powers of two to divide by: errors grow with the values, and in a row of the gradient also with the ratio."""
    size = 1 + exact[key].abs() * (key in ("losses", "kl", "ratio"))
    if key == "gradient":
        size = exact[key].square().mean(-1, keepdim=True).sqrt()
        size = size * (1 + exact["ratio"][..., None] if "ratio" in exact else 1)
    return size.where(size > 0, 1).log2().round().exp2().float()


@pytest.mark.parametrize("backend, name", [("reference", n) for n in LOSSES] + [("triton", n) for n in MOST])
@pytest.mark.parametrize("dtype, inplace, kl", (("fp32", True, None), ("bf16", True, "k3"), ("fp16", False, "k2")))
def test_values_and_gradients(backend, name, dtype, inplace, kl, seed, poison):
    row = LOSSES[name]
    how = {"kl": kl, "kl_coef": 0.3 if kl else 0.0, "entropy_coef": 0.05 if kl else 0.0, "temperature": 0.8}
    sides, found = [], []  # (plain PyTorch, exact) of many problems, ours of the first: one error is random
    for i in range(32):
        t = problem(DTYPES[dtype], loss_type=row[0], kl=kl, temperature=0.8)
        sides.append([torch_of(t, row, precision, **how) for precision in (torch.float32, torch.float64)])
        if i < (8 if backend == "reference" else 2):  # interpreted rows take time
            out, gradient = ours_of(t, row, **how, inplace_backward=inplace, backend=backend)
            found.append({k: v.detach() for k, v in out._asdict().items() if v is not None} | {"gradient": gradient})
            nothing = (t["labels"] == IGNORE) | ~t["mask"]
            for key in set(found[-1]) - {"loss"}:
                assert (found[-1][key][nothing] == 0).all(), key
    eps = torch.finfo(torch.float32).eps
    for ours, (_, exact) in zip(found, sides):  # the loss has the errors of its tokens and of their sum
        slack = (ours["losses"] - exact["losses"]).abs().sum() + eps * exact["losses"].abs().sum()
        assert (ours["loss"] - exact["loss"]).abs() <= slack
    for key in set(sides[0][0]) - {"loss"}:
        scales = [units(key, exact) for _, exact in sides]
        got = torch.cat([(ours[key] / scale).flatten() for ours, scale in zip(found, scales)])
        exact = torch.cat([(exact[key] / scale).flatten() for (_, exact), scale in zip(sides[: len(found)], scales)])
        theirs = [(plain[key] / scale, exact[key] / scale) for (plain, exact), scale in zip(sides, scales)]
        assert_close(key, got.to(theirs[0][0].dtype), exact, theirs)
    assert set(found[0]) - set(sides[0][0]) == (set() if row[0] in ("sapo", "sft", "reinforce") else {"clipped"})
    assert out.loss.requires_grad and not any(v is not None and v.requires_grad for v in out[1:])


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("times_ratio", (True, False))
def test_kl_times_the_ratio_or_not(name, times_ratio, seed):
    row = LOSSES[name]
    if not times_ratio and row[0] == "reinforce":
        row = ("reinforce", {}, *row[2:])
    t = problem(torch.float64, loss_type=row[0], kl="k3")
    exact = torch_of(t, row, torch.float64, kl="k3", kl_coef=0.7, times_ratio=times_ratio)
    out, gradient = ours_of(t, row, kl="k3", kl_coef=0.7, use_bias_correction_kl=times_ratio)
    for key in ("loss", "losses", "kl"):
        torch.testing.assert_close(getattr(out, key).detach(), exact[key])
    torch.testing.assert_close(gradient, exact["gradient"])


@pytest.mark.parametrize("backend, name", [("reference", n) for n in LOSSES] + [("triton", n) for n in SOME])
def test_equals_the_pure_losses_on_log_probs(backend, name, seed):
    """losses.*, aggregate and logps_from_logits give the same loss and the same gradient, to rounding."""
    loss_type, settings, *_ = LOSSES[name]
    t = problem(torch.float32, loss_type=loss_type, kl="k3")
    mask = t["mask"] & (t["labels"] != IGNORE)
    x = t["logits"].clone().requires_grad_()
    stats = fused_po.logps_from_logits(x, t["labels"], outputs=("logps", "entropy"), backend=backend)
    if loss_type in losses.GRPO_MODES:
        how = {"loss_type": loss_type, "beta": 0.2, **settings}
        each = losses.grpo(stats.logps, t["old_logps"], t["advantages"], mask, t["ref_logps"], **how)
    else:
        old = stats.logps.detach() if t["old_logps"] is None else t["old_logps"]
        kl = losses.kl_loss(stats.logps, t["ref_logps"], "k3", old_logps=old)
        if loss_type == "ppo":
            each = losses.ppo_clip(stats.logps, old, t["advantages"], mask, **settings)
        elif loss_type == "reinforce":
            each = losses.reinforce(stats.logps, t["advantages"], mask)
        else:
            each = losses.sft(stats.logps, mask)
        each = torch.where(mask, each + 0.2 * kl, 0)
    each = each + losses.entropy_bonus(stats.entropy, mask, coef=0.1)
    loss = fused_po.aggregate(each, mask, losses.GRPO_MODES.get(loss_type, "token-mean"))
    loss.backward()
    how = {"kl": "k3", "kl_coef": 0.2, "entropy_coef": 0.1, "backend": backend}
    out, gradient = ours_of(t, LOSSES[name], **how)
    torch.testing.assert_close(out.losses, each.detach())
    torch.testing.assert_close(out.loss.detach(), loss.detach())
    torch.testing.assert_close(gradient, x.grad)
    if loss_type in losses.GRPO_MODES and out.clipped is not None and loss_type != "cispo":
        metrics = losses.policy_metrics(stats.logps, t["old_logps"], t["advantages"], mask, loss_type=loss_type)
        if loss_type not in ANSWERS and not settings:
            assert losses.masked_mean((out.clipped > 0).float(), mask) == metrics["clip_ratio/high_mean"]
            assert losses.masked_mean((out.clipped < 0).float(), mask) == metrics["clip_ratio/low_mean"]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("on_policy", (False, True))
def test_gradcheck(name, on_policy, seed):
    """In place too: the gradient that the forward writes is the gradient of the loss."""
    row = LOSSES[name]
    t = problem(torch.float64, 2, 3, 9, row[0], "k2")
    if on_policy and name not in ("cispo", "reinforce", "sft"):
        t["old_logps"] = None  # the ratio is 1 by definition, so finite differences cannot measure its gradient
        exact = torch_of(t, row, torch.float64, kl="k2", kl_coef=0.3, entropy_coef=0.1)
        for inplace in (False, True):
            _, gradient = ours_of(t, row, kl="k2", kl_coef=0.3, entropy_coef=0.1, inplace_backward=inplace)
            torch.testing.assert_close(gradient, exact["gradient"])
        return
    how = {"kl": "k2", "kl_coef": 0.3, "entropy_coef": 0.1, "temperature": 0.8, "use_bias_correction_kl": False}
    if row[0] == "cispo":
        t["old_logps"] = t["old_logps"] - 9  # a capped ratio is a constant weight

    def loss(x, inplace=False):
        settings = {"loss_type": row[0], **row[1], **how, "inplace_backward": inplace}
        return fused_po.policy_loss_from_logits(x, *given(t), **settings).loss

    x = t["logits"].requires_grad_()
    assert torch.autograd.gradcheck(loss, x)
    expected = torch.autograd.grad(loss(x), x)[0]
    torch.testing.assert_close(torch.autograd.grad(loss(x * 1, True), x)[0], expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("inplace", (False, True))
def test_masked_vocabulary_strides_and_ignored_values(backend, inplace, seed, poison):
    t = problem(torch.bfloat16, 3, 5, 333, kl="k2")
    hidden = torch.rand_like(t["logits"].float()) < 0.4
    hidden.scatter_(-1, t["labels"].clamp(min=0)[..., None], False)
    t["logits"] = t["logits"].masked_fill(hidden, -torch.inf)
    nothing = ~t["mask"] | (t["labels"] == IGNORE)
    for name in ("old_logps", "ref_logps"):
        t[name] = t[name].masked_fill(nothing, torch.nan)
    views = (lambda x: x * 1, lambda x: torch.cat([x[:, :1], x], 1)[:, 1:], lambda x: (x * 1).mT.contiguous().mT)
    found = []
    for view in views:
        x = t["logits"].clone().requires_grad_()
        how = {"kl": "k2", "kl_coef": 0.2, "entropy_coef": 0.1, "inplace_backward": inplace, "backend": backend}
        out = fused_po.policy_loss_from_logits(view(x), *given(t), loss_type="grpo", **how)
        out.loss.backward()
        found.append((*out[1:], x.grad))
        assert (x.grad[hidden | nothing[..., None]] == 0).all() and x.grad.isfinite().all()
    for other in found[1:]:  # groups of columns start elsewhere: sums and bf16 roundings differ in order
        for a, b in zip(other[:-1], found[0][:-1]):
            torch.testing.assert_close(a, b)
        torch.testing.assert_close(other[-1], found[0][-1], rtol=2**-7, atol=1e-8)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", ((0, 3), (2, 0), (2, 3)))
@pytest.mark.parametrize("loss_type", ("ppo", "gspo"))
def test_no_counted_token_gives_a_differentiable_zero(backend, shape, loss_type, seed, poison):
    logits = torch.randn(*shape, 9, device=DEVICE, requires_grad=True)
    labels = torch.full(shape, IGNORE, device=DEVICE)
    a = torch.zeros(shape[0], device=DEVICE)
    for inplace in (False, True):
        how = {"loss_type": loss_type, "entropy_coef": 0.1, "inplace_backward": inplace, "backend": backend}
        out = fused_po.policy_loss_from_logits(logits * 1, labels, a, **how)
        out.loss.backward()
        assert out.loss.item() == 0 and (logits.grad == 0).all() and (out.losses == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ("ppo", "cispo", "sapo", "gspo"))
@pytest.mark.parametrize("distance", (1e4, -1e4))
def test_distant_policies_give_the_finite_values_of_the_pure_losses(backend, name, distance, seed):
    t = problem(torch.float32, loss_type=name, kl="k3")
    t["old_logps"], t["ref_logps"] = t["old_logps"] + distance, t["ref_logps"] + distance
    out, gradient = ours_of(t, LOSSES[name], kl="k3", backend=backend)
    mask = t["mask"] & (t["labels"] != IGNORE)
    how = {"loss_type": "grpo" if name == "ppo" else name, **LOSSES[name][1]}
    expected = losses.grpo(out.logps, t["old_logps"], t["advantages"], mask, **how)
    torch.testing.assert_close(out.losses, expected)
    assert gradient.isfinite().all() and out.kl.isfinite().all()


@pytest.mark.parametrize("name", ("ppo", "ppo, dual clip", "cispo", "sapo"))
def test_importance_weights_may_be_multiplied_into_the_advantages(name, seed):
    """As documented: L is proportional to |A|."""
    t = problem(torch.float64)
    weights = torch.rand_like(t["old_logps"])
    plain, _ = ours_of(t, LOSSES[name])
    weighed, _ = ours_of(t | {"advantages": t["advantages"][:, None] * weights}, LOSSES[name])
    torch.testing.assert_close(weighed.losses, plain.losses * weights)


@pytest.mark.parametrize("backend", BACKENDS)
def test_weighted_micro_batches_equal_one_batch(backend, seed):
    """Gradient accumulation: token_weights with the counts of the whole step, and with a fixed length for Dr. GRPO."""
    t = problem(torch.float32, 4, 5)
    mask = t["mask"] & (t["labels"] != IGNORE)
    counts = {"mode": "seq-mean-token-sum-norm", "num_sequences": 4, "max_length": 7}
    how = {"loss_type": "dr_grpo", "backend": backend}
    x = t["logits"].clone().requires_grad_()
    out = fused_po.policy_loss_from_logits(x, *given(t), weights=fused_po.token_weights(mask, **counts), **how)
    out.loss.backward()
    torch.testing.assert_close(out.loss, fused_po.aggregate(out.losses, mask, **counts))
    y = t["logits"].clone().requires_grad_()
    for part in (slice(0, 1), slice(1, 4)):
        some = {name: None if value is None else value[part] for name, value in t.items()}
        weights = fused_po.token_weights(mask[part], **counts)
        fused_po.policy_loss_from_logits(y[part], *given(some), weights=weights, **how).loss.backward()
    torch.testing.assert_close(x.grad, y.grad)
