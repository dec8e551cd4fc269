"""`fuse_lm_head` under DDP, FSDP1, FSDP2 and DeepSpeed's ZeRO, and with the sequence cut over ranks."""

import os

import pytest
import torch
from ranks import Ranks
from tiny_models import batch, causal_lm
from torch import distributed

import fused_po
from fused_po.integrations.transformers import fuse_lm_head

CLOSE = dict(rtol=1e-9, atol=1e-9)


@pytest.fixture(scope="module")
def two():
    ranks = Ranks(2)
    yield ranks
    ranks.close()


def plain(always: bool = False) -> torch.nn.Module:
    return fuse_lm_head(causal_lm("Llama").double().train(), always=always)


def problem() -> tuple:
    """(ids, labels, how many are scored): the ranks' halves have other numbers of scored tokens."""
    ids, labels = batch(0, rows=4)
    labels[0, :7] = -100
    return ids, labels, int((fused_po.shift_labels(labels) != -100).sum())


def steps(call, model, grads_of, step, mine: slice, n_ranks: int = 1) -> list:
    """Two steps of SGD: gradients by name, whole, of each; loss is a mean over all ranks' tokens."""
    ids, labels, count = problem()
    seen = []
    for _ in range(2):
        loss = call(ids[mine], labels=labels[mine], fused=True, num_items_in_batch=count / n_ranks).loss
        seen.append(grads_of(loss))
        step()
    return seen


def own_backward(model):
    """(grads_of, step) of a model whose engine leaves backward and optimizer to torch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def whole(tensor):
        return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()

    def grads_of(loss):
        optimizer.zero_grad()
        loss.backward()
        return {name: whole(p.grad) for name, p in model.named_parameters()}

    return grads_of, optimizer.step


def one_process() -> list:
    model = plain()
    return steps(model, model, *own_backward(model), slice(None))


def layers_and(model, *more):
    """fully_shard on the layers, on what else is named, and on the rest."""
    from torch.distributed.fsdp import fully_shard

    for unit in [*model.model.layers, *more, model]:
        fully_shard(unit)
    return model


WRAPS = {
    "ddp": lambda model: torch.nn.parallel.DistributedDataParallel(model),
    "fully_shard": lambda model: layers_and(model),
    "fully_shard, head too": lambda model: layers_and(model, model.lm_head),
    "fully_shard, nothing but the head": lambda model: layers_and(model, model.lm_head) and model,
}


def wrapped(name: str) -> list:
    rank, model = distributed.get_rank(), plain()
    call = WRAPS[name](model)
    return steps(call, model, *own_backward(model), slice(rank * 2, rank * 2 + 2), n_ranks=2)


@pytest.mark.parametrize("name", list(WRAPS)[:3])
def test_two_ranks_are_one_process(name, two):
    """Every parameter's gradient, the head's too, whole and the same on both ranks; twice, with a step between."""
    wanted = one_process()
    for seen in two.run(wrapped, name):
        for grads, theirs in zip(seen, wanted):
            assert grads.keys() == theirs.keys() and "lm_head.weight" in grads
            for key, grad in grads.items():
                torch.testing.assert_close(grad, theirs[key], **CLOSE, msg=lambda text, key=key: f"{key}: {text}")
                assert grad.any()
