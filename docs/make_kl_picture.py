"""Draws docs/kl.png: estimates of the KL, their value and their gradient as losses, against the policy's distance.

A reference q = softmax(z) over 16 tokens, policies p = softmax(z + d u) along one direction u. Means and standard
errors are sums over all tokens; the dots are means of sampled tokens.
"""

import warnings
from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from fused_po import losses

TOKENS, SAMPLES, SEED = 16, 64, 5
COLOURS = {"k1": "#d55e00", "k2": "#0072b2", "k3": "#009e73", "exact": "black"}  # Okabe and Ito's
warnings.filterwarnings("ignore", "fused_po: k1 as a loss")  # this picture shows the reason for it
DISTANCES = torch.logspace(-1.4, 0.85, 60, dtype=torch.float64)


def gradients(logits, loss_of_logps):
    """[V, V]: row y is the gradient, in the logits, of the loss of a sampled token y."""
    return torch.func.jacrev(lambda z: loss_of_logps(z.log_softmax(-1)))(logits)


def study():
    """For each distance: the true KL and, by estimator, (mean, error, sampled mean, bias and noise of the gradient)."""
    torch.manual_seed(SEED)
    reference, direction = torch.randn(2, TOKENS, dtype=torch.float64)
    log_q = reference.log_softmax(-1)
    rows = []
    for d in DISTANCES:
        logits = reference + d * direction
        log_p = logits.log_softmax(-1)
        p = log_p.exp()
        true = losses.categorical_kl(log_p, log_q).item()
        slope = torch.func.grad(lambda z: losses.categorical_kl(z.log_softmax(-1), log_q))(logits)
        drawn = torch.multinomial(p, SAMPLES, replacement=True)
        found = {}
        for kind in ("k1", "k2", "k3"):
            value = losses.kl_estimate(log_p, log_q, kind)
            mean = (p * value).sum()
            error = ((p * (value - mean).square()).sum() / SAMPLES).sqrt()
            each = gradients(logits, lambda logps, kind=kind: losses.kl_loss(logps, log_q, kind))
            expected = p @ each
            noise = ((p * (each - expected).square().sum(1)).sum() / SAMPLES).sqrt()
            bias = (expected - slope).norm()
            numbers = mean / true, error / true, value[drawn].mean() / true, bias / slope.norm(), noise / slope.norm()
            found[kind] = [float(v) for v in numbers]
        rows.append((true, found))
    return rows


def main():
    rows = study()
    kl = [true for true, _ in rows]

    def curve(kind, which):
        return torch.tensor([found[kind][which] for _, found in rows])

    plt.rcParams.update({"font.size": 11, "axes.titlesize": 11.5})
    figure, (value, gradient) = plt.subplots(1, 2, figsize=(9, 4.5), layout="constrained")
    for axis in (value, gradient):
        axis.set(xscale="log", xlim=(1e-3, 2.6), xlabel="true KL(policy ‖ reference) [nats per token]")
        axis.grid(alpha=0.3)
    for kind, mark in (("k1", "o"), ("k3", "^"), ("k2", "v")):
        mean, error, drawn, bias, noise = (curve(kind, i) for i in range(5))
        colour = COLOURS[kind]
        value.fill_between(kl, mean - error, mean + error, facecolor=colour, alpha=0.2)
        for edge in (mean - error, mean + error):
            value.plot(kl, edge, color=colour, linewidth=0.8)
        value.plot(kl, mean, color=colour, linewidth=2, marker=mark, markevery=[-1], markersize=5, label=kind)
        value.plot(kl[::3], drawn[::3], mark, color=colour, markersize=4)
        gradient.plot(kl, noise, "--", color=colour, linewidth=1.8)
        if kind != "k2":
            gradient.plot(kl, bias, color=colour, linewidth=2.2)
    value.axhline(1, color="black", linewidth=2, linestyle=(0, (4, 2)), label="exact")
    value.set(ylim=(0, 2.5), ylabel="estimate / true KL")
    value.set_title(f"Value of {SAMPLES} samples: mean, ± 1 standard error")
    value.legend(loc="upper center", ncols=4, columnspacing=1, handlelength=1.5)
    gradient.set(yscale="log", ylim=(1e-2, 1e2), ylabel="error / norm of the true gradient")
    gradient.set_title("Gradient as a loss: its errors")
    styles = [plt.Line2D([], [], color="grey", linestyle=style, linewidth=2) for style in ("-", "--")]
    gradient.legend(styles, ["bias", f"noise, {SAMPLES} samples"], loc="upper center", ncols=2)
    for kind, x, y, text in (
        ("k1", 1.2e-3, 0.62, "k1: the mean gradient is 0"),
        ("k1", 7e-3, 4, "k1"),
        ("k2", 1.2e-3, 0.2, "k2 and k3"),
        ("k3", 2.5e-2, 0.06, "k3"),
        ("exact", 3.2e-2, 0.0135, "bias of k2: 0\nexact KL: no bias, no noise"),
    ):
        gradient.text(x, y, text, color=COLOURS[kind], fontsize=10)
    figure.savefig(Path(__file__).with_name("kl.png"), dpi=150)


if __name__ == "__main__":
    main()
