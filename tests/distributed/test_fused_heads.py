"""`fuse_lm_head` under DDP, FSDP1, FSDP2, DeepSpeed's ZeRO, tensor parallelism and context parallelism."""

import os

import example_runs  # noqa: F401  (puts examples/ on the path)
import pytest
import torch
from rank_pool import Ranks
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


def device() -> torch.device:
    """This rank's device."""
    return torch.device("cuda", distributed.get_rank()) if distributed.get_backend() == "nccl" else torch.device("cpu")


def model_of(dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    return fuse_lm_head(causal_lm("Llama").to(dtype).train())


def problem() -> tuple:
    """(ids, labels, number of scored tokens). The halves of the two ranks have different numbers of scored tokens."""
    ids, labels = batch(0, rows=4)
    labels[0, :7] = -100
    return ids, labels, int((fused_po.shift_labels(labels) != -100).sum())


def own_rows() -> tuple[dict, dict]:
    """(this rank's half of the problem as arguments, the divisor of its loss: engines average gradients over ranks)."""
    ids, labels, count = problem()
    mine = slice(distributed.get_rank() * 2, distributed.get_rank() * 2 + 2)
    return dict(input_ids=ids[mine].to(device()), labels=labels[mine].to(device())), count / 2


def two_steps(call, arguments: dict, count: float, grads_of, step, fused: bool = True) -> list[dict]:
    """The gradients of two steps, by name."""
    seen = []
    for _ in range(2):
        seen.append(grads_of(call(**arguments, fused=fused, num_items_in_batch=count).loss))
        step()
    return seen


def by_torch(call, model, arguments, count, fused: bool = True) -> list[dict]:
    """The gradients of two steps with torch's own backward and optimizer."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def grads_of(loss):
        optimizer.zero_grad()
        loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters()}
        return {name: (g.full_tensor() if hasattr(g, "full_tensor") else g.clone()).cpu() for name, g in grads.items()}

    return two_steps(call, arguments, count, grads_of, optimizer.step, fused)


def one_process(dtype: torch.dtype = torch.float64, fused: bool = True) -> list[dict]:
    ids, labels, count = problem()
    model = model_of(dtype)
    return by_torch(model, model, dict(input_ids=ids, labels=labels), count, fused)


def shard_layers_and(model, *more):
    """Apply fully_shard to the layers, to the named modules and to the whole model."""
    from torch.distributed.fsdp import fully_shard

    for unit in [*model.model.layers, *more, model]:
        fully_shard(unit)
    return model


WRAPS = {
    "ddp": lambda model: torch.nn.parallel.DistributedDataParallel(model),
    "fully_shard": lambda model: shard_layers_and(model),
    "fully_shard, head too": lambda model: shard_layers_and(model, model.lm_head),
}


def wrapped(name: str) -> list[dict]:
    model = model_of().to(device())
    return by_torch(WRAPS[name](model), model, *own_rows())


def same(found: list[list[dict]], wanted: list[dict]) -> None:
    """The gradients of all parameters, the head's included, equal those of one process on both ranks, in two steps."""
    for seen in found:
        for grads, theirs in zip(seen, wanted):
            assert grads.keys() == theirs.keys() and "lm_head.weight" in grads
            for key, grad in grads.items():
                torch.testing.assert_close(grad, theirs[key], **CLOSE, msg=lambda text, key=key: f"{key}: {text}")
                assert grad.any()


@pytest.mark.parametrize("name", WRAPS)
def test_two_ranks_equal_one_process(name, two):
    same(two.run(wrapped, name), one_process())


def by_tensor_parallel(fused_first: bool) -> list[dict]:
    """parallelize_module by the model's own plan: the ranks hold 49 and 48 of the head's 97 rows, and all tokens."""
    from trainer.parallel import tensor_parallel

    mesh = distributed.init_device_mesh(device().type, (2,))
    model = causal_lm("Llama").double().train().to(device())
    model = fuse_lm_head(model) if fused_first else model
    tensor_parallel(model, mesh)
    model = model if fused_first else fuse_lm_head(model)
    ids, labels, count = problem()
    assert len(model.lm_head.weight.to_local()) == 49 - distributed.get_rank()
    return by_torch(model, model, dict(input_ids=ids.to(device()), labels=labels.to(device())), count)


@pytest.mark.parametrize("fused_first", [True, False])
def test_a_vocabulary_sharded_head_equals_the_whole_head(fused_first, two):
    same(two.run(by_tensor_parallel, fused_first), one_process())


def by_fsdp1() -> list[dict]:
    """FullyShardedDataParallel, wrapped by layer like accelerate's transformer wrap policy."""
    from torch.distributed.fsdp import FullyShardedDataParallel as Fsdp
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    model = model_of()
    policy = ModuleWrapPolicy({type(model.model.layers[0])})
    outer = Fsdp(model, auto_wrap_policy=policy, use_orig_params=True, device_id=device())
    optimizer = torch.optim.SGD(outer.parameters(), lr=0.1)

    def grads_of(loss):
        optimizer.zero_grad()
        loss.backward()
        with Fsdp.summon_full_params(outer, with_grads=True):
            named = [(name.replace("_fsdp_wrapped_module.", ""), p.grad) for name, p in outer.named_parameters()]
            return {name: grad.clone().cpu() for name, grad in named}

    return two_steps(outer, *own_rows(), grads_of, optimizer.step)


def test_fsdp1_equals_one_process(two):
    same(two.run(by_fsdp1), one_process())


def gathered_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **_):
    """Attention from this rank's part of the sequence to all of it: keys and values [B, heads, T, D] are gathered."""
    from torch.distributed._functional_collectives import all_gather_tensor_autograd

    key, value = (all_gather_tensor_autograd(t.contiguous(), 2, distributed.group.WORLD) for t in (key, value))
    here, length = query.shape[2], key.shape[2]
    places = torch.arange(here, device=query.device) + distributed.get_rank() * here
    seen = places[:, None] >= torch.arange(length, device=query.device)
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, seen, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2).contiguous(), None


def by_context_parallel(shifted_first: bool) -> tuple[float, list[dict]]:
    """(loss, gradients) under DDP, where each rank has half of every sequence."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register("cut", gathered_attention)
    model = model_of().to(device())
    model.set_attn_implementation("cut")
    ids, labels, count = problem()
    half = ids.shape[1] // 2
    mine = slice(distributed.get_rank() * half, (distributed.get_rank() + 1) * half)
    places = torch.arange(ids.shape[1]).expand_as(ids)
    given = dict(input_ids=ids, position_ids=places)
    given |= dict(shift_labels=fused_po.shift_labels(labels)) if shifted_first else dict(labels=labels)
    given = {name: value[:, mine].to(device()) for name, value in given.items()}
    with torch.no_grad():
        loss = model(**given, fused=True, num_items_in_batch=count).loss
    distributed.all_reduce(loss)
    return loss.item(), by_torch(WRAPS["ddp"](model), model, given, count / 2)


def test_context_parallelism_equals_the_whole_sequence(two):
    """Context parallelism: labels are shifted before the split, since the last token's label is on the next rank."""
    found = two.run(by_context_parallel, True)
    same([grads for _, grads in found], one_process())
    ids, labels, _ = problem()
    with torch.no_grad():
        whole = model_of()(ids, labels=labels, fused=True).loss.item()
    assert [loss for loss, _ in found] == pytest.approx([whole] * 2, rel=1e-9)
    # splitting before shifting loses the label at the boundary
    assert two.run(by_context_parallel, False)[0][0] < 0.95 * whole


def by_zero(stage: int) -> tuple[list[dict], list[int]]:
    """(gradients of two steps, the number of head elements on this rank before and in each backward), in fp32."""
    if device().type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    model = model_of(torch.float32)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},  # shard small parameters too
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # no clipping
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]

    entries, weight = [], model.lm_head.weight

    def watch(head, args):
        if args[0].requires_grad and args[0].shape[1]:  # its gradient is ready when the head's backward is done
            args[0].register_hook(lambda grad: entries.append(weight.numel()))

    model.lm_head.register_forward_pre_hook(watch)

    def grads_of(loss):
        entries.append(weight.numel())
        engine.backward(loss)
        return {name: safe_get_full_grad(p).clone().cpu() for name, p in model.named_parameters()}

    return two_steps(engine, *own_rows(), grads_of, engine.step), entries


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_equals_one_process(stage, two):
    """Errors are bounded by those of the stock model on one process. ZeRO-3 gathers the head forward and backward."""
    pytest.importorskip("deepspeed", reason="needs DeepSpeed: pip install deepspeed, ninja and a C++ compiler on a CPU")
    exact, stock = one_process(), one_process(torch.float32, fused=False)
    largest = [{key: grad.abs().max() for key, grad in grads.items()} for grads in exact]

    def errors(runs: list[dict]) -> list[float]:
        # the error of one tensor is random: take the largest of a step, relative to its tensor
        return [
            max(float((grads[key] - truth[key]).abs().max() / big[key]) for key in truth)
            for grads, truth, big in zip(runs, exact, largest)
        ]

    whole = exact[0]["lm_head.weight"].numel()
    for seen, entries in two.run(by_zero, stage):
        # nothing is gathered between forward and backward; from the second step on ZeRO-3 keeps what it needs next
        assert entries[:2] == [0, whole] and entries[3] == whole if stage == 3 else {*entries} == {whole}
        assert seen[0].keys() == exact[0].keys()
        for ours, theirs in zip(errors(seen), errors(stock)):
            assert ours <= 2 * theirs + torch.finfo(torch.float32).eps
