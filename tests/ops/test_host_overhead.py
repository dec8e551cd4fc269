"""The cost of a call on the host, as counts of operations; `benchmarks/overhead.py` measures times."""

import json
import os
import subprocess
import sys
from pathlib import Path

import overhead
import overhead_cases
import overhead_floor
import pytest
import torch
from numerics import BACKENDS
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fused_po
from fused_po import checks
from fused_po.backend.interface import Outputs
from fused_po.lm_head import scored
from fused_po.ops import outputs, register

ROWS = {row.name: row for row in overhead_cases.rows("cpu")}
# ATen ops and Python functions of one call: (forward), (forward and backward). A change may lower them.
BOUNDS: dict[str, tuple[tuple[int, int], ...]] = {
    "linear_logps": ((38, 142), (80, 278)),
    "linear_logps, a quarter ignored": ((63, 160), (112, 301)),
    "linear_logps, head frozen": ((38, 142), (68, 237)),
    "linear_logps, entropy": ((52, 146), (150, 304)),
    "linear_logps, losses.grpo": ((63, 201), (151, 347)),
    "linear_dpo, ref_logps": ((84, 196), (143, 368)),
    "linear_dpo, ref_hidden, k3": ((158, 341), (244, 517)),
    "linear_kl": ((60, 226), (132, 411)),
    "linear_kl, labels": ((83, 228), (195, 443)),
    "chunked_loss": ((55, 182), (92, 304)),
    "logps_from_logits": ((29, 85), (60, 163)),
    "logps_from_logits, a quarter ignored": ((48, 87), (93, 166)),
    "logps_from_logits, entropy": ((43, 89), (97, 167)),
    "dpo_from_logits, ref_logps": ((73, 103), (122, 180)),
    "dpo_from_logits, ref_logits, k3": ((131, 130), (207, 211)),
    "kl_from_logits": ((44, 115), (83, 192)),
    "kl_from_logits, labels": ((67, 117), (133, 197)),
    "policy_loss_from_logits": ((118, 180), (163, 258)),
    "policy_loss_from_logits, k3": ((150, 192), (181, 268)),
    "policy_loss_from_logits, in place": ((119, 185), (161, 251)),
    "gae": ((67, 81),),
    "sequence_logps": ((6, 19), (13, 25)),
    "aggregate": ((8, 21), (15, 27)),
    "token_weights": ((8, 20),),
    "shift_labels": ((4, 12),),
    "losses.dpo": ((9, 35), (18, 41)),
    "losses.ppo_clip": ((27, 44), (64, 50)),
    "losses.grpo": ((27, 68), (64, 74)),
    "losses.kl_loss": ((17, 24), (45, 30)),
    "modules.DPOLoss": ((15, 56), (24, 62)),
}
SLACK = 2, 6  # other versions of torch may add this many to either count
CASES = [pytest.param(row, mode, id=f"{row.name}-{mode}") for row in ROWS.values() for mode in overhead.modes_of(row)]


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_both_sides_give_the_same_numbers(row):
    overhead.verify(row)


@pytest.mark.parametrize("bad", (-1, 9))
def test_the_floor_checks_its_labels_too(bad):
    labels = torch.tensor([0, -100, bad])
    with pytest.raises(ValueError, match="out of range"):
        overhead_floor.logps_from_logits(torch.zeros(3, 9), labels)
    with pytest.raises(ValueError, match="out of range"):
        overhead_floor.linear_logps(torch.zeros(3, 2), torch.zeros(9, 2), labels)


@pytest.mark.parametrize("row, mode", CASES)
def test_counts(row, mode):
    """A call runs no more PyTorch ops and Python functions than the table above allows."""
    counted = overhead.counts(overhead.step(row.ours, row.leaves, mode))
    ops, python = BOUNDS[row.name][overhead.modes_of(row).index(mode)]
    assert counted.ops <= ops + SLACK[0]
    assert counted.python <= python + SLACK[1]


def test_a_loop_over_sequences_raises_the_counts():
    """A loop over sequences raises the counts: rows that are not adjacent in memory take one pass per sequence."""
    d = overhead_cases.data("cpu")
    apart = torch.empty(d.logits.shape[0], d.logits.shape[1] + 1, d.logits.shape[2])[:, :-1].copy_(d.logits)
    ours = [overhead.counts(lambda x=x: fused_po.logps_from_logits(x, d.labels)).ops for x in (d.logits, apart)]
    assert ours[1] > ours[0] + 7 * 8


# On a GPU values are not checked, so that only the count of scored tokens waits for the device.


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(checks, "values_checked", lambda value: False)
    monkeypatch.setattr(checks, "none_ignored", lambda labels, ignore_index: False)


def scores(d):
    """Calls with the kernels' backend, and the number of syncs that docs/api.md gives for each."""
    how = {"backend": "triton"}
    head, ref = (d.hidden, d.weight), {"ref_hidden": d.ref_hidden, "ref_weight": d.ref_weight}
    policy = {"loss_type": "dapo", "epsilon": 0.2, "epsilon_high": 0.2} | how
    return {
        "logps_from_logits": (lambda: fused_po.logps_from_logits(d.logits, d.some, **how), 0),
        "dpo_from_logits": (lambda: fused_po.dpo_from_logits(d.logits, d.some, d.ref_logits, kl="k3", **how), 0),
        "kl_from_logits": (lambda: fused_po.kl_from_logits(d.logits, d.ref_logits, d.some, **how), 0),
        "policy": (lambda: fused_po.policy_loss_from_logits(d.logits, d.some, d.advantages, d.old_logps, **policy), 0),
        "linear_logps": (lambda: fused_po.linear_logps(*head, d.some, **how), 1),
        "linear_dpo": (lambda: fused_po.linear_dpo(*head, d.some, **ref, **how), 2),
        "linear_kl": (lambda: fused_po.linear_kl(*head, *ref.values(), d.some, **how), 1),
        "gae": (lambda: fused_po.gae(d.rewards, d.values, **how), 0),
    }


@pytest.mark.parametrize("name", scores(overhead_cases.data("cpu")))
def test_host_syncs(name, as_on_a_gpu):
    pytest.importorskip("triton")
    call, documented = scores(overhead_cases.data("cpu"))[name]
    with overhead.Dispatched() as seen:
        call()
    assert seen.syncs == documented, {k: v for k, v in seen.names.items() if k in overhead.SYNCS}


# Calls that skip PyTorch's dispatcher.


def graph(value: torch.Tensor) -> list[str]:
    """The names of a tensor's backward nodes."""
    names, nodes = [], [value.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is not None:
            names.append(type(node).__name__)
            nodes += [parent for parent, _ in node.next_functions]
    return names


class Watching(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func._schema.name)
        return func(*args, **kwargs or {})


class Functions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **kwargs or {})


class Sub(torch.Tensor):
    pass


def test_an_op_that_nothing_observes_skips_the_dispatcher():
    d = overhead_cases.data("cpu")
    assert "fused_po_linear_logps_fwdBackward" in graph(fused_po.linear_logps(d.hidden, d.weight, d.labels).logps)


def test_a_mode_sees_the_ops():
    d = overhead_cases.data("cpu")
    with Watching() as mode:
        fused_po.linear_logps(d.hidden, d.weight, d.labels).logps.sum().backward()
        fused_po.gae(d.rewards, d.values)
    ours = [name for name in mode.seen if name.startswith("fused_po::")]
    assert ours == ["fused_po::linear_logps_fwd", "fused_po::linear_logps_bwd", "fused_po::gae"]


def test_a_profiler_sees_the_ops():
    d = overhead_cases.data("cpu")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
        fused_po.logps_from_logits(d.logits, d.labels).logps.sum().backward()
    assert {"fused_po::logps_fwd", "fused_po::logps_bwd"} <= {event.key for event in trace.key_averages()}


def test_every_tensor_of_an_op_is_known():
    """The tensors are compared with the op's schema."""
    assert len(register.registered) >= 16
    for op in register.registered:
        arguments = op.definition._opoverload._schema.arguments
        assert op.tensors == [i for i, a in enumerate(arguments) if "Tensor" in str(a.type)]
        assert op.mutated == [i for i, a in enumerate(arguments) if a.alias_info is not None]


def test_when_the_dispatcher_is_skipped():
    """The dispatcher is skipped only for plain tensors, and only where no mode, transform or tracer is active."""
    x = torch.ones(2)
    assert register.only_autograd_sees((x, None, 1.0, "reference", torch.nn.Parameter(x)), (0, 1, 4))
    with torch.no_grad():
        assert register.only_autograd_sees((x,), (0,))
    for other in (x.to("meta"), x.as_subclass(Sub)):
        assert not register.only_autograd_sees((x, other), (0, 1))
    with torch.autograd.forward_ad.dual_level():
        assert not register.only_autograd_sees((x,), (0,))
    for mode in (Watching(), Functions(), torch._subclasses.FakeTensorMode(), torch.device("cpu")):
        with mode:
            assert not register.only_autograd_sees((x,), (0,))
    seen = []
    torch.func.grad(lambda v: (seen.append(register.only_autograd_sees((v,), (0,))), v.sum())[1])(x)
    torch.func.vmap(lambda v: (seen.append(register.only_autograd_sees((v,), (0,))), v)[1])(x)
    torch.jit.trace(lambda v: (seen.append(register.only_autograd_sees((v,), (0,))), v + 1)[1], (x,), check_trace=False)
    assert seen == [False] * 3


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_results_are_bitwise_equal_without_the_dispatcher(row):
    """With and without the dispatcher: the same results and gradients, bit for bit."""
    direct = overhead.results(row.ours, row, True)
    with Watching():
        dispatched = overhead.results(row.ours, row, True)
    for one, other in zip(direct, dispatched, strict=True):
        assert torch.equal(one, other)
        assert one.stride() == other.stride()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("watched", (False, True), ids=("direct", "dispatched"))
def test_writing_over_logits_counts_as_a_new_version(watched, backend):
    """A graph that saved the logits raises PyTorch's error, with and without the dispatcher.

    PyTorch does not see the writes of a kernel by itself.
    """
    d = overhead_cases.data("cpu")
    logits = d.logits * 1.0
    square = (logits * logits).sum()
    how = {"inplace_backward": True, "backend": backend}
    loss = fused_po.logps_from_logits(logits, d.labels, **how).logps.sum()
    version = logits._version
    if watched:
        with Watching():
            loss.backward()
    else:
        loss.backward()
    assert logits._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.backward()


def test_results_may_be_edited_in_place():
    """No result is a view that autograd does not allow to be edited in place."""
    d = overhead_cases.data("cpu")
    stats = fused_po.linear_logps(d.hidden, d.weight, d.labels, outputs=fused_po.TokenStats._fields)
    for value in (stats.logps, stats.entropy, stats.lse):
        value += 1
        value.mul_(2)
    (stats.logps + stats.entropy + stats.lse).sum().backward()


# The cheap checks refuse the same values as the full ones.


@pytest.mark.parametrize("value", (float("nan"), float("inf"), -float("inf")))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.float64))
def test_finite_by_a_sum(value, dtype):
    x = torch.ones(5, dtype=dtype)
    checks.finite("x", x)
    x[3] = value
    with pytest.raises(ValueError, match="flat position 3"):
        checks.finite("x", x)
    checks.finite("x", x, torch.arange(5) != 3)


def test_finite_where_the_sum_overflows():
    checks.finite("x", torch.full((9,), torch.finfo(torch.float32).max))
    checks.finite("x", torch.full((99,), torch.finfo(torch.float16).max, dtype=torch.float16))
    checks.finite("x", torch.empty(0))


@pytest.mark.parametrize("ignore_index", (-100, 3, 99))
def test_label_range(ignore_index):
    labels = torch.tensor([0, 4, 2])
    checks.label_range(labels, 5, ignore_index)
    checks.label_range(torch.tensor([ignore_index, 1]), 5, ignore_index)
    checks.label_range(torch.full((2,), ignore_index), 5, ignore_index)
    checks.label_range(labels[:0], 5, ignore_index)
    for bad in (5, -1):
        with pytest.raises(ValueError, match=f"got {bad} at flat position 1"):
            checks.label_range(torch.tensor([ignore_index, bad]), 5, ignore_index)


@pytest.mark.parametrize("ignore_index", (-100, 3))
def test_scored_rows(ignore_index):
    assert scored.scored_rows(torch.tensor([0, 1]), ignore_index) is None
    assert scored.scored_rows(torch.tensor([0, ignore_index, 1]), ignore_index).tolist() == [0, 2]
    assert scored.scored_rows(torch.empty(0, dtype=torch.int64), ignore_index) is None


def test_outputs():
    assert outputs.outputs_of(("entropy", "logps", "entropy")) == Outputs(logps=True, entropy=True)
    assert outputs.outputs_of(["log_sum_sq_probs"]).bits == 32
    for bits in range(64):
        assert Outputs.of(bits).bits == bits


def test_the_command_line(tmp_path):
    """`python benchmarks/overhead.py --json FILE` prints a line for each row and mode, and writes the same to FILE."""
    script = Path(overhead.__file__)
    to = tmp_path / "overhead.json"
    command = [sys.executable, script, "--json", to, "--only", "aggregate", "--turns", "3", "--repeats", "2"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    entries = json.loads(to.read_text())["rows"]
    assert [(e["name"], e["mode"]) for e in entries] == [("aggregate", mode) for mode in overhead.MODES]
    assert all(e["ratio"] > 0 and e["counts"]["ops"] > 0 for e in entries)
    assert done.stdout.count("| aggregate |") == 2
    wrong = subprocess.run([sys.executable, script, "--profile", "nothing"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "allowed are 'linear_logps'" in wrong.stderr
