"""torch.compile(fullgraph=True) of every public function, with numbers and batch sizes that change between calls."""

import contextlib
import inspect
import warnings

import public_calls
import pytest
import torch
from numerics import no_inductor
from public_calls import VARIANTS, B, T, V, labels, normal
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

import fused_po
from fused_po import Schedule, losses, modules

# First values of the numbers whose default is None or 0.
START = {
    "epsilon": 0.2, "epsilon_high": 0.3, "delta": 4.0, "dual_clip": 3.0, "cap": 3.0, "clamp": 2.0, "softcap": 5.0,
    "eps": 1e-4, "low": 0.5, "high": 3.0, "ld_alpha": 0.5, "max_length": 8.0, "clip_eps": 0.2, "margin": 0.1,
    "num_tokens": 7, "num_sequences": 5, "alpha": 0.5, "batch_num_tokens": 7, "global_batch_size": 5, "kl": 0.2,
    "log_ratio_clamp": 20.0, "num_items_in_batch": 7.0, "max_completion_length": 8,
}  # fmt: skip
# Further calls beside those of `public_calls`, so that some call reads every number.
MORE = {
    "cispo": [{"cap": None, "epsilon": 0.2, "epsilon_high": 0.3}],
    "cpo": [{"loss_type": "alphapo", "alpha": 0.25}],
    "tpo": [{"loss_type": "tpo-l", "gold": normal(B)}],
    "ppo_clip": [{"delta": 4.0}],
    "preference_loss": [{"loss_type": "discopop"}],
    "linear_kl": [{"direction": "js", "temperature": (0.9, 1.1), "softcap": (5.0, 7.0), "logit_scale": (1.0, 0.8)}],
    "kl_from_logits": [{"temperature": (0.9, 1.1), "softcap": (5.0, 7.0), "logit_scale": (1.0, 0.8)}],
    "grpo": [{"loss_type": "sapo", "sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05}],
    "policy_loss_from_logits": [
        {"kl": "k3", "ref_logps": normal(B, T), "epsilon": 0.2, "epsilon_high": 0.3, "dual_clip": 3.0},
        {"loss_type": "sapo", "sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05},
        {"loss_type": "gspo", "epsilon": 0.2, "epsilon_high": 0.3, "delta": 4.0},
    ],
    "aggregate": [{"mode": "seq-mean-token-mean", "num_tokens": 9, "num_sequences": 4}],
    **{f"{name}.forward": [{"dp_size": 2, "batch_num_tokens": 9.0}] for name in ("PolicyLoss", "SFTLoss", "ValueLoss")},
    "token_weights": [{"num_tokens": 9, "num_sequences": 4}],
}
# These read values on the host, as documented, so they cannot be part of a graph; or they compute nothing.
ON_THE_HOST = {"chunked_loss", "bradley_terry_mle", "backends"}


def calls() -> list[public_calls.Target]:
    """Functions and methods, each with every call to try; no constructors."""
    found = []
    for target in public_calls.targets():
        if isinstance(target.call, type) or target.name in ON_THE_HOST:
            continue
        found.append(target)
        for more in VARIANTS.get(target.name, []) + MORE.get(target.name, []):
            found.append(target._replace(name=f"{target.name} with {', '.join(more)}", good=target.good | more))
    return found


CALLS = calls()
DYNAMIC = [None, pytest.param(True, marks=pytest.mark.slow)]


def is_number(name: str, value: object, annotation: object) -> bool:
    if isinstance(value, (tuple, list)):
        return all(isinstance(v, float) for v in value)
    if isinstance(value, (int, float)):
        return not isinstance(value, bool)
    return value is None and any(word in str(annotation) for word in ("float", "Number", "Count", "PerSide"))


def series(name: str, value: object) -> list:
    """Three values of a number. The first is its default, unless that is 0."""
    if isinstance(value, (tuple, list)):
        return [type(value)(v * factor for v in value) for factor in (1, 0.9, 0.8)]
    value = value or START.get(name, 0.1)
    return [value + i for i in range(3)] if isinstance(value, int) else [value * factor for factor in (1, 0.9, 0.8)]


def numbers(target: public_calls.Target) -> dict[str, list]:
    """Three values of each number that this call reads."""
    known = {p.name: p for p in target.signature.parameters.values() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    given = {name: p.default for name, p in known.items()} | target.good
    found: dict[str, list] = {}
    for name, value in given.items():
        if not is_number(name, value, getattr(known.get(name), "annotation", "")):
            continue
        chosen = series(name, value)
        try:
            for number in chosen:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    target.call(**target.good | {n: s[0] for n, s in found.items()} | {name: number})
        except (TypeError, ValueError):  # this call does not read it
            continue
        found[name] = chosen
    return found


def with_doubled_batch(value: object) -> object:
    """The same arguments with a batch of twice the size."""
    return tree_map(lambda v: torch.cat((v, v)) if isinstance(v, Tensor) and v.shape[:1] == (B,) else v, value)


def sequence_of_calls(target: public_calls.Target) -> list[dict]:
    """The arguments of several calls between which every number and the batch size change."""
    changing = numbers(target)
    found = [target.good | {name: values[i] for name, values in changing.items()} for i in range(2)]
    with contextlib.suppress(ValueError):  # packed sequences, whose bounds do not grow
        target.call(**with_doubled_batch(found[1]))
        found[1] = with_doubled_batch(found[1])
    return found


def assert_same(got: object, want: object) -> None:
    got, want = ([v for v in tree_leaves(r) if isinstance(v, Tensor)] for r in (got, want))
    assert len(got) == len(want)
    for ours, eager in zip(got, want):
        torch.testing.assert_close(ours, eager, equal_nan=True)


# One call of each kind. Every call compiles at least once, so the rest are slow tests.
QUICK = (
    "aggregate",
    "dpo_from_logits",
    "gae",
    "linear_kl",
    "linear_logps",
    "policy_loss_from_logits",
    "sequence_logps",
)
QUICK += ("cispo", "dpo", "grpo", "kl_estimate", "kto", "orpo", "FusedLinearKTOLoss.forward")
EVERY = [pytest.param(target, marks=() if target.name in QUICK else pytest.mark.slow) for target in CALLS]


@pytest.mark.parametrize("target", EVERY, ids=[target.name for target in CALLS])
@pytest.mark.parametrize("dynamic", DYNAMIC)
@pytest.mark.filterwarnings("ignore")
def test_changing_numbers_and_batch_sizes(target, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(lambda **given: target.call(**given), backend="aot_eager", fullgraph=True, dynamic=dynamic)
    given = sequence_of_calls(target)
    for arguments in given:
        assert_same(compiled(**arguments), target.call(**arguments))


def test_every_number_changes_in_some_call():
    changed: dict[str, set] = {}
    every: dict[str, set] = {}
    for target in CALLS:
        name = target.name.split(" ")[0]
        changed.setdefault(name, set()).update(numbers(target))
        of_call = {p.name for p in target.signature.parameters.values() if is_number(p.name, p.default, p.annotation)}
        every.setdefault(name, set()).update(of_call)
    left = {(name, number) for name, wanted in every.items() for number in wanted - changed[name]}
    assert left == set()


MODULES = [
    target for target in public_calls.targets() if isinstance(target.call, type) and target.name in modules.__all__
]


@pytest.mark.parametrize("built", MODULES, ids=[target.name for target in MODULES])
@pytest.mark.parametrize("dynamic", DYNAMIC)
@pytest.mark.filterwarnings("ignore")
def test_modules_with_different_numbers(built, dynamic):
    torch._dynamo.reset()
    changing = numbers(built)
    made = [built.call(**built.good | {name: values[i] for name, values in changing.items()}) for i in range(3)]
    good = public_calls.good_arguments(f"{built.name}.forward", inspect.signature(made[0].forward))
    compiled = torch.compile(lambda module: module(**good), backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for module in made:
        assert_same(compiled(module), module(**good))


SCORED = torch.where(labels(B, T) % 2 == 0, labels(B, T), -100)
SCHEDULES = {
    "logits_budget": [100, 200, 300],
    "tile_bytes": [100, 200, 300],
    "num_scored": [20, 22, 24],
}


@pytest.mark.parametrize("dynamic", DYNAMIC)
@pytest.mark.parametrize("outside", [True, False], ids=["made outside", "made inside"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_changing_schedules(name, outside, dynamic):
    torch._dynamo.reset()
    hidden, weight = normal(B, T, 5).requires_grad_(), normal(V, 5).requires_grad_()

    def run(schedule):
        schedule = schedule if outside else Schedule(**{name: schedule})
        logps = fused_po.linear_logps(hidden, weight, SCORED, schedule=schedule).logps
        return logps, fused_po.linear_kl(hidden, weight, hidden + 1, weight, SCORED, schedule=schedule).kl

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for value in SCHEDULES[name]:
        value = Schedule(**{name: value}) if outside else value
        assert_same(compiled(value), run(value))


X, Y = normal(B), normal(B).flip(0)
TOKENS = normal(B, T)
BAD = {  # a call that reads one number, allowed values, and a value that is not allowed
    "beta": (lambda v: losses.dpo(X, Y, beta=v), (0.1, 0.2, 0.3), (-1.0, float("nan"), float("inf"))),
    "label_smoothing": (lambda v: losses.dpo(X, Y, label_smoothing=v), (0.1, 0.2), (0.7, -0.1)),
    "delta": (lambda v: losses.ppo_clip(TOKENS, TOKENS, X, TOKENS, delta=v), (3.0, 4.0), (1.1,)),
    "max_ratio": (lambda v: losses.udm_weights(X.sigmoid(), max_ratio=v, min_ratio=0.5), (1.0, 2.0), (0.4,)),
    "clip_cov_ub": (lambda v: losses.clip_cov(TOKENS, TOKENS, X, TOKENS, clip_cov_ub=v), (5.0, 6.0), (0.5,)),
    "high": (lambda v: losses.importance_weights(TOKENS, TOKENS, TOKENS, low=0.5, high=v), (2.0, 3.0), (0.4,)),
    "gamma": (lambda v: losses.tpo(X, Y, gamma=v), (0.5,), (0.6,)),
    "world_size": (lambda v: fused_po.aggregate(TOKENS, num_tokens=5, world_size=v), (3, 4), (0,)),
    "num_tokens": (lambda v: fused_po.aggregate(TOKENS, num_tokens=v), (3.0, 4.0), (-1.0,)),
    "logits_budget": (lambda v: Schedule(logits_budget=v).logits_budget * X, (3, 4), (-1,)),
}


@pytest.mark.parametrize("name", BAD)
def test_errors_while_tracing_name_the_argument(name):
    torch._dynamo.reset()
    call, good, bad = BAD[name]
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    for value in good:
        assert_same(compiled(value), call(value))
    for value in bad:
        with pytest.raises(ValueError, match=rf"^{name}: "):
            call(value)
        with pytest.raises(Exception, match=rf"{name}: got .*(allowed|leave it)"):
            compiled(value)
    assert_same(compiled(good[0]), call(good[0]))  # calls still work after a refused value


@pytest.mark.parametrize("beta", [10**400, -(10**400)])
def test_integers_too_large_for_a_float_are_refused(beta):
    with pytest.raises(ValueError, match="beta: got"):
        losses.dpo(X, Y, beta=beta)


def test_a_changing_number_compiles_at_most_twice():
    """Once with the number as a constant and once as a symbol, as PyTorch does for any number."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    call = torch.compile(
        lambda n: losses.dpo(X, Y, beta=n) + fused_po.aggregate(TOKENS, num_tokens=n), backend=counter, fullgraph=True
    )
    for i in range(1, 13):
        call(0.1 * i)
    assert counter.frame_count == 2


SQUARE, ONES = normal(V, V), labels(B, T)
GRADIENTS = {
    "dpo_from_logits": lambda z, v: (
        fused_po.dpo_from_logits(z, ONES, ref_logps=TOKENS, beta=v, kl="k3", kl_coef=v).loss
    ),
    "linear_logps": lambda z, v: fused_po.linear_logps(z, SQUARE, ONES, temperature=v).logps.sum(),
    "policy_loss": lambda z, v: (
        fused_po.policy_loss_from_logits(z, ONES, X, TOKENS, loss_type="ppo", temperature=v, entropy_coef=v).loss
    ),
    "losses.dpo": lambda z, v: losses.dpo(*z.sum((1, 2)).view(2, -1), beta=v).mean(),
}


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients(name, backend):
    if backend == "inductor" and (reason := no_inductor()) is not None:
        pytest.skip(reason)
    torch._dynamo.reset()
    compiled = torch.compile(GRADIENTS[name], backend=backend, fullgraph=True)
    for value in (1.0, 0.9, 0.8):
        got, want = (normal(B, T, V).requires_grad_() for _ in range(2))
        compiled(got, value).backward()
        GRADIENTS[name](want, value).backward()
        torch.testing.assert_close(got.grad, want.grad)
