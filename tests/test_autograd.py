"""Autograd around every op: edits of results, second derivatives, forward mode, torch.func, inference mode."""

import warnings

import pytest
import torch
from autograd_ops import ROWS, STATS, B, cut_over_ranks, leaves_of, named, tensors, total
from helpers import BACKENDS, DEVICE
from ranks import Ranks
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import fused_po

DIFFERENTIABLE = [name for name, row in ROWS.items() if row.leaves]
IN_PLACE = [(name, {}) for name in DIFFERENTIABLE]
IN_PLACE += [(name, {"inplace_backward": True}) for name in DIFFERENTIABLE if ROWS[name].inplace]
every = pytest.mark.parametrize("name", DIFFERENTIABLE)
in_place_too = pytest.mark.parametrize(
    "name, options", IN_PLACE, ids=[f"{n}{', in place' * len(o)}" for n, o in IN_PLACE]
)


def run(name, backend="reference", **options):
    """(results by name, a scalar of those that carry gradients, leaves) of a row."""
    t = tensors()
    leaves = leaves_of(name, t)
    results = ROWS[name].call(t, backend=backend, **options)
    return named(results), total(results), list(leaves.values())


def storage(value):
    return value.untyped_storage().data_ptr()


def equal(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def close(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ROWS)
def test_results_are_apart_from_what_is_saved(name, backend):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        results = run(name, backend)[0]
    private, owners = {storage(value) for value in saved if value.numel()}, {}
    for field, value in results.items():
        assert storage(value) not in private, f"{field} shares memory with what the backward reads"
        assert storage(value) not in owners, f"{field} shares memory with {owners[storage(value)]}"
        owners[storage(value)] = field


def no_grad_edit(value):
    with torch.no_grad():
        value.mul_(0)


def numpy_edit(value):
    value.detach().cpu().numpy()[...] = 1


EDITS = {
    "data": lambda value: value.data.zero_(),  # bumps no version counter, as dist.all_reduce
    "detach": lambda value: value.detach().add_(3),
    "no_grad": no_grad_edit,
    "numpy": numpy_edit,
}


@pytest.mark.parametrize("edit", EDITS)
@every
def test_an_edit_of_a_result_changes_no_gradient_and_no_other_result(name, edit):
    _, loss, leaves = run(name)
    expected = torch.autograd.grad(loss, leaves)
    for field in run(name)[0]:
        results, loss, leaves = run(name)
        before = {other: value.detach().clone() for other, value in results.items() if other != field}
        EDITS[edit](results[field])
        first = torch.autograd.grad(loss, leaves, retain_graph=True)
        assert equal(first, expected) and equal(torch.autograd.grad(loss, leaves), expected), field
        assert all(torch.equal(results[other], value) for other, value in before.items()), field


@every
def test_an_edit_of_a_result_is_part_of_the_graph(name):
    """x[~keep] = 0 has the gradient of torch.where(keep, x, 0)."""
    for field in [field for field, value in run(name)[0].items() if value.requires_grad]:
        results, _, leaves = run(name)
        keep = torch.arange(results[field].numel(), device=DEVICE).view(results[field].shape) % 2 == 0
        by_where = results | {field: torch.where(keep, results[field], 0)}
        expected = torch.autograd.grad(total(by_where.values()), leaves)
        results, _, leaves = run(name)
        results[field][~keep] = 0
        loss = total(results.values())
        close(torch.autograd.grad(loss, leaves, retain_graph=True), expected)
        close(torch.autograd.grad(loss, leaves), expected)


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.plain])
def test_log_probs_edited_as_those_of_log_softmax(name):
    row, keep = ROWS[name], tensors()["mask"]
    found = []
    for score in (lambda t: row.call(t)[0], row.plain):
        t = tensors(torch.float64)
        leaves = leaves_of(name, t)
        logps = score(t)
        logps[~keep] = 0
        logps.mul_(2)
        found.append(torch.autograd.grad((t["weights"] * logps).sum(), list(leaves.values())))
    close(*found)


def test_an_edit_of_one_half_leaves_the_other_half_usable():
    """Each result counts its own versions: what autograd saved of one is not spoilt by an edit of another."""
    results, _, leaves = run("dpo_from_logits")
    loss = results["rejected_logps"].square().sum() + results["losses"].exp().sum()
    for field in set(results) - {"rejected_logps", "losses"}:
        with torch.no_grad():
            results[field].zero_()
    torch.autograd.grad(loss, leaves)


def test_chunked_loss_gives_its_loss_function_copies():
    t = tensors()
    leaves = leaves_of("chunked_loss", t)
    w, schedule = t["weights"].flatten(), fused_po.Schedule(logits_budget=200)

    def plain(stats, rows):
        return (w[rows] * stats.logps + stats.entropy - 2 * stats.lse).sum()

    def editing(stats, rows):
        value = plain(stats, rows.clone())
        for field in (*stats[:3], rows):
            field.data.zero_()
        return value

    def in_graph(stats, rows):
        stats.logps[0] = 0
        return plain(stats, rows)

    def by_where(stats, rows):
        first = torch.arange(len(rows), device=DEVICE) == 0
        return plain(stats._replace(logps=torch.where(first, 0, stats.logps)), rows)

    def gradients(loss_fn):
        loss = fused_po.chunked_loss(
            loss_fn, t["hidden"], t["weight"], t["labels"], t["groups"], t["bias"], outputs=STATS, schedule=schedule
        )
        return torch.autograd.grad(loss, list(leaves.values()))

    assert equal(gradients(editing), gradients(plain))
    close(gradients(in_graph), gradients(by_where))


@pytest.mark.parametrize("name", ("linear_logps", "kl_from_logits", "dpo_from_logits", "policy_loss_from_logits"))
def test_edits_after_a_compiled_forward(name):
    torch.compiler.reset()
    expected = torch.autograd.grad(*run(name)[1:])

    def forward(t):
        results = ROWS[name].call(t)
        return named(results), total(results)

    t = tensors()
    leaves = leaves_of(name, t)
    results, loss = torch.compile(forward, fullgraph=True, backend="aot_eager")(t)
    for value in results.values():
        value.data.zero_()
    close(torch.autograd.grad(loss, list(leaves.values())), expected)


@pytest.mark.parametrize(
    "name, outputs, numbers",
    [
        ("logps", ("logps",), 3),
        ("logps", STATS, 4),
        ("linear", ("logps",), 3),
        ("linear", ("logps", "entropy"), 4),
        ("linear", ("logps", "lse"), 3),
    ],
)
def test_numbers_saved_of_a_token(name, outputs, numbers):
    """What a backward reads of a token's results: shift, norm and log-prob, and the entropy if it is an output."""
    t, saved = tensors(), []
    own = {storage(value) for value in t.values()}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        if name == "logps":
            fused_po.logps_from_logits(t["logits"].requires_grad_(), t["labels"], outputs=outputs)
        else:
            hidden = t["hidden"].requires_grad_()
            fused_po.linear_logps(hidden, t["weight"].requires_grad_(), t["labels"], outputs=outputs)
    n = t["labels"].numel()
    of_tokens = [x for x in saved if storage(x) not in own and x.dtype == torch.float32 and x.shape[-1:] == (n,)]
    assert sum(x.numel() for x in of_tokens) == numbers * n


def refused(name, options, differentiate):
    with pytest.raises(RuntimeError, match=r"second derivatives are not implemented|forward-mode tangent"):
        differentiate(name, options)


def scalar_of(name, options):
    """(a function of the row's first leaf, that leaf)"""
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
def test_forward_mode_is_refused_by_argument(name, way):
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


def test_forward_mode_through_what_a_loss_function_reads():
    t = tensors()
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="loss_fn's loss has a forward-mode tangent"):
        ROWS["chunked_loss"].call(t | {"weights": forward_ad.make_dual(t["weights"], t["weights"])})


@pytest.mark.parametrize("name", ROWS)
def test_constants_inside_forward_mode(name):
    """What has no tangent is computed as usual: a frozen model's log-probs, or what was detached."""
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
        pytest.skip("test_chunked_loss_refuses_torch_func")
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
    with pytest.raises(NotImplementedError, match="chunked_loss: does not run inside torch"):
        transform(lambda hidden: ROWS["chunked_loss"].call(t | {"hidden": hidden})[0])(t["hidden"])


@pytest.mark.parametrize("transform", ("jvp", "grad"))
def test_torch_func_inside_compile_is_refused(transform):
    torch.compiler.reset()
    t = tensors()

    def loss(logits):
        return fused_po.logps_from_logits(logits, t["labels"]).logps.sum()

    def both(x):
        return torch.func.grad(loss)(x) if transform == "grad" else torch.func.jvp(loss, (x,), (x,))[1]

    said = "torch.func.grad, vjp and jacrev do not run" if transform == "grad" else "has a forward-mode tangent"
    with pytest.raises(RuntimeError, match=said):
        torch.compile(both, fullgraph=True, backend="aot_eager")(t["logits"])


@pytest.mark.parametrize("name", ROWS)
def test_constants_made_under_inference_mode(name):
    row = ROWS[name]
    expected, loss, leaves = run(name)
    gradients = torch.autograd.grad(loss, leaves) if leaves else ()
    for made in (*((constant,) for constant in row.constants), row.constants):
        t = tensors()
        with torch.inference_mode():
            t |= {constant: t[constant].clone() for constant in made}
        leaves = leaves_of(name, t)
        results = row.call(t, backend="reference")
        assert equal(named(results).values(), expected.values()), made
        if leaves:
            assert equal(torch.autograd.grad(total(results), list(leaves.values())), gradients), made


@pytest.mark.parametrize("name", ROWS)
def test_whole_calls_under_inference_mode(name):
    expected = run(name)[0].values()
    with torch.inference_mode():
        t = tensors()
        found = named(ROWS[name].call(t, backend="reference"))
        for value in found.values():
            value.clone().mul_(2)
    assert equal(found.values(), expected)
    assert equal(named(ROWS[name].call(t, backend="reference")).values(), expected)  # of such tensors alone, outside


def test_references_made_under_inference_mode_are_not_copied():
    """kl_from_logits saves the very memory of the reference's logits, linear_kl that of its head."""
    for name, constant in (("kl_from_logits", "ref_logits"), ("linear_kl", "ref_weight")):
        t, saved = tensors(), []
        with torch.inference_mode():
            t[constant] = t[constant].clone()
        leaves_of(name, t)
        with torch.autograd.graph.saved_tensors_hooks(lambda x, saved=saved: saved.append(x) or x, lambda x: x):
            ROWS[name].call(t)
        assert storage(t[constant]) in {storage(x) for x in saved}


def on_cpu(function, values):
    with torch.autograd.graph.save_on_cpu():
        return function(*values)


def copying(function, values):
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x):
        return function(*values)


HOOKS = {
    "save_on_cpu": on_cpu,
    "hooks that copy": copying,
    "checkpoint": lambda function, values: checkpoint(function, *values, use_reentrant=False),
}


@pytest.mark.parametrize("way", HOOKS)
@in_place_too
def test_saved_tensor_hooks_and_checkpoint(name, options, way):
    row, t = ROWS[name], tensors()
    expected = torch.autograd.grad(*run(name, **options)[1:])

    def function(*values):
        given = t | dict(zip(row.leaves, values))
        if "logits" in row.leaves:
            given["logits"] = given["logits"] * 1.0
        return total(row.call(given, backend="reference", **options))

    leaves = [t[leaf].clone().requires_grad_() for leaf in row.leaves]
    assert equal(torch.autograd.grad(HOOKS[way](function, leaves), leaves), expected)


MODULES = ("FusedLinearDPOLoss", "FusedLinearCPOLoss", "FusedLinearSimPOLoss", "FusedLinearORPOLoss")


@pytest.mark.parametrize("name", MODULES)
def test_results_of_modules_are_apart(name):
    """The metrics beside a module's loss, edited in place before the backward, one after the other."""
    grads = []
    for edit in (False, True):
        t = tensors()
        hidden, weight = (t[x].requires_grad_() for x in ("hidden", "weight"))
        module = getattr(fused_po.modules, name)()
        extra = {"ref_input": t["ref_hidden"], "ref_weight": t["ref_weight"]} if "DPO" in name else {}
        loss, metrics = module(weight, hidden, t["labels"], **extra)
        assert metrics[0].shape == (B,)
        for value in metrics if edit else ():
            value.mul_(7)
        grads.append(torch.autograd.grad(loss, (hidden, weight)))
    assert equal(*grads)


@pytest.fixture(scope="module")
def ranks():
    group = Ranks(2)
    yield group
    group.close()


CUT = [name for name in DIFFERENTIABLE if not name.startswith(("dpo_from", "policy"))]


@pytest.mark.parametrize("name", CUT)
def test_the_same_with_the_vocabulary_cut_over_ranks(name, ranks):
    ranks.run(cut_over_ranks, name)
