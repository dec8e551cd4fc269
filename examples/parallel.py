"""Several processes: torchrun's ranks, the rows dealt out among them, PyTorch's own engines around the model.

    torchrun --nproc-per-node=4 examples/dpo.py --parallel ddp             the whole model on every rank
    torchrun --nproc-per-node=4 examples/dpo.py --parallel fsdp            weights, gradients, optimizer state cut in 4
    torchrun --nproc-per-node=4 examples/dpo.py --parallel tp              every layer cut in 4, the head by vocabulary
    torchrun --nproc-per-node=4 examples/dpo.py --parallel fsdp --tp 2     layers cut in 2, those sharded over 2

How the scripts use it:

    with processes(args):           joins torchrun's group, if there is one (loop.main does)
    first(), agreed(make)           is this the rank that writes and prints; what the first one made, on all of them
    deal(rows, args)                this rank's rows; collect(rows, args) is its inverse; total(...) adds numbers up
    engine = Engine(args, model, frozen)
        engine(function)            function() as the forward of the wrapped model
        with engine.gathered():     all weights are here, as sampling wants them
        engine.whole(model)         the model with all its weights, on the first rank

A rank of tensor parallelism has the rows of its neighbours; "data ranks" are counted without them. In a process of its
own, without a group, the same calls do nothing but their work.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import functools
import gc
import operator
import os
from collections.abc import Callable, Iterator

import common
import torch
import torch.distributed as dist
from torch import Tensor, nn

ENGINES = ("ddp", "fsdp", "tp")


def add_flags(parser) -> None:
    """--parallel, --tp and --timeout, for a script that runs on several processes."""
    add = parser.add_argument
    add(
        "--parallel",
        choices=ENGINES,
        help="what torchrun's processes share: rows (ddp), weights too (fsdp), layers (tp)",
    )
    add("--tp", type=int, help="with fsdp: ranks that share each layer. Without it 1; all with --parallel tp")
    add("--timeout", type=float, default=600, help="seconds until a rank that waits for another one gives up")


def check_flags(args) -> None:
    """Adds what a script without `add_flags` lacks, and ends the program where flags and processes do not fit."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    if not hasattr(args, "parallel"):
        args.parallel, args.tp = None, 1
        if size > 1:
            common.fail(f"torchrun started {size} processes, but this script runs in one; dpo.py and ppo.py take more")
        return
    if args.parallel is None:
        if size > 1:
            common.fail(
                f"--parallel: missing; torchrun started {size} processes, which share work by {', '.join(ENGINES)}"
            )
    elif "RANK" not in os.environ:
        how = f"torchrun --nproc-per-node=2 examples/{args.script}.py --parallel {args.parallel}"
        common.fail(f"--parallel: got {args.parallel} in a process of its own; start several: {how}")
    args.tp = args.tp or (size if args.parallel == "tp" else 1)
    if args.parallel == "tp" and args.tp != size:
        common.fail(
            f"--tp: got {args.tp} with --parallel tp on {size} ranks; --parallel fsdp --tp {args.tp} shares both"
        )
    if args.tp < 1 or size % args.tp or (args.tp > 1 and args.parallel not in ("tp", "fsdp")):
        common.fail(
            f"--tp: got {args.tp} with --parallel {args.parallel} on {size} ranks; it must divide them, with fsdp"
        )
    if args.tp > 1 and args.lora:
        common.fail(
            f"--lora: not with --tp {args.tp}, which cuts the layers that it adapts; take --parallel ddp or fsdp"
        )


@contextlib.contextmanager
def processes(args) -> Iterator[None]:
    """torchrun's group around a run: nccl on GPUs (a GPU a rank), gloo on CPUs. Ranks must have equal settings."""
    if args.parallel is None or dist.is_initialized():
        yield
        return
    kind = torch.device(args.device).type
    if kind == "cuda":
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(args.device)
    waits = datetime.timedelta(seconds=args.timeout)
    dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo", timeout=waits)
    try:
        settings = {name: value for name, value in vars(args).items() if name != "device"}
        equal("settings", settings)
        yield
        wait()  # none leaves while another one still writes
    finally:
        mesh.cache_clear()
        gc.collect()  # engines, in cycles, hold groups that must not outlive this one
        dist.destroy_process_group()


def home(args) -> str:
    """Where a model is loaded to: where it trains, or the CPU if an `Engine` shall cut it first."""
    return "cpu" if getattr(args, "parallel", None) in ("fsdp", "tp") else args.device


def size() -> int:
    """Ranks in all; 1 in a process of its own."""
    return dist.get_world_size() if dist.is_initialized() else 1


def first() -> bool:
    """Whether this rank writes files and prints."""
    return size() == 1 or dist.get_rank() == 0


def wait() -> None:
    """Until all ranks are here."""
    if size() > 1:
        dist.barrier()


def agreed(make: Callable):
    """make() of the first rank, on all of them. What it makes can be pickled."""
    made = [make() if first() else None]
    if size() > 1:
        dist.broadcast_object_list(made, 0)
    return made[0]


def equal(what: str, values: dict) -> None:
    """Ends the program with the difference where ranks have other values than rank 0: they would wait in vain."""
    theirs = agreed(lambda: values)
    bad = [
        f"{name}: {values.get(name)}, {theirs.get(name)} on rank 0"
        for name in values
        if values[name] != theirs.get(name)
    ]
    every: list = [None] * size()
    if size() > 1:
        dist.all_gather_object(every, bad or ([] if values.keys() == theirs.keys() else ["other names"]))
    for rank, found in enumerate(every):
        if found:
            common.fail(f"the ranks' {what} differ; rank {rank} has {'; '.join(found[:3])}. Start all ranks alike")


@functools.cache
def mesh(device: str, tp: int) -> dist.DeviceMesh:
    """[data, tensor]: ranks of one tensor group are neighbours."""
    return dist.init_device_mesh(device, (size() // tp, tp), mesh_dim_names=("data", "tensor"))


def axis(args, name: str) -> dist.DeviceMesh:
    """The mesh's axis "data" or "tensor"."""
    return mesh(torch.device(args.device).type, args.tp)[name]


def data_ranks(args) -> tuple[int, int]:
    """(this rank's number among those that have rows of their own, how many they are)."""
    return (dist.get_rank() // args.tp, size() // args.tp) if size() > 1 else (0, 1)


def deal(rows: list, args) -> list:
    """This rank's rows, those of its neighbours before and after them; lengths differ by at most 1."""
    rank, count = data_ranks(args)
    return rows[len(rows) * rank // count : len(rows) * (rank + 1) // count]


def collect(rows: list[dict], args) -> list[dict]:
    """All ranks' rows in the order of `deal`; their tensors on args.device."""
    if data_ranks(args)[1] == 1:
        return rows

    def moved(rows: list[dict], device: str) -> list[dict]:
        return [{key: v.to(device) if isinstance(v, Tensor) else v for key, v in row.items()} for row in rows]

    every: list = [None] * data_ranks(args)[1]
    dist.all_gather_object(every, moved(rows, "cpu"), group=axis(args, "data").get_group())
    return moved([row for part in every for row in part], args.device)


def parts(rows: list, args) -> Iterator[tuple[list, int, bool]]:
    """(rows of a micro-batch, its weight, is it the last): as many on each rank, since engines wait for each other.

    A rank that has run out of rows goes along with one that weighs 0.
    """
    mine = deal(rows, args)
    most = -(-len(rows) // data_ranks(args)[1])
    step = args.micro_batch_size or most
    for begin in range(0, most, step):
        part = mine[begin : begin + step]
        yield part or rows[:1], int(bool(part)), begin + step >= most


def total(values: dict[str, Tensor | float], args) -> dict[str, float]:
    """Each value summed over the data ranks, in float64; one collective."""
    if data_ranks(args)[1] == 1:
        return {name: float(value) for name, value in values.items()}
    added = torch.tensor([float(value) for value in values.values()], dtype=torch.float64, device=args.device)
    dist.all_reduce(added, group=axis(args, "data").get_group())
    return dict(zip(values, added.tolist()))


def own_seed(seed: int | None, args) -> int | None:
    """A seed for draws that differ from rank to rank and leave the generators alike; on one rank the seed itself."""
    rank, count = data_ranks(args)
    if count == 1:
        return seed
    return (int(torch.randint(2**31, ())) if seed is None else seed) + rank


def clip_grad_norm(parameters: list[nn.Parameter], limit: float) -> Tensor:
    """torch's, for parameters on different meshes, too: the norm of the whole gradient, the same on all ranks."""
    meshes: dict = {}
    for p in parameters:
        if p.grad is not None:
            meshes.setdefault(getattr(p.grad, "device_mesh", None), []).append(p)
    norms = [torch.nn.utils.get_total_norm([p.grad for p in group]) for group in meshes.values()]
    norm = torch.linalg.vector_norm(torch.stack([n.full_tensor() if hasattr(n, "full_tensor") else n for n in norms]))
    for group in meshes.values():
        torch.nn.utils.clip_grads_with_norm_(group, limit, norm)
    return norm


class Inside(nn.Module):
    """What an engine wraps: modules, and as its forward any function of them. Its hooks then fire for all weights,

    the LM head's too, whose own forward is never called."""

    def __init__(self, *modules: nn.Module):
        super().__init__()
        self.parts = nn.ModuleList(modules)

    def forward(self, function: Callable):
        return function()


class Engine:
    """DDP, fully_shard or tensor parallelism, by args.parallel, around a model and its frozen reference, in place.

    Args:
        module: what is trained, still whole: a causal LM (in PEFT's wrapper), or a module with one as its `policy`.
        frozen: a reference of its own, or None.
    """

    def __init__(self, args, module: nn.Module, frozen: nn.Module | None = None):
        self.args, self.module, self.frozen = args, module, frozen
        self.policy = getattr(module, "policy", module)
        modules = [part for part in (module, frozen) if part is not None]
        self.outer: nn.Module = Inside(*modules)
        if args.parallel is None:
            return
        equal("weights", {name: (tuple(p.shape), str(p.dtype)) for name, p in self.outer.named_parameters()})
        self.skeleton = on_meta(module)
        for part in modules if args.tp > 1 else []:
            tensor_parallel(causal_lm(part), axis(args, "tensor"))
        if args.parallel == "fsdp":
            names = {name for part in modules for name in causal_lm(part)._no_split_modules or ()}
            for layer in [m for m in self.outer.modules() if type(m).__name__ in names]:
                dist.fsdp.fully_shard(layer, mesh=axis(args, "data"))
            dist.fsdp.fully_shard(self.outer, mesh=axis(args, "data"))
        self.outer.to(args.device)
        if args.parallel == "ddp":
            devices = [args.device] if args.device.startswith("cuda") else None
            self.outer = nn.parallel.DistributedDataParallel(self.outer, device_ids=devices)

    def __call__(self, function: Callable):
        return self.outer(function)

    def accumulate(self, last: bool) -> contextlib.AbstractContextManager:
        """Around a micro-batch: DDP reduces gradients after the last one alone."""
        return self.outer.no_sync() if self.args.parallel == "ddp" and not last else contextlib.nullcontext()

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """Inside, each rank has all weights that fully_shard cut, and waits for no other one: for sampling."""
        if self.args.parallel != "fsdp":
            yield
            return
        self.outer(lambda: None)  # fully_shard takes for its root what runs first
        units = [m for m in self.outer.modules() if isinstance(m, dist.fsdp.FSDPModule)]
        self.outer.set_reshard_after_forward(False)
        for unit in units:
            unit.unshard()
        try:
            yield
        finally:
            self.outer.set_reshard_after_forward(True)
            for unit in units:
                unit.reshard()

    def whole(self, part: nn.Module) -> nn.Module | None:
        """A part of what is trained, unwrapped, on the CPU, with all weights; None on ranks but the first."""
        if self.args.parallel in (None, "ddp"):
            return part if first() else None
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        state = get_model_state_dict(self.module, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if not first():
            return None
        ties = tied(self.skeleton)
        self.skeleton.load_state_dict(state, assign=True)
        for one, *others in ties:  # which `assign` has untied
            for other in others:
                parent, _, name = other.rpartition(".")
                setattr(self.skeleton.get_submodule(parent), name, operator.attrgetter(one)(self.skeleton))
        name = next(name for name, module in self.module.named_modules() if module is part)
        return self.skeleton.get_submodule(name)


def tied(module: nn.Module) -> list[list[str]]:
    """The names of each parameter and buffer: several of one that is tied."""
    names: dict[int, list[str]] = {}
    for each in (module.named_parameters, module.named_buffers):
        for name, tensor in each(remove_duplicate=False):
            names.setdefault(id(tensor), []).append(name)
    return list(names.values())


def on_meta(module: nn.Module) -> nn.Module:
    """A copy without weights."""
    tensors = [*module.parameters(), *module.buffers()]
    empty = lambda t: nn.Parameter(t.to("meta"), t.requires_grad) if isinstance(t, nn.Parameter) else t  # noqa: E731
    return copy.deepcopy(module, {id(t): empty(t) for t in tensors})


def causal_lm(module: nn.Module) -> nn.Module:
    """transformers' model in PEFT's wrapper or beside a value head."""
    found = (m for m in module.modules() if hasattr(m, "_no_split_modules") and hasattr(m, "get_output_embeddings"))
    return next(m for m in found if m.get_output_embeddings() is not None)


def tensor_parallel(model: nn.Module, ranks: dist.DeviceMesh) -> None:
    """Cuts a transformers model over the ranks by its own plan, with PyTorch's parallelize_module, in place.

    The head and the embedding are cut by rows of the vocabulary: `fused_po` takes the head's part as it is.
    """
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

    styles = {
        "colwise": ColwiseParallel(),
        "rowwise": RowwiseParallel(),
        "colwise_gather_output": ColwiseParallel(output_layouts=Replicate()),
        "embedding_rowwise": RowwiseParallel(input_layouts=Replicate()),
        "replicated_with_grad_allreduce": SequenceParallel(sequence_dim=2, use_local_output=True),  # norms of heads
    }
    plan, config = model.tp_plan, model.config.get_text_config()
    if unknown := sorted(set(plan.values()) - styles.keys()) or ([] if plan else ["no plan"]):
        common.fail(f"--tp: {type(model).__name__} cannot be cut ({', '.join(unknown)}); take --parallel fsdp")
    for name in ("num_attention_heads", "num_key_value_heads"):
        if getattr(config, name, 0) % ranks.size():
            common.fail(f"--tp: {ranks.size()} does not divide the model's {name}, {getattr(config, name)}")
    parallelize_module(model, ranks, {name: styles[style] for name, style in plan.items()})
    if config.tie_word_embeddings:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
