"""`python -m fused_po selfcheck`: every op on this machine against float64, beside plain PyTorch at the same dtype.

An op passes if its error is at most twice plain PyTorch's in root mean square and four times in maximum, plus the
rounding of the result. Inputs are random, from a seed that is printed: --seed and --only repeat one check. Where an
error exceeds its bound by less than a factor of 2, four more problems are drawn, and most of the five must be within.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple, Optional

import torch
from torch import Tensor

import fused_po

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
IGNORE = -100
RMS_FACTOR, MAX_FACTOR = 2, 4
DRAWS = 5  # of a problem, if the first one is a little beyond its bound
PAIRS, JS_WEIGHT, SOFTCAP, TEMPERATURE, RANK, KL_COEF = 32, 0.3, 20.0, 0.8, 4, 0.1
Values = dict[str, Tensor]


class Size(NamedTuple):
    """Of a problem: scored tokens and more, a multiple of 2 * PAIRS; vocabulary; hidden width."""

    tokens: int
    vocab: int
    hidden: int


class Check(NamedTuple):
    """`ours` and `plain` map the problem's tensors to values; gradients are taken in the tensors named in `leaves`."""

    name: str
    leaves: tuple[str, ...]
    ours: Callable[[Values], Values]
    plain: Callable[[Values], Values]


class Result(NamedTuple):
    """RMS error of ours and of plain PyTorch in the value or gradient `what`, which comes nearest to its bound.

    share: our error over that bound.
    """

    check: str
    dtype: str
    what: str
    ours: float
    plain: float
    share: float
    passed: bool
    note: str = ""


def problem(size: Size, dtype: torch.dtype, device: str, seed: int) -> Values:
    """Random tensors: label probabilities spread from about 1e-6 to almost 1, a third of the rows is ignored."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float32)

    n, v, h = size
    weight, hidden = normal(v, h) / h**0.5, normal(n, h)
    labels = torch.randint(v, (n,), generator=generator)
    hidden += 9 * torch.rand(n, 1, generator=generator, dtype=torch.float32) * weight[labels]
    ref_weight = weight + 0.1 * normal(v, h) / h**0.5
    tensors = {"hidden": hidden, "weight": weight, "ref_hidden": hidden + 0.3 * normal(n, h), "ref_weight": ref_weight}
    tensors["logits"], tensors["ref_logits"] = hidden @ weight.T, tensors["ref_hidden"] @ ref_weight.T
    tensors["u"], tensors["low"] = normal(n, RANK), normal(v, RANK) / RANK
    forbidden = torch.rand(v, generator=generator, dtype=torch.float32) < 0.02
    forbidden[labels] = False
    for name in ("logits", "ref_logits"):
        tensors[name][:, forbidden] = -torch.inf
    labels[torch.rand(n, generator=generator, dtype=torch.float32) < 1 / 3] = IGNORE
    found = {name: value.to(device, dtype) for name, value in tensors.items()}
    steps = {"rewards": normal(8, n), "values": normal(8, n)}
    return found | {name: value.to(device) for name, value in steps.items()} | {"labels": labels.to(device)}


# Plain PyTorch. In float64 it is the truth.


def wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def plain_scores(t: Values, side: str = "") -> Tensor:
    return wide(t[f"{side}hidden"] @ t[f"{side}weight"].T)


def plain_logps(z: Tensor, labels: Tensor) -> Tensor:
    logps = z.log_softmax(-1).gather(-1, labels.clamp(min=0)[:, None]).squeeze(-1)
    return torch.where(labels != IGNORE, logps, 0)


def plain_stats(z: Tensor, labels: Tensor) -> Values:
    logp, counts = z.log_softmax(-1), labels != IGNORE
    entropy = -(logp.exp() * logp.masked_fill(logp == -torch.inf, 0)).sum(-1)
    found = {"logps": plain_logps(z, labels), "entropy": entropy, "lse": z.logsumexp(-1)}
    return {name: torch.where(counts, value, 0) for name, value in found.items()}


def plain_kl(z: Tensor, ref_z: Tensor, labels: Tensor, direction: str) -> Values:
    log_p, log_q = z.log_softmax(-1), ref_z.detach().log_softmax(-1)
    p, q, w = log_p.exp(), log_q.exp(), JS_WEIGHT

    def mean(weights: Tensor, log_ratio: Tensor) -> Tensor:
        return (weights * log_ratio.masked_fill(weights.detach() == 0, 0)).sum(-1)

    if direction == "js":
        mixed = w * q + (1 - w) * p
        log_m = mixed.masked_fill(mixed == 0, 1).log()  # where both are 0 the gradient shall be 0, not 0 / 0
        value = w * mean(q, log_q - log_m) + (1 - w) * mean(p, log_p - log_m)
    else:
        value = mean(p, log_p - log_q) if direction == "reverse" else mean(q, log_q - log_p)
    return {"kl": torch.where(labels != IGNORE, value, 0)}


def plain_dpo(z: Tensor, ref_z: Tensor, labels: Tensor, beta: float = 0.1) -> Values:
    ratios = (plain_logps(z, labels) - plain_logps(ref_z.detach(), labels)).view(2 * PAIRS, -1).sum(-1)
    return {"losses": -torch.nn.functional.logsigmoid(beta * (ratios[:PAIRS] - ratios[PAIRS:]))}


def plain_dpo_with_kl(z: Tensor, ref_z: Tensor, labels: Tensor) -> Values:
    ratios = plain_logps(z, labels) - plain_logps(ref_z.detach(), labels)
    k3 = torch.where(labels != IGNORE, torch.exp(-ratios) - 1 + ratios, 0).sum() / (labels != IGNORE).sum()
    return {"loss": plain_dpo(z, ref_z, labels)["losses"].mean() + KL_COEF * k3}


def weighted_sum(logps: Tensor, rows: Tensor, of: int) -> Tensor:
    """A loss that separates over tokens: each weighs by its number in the batch."""
    return (logps * (rows + 1) / of).sum()


def plain_policy(z: Tensor, old_z: Tensor, labels: Tensor) -> Values:
    """SAPO's loss of tokens, with an entropy bonus: of the policy losses the one without corners."""
    now, old = plain_stats(z, labels), plain_logps(old_z.detach(), labels)
    a = torch.linspace(-1, 1, 2 * PAIRS, dtype=z.dtype, device=z.device).repeat_interleave(len(labels) // (2 * PAIRS))
    tau = torch.where(a > 0, 1.0, torch.full_like(a, 1.05))
    losses = -4 / tau * a * torch.sigmoid(tau * ((now["logps"] - old).exp() - 1)) - 0.1 * now["entropy"]
    losses = torch.where(labels != IGNORE, losses, 0)
    return {"losses": carrying(losses, losses.sum() / len(labels))}


def carrying(losses: Tensor, loss: Tensor) -> Tensor:
    """Losses of tokens with the gradient of their mean: one number's error would be luck."""
    return losses.detach().flatten() + (loss - loss.detach())


def plain_gae(t: Values, gamma: float = 0.99, lam: float = 0.95) -> Values:
    rewards, values = t["rewards"], t["values"]
    after = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], 1)
    delta, found, last = rewards + gamma * after - values, [], torch.zeros_like(values[:, 0])
    for step in reversed(range(delta.shape[1])):
        last = delta[:, step] + gamma * lam * last
        found.append(last)
    return {"advantages": torch.stack(found[::-1], 1)}


# Ours.


def pairs(value: Tensor) -> Tensor:
    return value.view(2 * PAIRS, -1, *value.shape[1:])


def some_stats(stats: fused_po.TokenStats, names: tuple[str, ...]) -> Values:
    return {name: getattr(stats, name) for name in names}


def checks(backend: Optional[str]) -> Iterator[Check]:
    """One for each op in each form that computes in another way."""
    on = {"backend": backend}
    all_three, head = ("logps", "entropy", "lse"), ("hidden", "weight")
    for name, how in (("", {}), (", softcap", {"softcap": SOFTCAP}), (", in place", {"inplace_backward": True})):
        scaled = {"temperature": TEMPERATURE, "outputs": all_three, **how, **on}

        def scale(z: Tensor, cap: Optional[float] = how.get("softcap")) -> Tensor:
            return (z if cap is None else cap * torch.tanh(z / cap)) / TEMPERATURE

        yield Check(
            f"logps_from_logits{name}", ("logits",),
            lambda t, a=scaled: some_stats(fused_po.logps_from_logits(t["logits"] + 0, t["labels"], **a), all_three),
            lambda t, f=scale: plain_stats(f(wide(t["logits"])), t["labels"]),
        )  # fmt: skip
    forms = (("", head, {}), (", none kept", head, {"logits_budget": 0}), (", head frozen", ("hidden",), {}))
    for name, leaves, knobs in forms:
        outputs = ("logps",) if "frozen" in name else all_three
        how = {"schedule": fused_po.Schedule(**knobs), "outputs": outputs, **on}
        yield Check(
            f"linear_logps{name}", leaves,
            lambda t, a=how: some_stats(fused_po.linear_logps(*both_heads(t)[:2], t["labels"], **a), a["outputs"]),
            lambda t, n=outputs: {k: v for k, v in plain_stats(plain_scores(t), t["labels"]).items() if k in n},
        )  # fmt: skip
    yield Check(
        "linear_logps, low rank", ("hidden", "u", "low"),
        lambda t: {"logps": low_rank_logps(t, on)},
        lambda t: {"logps": plain_logps(wide(t["hidden"] @ t["weight"].T + t["u"] @ t["low"].T), t["labels"])},
    )  # fmt: skip
    yield Check(
        "chunked_loss", head,
        lambda t: {"loss": chunked(t, on)},
        lambda t: {"loss": weighted_sum(plain_logps(plain_scores(t), t["labels"]), *numbered(t))},
    )  # fmt: skip
    for direction in ("reverse", "forward", "js"):
        how = {"direction": direction, **({"js_weight": JS_WEIGHT} if direction == "js" else {}), **on}
        yield Check(
            f"kl_from_logits, {direction}", ("logits",),
            lambda t, a=how: {"kl": fused_po.kl_from_logits(t["logits"], t["ref_logits"], t["labels"], **a).kl},
            lambda t, d=direction: plain_kl(wide(t["logits"]), wide(t["ref_logits"]), t["labels"], d),
        )  # fmt: skip
        yield Check(
            f"linear_kl, {direction}", head,
            lambda t, a=how: {"kl": fused_po.linear_kl(*both_heads(t), t["labels"], **a).kl},
            lambda t, d=direction: plain_kl(plain_scores(t), plain_scores(t, "ref_"), t["labels"], d),
        )  # fmt: skip
    yield Check(
        "dpo_from_logits", ("logits",),
        lambda t: {"losses": fused_po.dpo_from_logits(*map(pairs, logits_of_pairs(t)), **on).losses},
        lambda t: plain_dpo(wide(t["logits"]), wide(t["ref_logits"]), t["labels"]),
    )  # fmt: skip
    kl = {"kl": "k3", "kl_coef": KL_COEF, **on}
    yield Check(
        "dpo_from_logits, k3", ("logits",),
        lambda t: {"loss": fused_po.dpo_from_logits(*map(pairs, logits_of_pairs(t)), **kl).loss},
        lambda t: plain_dpo_with_kl(wide(t["logits"]), wide(t["ref_logits"]), t["labels"]),
    )  # fmt: skip
    yield Check(
        "linear_dpo", head,
        lambda t: {"losses": linear_dpo(t, on)},
        lambda t: plain_dpo(plain_scores(t), plain_scores(t, "ref_"), t["labels"]),
    )  # fmt: skip
    for name, inplace in (("", False), (", in place", True)):
        yield Check(
            f"policy_loss_from_logits{name}", ("logits",),
            lambda t, i=inplace: {"losses": policy_loss(t, inplace_backward=i, **on)},
            lambda t: plain_policy(wide(t["logits"]), wide(t["ref_logits"]), t["labels"]),
        )  # fmt: skip
    yield Check(
        "gae", (),
        lambda t: {"advantages": fused_po.gae(t["rewards"], t["values"], gamma=0.99, lam=0.95, **on)[0]},
        plain_gae,
    )  # fmt: skip


def both_heads(t: Values) -> tuple[Tensor, ...]:
    return tuple(t[name] for name in ("hidden", "weight", "ref_hidden", "ref_weight"))


def low_rank_logps(t: Values, on: dict) -> Tensor:
    return fused_po.linear_logps(t["hidden"], t["weight"], t["labels"], low_rank=(t["u"], t["low"]), **on).logps


def numbered(t: Values) -> tuple[Tensor, int]:
    """(numbers of the rows, how many)."""
    return torch.arange(len(t["labels"]), device=t["labels"].device), len(t["labels"])


def chunked(t: Values, on: dict) -> Tensor:
    """In chunks of about an eighth of the tokens."""
    rows, of = numbered(t)
    budget = fused_po.Schedule(logits_budget=of // 8 * 4 * len(t["weight"]))
    how = {"schedule": budget, **on}
    return fused_po.chunked_loss(
        lambda stats, rows: weighted_sum(stats.logps, rows, of), *both_heads(t)[:2], t["labels"], rows // 4, **how
    )


def logits_of_pairs(t: Values) -> tuple[Tensor, ...]:
    return t["logits"], t["labels"], t["ref_logits"]


def linear_dpo(t: Values, on: dict) -> Tensor:
    hidden, weight, ref_hidden, ref_weight = both_heads(t)
    return fused_po.linear_dpo(pairs(hidden), weight, pairs(t["labels"]), pairs(ref_hidden), ref_weight, **on).losses


def policy_loss(t: Values, **how) -> Tensor:
    logits, labels = pairs(t["logits"] + 0), pairs(t["labels"])
    old = pairs(plain_logps(wide(t["ref_logits"]), t["labels"]))
    a = torch.linspace(-1, 1, 2 * PAIRS, dtype=torch.float32, device=old.device)
    how |= {"entropy_coef": 0.1, "weights": torch.full_like(old, 1 / labels.numel())}
    out = fused_po.policy_loss_from_logits(logits, labels, a, old, loss_type="sapo", **how)
    return carrying(out.losses, out.loss)


# Comparing.


def evaluate(function: Callable[[Values], Values], t: Values, leaves: tuple[str, ...]) -> Values:
    """The function's values, and the gradients of a weighted sum of them."""
    t = t | {name: t[name].detach().clone().requires_grad_() for name in leaves}
    values = function(t)
    found = {name: value.detach() for name, value in values.items()}
    if leaves:
        total = sum(
            (v.double() * torch.linspace(-1, 2, v.numel(), device=v.device).view_as(v)).sum() for v in values.values()
        )
        grads = torch.autograd.grad(total, [t[name] for name in leaves])
        found |= {f"d {name}": grad for name, grad in zip(leaves, grads)}
    return found


def compare(check: Check, t: Values, dtype: str) -> Result:
    """The value or gradient that comes nearest to its bound, or passes it."""
    truth = evaluate(check.plain, {k: v.double() if v.is_floating_point() else v for k, v in t.items()}, check.leaves)
    theirs, ours = (evaluate(f, t, check.leaves) for f in (check.plain, check.ours))
    worst, margin = None, -1.0
    for what, exact in truth.items():
        errors = [(found[what].double() - exact).flatten() for found in (ours, theirs)]
        rounding = exact.abs().flatten() * torch.finfo(ours[what].dtype).eps / 2
        rms = [value.square().mean().sqrt().item() for value in (*errors, rounding)]
        most = [value.abs().max().item() for value in (*errors, rounding)]
        shares = [rms[0] / (RMS_FACTOR * rms[1] + rms[2] + 1e-30), most[0] / (MAX_FACTOR * most[1] + most[2] + 1e-30)]
        share = max(shares) if all(value == value for value in shares) else float("inf")
        if share > margin:
            worst, margin = Result(check.name, dtype, what, rms[0], rms[1], share, share <= 1), share
    return worst


def judge(check: Check, t: Values, draw: Callable[[int], Values], dtype: str) -> Result:
    """`compare`; if that is a little beyond its bound, DRAWS problems decide: one number's error is luck.

    draw(1), draw(2), ...: other problems.
    """
    result = compare(check, t, dtype)
    if result.passed or not result.share <= 2:
        return result
    beyond = 1 + sum(not compare(check, draw(i), dtype).passed for i in range(1, DRAWS))
    return result._replace(passed=2 * beyond < DRAWS, note=f"beyond its bound in {beyond} of {DRAWS} problems")


def run(
    size: Size, dtypes: tuple[str, ...], device: str, seed: int, backend: Optional[str] = None, only: str = ""
) -> Iterator[tuple[int, int, Result]]:
    """(number, of how many, result) of each check, one after another. An op that raises has failed, and says how."""
    chosen = [check for check in checks(backend) if only in check.name]
    total = len(chosen) * len(dtypes)
    for place, dtype in enumerate(dtypes):
        draw = lambda i, dtype=dtype: problem(size, DTYPES[dtype], device, seed + i)  # noqa: E731
        t = draw(0)
        for index, check in enumerate(chosen):
            try:
                result = judge(check, t, draw, dtype)
            except Exception as error:  # whatever a driver, a compiler or an op may raise: the others go on
                nan = float("nan")
                result = Result(check.name, dtype, "", nan, nan, nan, False, f"{type(error).__name__}: {error}")
            yield place * len(chosen) + index + 1, total, result


def table(results: list[Result]) -> str:
    """RMS errors, ours and plain PyTorch's, of what comes nearest to its bound."""
    lines = [f"{'op':32} {'dtype':6} {'of':12} {'ours':>9} {'PyTorch':>9}"]
    for r in results:
        note = r.note.splitlines()[0][:120] if r.note else ""
        line = (
            f"{r.check:32} {r.dtype:6} {r.what:12} {r.ours:9.1e} {r.plain:9.1e}   {'' if r.passed else 'FAILED '}{note}"
        )
        lines.append(line.rstrip())
    return "\n".join(lines)


def progress(done: int, total: int, name: str) -> None:
    """One line that overwrites itself; nothing where nobody looks."""
    if sys.stderr and sys.stderr.isatty():
        filled = 30 * done // total
        end = "\n" if done == total else ""
        print(f"\r[{'#' * filled}{'.' * (30 - filled)}] {done}/{total} {name:40}", end=end, file=sys.stderr, flush=True)
