"""The planner's figures for eager PyTorch, TRL and Liger against counted ones."""

import counting
import kl_providers
import providers
import pytest
import torch
from numerics import DEVICE, IGNORE, product_buffers
from test_planned_costs import CASES, DTYPES, Case

from fused_po.planner import peers
from fused_po.planner.cost import TOKEN_BYTES

SAME = ("no gradients", "head frozen", "all kept", "hidden frozen", "entropy", "dpo", "dpo, head frozen")


def gradients(case: Case, value: torch.Tensor) -> tuple:
    """The gradients of the hidden states and the head that are asked for."""
    leaves = [x for x in (case.hidden, case.weight) if x.requires_grad]
    return torch.autograd.grad(value.sum(), leaves) if leaves else ()


def with_entropy(hidden, weight, labels):
    logp = (hidden @ weight.T).float().log_softmax(-1)
    return logp.gather(-1, labels.clamp(min=0)[:, None]).squeeze(-1) - (logp.exp() * logp).sum(-1)


def step_of(case: Case, score) -> callable:
    """A step with the function score(hidden, weight, labels) of another library."""

    def step():
        value = score(case.hidden, case.weight, case.labels)
        if case.work.live_reference:
            with torch.no_grad():
                reference = score(case.ref_hidden, case.ref_weight, case.labels)
            value = value - reference
        return gradients(case, value)

    return step


def counted(step) -> tuple[int, int]:
    """(FLOPs, peak bytes with the results)."""
    step()  # allocate what is allocated only once
    kept = []
    return counting.flops(step), counting.peak_bytes(lambda: kept.append(step()), DEVICE)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", (*SAME, "kl", "kl, head frozen", "kl, no gradients"))
def test_eager(name, dtype, seed):
    case = Case(dtype, **CASES[name])
    step = step_of(case, with_entropy if case.work.entropy else providers.eager)
    if case.work.kl_bases:
        both = case.hidden, case.weight, case.ref_hidden, case.ref_weight, case.labels, "reverse"

        def step():
            return gradients(case, kl_providers.eager_kl(*both))

    flops, peak = counted(step)
    planned = peers.eager(case.work)
    matrix = 4 * case.work.tokens * case.work.vocab
    assert planned.flops == flops
    # The policy's log-softmax is alive while DPO's reference runs. The buffers of the products depend on the processor.
    most = planned.peak + matrix / 4 + product_buffers(case.hidden.detach(), case.weight.detach())
    assert planned.peak - case.work.tokens * TOKEN_BYTES <= peak <= most


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", [n for n in SAME if n != "entropy"])
def test_trl(name, dtype, seed, monkeypatch):
    """TRL's row passes are left out: on a GPU they are kernels that allocate nothing."""
    pytest.importorskip("trl", minversion="1.15")
    from trl.kernels import chunked_logprob

    monkeypatch.setattr(peers, "TRL_COLUMNS", 512)  # its models use 32768
    for fold in ("_forward_tile", "_backward_tile"):
        monkeypatch.setattr(chunked_logprob, fold, lambda *_, **__: None)
    case = Case(dtype, **CASES[name])
    scored = case.labels != IGNORE

    def score(hidden, weight, labels):
        rows = hidden[scored], weight, None, labels[scored]
        return chunked_logprob.ChunkedLogProbFunction.apply(*rows, 1.0, peers.TRL_COLUMNS, None, 1.0, ())[0]

    def step():
        value = score(case.hidden, case.weight, case.labels)
        if case.work.live_reference:  # a detached tensor would suffice, but both share the tile's buffer
            with torch.no_grad():
                score(case.ref_hidden, case.ref_weight, case.labels)
        return gradients(case, value)

    flops, peak = counted(step)
    planned = peers.trl(case.work)
    assert planned.flops == flops
    if dtype == torch.float32:  # a CPU casts whole 16-bit operands to fp32, a GPU does not
        assert planned.peak - case.work.tokens * TOKEN_BYTES <= peak <= planned.peak
    assert chunked_logprob.TOKEN_CHUNK_SIZE == peers.TRL_ROWS


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", ("dpo", "dpo, head frozen"))
def test_liger(name, dtype, seed):
    """FLOPs exactly; memory, which torch.compile changes, within a third, as the planner's documentation says."""
    losses = pytest.importorskip("liger_kernel.chunked_loss")
    case = Case(dtype, **CASES[name], n=192)
    case.work = case.work._replace(sequences=4)
    labels, loss = case.labels.view(4, -1), losses.LigerFusedLinearDPOLoss(compiled=False)
    hidden, ref_hidden = (x.view(4, -1, x.shape[-1]) for x in (case.hidden, case.ref_hidden))

    def step():
        return gradients(case, loss(case.weight, hidden, labels, ref_input=ref_hidden, ref_weight=case.ref_weight)[0])

    flops, peak = counted(step)
    planned = peers.liger(case.work)
    assert planned.flops == flops
    assert planned.peak / 1.34 <= peak <= planned.peak * 1.34
    assert peers.liger(case.work._replace(loss="kl")) is None
