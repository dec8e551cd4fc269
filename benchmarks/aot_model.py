"""What assembly code says about speed: loops, occupancy, bytes in flight, a predicted share of copy bandwidth.

A model, not a measurement. A kernel reaches the smallest of three shares:

    memory    1: its resident programs move data at copy bandwidth
    issue     the time that the schedulers and the exponential unit need for its instructions
    latency   the time of one program alone: every wait for memory takes LATENCY, every instruction ISSUE cycles

The waits come from the assembly: a program waits for a load where its register is first read, and all loads issued
before are in flight together. For loads of an earlier loop iteration it waits only for the remaining time.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

LATENCY = 700e-9  # seconds from a load to its first use, memory under load
ISSUE = 4  # cycles per instruction of a warp that is alone on its scheduler
REGISTERS, GRANULARITY, WARPS, BLOCKS = (
    65536,
    256,
    64,
    32,
)  # of a multiprocessor; registers are allocated to a warp in such steps
RESERVED_SHARED = 1024  # bytes of shared memory per block that the system reserves


class GPU(NamedTuple):
    """bandwidth: of a large copy, about 0.9 of the data sheet; clock: under load; shared: bytes per multiprocessor."""

    arch: str
    processors: int
    bandwidth: float
    clock: float
    shared: int

    @property
    def needs(self) -> float:
        """Bytes that must be in flight per multiprocessor by Little's law; twice as many are safe."""
        return self.bandwidth * LATENCY / self.processors


GPUS = {
    "A100": GPU("sm_80", 108, 1.8e12, 1.35e9, 164 << 10),
    "H100": GPU("sm_90", 132, 3.0e12, 1.7e9, 228 << 10),
    "H200": GPU("sm_90", 132, 4.3e12, 1.7e9, 228 << 10),
    "B200": GPU("sm_100", 148, 7.2e12, 1.8e9, 228 << 10),
}

INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(\S.*?);", re.M)
JUMP = re.compile(r"\bBRA\b.*?0x([0-9a-f]+)")
LOAD = re.compile(r"\bLDG\.E(\S*) (R\d+|RZ)")
STORE = re.compile(r"\bSTG\.E(\S*) ")
COPY = re.compile(r"\bLDGSTS\.E(\S*) ")  # from global into shared memory
WAIT_FOR_COPIES = re.compile(r"\bDEPBAR\.LE SB0, 0x([0-9a-f]+)")
REGISTER = re.compile(r"\bR(\d+)\b")
EXPONENTIAL = re.compile(r"\bMUFU\b")
VECTOR_STORE = re.compile(r"\bSTG\.E\S*\.128")

Code = list[tuple[int, str]]


def instructions(assembly: str) -> Code:
    """(address, text) of each instruction."""
    return [(int(m[1], 16), m[2]) for m in INSTRUCTION.finditer(assembly)]


def width(modifiers: str) -> int:
    """Bytes that a thread moves in a load or store with these modifiers."""
    for name, size in ((".256", 32), (".128", 16), (".64", 8), (".U16", 2), (".S16", 2), (".U8", 1), (".S8", 1)):
        if name in modifiers:
            return size
    return 4


def moved(code: Code, pattern: re.Pattern) -> int:
    """Bytes that a thread moves in these instructions."""
    return sum(width(m[1]) for m in (pattern.search(text) for _, text in code) if m)


def loops(code: Code) -> list[Code]:
    """Innermost loops that access global memory, in order of addresses. A backward branch ends a loop."""
    spans = []
    for end, text in code:
        jump = JUMP.search(text)
        if jump and int(jump[1], 16) < end:
            spans.append((int(jump[1], 16), end))
    inner = [a for a in spans if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    bodies = [[(at, text) for at, text in code if begin <= at <= end] for begin, end in sorted(inner)]
    return [body for body in bodies if moved(body, LOAD) + moved(body, COPY)]


def vector_path(code: Code) -> Code:
    """The longest run of code without branches that stores 128 bits, without what leads to it."""
    targets = {int(jump[1], 16) for jump in (JUMP.search(text) for _, text in code) if jump}
    runs: list[Code] = [[]]
    for address, text in code:
        if address in targets:
            runs.append([])
        runs[-1].append((address, text))
        if re.match(r"BRA|EXIT|@!?U?P\d+ BRA", text):  # a predicated EXIT ends some threads, not the run
            runs.append([])
    return max((run for run in [[], *runs] if not run or any(VECTOR_STORE.search(t) for _, t in run)), key=len)


def residents(registers: int, warps: int, shared: int, gpu: GPU) -> int:
    """Programs that fit on a multiprocessor at once, limited by registers, shared memory, warps and blocks."""
    step = GRANULARITY // 32
    by_registers = REGISTERS // (math.ceil(registers / step) * step * 32) // 4 * 4 // warps  # four schedulers
    if warps < 4:
        by_registers = REGISTERS // (math.ceil(registers / step) * step * 32 * warps)
    return min(by_registers, gpu.shared // (shared + RESERVED_SHARED), WARPS // warps, BLOCKS)


class Walk(NamedTuple):
    """seconds: of one warp; in_flight: bytes per thread that were requested but not there yet, the most at any wait."""

    seconds: float
    in_flight: int


def walk(code: Code, gpu: GPU, turns: int = 1) -> Walk:
    """One warp alone in code without branches; with more turns, the last of so many iterations of a loop."""
    now, began, most = 0.0, 0.0, 0
    pending: list[tuple[float, int, set[int]]] = []  # (when it was issued, bytes, registers), oldest first
    copies: list[tuple[float, int]] = []  # groups of copies to shared memory
    group = 0
    for turn in range(turns):
        began, most = now, most if turn < turns - 1 else 0
        for _, text in code:
            now += ISSUE / gpu.clock
            load, copy, drain = LOAD.search(text), COPY.search(text), WAIT_FOR_COPIES.search(text)
            named = [int(r) for r in REGISTER.findall(text)]
            wanted = set(named[1:] if load else named)
            if STORE.search(text) and named:  # the registers behind the first of a wide store
                wanted |= {named[-1] + i for i in range(width(STORE.search(text)[1]) // 4)}
            due = [i for i, (_, _, registers) in enumerate(pending) if registers & wanted]
            if due:
                most = max(most, sum(size for _, size, _ in pending) + sum(size for _, size in copies))
                now = max(now, pending[due[-1]][0] + LATENCY)
                del pending[: due[-1] + 1]  # in order
            if load and load[2] != "RZ":
                first, size = int(load[2][1:]), width(load[1])
                pending.append((now, size, {first + i for i in range(max(1, size // 4))}))
            elif copy:
                group += width(copy[1])
            elif "LDGDEPBAR" in text:
                copies.append((now, group))
                group = 0
            elif drain and len(copies) > int(drain[1], 16):
                most = max(most, sum(size for _, size, _ in pending) + sum(size for _, size in copies))
                last = len(copies) - int(drain[1], 16)
                now = max(now, copies[last - 1][0] + LATENCY)
                del copies[:last]
    return Walk(now - began, most)


class Pass(NamedTuple):
    """One pass of a program over its columns: code of one iteration, iterations, columns per iteration."""

    code: Code
    columns: int


def busy(code: Code) -> float:
    """Cycles of a multiprocessor for one warp: 4 instructions per cycle, 2 cycles per exponential of a warp."""
    return max(len(code) / 4, sum(bool(EXPONENTIAL.search(text)) for _, text in code) * 2)


def share(passes: list[Pass], rest: Code, columns: int, warps: int, held: int, gpu: GPU) -> float:
    """The predicted share of copy bandwidth of a program with so many columns; `held` run on a multiprocessor."""
    traffic = cycles = seconds = 0.0
    for code, step in passes:
        turns = max(1, columns // step)
        traffic += turns * (moved(code, LOAD) + moved(code, COPY) + moved(code, STORE)) * warps * 32
        cycles += turns * busy(code) * warps
        seconds += turns * walk(code, gpu, 4).seconds
    alone = walk(rest, gpu)
    traffic *= columns / (
        max(1, columns // passes[0].columns) * passes[0].columns
    )  # the share of the row outside the loops
    memory = held * traffic * gpu.processors / gpu.bandwidth
    issue = held * (cycles + busy(rest) * warps) / gpu.clock
    return min(1.0, memory / issue, memory / (seconds + alone.seconds))
