"""Every op under second derivatives, forward-mode AD and torch.func."""

import warnings

import pytest
import torch
from numerics import DEVICE
from op_table import (
    ROWS,
    close,
    equal,
    in_place_too,
    named,
    run,
    tensors,
)
from torch.autograd import forward_ad

import fused_po


def refused(name, options, differentiate):
    """On a GPU the backward runs in a thread of its own, where new nodes run after older ones. With inplace_backward
    PyTorch may therefore notice the overwritten logits before our error is raised."""
    errors = ["second derivatives are not implemented", "forward-mode tangent"]
    if options.get("inplace_backward") and DEVICE == "cuda":
        errors.append("modified by an inplace operation")
    with pytest.raises(RuntimeError, match="|".join(errors)):
        differentiate(name, options)


def scalar_of(name, options):
    """(a scalar function of the row's first leaf, that leaf)."""
    leaf, t = ROWS[name].leaves[0], tensors()
    carrying = [field for field, value in run(name)[0].items() if value.requires_grad]

    def function(value):
        found = named(ROWS[name].call(t | {leaf: value * 1.0}, backend="reference", **options))
        return sum((i + 1) * found[field].sum() for i, field in enumerate(carrying))

    return function, t[leaf]


def twice(name, options, **how):
    _, loss, leaves = run(name, **options)
    grads = torch.autograd.grad(loss, leaves, create_graph=True)
    assert all(grad.requires_grad for grad in grads)
    torch.autograd.grad(sum(grad.square().sum() for grad in grads), leaves, **how)


def penalty(name, options):
    _, loss, leaves = run(name, **options)
    grads = torch.autograd.grad(loss, leaves, create_graph=True)
    (loss + sum(grad.norm() for grad in grads)).backward()


SECOND = {
    "grad twice": twice,
    "unused allowed": lambda name, options: twice(name, options, allow_unused=True),
    "gradient penalty": penalty,
    "torch.autograd.functional.hessian": lambda *row: torch.autograd.functional.hessian(*scalar_of(*row)),
    "torch.func.hessian": lambda *row: torch.func.hessian(scalar_of(*row)[0])(scalar_of(*row)[1]),
}


@pytest.mark.parametrize("way", SECOND)
@in_place_too
def test_second_derivatives_are_refused(name, options, way):
    if way == "torch.func.hessian" and name.startswith("chunked_loss"):
        pytest.skip("refuses all of torch.func: test_chunked_loss_refuses_torch_func")
    refused(name, options, SECOND[way])


@in_place_too
def test_create_graph_alone_gives_the_same_gradient(name, options):
    expected = torch.autograd.grad(*run(name)[1:])
    close(torch.autograd.grad(*run(name, **options)[1:], create_graph=True), expected)


def dual(function, value):
    with forward_ad.dual_level():
        return function(forward_ad.make_dual(value, value))


FORWARD = {
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "dual numbers": dual,
    "jvp of vmap": lambda f, x: torch.func.jvp(lambda v: torch.func.vmap(f)(v[None]), (x,), (x,)),
    "jvp of jvp": lambda f, x: torch.func.jvp(lambda v: torch.func.jvp(f, (x,), (v,)), (x,), (x,)),
}


@pytest.mark.parametrize("way", FORWARD)
@pytest.mark.parametrize("name", ROWS)
def test_forward_mode_is_refused_for_each_argument(name, way):
    row = ROWS[name]
    for argument in (*row.leaves, *row.constants):
        t = tensors()
        if not t[argument].is_floating_point() or (name.startswith("chunked_loss") and argument == "weights"):
            continue

        def function(value, t=t, argument=argument):
            return named(row.call(t | {argument: value}))

        expected = "low_rank" if argument in ("u", "low") else argument
        with pytest.raises(NotImplementedError, match=rf"^{name.split(',')[0]}: {expected} has a forward-mode tangent"):
            FORWARD[way](function, t[argument])


@pytest.mark.parametrize("name", [name for name in ROWS if not name.startswith("chunked_loss")])
def test_forward_mode_through_a_graph_compiled_without_it(name):
    """A graph compiled without a tangent calls only the op, so the op itself must refuse a tangent."""
    row, t = ROWS[name], tensors()
    compiled = torch.compile(lambda t: named(row.call(t)), backend="aot_eager")
    compiled(t)
    for argument in row.leaves:
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="has a forward-mode tangent"):
            compiled(t | {argument: forward_ad.make_dual(t[argument], t[argument])})


def test_forward_mode_through_inputs_of_a_loss_function():
    t = tensors()
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="loss_fn's loss has a forward-mode tangent"):
        ROWS["chunked_loss"].call(t | {"weights": forward_ad.make_dual(t["weights"], t["weights"])})


@pytest.mark.parametrize("name", ROWS)
def test_constants_inside_forward_mode(name):
    """Tensors without a tangent are computed as usual: a frozen model's log-probs, or detached tensors."""
    row, t = ROWS[name], tensors()
    argument = (*row.leaves, *row.constants)[0]
    expected = named(row.call(t))
    found = [dual(lambda value: named(row.call(t | {argument: value.detach()})), t[argument])]
    if not name.startswith("chunked_loss"):
        inside = torch.func.jvp(
            lambda value: (value, named(row.call(t | {argument: value.detach()}))), (t[argument],), (t[argument],)
        )
        found.append(inside[0][1])
    for results in found:
        assert equal(results.values(), expected.values())


@pytest.mark.parametrize("way", ("grad", "vjp", "jacrev", "vmap", "vmap of grad", "grad of vmap", "jacrev of vmap"))
@in_place_too
def test_reverse_mode_of_torch_func(name, options, way):
    if name.startswith("chunked_loss"):
        pytest.skip("refuses all of torch.func: test_chunked_loss_refuses_torch_func")
    row, func, t = ROWS[name], torch.func, tensors()
    results, loss, leaves = run(name)
    carrying = [field for field, value in results.items() if value.requires_grad]
    expected = torch.autograd.grad(loss, leaves)
    warnings.filterwarnings("ignore", "There is a performance drop")
    for leaf, gradient in zip(row.leaves, expected):

        def function(value, leaf=leaf):
            found = named(row.call(t | {leaf: value * 1.0}, backend="reference", **options))
            return sum((i + 1) * found[field].sum() for i, field in enumerate(carrying))

        x = t[leaf]
        if way == "grad":
            found = func.grad(function)(x)
        elif way == "vjp":
            found = func.vjp(function, x)[1](torch.ones((), device=DEVICE))[0]
        elif way == "jacrev":
            found = func.jacrev(function)(x)
        elif way == "vmap":
            found, gradient = func.vmap(function)(torch.stack([x, x / 2]))[1], function(x / 2)
        elif way == "vmap of grad":
            found = func.vmap(func.grad(function))(torch.stack([x / 2, x]))[1]
        elif way == "grad of vmap":
            found = func.grad(lambda v, f=function: func.vmap(f)(v).sum())(torch.stack([x / 2, x]))[1]
        else:
            found = func.jacrev(func.vmap(function))(torch.stack([x / 2, x]))[1, 1]
        close([found], [gradient])


def test_torch_func_of_a_module():
    head = torch.nn.Linear(5, 11, bias=False, device=DEVICE)
    t = tensors()

    class Scorer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = head

        def forward(self, hidden):
            return fused_po.linear_logps(hidden, self.head.weight, t["labels"]).logps.sum()

    scorer = Scorer()
    parameters = {name: value.detach() for name, value in scorer.named_parameters()}
    found = torch.func.grad(lambda p: torch.func.functional_call(scorer, p, t["hidden"]))(parameters)
    scorer(t["hidden"]).backward()
    torch.testing.assert_close(found["head.weight"], head.weight.grad)


@pytest.mark.parametrize("transform", (torch.func.grad, torch.func.vmap, torch.func.jacrev))
def test_chunked_loss_refuses_torch_func(transform):
    t = tensors()
    with pytest.raises(NotImplementedError, match="chunked_loss: not supported inside torch"):
        transform(lambda hidden: ROWS["chunked_loss"].call(t | {"hidden": hidden})[0])(t["hidden"])


@pytest.mark.parametrize("transform", ("jvp", "grad"))
def test_torch_func_inside_compile_is_refused(transform):
    torch.compiler.reset()
    t = tensors()

    def loss(logits):
        return fused_po.logps_from_logits(logits, t["labels"]).logps.sum()

    def both(x):
        return torch.func.grad(loss)(x) if transform == "grad" else torch.func.jvp(loss, (x,), (x,))[1]

    said = "torch.func.grad, vjp and jacrev are not supported" if transform == "grad" else "has a forward-mode tangent"
    with pytest.raises(RuntimeError, match=said):
        torch.compile(both, fullgraph=True, backend="aot_eager")(t["logits"])
