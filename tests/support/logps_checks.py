"""Compare `logps_from_logits` and `linear_logps` with float64: values and gradients of one problem."""

import torch
from numerics import DEVICE, IGNORE, assert_close, oracle, plain

import fused_po

OUTPUTS = ("logps", "entropy", "lse", "mean_logits", "log_sum_sq_probs")
DIFFERENTIABLE = OUTPUTS[:3]


def incoming(n_rows: int, names=DIFFERENTIABLE) -> dict:
    """Incoming gradients of the statistics: +1 or -1, so that all rows weigh the same, and 0 in a tenth of the rows."""
    signs = {name: torch.randint(0, 2, (n_rows,), device=DEVICE) * 2.0 - 1 for name in names}
    dead = torch.rand(n_rows, device=DEVICE) < 0.1
    return {name: g.masked_fill(dead, 0) for name, g in signs.items()}


def weigh(stats: dict, grads: dict) -> torch.Tensor:
    return sum((stats[name] * g).sum() for name, g in grads.items())


def check_logits(logits, labels, scaling, backend, outputs=OUTPUTS, n=None):
    """Compare forward and gradient of the first n rows of logits [N, V] with the oracle; all N rows set the bound."""
    n = len(logits) if n is None else n
    names = [name for name in outputs if name in DIFFERENTIABLE]
    grads = incoming(labels.numel(), names)
    some = {name: g[:n] for name, g in grads.items()}
    ours_in, plain_in = logits[:n].detach().requires_grad_(), logits.detach().clone().requires_grad_()
    ours = fused_po.logps_from_logits(ours_in, labels[:n], **scaling._asdict(), outputs=outputs, backend=backend)
    weigh(ours._asdict(), some).backward()
    theirs = plain(plain_in, labels, scaling)
    weigh(theirs, grads).backward()
    exact, exact_grad = oracle(logits, labels, scaling, grads)
    for name in outputs:
        assert_close(name, getattr(ours, name).detach(), exact[name][:n], [(theirs[name].detach(), exact[name])])
        assert (getattr(ours, name)[labels[:n] == IGNORE] == 0).all(), name
    plain_grad = plain_in.grad.masked_fill(logits == -torch.inf, 0)
    assert_close("gradient", ours_in.grad, exact_grad[:n], [(plain_grad, exact_grad)])
    assert (ours_in.grad[labels[:n] == IGNORE] == 0).all()


def check_linear(hidden, weight, bias, labels, scaling, backend, schedule=None, n=None):
    """Compare forward and gradients of the first n rows of hidden [N, H] with the oracle; all N rows set the bound.

    A GEMM's rounding depends on its shape, so plain PyTorch gets as many rows at a time as we score.
    """
    n = len(hidden) if n is None else n
    grads = incoming(labels.numel())
    head = [weight] if bias is None else [weight, bias]
    ours_in = [t.detach().clone().requires_grad_() for t in (hidden[:n], *head)]
    how = dict(outputs=OUTPUTS, backend=backend, schedule=schedule)
    ours = fused_po.linear_logps(ours_in[0], ours_in[1], labels[:n], *ours_in[2:], **scaling._asdict(), **how)
    weigh(ours._asdict(), {name: g[:n] for name, g in grads.items()}).backward()

    h, w = hidden.double(), weight.double()
    exact, exact_raw = oracle(h @ w.T + (0 if bias is None else bias.double()), labels, scaling, grads)
    theirs = plain(torch.nn.functional.linear(hidden, *head), labels, scaling)
    for name in OUTPUTS:
        assert_close(name, getattr(ours, name).detach(), exact[name][:n], [(theirs[name], exact[name])])
        assert (getattr(ours, name)[labels[:n] == IGNORE] == 0).all(), name

    def plain_problem(rows):
        """[(plain PyTorch's gradient, exact gradient)] of hidden, weight and bias with these rows in one GEMM."""
        plain_in = [t.detach().clone().requires_grad_() for t in (hidden[rows], *head)]
        stats = plain(torch.nn.functional.linear(*plain_in), labels[rows], scaling)
        weigh(stats, {name: g[rows] for name, g in grads.items()}).backward()
        exact_grads = (exact_raw[rows] @ w, exact_raw[rows].T @ h[rows], exact_raw[rows].sum(0))
        return [(t.grad, e) for t, e in zip(plain_in, exact_grads)]

    live = (labels != IGNORE) & torch.stack([g != 0 for g in grads.values()]).any(0)
    order, count = live.nonzero().squeeze(1), int(live[:n].sum())
    starts = range(0, min(len(order), 16 * count) - count + 1, count) if count else (0,)
    problems = [plain_problem(order[begin : begin + count]) for begin in starts]
    # The error of a row depends on its GEMM: all n rows including ignored ones, or the few rows of a small tile.
    alone = [torch.arange(n, device=DEVICE), *order[:count].split(3)]
    theirs_hidden = [problem[0] for problem in problems + [plain_problem(rows) for rows in alone]]
    exact_grads = (exact_raw[:n] @ w, exact_raw[:n].T @ h[:n], exact_raw[:n].sum(0))
    for i, t in enumerate(ours_in):
        name = "gradient of " + ("hidden", "weight", "bias")[i]
        assert_close(name, t.grad, exact_grads[i], [p[i] for p in problems] if i else theirs_hidden)
