"""The row passes in plain PyTorch: the backend for CPU tensors and for float64, and what the kernels must agree with.

The same entry points as a kernel backend (`unsupported`, `statistics`, `score`, `gradient`, `from_basis`,
`pair_statistics`, `dpo`, `dpo_gradient`, `gae`), over blocks of rows small enough to stay in a core's cache. Nothing
here is [N, V] in size.

`saved` [2, N] holds a row's shift (its largest scaled logit) and log-norm (log of the sum of exponentials above it);
a log-norm of +inf marks an ignored row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK_BYTES = 2 << 20
ONE_THREAD = 1 << 15  # elements up to which PyTorch wakes no other thread on CPU, which can cost more than all of gae
SCAN_WIDTH = 32
FLOOR = -1e4  # stands for log(0) beside a probability of 0: their product must be 0, not NaN
# Rows of tokens[4, N] and of pairs[7, B], the buffers of the DPO functions.
SHIFT, NORM, LOGP, REF_LOGP = range(4)
SLOPE, CHOSEN_REWARD, REJECTED_REWARD, MARGIN, ACCURACY, KL_SUM, TOKENS = range(7)
PAIR_FIELDS = 7
SATURATION = 20.0  # k3 goes on along its tangent where the reference is more nats above the policy


def unsupported(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why tensors of this device and dtype cannot be served, or None if they can."""
    return None if dtype.is_floating_point and dtype.itemsize > 1 else f"dtype {dtype}"


def stats_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype of statistics of tensors of these dtypes."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def row_blocks(logits: Tensor, wanted: Tensor) -> Iterator[tuple[slice | Tensor, tuple, Tensor]]:
    """(rows, where they are in [O, I], their logits [rows, V]) of logits[O, I, V], a cache's worth of `wanted` rows."""
    outer_rows, inner_rows, n_cols = logits.shape
    step = max(1, BLOCK_BYTES // max(1, 4 * n_cols))
    for o in range(outer_rows):
        for begin in range(0, inner_rows, step):
            some = slice(begin, min(begin + step, inner_rows))
            rows = slice(o * inner_rows + some.start, o * inner_rows + some.stop)
            pick = wanted[rows].nonzero().squeeze(1)
            if pick.numel() == some.stop - some.start:
                yield rows, (o, some), logits[o, some]
            elif pick.numel():
                yield pick + rows.start, (o, pick + begin), logits[o, pick + begin]


def clear_rows(out: Tensor, rows: Tensor) -> None:
    """Zero the marked rows [O * I] of out[O, I, V]."""
    if bool(rows.any()):
        out[rows.view(out.shape[:2])] = 0


def scaled(x: Tensor, outer: float, inner: float | None) -> tuple[Tensor, Tensor | None]:
    """(the logits that go into the softmax, tanh(x * inner) if there is a softcap), in the statistics' dtype."""
    x = x.to(stats_dtype(x.dtype))
    if inner is None:
        return x if outer == 1.0 else x * outer, None
    t = torch.tanh(x * inner)
    return t * outer, t


def statistics(
    logits: Tensor, labels: Tensor, outer: float, inner: float | None, ignore_index: int, outputs: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Row statistics of logits[O, I, V] for labels[O * I]: (logps, entropy, lse, aux, saved).

    Bits of outputs: 1 logps, 2 entropy, 4 lse, 8 mean logit, 16 is-top-1, 32 log of the sum of squared probabilities;
    the last three are the rows of aux. What is not asked for has no elements.
    """
    return score(logits, labels, outer, inner, ignore_index, outputs, None)


def score(
    logits: Tensor, labels: Tensor, outer: float, inner: float | None, ignore_index: int, outputs: int,
    basis: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`statistics`, and into basis[O, I, V] (the logits themselves, another tensor, or None) d log p_y / d x."""
    n_rows = labels.numel()
    new = {"dtype": stats_dtype(logits.dtype), "device": logits.device}
    logps, entropy, lse = (torch.zeros(n_rows if outputs & bit else 0, **new) for bit in (1, 2, 4))
    aux = torch.zeros((3, n_rows) if outputs & 56 else 0, **new)
    saved = torch.zeros(2, n_rows, **new)
    saved[1] = math.inf
    scored = labels != ignore_index
    if basis is not None:
        clear_rows(basis, ~scored)
    for rows, where, x in row_blocks(logits, scored):
        z, t = scaled(x, outer, inner)
        label = labels[rows][:, None]
        shift = z.amax(1, keepdim=True)
        target = z.gather(1, label) - shift
        if outputs & 8:
            aux[0, rows] = z.mean(1)
        if outputs & 16:
            aux[1, rows] = (z.argmax(1, keepdim=True) == label).squeeze(1).to(z.dtype)
        u = z - shift
        e = u.exp() if outputs & 2 else u.exp_()
        total = e.sum(1, keepdim=True)
        norm = total.log()
        logp = target - norm
        saved[0, rows], saved[1, rows] = shift.squeeze(1), norm.squeeze(1)
        if outputs & 1:
            logps[rows] = logp.squeeze(1)
        if outputs & 4:
            lse[rows] = (shift + norm).squeeze(1)
        if outputs & 2:
            entropy[rows] = (norm - u.clamp_(min=FLOOR).mul_(e).sum(1, keepdim=True) / total).squeeze(1)
        if outputs & 32:
            aux[2, rows] = e.square().sum(1).log() - 2 * norm.squeeze(1)
        if basis is not None:
            e.mul_(-outer / total).scatter_(1, label, -outer * torch.expm1(logp))
            basis[where] = (e if t is None else e.mul_((1 - t * t) * inner)).to(basis.dtype)
    return logps, entropy, lse, aux, saved


def gradient(
    logits: Tensor, labels: Tensor, saved: Tensor, entropy: Tensor, g_logps: Tensor | None, g_entropy: Tensor | None,
    g_lse: Tensor | None, outer: float, inner: float | None, out: Tensor, first_col: int = 0,
) -> None:  # fmt: skip
    """Write into out[O, I, V] the gradient with respect to logits[O, I, V]; either may be strided, or both the same.

    dz_v = g_logps (1[v = y] - p_v) - g_entropy p_v (log p_v + H) + g_lse p_v, then the chain through the scaling.
    Without incoming gradients (all None): the basis, d log p_y / d x. first_col: the vocabulary index of column 0.
    """
    live = saved[1] != math.inf
    if g_logps is None and g_entropy is None and g_lse is None:
        g_logps = torch.ones_like(saved[0])
    else:
        live &= torch.stack([g != 0 for g in (g_logps, g_entropy, g_lse) if g is not None]).any(0)
    clear_rows(out, ~live)  # the live rows are read before they are written, in place too
    for rows, where, x in row_blocks(logits, live):
        z, t = scaled(x, outer, inner)
        logp = (z - saved[0, rows][:, None]).sub_(saved[1, rows][:, None])
        label = labels[rows] - first_col
        here = ((label >= 0) & (label < logits.shape[2])).nonzero().squeeze(1)
        logp_label = logp[here, label[here]]
        dz = dz_of_logp(logp, logp_label, here, label, _at(rows, entropy, g_logps, g_entropy, g_lse)).mul_(outer)
        out[where] = (dz if t is None else dz.mul_((1 - t * t) * inner)).to(out.dtype)


def _at(rows: slice | Tensor, entropy: Tensor, *grads: Tensor | None) -> list[Tensor | None]:
    """Entropy and incoming gradients of some rows."""
    return [None if g is None else g[rows] for g in (None if grads[1] is None else entropy, *grads)]


def dz_of_logp(logp: Tensor, logp_label: Tensor, here: Tensor, label: Tensor, incoming: list) -> Tensor:
    """The gradient [rows, V] in the scaled logits from all log-probs, overwritten, and those of the labels at hand."""
    entropy, a, h, c = (None if value is None else value[:, None] for value in incoming)
    dz, weight = logp.exp(), 0.0
    weight = weight if a is None else weight - a
    weight = weight if c is None else weight + c
    if h is not None:
        weight = weight - h * logp.clamp_(min=FLOOR).add_(entropy)
    dz *= weight
    label_weight = torch.zeros_like(logp_label)
    if c is not None:
        label_weight += c[here, 0]
    if h is not None:
        label_weight -= h[here, 0] * (logp_label.clamp(min=FLOOR) + entropy[here, 0])
    dz_label = logp_label.exp() * label_weight
    if a is not None:
        dz_label -= a[here, 0] * torch.expm1(logp_label)
    dz[here, label[here]] = dz_label
    return dz


def from_basis(
    basis: Tensor, labels: Tensor, logps: Tensor, entropy: Tensor, g_logps: Tensor | None, g_entropy: Tensor | None,
    g_lse: Tensor | None, outer: float, out: Tensor, first_col: int = 0,
) -> None:  # fmt: skip
    """`gradient`, but from the basis [N, V] of logits without a softcap and the labels' logps [N].

    Apart from the label's, an entry of the basis is -outer * p: the probabilities come back from it.
    """
    live = torch.stack([g != 0 for g in (g_logps, g_entropy, g_lse) if g is not None]).any(0)
    clear_rows(out[None], ~live)
    for rows, (_, where), d in row_blocks(basis[None], live):
        label = labels[rows] - first_col
        here = ((label >= 0) & (label < basis.shape[1])).nonzero().squeeze(1)
        logp = (d.to(logps.dtype) / -outer).clamp_(min=0).log_()
        logp_label = logps[rows][here]
        incoming = _at(rows, entropy, g_logps, g_entropy, g_lse)
        out[where] = dz_of_logp(logp, logp_label, here, label, incoming).mul_(outer).to(out.dtype)


def pair_statistics(
    logits: Tensor, ref_logits: Tensor | None, labels: Tensor, outer: float, inner: float | None, ignore_index: int
) -> Tensor:
    """tokens[4, N] for logits[O, I, V] and ref_logits[O', I', V] (or None) with O * I = O' * I' = N; labels[N]."""
    logps, _, _, _, saved = statistics(logits, labels, outer, inner, ignore_index, 1)
    ref_logps = torch.zeros_like(logps)
    if ref_logits is not None:
        ref_logps = statistics(ref_logits, labels, outer, inner, ignore_index, 1)[0].to(logps.dtype)
    return torch.stack([saved[0], saved[1], logps, ref_logps])


def kl_estimate(k1: Tensor, kl: str) -> tuple[Tensor, Tensor]:
    """(estimate, its derivative in the policy's log-prob) for k1 = log-ratio of policy to reference."""
    if kl == "k1":
        return k1, torch.ones_like(k1)
    if kl == "k2":
        return 0.5 * k1 * k1, k1
    inside = (-k1).clamp(max=SATURATION)
    slope = -torch.expm1(inside)
    k3 = k1 - slope + (1 - slope) * (-k1 - inside)
    return torch.where(k1.abs() < 1e-3, k1 * k1 * (0.5 - k1 / 6), k3), slope


def dpo(
    tokens: Tensor, labels: Tensor, ref_sums: Tensor | None, beta: float, label_smoothing: float, kl: str | None,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(losses [B], sequence log-probs [2B], pairs [7, B], KL per token [2B * T]) of tokens[4, 2B * T], labels[2B, T].

    ref_sums: [2B] reference log-probs of whole sequences, in place of those in `tokens`. kl: "k1", "k2", "k3" or None.
    """
    valid = labels != ignore_index
    policy, reference = (torch.where(valid, tokens[i].view_as(labels), 0) for i in (LOGP, REF_LOGP))
    sequences = policy.sum(1)
    rewards = beta * (sequences - (reference.sum(1) if ref_sums is None else ref_sums))
    chosen_reward, rejected_reward = rewards.chunk(2)
    h = chosen_reward - rejected_reward
    log_above, log_below = torch.nn.functional.logsigmoid(h), torch.nn.functional.logsigmoid(-h)
    losses = -(1 - label_smoothing) * log_above - label_smoothing * log_below
    slope = beta * (label_smoothing * torch.sigmoid(h) - (1 - label_smoothing) * torch.sigmoid(-h))
    kl_tokens = torch.where(valid, kl_estimate(policy - reference, kl)[0], 0) if kl else policy.new_zeros(0)
    kl_sums = kl_tokens.sum(1) if kl else torch.zeros_like(sequences)
    per_pair = [torch.stack(v.to(h.dtype).chunk(2)).sum(0) for v in (kl_sums, valid.sum(1))]
    pairs = torch.stack([slope, chosen_reward, rejected_reward, h, (h > 0).to(h.dtype), *per_pair])
    return losses, sequences, pairs, kl_tokens.flatten()


def dpo_token_gradient(
    labels: Tensor, tokens: Tensor, pairs: Tensor, weights: Tensor, g_loss: Tensor | None, g_losses: Tensor | None,
    g_sequences: Tensor | None, kl: str | None,
) -> Tensor:  # fmt: skip
    """The gradient [2B, T] in the policy's token log-probs. weights [2]: d loss / d one pair's loss, / d one KL."""
    weights = torch.zeros_like(weights) if g_loss is None else weights * g_loss
    slope = (weights[0] if g_losses is None else weights[0] + g_losses) * pairs[SLOPE]
    g_sequence = torch.cat([slope, -slope])
    if g_sequences is not None:
        g_sequence = g_sequence + g_sequences
    g = g_sequence[:, None].expand(labels.shape)
    if kl:
        g = g + weights[1] * kl_estimate((tokens[LOGP] - tokens[REF_LOGP]).view_as(labels), kl)[1]
    return torch.where(tokens[NORM].view_as(labels) != math.inf, g, 0)


def dpo_gradient(
    logits: Tensor, labels: Tensor, tokens: Tensor, pairs: Tensor, weights: Tensor, g_loss: Tensor | None,
    g_losses: Tensor | None, g_sequences: Tensor | None, kl: str | None, outer: float, inner: float | None, out: Tensor,
) -> None:  # fmt: skip
    """Write into out[O, I, V] the gradient with respect to the policy's logits[O, I, V]; both may be the same."""
    g = dpo_token_gradient(labels, tokens, pairs, weights, g_loss, g_losses, g_sequences, kl)
    saved = tokens[SHIFT : NORM + 1]
    gradient(logits, labels.flatten(), saved, tokens[:0], g.flatten(), None, None, outer, inner, out)


def discounted_sums_(x: Tensor, factor: float, step: int) -> None:
    """y_t = x_t + factor * y_(t + 1) along the rows of x[B, T], in place; T a multiple of SCAN_WIDTH, or less.

    SCAN_WIDTH steps, each for the i-th tokens of all blocks of that many; then the same over the blocks' first tokens.
    """
    n_rows, length = x.shape
    width = max(1, min(length, SCAN_WIDTH))
    n_blocks = length // width
    x = x.view(n_rows, n_blocks, width)
    tokens = x.unbind(2)
    for here, after in zip(tokens[-2::-1], tokens[:0:-1]):
        here.add_(after, alpha=factor)
    if n_blocks > 1:
        whole = n_blocks if n_blocks <= SCAN_WIDTH else -(-n_blocks // SCAN_WIDTH) * SCAN_WIDTH
        first = torch.nn.functional.pad(tokens[0], (0, whole - n_blocks))
        discounted_sums_(first, factor**width, step)
        powers = torch.tensor([factor ** (width - i) for i in range(width)], dtype=x.dtype, device=x.device)
        for some, later in zip(x.split(step), first[:, 1:n_blocks, None].split(step)):
            some[:, :-1].addcmul_(later, powers)


def packed(values: Tensor, column: Tensor | None, width: int) -> Tensor:
    """[B, width] of values[B, T] in these columns, or at the right end."""
    if column is None:
        return torch.nn.functional.pad(values, (width - values.shape[1], 0))
    return torch.zeros(len(values), width, dtype=values.dtype, device=values.device).scatter_(1, column, values)


def gae_rows(
    rewards: Tensor, values: Tensor, mask: Tensor | None, last: Tensor | None, gamma: float, decay: float, step: int,
    advantages: Tensor, returns: Tensor,
) -> None:  # fmt: skip
    """Write the results into advantages and returns [B, T]; only the scan is over more than `step` rows at once.

    With a mask, what counts moves to the right end of a wider row, in order, and the rest to its column 0, which
    nothing that counts reads.
    """
    n_rows, length = rewards.shape
    width = (length // SCAN_WIDTH + 1) * SCAN_WIDTH
    deltas = torch.empty(n_rows, width, dtype=returns.dtype, device=returns.device)
    parts = [slice(begin, begin + step) for begin in range(0, n_rows, step)]
    columns: list[Tensor | None] = []
    for rows in parts:
        column = None
        if mask is not None:
            column = mask[rows].cumsum(1)
            column = column.add_(width - 1 - column[:, -1:]).mul_(mask[rows])
        columns.append(column)
        r, v, delta = packed(rewards[rows], column, width), packed(values[rows], column, width), deltas[rows]
        torch.sub(r, v, out=delta)
        delta[:, :-1].add_(v[:, 1:], alpha=gamma)
        if last is not None:
            delta[:, -1].add_(last[rows], alpha=gamma)
    discounted_sums_(deltas, decay, step)
    deltas[:, 0] = 0
    for rows, column in zip(parts, columns):
        if column is None:
            advantages[rows] = deltas[rows, width - length :]
            torch.add(advantages[rows], values[rows], out=returns[rows])
        else:
            torch.gather(deltas[rows], 1, column, out=advantages[rows])
            returns[rows] = torch.where(mask[rows], advantages[rows] + values[rows], 0)


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor | None, last: Tensor | None, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """(advantages, returns) [B, T] of rewards, values [B, T], a bool mask [B, T] or None, last values [B] or None."""
    dtype = stats_dtype(*(x.dtype for x in (rewards, values, last) if x is not None))
    rewards, values, last = (None if x is None else x.to(dtype) for x in (rewards, values, last))
    n_rows, length = rewards.shape
    advantages, returns = (torch.empty(n_rows, length, dtype=dtype, device=rewards.device) for _ in range(2))
    step = max(1, ONE_THREAD // (length + SCAN_WIDTH)) if rewards.device.type == "cpu" else max(1, n_rows)
    for begin in range(0, n_rows if length else 0, SCAN_WIDTH * step):
        rows = slice(begin, begin + SCAN_WIDTH * step)
        some = (x if x is None else x[rows] for x in (rewards, values, mask, last))
        gae_rows(*some, gamma, gamma * lam, step, advantages[rows], returns[rows])
    return advantages, returns
