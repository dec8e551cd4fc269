"""Policy losses and metrics against TRL's code, run from its source; metrics of batches that TRL does not accept."""

import ast
import functools
import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
import trl_source
from test_policy import F64, batch, close, gradient
from trl_source import compared_names, execute, trainer

from fused_po import losses
from fused_po.losses import GRPO_MODES
from fused_po.reduce import aggregate

function = functools.cache(trl_source.function)  # parsing TRL's file takes a second


def run_trl(path: str, method: str, first: str, **names) -> SimpleNamespace:
    """The statements of a TRL method from the assignment to `first` on, without the return."""
    body = function(trainer(path), method).body
    assigned = [isinstance(s, ast.Assign) and getattr(s.targets[0], "id", "") == first for s in body]
    assert any(assigned), f"{method} does not assign {first} any more"
    return execute([s for s in body[assigned.index(True) :] if not isinstance(s, ast.Return)], math=math, **names)


def trl_self(**settings):
    """A stand-in for a trainer in training on one process, with the attributes that a loss reads."""
    metrics = {"train": defaultdict(list)}
    gamma = execute([function(trainer("trainer/grpo_trainer.py"), "get_gamma_weights")], math=math).get_gamma_weights
    args = dict(
        delta=None,
        use_bias_correction_kl=True,
        sapo_temperature_pos=1.0,
        sapo_temperature_neg=1.05,
        vespo_k_pos=2.0,
        vespo_lambda_pos=3.0,
        vespo_k_neg=3.0,
        vespo_lambda_neg=2.0,
        steps_per_generation=1,
    )
    own = dict(
        importance_sampling_level="token",
        loss_type="grpo",
        beta=0.0,
        epsilon_low=0.2,
        epsilon_high=0.2,
        off_policy_mask_threshold=None,
        use_vllm=False,
        vllm_importance_sampling_correction=False,
        current_gradient_accumulation_steps=1,
        max_completion_length=7,
        _entropy_bonus_enabled=False,
        aux_loss_enabled=False,
        _metrics=metrics,
        get_gamma_weights=gamma,
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(
            num_processes=1, gather=lambda v: v, reduce=lambda v, reduction: v, sync_gradients=True
        ),
    )
    args |= {k: v for k, v in settings.items() if k in args}
    own |= {k: v for k, v in settings.items() if k in own}
    assert set(settings) <= set(args) | set(own)
    return SimpleNamespace(args=SimpleNamespace(**args), **own)


def trl_grpo(settings, logps, old, advantages, mask, ref, entropy, weights, path="trainer/grpo_trainer.py"):
    """(TRL's loss, its metrics) of a batch without NaN."""
    trainer_self = trl_self(**settings)
    inputs = {"ref_per_token_logps": ref, "num_items_in_batch": mask.sum().to(F64)}
    if weights is not None:
        inputs["importance_sampling_ratio"] = weights
        trainer_self.use_vllm = trainer_self.vllm_importance_sampling_correction = True
    done = run_trl(
        path,
        "_compute_loss",
        "log_ratio",
        self=trainer_self,
        inputs=inputs,
        per_token_logps=logps,
        old_per_token_logps=old,
        mask=mask.to(F64),
        advantages=advantages if "gmpo" in path else advantages[:, None],
        entropies=entropy,
        entropy_mask=None,
        nanmin=lambda v: v[~v.isnan()].min(),
        nanmax=lambda v: v[~v.isnan()].max(),
    )
    return done.loss, {name: v[0] for name, v in trainer_self._metrics["train"].items()}


def whole_batch():
    """A batch without NaN and empty answers, which TRL does not accept."""
    mask = torch.rand(5, 7) > 0.3
    mask[:, 0] = True
    logps = -2 * torch.rand(5, 7, dtype=F64)
    old, ref = (logps + 0.5 * torch.randn(5, 7, dtype=F64) for _ in range(2))
    return logps.requires_grad_(), old.detach(), torch.randn(5, dtype=F64), mask, ref.detach()


def trl_names() -> list:
    return sorted(compared_names(function(trainer("trainer/grpo_trainer.py"), "_compute_loss")))


CASES = {
    "plain": {},
    "sequence": {"importance_sampling_level": "sequence"},
    "KL": {"beta": 0.1},
    "plain KL": {"beta": 0.1, "use_bias_correction_kl": False},
    "sequence, KL": {"beta": 0.1, "importance_sampling_level": "sequence"},
    "delta": {"delta": 1.7},
    "weights": {"weights": True, "beta": 0.1},
    "shapes": {"sapo_temperature_pos": 2.0, "sapo_temperature_neg": 0.5, "vespo_k_pos": 1.0, "vespo_lambda_neg": 1.5},
}


@pytest.mark.parametrize("case", CASES)
def test_trls_grpo_trainer_gives_the_same_loss_gradient_and_metrics(case, seed):
    names = trl_names()
    assert names, "TRL now distinguishes its losses differently"
    for name in names:
        settings = dict(CASES[case])
        if case == "shapes":
            settings = {k: v for k, v in settings.items() if k.startswith(name)}
        weighted = settings.pop("weights", False)
        clipped = name in ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
        if (case == "delta" and not clipped) or ("importance_sampling_level" in settings and name == "vespo"):
            continue  # ours refuses them; TRL ignores the first, and ignores the second in part
        if name == "sapo":
            settings.setdefault("sapo_temperature_neg", 1.25)  # TRL rounds 1.05 to fp32
        ends = {"epsilon": 0.2, "epsilon_high": 0.3} if clipped else {"epsilon_high": 1.2} if name == "cispo" else {}
        theirs = {"loss_type": name, "epsilon_high": ends.get("epsilon_high", 0.2), **settings}
        ours = {"loss_type": name, **ends, **settings}
        if name == "luspo":
            ours.setdefault("importance_sampling_level", "token")  # TRL's default
        logps, old, advantages, mask, ref = whole_batch()
        entropy = torch.rand(5, 7, dtype=F64)
        weights = torch.where(mask, torch.rand(5, 7, dtype=F64) + 0.5, 1) if weighted else None
        expected, metrics = trl_grpo(theirs, logps, old, advantages, mask, ref, entropy, weights)
        with_ref = ref if "beta" in settings else None
        tokens = losses.grpo(logps, old, advantages, mask, with_ref, weights=weights, **ours)
        length = {"max_length": 7} if name == "dr_grpo" else {}
        loss = aggregate(tokens, mask, GRPO_MODES[name], **length)
        close(loss, expected)
        close(gradient(loss, logps), gradient(expected, logps))
        measured = {k: v for k, v in ours.items() if k not in ("beta", "delta")}
        if name == "vespo":
            measured["weights"] = weights
        of_ours = losses.policy_metrics(logps, old, advantages, mask, with_ref, entropy, **measured)
        for key, value in metrics.items():
            assert float(of_ours[key]) == pytest.approx(value, rel=1e-6), f"{name}: {key}"
        assert set(of_ours) == {*metrics, "approx_kl"}
        assert not any(v.requires_grad for v in of_ours.values())


@pytest.mark.parametrize("beta", (0.0, 0.1))
def test_trls_gmpo_trainer_agrees(beta, seed):
    logps, old, advantages, mask, ref = whole_batch()
    entropy = torch.rand(5, 7, dtype=F64)
    theirs = {"beta": beta, "epsilon_low": 0.2, "epsilon_high": 0.3}
    path = "experimental/gmpo/gmpo_trainer.py"
    expected, metrics = trl_grpo(theirs, logps, old, advantages, mask, ref, entropy, None, path)
    with_kl = {"beta": beta, "use_bias_correction_kl": False} if beta else {}
    ends = {"loss_type": "gmpo", "epsilon": 0.2, "epsilon_high": 0.3}
    tokens = losses.grpo(logps, old, advantages, mask, ref if beta else None, **ends, **with_kl)
    loss = aggregate(tokens, mask, GRPO_MODES["gmpo"])
    close(loss, expected)
    close(gradient(loss, logps), gradient(expected, logps))
    with_kl.pop("beta", None)
    ours = losses.policy_metrics(logps, old, advantages, mask, ref if beta else None, entropy, **ends, **with_kl)
    for key, value in metrics.items():
        assert float(ours[key]) == pytest.approx(value, rel=1e-6), key


def test_trls_rloo_trainer_agrees(seed):
    logps, old, advantages, mask, _ = whole_batch()
    body = function(trainer("trainer/rloo_trainer.py"), "_compute_loss").body
    names = [getattr(s.targets[0], "id", "") if isinstance(s, ast.Assign) else "" for s in body]
    part = body[names.index("log_ratio") : names.index("loss") + 1]
    part = [s for s in part if "inputs" not in ast.unparse(s)]
    wide = SimpleNamespace(epsilon_low=0.4, epsilon_high=0.6)
    sums = ((v * mask).sum(1) for v in (logps, old))
    expected = execute(part, self=wide, **dict(zip(("logps", "old_logps"), sums)), advantages=advantages).loss
    tokens = losses.rloo(logps, old, advantages, mask, epsilon=0.4, epsilon_high=0.6)
    loss = aggregate(tokens, mask, "seq-mean-token-mean")
    close(loss, expected)
    close(gradient(loss, logps), gradient(expected, logps))


@pytest.mark.parametrize("mode", ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"))
def test_trls_importance_sampling_modes(mode, seed):
    generate = function(trainer("trainer/grpo_trainer.py"), "_generate_and_score_completions")
    found = [
        node
        for node in ast.walk(generate)
        if isinstance(node, ast.If)
        and any("sequence_level_is =" in ast.unparse(s) for s in node.body)
        and all(not isinstance(s, ast.With) for s in node.body)
    ]
    assert len(found) == 1, "TRL now computes its weights differently"
    logps, old, _, mask, _ = whole_batch()
    old[0, 0] = math.nan  # tokens that the sampler did not score
    settings = {"mode": mode, "clip_min": 0.6, "clip_max": 1.5}
    done = execute(
        found[0].body,
        math=math,
        completion_mask=mask.to(F64),
        tool_mask=None,
        old_per_token_logps=logps.detach(),
        sampling_per_token_logps=old,
        self=SimpleNamespace(**{f"vllm_importance_sampling_{k}": v for k, v in settings.items()}),
    )
    level, kind = mode.split("_")
    how = dict(level=level, kind=kind, low=0.6, high=1.5)
    ours = losses.importance_weights(logps, old, mask, **how, allow_missing=True)
    close(ours, done.vllm_importance_sampling_ratio.expand(5, 7) * mask)
    with pytest.raises(ValueError, match="sampler_logps: got nan at flat position 0"):
        losses.importance_weights(logps, old, mask, **how)


@pytest.mark.parametrize("per_token", (False, True))
def test_trls_off_policy_mask(per_token, seed):
    theirs = execute([function(trainer("trainer/grpo_trainer.py"), "get_off_policy_mask")]).get_off_policy_mask
    logps, old, advantages, mask, _ = whole_batch()
    old[0, 0] = math.nan
    advantages = torch.randn(5, 7, dtype=F64) if per_token else advantages
    wide = advantages if per_token else advantages[:, None]
    expected = theirs(wide, logps, old, mask.to(F64), 0.05).bool() & mask
    ours = losses.off_policy_sequence_mask(logps, old, advantages, mask, threshold=0.05, allow_missing=True)
    assert torch.equal(ours, expected)


def test_trls_high_entropy_mask(seed):
    theirs = execute([function(trainer("trainer/grpo_trainer.py"), "get_high_entropy_mask")]).get_high_entropy_mask
    entropy, mask = torch.rand(5, 7), torch.rand(5, 7) > 0.3
    one = SimpleNamespace(accelerator=SimpleNamespace(pad_across_processes=lambda v, **_: v, gather=lambda v: v))
    for quantile in (0.1, 0.2, 0.9):
        expected = theirs(one, entropy, mask.float(), 1 - quantile)
        assert torch.equal(losses.top_entropy_mask(entropy, mask, quantile), expected)


def test_metrics_of_empty_answers(seed):
    logps, old, advantages, mask, ref = batch(apart=2.0)
    metrics = losses.policy_metrics(logps, old, advantages, mask, ref, logps, epsilon=0.1)
    assert all(v.isfinite() and v.shape == () for v in metrics.values())
    rho = (logps.detach() - old).exp()
    low = (rho < 0.9) & (advantages < 0)[:, None] & mask
    shares = [float(row[m].double().mean()) for row, m in zip(low, mask) if m.any()]
    assert float(metrics["clip_ratio/low_min"]) == pytest.approx(min(shares))
    assert float(metrics["clip_ratio/low_mean"]) == pytest.approx(float(low[mask].double().mean()))
    assert float(metrics["approx_kl"]) == pytest.approx(float((rho - 1 - rho.log())[mask].mean()))
    nothing = losses.policy_metrics(logps, old, advantages, mask & False)
    assert not any(float(v) for v in nothing.values())
