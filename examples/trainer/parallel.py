"""Training on several processes: torchrun's ranks, their shares of the rows, and PyTorch's DDP, FSDP2 and TP.

    torchrun --nproc-per-node=4 examples/dpo.py --parallel ddp             the whole model on every rank
    torchrun --nproc-per-node=4 examples/dpo.py --parallel fsdp            weights, gradients, optimizer sharded over 4
    torchrun --nproc-per-node=4 examples/dpo.py --parallel tp              every layer split over 4, head by vocabulary
    torchrun --nproc-per-node=4 examples/dpo.py --parallel fsdp --tp 2     layers split over 2, and sharded over 2

How the scripts use it:

    with processes(args):           joins torchrun's process group, if there is one (training_run.main does this)
    first()                         whether this rank prints and writes files
    agreed(make)                    the first rank's result of make(), on all ranks
    deal(rows, args)                this rank's share of the rows; collect(rows, args) is the inverse
    total(values, args)             sums over the ranks
    engine = Engine(args, model, frozen)
        engine(function)            runs function() as the forward of the wrapped model
        with engine.gathered():     every rank has all weights, which sampling needs
        engine.whole(model)         the unwrapped model with all weights, on the first rank

The ranks that split a layer (a tensor-parallel group) have the same rows; a data rank is one such group. In a single
process without a process group the same functions work, without communication.
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

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .errors import fail

ENGINES = ("ddp", "fsdp", "tp")


def add_flags(parser) -> None:
    """Add --parallel, --tp and --timeout, for a script that can run on several processes."""
    add = parser.add_argument
    text = "how torchrun's processes divide the work: rows (ddp), rows and weights (fsdp), or layers (tp)"
    add("--parallel", choices=ENGINES, help=text)
    text = "with --parallel fsdp: number of ranks that split each layer. Default: 1; all ranks with --parallel tp"
    add("--tp", type=int, help=text)
    add("--timeout", type=float, default=600, help="seconds that a rank waits for another before it gives up")


def check_flags(args) -> None:
    """Check that the flags fit the number of processes, and set defaults in scripts without `add_flags`."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    if not hasattr(args, "parallel"):
        args.parallel, args.tp = None, 1
        if size > 1:
            fail(f"torchrun started {size} processes, but this script runs in one; dpo.py and ppo.py can use several")
        return
    if args.parallel is None:
        if size > 1:
            fail(
                f"--parallel: missing; torchrun started {size} processes, which divide the work by {', '.join(ENGINES)}"
            )
    elif "RANK" not in os.environ:
        command = f"torchrun --nproc-per-node=2 examples/{args.script}.py --parallel {args.parallel}"
        fail(f"--parallel: got {args.parallel} in a single process; start several: {command}")
    args.tp = args.tp or (size if args.parallel == "tp" else 1)
    if args.parallel == "tp" and args.tp != size:
        fail(f"--tp: got {args.tp} with --parallel tp on {size} ranks; --parallel fsdp --tp {args.tp} combines the two")
    if args.tp < 1 or size % args.tp or (args.tp > 1 and args.parallel not in ("tp", "fsdp")):
        fail(f"--tp: got {args.tp} with --parallel {args.parallel} on {size} ranks; it must divide them, with fsdp")
    if args.tp > 1 and args.lora:
        fail(f"--lora: not with --tp {args.tp}, which splits the layers that LoRA adapts; use --parallel ddp or fsdp")


@contextlib.contextmanager
def processes(args) -> Iterator[None]:
    """Inside, torchrun's ranks form a process group: nccl with one GPU per rank, or gloo on CPUs."""
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
        wait()  # until every rank has finished writing
    finally:
        mesh.cache_clear()
        gc.collect()  # reference cycles keep engines alive, whose process groups must be freed first
        dist.destroy_process_group()


def load_device(args) -> str:
    """The device to load a model to: --device, or the CPU if an `Engine` shards the model first."""
    return "cpu" if getattr(args, "parallel", None) in ("fsdp", "tp") else args.device


def size() -> int:
    """The number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def first() -> bool:
    """Whether this rank prints and writes files."""
    return size() == 1 or dist.get_rank() == 0


def wait() -> None:
    """Wait for all ranks."""
    if size() > 1:
        dist.barrier()


def agreed(make: Callable):
    """Run make() on the first rank and return its result, which must be picklable, on all ranks."""
    made = [make() if first() else None]
    if size() > 1:
        dist.broadcast_object_list(made, 0)
    return made[0]


def equal(what: str, values: dict) -> None:
    """End the program if a rank has other values than rank 0: the ranks would wait for each other forever."""
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
            fail(f"the ranks' {what} differ; rank {rank} has {'; '.join(found[:3])}. Start all ranks the same way")


@functools.cache
def mesh(device: str, tp: int) -> dist.DeviceMesh:
    """The device mesh [data, tensor]; the ranks of a tensor-parallel group are consecutive."""
    return dist.init_device_mesh(device, (size() // tp, tp), mesh_dim_names=("data", "tensor"))


def axis(args, name: str) -> dist.DeviceMesh:
    """The dimension "data" or "tensor" of the mesh."""
    return mesh(torch.device(args.device).type, args.tp)[name]


def data_ranks(args) -> tuple[int, int]:
    """(index of this data rank, number of data ranks)."""
    return (dist.get_rank() // args.tp, size() // args.tp) if size() > 1 else (0, 1)


def deal(rows: list, args) -> list:
    """This data rank's share of the rows: a contiguous part; the parts' lengths differ by at most 1."""
    rank, count = data_ranks(args)
    return rows[len(rows) * rank // count : len(rows) * (rank + 1) // count]


def collect(rows: list[dict], args) -> list[dict]:
    """The rows of all data ranks in the order of `deal`, with their tensors on args.device."""
    if data_ranks(args)[1] == 1:
        return rows

    def moved(rows: list[dict], device: str) -> list[dict]:
        return [{key: v.to(device) if isinstance(v, Tensor) else v for key, v in row.items()} for row in rows]

    every: list = [None] * data_ranks(args)[1]
    dist.all_gather_object(every, moved(rows, "cpu"), group=axis(args, "data").get_group())
    return moved([row for part in every for row in part], args.device)


def parts(rows: list, args) -> Iterator[tuple[list, int, bool]]:
    """Yield (rows of a micro-batch, its weight, whether it is the last), equally often on each rank.

    Ranks must make the same number of forward passes, since they communicate in each. A rank with no rows left repeats
    one with weight 0.
    """
    mine = deal(rows, args)
    most = -(-len(rows) // data_ranks(args)[1])
    step = args.micro_batch_size or most
    for begin in range(0, most, step):
        part = mine[begin : begin + step]
        yield part or rows[:1], int(bool(part)), begin + step >= most


def total(values: dict[str, Tensor | float], args) -> dict[str, float]:
    """Sum each value over the data ranks in float64, by one collective."""
    if data_ranks(args)[1] == 1:
        return {name: float(value) for name, value in values.items()}
    added = torch.tensor([float(value) for value in values.values()], dtype=torch.float64, device=args.device)
    dist.all_reduce(added, group=axis(args, "data").get_group())
    return dict(zip(values, added.tolist()))


def own_seed(seed: int | None, args) -> int | None:
    """A seed that differs between data ranks and leaves their generators in the same state. On one rank: `seed`."""
    rank, count = data_ranks(args)
    if count == 1:
        return seed
    return (int(torch.randint(2**31, ())) if seed is None else seed) + rank


def clip_grad_norm(parameters: list[nn.Parameter], limit: float) -> Tensor:
    """Clip to the norm of the whole gradient, which all ranks agree on; parameters may be on different meshes."""
    meshes: dict = {}
    for p in parameters:
        if p.grad is not None:
            meshes.setdefault(getattr(p.grad, "device_mesh", None), []).append(p)
    norms = [torch.nn.utils.get_total_norm([p.grad for p in group]) for group in meshes.values()]
    norm = torch.linalg.vector_norm(torch.stack([n.full_tensor() if hasattr(n, "full_tensor") else n for n in norms]))
    for group in meshes.values():
        torch.nn.utils.clip_grads_with_norm_(group, limit, norm)
    return norm


class FunctionModule(nn.Module):
    """The module that DDP or FSDP wraps: it contains the models, and its forward runs any function that uses them.

    Hooks on this module then cover all weights, also those of the LM head, whose own forward is never called.
    """

    def __init__(self, *modules: nn.Module):
        super().__init__()
        self.parts = nn.ModuleList(modules)

    def forward(self, function: Callable):
        return function()


class Engine:
    """Wraps a model and its frozen reference in DDP, FSDP2 (fully_shard) or tensor parallelism, in place.

    Args:
        module: the module to train, before sharding: a causal LM (also a PeftModel), or a module with one as `policy`.
        frozen: the reference, or None if it is the model without its adapters.
    """

    def __init__(self, args, module: nn.Module, frozen: nn.Module | None = None):
        self.args, self.module, self.frozen = args, module, frozen
        self.policy = getattr(module, "policy", module)
        modules = [part for part in (module, frozen) if part is not None]
        self.outer: nn.Module = FunctionModule(*modules)
        if args.parallel is None:
            return
        equal("weights", {name: (tuple(p.shape), str(p.dtype)) for name, p in self.outer.named_parameters()})
        self.skeleton = without_weights(module)
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
        """Context of a micro-batch: DDP reduces gradients only after the last one."""
        return self.outer.no_sync() if self.args.parallel == "ddp" and not last else contextlib.nullcontext()

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """Inside, each rank has all weights that FSDP shards, and can sample without waiting for others."""
        if self.args.parallel != "fsdp":
            yield
            return
        self.outer(lambda: None)  # fully_shard takes the first module that runs as its root
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
        """A submodule of what is trained, unwrapped and with all weights, on the first rank; None on the others."""
        if self.args.parallel in (None, "ddp"):
            return part if first() else None
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        state = get_model_state_dict(self.module, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if not first():
            return None
        ties = tied(self.skeleton)
        self.skeleton.load_state_dict(state, assign=True)
        for one, *others in ties:  # assign=True has untied them
            for other in others:
                parent, _, name = other.rpartition(".")
                setattr(self.skeleton.get_submodule(parent), name, operator.attrgetter(one)(self.skeleton))
        name = next(name for name, module in self.module.named_modules() if module is part)
        return self.skeleton.get_submodule(name)


def tied(module: nn.Module) -> list[list[str]]:
    """The names of each parameter and buffer; a tied one has several."""
    names: dict[int, list[str]] = {}
    for each in (module.named_parameters, module.named_buffers):
        for name, tensor in each(remove_duplicate=False):
            names.setdefault(id(tensor), []).append(name)
    return list(names.values())


def without_weights(module: nn.Module) -> nn.Module:
    """A copy on the meta device."""
    tensors = [*module.parameters(), *module.buffers()]
    empty = lambda t: nn.Parameter(t.to("meta"), t.requires_grad) if isinstance(t, nn.Parameter) else t  # noqa: E731
    return copy.deepcopy(module, {id(t): empty(t) for t in tensors})


def causal_lm(module: nn.Module) -> nn.Module:
    """The transformers model inside a PeftModel or a module with a value head."""
    found = (m for m in module.modules() if hasattr(m, "_no_split_modules") and hasattr(m, "get_output_embeddings"))
    return next(m for m in found if m.get_output_embeddings() is not None)


def tensor_parallel(model: nn.Module, ranks: dist.DeviceMesh) -> None:
    """Split a transformers model over the ranks in place, by its own tp_plan and PyTorch's parallelize_module.

    Head and embedding are split by rows of the vocabulary; `fused_po` works on a rank's part of the head directly.
    """
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

    styles = {
        "colwise": ColwiseParallel(),
        "rowwise": RowwiseParallel(),
        "colwise_gather_output": ColwiseParallel(output_layouts=Replicate()),
        "embedding_rowwise": RowwiseParallel(input_layouts=Replicate()),
        "replicated_with_grad_allreduce": SequenceParallel(sequence_dim=2, use_local_output=True),  # QK norms
    }
    plan, config = model.tp_plan, model.config.get_text_config()
    if unknown := sorted(set(plan.values()) - styles.keys()) or ([] if plan else ["no plan"]):
        fail(f"--tp: {type(model).__name__} cannot be split ({', '.join(unknown)}); use --parallel fsdp")
    for name in ("num_attention_heads", "num_key_value_heads"):
        if getattr(config, name, 0) % ranks.size():
            fail(
                f"--tp: {ranks.size()} does not divide the model's {name}, {getattr(config, name)}; use --parallel fsdp"
            )
    parallelize_module(model, ranks, {name: styles[style] for name, style in plan.items()})
    if config.tie_word_embeddings:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
