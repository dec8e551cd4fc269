"""Pairwise losses: TRL's code, DPO's gradient and optimum, WPO, metrics, bugs of other libraries, bad input."""

import math
from types import SimpleNamespace

import pytest
import torch
from trl_source import ast, branch, execute, function, trainer
from zoo import F64

import fused_po
from fused_po import losses

B, T = 4, 6


def batch():
    """Per-token log-probs [2B, T] of policy and reference, and a mask: answers of several lengths after prompts."""
    lengths = torch.randint(1, T, (2 * B,))
    at = torch.arange(T)
    mask = (at >= 1) & (at < 1 + lengths[:, None])
    logps, ref_logps = (torch.where(mask, -torch.rand(2 * B, T, dtype=F64), 0) for _ in range(2))
    return logps, ref_logps, mask


TRL_NAMES = sorted(losses.named.PREFERENCE_LOSSES)
DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")


def trl_dpo(name, logps, ref_logps, mask, beta, smoothing, divergence):
    """The per-pair loss, computed by the branches of TRL's DPO trainer; its completion_mask has one column more."""
    body = function(trainer("trainer/dpo_trainer.py"), "_compute_loss")
    chosen, rejected = logps.sum(-1).chunk(2)
    ref_chosen, ref_rejected = ref_logps.sum(-1).chunk(2)
    ratios = chosen - ref_chosen, rejected - ref_rejected
    scores = [losses.f_divergence_score(r, divergence=divergence) for r in ratios]
    settings = SimpleNamespace(beta=beta, label_smoothing=smoothing, args=SimpleNamespace(discopop_tau=0.05))
    return execute(
        branch(body, name),
        self=settings,
        device="cpu",
        chosen_logps=chosen,
        rejected_logps=rejected,
        ref_chosen_logps=ref_chosen,
        ref_rejected_logps=ref_rejected,
        chosen_logratios=ratios[0],
        rejected_logratios=ratios[1],
        chosen_scores=scores[0],
        rejected_scores=scores[1],
        delta_score=scores[0] - scores[1],
        per_token_logps=logps,
        completion_mask=mask,
        shift_completion_mask=mask,
    ).per_sequence_loss


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("name", TRL_NAMES)
def test_trl_agrees_in_value_and_gradient(name, divergence, seed):
    if divergence != "reverse_kl" and name not in losses.named.OF_DIFFERENCES:
        with pytest.raises(ValueError, match="f_divergence"):
            losses.preference_loss(*torch.rand(4, B), loss_type=name, f_divergence=divergence)
        return
    logps, ref_logps, mask = batch()
    smoothing = 0.1 if name in ("exo_pair", "robust", "aot", "aot_unpaired") else 0.0
    gradients = []
    for ours in (True, False):
        x = logps.clone().requires_grad_()
        if ours:
            lengths = mask.sum(-1).chunk(2)
            how = dict(chosen_length=lengths[0], rejected_length=lengths[1], f_divergence=divergence)
            sums = [v for t in (x, ref_logps) for v in fused_po.sequence_logps(t, mask).chunk(2)]
            loss = losses.preference_loss(*sums, loss_type=name, beta=0.3, label_smoothing=smoothing, **how)
        else:
            loss = trl_dpo(name, x, ref_logps, mask, 0.3, smoothing, divergence)
        loss.mean().backward()
        gradients.append((loss.mean().detach(), x.grad * mask))  # TRL sums the masked zeros too
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name, alpha", [("sigmoid", 0.0), ("hinge", 0.0), ("ipo", 0.0), ("simpo", 0), ("simpo", 0.25)])
def test_trls_cpo_agrees(name, alpha, seed):
    method = function(trainer("experimental/cpo/cpo_trainer.py"), "cpo_loss")
    body = [s for s in method.body if not isinstance(s, ast.Return)]
    how = dict(beta=0.4, simpo_gamma=0.3, label_smoothing=0.0, loss_type=name)
    settings = SimpleNamespace(alpha=alpha, accelerator=SimpleNamespace(device="cpu"), **how)
    chosen, rejected = -torch.rand(2, B, dtype=F64) * 4
    theirs = execute(body, self=settings, policy_chosen_logps=chosen, policy_rejected_logps=rejected).losses
    gamma = {"simpo_gamma": 0.3} if name == "simpo" else {}
    torch.testing.assert_close(losses.cpo(chosen, rejected, beta=0.4, loss_type=name, alpha=alpha, **gamma), theirs)


@pytest.mark.parametrize("name", losses.reference_free.TPO_LOSSES)
def test_trls_tpo_agrees(name, seed):
    body = function(trainer("experimental/tpo/tpo_trainer.py"), "_compute_loss")
    chosen, rejected = -torch.rand(2, B, dtype=F64) * 4
    settings = SimpleNamespace(beta=0.4, tpo_l_gamma=0.5, label_smoothing=0.0)
    theirs = execute(branch(body, name), self=settings, delta_score=chosen - rejected).per_sequence_loss
    torch.testing.assert_close(losses.tpo(chosen, rejected, beta=0.4, loss_type=name), theirs)


def test_dpos_gradient_is_the_papers(seed):
    """-beta s(r_l - r_w) (grad log pi(y_w) - grad log pi(y_l)), in the parameters of a softmax policy over answers."""
    theta, ref = torch.randn(5, dtype=F64, requires_grad=True), torch.randn(5, dtype=F64).log_softmax(-1)
    logp = theta.log_softmax(-1)
    w, l, beta = 1, 3, 0.7
    losses.dpo(logp[[w]], logp[[l]], ref[[w]], ref[[l]], beta=beta).sum().backward()
    onehot, p = torch.eye(5, dtype=F64), logp.detach().exp()
    r_w, r_l = (beta * (logp.detach()[y] - ref[y]) for y in (w, l))
    expected = -beta * torch.sigmoid(r_l - r_w) * ((onehot[w] - p) - (onehot[l] - p))
    torch.testing.assert_close(theta.grad, expected)


@pytest.mark.parametrize("beta", (0.1, 1.0))
def test_dpos_optimum_is_the_tilted_reference(beta):
    """Two answers with rewards r and Bradley-Terry preferences: the minimum is pi_ref exp(r / beta) / Z."""
    rewards, ref = torch.tensor([0.3, -0.2], dtype=F64), torch.tensor([0.4, 0.6], dtype=F64).log()
    p = torch.sigmoid(rewards[0] - rewards[1])
    theta = torch.zeros(1, dtype=F64, requires_grad=True)
    optimiser = torch.optim.LBFGS([theta], max_iter=200, tolerance_grad=1e-14, tolerance_change=1e-16)

    def closure():
        optimiser.zero_grad()
        logp = torch.stack([torch.nn.functional.logsigmoid(theta[0]), torch.nn.functional.logsigmoid(-theta[0])])
        two, swapped = [0, 1], [1, 0]
        each = losses.dpo(logp[two], logp[swapped], ref[two], ref[swapped], beta=beta)
        loss = p * each[0] + (1 - p) * each[1]
        loss.backward()
        return loss

    for _ in range(5):
        optimiser.step(closure)
    expected = (ref + rewards / beta).softmax(-1)
    torch.testing.assert_close(torch.sigmoid(theta.detach())[0], expected[0], rtol=1e-9, atol=1e-12)


def test_sigmoid_reads_label_smoothing(seed):
    """Other libraries had this bug: loss_type="sigmoid" silently ignores label_smoothing."""
    four = torch.randn(4, B, dtype=F64)
    smoothed = losses.preference_loss(*four, loss_type="sigmoid", label_smoothing=0.2)
    torch.testing.assert_close(smoothed, losses.dpo(*four, label_smoothing=0.2))
    assert (smoothed - losses.dpo(*four)).abs().min() > 1e-4
    for name in ("hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "discopop"):
        lengths = torch.ones(B), torch.ones(B)
        with pytest.raises(ValueError, match=r"label_smoothing: got 0.2, used only with loss_type .*; leave it"):
            losses.preference_loss(
                *four, loss_type=name, label_smoothing=0.2, chosen_length=lengths[0], rejected_length=lengths[1]
            )


def test_ipo_by_name_requires_token_counts(seed):
    """Other libraries had this bug: IPO of sums instead of means. By TRL's name, missing token counts are an error."""
    four = torch.randn(4, B, dtype=F64)
    with pytest.raises(ValueError, match=r"chosen_length, rejected_length: got None.*ipo"):
        losses.preference_loss(*four, loss_type="ipo")
    lengths = dict(chosen_length=torch.tensor([2, 3, 4, 5]), rejected_length=torch.tensor([5, 1, 2, 2]))
    c, r, rc, rr = four
    means = (c - rc) / lengths["chosen_length"] - (r - rr) / lengths["rejected_length"]
    torch.testing.assert_close(losses.preference_loss(*four, loss_type="ipo", **lengths), (means - 5) ** 2)


def test_wpo_weights(seed):
    logps, sums, mask = batch()
    weights = losses.wpo_weights(logps.requires_grad_(), mask, sums.nan_to_num() + torch.where(mask, 0, torch.nan))
    aligned = [((row - other)[m]).mean() for row, other, m in zip(logps.detach(), sums, mask)]
    expected = torch.stack([(aligned[i] + aligned[i + B]).exp() for i in range(B)])
    torch.testing.assert_close(weights, expected)
    assert not weights.requires_grad
    empty = losses.wpo_weights(logps, torch.zeros_like(mask))
    assert torch.equal(empty, torch.ones(B, dtype=F64))


def test_metrics(seed):
    four = torch.randn(4, B, dtype=F64, requires_grad=True)
    found = losses.preference_metrics(*four, beta=0.5)
    c, r, rc, rr = four.detach()
    expected = {
        "rewards/chosen": 0.5 * (c - rc).mean(),
        "rewards/rejected": 0.5 * (r - rr).mean(),
        "rewards/accuracies": ((c - rc) > (r - rr)).double().mean(),
        "rewards/margins": 0.5 * (c - rc - r + rr).mean(),
        "logps/chosen": c.mean(),
        "logps/rejected": r.mean(),
    }
    assert list(found) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
        assert found[name].ndim == 0 and not found[name].requires_grad
    kl, mask = torch.tensor([[1.0, 3.0, torch.nan]]), torch.tensor([[True, True, False]])
    assert losses.token_metrics(mask, kl=kl) == {"kl": torch.tensor(2.0)}
    nothing = losses.token_metrics(torch.zeros_like(mask), kl=kl, entropy=kl)
    assert nothing == {"kl": torch.tensor(0.0), "entropy": torch.tensor(0.0)}
    chosen, rejected = torch.tensor([math.log(0.5)], dtype=F64), torch.tensor([math.log(0.25)], dtype=F64)
    odds = losses.odds_ratio_metrics(chosen, rejected)
    assert odds["log_odds_chosen"].item() == pytest.approx(math.log(3))  # odds 1 and 1/3
    assert odds["log_odds_ratio"].item() == pytest.approx(math.log(3 / 4))


def pairs(n=B):
    return [torch.randn(n) for _ in range(4)]


BAD = [
    (lambda: losses.dpo(*pairs()[:3], torch.randn(B + 1)), r"ref_rejected: got shape \(5,\), expected \(4,\)"),
    (lambda: losses.dpo(1.0, *pairs()[:3]), "chosen: got float, expected a torch.Tensor"),
    (lambda: losses.dpo(*pairs(), beta=0.0), "beta: got 0.0, allowed are finite numbers > 0"),
    (lambda: losses.dpo(*pairs(), beta=-torch.ones(B)), "beta: got a tensor with -1.0, allowed are finite numbers > 0"),
    (lambda: losses.dpo(*pairs(), beta=torch.ones(B + 1)), r"beta: got shape \(5,\)"),
    (lambda: losses.dpo(*pairs(), label_smoothing=0.5), "label_smoothing: got 0.5, allowed are 0 <= label"),
    (lambda: losses.dpo(*pairs(), margin=math.nan), "margin: got nan"),
    (lambda: losses.exo_pair(*pairs(), label_smoothing=0.0), "label_smoothing: got 0.0, allowed are 0 < label"),
    (lambda: losses.discopop(*pairs(), tau=1.5), "tau: got 1.5, allowed are 0 < tau <= 1"),
    (lambda: losses.ipo(*pairs(), chosen_length=torch.ones(B)), "chosen_length, rejected_length: got None; pass both"),
    (lambda: losses.ipo(*pairs(), chosen_length=torch.ones(3), rejected_length=torch.ones(B)), "chosen_length: got"),
    (lambda: losses.preference_loss(*pairs(), loss_type="sigmod"), "loss_type: got 'sigmod'.*did you mean 'sigmoid'"),
    (lambda: losses.preference_loss(*pairs(), loss_type=[]), "loss_type: got an empty list"),
    (lambda: losses.preference_loss(*pairs(), loss_weights=[1, 2]), "loss_weights: got length 2, expected 1"),
    (lambda: losses.preference_loss(*pairs(), f_divergence="kl"), "f_divergence: got 'kl'"),
    (lambda: losses.preference_loss(*pairs(), f_alpha=0.3), 'f_alpha: got 0.3, used only with f_divergence="alpha'),
    (lambda: losses.preference_loss(*pairs(), discopop_tau=0.3), "discopop_tau: got 0.3, used only with"),
    (lambda: losses.cpo(*pairs()[:2], loss_type="hinge", label_smoothing=0.1), "label_smoothing: got 0.1"),
    (lambda: losses.cpo(*pairs()[:2], simpo_gamma=0.3), "simpo_gamma: got 0.3, used only with"),
    (lambda: losses.cpo(*pairs()[:2], loss_type="alphapo"), "alpha: got 0"),
    (lambda: losses.tpo(*pairs()[:2], gamma=0.3), "gamma: got 0.3, used only with"),
    (lambda: losses.tpo(*pairs()[:2], alpha=0.3), "alpha: got 0.3, used only with gold"),
    (lambda: losses.simpo(*pairs()[:2], gamma=-1.0), "gamma: got -1.0"),
    (lambda: losses.orpo(*pairs()[:2], beta=0.0), "beta: got 0.0"),
    (lambda: losses.sft(pairs()[0], torch.ones(3)), r"mask: got shape \(3,\), expected \(4,\), the shape of logps"),
    (lambda: losses.wpo_weights(torch.zeros(3, 2), torch.ones(3, 2)), r"logps: got shape \(3, 2\), expected \[2B, T\]"),
    (lambda: losses.tdpo(*pairs(), pairs()[0], torch.randn(3)), r"rejected_kl: got shape \(3,\)"),
]


@pytest.mark.parametrize("call, message", BAD)
def test_bad_input(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()


def test_losses_compile_to_one_graph(seed):
    """Checks of values cause no graph breaks."""
    four = [torch.randn(B, requires_grad=i < 2) for i in range(4)]

    def loss(c, r, rc, rr):
        both = losses.preference_loss(c, r, rc, rr, loss_type=["sigmoid", "apo_zero"], beta=torch.full((B,), 0.2))
        return both.mean() + losses.kl_loss(c, rc, "k2").mean()

    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*four), loss(*four))
