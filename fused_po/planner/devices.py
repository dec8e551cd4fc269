"""Peak rates of devices, from data sheets or measured on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from fused_po.schedule import device_memory


class Device(NamedTuple):
    """Ceilings of one device. Rates in FLOPs or bytes a second; links count one direction."""

    name: str
    kind: str  # "cuda" or "cpu": how the ops compute there
    flops: dict[str, float]  # dense matrix products by the factors' dtype, "bf16" for both 16-bit ones
    bandwidth: float  # of its memory, read and written
    memory: int  # bytes
    link: float  # to the others of its node
    network: float  # to other nodes
    node: int  # devices in a node
    source: str


def _gpu(name: str, bf16: float, fp32: float, bandwidth: float, memory: int, link: int, network: int, source: str):
    """From the units of data sheets: TFLOPs, TB/s, GB, GB/s."""
    rates = {"bf16": bf16 * 1e12, "fp32": fp32 * 1e12}
    return Device(name, "cuda", rates, bandwidth * 1e12, memory * 10**9, link * 1e9, network * 1e9, 8, source)


# bf16 dense, without sparsity; fp32 without TF32, as PyTorch multiplies by default. The network is that of the maker's
# own 8-GPU server, a card for each GPU: 200 Gb/s with A100, 400 Gb/s with the others.
STATED = {
    "a100": _gpu("A100 SXM 80GB", 312, 19.5, 2.039, 80, 300, 25, "NVIDIA A100 data sheet; DGX A100 data sheet"),
    "h100": _gpu("H100 SXM", 989.4, 66.9, 3.35, 80, 450, 50, "NVIDIA H100 data sheet; DGX H100 data sheet"),
    "h200": _gpu("H200 SXM", 989.4, 66.9, 4.8, 141, 450, 50, "NVIDIA H200 data sheet; DGX H200 data sheet"),
    "b200": _gpu("HGX B200", 2250, 75, 8.0, 180, 900, 50, "NVIDIA Blackwell and HGX B200 data sheets; DGX B200"),
    "mi300x": _gpu("MI300X", 1307.4, 163.4, 5.3, 192, 448, 50, "AMD Instinct MI300X and platform data sheets"),
    "epyc9654": Device(
        "EPYC 9654, one socket", "cpu", {"fp32": 96 * 2.4e9 * 32, "bf16": 96 * 2.4e9 * 64}, 460.8e9, 384 * 10**9,
        64e9, 25e9, 2, "AMD EPYC 9654 specifications: 96 cores at 2.4 GHz, 12 DDR5-4800 channels, 32 GB on each",
    ),
}  # fmt: skip

# Seconds a collective takes whatever its size: base and each hop, as NCCL has them (src/graph/tuning.cc, ring, Simple).
BASE_LATENCY, LINK_HOP, NETWORK_HOP = 8.4e-6, 3.4e-6, 14e-6


def rate_name(dtype: torch.dtype) -> str:
    """Under which name of `Device.flops` products of this dtype are."""
    return "bf16" if dtype.itemsize == 2 else "fp32"


def collective_seconds(device: Device, sent: int, ranks: int, stride: int, rounds: int, count: int) -> float:
    """Time of `count` ring collectives in which a rank sends `sent` bytes in all.

    ranks: in the group; stride: how far its ranks lie apart; rounds: times round the ring, 2 for an all-reduce.
    """
    if ranks == 1:
        return 0.0
    inside = ranks * stride <= device.node
    hops = rounds * (ranks - 1) * (LINK_HOP if inside else NETWORK_HOP)
    return count * (BASE_LATENCY + hops) + sent / (device.link if inside else device.network)


def best_seconds(run: Callable[[], object], on_gpu: bool, times: int = 5) -> float:
    """The shortest of some calls after a first: what the machine can do, whatever else runs on it."""
    taken = []
    for _ in range(times + 1):
        begin = time.perf_counter()
        run()
        if on_gpu:
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - begin)
    return min(taken[1:])


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of a large copy of random numbers. On a GPU its two buffers take 1 GiB each."""
    on_gpu = device.type == "cuda"
    source = torch.rand(1 << 28 if on_gpu else 1 << 25, dtype=torch.float32, device=device)
    target, copies = torch.empty_like(source), 8 if on_gpu else 1  # one wait for several short copies

    def run() -> None:
        for _ in range(copies):
            target.copy_(source)

    return 2 * copies * source.nbytes / best_seconds(run, on_gpu)


def gemm_flops(shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs a second of a product [m, k] @ [k, n] of random numbers into a buffer."""
    m, k, n = shape
    a, b = (torch.randn(*size, device=device).to(dtype) for size in ((m, k), (n, k)))
    out = torch.empty(m, n, device=device, dtype=dtype)
    return 2 * m * k * n / best_seconds(lambda: torch.mm(a, b.t(), out=out), device.type == "cuda")


def measured(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, like: Device) -> Device:
    """This machine's device: a GEMM [m, k] @ [k, n] in `dtype` and a large copy, timed now. Links are `like`'s."""
    on_gpu, (m, k, n) = device.type == "cuda", shape
    name = torch.cuda.get_device_name(device) if on_gpu else f"this CPU, {torch.get_num_threads()} threads"
    rates, bandwidth = {rate_name(dtype): gemm_flops(shape, device, dtype)}, copy_bandwidth(device)
    source = f"measured now: GEMM [{m}, {k}] x [{k}, {n}] in {dtype}, and a copy; links of {like.name}, stated"
    here = like._replace(name=name, kind=device.type, flops=rates, bandwidth=bandwidth)
    return here._replace(memory=device_memory(device), source=source)
