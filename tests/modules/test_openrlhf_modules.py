"""The modules with OpenRLHF's signatures against independent formulas."""

import inspect
import re

import pytest
import torch
from torch.nn.functional import logsigmoid

from fused_po import modules

B, T = 4, 6
FULL = torch.arange(T) < torch.tensor([6, 3, 5, 1])[:, None]
WITH_EMPTY = FULL & (torch.arange(B) != 3)[:, None]


def tokens(n: int = 3) -> list:
    """n similar tensors [B, T] with NaN at masked positions, which must not be read; the first requires grad."""
    base = -torch.rand(B, T) - 0.05
    values = [torch.where(FULL, base * (0.4 * torch.randn(B, T)).exp(), torch.nan) for _ in range(n)]
    return [values[0].requires_grad_(), *values[1:]]


def mean(values, mask, by_token):
    """The mean over tokens, or over non-empty sequences of their means over tokens."""
    values = torch.where(mask, values, 0)
    if by_token:
        return values.sum() / mask.sum()
    rows = mask.any(-1)
    return (values.sum(-1)[rows] / mask.sum(-1)[rows]).mean()


def compare(module, inputs, expected, leaf) -> None:
    result = module(*inputs)
    result = result if isinstance(result, tuple) else (result,)
    assert len(result) == len(expected)
    for i, (got, want) in enumerate(zip(result, expected)):
        assert (got is None) == (want is None)
        if got is not None:
            torch.testing.assert_close(got, want, msg=lambda m, i=i: f"result {i}: {m}")
            assert i == 0 or not got.requires_grad
    gradients = [torch.autograd.grad(value, leaf, retain_graph=True)[0] for value in (result[0], expected[0])]
    torch.testing.assert_close(gradients[0], torch.where(gradients[1].isnan(), 0, gradients[1]))


BANDS = [
    ("token", "mask", "ratio", (0.8, 1.25)),
    ("token", "clip", "ratio", (0.8, 1.25)),
    ("seq", "mask", "ratio", (0.9, 1.1)),
    *((level, "mask", kind, (-1.0, 0.05)) for level in ("token", "seq") for kind in ("binary_kl", "tv")),
]
NAMES = [f"is_correction_{word}" for word in ("level", "mode", "gating", "threshold")]
POLICY = [
    {},
    {"token_level_loss": False},
    {"clip_eps_low": 0.1, "clip_eps_high": 0.3},
    {"dual_clip": 1.5},
    {"policy_loss_type": "gspo", "clip_eps_low": 0.01, "clip_eps_high": 0.02},
    {"policy_loss_type": "gspo", "is_correction_level": "seq"},
    *(dict(zip(NAMES, band)) for band in BANDS),
]


def policy_oracle(how, logps, old, advantages, mask, rollout):
    how = dict(clip_eps_low=0.2, clip_eps_high=0.2, dual_clip=None, policy_loss_type="ppo") | how
    gspo, level = how["policy_loss_type"] == "gspo", how.get("is_correction_level")
    counts = mask.sum(-1, keepdim=True).clamp(min=1)
    base = rollout if gspo and level else old
    log_ratio = torch.where(mask, logps - base, 0)
    if gspo:
        log_ratio = (log_ratio.sum(-1, keepdim=True) / counts).expand(B, T)
    ratio, low, high = log_ratio.exp(), 1 - how["clip_eps_low"], 1 + how["clip_eps_high"]
    first, second = ratio * advantages, ratio.clamp(low, high) * advantages
    gain = torch.min(first, second)
    if how["dual_clip"]:
        gain = torch.where(advantages < 0, torch.max(gain, how["dual_clip"] * advantages), gain)
    loss, vllm_kl, filtered = -gain, None, None
    if level and not gspo:
        weight, filtered = correction_oracle(how, old, rollout, mask)
        loss, vllm_kl = loss * weight, mean(rollout - old, mask, True)
    by_token = how.get("token_level_loss", True) and not gspo
    clip_ratio = mean((second < first).float(), mask, True)
    return mean(loss, mask, by_token), clip_ratio, mean((old - logps).detach(), mask, True), vllm_kl, filtered


def correction_oracle(how, old, rollout, mask):
    """(weights, share outside the band), one sequence at a time."""
    least, most = how["is_correction_threshold"]
    weights, outside = torch.zeros(B, T), torch.zeros(B, T)
    for b in range(B):
        there, p, q = mask[b], rollout[b, mask[b]].exp(), old[b, mask[b]].exp()
        stat = {
            "ratio": (q / p).log(),
            "tv": (p - q).abs(),
            "binary_kl": p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log(),
        }[how["is_correction_gating"]]
        stat = stat.mean().expand_as(stat) if how["is_correction_level"] == "seq" else stat
        stat = stat.exp() if how["is_correction_gating"] == "ratio" else stat
        outside[b, there] = ((stat < least) | (stat > most)).float()
        weights[b, there] = (q / p).clamp(least, most) if how["is_correction_mode"] == "clip" else q / p
    if how["is_correction_mode"] == "mask":
        weights = weights * (1 - outside)
    by_token = how["is_correction_level"] == "token"
    return weights, mean(outside, mask, by_token)


@pytest.mark.parametrize("empty", (False, True))
@pytest.mark.parametrize("how", POLICY, ids=["-".join(map(str, how.values())) or "ppo" for how in POLICY])
def test_policy_loss(how, empty, seed):
    logps, old, rollout = tokens()
    mask, advantages = WITH_EMPTY if empty else FULL, torch.randn(B, T)
    expected = policy_oracle(how, logps, old, advantages, mask, rollout)
    compare(modules.PolicyLoss(**how), (logps, old, advantages, mask.long(), rollout), expected, logps)


@pytest.mark.parametrize("clip", (None, 0.2))
@pytest.mark.parametrize("by_token", (False, True))
def test_value_loss(clip, by_token, seed):
    values, old, returns = tokens()
    loss = (values - returns) ** 2
    if clip:
        loss = torch.max(loss, (old + (values - old).clamp(-clip, clip) - returns) ** 2)
    expected = (0.5 * mean(loss, FULL, by_token),)
    compare(modules.ValueLoss(clip, by_token), (values, old, returns, FULL), expected, values)


@pytest.mark.parametrize("by_token", (False, True))
def test_sft_loss(by_token, seed):
    (logps,) = tokens(1)
    compare(modules.SFTLoss(by_token), (logps, FULL), (mean(-logps, FULL, by_token),), logps)


@pytest.mark.parametrize("by_token", (False, True))
def test_ranks_and_micro_batches_add_up(by_token, seed):
    """Two ranks with the counts of the whole step: the mean over ranks equals the loss of all tokens."""
    logps, old, _ = tokens()
    advantages, module = torch.randn(B, T), modules.PolicyLoss(token_level_loss=by_token)
    whole = module(logps, old, advantages, WITH_EMPTY)[0]
    counts = dict(dp_size=2, batch_num_tokens=WITH_EMPTY.sum(), global_batch_size=torch.tensor(3.0))
    shares = [module(logps[r], old[r], advantages[r], WITH_EMPTY[r], **counts)[0] for r in (slice(0, 1), slice(1, 4))]
    torch.testing.assert_close(sum(shares) / 2, whole)


def test_no_mask_equals_a_mask_of_ones(seed):
    logps, old, advantages = torch.randn(3, B, T)
    module, ones = modules.PolicyLoss(), torch.ones(B, T)
    for got, want in zip(module(logps, old, advantages)[:3], module(logps, old, advantages, ones)[:3]):
        assert torch.equal(got, want)


def test_an_empty_mask_gives_a_differentiable_zero():
    logps = torch.zeros(B, T, requires_grad=True)
    loss, *metrics, _, _ = modules.PolicyLoss()(logps, logps.detach(), torch.ones(B, T), torch.zeros(B, T))
    loss.backward()
    assert loss.item() == 0 and not logps.grad.any() and [m.item() for m in metrics] == [0, 0]


@pytest.mark.parametrize("margin", (None, torch.tensor([0.5, 1.0, 0.0])))
def test_pair_wise_loss(margin, seed):
    chosen, rejected = torch.randn(3, requires_grad=True), torch.randn(3)
    expected = -torch.sigmoid(chosen - rejected - (0 if margin is None else margin)).log().mean()
    compare(modules.PairWiseLoss(), (chosen, rejected, margin), (expected,), chosen)


def test_log_exp_loss(seed):
    chosen, rejected = torch.randn(3, requires_grad=True), torch.randn(3)
    compare(modules.LogExpLoss(), (chosen, rejected), ((1 + (rejected - chosen).exp()).log().mean(),), chosen)
    assert modules.LogExpLoss()(torch.zeros(1), torch.tensor([1e4])).item() == 1e4


@pytest.mark.parametrize("how", ({"label_smoothing": 0.1}, {"ipo": True}))
def test_dpo_loss(how, seed):
    chosen, rejected, ref_chosen, ref_rejected = (torch.randn(5) for _ in range(4))
    chosen.requires_grad_()
    h = 0.2 * (chosen - rejected - ref_chosen + ref_rejected)
    loss = (h / 0.2 - 1 / 0.4) ** 2 if "ipo" in how else -0.9 * logsigmoid(h) - 0.1 * logsigmoid(-h)
    expected = loss.mean(), 0.2 * (chosen - ref_chosen).detach(), 0.2 * (rejected - ref_rejected)
    compare(modules.DPOLoss(0.2, **how), (chosen, rejected, ref_chosen, ref_rejected), expected, chosen)


def test_gpt_lm_loss(seed):
    logits, labels = torch.randn(2, 5, 7, requires_grad=True), torch.randint(0, 7, (2, 5))
    labels[0, :3] = -100
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    compare(modules.GPTLMLoss(), (logits, labels), (expected,), logits)
    assert modules.GPTLMLoss()(logits, torch.full((2, 5), -100)).item() == 0


# name -> (constructor, forward) arguments of OpenRLHF's openrlhf/models/loss.py, version 0.11.2
COUNTS = "dp_size=1, batch_num_tokens=None, global_batch_size=None"
SIGNATURES = {
    "PolicyLoss": (
        "clip_eps_low=0.2, clip_eps_high=0.2, dual_clip=None, token_level_loss=True, policy_loss_type=ppo, "
        "is_correction_level=off, is_correction_mode=mask, is_correction_gating=ratio, "
        "is_correction_threshold=(0.5, 5.0)",
        f"log_probs, old_log_probs, advantages, action_mask=None, rollout_log_probs=None, {COUNTS}",
    ),
    "ValueLoss": ("clip_eps=None, token_level_loss=True", f"values, old_values, returns, action_mask=None, {COUNTS}"),
    "SFTLoss": ("token_level_loss=True", f"per_token_logps, loss_mask, {COUNTS}"),
    "GPTLMLoss": ("ring_attn_group=None", "logits, labels"),
    "PairWiseLoss": ("", "chosen_reward, reject_reward, margin=None"),
    "LogExpLoss": ("", "chosen_reward, reject_reward, margin=None"),
    "DPOLoss": (
        "beta, label_smoothing=0.0, ipo=False",
        "policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps",
    ),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name):
    def written(function) -> str:
        given = [p for n, p in inspect.signature(function).parameters.items() if n not in ("self", "args", "kwargs")]
        return ", ".join(p.name if p.default is p.empty else f"{p.name}={p.default}" for p in given)

    cls = getattr(modules, name)
    assert (written(cls.__init__), written(cls.forward)) == SIGNATURES[name]


ZEROS, TOKENS = torch.zeros(2), torch.zeros(2, 3)
BAD = [
    (lambda: modules.PolicyLoss(policy_loss_type="grpo"), "policy_loss_type: got 'grpo', allowed are 'ppo', 'gspo'"),
    (lambda: modules.PolicyLoss(dual_clip=0.9), "dual_clip: got 0.9"),
    (lambda: modules.PolicyLoss(is_correction_gating="tv"), "is_correction_gating: got tv, used only with"),
    (
        lambda: modules.PolicyLoss(is_correction_level="seq", is_correction_mode="clip"),
        "is_correction_mode: got clip, used only with",
    ),
    (
        lambda: modules.PolicyLoss(is_correction_level="seq", is_correction_gating="tv"),
        "is_correction_threshold: got (0.5, 5.0), expected (low, high) with low <= 0",
    ),
    (lambda: modules.PolicyLoss(is_correction_threshold=(1.0,)), "is_correction_threshold: got (1.0,), expected (low"),
    (
        lambda: modules.PolicyLoss(policy_loss_type="gspo", is_correction_level="token")(TOKENS, TOKENS, TOKENS),
        "rollout_log_probs: got None with is_correction_level='token'",
    ),
    (lambda: modules.PolicyLoss()(TOKENS, TOKENS, TOKENS, dp_size=2), "batch_num_tokens: got None, expected"),
    (lambda: modules.PolicyLoss()(TOKENS, TOKENS[0], TOKENS), "old_log_probs: got shape"),
    (lambda: modules.PolicyLoss()(TOKENS, TOKENS, TOKENS, ZEROS), "action_mask: got shape"),
    (lambda: modules.ValueLoss(token_level_loss=False)(TOKENS, TOKENS, TOKENS, dp_size=2), "global_batch_size: got"),
    (lambda: modules.ValueLoss(-1.0), "clip_eps: got -1.0"),
    (lambda: modules.GPTLMLoss(object()), "ring_attn_group: got a group, allowed is None"),
    (lambda: modules.LogExpLoss()(ZEROS, ZEROS, ZEROS), "margin: LogExpLoss does not use it, expected None"),
    (lambda: modules.DPOLoss(0.1, 0.1, True), "label_smoothing: got 0.1, used only with ipo=False"),
]


@pytest.mark.parametrize("call, message", BAD, ids=[row[1][:30] for row in BAD])
def test_bad_call(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
