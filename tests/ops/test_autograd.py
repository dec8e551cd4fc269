"""Every op and autograd: in-place edits of results, inference mode, saved-tensor hooks, modules, ranks."""

import public_calls
import pytest
import torch
from numerics import BACKENDS, DEVICE
from op_table import (
    DIFFERENTIABLE,
    ROWS,
    STATS,
    B,
    close,
    equal,
    every,
    in_place_too,
    leaves_of,
    named,
    run,
    split_over_ranks,
    storage,
    tensors,
    total,
)
from rank_pool import Ranks
from torch.utils.checkpoint import checkpoint

import fused_po


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ROWS)
def test_results_share_no_memory_with_saved_tensors(name, backend):
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
    "data": lambda value: value.data.zero_(),  # does not bump the version counter, like dist.all_reduce
    "detach": lambda value: value.detach().add_(3),
    "no_grad": no_grad_edit,
    "numpy": numpy_edit,
}


@pytest.mark.parametrize("edit", EDITS)
@every
def test_editing_a_result_changes_no_gradient_and_no_other_result(name, edit):
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
def test_an_in_place_edit_of_a_result_is_part_of_the_graph(name):
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


def of_copies(target):
    """(results that have gradients, the leaves) of a loss whose inputs are computed from the leaves."""
    leaves = [value.clone().requires_grad_() for value in target.good.values() if is_numbers(value)]
    computed = iter([leaf * 1 for leaf in leaves])
    good = {name: next(computed) if is_numbers(value) else value for name, value in target.good.items()}
    results = target.call(**good)
    return [value for value in public_calls.tensors_in(results) if value.requires_grad], leaves


def is_numbers(value):
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim > 0


PURE = {target.name: target for target in public_calls.every_target() if "backend" not in target.signature.parameters}
LOSSES = {name: target for name, target in PURE.items() if of_copies(target)[0]}


@pytest.mark.parametrize("name", LOSSES)
def test_editing_a_loss(name):
    """An in-place operation on a result is part of the graph; writing to its data changes no gradient."""
    target = LOSSES[name]
    for i in range(len(of_copies(target)[0])):
        results, leaves = of_copies(target)
        plain = torch.autograd.grad(results[i].sum(), leaves, allow_unused=True)
        results, leaves = of_copies(target)
        halved = torch.autograd.grad(results[i].mul_(0.5).sum(), leaves, allow_unused=True)
        results, leaves = of_copies(target)
        total = results[i].sum()
        for result in results:
            result.data.fill_(7)
        filled = torch.autograd.grad(total, leaves, allow_unused=True)
        for exact, half, same in zip(plain, halved, filled):
            if exact is not None:
                torch.testing.assert_close(half, exact / 2)
                torch.testing.assert_close(same, exact, rtol=0, atol=0)


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.plain])
def test_edited_log_probs_match_edited_log_softmax(name):
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


def test_editing_one_result_leaves_the_other_usable():
    """Each result has its own version counter: editing one does not invalidate what autograd saved of another."""
    results, _, leaves = run("dpo_from_logits")
    loss = results["rejected_logps"].square().sum() + results["losses"].exp().sum()
    for field in set(results) - {"rejected_logps", "losses"}:
        with torch.no_grad():
            results[field].zero_()
    torch.autograd.grad(loss, leaves)


def test_chunked_loss_passes_copies_to_its_loss_function():
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
def test_what_is_saved_per_token(name, outputs, numbers):
    """The backward saves per token the shift, norm and log-prob, and the entropy if it is an output."""
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


@pytest.mark.parametrize("name", ROWS)
def test_constants_created_under_inference_mode(name):
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
    assert equal(named(ROWS[name].call(t, backend="reference")).values(), expected)  # outside inference mode


def test_references_created_under_inference_mode_are_not_copied():
    """kl_from_logits saves the reference's logits themselves and linear_kl the reference's head; neither copies."""
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
def test_results_of_modules_share_no_memory(name):
    """Each metric that a module returns beside the loss is edited in place before the backward."""
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
def test_editing_results_with_the_vocabulary_split_over_ranks(name, ranks):
    ranks.run(split_over_ranks, name)
