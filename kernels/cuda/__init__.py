"""The CUDA backend: a cluster of blocks keeps a row on chip, so that it is read once. Used only if requested by name.

It has not run on a GPU yet. Log-probs, entropy and lse, the basis, gradients and policy losses, without a softcap; for
the rest there is the Triton backend. Each function as its namesake there:

unsupported    why a tensor cannot be served, or None
statistics     a row of logits to log-prob, entropy, lse
score          the same, and the basis: from sm_90 on, each logit read once
gradient       incoming gradients (or none: the basis) to a gradient in the logits
policy         losses of tokens, on request with the gradient in the logits' place: from sm_90 on, each logit read once
scale          times a number, for such a gradient
"""

import ctypes

import torch

from . import library as build

__all__ = ["gradient", "policy", "scale", "score", "statistics", "unsupported"]

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
KINDS = {"clip": 0, "weight": 1, "gate": 2}
ESTIMATORS = {None: 0, "k2": 1, "k3": 2}
TOKEN_FIELDS = 9
LOGPS_OUT, ENTROPY_OUT, LSE_OUT = 1, 2, 4  # bits of `outputs`
LOGP, ENTROPY, SLOPE = 2, 3, 8
SAVED_FIELDS = 3  # the first of them, which a backward reads
LN2 = 0.6931471805599453
CLUSTERS = (1, 2, 4, 8, 16)
NOT_SUPPORTED = 801  # cudaErrorNotSupported
OTHERS = (
    "dpo", "dpo_gradient", "from_basis", "gae", "kl", "kl_gradient", "merge_kl", "merge_scores", "mixture",
    "pair_statistics",
)  # fmt: skip

POINTERS = (
    "x", "out", "labels", "advantages", "weights", "old_logps", "ref_logps", "g_logps", "g_entropy", "g_lse", "entropy",
    "tokens",
)  # fmt: skip
INTEGERS = (
    "n_rows", "inner_rows", "n_cols", "x_stride_outer", "x_stride_inner", "out_stride_outer", "out_stride_inner",
    "first_col", "ignore_index",
)  # fmt: skip
NUMBERS = ("outer", "low", "high", "bound", "kl_coef", "entropy_coef")
SWITCHES = ("kind", "estimator", "kl_times_ratio", "x_type", "out_type", "blocks")


class Problem(ctypes.Structure):
    """row.h's structure of this name."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_int64) for name in INTEGERS),
        *((name, ctypes.c_float) for name in NUMBERS),
        *((name, ctypes.c_int32) for name in SWITCHES),
    ]


def __getattr__(name: str):
    if name in OTHERS:
        raise ValueError(f"backend: 'cuda' has no {name}; 'triton' has, and backend=None takes it")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def unsupported(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why tensors of this device and dtype cannot be served, or None if they can."""
    if dtype not in TYPES:
        return f"dtype {dtype} (the CUDA kernels take float32, bfloat16 and float16)"
    if device.type != "cuda" or torch.version.hip:
        return f"a {device.type} tensor (the CUDA kernels run on NVIDIA GPUs)"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"sm_{major}{minor} (the CUDA kernels run from sm_80 on)"
    reason = None if build.ahead_of_time() else build.cannot_build(build.architectures())
    return reason and f"this machine: {reason}"


def refuse(inner: float | None, outputs: int) -> None:
    """What the kernels do not compute is an error."""
    if inner is not None:
        raise ValueError("softcap: backend 'cuda' takes none; 'triton' does, and backend=None takes it")
    if outputs & ~(LOGPS_OUT | ENTROPY_OUT | LSE_OUT):
        raise ValueError("outputs: backend 'cuda' has logps, entropy and lse; 'triton' has the rest")


def problem(logits, out, labels, tokens, outer, ignore_index, first_col=0) -> Problem:
    """The parts that all launches need, of logits[O, I, V] and out of the same shape."""
    p = Problem()
    p.x, p.out, p.labels, p.tokens = logits.data_ptr(), out.data_ptr(), labels.data_ptr(), tokens.data_ptr()
    p.n_rows, p.inner_rows, p.n_cols = labels.numel(), logits.shape[1], logits.shape[2]
    p.x_stride_outer, p.x_stride_inner = logits.stride(0), logits.stride(1)
    p.out_stride_outer, p.out_stride_inner = out.stride(0), out.stride(1)
    p.outer, p.ignore_index, p.first_col = outer, ignore_index, first_col
    p.x_type, p.out_type = TYPES[logits.dtype], TYPES[out.dtype]
    return p


def launch(name: str, p: Problem, device: torch.device, *arguments: int) -> int:
    """Run a launcher on the device's current stream; its status, an error but for NOT_SUPPORTED."""
    with torch.cuda.device(device):
        stream = ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)
        status = getattr(build.library(), name)(ctypes.byref(p), *arguments, stream)
    if status not in (0, NOT_SUPPORTED):
        raise RuntimeError(f"{name}: {build.library().fused_po_error(status).decode()}")
    return status


def cluster_blocks(n_cols: int, itemsize: int, on_chip: int) -> int | None:
    """The fewest blocks that hold a row, two of them on a multiprocessor if 16 are enough for that; None: too long.

    on_chip: bytes of shared memory that a block may have. Two blocks overlap one's copies with the other's arithmetic
    (not measured).
    """
    for room in (on_chip // 2 - 2048, on_chip - 1024):
        for blocks in CLUSTERS:
            if -(-n_cols * itemsize // blocks) + 16 <= room:
                return blocks
    return None


def one_read(p: Problem, logits: torch.Tensor, policy: bool) -> bool:
    """Scores and writes in one pass; False where the GPU, the row's length or its alignment does not allow it."""
    about = torch.cuda.get_device_properties(logits.device)
    blocks = cluster_blocks(logits.shape[2], logits.element_size(), about.shared_memory_per_multiprocessor - 1024)
    if about.major < 9 or blocks is None:
        return False
    p.blocks = blocks
    return launch("fused_po_one_read", p, logits.device, int(policy)) == 0


def results_of(tokens: torch.Tensor, outputs: int):
    """(logps, entropy, lse, aux, saved), of storage of their own each."""
    nothing = tokens.new_empty(0)
    lse = (tokens[0] + tokens[1]) * LN2 if outputs & LSE_OUT else nothing
    if outputs & LSE_OUT:
        lse = torch.where(tokens[1].isinf(), 0, lse)
    logps, entropy = (
        tokens[i].clone() if outputs & bit else nothing.clone()
        for i, bit in ((LOGP, LOGPS_OUT), (ENTROPY, ENTROPY_OUT))
    )
    return logps, entropy, lse, nothing.clone(), tokens[:SAVED_FIELDS].clone()


def score(logits, labels, outer, inner, ignore_index, outputs, basis):
    """`statistics`, and into basis[O, I, V] (the logits themselves, another tensor, or None) d log p_y / d x."""
    refuse(inner, outputs)
    tokens = torch.empty(ENTROPY + 1, labels.numel(), dtype=torch.float32, device=logits.device)
    if labels.numel():
        p = problem(logits, logits if basis is None else basis, labels, tokens, outer, ignore_index)
        if basis is None or not one_read(p, logits, False):
            launch("fused_po_statistics", p, logits.device, 0)
            if basis is not None:
                launch("fused_po_gradient", p, logits.device)
    return results_of(tokens, outputs)


def statistics(logits, labels, outer, inner, ignore_index, outputs):
    """Row statistics of logits[O, I, V] (columns side by side) for labels[O * I]: bits 1 logps, 2 entropy, 4 lse."""
    return score(logits, labels, outer, inner, ignore_index, outputs, None)


def gradient(logits, labels, saved, entropy, g_logps, g_entropy, g_lse, outer, inner, out, first_col=0):
    """Write into out[O, I, V] the gradient with respect to logits[O, I, V]; either may be strided, or both the same."""
    refuse(inner, 0)
    if logits.numel():
        p = problem(logits, out, labels, saved, outer, 0, first_col)
        for name, value in (("g_logps", g_logps), ("g_entropy", g_entropy), ("g_lse", g_lse), ("entropy", entropy)):
            setattr(p, name, None if value is None or not value.numel() else value.data_ptr())
        launch("fused_po_gradient", p, logits.device)


def policy(logits, labels, given, form, outer, ignore_index, overwrite):
    """tokens[TOKEN_FIELDS, N] of logits[O, I, V], labels[O * I]; overwrite: the logits become their gradient."""
    tokens = torch.empty(TOKEN_FIELDS, labels.numel(), dtype=torch.float32, device=logits.device)
    if not labels.numel():
        return tokens
    p = problem(logits, logits, labels, tokens, outer, ignore_index)
    for name, value in zip(("advantages", "weights", "old_logps", "ref_logps"), given):
        setattr(p, name, None if value is None else value.data_ptr())
    for name in ("low", "high", "bound", "kl_coef", "entropy_coef", "kl_times_ratio"):
        setattr(p, name, getattr(form, name))
    p.kind, p.estimator = KINDS[form.kind], ESTIMATORS[form.kl]
    if overwrite and one_read(p, logits, True):
        return tokens
    launch("fused_po_statistics", p, logits.device, 1)
    if overwrite:
        g_entropy = -form.entropy_coef * given[1] if form.entropy_coef else None
        gradient(logits, labels, tokens, tokens[ENTROPY], tokens[SLOPE], g_entropy, None, outer, None, logits)
    return tokens


def scale(grad, factor):
    """Multiply with a fp32 number on the device, in place; a contiguous tensor is not even read if it is 1."""
    if not grad.is_contiguous() or grad.data_ptr() % 16:
        grad.mul_(factor)
    elif grad.numel():
        with torch.cuda.device(grad.device):
            stream = ctypes.c_void_p(torch.cuda.current_stream(grad.device).cuda_stream)
            pointers = ctypes.c_void_p(grad.data_ptr()), ctypes.c_void_p(factor.data_ptr())
            launcher = build.library().fused_po_scale
            status = launcher(*pointers, ctypes.c_int64(grad.numel()), TYPES[grad.dtype], stream)
        if status:
            raise RuntimeError(f"fused_po_scale: {build.library().fused_po_error(status).decode()}")
