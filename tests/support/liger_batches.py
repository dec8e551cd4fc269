"""Random batches for the modules with Liger's call signatures, and a comparison of two results."""

import torch

B, T, H, V = 2, 6, 8, 30
IGNORE = -100


class Batch:
    """Random hidden states, heads and labels of `n` sequences. Prompts and padding are ignored."""

    def __init__(self, n: int = 2 * B, scale: float = 1.0, bias: bool = True):
        self.hidden, self.weight = torch.randn(n, T, H) * scale, torch.randn(V, H)
        self.bias = torch.randn(V) if bias else None
        self.ref_hidden, self.ref_weight, self.ref_bias = torch.randn(n, T, H), torch.randn(V, H), torch.randn(V)
        self.target = torch.randint(0, V, (n, T))
        self.target[:, :2] = IGNORE
        self.target[1, 4:] = IGNORE
        self.mask = self.target != IGNORE

    def leaves(self) -> list:
        found = [self.hidden, self.weight] + ([] if self.bias is None else [self.bias])
        return [v.detach().clone().requires_grad_() for v in found]

    def reference(self) -> tuple:
        return self.ref_hidden, self.ref_weight, self.ref_bias

    def tokens(self, hidden, weight, bias=None, temperature=1.0, target=None):
        """Log-probs [n, T], 0 at ignored tokens."""
        target = self.target if target is None else target
        logits = hidden @ weight.T + (0 if bias is None else bias)
        logp = (logits / temperature).log_softmax(-1).gather(-1, target.clamp(min=0)[..., None]).squeeze(-1)
        return torch.where(target != IGNORE, logp, 0)

    def sequences(self, hidden, weight, bias=None, average=False):
        sums = self.tokens(hidden, weight, bias).sum(-1)
        return sums / self.mask.sum(-1) if average else sums

    def logits_mean(self, rows) -> torch.Tensor:
        logits = self.hidden @ self.weight.T + (0 if self.bias is None else self.bias)
        return logits[rows].mean()  # over all positions, as Liger does


def compare(ours: tuple, theirs: tuple, leaves: tuple) -> None:
    """Compare losses, aux values and gradients; leaves: (ours, theirs)."""
    within = dict(rtol=1e-9, atol=1e-10)
    if ours[0].dtype == torch.float32:  # Liger's results hold squares of sums of T log-probs and sums of T V logits
        within = dict(rtol=1e-4, atol=5 * T * V * torch.finfo(torch.float32).eps)
    torch.testing.assert_close(ours[0], theirs[0], **within)
    assert len(ours[1]) == len(theirs[1])
    for i, (got, want) in enumerate(zip(ours[1], theirs[1])):
        torch.testing.assert_close(got.detach(), want.detach(), **within, msg=f"aux {i}")
    ours[0].backward()
    theirs[0].backward()
    for mine, other in zip(*leaves):
        torch.testing.assert_close(mine.grad, other.grad, **within)


GRPO = [
    ("dapo", {}),
    ("grpo", {}),
    ("bnpo", {}),
    ("dr_grpo", {"max_completion_length": 9}),
    ("dapo", {"delta": 1.5}),
    ("grpo", {"importance_sampling_level": "sequence"}),
    ("luspo", {"importance_sampling_level": "sequence", "beta": 0.0}),
    ("cispo", {"epsilon_high": 1.1}),
    ("sapo", {"sapo_temperature_pos": 0.7, "sapo_temperature_neg": 1.3}),
    ("vespo", {"vespo_k_pos": 1.5, "vespo_lambda_neg": 2.5}),
    ("dapo", {"use_bias_correction_kl": True, "temperature": 0.7}),
    ("grpo", {"beta": 0.0}),
    ("grpo", {"use_ref_model": False}),
]
GRPO_IDS = [f"{name}-{'-'.join(how)}" for name, how in GRPO]


class Answers(Batch):
    """A batch of answers sampled from an older policy, with padding at the end."""

    def __init__(self):
        super().__init__(4)
        self.ids = torch.randint(0, V, (4, T))
        self.mask = torch.arange(T) < torch.tensor([6, 3, 5, 1])[:, None]
        self.target = torch.where(self.mask, self.ids, IGNORE)
        self.advantages = torch.tensor([1.0, -0.5, -1.0, 0.3])
        tokens = self.tokens(self.hidden, self.weight, self.bias)
        self.old, self.ref = (tokens + 0.3 * torch.randn(4, T) for _ in range(2))
        self.is_ratio = torch.rand(4, T) + 0.5


def grpo_arguments(batch, leaves, weights):
    hidden, weight, bias = leaves
    ids = batch.ids, batch.mask.long(), batch.advantages
    return dict(
        zip(("_input", "lin_weight", "selected_token_ids", "attention_mask", "advantages"), (hidden, weight, *ids)),
        bias=bias,
        ref_per_token_logps=batch.ref,
        old_per_token_logps=batch.old,
        vllm_is_ratio=weights,
    )
