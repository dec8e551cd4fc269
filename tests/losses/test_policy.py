"""Policy losses: gradients by enumeration, masks, no syncs with the device, bad input."""

import math
from functools import partial

import pytest
import torch

from fused_po import losses
from fused_po.losses import GRPO_MODES
from fused_po.reduce import aggregate

F64 = torch.float64
EOS, V, T = 0, 3, 3


class Language:
    """All answers of up to three tokens from a vocabulary of three, with policy logits per prefix and a reward each."""

    def __init__(self):
        self.answers = [a for n in range(1, T + 1) for a in self.of_length(n)]
        prefixes = {a[:i] for a in self.answers for i in range(len(a))}
        self.rows = {prefix: i for i, prefix in enumerate(sorted(prefixes))}
        self.mask = torch.tensor([[i < len(a) for i in range(T)] for a in self.answers])
        self.rewards = torch.randn(len(self.answers), dtype=F64)

    def of_length(self, n):
        """Answers of n tokens, which end with EOS or at the limit."""
        stems = [()]
        for _ in range(n - 1):
            stems = [(*s, v) for s in stems for v in range(1, V)]
        return [(*s, v) for s in stems for v in range(V) if v == EOS or n == T]

    def logits(self):
        return torch.randn(len(self.rows), V, dtype=F64, requires_grad=True)

    def logps(self, logits):
        """Log-probs [answers, T], with NaN after the end of each answer."""
        table = logits.log_softmax(-1)
        return torch.stack(
            [
                torch.stack(
                    [table[self.rows[a[:i]], a[i]] if i < len(a) else table.new_tensor(math.nan) for i in range(T)]
                )
                for a in self.answers
            ]
        )

    def probabilities(self, logps):
        return torch.where(self.mask, logps, 0).sum(-1).exp()


def gradient(value, of):
    return torch.autograd.grad(value, of, retain_graph=True)[0]


@pytest.fixture
def language(seed):
    return Language()


def close(value, expected):
    torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-12)


def test_the_probabilities_of_all_answers_sum_to_one(language):
    logits = language.logits()
    close(language.probabilities(language.logps(logits)).sum(), torch.ones((), dtype=F64))


def test_reinforce_is_the_policy_gradient(language):
    logits = language.logits()
    logps = language.logps(logits)
    p = language.probabilities(logps)
    per_token = losses.reinforce(logps, language.rewards, language.mask)
    close(gradient((p.detach() * per_token.sum(-1)).sum(), logits), gradient(-(p * language.rewards).sum(), logits))


@pytest.mark.parametrize("loss", ["weights", "rloo"])
def test_the_off_policy_gradient_is_the_on_policy_one(language, loss):
    """Weighted answers of another sampler: E_sampler[w loss] has the gradient of -E_pi[reward]."""
    logits, sampler = language.logits(), language.logps(language.logits()).detach()
    logps = language.logps(logits)
    expected = gradient(-(language.probabilities(logps) * language.rewards).sum(), logits)
    if loss == "weights":
        weights = losses.importance_weights(logps, sampler, language.mask, level="sequence", high=None)
        assert not weights.requires_grad
        per_answer = (weights * losses.reinforce(logps, language.rewards, language.mask)).sum(-1)
    else:
        wide = partial(losses.rloo, epsilon=1.0, epsilon_high=1e9)
        per_answer = wide(logps, sampler, language.rewards, language.mask)[:, 0]
    close(gradient((language.probabilities(sampler) * per_answer).sum(), logits), expected)
    unweighted = losses.reinforce(logps, language.rewards, language.mask).sum(-1)
    wrong = gradient((language.probabilities(sampler) * unweighted).sum(), logits)
    assert (wrong - expected).abs().max() > 1e-3, "the weights must matter"


def test_token_weights_are_exact_for_answers_of_one_token(language):
    """GRPO's importance weights: E_old[rho A] over single tokens has the on-policy gradient."""
    logits, old = (torch.randn(V, dtype=F64, requires_grad=True) for _ in range(2))
    logps, old, a = logits.log_softmax(-1), old.log_softmax(-1).detach(), torch.randn(V, dtype=F64)
    wide = dict(epsilon=1.0, epsilon_high=1e9)
    per_token = losses.grpo(logps[:, None], old[:, None], a, torch.ones(V, 1), **wide)
    close(gradient((old.exp() * per_token[:, 0]).sum(), logits), gradient(-(logps.exp() * a).sum(), logits))


def test_the_corrected_kl_is_the_reverse_kl(seed):
    """E_old[rho k3] has the value and gradient of KL(pi || ref); without rho it has neither."""
    logits, old, ref = (torch.randn(V, dtype=F64, requires_grad=True) for _ in range(3))
    logps, old, ref = logits.log_softmax(-1), old.log_softmax(-1).detach(), ref.log_softmax(-1).detach()
    exact = (logps.exp() * (logps - ref)).sum()
    zero, ones = torch.zeros(V, dtype=F64), torch.ones(V, 1)
    columns = (v[:, None] for v in (logps, old, ref))
    columns = dict(zip(("logps", "old_logps", "ref_logps"), columns), advantages=zero, mask=ones)
    for corrected in (True, False):
        per_token = losses.grpo(**columns, beta=1.0, use_bias_correction_kl=corrected)
        estimate = (old.exp() * per_token[:, 0]).sum()
        pairs = ((estimate, exact), (gradient(estimate, logits), gradient(exact, logits)))
        assert [torch.allclose(*pair, rtol=1e-9) for pair in pairs] == [corrected] * 2


def batch(*, apart: float = 0.5, dtype=F64):
    """(logps that require grad, old, advantages, mask, ref). One answer is empty; masked values are NaN."""
    mask = torch.rand(5, 7) > 0.3
    mask[2] = False
    logps = torch.where(mask, -2 * torch.rand(5, 7, dtype=dtype), math.nan)
    old, ref = (logps + apart * torch.randn(5, 7, dtype=dtype) for _ in range(2))
    advantages = torch.randn(5, dtype=dtype)
    advantages[2] = math.nan
    return logps.requires_grad_(), old.detach(), advantages, mask, ref.detach()


LOSSES = {
    "reinforce": lambda lp, old, a, m: losses.reinforce(lp, a, m),
    "ppo_clip": losses.ppo_clip,
    "cispo": partial(losses.cispo, cap=2.0),
    "sapo": losses.sapo,
    "gspo": partial(losses.gspo, epsilon=0.2, epsilon_high=0.2),
    "gspo token": partial(losses.gspo, epsilon=0.2, epsilon_high=0.2, token_level=True),
    "luspo": losses.luspo,
    "rloo": losses.rloo,
    "gmpo": losses.gmpo,
    "vespo": losses.vespo,
    "clip_cov": partial(losses.clip_cov, clip_cov_ratio=0.1, clip_cov_lb=0.0),
    "kl_cov": partial(losses.kl_cov, kl_cov_ratio=0.1),
    **{f"grpo {name}": partial(losses.grpo, loss_type=name) for name in GRPO_MODES},
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


@pytest.mark.parametrize("loss", ["ppo_clip", "grpo grpo", "grpo dapo", "grpo cispo", "grpo sapo", "grpo vespo"])
def test_at_ratio_one_the_gradient_is_reinforces(loss, seed):
    logps, _, advantages, mask, _ = batch()
    ours = gradient(LOSSES[loss](logps, logps.detach(), advantages, mask).sum(), logps)
    close(ours, gradient(losses.reinforce(logps, advantages, mask).sum(), logps))
    assert ours[mask].abs().min() > 0


@pytest.mark.parametrize("apart", (0.0, 0.1))
def test_both_forms_of_gspo_have_the_same_gradient(apart, seed):
    """The per-token form averages to the per-answer form, for any ratio and advantages of answers."""
    logps, old, advantages, mask, _ = batch(apart=apart)
    plain, by_token = (
        losses.gspo(logps, old, advantages, mask, epsilon=0.05, epsilon_high=0.05, token_level=form)
        for form in (False, True)
    )
    close(by_token, plain)
    each = [gradient(aggregate(v, mask, "seq-mean-token-mean"), logps) for v in (plain, by_token)]
    close(*each)
    advantages = torch.randn(5, 7, dtype=F64)
    differ = [
        gradient(losses.gspo(logps, old, advantages, mask, epsilon=1.0, epsilon_high=9.0, token_level=f).sum(), logps)
        for f in (False, True)
    ]
    assert not torch.allclose(*differ), "per-token advantages must distinguish the two forms"


@pytest.mark.parametrize("loss_type", [name for name in GRPO_MODES if name != "vespo"])
def test_grpo_uses_the_given_old_log_probs(loss_type, seed):
    """Other libraries had this bug: the ratio of pi and itself although old log-probs are given.

    The gradient must be rho A grad log pi.
    """
    mask = torch.ones(4, 1, dtype=torch.bool)
    old = -2 * torch.rand(4, 1, dtype=F64) - 1
    logps = (old + 0.5 * torch.rand(4, 1, dtype=F64) + 0.1).requires_grad_()
    advantages = -torch.rand(4, dtype=F64) - 0.1  # negative, above 1: not clipped
    grad = gradient(losses.grpo(logps, old, advantages, mask, loss_type=loss_type).sum(), logps)
    rho = (logps.detach() - old).exp()
    gate = 1.0
    if loss_type == "sapo":
        s = torch.sigmoid(1.05 * (rho - 1))
        gate = 4 * s * (1 - s)
    close(grad, -gate * rho * advantages[:, None])
    assert (rho - 1).abs().min() > 0.1


def test_two_names_for_one_bound(seed):
    logps, _, advantages, mask, _ = batch()
    mask[0], advantages[0] = True, -1.0
    logps = logps.detach().nan_to_num(-1.0)
    old = logps - 1.5  # rho = 4.5
    one, other = (losses.ppo_clip(logps, old, advantages, mask, **how) for how in ({"delta": 3.0}, {"dual_clip": 3.0}))
    assert torch.equal(one, other) and (one != losses.ppo_clip(logps, old, advantages, mask)).any()


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@every_loss
def test_masked_values_are_zero_and_not_read(loss, seed):
    logps, old, advantages, mask, _ = batch()
    with torch.autograd.detect_anomaly(check_nan=True):  # no NaN inside the backward either
        value = loss(logps, old, advantages, mask)
        grad = gradient(value.sum(), logps)
    assert value.shape == mask.shape and torch.equal(value[~mask], torch.zeros_like(value[~mask]))
    assert value.isfinite().all()
    assert grad.isfinite().all() and not grad[~mask].any()
    others = [torch.where(mask, v, 7.0) for v in (logps, old)]
    assert torch.equal(loss(*others, advantages.nan_to_num(3.0), mask.long()), value)
    for mode in ("token-mean", "seq-mean-token-mean"):
        assert aggregate(value, mask, mode).isfinite()


@every_loss
def test_an_empty_batch_and_an_all_masked_one(loss):
    for shape in ((0, 3), (2, 0), (2, 3)):
        logps = torch.full(shape, math.nan, requires_grad=True)
        value = loss(logps, logps.detach(), torch.zeros(shape[:1]), torch.zeros(shape))
        assert value.shape == shape and not value.any()
        assert not gradient(value.sum(), logps).any()


@every_loss
def test_no_host_sync(loss):
    """On the meta device reading a value raises, which stands for a sync on a GPU."""
    logps = torch.empty(3, 4, device="meta", requires_grad=True)
    a, mask = torch.empty(3, device="meta"), torch.empty(3, 4, device="meta", dtype=torch.bool)
    loss(logps, logps.detach(), a, mask).sum().backward()
    assert logps.grad.shape == logps.shape


def test_no_host_sync_in_masks_weights_and_metrics():
    logps = torch.empty(3, 4, device="meta")
    a, mask = torch.empty(3, device="meta"), torch.empty(3, 4, device="meta", dtype=torch.bool)
    losses.top_entropy_mask(logps, mask)
    for level in ("token", "sequence", "geometric"):
        for kind in ("truncate", "mask", "reject"):
            losses.importance_weights(logps, logps, mask, level=level, kind=kind, low=0.5, high=2.0)
    losses.off_policy_sequence_mask(logps, logps, a, mask, threshold=0.1)
    for loss_type in GRPO_MODES:
        for value in losses.policy_metrics(logps, logps, a, mask, logps, logps, loss_type=loss_type).values():
            assert value.shape == () and value.device.type == "meta"


def test_without_a_clamp_every_ratio_has_a_gradient():
    logps = torch.tensor([[-1.0]], requires_grad=True)
    far, a, mask = torch.tensor([[-1e4]]), torch.tensor([-1.0]), torch.ones(1, 1)
    for clamp, expected in ((20.0, 0.0), (None, math.exp(20))):
        grad = gradient(losses.ppo_clip(logps, far, a, mask, log_ratio_clamp=clamp).sum(), logps)
        assert grad.item() == pytest.approx(expected, rel=1e-6)


def test_clip_cov_draws_from_its_generator(seed):
    logps, old, advantages, mask, _ = batch()
    cov = partial(losses.clip_cov, logps, old, advantages, mask, epsilon=1.0, clip_cov_ratio=0.1, clip_cov_lb=0.0)
    zeros = []
    for s in range(8):
        first, again = (cov(generator=torch.Generator().manual_seed(s)) for _ in range(2))
        assert torch.equal(first, again)
        zeros.append((first == 0) & mask)
        assert zeros[-1].sum() == max(1, int(0.1 * mask.sum()))
    assert any(not torch.equal(z, zeros[0]) for z in zeros)


@pytest.mark.parametrize("quantile", (0.05, 0.2, 0.5, 1.0))
def test_top_entropy_mask_against_torchs_quantile(quantile, seed):
    mask = torch.rand(6, 9) > 0.3
    entropy = torch.where(mask, torch.rand(6, 9, dtype=F64), math.nan)
    expected = (entropy >= torch.quantile(entropy[mask], 1 - quantile)) & mask
    assert torch.equal(losses.top_entropy_mask(entropy, mask, quantile), expected)
    assert expected.sum() >= 1 and not losses.top_entropy_mask(entropy, mask & False).any()


@pytest.mark.parametrize("level", ("token", "sequence", "geometric"))
@pytest.mark.parametrize("kind", ("truncate", "mask", "reject"))
def test_importance_weights(level, kind, seed):
    logps, sampler, _, mask, _ = batch()
    weights = losses.importance_weights(logps, sampler, mask, level=level, kind=kind, low=0.8, high=1.5)
    expected = torch.zeros_like(weights)
    for i, counted in enumerate(mask):
        r = (logps.detach() - sampler)[i][counted]
        w = {"token": r, "sequence": r.sum(), "geometric": r.mean()}[level].exp().expand(int(counted.sum()))
        inside = (w >= 0.8) & (w <= 1.5)
        expected[i, counted] = {"truncate": w.clamp(0.8, 1.5), "mask": w * inside, "reject": inside.to(F64)}[kind]
    close(weights, expected)


def test_weights_stay_finite():
    far = torch.tensor([[1e4, -1e4], [1e4, 1e4]])
    for level in ("token", "sequence", "geometric"):
        weights = losses.importance_weights(far, torch.zeros(2, 2), torch.ones(2, 2), level=level, high=None)
        assert weights.isfinite().all()


# bad input

X, A, M = -torch.ones(2, 3), torch.ones(2), torch.ones(2, 3)
NAN_A = torch.tensor([1.0, math.nan])
PPO, GRPO = partial(losses.ppo_clip, X, X, A, M), partial(losses.grpo, X, X, A, M)
BAD = [
    (lambda: losses.ppo_clip(X, X[:, :2], A, M), r"old_logps: got shape \(2, 2\), expected \(2, 3\), the"),
    (lambda: losses.ppo_clip(X, X, torch.ones(3), M), r"advantages: got shape \(3,\), expected \(2,\), one per"),
    (lambda: losses.rloo(X, X, X, M), r"advantages: got shape \(2, 3\), expected \(2,\), one per answer$"),
    (lambda: losses.ppo_clip(X, X, A, M[:1]), r"mask: got shape \(1, 3\)"),
    (lambda: losses.ppo_clip(X[0], X[0], A, M[0]), r"logps: got shape \(3,\), expected \[B, T\]"),
    (lambda: losses.ppo_clip(X, X, NAN_A, M), "advantages: got nan at flat position 1, allowed are finite numbers"),
    (lambda: PPO(epsilon=0.0), r"epsilon: got 0.0, allowed are numbers in \(0, 1\]"),
    (lambda: PPO(epsilon=1.5), "epsilon: got 1.5"),
    (lambda: PPO(epsilon_high=-1.0), "epsilon_high: got -1.0"),
    (lambda: PPO(delta=1.1), r"delta: got 1.1, allowed are numbers > 1 \+ epsilon_high = 1.2"),
    (lambda: PPO(dual_clip=1.0), "dual_clip: got 1.0, allowed are numbers > 1"),
    (lambda: PPO(dual_clip=3.0, delta=3.0), "delta: got 3.0 with dual_clip=3.0"),
    (lambda: PPO(log_ratio_clamp=100.0), r"log_ratio_clamp: got 100.0, allowed are numbers in \(0, 80\], or None"),
    (lambda: losses.cispo(X, X, A, M), "cap: got cap=None and epsilon_high=None, expected exactly one"),
    (lambda: losses.cispo(X, X, A, M, cap=2.0, epsilon=0.2), "epsilon: got 0.2, used only with epsilon_high"),
    (lambda: losses.sapo(X, X, A, M, temperature_pos=0.0), "temperature_pos: got 0.0"),
    (lambda: losses.vespo(X, X, A, M, A), r"weights: got shape \(2,\), expected \(2, 3\) or \(2, 1\)"),
    (lambda: losses.clip_cov(X, X, A, M, clip_cov_lb=2.0, clip_cov_ub=1.0), "clip_cov_ub: got 1.0, allowed are"),
    (lambda: losses.kl_cov(X, X, A, M, kl_cov_ratio=0.0), "kl_cov_ratio: got 0.0"),
    (lambda: losses.value_loss(X, X, X, M, factor=0.0), "factor: got 0.0"),
    (lambda: losses.top_entropy_mask(X, M, 0.0), "quantile: got 0.0"),
    (lambda: GRPO(loss_type="dappo"), "loss_type: got 'dappo', allowed are .*; did you mean 'dapo'"),
    (lambda: GRPO(loss_type="sapo", epsilon=0.2), "epsilon: got 0.2, used only with loss_type .grpo."),
    (lambda: GRPO(loss_type="cispo", epsilon=0.2), "epsilon: got 0.2, used only with loss_type .grpo."),
    (lambda: GRPO(loss_type="vespo", epsilon_high=0.2), "epsilon_high: got 0.2, used only with"),
    (lambda: GRPO(loss_type="cispo", delta=2.0), "delta: got 2.0, used only with"),
    (lambda: GRPO(loss_type="vespo", importance_sampling_level="sequence"), "importance_sampling_level: got sequence"),
    (lambda: GRPO(importance_sampling_level="answer"), "importance_sampling_level: got 'answer', allowed are"),
    (lambda: GRPO(loss_type="gspo", importance_sampling_level="token"), "importance_sampling_level: got 'token'"),
    (lambda: GRPO(sapo_temperature_pos=1.0), "sapo_temperature_pos: got 1.0, not a setting of loss_type='grpo'"),
    (lambda: GRPO(beta=0.1), "ref_logps: got None with beta=0.1"),
    (lambda: losses.grpo(X, X, A, M, X), "ref_logps: got a tensor with beta=0"),
    (lambda: GRPO(beta=-0.1), "beta: got -0.1"),
    (lambda: GRPO(use_bias_correction_kl=False), "use_bias_correction_kl: got False, used only with beta > 0"),
    (lambda: GRPO(weights=A), r"weights: got shape \(2,\)"),
    (lambda: GRPO(loss_type="vespo", log_ratio_clamp=None), "log_ratio_clamp: got None, used only with beta > 0 or"),
    (lambda: losses.importance_weights(X, X, M, level="tokens"), "level: got 'tokens', .* did you mean 'token'"),
    (lambda: losses.importance_weights(X, X, M, kind="tis"), "kind: got 'tis', allowed are"),
    (lambda: losses.importance_weights(X, X, M, low=2.0, high=1.0), "high: got 1.0, allowed are numbers > 2.0"),
    (lambda: losses.off_policy_sequence_mask(X, X, A, M, threshold=0.0), "threshold: got 0.0"),
    (lambda: losses.policy_metrics(X, X, A, M, weights=X), "weights: got a tensor, used only with loss_type=.vespo"),
]


@pytest.mark.parametrize("call, message", BAD, ids=[message[:40] for _, message in BAD])
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_an_answer_without_tokens_contributes_nothing():
    """As documented: its advantage is not read, and no mean over tokens counts it."""
    mask = torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    logps = X.clone().requires_grad_()
    value = losses.grpo(logps, X, NAN_A, mask)
    assert not value[1].any() and torch.equal(aggregate(value, mask), aggregate(value[:1], mask[:1]))
