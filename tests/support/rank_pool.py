"""Processes that form a group, start once and run many cases: `Ranks(4).run(function, *arguments)`.

A case is a function of a module that can be imported by its name. It runs on every rank at the same time, with the
group as the default one, and its result is pickled. The ranks use gloo on CPU, or nccl where there is a GPU for each.
"""

import contextlib
import datetime
import importlib
import multiprocessing
import os
import tempfile
import time
import traceback
from typing import NamedTuple

import torch
from numerics import Beyond

WAIT = 600  # seconds a case may take
GROUP_TIMEOUT = 300  # seconds a collective waits for the other ranks


class Failure(NamedTuple):
    """Why a rank has no result."""

    what: str
    trace: str = ""
    beyond: bool = False  # numerics.Beyond


def serve(rank: int, n_ranks: int, store: str, pipe, gpus: bool, timeout: int) -> None:
    """The loop of one rank: receives cases from the pipe and sends (result, error) back."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(n_ranks), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    import conftest  # noqa: F401  (without a GPU it switches the interpreter on)

    if gpus:
        torch.cuda.set_device(rank)
    how = {"init_method": f"file://{store}", "rank": rank, "world_size": n_ranks}
    how["timeout"] = datetime.timedelta(seconds=timeout)
    torch.distributed.init_process_group("nccl" if gpus else "gloo", **how)
    while True:
        try:
            module, name, arguments = pipe.recv()
        except EOFError:
            break
        try:
            answer = getattr(importlib.import_module(module), name)(*arguments), None
        except BaseException as error:
            answer = (
                None,
                Failure(f"{type(error).__name__}: {error}", traceback.format_exc(), isinstance(error, Beyond)),
            )
        pipe.send(answer)
    with contextlib.suppress(Exception):
        torch.distributed.destroy_process_group()


class Ranks:
    """A group of processes."""

    def __init__(self, n_ranks: int, timeout: int = GROUP_TIMEOUT) -> None:
        context = multiprocessing.get_context("spawn")
        self.folder = tempfile.TemporaryDirectory()
        self.pipes, self.processes = [], []
        gpus = torch.cuda.device_count() >= n_ranks
        hidden = None if gpus else os.environ.get("CUDA_VISIBLE_DEVICES")
        if not gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        for rank in range(n_ranks):
            ours, theirs = context.Pipe()
            arguments = (rank, n_ranks, os.path.join(self.folder.name, "store"), theirs, gpus, timeout)
            process = context.Process(target=serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)
        if not gpus:
            os.environ.pop("CUDA_VISIBLE_DEVICES")
            if hidden is not None:
                os.environ["CUDA_VISIBLE_DEVICES"] = hidden

    def answers(self, case, *arguments) -> list[tuple]:
        """(result, error) of each rank. A rank that died or did not answer in time has an error that says so."""
        for pipe in self.pipes:
            with contextlib.suppress(OSError):
                pipe.send((case.__module__, case.__name__, arguments))
        deadline, answers = time.monotonic() + WAIT, []
        for pipe in self.pipes:
            try:
                late = not pipe.poll(max(0, deadline - time.monotonic()))
                answers.append((None, Failure("no answer in time")) if late else pipe.recv())
            except (EOFError, OSError):
                answers.append((None, Failure("the process is dead")))
        return answers

    def run(self, case, *arguments) -> list:
        """The results of the case on each rank; raises if it failed on any rank."""
        answers = self.answers(case, *arguments)
        failed = [f"rank {rank}: {error.what}\n{error.trace}" for rank, (_, error) in enumerate(answers) if error]
        if failed and all(error and error.beyond for _, error in answers):
            raise Beyond("\n".join(failed))
        if failed:
            self.close()  # the ranks may be out of step
            raise AssertionError("\n".join(failed))
        return [result for result, _ in answers]

    def close(self) -> None:
        """End the processes."""
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(5)
            process.kill()
        self.folder.cleanup()
