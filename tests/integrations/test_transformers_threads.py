"""A fused model in several threads, nested calls, errors inside a call, copies and pickles."""

import copy
import inspect
import multiprocessing
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny_models import batch, causal_lm

from fused_po.integrations.transformers import fuse_lm_head, unfuse_lm_head

peft = pytest.importorskip("peft")


def call(model, seed, fused):
    ids, labels = batch(seed)
    return model(ids, labels=labels, **({"fused": True} if fused else {})).loss


@pytest.mark.parametrize("kinds", ((True, True), (True, False), (False, True)))
@pytest.mark.parametrize("compiled", (False, True))
def test_two_threads(kinds, compiled):
    """Both threads finish the body before either calls the head. Each gets its own loss and gradient, in any order."""
    model = fuse_lm_head(causal_lm("Gemma2"))
    alone = [call(model, seed, False).detach() for seed in range(2)]
    gate = None

    def wait(*args):
        if gate is not None:
            gate.wait(timeout=60)

    model.model.register_forward_hook(torch.compiler.disable(wait))
    run = torch.compile(model, backend="eager") if compiled else model
    if compiled:
        for fused in kinds:
            call(run, 0, fused)
    for _ in range(3):
        gate = threading.Barrier(2)
        with ThreadPoolExecutor(2) as pool:
            futures = [pool.submit(call, run, seed, fused) for seed, fused in enumerate(kinds)]
            losses = [future.result(timeout=120) for future in futures]
        for got, expected in zip(losses, alone):
            torch.testing.assert_close(got, expected)
            (gradient,) = torch.autograd.grad(got, [model.lm_head.weight], retain_graph=True)
            assert gradient.abs().sum() > 0
        gate = None


def test_many_threads_with_hooks_added_during_calls():
    """Pre-hooks that are added during the calls change no thread's result."""
    model = fuse_lm_head(causal_lm("Llama"))
    alone = [call(model, seed, False).item() for seed in range(6)]

    def work(seed):
        return [call(model, seed, True).item() for _ in range(10)]

    with ThreadPoolExecutor(6) as pool:
        futures = [pool.submit(work, seed) for seed in range(6)]
        for _ in range(5):
            model.lm_head.register_forward_pre_hook(lambda m, args: None)
        for future, expected in zip(futures, alone):
            assert future.result() == pytest.approx([expected] * 10, rel=1e-5)


def test_nested_calls():
    """A hook on the body calls the same model, plain and fused, and another fused model."""
    model, other = fuse_lm_head(causal_lm("Llama")), fuse_lm_head(causal_lm("Gemma2"))
    expected = [call(model, 0, True).item(), call(model, 1, True).item(), call(other, 1, True).item()]
    got, depth = [], [0]

    def inner(*args):
        if depth[0] == 0:
            depth[0] = 1
            got.extend([call(model, 1, False), call(model, 1, True), call(other, 1, True)])
            depth[0] = 0

    model.model.register_forward_hook(inner)
    for fused in (True, False):
        assert call(model, 0, fused).item() == pytest.approx(expected[0], rel=1e-5)
        assert [v.item() for v in got] == pytest.approx([expected[1], *expected[1:]], rel=1e-5)
        got.clear()


def test_the_head_called_directly():
    """A second call of the head inside a fused forward is an error, which leaves no state behind."""
    model = fuse_lm_head(causal_lm("Llama"))
    handle = model.model.register_forward_hook(lambda m, args, out: [model.lm_head(out.last_hidden_state), None][1])
    with pytest.raises(TypeError, match="calls its lm_head more than once"):
        call(model, 0, True)
    handle.remove()
    hidden = torch.randn(2, 3, 32)
    assert model.lm_head(hidden).shape == (2, 3, 97)
    torch.testing.assert_close(call(model, 0, True), call(model, 0, False))


@pytest.mark.parametrize("where", ("body", "head", "loss"))
@pytest.mark.parametrize("kind", (RuntimeError, KeyboardInterrupt))
def test_an_error_inside_a_call(where, kind):
    model = fuse_lm_head(causal_lm("Llama"))
    expected = call(model, 0, False)

    def fail(*args):
        raise kind("stop")

    if where == "loss":
        ids, labels = batch(0)
        with pytest.raises(ValueError, match="labels"):
            model(ids, labels=labels[:, 1:], fused=True)
    else:
        module = model.model if where == "body" else model.lm_head
        handle = module.register_forward_pre_hook(fail)
        with pytest.raises(kind, match="stop"):
            call(model, 0, True)
        handle.remove()
    for fused in (False, True):
        torch.testing.assert_close(call(model, 0, fused), expected)


def test_interleaved_generators():
    """Each step of a generator is a complete call, so suspended generators leave no state behind."""
    model = fuse_lm_head(causal_lm("Llama"))
    alone = [call(model, seed, False).item() for seed in range(4)]

    def losses(seeds, fused):
        for seed in seeds:
            yield call(model, seed, fused).item()

    a, b = losses((0, 1), True), losses((2, 3), False)
    assert [next(a), next(b), next(a), next(b)] == pytest.approx([alone[i] for i in (0, 2, 1, 3)], rel=1e-5)


def test_checkpoint_around_a_fused_call():
    """The forward runs again in the backward."""
    model, (ids, labels) = fuse_lm_head(causal_lm("Llama")), batch(0)
    grads = []
    for again in (False, True):
        model.zero_grad()

        def loss():
            return model(ids, labels=labels, fused=True).loss

        (torch.utils.checkpoint.checkpoint(loss, use_reentrant=False) if again else loss()).backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def pickled(model, tmp_path):
    return pickle.loads(pickle.dumps(model))


def saved(model, tmp_path):
    torch.save(model, tmp_path / "model.pt")
    return torch.load(tmp_path / "model.pt", weights_only=False)


def copied(model, tmp_path):
    return copy.deepcopy(model)


@pytest.mark.parametrize("how", (pickled, saved, copied))
@pytest.mark.parametrize("name", ("Llama", "Gemma2", "lora"))
def test_copies(how, name, tmp_path):
    """A copy is fused, has its own weights, and is unfused separately."""
    model = fuse_lm_head(causal_lm("Llama" if name == "lora" else name), always=True)
    if name == "lora":
        config = peft.LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False)
        model = peft.get_peft_model(model, config).eval()
    loss = call(model, 0, True)
    twin = how(model, tmp_path)
    ids, labels = batch(0)
    out = twin(ids, labels=labels)
    assert torch.equal(out.loss, loss) and out.token_stats is not None and out.logits is None
    assert inspect.signature(twin.forward) == inspect.signature(model.forward)
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(0.1 * torch.randn_like(p))
    assert call(twin, 0, True) != loss and torch.equal(call(model, 0, True), loss)
    torch.testing.assert_close(call(twin, 0, True), twin(ids, labels=labels, fused=False).loss)
    again = how(twin, tmp_path)
    assert torch.equal(call(again, 0, True), call(twin, 0, True))
    expected = call(twin, 0, True)
    unfuse_lm_head(twin)
    torch.testing.assert_close(call(twin, 0, False), expected)
    inner = twin.get_base_model() if name == "lora" else twin
    assert not {"forward", "_loss_function", "_fused_po"} & set(vars(inner))
    assert torch.equal(call(model, 0, True), loss)


def test_outputs_can_be_pickled():
    model, (ids, labels) = fuse_lm_head(causal_lm("Llama"), always=True), batch(0)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            out = model(ids, labels=labels, fused=True if grad else None, use_cache=False)
        if grad:
            out = type(out)(**{k: v for k, v in out.items() if k != "token_stats"} | {"loss": out.loss.detach()})
        twin = pickle.loads(pickle.dumps(out))
        assert type(twin) is type(out) and torch.equal(twin.loss, out.loss)
        assert twin.keys() == out.keys() and type(copy.deepcopy(out)) is type(out)


def child(model, queue):
    ids, labels = batch(0)
    with torch.no_grad():
        queue.put(model(ids, labels=labels, fused=True).loss.item())


def test_spawned_process():
    """multiprocessing.spawn pickles its arguments."""
    model = fuse_lm_head(causal_lm("Llama"))
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=child, args=(model, queue))
    process.start()
    try:
        assert queue.get(timeout=240) == pytest.approx(call(model, 0, True).item(), rel=1e-6)
    finally:
        process.join(60)


def test_the_signature_equals_that_of_the_class():
    model = causal_lm("Llama")
    before = inspect.signature(model.forward)
    fuse_lm_head(model)
    assert inspect.signature(model.forward) == before
