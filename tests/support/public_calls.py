"""A valid call of every public function, class and method, built from its signature."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

import fused_po
from fused_po import losses, modules

B, T, V, H = 4, 6, 9, 5  # sizes of the problems: sequences, tokens, vocabulary, width


class Target(NamedTuple):
    """A public callable: name, a function that takes keyword arguments, signature, and arguments of a valid call."""

    name: str
    call: Callable
    signature: inspect.Signature
    good: dict[str, object]

    @property
    def arguments(self) -> list[str]:
        """The names of the arguments that a call may give."""
        kinds = {p.name: p.kind for p in self.signature.parameters.values()}
        return [name for name, kind in kinds.items() if kind not in (inspect.Parameter.VAR_KEYWORD, 2)]


def tensors_in(value: object) -> list[Tensor]:
    """All tensors that a result holds, in tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return [tensor for part in parts for tensor in tensors_in(part)]


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def labels(*shape: int) -> Tensor:
    return torch.arange(torch.Size(shape).numel()).remainder(V).view(shape)


# The value for an argument of this name, in any function. Tensors not named here hold log-probs, rewards or the like.
GOOD = {
    "hidden": normal(B, T, H), "weight": normal(V, H), "labels": labels(B, T), "logits": normal(B, T, V),
    "ref_logits": normal(B, T, V), "ref_hidden": normal(B, T, H), "ref_weight": normal(V, H), "groups": labels(B, T),
    "loss_fn": lambda stats, rows: stats.logps.sum(), "lin_weight": normal(V, H), "_input": normal(B, T, H),
    "target": labels(B, T), "ref_input": normal(B, T, H), "selected_token_ids": labels(B, T), "delta": 0.1,
    "attention_mask": torch.ones(B, T), "preference_labels": torch.arange(B) % 2 == 0, "action_mask": torch.ones(B, T),
    "desirable": torch.arange(B) % 2 == 0, "wins": torch.ones(3, 3) - torch.eye(3), "std_p": 1.0, "std_q": 2.0,
    "log_p": normal(B, V).log_softmax(-1), "log_q": normal(B, V).log_softmax(-1), "threshold": 0.5, "coef": 0.1,
    "alpha": 0.5, "beta": 0.1, "kl_coef": 0.1, "init_kl_coef": 0.1, "target_kl": 6.0, "horizon": 100.0,
    "current_kl": 3.0, "n_steps": 4, "prob_desirable": torch.full((B,), 0.4), "loss_mask": torch.ones(B, T),
    "group": torch.distributed.ProcessGroup(torch.distributed.HashStore(), 0, 1),
    "state": {"mean": torch.zeros(()), "count": 2}, "mask": torch.ones(B, T),
}  # fmt: skip
OWN = {  # functions where a name means something else, or where a valid call needs more than the required arguments
    "PolicyLoss.forward": {"log_probs": normal(B, T), "old_log_probs": normal(B, T)},
    "ValueLoss.forward": {"values": normal(B, T), "old_values": normal(B, T), "returns": normal(B, T)},
    "group_advantages": {"rewards": normal(B), "groups": 2},
    "leave_one_out_advantages": {"rewards": normal(B), "groups": 2},
    "reinforce_plus_plus_baseline_advantages": {"rewards": normal(B), "groups": 2},
    "kl_in_reward": {"rewards": normal(B)},
    "gae": {"rewards": normal(B, T), "values": normal(B, T)},
    "reinforce_plus_plus_advantages": {"rewards": normal(B, T)},
    "plackett_luce_dpo": {"logps": normal(B, T)},
    "dpo_from_logits": {"ref_logps": normal(B, T)},
    "linear_dpo": {"ref_logps": normal(B, T)},
    "cispo": {"cap": 3.0},
    "kto": {"kl": 0.1},
    "plackett_luce": {"rewards": normal(B, 3)},
    "policy_loss_from_logits": {"advantages": normal(B, T), "old_logps": normal(B, T), "loss_type": "ppo"},
    "gmpo": {"advantages": normal(B)},
    "rloo": {"advantages": normal(B)},
    "FusedLinearDPOLoss.forward": {"ref_input": normal(B, T, H), "ref_weight": normal(V, H)},
    "FusedLinearKTOLoss.forward": {"preference_labels": torch.arange(B) % 2 == 0},
    "FusedLinearGRPOLoss.forward": {"ref_per_token_logps": normal(B, T), "advantages": normal(B)},
    "aggregate": {"token_loss": normal(B, T)},
    "sequence_logps": {"logps": normal(B, T)},
    "GPTLMLoss.forward": {"logits": normal(B, T, V)},
}
PER_TOKEN = (
    "mask",
    "action_mask",
    "loss_mask",
    "attention_mask",
    "chosen_kl",
)  # functions with one of these arguments take tensors [B, T]


def good_arguments(name: str, signature: inspect.Signature) -> dict[str, object]:
    """The arguments of a valid call: every argument without a default, and the function's entries in OWN."""
    own = OWN.get(name, {})
    wanted = [p.name for p in signature.parameters.values() if p.default is p.empty and p.kind not in (2, 4)]
    shape = (B, T) if set(wanted) & set(PER_TOKEN[:4]) else (B,)
    return {n: own.get(n, GOOD.get(n, normal(*shape))) for n in [*wanted, *(n for n in own if n not in wanted)]}


def made(function: Callable, name: str) -> Target:
    signature = inspect.signature(function)
    return Target(name, function, signature, good_arguments(name, signature))


REF_BIAS = {"ref_bias": normal(V)}
VARIANTS = {  # valid calls that take other code paths than those of `targets`, and their further arguments
    "kl_from_logits": [{"labels": labels(B, T), "mask": torch.ones(B, T), "direction": "js", "js_weight": 0.3}],
    "linear_kl": [{"labels": labels(B, T), "bias": normal(V), "ref_bias": normal(V)}],
    "linear_logps": [{"bias": normal(V), "low_rank": (normal(B, T, 2), normal(V, 2)), "outputs": ("entropy",)}],
    "dpo_from_logits": [{"ref_logits": normal(B, T, V), "ref_logps": None, "kl": "full", "kl_coef": 0.1}],
    "linear_dpo": [
        {"ref_logps": None, "ref_hidden": normal(B, T, H), "ref_weight": normal(V, H), "kl": kl} | REF_BIAS
        for kl in ("k3", "full")
    ],
    "gae": [{"mask": torch.ones(B, T), "last_values": normal(B)}],
    "sequence_logps": [{"logps": normal(T), "cu_seqlens": torch.tensor([0, 2, T]), "ld_alpha": 0.5}],
    "aggregate": [{"mode": "seq-mean-token-sum-norm", "max_length": 8.0, "num_sequences": 4, "world_size": 2}],
    "preference_loss": [
        {
            "loss_type": ["ipo", "sigmoid"],
            "loss_weights": [1.0, 0.5],
            "chosen_length": normal(B).abs() + 1,
            "rejected_length": normal(B).abs() + 1,
            "f_divergence": "alpha_divergence",
            "f_alpha": 0.3,
        },
    ],
    "grpo": [
        {"ref_logps": normal(B, T), "beta": 0.1, "weights": normal(B, T).abs(), "delta": 4.0},
        {"loss_type": "vespo", "weights": normal(B, T).abs(), "vespo_k_pos": 2.0},
    ],
    "PolicyLoss": [{"is_correction_level": "token", "is_correction_mode": "clip", "dual_clip": 3.0}],
    "FusedLinearGRPOLoss": [{"loss_type": "vespo"}, {"loss_type": "sapo"}, {"loss_type": "luspo", "delta": 3.0}],
    "FusedLinearORPOLoss.forward": [{"nll_target": labels(B, T), "bias": normal(V)}],
}


def targets() -> Iterator[Target]:
    """Everything public that can be called: functions, classes with their methods, modules with their forward."""
    for space in (fused_po, losses, modules):
        for name in space.__all__:
            value = getattr(space, name)
            if inspect.isfunction(value):
                yield made(value, name)
            elif inspect.isclass(value) and not issubclass(value, tuple):
                built = made(value, name) if "args" not in inspect.signature(value).parameters else None
                if built is not None:
                    yield built
                instance = value(**built.good if built else {})
                for method in [n for n in vars(value) if n in ("forward", "update", "load_state_dict")]:
                    yield made(getattr(instance, method), f"{name}.{method}")


def every_target() -> Iterator[Target]:
    """The targets and their variants."""
    for target in targets():
        yield target
        for more in VARIANTS.get(target.name, ()):
            yield target._replace(name=f"{target.name} with {', '.join(more)}", good=target.good | more)
