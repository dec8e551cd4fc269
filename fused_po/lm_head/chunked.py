"""`chunked_loss`: a loss that is a sum over groups of tokens, with its gradient, in 3 GEMMs for any number of tokens.

For a whole batch, rows beyond the memory budget are projected twice. A loss that is a sum over pairs, sequences or
tokens can be computed chunk by chunk: each chunk is scored, its part of the loss and the gradient are computed, and its
memory is released.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from fused_po import checks
from fused_po.backend.interface import Grads, Outputs, RowStats, Scaling
from fused_po.lm_head.head import Head, Operands, make_head
from fused_po.lm_head.logps import Saved, backward, check_operands, forward, linear_logps
from fused_po.lm_head.plan import BASIS, NOTHING, Needs, spans
from fused_po.lm_head.scored import scored_rows
from fused_po.ops.autograd import no_tangent, public, transforms_active
from fused_po.ops.outputs import TokenStats, outputs_of, token_stats
from fused_po.ops.register import no_second_derivative
from fused_po.parallel.vocab import ProcessGroupLike, local_head
from fused_po.schedule import Schedule

LossFunction = Callable[[TokenStats, Tensor], Tensor]


class _Task(NamedTuple):
    """All arguments other than the tensors that may get a gradient."""

    loss_fn: LossFunction
    head: Head
    outputs: Outputs  # those asked for
    labels: Tensor  # [N]
    chunks: list[Tensor]  # numbers of rows
    schedule: Schedule


def chunks_of(groups: Tensor, labels: Tensor, ignore_index: int, limit: Optional[int]) -> list[Tensor]:
    """Rows [N] in chunks of whole groups, each with at most `limit` scored tokens unless it is a single group.

    One chunk, without a sync, if limit is None or the number of tokens is within it.
    """
    order = torch.argsort(groups, stable=True)
    if limit is None or order.numel() <= limit:
        return [order]
    scored = labels[order] != ignore_index
    ends = torch.cat([groups[order].diff() != 0, groups.new_ones(1, dtype=torch.bool)]).nonzero().squeeze(1)
    total = torch.cat([ends.new_zeros(1), scored.cumsum(0)[ends]])
    ends, total = torch.stack([torch.cat([ends.new_zeros(1), ends + 1]), total]).tolist()  # a sync on a GPU
    cuts = [0]
    for i in range(1, len(ends) - 1):
        if total[i + 1] - total[cuts[-1]] > limit:
            cuts.append(i)
    return [order[ends[a] : ends[b]] for a, b in zip(cuts, [*cuts[1:], len(ends) - 1])]


def foreign_leaf(loss: Tensor, own: tuple[Tensor, ...]) -> Optional[Tensor]:
    """A tensor that requires grad and that the loss depends on, other than `own`."""
    nodes, seen = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and not any(leaf is v for v in own):
            return leaf
        nodes += [parent for parent, _ in node.next_functions]
    return None


def share_and_gradient(task: _Task, results: RowStats, rows: Tensor) -> tuple[Tensor, Grads]:
    """(a chunk's share of the loss, its gradients) from the op's results for these rows.

    loss_fn gets copies, which it may edit in place: the backward reads the results, and the rows are read again.
    """
    stats = token_stats(results, task.outputs, rows.shape)
    wanted = Grads._fields if task.schedule.entropy_grad else ("logps", "lse")
    leaves = {n: getattr(stats, n).detach() for n in wanted if getattr(stats, n) is not None}
    with torch.enable_grad():
        leaves = {name: value.requires_grad_(task.head.keep != NOTHING) for name, value in leaves.items()}
        own = {name: getattr(stats, name) for name in Grads._fields if getattr(stats, name) is not None}
        copies = {name: leaves.get(name, value).clone() for name, value in own.items()}
        given = stats._replace(**copies), rows.clone()
        share = no_tangent("chunked_loss", "loss_fn's loss", lambda: task.loss_fn(*given))
    if not isinstance(share, Tensor) or share.ndim != 0 or not share.is_floating_point():
        got = f"shape {tuple(share.shape)}, {share.dtype}" if isinstance(share, Tensor) else type(share).__name__
        raise ValueError(f"loss_fn: returned {got}, expected a floating-point scalar, the loss of the chunk")
    if not share.requires_grad:
        return share, Grads()
    foreign = foreign_leaf(share, tuple(leaves.values()))
    if foreign is not None:
        raise ValueError(
            f"loss_fn: its loss depends on another tensor that requires grad, of shape {tuple(foreign.shape)}; only "
            "hidden, weight and bias get gradients from chunked_loss: detach the tensor, or use linear_logps"
        )
    grads = dict(zip(leaves, torch.autograd.grad(share, tuple(leaves.values()), allow_unused=True)))
    return share.detach(), Grads(**grads)


class _ChunkedLoss(torch.autograd.Function):
    """Computes the gradients in the forward; the backward only scales them.

    links: empty views of hidden, weight and bias with the same requires_grad, so that a second derivative raises.
    """

    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, bias: Optional[Tensor], task: _Task, *links: Optional[Tensor]
    ) -> Tensor:
        head, wide = task.head, task.head.dtypes.sums
        needs = Needs(*[need and head.keep != NOTHING for need in ctx.needs_input_grad[:3]])
        grad_hidden = torch.zeros_like(hidden) if needs.hidden else None
        sums = [
            torch.zeros(v.shape if need else 0, dtype=wide, device=hidden.device)
            for v, need in zip((weight, bias), needs[1:3])
        ]
        loss = hidden.new_zeros((), dtype=wide)
        for rows in task.chunks:
            chunk, labels = Operands(hidden[rows], weight, bias), task.labels[rows]
            scored = scored_rows(labels, head.ignore_index)
            stats, kept = forward(head, chunk, labels, scored, rows.numel() if scored is None else scored.numel())
            share, grads = share_and_gradient(task, stats, rows)
            loss += share
            if not grads.absent:
                saved = Saved(labels, scored, stats.saved, stats.entropy, kept)
                found = backward(head, chunk, saved, grads, needs, task.schedule.skip_zero_rows, sums)
                if needs.hidden:
                    grad_hidden[rows] = found.hidden
            del stats, kept
        ctx.save_for_backward(*links, grad_hidden, *[s if need else None for s, need in zip(sums, needs[1:3])])
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        ctx.block = head.plan(hidden.device).head_block(hidden.shape[0], *weight.shape)
        return loss

    @staticmethod
    def backward(ctx, g: Tensor):
        *links, grad_hidden, weight_sum, bias_sum = ctx.saved_tensors
        with torch.no_grad():
            grads = _ChunkedLoss.scaled(ctx, grad_hidden, (weight_sum, bias_sum), g)
        return *no_second_derivative(grads, (*links, g)), None, *(None for _ in links)

    @staticmethod
    def scaled(ctx, grad_hidden: Optional[Tensor], sums: tuple[Optional[Tensor], ...], g: Tensor) -> tuple:
        """The gradients of hidden, weight and bias for the incoming g."""
        grads = [None if grad_hidden is None else (grad_hidden * g).to(grad_hidden.dtype)]
        for total, dtype in zip(sums, ctx.dtypes):
            if total is None or total.dtype == dtype:
                grads.append(None if total is None else total * g)
                continue
            grads.append(torch.empty_like(total, dtype=dtype))
            for some in spans(0, len(total), ctx.block):  # no fp32 copy of a whole head
                torch.mul(total[some], g, out=grads[-1][some])
        return tuple(grads)


@public
def chunked_loss(
    loss_fn: LossFunction,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    groups: Tensor,
    bias: Optional[Tensor] = None,
    *,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: Optional[float] = None,
    ignore_index: int = -100,
    outputs: tuple[str, ...] = ("logps",),
    process_group: ProcessGroupLike = None,
    backend: Optional[str] = None,
    schedule: Optional[Schedule] = None,
) -> Tensor:
    """A loss that is a sum over groups of tokens, computed in chunks of whole groups: 3 GEMMs for a trainable head.

    loss = sum over chunks of loss_fn(stats of the chunk's tokens, their indices). The forward computes the gradient of
    each chunk together with its loss; the backward only scales it. `Schedule.logits_budget` bounds the size of a chunk:
    the number of scored tokens that keep a row of V numbers. A group that is larger recomputes what does not fit. A
    trainable head needs one fp32 [V, H] buffer for the sum of its gradient.

        def loss_fn(stats, rows):  # DPO over B pairs, the rows of pair i are group i
            chosen, rejected, i = ...  # sums of stats.logps over the rows of each pair, and the indices of these pairs
            return losses.dpo(chosen, rejected, ref_chosen[i], ref_rejected[i]).sum() / B

    Args:
        loss_fn: takes TokenStats of n tokens, each field [n], and rows [n], their indices in labels.flatten(). The
            tokens are those of whole groups, in ascending order of group id. It returns their part of the final loss, a
            scalar: divide by the count of the whole batch, not of the chunk. Tensors that it captures get no gradient.
        hidden: [..., H], weight: [V, H], labels: [...], bias: [V] and other arguments: see `linear_logps`.
        groups: [...], integers, the group of each token, also of ignored ones. Costs one host sync.

    Returns:
        The loss, a scalar, fp32 (float64 for float64). Gradients flow to hidden, weight and bias.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape, dtype, device or range; the error names it. Or
            loss_fn does not return a scalar, or depends on another tensor that requires grad.
    """
    if transforms_active():
        raise NotImplementedError(
            "chunked_loss: not supported inside torch.func's grad, vjp, jacrev or vmap; use torch.autograd.grad, or "
            "linear_logps, which supports them"
        )
    if not callable(loss_fn):
        raise TypeError(f"loss_fn: got {type(loss_fn).__name__}, expected a function of (stats, rows)")
    hidden, weight, bias, shards = local_head(hidden, weight, bias, process_group)
    labels = check_operands(hidden, weight, labels, bias, shards)
    checks.label_range(labels, shards.n_cols(weight.shape[0]), checks.whole_number("ignore_index", ignore_index))
    groups = checks.integer("groups", groups, labels.shape, labels.device, "one group id per label")
    schedule, asked = Schedule.of(schedule), outputs_of(outputs)
    if schedule.num_scored is not None or not schedule.compact:
        raise ValueError(
            "schedule: got num_scored or compact=False, not supported by chunked_loss, which drops ignored tokens"
        )
    scaling = Scaling(*checks.scaling(temperature, logit_scale, softcap))
    head = make_head(Operands(hidden, weight, bias), asked, ignore_index, scaling, backend, schedule, shards)
    limit = None
    if head.keep == BASIS:
        n_cols, plan = shards.widest(weight.shape[0]), head.plan(hidden.device)
        limit = plan.rows_within_budget(n_cols) or plan.tile_rows(n_cols)
    flat = labels.flatten()
    if not checks.has_values(flat):  # meta or fake tensors: shapes and dtypes of one chunk
        how = dict(temperature=temperature, logit_scale=logit_scale, softcap=softcap, ignore_index=ignore_index)
        how |= dict(outputs=outputs, backend=backend, schedule=schedule)
        rows = torch.arange(flat.numel(), device=flat.device)
        share = loss_fn(linear_logps(hidden.reshape(flat.numel(), hidden.shape[-1]), weight, flat, bias, **how), rows)
        return share.to(head.dtypes.sums)
    chunks = chunks_of(groups.flatten(), flat, ignore_index, limit)
    task = _Task(loss_fn, head, asked, flat, chunks, schedule)
    operands = hidden.reshape(flat.numel(), hidden.shape[-1]), weight, bias
    links = (None if v is None else v[:0].clone() for v in operands)
    return _ChunkedLoss.apply(*operands, task, *links)
