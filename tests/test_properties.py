"""Properties that hold for any shape, mask and stride, by Hypothesis."""

import torch
from helpers import DEVICE, IGNORE
from hypothesis import given, settings
from hypothesis import strategies as st

import fused_po

FEW = settings(max_examples=40, deadline=None)


@st.composite
def views(draw):
    """Logits as somebody's slice, step or transpose of a larger tensor, up to four dimensions, and labels."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    base = torch.randn([2 * n + 3 for n in shape], generator=generator).to(DEVICE)
    base = base.permute(draw(st.permutations(range(len(shape)))))
    index = []
    for size in base.shape:
        begin = draw(st.integers(0, size - 1))
        index.append(slice(begin, draw(st.integers(begin + 1, size)), draw(st.integers(1, 3))))
    logits = base[tuple(index)]
    labels = torch.randint(0, logits.shape[-1], logits.shape[:-1], generator=generator)
    ignored = torch.rand(labels.shape, generator=generator) < draw(st.sampled_from((0.0, 0.5, 1.0)))
    return logits, labels.masked_fill(ignored, IGNORE).to(DEVICE)


@FEW
@given(views(), st.floats(0.1, 10), st.booleans())
def test_any_view_equals_its_contiguous_copy(problem, temperature, inplace):
    logits, labels = problem
    results = []
    for x in (logits, logits.contiguous()):
        x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_() * 1.0
        how = {"temperature": temperature, "outputs": ("logps", "entropy"), "inplace_backward": inplace}
        stats = fused_po.logps_from_logits(x, labels, **how)
        results.append((*stats[:2], torch.autograd.grad(stats.logps.sum() + stats.entropy.sum(), x)[0]))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)


@FEW
@given(views(), st.floats(-50, 50))
def test_a_constant_added_to_a_row_changes_nothing(problem, constant):
    logits, labels = problem
    names = ("logps", "entropy", "log_sum_sq_probs")
    a, b = (fused_po.logps_from_logits(x, labels, outputs=names) for x in (logits.double(), logits.double() + constant))
    for name in names:
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-9, atol=1e-9)


@FEW
@given(st.integers(1, 6), st.integers(1, 5), st.integers(2, 40), st.integers(1, 4000), st.integers(0, 2**31))
def test_the_tile_size_changes_rounding_alone(n, width, v, tile_bytes, seed):
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((n, width), (v, width)))
    labels = torch.randint(-1, v, (n,), generator=generator)
    results = []
    for schedule in (None, fused_po.Schedule(tile_bytes=tile_bytes)):
        h, w = (t.to(DEVICE).requires_grad_() for t in (hidden.clone(), weight.clone()))
        how = {"ignore_index": -1, "outputs": ("logps", "entropy"), "schedule": schedule}
        stats = fused_po.linear_logps(h, w, labels.to(DEVICE), **how)
        (stats.logps.sum() - stats.entropy.sum()).backward()
        results.append((*stats[:2], h.grad, w.grad))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
