"""Sequence losses refuse per-token log-probs, and the error names the function that sums them."""

import public_calls
import pytest
import torch
from public_calls import B, T, normal
from torch import Tensor

from fused_po import losses, modules, sequence_logps

LOGPS = {  # the arguments that have one number per sequence
    "chosen", "rejected", "ref_chosen", "ref_rejected", "gold", "logps", "ref_logps", "kl_logps", "ref_kl_logps",
    "chosen_kl", "rejected_kl", "ref_chosen_kl", "ref_rejected_kl", "policy_chosen_logps", "policy_rejected_logps",
    "reference_chosen_logps", "reference_rejected_logps", "desirable", "kl",
}  # fmt: skip
OF_SEQUENCES = {
    *("alphapo", "aot", "aot_unpaired", "apo_down", "apo_zero", "apo_zero_unpaired", "bco", "bco_pair", "cpo"),
    *("diffusion_dpo", "discopop", "dpo", "dpop", "exo_pair", "hinge", "ipo", "kto", "kto_kl", "log_odds_ratio"),
    *("nca_pair", "odds_ratio_metrics", "orpo", "preference_loss", "preference_metrics", "robust_dpo", "rpo"),
    *("sigmoid_norm", "simpo", "sppo_hard", "tdpo", "tpo", "unpaired_metrics", "DPOLoss.forward"),
}
TARGETS = [target for target in public_calls.targets() if target.name in OF_SEQUENCES]


def test_every_sequence_loss_is_tested():
    assert {target.name for target in TARGETS} == OF_SEQUENCES
    takes = {
        target.name
        for target in public_calls.targets()
        if {"chosen", "rejected"} <= {*target.arguments} or {"logps", "desirable"} <= {*target.arguments}
    }
    assert takes <= OF_SEQUENCES


def with_tokens(target: public_calls.Target, shape: tuple[int, ...]) -> dict:
    """A good call's arguments with the sequence arguments in another shape; every reference is given."""
    given = {n: normal(B) for n in ("ref_chosen", "ref_rejected", "ref_logps") if n in target.arguments} | target.good
    found = {}
    for name, value in given.items():
        of_sequences = isinstance(value, Tensor) and value.shape == (B,)
        found[name] = value.reshape(B, *[1] * (len(shape) - 1)).expand(shape) if of_sequences else value
    return found


@pytest.mark.parametrize("shape", [(B, T), (B, 1), (B, T, 2), (0, T)], ids=str)
@pytest.mark.parametrize("target", TARGETS, ids=[target.name for target in TARGETS])
def test_tokens_are_refused(target, shape):
    given = with_tokens(target, (B, *shape[1:]))
    if shape[0] == 0:
        given = {name: v[:0] if isinstance(v, Tensor) and v.ndim else v for name, v in given.items()}
    with pytest.raises(ValueError, match=r"^\w+: got shape .*expected \[B\], .*sequence_logps") as caught:
        target.call(**given)
    assert str(caught.value).partition(":")[0] in LOGPS & {*target.arguments}


@pytest.mark.parametrize("target", TARGETS, ids=[target.name for target in TARGETS])
def test_a_sequence_without_a_batch_dimension_is_a_batch_of_one(target):
    given = with_tokens(target, (B,))
    one = {name: v[0] if isinstance(v, Tensor) and v.shape == (B,) else v for name, v in given.items()}
    batch = {name: v[:1] if isinstance(v, Tensor) and v.shape == (B,) else v for name, v in given.items()}
    got, want = target.call(**one), target.call(**batch)
    for ours, theirs in zip(*(torch.utils._pytree.tree_leaves(r) for r in (got, want))):
        torch.testing.assert_close(ours.reshape(-1), theirs.reshape(-1), rtol=0, atol=0, equal_nan=True)


def test_the_suggested_fix_works():
    tokens = normal(2 * B, T)
    with pytest.raises(ValueError, match=r"fused_po\.sequence_logps"):
        losses.dpo(*tokens.chunk(2))
    assert losses.dpo(*sequence_logps(tokens).chunk(2)).shape == (B,)
    with pytest.raises(ValueError, match=r"policy_chosen_logps: got shape .*fused_po.sequence_logps"):
        modules.DPOLoss(0.1)(*tokens.chunk(2), *tokens.chunk(2))


def test_token_losses_take_any_shape():
    tokens = -normal(B, T).abs()
    assert losses.sft(tokens).shape == (B, T)
    assert losses.alphapo_reward(tokens, 0.25).shape == losses.f_divergence_score(tokens, tokens).shape == (B, T)
    assert losses.kl_loss(tokens, tokens).shape == (B, T)
    assert losses.plackett_luce_dpo(tokens).shape == (B,)
