"""A loss of your own on fused log-probs, in ten lines and without writing a kernel.

    python examples/add_a_loss.py

A loss is a function of log-probs. `linear_logps` computes them from hidden states and an LM head, with gradients for
both; `sequence_logps` sums them over each answer. The loss here is Cal-DPO (Xiao et al. 2024, arXiv:2412.14516), which
is not in `fused_po.losses`. The script compares its value and gradients with plain PyTorch, then trains with it.
"""

import torch
from torch.nn.functional import logsigmoid

import fused_po


def cal_dpo(chosen, rejected, ref_chosen, ref_rejected, *, beta=0.1):
    """-log s(w - l) + (w - 1 / (2 beta))^2 + (l + 1 / (2 beta))^2 of the log-ratios w and l. All [B]."""
    w, l = chosen - ref_chosen, rejected - ref_rejected
    return -logsigmoid(w - l) + (w - 0.5 / beta) ** 2 + (l + 0.5 / beta) ** 2


def loss_of(hidden, head, labels, ref_logps):
    """hidden: [2B, T, H], B chosen answers, then B rejected ones. labels: [2B, T], -100 where nothing is scored."""
    logps = fused_po.linear_logps(hidden, head, labels).logps  # [2B, T]
    chosen, rejected = fused_po.sequence_logps(logps).chunk(2)
    return cal_dpo(chosen, rejected, *ref_logps.chunk(2)).mean()


def the_same_in_plain_pytorch(hidden, head, labels, ref_logps):
    """The same loss from the logits of all tokens."""
    logps = (hidden @ head.T).log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
    chosen, rejected = torch.where(labels >= 0, logps, 0).sum(-1).chunk(2)
    return cal_dpo(chosen, rejected, *ref_logps.chunk(2)).mean()


def main():
    torch.manual_seed(0)
    pairs, length, width, vocabulary = 4, 12, 32, 1000
    hidden = torch.randn(2 * pairs, length, width, requires_grad=True)
    head = (torch.randn(vocabulary, width) / width**0.5).requires_grad_()
    labels = torch.randint(0, vocabulary, (2 * pairs, length))
    labels[:, :4] = -100  # the prompt
    with torch.no_grad():
        ref_logps = fused_po.sequence_logps(fused_po.linear_logps(hidden, head, labels).logps)  # [2B]

    ours, theirs = (f(hidden, head, labels, ref_logps) for f in (loss_of, the_same_in_plain_pytorch))
    grads = [torch.autograd.grad(loss, (hidden, head)) for loss in (ours, theirs)]
    apart = max(((a - b).norm() / b.norm()).item() for a, b in zip(*grads))
    print(
        f"loss {ours.item():.6f}, plain PyTorch's {theirs.item():.6f}; relative difference of the gradients {apart:.1e}"
    )
    if abs(ours.item() / theirs.item() - 1) > 1e-5 or apart > 1e-4:
        raise SystemExit("error: the two differ by more than rounding")

    optimizer = torch.optim.Adam([hidden, head], lr=1e-2)
    for step in range(41):
        loss = loss_of(hidden, head, labels, ref_logps)
        if step % 10 == 0:
            print(f"step {step:2d}  loss {loss.item():8.3f}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


if __name__ == "__main__":
    main()
