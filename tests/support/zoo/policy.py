"""Rows of the policy losses: tokens, answers, entropy, the GRPO family, the critic."""

from __future__ import annotations

from functools import partial
from math import exp, log, sqrt

import torch

from fused_po import losses

from .row import F64, Row

NAN = float("nan")
# By hand: two answers of two tokens, pi / pi_old = 1.5 and 0.5 in both, A = 2 and -1; the third position is masked.
LOGPS = [[-1.0, -2.0, NAN]] * 2
OLD = [[-1.0 - log(1.5), -2.0 - log(0.5), NAN]] * 2
REF = [[-1.0 - log(2), -2.0 - log(2), NAN]] * 2  # r = log 2: k3 = 1/2 - 1 + log 2
K3 = log(2) - 0.5
MASK = [[1.0, 1.0, 0.0]] * 2
BY_HAND = (LOGPS, OLD, [2.0, -1.0], MASK)


def by_hand(a, b, c, d) -> list:
    return [[a, b, 0.0], [c, d, 0.0]]


def sigmoid(x: float) -> float:
    return 1 / (1 + exp(-x))


def draw(*more, per_token: bool = False, apart: float = 0.3):
    """Four answers of up to five tokens, one of them empty, an old policy `apart` nats away, and further tensors."""

    def sample():
        logps = -2 * torch.rand(4, 5, dtype=F64)
        mask = torch.rand(4, 5) > 0.3
        mask[2] = False
        advantages = torch.randn(4, 5 if per_token else 1, dtype=F64)
        drawn = [
            logps,
            logps + apart * torch.randn(4, 5, dtype=F64),
            advantages if per_token else advantages[:, 0],
            mask,
        ]
        return drawn + [make(logps) for make in more]

    return sample


def near(logps):
    return logps.detach() + 0.5 * torch.randn_like(logps)


def positive(logps):
    return torch.rand_like(logps) + 0.5


def apart(more: tuple = ()):
    """fp32 answers with A = 1 and A = -1; the policy is `distance` above the old policy and above the reference."""

    def make(distance: float) -> list:
        logps, old = torch.full((2, 2), -2e4 + distance), torch.full((2, 2), -2e4)
        return [logps, old, torch.tensor([1.0, -1.0]), torch.ones(2, 2, dtype=torch.bool), *(f(old) for f in more)]

    return make


def of_ratio(formula, level: str = "token"):
    """An oracle from (rho, A, log pi) -> loss; rho is per token, or from an answer's mean or summed log-ratio."""

    def oracle(logps, old, advantages, mask, *rest):
        log_ratio = (logps - old.detach()) * mask
        if level != "token":
            log_ratio = log_ratio.sum(1, keepdim=True)
        if level == "mean":
            log_ratio = log_ratio / mask.sum(1, keepdim=True).clamp(min=1)
        a = advantages if advantages.ndim == 2 else advantages[:, None]
        return formula(torch.exp(log_ratio), a, logps, *rest) * mask

    return oracle


def clip(low: float, high: float):
    """PPO's clipped surrogate, case by case."""

    def formula(rho, a, logps=None):
        gains = torch.where(rho > 1 + high, (1 + high) * a, rho * a)
        losses_ = torch.where(rho < 1 - low, (1 - low) * a, rho * a)
        return -torch.where(a > 0, gains, losses_).expand_as(logps)

    return formula


def bounded(low: float, high: float, bound: float):
    def formula(rho, a, logps):
        return torch.where((a < 0) & (rho > bound), -bound * a, clip(low, high)(rho, a, logps))

    return formula


def policy(name, case, run, oracle, expected, peers, **changes) -> Row:
    row = Row(name, case, run, oracle, BY_HAND, expected, draw(), (0,), apart(), peers)
    return row._replace(**changes)


def k3(logps, ref):
    return torch.exp(ref.detach() - logps) - 1 + logps - ref.detach()


TOKENS = [
    Row(
        "reinforce", "", losses.reinforce, lambda lp, a, m: -a[:, None] * lp * m,
        (LOGPS, [2.0, -1.0], MASK), by_hand(2, 4, -1, -2),
        lambda: [v for i, v in enumerate(draw()()) if i != 1], (0,),
        lambda d: [v for i, v in enumerate(apart()(d)) if i != 1], "verl's gpg agrees",
    ),
    policy(
        "ppo_clip", "", losses.ppo_clip, of_ratio(clip(0.2, 0.2)),
        by_hand(-2.4, -1, 1.5, 0.8),  # min(3, 2.4); min(1, 1.6); min(-1.5, -1.2); min(-0.5, -0.8)
        "OpenRLHF agrees, without the clamp; verl agrees with dual_clip 3; TRL's dapo",
    ),
    policy(
        "ppo_clip", "clip-higher, advantages of tokens",
        partial(losses.ppo_clip, epsilon_high=0.28), of_ratio(clip(0.2, 0.28)), by_hand(-2.56, -1, 1.5, 0.8),
        "OpenRLHF, verl, TRL agree", sample=draw(per_token=True),
    ),
    policy(
        "ppo_clip", "dual clip", partial(losses.ppo_clip, dual_clip=1.3), of_ratio(bounded(0.2, 0.2, 1.3)),
        by_hand(-2.4, -1, 1.3, 0.8), "verl's clip_ratio_c, OpenRLHF's dual_clip agree",  # max(-1.5, -1.3)
    ),
    policy(
        "ppo_clip", "delta", partial(losses.ppo_clip, delta=1.3), of_ratio(bounded(0.2, 0.2, 1.3)),
        by_hand(-2.4, -1, 1.3, 0.8), "TRL, Liger agree",
    ),
    policy(
        "ppo_clip", "no clamp", partial(losses.ppo_clip, log_ratio_clamp=None), of_ratio(clip(0.2, 0.2)),
        by_hand(-2.4, -1, 1.5, 0.8), "TRL, OpenRLHF agree up to e^20, and overflow at e^88",
    ),
    policy(
        "cispo", "cap", partial(losses.cispo, cap=1.2),
        of_ratio(lambda rho, a, lp: -rho.detach().clamp(max=1.2) * a * lp),
        by_hand(2.4, 2, -1.2, -1), "TRL agrees", true_gradient=False,  # weights 1.2 and 0.5
    ),
    policy(
        "cispo", "range", partial(losses.cispo, epsilon=0.4, epsilon_high=0.2),
        of_ratio(lambda rho, a, lp: -rho.detach().clamp(0.6, 1.2) * a * lp),
        by_hand(2.4, 2.4, -1.2, -1.2), "verl agrees", true_gradient=False,  # weights 1.2 and 0.6
    ),
    policy(
        "sapo", "", partial(losses.sapo, temperature_pos=1.0, temperature_neg=2.0),
        of_ratio(lambda rho, a, lp: -a * torch.where(
            a > 0, 4 / (1 + torch.exp(1 - rho)), 2 / (1 + torch.exp(2 - 2 * rho)))),
        by_hand(-8 * sigmoid(0.5), -8 * sigmoid(-0.5), 2 * sigmoid(1), 2 * sigmoid(-1)), "TRL, verl agree",
    ),
]  # fmt: skip

W = 0.75  # the product of 1.5 and 0.5; the geometric mean is sqrt(W)
PHI = W**2 * exp(3 - 3 * W), W**3 * exp(2 - 2 * W)


def vespo_oracle(logps, old, advantages, mask, weights=None):
    w = ((logps - old) * mask).sum(1, keepdim=True).exp().detach()
    if weights is not None:
        w = w * torch.where(mask, weights, 1).prod(1, keepdim=True)
    a = advantages[:, None]
    phi = torch.where(a >= 0, w**2 * torch.exp(3 - 3 * w), w**3 * torch.exp(2 - 2 * w))
    return -phi * a * logps * mask


def gmpo_oracle(logps, old, advantages, mask):
    rows = []
    for lp, o, a, m in zip(logps, old, advantages, mask):
        r = (lp - o)[m]
        r = torch.where(r > 0.3, 0.3, r) if a > 0 else torch.where(r < -0.3, -0.3, r)
        rows.append(-a * torch.exp(r.mean()) * m if m.any() else lp * 0)
    return torch.stack(rows)


SQRT = sqrt(W)  # 0.866: below 0.9
GSPO = by_hand(-2 * SQRT, -2 * SQRT, 0.9, 0.9)
TENTH = dict(epsilon=0.1, epsilon_high=0.1)
ANSWERS = [
    policy("gspo", "", partial(losses.gspo, **TENTH), of_ratio(clip(0.1, 0.1), "mean"), GSPO, "TRL agrees"),
    policy(
        "gspo", "token level", partial(losses.gspo, **TENTH, token_level=True),
        of_ratio(lambda s, a, lp: clip(0.1, 0.1)(s.detach() * torch.exp(lp - lp.detach()), a, lp), "mean"),
        GSPO, "verl agrees, its log clamped to 10 from above", sample=draw(per_token=True), true_gradient=False,
    ),
    policy("luspo", "", partial(losses.luspo, **TENTH), of_ratio(clip(0.1, 0.1), "mean"), GSPO, "TRL agrees"),
    policy(
        "rloo", "", losses.rloo, of_ratio(clip(0.2, 0.2), "sum"),
        by_hand(-2 * W, -2 * W, 0.8, 0.8), "TRL agrees; OpenRLHF, verl: ppo_clip with RLOO's advantages",
        sample=draw(apart=0.15),  # ratios of sums: with a larger spread one large ratio would dominate the error
    ),
    policy(
        "gmpo", "", partial(losses.gmpo, epsilon=0.3), gmpo_oracle,
        # mean of min(log 1.5, 0.3) and log 0.5; of log 1.5 and max(log 0.5, -0.3)
        by_hand(*[-2 * exp((0.3 + log(0.5)) / 2)] * 2, *[exp((log(1.5) - 0.3) / 2)] * 2),
        "TRL agrees; verl's geo_mean adds 1e-8 to lengths",
    ),
    policy(
        "vespo", "", losses.vespo, vespo_oracle, by_hand(2 * PHI[0], 4 * PHI[0], -PHI[1], -2 * PHI[1]),
        "TRL agrees", true_gradient=False,
    ),
    policy(
        "vespo", "with the sampler's weights", losses.vespo, vespo_oracle,
        by_hand(*(x * 1.5**2 * exp(-1.5) for x in (2, 4)), *(-x * 1.5**3 * exp(-1) for x in (1, 2))),  # w = 2 * 0.75
        "TRL agrees", values=(*BY_HAND, [[2.0, 1.0, NAN]] * 2), sample=draw(positive),
        extremes=apart((torch.exp,)), true_gradient=False,
    ),
]  # fmt: skip


def cov_oracle(share: float, low: float, high: float, of_ppo):
    """(the surrogate, the mask of the tokens with the largest covariance within the band), with Python lists."""

    def covariances(logps, old, advantages, mask):
        a = advantages[:, None].expand_as(logps)
        ppo = of_ppo(torch.exp((logps - old.detach()) * mask), a, logps)
        plain = -torch.exp((logps - old.detach()) * mask) * a
        lp, n = logps.detach(), int(mask.sum())
        cov = (a - a[mask].sum() / n) * (lp - lp[mask].sum() / n)
        band = [
            (-cov[i, j].item(), i, j)
            for i in range(len(cov))
            for j in range(cov.shape[1])
            if mask[i, j] and low < cov[i, j] < high and ppo[i, j] <= plain[i, j]
        ]
        chosen = torch.zeros_like(mask)
        for _, i, j in sorted(band)[: max(int(share * n), 1)]:
            chosen[i, j] = True
        return ppo, chosen

    return covariances


def clip_cov_oracle(epsilon: float, share: float):
    def oracle(logps, old, advantages, mask):
        ppo, chosen = cov_oracle(share, 0.1, 2.0, clip(epsilon, epsilon))(logps, old, advantages, mask)
        return ppo * (mask & ~chosen)

    return oracle


def clip_cov(case: str, epsilon: float, share: float, expected: list) -> Row:
    band = dict(clip_cov_lb=0.1, clip_cov_ub=2.0)
    run = partial(losses.clip_cov, epsilon=epsilon, clip_cov_ratio=share, **band)
    peers = "verl, the authors agree, but choose tokens of the band at random"
    return policy("clip_cov", case, run, clip_cov_oracle(epsilon, share), expected, peers)


def kl_cov_oracle(logps, old, advantages, mask):
    unclipped, chosen = cov_oracle(2e-4, -1e9, 1e9, lambda r, a, lp: -r * a)(logps, old, advantages, mask)
    return unclipped * mask + 2 * (logps - old.detach()).abs() * chosen


ENTROPY = [
    # covariances 0.75, -0.75, -0.75, 0.75 with the means 1/2 and -3/2
    clip_cov("one of four", 1.0, 0.25, by_hand(0, -1, 1.5, 0.5)),  # among equal ones the first
    clip_cov("the whole band", 1.0, 1.0, by_hand(0, -1, 1.5, 0)),
    clip_cov("PPO has clipped both", 0.2, 1.0, by_hand(-2.4, -1, 1.5, 0.8)),
    policy(
        "kl_cov", "", partial(losses.kl_cov, ppo_kl_coef=2.0), kl_cov_oracle,
        by_hand(-3 + 2 * log(1.5), -1, 1.5, 0.5), "verl, the authors agree",
    ),
    Row(
        "entropy_bonus", "", partial(losses.entropy_bonus, coef=0.1), lambda h, m: -0.1 * h * m,
        ([[2.0, NAN]], [[1.0, 0.0]]), [[-0.2, 0.0]],
        lambda: [torch.rand(3, 4, dtype=F64), torch.rand(3, 4) > 0.3], (0,), None,
        "OpenRLHF, verl agree; TRL averages it over tokens",
    ),
    Row(
        "value_loss", "", losses.value_loss,
        lambda v, o, r, m: 0.5 * torch.maximum((v - r) ** 2, (o + (v - o).clamp(-0.2, 0.2) - r) ** 2) * m,
        # v = 1 clipped to 0.2 about 0: max(1, 1.8^2) / 2; v = 3: max(1, 1.8^2) / 2; v = 2.1 within the clip
        ([[1.0, 3.0, 2.1, NAN]], [[0.0, 0.0, 2.0, NAN]], [[2.0, 2.0, 1.0, NAN]], [[1.0, 1.0, 1.0, 0.0]]),
        [[1.62, 1.62, 0.605, 0.0]],
        lambda: [*(torch.randn(3, 4, dtype=F64) for _ in range(3)), torch.rand(3, 4) > 0.3], (0,),
        lambda d: [torch.full((1, 1), d), *(torch.zeros(1, 1) for _ in range(2)), torch.ones(1, 1)],
        "OpenRLHF, verl agree; TRL dropped its PPO trainer",
    ),
    Row(
        "value_loss", "no clip, no half", partial(losses.value_loss, clip_eps=None, factor=1.0),
        lambda v, o, r, m: (v - r) ** 2 * m,
        ([[1.0]], [[NAN]], [[3.0]], [[1.0]]), [[4.0]],
        lambda: [*(torch.randn(3, 4, dtype=F64) for _ in range(3)), torch.rand(3, 4) > 0.3], (0,), None,
        "the paper; OpenRLHF's ValueLoss without clip is half of it",
    ),
]  # fmt: skip


def grpo(name, case, oracle, expected, peers, settings=None, kl: bool = False, **changes) -> Row:
    if kl:
        changes |= dict(values=(*BY_HAND, REF), sample=draw(near), extremes=apart((torch.clone,)))
    run = partial(losses.grpo, loss_type=name, **settings or {})
    return policy("grpo", f"{name}{', ' if case else ''}{case}", run, oracle, expected, peers, **changes)


PPO = by_hand(-2.4, -1, 1.5, 0.8)
GRPO = [
    grpo(
        "grpo", "KL", of_ratio(lambda rho, a, lp, ref: clip(0.2, 0.2)(rho, a, lp) + 0.1 * rho * k3(lp, ref)),
        by_hand(-2.4 + 0.15 * K3, -1 + 0.05 * K3, 1.5 + 0.15 * K3, 0.8 + 0.05 * K3), "TRL agrees",
        {"beta": 0.1}, kl=True,
    ),
    grpo(
        "dapo", "KL without its ratio", of_ratio(lambda r, a, lp, ref: clip(0.2, 0.28)(r, a, lp) + 0.1 * k3(lp, ref)),
        by_hand(-2.56 + 0.1 * K3, -1 + 0.1 * K3, 1.5 + 0.1 * K3, 0.8 + 0.1 * K3), "TRL, verl, Liger agree",
        {"beta": 0.1, "epsilon_high": 0.28, "use_bias_correction_kl": False}, kl=True,
    ),
    *(grpo(n, "", of_ratio(clip(0.2, 0.2)), PPO, "TRL, Liger agree") for n in ("grpo", "bnpo", "dr_grpo", "dapo")),
    grpo(
        "luspo", "", of_ratio(clip(0.1, 0.1), "mean"), GSPO,
        "TRL, Liger agree at sequence level; at token level Liger's sum includes padding", {"epsilon": 0.1},
    ),
    grpo("gspo", "", of_ratio(clip(0.1, 0.1), "mean"), GSPO, "TRL's grpo at sequence level", {"epsilon": 0.1}),
    grpo(
        "gspo", "weighted", of_ratio(lambda r, a, lp, w: clip(0.1, 0.1)(r, a, lp) * w.detach(), "mean"),
        by_hand(-4 * SQRT, -SQRT, 1.8, 0.45), "TRL's importance_sampling_ratio",
        values=(*BY_HAND, [[2.0, 0.5, NAN]] * 2), sample=draw(positive), extremes=apart((torch.exp,)),
    )._replace(run=lambda *v: losses.grpo(*v[:4], loss_type="gspo", epsilon=0.1, weights=v[4])),
    grpo(
        "cispo", "", of_ratio(lambda rho, a, lp: -rho.detach().clamp(max=1.2) * a * lp), by_hand(2.4, 2, -1.2, -1),
        "TRL, Liger agree; verl's range is cispo's", {"epsilon_high": 1.2}, true_gradient=False,
    ),
    grpo(
        "sapo", "", of_ratio(lambda rho, a, lp: -a * torch.where(
            a > 0, 4 / (1 + torch.exp(1 - rho)), 2 / (1 + torch.exp(2 - 2 * rho)))),
        by_hand(-8 * sigmoid(0.5), -8 * sigmoid(-0.5), 2 * sigmoid(1), 2 * sigmoid(-1)), "TRL, verl, Liger agree",
        {"sapo_temperature_neg": 2.0},
    ),
    grpo(
        "vespo", "", vespo_oracle, by_hand(2 * PHI[0], 4 * PHI[0], -PHI[1], -2 * PHI[1]), "TRL, Liger agree",
        true_gradient=False,
    ),
    grpo(
        "gmpo", "", gmpo_oracle, by_hand(*[-2 * exp((0.3 + log(0.5)) / 2)] * 2, *[exp((log(1.5) - 0.3) / 2)] * 2),
        "TRL's GMPO trainer agrees", {"epsilon": 0.3},
    ),
]  # fmt: skip

ROWS = [*TOKENS, *ANSWERS, *ENTROPY, *GRPO]
