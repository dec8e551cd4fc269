"""A table of errors of log-probs close to 0, and of their gradients, by how far the label is ahead.

    python benchmarks/sure_tokens.py

The largest relative error against float64 over 64 rows of 1000 logits in fp32: torch.log_softmax and each backend.
Without a GPU the Triton kernels run in the interpreter.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import fused_po

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def errors(logits: torch.Tensor, labels: torch.Tensor, logps_of) -> tuple[float, float]:
    """The largest relative error of the log-probs of the labels, and of their gradients at the labels."""
    at = labels[:, None]
    wide = logits.double()
    ahead = wide.scatter(1, at, -torch.inf) - wide.gather(1, at)
    exact = -ahead.exp().sum(1).log1p()
    leaf = logits.clone().requires_grad_()
    ours = logps_of(leaf)
    (grad,) = torch.autograd.grad(ours.sum(), leaf)
    pairs = (ours.detach(), exact), (grad.gather(1, at)[:, 0], -torch.expm1(exact))
    return tuple(((value.double() - true) / true).abs().max().item() for value, true in pairs)


def main() -> None:
    torch.manual_seed(0)
    print("log-prob, gradient")
    print(f"{'ahead by':>9}{'':>6}{'log_softmax':>18}{'reference':>18}{'triton':>18}")
    for gap in (0, 5, 10, 15, 20, 30, 60):
        logits, labels = torch.randn(64, 1000, device=DEVICE), torch.randint(1000, (64,), device=DEVICE)
        logits.scatter_(1, labels[:, None], logits.amax(1, keepdim=True) + gap)
        ways = [lambda z, y=labels: z.log_softmax(-1).gather(1, y[:, None])[:, 0]]
        for backend in ("reference", "triton"):
            ways.append(lambda z, y=labels, b=backend: fused_po.logps_from_logits(z, y, backend=b).logps)
        cells = ("{:.1e}, {:.1e}".format(*errors(logits, labels, way)) for way in ways)
        print(f"{gap:>9}{'nats':>6}" + "".join(f"{cell:>18}" for cell in cells))


if __name__ == "__main__":
    main()
