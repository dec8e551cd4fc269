"""Functions that the processes of test_vocab_parallel.py run, apart from tests of other files."""

import os
import time

import torch
import torch.distributed as dist
from counting import Collectives, run_inside
from sharded_ops import own, same_everywhere
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode

import fused_po
from fused_po import Schedule, VocabParallel
from fused_po.integrations.verl import linear_cross_entropy
from fused_po.parallel import row_passes

V, H = 96, 8
LINE = 4 * 32  # bytes of a padded fp32 row of up to 32 columns


def problem(n=20, v=V):
    """hidden [n, H], weight [v, H], labels [n] with some ignored, a gradient [n]; equal on all ranks."""
    torch.manual_seed(3)
    labels = torch.randint(0, v, (n,))
    labels[::7] = -100
    return torch.randn(n, H), torch.randn(v, H), labels, torch.randn(n)


def whole(hidden, weight, labels, g, **how):
    """(log-probs, gradients of hidden and weight) of the unsplit op."""
    hidden, weight = (t.detach().clone().requires_grad_() for t in (hidden, weight))
    logps = fused_po.linear_logps(hidden, weight, labels, **how).logps
    return (logps.detach(), *torch.autograd.grad((logps * g).sum(), (hidden, weight)))


def collectives(tile_rows: int, kept_rows: int, frozen: bool, outputs: tuple, n: int) -> tuple[list, list]:
    """The collectives of one forward and one backward; V / n_ranks columns per rank, all rows scored."""
    hidden, weight, labels, g = problem(n)
    part = own(weight, (V // dist.get_world_size(),) * dist.get_world_size())
    part = part.detach().requires_grad_(not frozen)
    line = 4 * -(-len(part) // 16) * 16
    schedule = Schedule(tile_bytes=2 * tile_rows * line, logits_budget=kept_rows * line)
    hidden.requires_grad_()
    with Collectives() as forward:
        how = {"outputs": outputs, "process_group": dist.group.WORLD, "schedule": schedule}
        stats = fused_po.linear_logps(hidden, part, labels.clamp(min=0), **how)
    with Collectives() as backward:
        (stats.logps * g).sum().backward()
    return forward.calls, backward.calls


def frozen(rows: int, bias: bool) -> None:
    """A frozen head: the gradient of hidden through log-probs and lse, which includes the labels' rows of the head."""
    n_ranks, rank = dist.get_world_size(), dist.get_rank()
    hidden, weight, labels, g = problem()
    schedule = Schedule(tile_bytes=rows * 2 * LINE)
    found = []
    for part in (slice(0, V), slice(rank * V // n_ranks, (rank + 1) * V // n_ranks)):
        h, group = hidden.clone().requires_grad_(), dist.group.WORLD if part != slice(0, V) else None
        b = weight[part, 0] if bias else None
        how = {"outputs": ("logps", "lse"), "process_group": group, "schedule": schedule}
        stats = fused_po.linear_logps(h, weight[part], labels, b, **how)
        with Collectives() as said:
            (stats.logps * g + stats.lse * g.roll(1)).sum().backward()
        found.append((stats.logps.detach(), stats.lse.detach(), h.grad))
    assert [size for _, size in said.calls] == [H * int((labels >= 0).sum())], "ignored tokens must not be sent"
    for ours, expected in zip(*reversed(found)):
        torch.testing.assert_close(ours, expected)
    same_everywhere(*found[1])


class Order(TorchDispatchMode):
    """Records the order of events: "mm" (a product starts), "send" (a collective starts), "received" (it has ended)."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.events.append("mm")
        elif func.namespace == "c10d":
            self.events.append("send")
        return run_inside(self, func, args, kwargs or {})


def overlap() -> tuple[list[str], list[str]]:
    """The order of events in a forward of three tiles, and in its backward with all rows kept."""
    hidden, weight, labels, g = problem()
    part = weight.chunk(dist.get_world_size())[dist.get_rank()].clone().requires_grad_()
    hidden.requires_grad_()
    checked = row_passes.checked
    schedule = Schedule(tile_bytes=2 * 7 * 4 * len(part), logits_budget=1 << 20)
    try:
        with Order() as forward:
            row_passes.checked = lambda everyone: forward.events.append("received") or checked(everyone)
            how = {"process_group": dist.group.WORLD, "schedule": schedule}
            stats = fused_po.linear_logps(hidden, part, labels.clamp(min=0), **how)
    finally:
        row_passes.checked = checked
    with Order() as backward:
        (stats.logps * g).sum().backward()
    return forward.events, backward.events


def divergence(direction: str) -> list:
    """The collectives of a forward of the KL."""
    hidden, weight, labels, _ = problem()
    part = own(weight, (V // dist.get_world_size(),) * dist.get_world_size())
    with Collectives() as said:
        how = {"direction": direction, "process_group": dist.group.WORLD}
        fused_po.linear_kl(hidden, part, hidden + 1, part, labels.clamp(min=0), **how)
    return said.calls


def other_labels() -> None:
    """Rank 1 has different labels."""
    hidden, weight, labels, _ = problem()
    fused_po.linear_logps(hidden, weight, labels.roll(dist.get_rank()), process_group=dist.group.WORLD)


def other_shapes() -> None:
    """Rank 1 has one token more."""
    hidden, weight, labels, _ = problem(20 + dist.get_rank())
    fused_po.linear_logps(hidden, weight, labels.clamp(min=0), process_group=dist.group.WORLD)


def one_dies() -> float:
    """Rank 1 exits; returns the seconds until the other ranks raise."""
    if dist.get_rank() == 1:
        os._exit(1)
    hidden, weight, labels, _ = problem()
    begin = time.monotonic()
    try:
        fused_po.linear_logps(hidden, weight, labels, process_group=dist.group.WORLD)
    except RuntimeError:
        return time.monotonic() - begin
    raise AssertionError("no error")


class Model(torch.nn.Module):
    """A body and a head; the forward of the head runs fused_po."""

    def __init__(self, v: int, bias: bool) -> None:
        super().__init__()
        self.body, self.lm_head = torch.nn.Linear(H, H), torch.nn.Linear(H, v, bias=bias)

    def forward(self, x, labels):
        hidden = self.body(x).tanh()
        return fused_po.linear_logps(hidden, self.lm_head.weight, labels, self.lm_head.bias).logps


def parallelized(v: int, bias: bool) -> None:
    """A head sharded by parallelize_module with a plain hidden gives one process's results, without gathering it."""
    x, _, labels, g = problem(v=v)
    model = Model(v, bias)
    for parameter in model.parameters():
        dist.broadcast(parameter.data, 0)
    expected = model(x, labels)
    wanted = torch.autograd.grad((expected * g).sum(), list(model.parameters()))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parallelize_module(model, mesh, {"lm_head": ColwiseParallel()})
    assert isinstance(model.lm_head.weight, DTensor)
    with Collectives() as said:
        logps = model(x, labels)
        (logps * g).sum().backward()
    torch.testing.assert_close(logps, expected)
    for parameter, grad in zip(model.parameters(), wanted):
        got = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
        torch.testing.assert_close(got, grad)
    same_everywhere(logps)
    assert [name.rsplit("_", 1)[0] for name, _ in said.calls] != [] and len(said.calls) == 2, said.calls


def sequence_parallel(as_dtensors: bool) -> None:
    """Each rank has the hidden states of a part of the tokens, and gets the gradient of its part."""
    n_ranks, rank = dist.get_world_size(), dist.get_rank()
    hidden, weight, labels, g = problem(20)
    expected, grad_hidden, grad_weight = whole(hidden, weight, labels, g)
    share = hidden.chunk(n_ranks)[rank].clone().requires_grad_()
    rows = slice(rank * len(weight) // n_ranks, (rank + 1) * len(weight) // n_ranks)
    if as_dtensors:
        mesh = init_device_mesh("cpu", (n_ranks,))
        head = distribute_tensor(weight, mesh, [Shard(0)]).requires_grad_()
        logps = fused_po.linear_logps(DTensor.from_local(share, mesh, [Shard(0)]), head, labels).logps
    else:
        head = weight[rows].clone().requires_grad_()
        group = VocabParallel(dist.group.WORLD, sequence_dim=0)
        logps = fused_po.linear_logps(share, head, labels, process_group=group).logps
    (logps * g).sum().backward()
    torch.testing.assert_close(logps, expected)
    torch.testing.assert_close(share.grad, grad_hidden.chunk(n_ranks)[rank])
    got = head.grad.to_local() if as_dtensors else head.grad
    torch.testing.assert_close(got, grad_weight[rows])


def verl() -> None:
    """verl's linear_cross_entropy: the gradient of hidden is not reduced, since Megatron's regions sum it."""
    n_ranks, rank = dist.get_world_size(), dist.get_rank()
    hidden, weight, labels, g = problem()
    expected, grad_hidden, grad_weight = whole(hidden, weight, labels, g)
    head = weight.chunk(n_ranks)[rank].clone().requires_grad_()
    hidden.requires_grad_()
    logps, _ = linear_cross_entropy(hidden, head, labels, 1.0, "none", dist.group.WORLD)
    (logps * g).sum().backward()
    torch.testing.assert_close(logps, expected)
    torch.testing.assert_close(head.grad, grad_weight.chunk(n_ranks)[rank])
    assert not torch.allclose(hidden.grad, grad_hidden)
    dist.all_reduce(hidden.grad)
    torch.testing.assert_close(hidden.grad, grad_hidden)


def chunked() -> None:
    """chunked_loss and linear_dpo with a sharded head give the results of one process."""
    n_ranks, rank = dist.get_world_size(), dist.get_rank()
    hidden, weight, labels, g = problem(24)
    schedule = Schedule(logits_budget=1 << 11)

    def in_chunks(h, w, group):
        how = {"process_group": group, "schedule": schedule}
        loss_fn = lambda stats, rows: (stats.logps * g[rows]).sum()  # noqa: E731
        return fused_po.chunked_loss(loss_fn, h, w, labels, torch.arange(24) // 4, **how)

    def dpo(h, w, group, kl):
        shape = h.view(4, 6, H), w, labels.view(4, 6)
        return fused_po.linear_dpo(*shape, h.view(4, 6, H) + 1, w, kl=kl, kl_coef=0.3, process_group=group).loss

    for run in (in_chunks, lambda *a: dpo(*a, "k3"), lambda *a: dpo(*a, "full")):
        found = []
        for w, group in ((weight, None), (weight.chunk(n_ranks)[rank], dist.group.WORLD)):
            h, w = (t.detach().clone().requires_grad_() for t in (hidden, w))
            loss = run(h, w, group)
            found.append((loss.detach(), *torch.autograd.grad(loss, (h, w))))
        (loss, grad_h, grad_w), (our_loss, our_h, our_w) = found
        torch.testing.assert_close(our_loss, loss)
        torch.testing.assert_close(our_h, grad_h)
        torch.testing.assert_close(our_w, grad_w.chunk(n_ranks)[rank])


def refused() -> list[str]:
    """The errors of bad calls."""
    hidden, weight, labels, _ = problem()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    wide, copy = (distribute_tensor(weight, mesh, [place]) for place in (Shard(1), Replicate()))
    sizes, world = (len(weight),) * dist.get_world_size(), dist.group.WORLD
    calls = [
        lambda: fused_po.linear_logps(hidden, wide, labels),
        lambda: fused_po.linear_logps(distribute_tensor(hidden, mesh, [Shard(0)]), weight, labels),
        lambda: fused_po.linear_logps(hidden, copy, labels, process_group=world),
        lambda: fused_po.linear_logps(hidden, weight, labels, process_group=VocabParallel(world, (1, *sizes[1:-1], 2))),
        lambda: VocabParallel(world, (1,)),
        lambda: VocabParallel("tp"),
        lambda: fused_po.linear_logps(hidden, weight, labels, process_group="tp"),
        lambda: fused_po.linear_logps(hidden, weight, labels + 10**4, process_group=world),
        lambda: fused_po.logps_from_logits(
            hidden, labels.clamp(max=7), process_group=VocabParallel(world, sequence_dim=0)
        ),
        lambda: fused_po.linear_logps(hidden, weight, labels, process_group=VocabParallel(world, sequence_dim=5)),
        lambda: fused_po.linear_kl(hidden, distribute_tensor(weight, mesh, [Shard(0)]), hidden, weight, labels),
    ]
    said = []
    for call in calls:
        try:
            call()
            said.append("nothing")
        except (TypeError, ValueError) as error:
            said.append(f"{type(error).__name__}: {error}")
    return said


def compiled() -> None:
    """torch.compile compiles the ops with a process group to one graph."""
    n_ranks, rank = dist.get_world_size(), dist.get_rank()
    hidden, weight, labels, g = problem(21)
    expected, grad_hidden, grad_weight = whole(hidden, weight, labels, g)
    head = weight.chunk(n_ranks)[rank].clone().requires_grad_()
    hidden.requires_grad_()

    def loss(hidden, head):
        return (fused_po.linear_logps(hidden, head, labels, process_group=dist.group.WORLD).logps * g).sum()

    torch.compile(loss, fullgraph=True, backend="aot_eager")(hidden, head).backward()
    torch.testing.assert_close(hidden.grad, grad_hidden)
    torch.testing.assert_close(head.grad, grad_weight.chunk(n_ranks)[rank])
    assert expected is not None
